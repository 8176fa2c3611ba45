"""LingBot's 30 numbers and quantile normalization: vectors written by hand, round trips, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kinematics import pinocchio_poses

from jidm import load_embodiment
from jidm.errors import InputError
from jidm.serving.lingbot_format import LINGBOT_LAYOUTS, LingBotFormat, find_arms
from jidm.serving.normalization import QuantileNormalizer

pinocchio = pytest.importorskip("pinocchio")


def test_golden_vector_of_a_left_arm() -> None:
    """Two links of 0.1 m in the plane, initially straight along +y. The elbow turns by +90 degrees; the tip moves from
    (0, 0.2) to (-0.1, 0.1) and turns with it."""
    format_ = LingBotFormat(load_embodiment("planar_finger_2"), layout="lingbot_va", side="left")
    got = format_.pack([[np.pi / 2, 0.0], [np.pi / 2, np.pi / 2]])
    half = np.sqrt(0.5)
    first = [0, 0, 0, 0, 0, 0, 1, *[0] * 7, np.pi / 2, 0, *[0] * 14]
    second = [-0.1, -0.1, 0, 0, 0, half, half, *[0] * 7, np.pi / 2, np.pi / 2, *[0] * 14]
    np.testing.assert_allclose(got, [first, second], atol=1e-9)


def test_golden_vectors_of_two_arms() -> None:
    """Known joints and grippers of both arms. Nothing has moved, so the relative poses are the identity."""
    robot = load_embodiment("cobot_magic")
    q = np.array([0.1, 0.2, -0.3, 0.4, 0.5, 0.6, 0.0, 1.1, 1.2, -1.3, 1.4, 1.15, 1.6, robot.upper[13]])
    identity = [0, 0, 0, 0, 0, 0, 1]
    left, right = [0.1, 0.2, -0.3, 0.4, 0.5, 0.6], [1.1, 1.2, -1.3, 1.4, 1.15, 1.6]
    expected = {
        "lingbot_va": [*identity, *identity, *left, 0, *right, 0, 0.0, 1.0],
        "paper_per_arm": [*identity, *left, 0, 0.0, *identity, *right, 0, 1.0],
        "lingbot_vla": [*left, *right, 0, 0, *identity, *identity, 0.0, 1.0],
    }
    assert set(expected) == set(LINGBOT_LAYOUTS)
    for layout, numbers in expected.items():
        np.testing.assert_allclose(LingBotFormat(robot, layout=layout).pack(q[None])[0], numbers, atol=1e-12)


def test_golden_vectors_of_a_right_arm() -> None:
    robot = load_embodiment("panda")
    q = np.array([0.1, -0.2, 0.3, -0.4, 0.5, 0.6, 0.7, 0.01])
    joints, identity = q[:7].tolist(), [0, 0, 0, 0, 0, 0, 1]
    expected = {
        "lingbot_va": [*[0] * 7, *identity, *[0] * 7, *joints, 0, 0.25],
        "paper_per_arm": [*[0] * 15, *identity, *joints, 0.25],
        "lingbot_vla": [*joints, *[0] * 7, *identity, *[0] * 7, 0.25, 0],
    }
    for layout, numbers in expected.items():
        side = None if layout == "lingbot_vla" else "right"
        np.testing.assert_allclose(LingBotFormat(robot, layout=layout, side=side).pack(q[None])[0], numbers, atol=1e-12)


@pytest.mark.parametrize("name", ["panda", "piper", "iiwa7", "ur5", "xarm7", "so100", "cobot_magic", "planar_finger_5"])
@pytest.mark.parametrize("layout", LINGBOT_LAYOUTS)
def test_round_trip(name: str, layout: str) -> None:
    robot = load_embodiment(name)
    side = None if layout == "lingbot_vla" or name == "cobot_magic" else "right"
    format_ = LingBotFormat(robot, layout=layout, side=side)
    low, high = np.nan_to_num(robot.lower, neginf=-3), np.nan_to_num(robot.upper, posinf=3)
    q = np.random.default_rng(0).uniform(low, high, (3, 4, robot.n))
    numbers = format_.pack(q)
    assert numbers.shape == (3, 4, 30) and not numbers[..., ~format_.channel_mask].any()
    np.testing.assert_allclose(format_.unpack(numbers), q, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("name", "frame"), [("panda", "panda_hand_tcp"), ("ur5", "tool0"), ("xarm7", "link_eef")])
def test_poses_agree_with_pinocchio(name: str, frame: str) -> None:
    """Composed as LingBot-VA's client does: the initial position added, the initial rotation multiplied from the left."""
    robot = load_embodiment(name)
    link = robot.model.link_index(frame)
    format_ = LingBotFormat(robot, layout="lingbot_va", side="left")
    rng = np.random.default_rng(1)
    q = robot.home + rng.uniform(-0.5, 0.5, (5, robot.n)) * robot.exploration_range
    poses = pinocchio_poses(robot, torch.from_numpy(q))[:, link]
    first = poses[0]
    for pose, true in zip(format_.pack(q)[:, :7], poses, strict=True):
        x, y, z, w = pose[3:]
        turn = pinocchio.Quaternion(w, x, y, z).toRotationMatrix()
        np.testing.assert_allclose(pose[:3] + first[:3, 3], true[:3, 3], atol=1e-9)
        np.testing.assert_allclose(first[:3, :3] @ turn, true[:3, :3], atol=1e-9)
        assert w >= 0


def test_arms_are_found() -> None:
    arms = [(arm.joints, arm.gripper, arm.link) for arm in find_arms(load_embodiment("cobot_magic"))]
    assert arms == [((0, 1, 2, 3, 4, 5), 6, "left_link6"), ((7, 8, 9, 10, 11, 12), 13, "right_link6")]


