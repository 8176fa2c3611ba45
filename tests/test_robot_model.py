"""The tree of links: the linear map of mimics and locked joints, joining models, and errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jidm.errors import UrdfError
from jidm.robot.model import Joint, Link, Mimic, RobotModel, join_models

X = np.array([1.0, 0.0, 0.0])


def hinge(name: str, parent: str, child: str, mimic: Mimic | None = None, kind: str = "revolute") -> Joint:
    return Joint(name, kind, parent, child, np.eye(4), X, mimic=mimic)  # type: ignore[arg-type]


def chain(*mimics: Mimic | None) -> RobotModel:
    """Joints a, b, c, ... one after the other."""
    names = "abcdefgh"[: len(mimics)]
    joints = [hinge(x, f"l{k}", f"l{k + 1}", m) for k, (x, m) in enumerate(zip(names, mimics, strict=True))]
    return RobotModel("chain", tuple(Link(f"l{k}") for k in range(len(mimics) + 1)), tuple(joints))


def test_chains_of_mimics_are_composed_in_any_order() -> None:
    """a = 2 b + 1, b = -3 d + 0.5, so a = -6 d + 2; c is locked."""
    model = chain(Mimic("b", 2, 1), Mimic("d", -3, 0.5), None, None)
    A, b = model.coupling(("d",), {"c": 0.7})
    np.testing.assert_allclose(A, [[-6], [-3], [0], [1]])
    np.testing.assert_allclose(b, [2, 0.5, 0.7, 0])


def test_columns_follow_the_given_order_and_an_actuated_mimic_is_free() -> None:
    A, b = chain(None, Mimic("a", 5, 5), None).coupling(("c", "b", "a"))
    np.testing.assert_allclose(A, np.eye(3)[::-1])
    assert not b.any()


def test_joints_that_cannot_be_coupled_are_named() -> None:
    with pytest.raises(UrdfError, match="joint 'b' is neither actuated, locked nor a mimic"):
        chain(None, None).coupling(("a",))
    with pytest.raises(UrdfError, match="in a cycle: a -> b -> a"):
        chain(Mimic("b"), Mimic("a")).coupling(())
    with pytest.raises(UrdfError, match=r"no movable joint 'z'.*a, b"):
        chain(None, None).coupling(("a", "z"))


def test_a_tree_out_of_order_is_refused() -> None:
    model = chain(None, None)
    with pytest.raises(UrdfError, match="depth-first"):
        RobotModel("r", model.links, model.joints[::-1])
    with pytest.raises(UrdfError, match=r"3 links need 2 joints"):
        RobotModel("r", model.links, model.joints[:1])
    with pytest.raises(UrdfError, match=r"no link 'l9': .*known: l0, l1, l2"):
        model.link_index("l9")


def test_joined_models_stay_independent() -> None:
    part = chain(None, Mimic("a", -1, 0.1))
    T = np.eye(4)
    T[:3, 3] = 1, 2, 3
    whole = join_models("pair", {"left": (part, T), "right": (part, np.eye(4))})
    assert whole.root == "base" and [x.name for x in whole.links[:2]] == ["base", "left_l0"]
    np.testing.assert_array_equal(whole.joints[0].T_parent_joint, T)
    A, b = whole.coupling(("left_a", "right_a"))
    np.testing.assert_allclose(A, [[1, 0], [-1, 0], [0, 1], [0, -1]])
    np.testing.assert_allclose(b, [0, 0.1, 0, 0.1])
    assert part.joints[0].name == "a", "the parts are left as they were"
    held = replace(part, joints=(part.joints[0], replace(part.joints[1], type="floating", mimic=None)))
    assert [j.name for j in held.movable_joints] == ["a"]
