"""Joint conventions: an invertible map whose laws hold for every convention, batch shape, array kind and dtype."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jidm.errors import EmbodimentError
from jidm.robot.convention import UNIT_FACTOR, JointConvention
from jidm.robot.registry import load_embodiment

NAMES = ("a", "b", "c", "d")


@st.composite
def conventions(draw: st.DrawFn) -> JointConvention:
    n = draw(st.integers(1, 5))
    names = tuple(f"j{k}" for k in range(n))

    def each(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(values) for _ in names)

    return JointConvention(
        joint_names=names,
        external_names=tuple(draw(st.permutations(names))),
        sign=each(st.sampled_from((-1, 1))),
        scale=each(st.floats(0.01, 100.0)),
        offset=each(st.floats(-7.0, 7.0)),
        unit=each(st.sampled_from(sorted(UNIT_FACTOR))),
    )


batches = st.sampled_from([(), (1,), (3,), (2, 3), (0,)])


@settings(max_examples=60, deadline=None)
@given(conventions(), batches, st.sampled_from(["numpy", "torch"]), st.integers(0, 2**31 - 1))
def test_in_and_out_again_is_where_it_began(c: JointConvention, batch: tuple[int, ...], kind: str, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(*batch, c.n))
    vector: Any = torch.as_tensor(x) if kind == "torch" else x
    for there, back in (
        (c.to_embodiment, c.from_embodiment),
        (c.from_embodiment, c.to_embodiment),
        (c.delta_to_embodiment, c.delta_from_embodiment),
    ):
        q = there(vector)
        assert type(q) is type(vector) and q.dtype == vector.dtype and q.shape == vector.shape
        # one rounding of the largest intermediate value on each way
        size = 1 + np.abs(np.asarray(q)).max(initial=0.0) / min(1.0, np.abs(c.gain).min())
        np.testing.assert_allclose(np.asarray(back(q)), x, rtol=1e-12, atol=1e-14 * size)


@settings(max_examples=40, deadline=None)
@given(conventions(), st.integers(0, 2**31 - 1))
def test_a_step_is_the_difference_of_positions(c: JointConvention, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, step = rng.normal(size=(2, 6, c.n))
    expected = c.to_embodiment(x + step) - c.to_embodiment(x)
    np.testing.assert_allclose(c.delta_to_embodiment(step), expected, atol=1e-11 * (1 + np.abs(c.gain).max()))


@settings(max_examples=40, deadline=None)
@given(conventions(), st.integers(0, 2**31 - 1))
def test_the_matrix_is_the_map(c: JointConvention, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(5, c.n))
    np.testing.assert_allclose(x @ c.matrix.T + c.offset, c.to_embodiment(x), rtol=1e-12, atol=1e-12)


def test_each_part_of_a_convention_by_hand() -> None:
    c = JointConvention.make(
        NAMES,
        joint_types=("revolute", "revolute", "prismatic", "prismatic"),
        order=("c", "a", "d", "b"),
        sign={"b": -1},
        offset={"a": 0.5},
        unit={"a": "deg", "c": "mm"},
        normalized={"d": (0.01, 0.05)},
    )
    #                  c = 20 mm, a = 90 deg, d = a quarter open, b = 0.3 rad the other way round
    outside = np.array([20.0, 90.0, 0.25, 0.3])
    np.testing.assert_allclose(c.to_embodiment(outside), [math.pi / 2 + 0.5, -0.3, 0.02, 0.02], rtol=1e-14)
    np.testing.assert_allclose(c.delta_to_embodiment(outside), [math.pi / 2, -0.3, 0.02, 0.01], rtol=1e-14)
    assert c.unit == ("deg", "rad", "mm", "normalized") and c.order == (1, 3, 0, 2)


def test_a_normalized_range_may_run_downwards() -> None:
    c = JointConvention.make(("g",), joint_types=("prismatic",), normalized={"g": (0.04, 0.0)})
    np.testing.assert_allclose(c.to_embodiment(np.array([[0.0], [0.25], [1.0]]))[:, 0], [0.04, 0.03, 0.0], atol=1e-16)


def test_gradients_and_devices_pass_through() -> None:
    c = JointConvention.make(NAMES, sign={"a": -1}, unit={"b": "deg"}, order=("b", "a", "c", "d"))
    x = torch.zeros(2, 4, dtype=torch.float32, requires_grad=True)
    c.to_embodiment(x).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), np.array([[math.pi / 180, -1, 1, 1]] * 2), rtol=1e-6)


def test_whole_numbers_are_not_rounded() -> None:
    c = JointConvention.make(("a",), unit={"a": "deg"})
    for vector in (np.array([90]), torch.tensor([90]), [90]):
        assert float(np.asarray(c.to_embodiment(vector))[0]) == pytest.approx(math.pi / 2)


def test_covariances_map_by_the_matrix() -> None:
    """The covariance of mapped samples is matrix @ S @ matrix.T."""
    c = JointConvention.make(("a", "b"), unit={"a": "deg"}, sign={"b": -1}, order=("b", "a"), offset={"a": 3.0})
    x = np.random.default_rng(0).normal(size=(1000, 2)) @ np.array([[2.0, 0.3], [0.0, 5.0]])
    np.testing.assert_allclose(np.cov(c.to_embodiment(x).T), c.matrix @ np.cov(x.T) @ c.matrix.T, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sign": {"a": 2}}, "sign of 'a' must be 1 or -1"),
        ({"scale": {"a": 0.0}}, "scale of 'a' must be positive"),
        ({"scale": {"a": -1.0}}, "use sign to turn it"),
        ({"offset": {"a": math.nan}}, "offset of 'a' must be finite"),
        ({"unit": {"a": "degree"}}, "did you mean 'deg'"),
        ({"unit": {"x": "deg"}}, "unit names 'x'"),
        ({"order": ("a", "b", "c")}, "external_names has 3 entries"),
        ({"order": ("a", "b", "c", "c")}, "must hold every joint once"),
        ({"normalized": {"a": (1.0, 1.0)}}, "two different numbers"),
        ({"normalized": {"a": (0.0, 1.0)}, "sign": {"a": -1}}, "give one of them"),
    ],
)
def test_a_convention_that_cannot_be_inverted_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbodimentError, match=message):
        JointConvention.make(NAMES, **options)


def test_a_vector_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(EmbodimentError, match="must end in 4 joints, got shape"):
        JointConvention.make(NAMES).to_embodiment(np.zeros((2, 3)))


def test_shipped_conventions_keep_home_inside_the_robot() -> None:
    degrees = load_embodiment("so100").convention("degrees")
    np.testing.assert_allclose(degrees.to_embodiment(np.full(6, 180.0)), np.pi)
    piper = load_embodiment("piper")
    sdk = piper.convention("sdk").from_embodiment(piper.upper)
    np.testing.assert_allclose(sdk, [154, 195, 0, 106, 75, 100, 70], atol=1e-9)
    with pytest.raises(EmbodimentError, match="did you mean 'sdk'"):
        piper.convention("sd")