def test_ambiguous_robots_and_layouts_are_refused() -> None:
    panda, pair, hand = (load_embodiment(name) for name in ("panda", "cobot_magic", "allegro_right"))
    with pytest.raises(InputError, match=r"name the layout.*three orders"):
        LingBotFormat(panda, layout=None, side="left")
    with pytest.raises(InputError, match="did you mean 'lingbot_va'"):
        LingBotFormat(panda, layout="lingbot-va", side="left")
    with pytest.raises(InputError, match="name the side"):
        LingBotFormat(panda, layout="lingbot_va")
    with pytest.raises(InputError, match="no side"):
        LingBotFormat(panda, layout="lingbot_va", side="middle")
    with pytest.raises(InputError, match="two arms"):
        LingBotFormat(pair, layout="lingbot_va", side="left")
    with pytest.raises(InputError, match="4 arms"):
        LingBotFormat(hand, layout="lingbot_va")


def test_numbers_of_another_layout_side_or_scale_are_refused() -> None:
    robot = load_embodiment("panda")
    left = LingBotFormat(robot, layout="lingbot_va", side="left")
    numbers = left.pack(robot.home[None])
    for other in (("lingbot_va", "right"), ("paper_per_arm", "left"), ("lingbot_vla", None)):
        with pytest.raises(InputError, match="wrong layout, side or robot"):
            LingBotFormat(robot, layout=other[0], side=other[1]).unpack(numbers)
    normalized = QuantileNormalizer(np.full(30, -1.0), np.full(30, 2.0)).normalize(numbers)
    with pytest.raises(InputError, match="still normalized"):
        left.unpack(normalized)
    for wrong in (numbers[..., :29], numbers * np.nan):
        with pytest.raises(InputError, match="finite"):
            left.unpack(wrong)
    with pytest.raises(InputError, match="n = 8"):
        left.pack(np.zeros((3, 7)))


# ---- quantiles -------------------------------------------------------------------------------------------------------


def test_quantile_normalization_is_the_formula_and_inverts() -> None:
    q = QuantileNormalizer(np.array([-1.0, 0.0, 2.0]), np.array([1.0, 0.0, 4.0]))
    x = np.array([[0.5, 0.0, 4.0], [3.0, 0.2, -1.0]])
    by_hand = [
        [1.5 / 2.000001 * 2 - 1, -1.0, 2 / 2.000001 * 2 - 1],
        [4 / 2.000001 * 2 - 1, 0.2 / 1e-6 * 2 - 1, -3 / 2.000001 * 2 - 1],
    ]
    np.testing.assert_allclose(q.normalize(x), by_hand, rtol=1e-12)
    np.testing.assert_allclose(q.denormalize(q.normalize(x)), x, atol=1e-10)
    with pytest.raises(InputError, match="of 3 numbers"):
        q.normalize(np.zeros(4))


def test_quantile_files_of_other_projects_are_read(tmp_path: Path) -> None:
    two = {"q01": [0.0, 1.0], "q99": [2.0, 3.0], "mean": [1.0, 2.0], "std": [1.0, 1.0]}
    more = {"q01": [0.5], "q99": [1.5]}
    files = {
        "norm_stats.json": json.dumps({"norm_stats": {"actions": two, "state": more}}),
        "stats.json": json.dumps({"action": two, "observation.state": more, "timestamp": {"min": [0]}}),
        "cfg.py": "import os\ncfg.norm_stat = {'q01': [0.] + [1.] * 1, 'q99': [2., -3. * 1 if 0 else 3.][:2]}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name, feature in (("norm_stats.json", "actions"), ("stats.json", "action")):
        found = QuantileNormalizer.read(tmp_path / name, feature)
        assert found.q01.tolist() == [0, 1] and found.q99.tolist() == [2, 3]
        with pytest.raises(InputError, match="which quantiles"):
            QuantileNormalizer.read(tmp_path / name)
    with pytest.raises(InputError):  # only sums and repetitions of lists of numbers are evaluated
        QuantileNormalizer.read(tmp_path / "cfg.py")
    (tmp_path / "cfg.py").write_text(
        "x = EasyDict(__name__='a')\nx.norm_stat = {\n 'q01': [-1, .5] + [0.] * 3,\n 'q99': [1.] * 5}\n"
    )
    found = QuantileNormalizer.read(tmp_path / "cfg.py")
    assert found.q01.tolist() == [-1, 0.5, 0, 0, 0] and found.q99.tolist() == [1] * 5
    assert QuantileNormalizer.read(two).q99.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "json"),
        ('{"action": {"min": [0], "max": [1]}}', "no quantiles"),
        ('{"action": {"q01": [1], "q99": [0]}}', "not above"),
        ('{"action": {"q01": [1, 2], "q99": [3]}}', "equally many"),
        ('{"action": {"q01": ["a"], "q99": ["b"]}}', "numbers"),
        ('{"action": {"q01": [NaN], "q99": [1]}}', "finite"),
    ],
)
def test_files_without_quantiles_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "stats.json").write_text(text)
    with pytest.raises(InputError, match=words):
        QuantileNormalizer.read(tmp_path / "stats.json")
    with pytest.raises(InputError, match="cannot read"):
        QuantileNormalizer.read(tmp_path / "absent.json")


def test_a_gripper_without_a_range_is_refused() -> None:
    robot = load_embodiment("panda")
    upper = robot.upper.copy()
    upper[7] = np.inf
    with pytest.raises(InputError, match="'panda_finger_joint1' has no range"):
        LingBotFormat(replace(robot, upper=upper), layout="lingbot_va", side="right")
