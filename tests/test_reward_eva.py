"""EVA's reward: the published figures, gradients by finite differences, and what is said of gaps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jidm.errors import InputError, JidmError
from jidm.rewards import EvaLimits, eva_reward

DT, T = 1 / 16, 49
LIMITS = EvaLimits.from_embodiment("cobot_magic")  # EVA's dual PiPER


def sine(amplitude: float, frequency: float) -> torch.Tensor:
    t = DT * torch.arange(T, dtype=torch.float64)
    return (amplitude * (2 * torch.pi * frequency * t).sin())[:, None] * LIMITS.joint_scale


def jitter(sigma: float, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, sigma, (T, 14))) * LIMITS.joint_scale


def test_limits_of_the_dual_piper_are_evas():
    arm = [0.85 * x for x in (3.1416, 3.4034, 3.1416, 3.9270, 3.9270, 3.9270)]
    torch.testing.assert_close(LIMITS.velocity.tolist(), [*arm, 2.0] * 2, atol=1e-4, rtol=0)
    assert LIMITS.acceleration.tolist() == ([5.0] * 6 + [10.0]) * 2
    assert LIMITS.weight.tolist() == ([1.0] * 6 + [0.2]) * 2


def test_published_figures():
    assert float(eva_reward(torch.zeros(T, 14), LIMITS, DT).reward) == 10.0
    assert float(eva_reward(sine(0.5, 1), LIMITS, DT).reward) == pytest.approx(7.84, abs=0.005)
    assert float(eva_reward(sine(0.5, 0.25), LIMITS, DT).reward) == pytest.approx(9.9986, abs=5e-5)
    for sigma, reward in ((0.01, 6.6), (0.1, 2.4)):
        found = eva_reward(torch.stack([jitter(sigma, seed) for seed in range(20)]), "cobot_magic", DT).reward
        assert float(found.mean()) == pytest.approx(reward, abs=0.05)


def written_out(q: np.ndarray) -> float:
    """The formula again, joint by joint and frame by frame."""
    v_max, a_max, weight, unit = (
        x.numpy() for x in (LIMITS.velocity, LIMITS.acceleration, LIMITS.weight, LIMITS.joint_scale)
    )

    def huber(x: float, delta: float) -> float:
        return x * x / 2 if abs(x) <= delta else delta * (abs(x) - delta / 2)

    total = 0.0
    for i in range(q.shape[1]):
        x = q[:, i] / unit[i]
        v = [(x[t + 1] - x[t]) / DT for t in range(len(x) - 1)]
        a = [(v[t + 1] - v[t]) / DT for t in range(len(v) - 1)]
        j = [(a[t + 1] - a[t]) / DT for t in range(len(a) - 1)]
        share = weight[i] / weight.sum()
        total += share * 0.5 * sum(huber(y, 0.5 * a_max[i] / DT) for y in j) / len(j)
        total += share * 0.25 * sum(huber(y, 0.5 * a_max[i]) for y in a) / len(a)
        total += share * 2.0 * sum(max(abs(y) - v_max[i], 0) ** 2 for y in v) / len(v)
        total += share * sum(max(abs(y) - a_max[i], 0) ** 2 for y in a) / len(a)
    return 10 * (1 + total / 2000) ** -0.5


def test_it_is_the_formula_for_any_batch():
    q = torch.stack([jitter(s, k) for k, s in enumerate((0.01, 0.05, 0.3))]) + sine(1.0, 0.7)
    found = eva_reward(q, LIMITS, DT)
    assert found.reward.tolist() == pytest.approx([written_out(x.numpy()) for x in q], rel=1e-12)
    assert bool(found.scored.all()) and found.reward.dtype == torch.float64
    torch.testing.assert_close(eva_reward(q.reshape(3, 1, T, 14), LIMITS, DT).reward, found.reward[:, None])
    torch.testing.assert_close(eva_reward(q[0], LIMITS, DT).reward, found.reward[0])
    torch.testing.assert_close(eva_reward(q, LIMITS, DT, bounded=True).reward, found.reward / 10)
    p0 = found.median_penalty()
    assert float(eva_reward(q, LIMITS, DT, p0=p0, bounded=True).reward.median()) == pytest.approx(0.5**0.5)


def test_gradients_are_those_of_finite_differences():
    for q in (sine(0.5, 1)[:12] + jitter(0.02, 0)[:12], jitter(0.5, 1)[:12]):
        q.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: eva_reward(x, LIMITS, DT).reward, q)


def test_gaps_are_left_out():
    q = sine(0.5, 1)
    valid = torch.ones(T, dtype=torch.bool)
    valid[20] = False
    holed = q.clone()
    holed[20] = torch.nan
    found = eva_reward(holed, LIMITS, DT)
    assert torch.equal(found.reward, eva_reward(q, LIMITS, DT, valid=valid).reward)
    assert float(found.reward) == pytest.approx(float(eva_reward(q, LIMITS, DT).reward), abs=0.2)
    # Held where nothing was measured it would look like a stop and a jump.
    held = q.clone()
    held[20] = q[19]
    assert float(eva_reward(held, LIMITS, DT).reward) < float(found.reward) - 0.2
    holed.requires_grad_()
    (gradient,) = torch.autograd.grad(eva_reward(holed, LIMITS, DT).reward, holed)
    assert bool(gradient.isfinite().all()) and not bool(gradient[20].any())


def test_what_cannot_be_judged_is_said():
    q = torch.stack([sine(0.5, 1), torch.full((T, 14), torch.nan, dtype=torch.float64)])
    with pytest.raises(InputError, match=r"items \[1\] have no 4 valid positions"):
        eva_reward(q, LIMITS, DT)
    found = eva_reward(q, LIMITS, DT, fallback_reward=0.25)
    assert found.scored.tolist() == [True, False] and float(found.reward[1]) == 0.25
    assert float(found.reward[0]) == pytest.approx(float(eva_reward(q[0], LIMITS, DT).reward))
    every_third = torch.arange(T) % 4 != 3  # never 4 in a row
    assert not bool(eva_reward(sine(0.5, 1), LIMITS, DT, valid=every_third, fallback_reward=0.0).scored)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"actions": torch.zeros(3, 14)}, "at least 4 frames"),
        ({"actions": torch.zeros(9, 7)}, "n = 14 joints"),
        ({"dt": 0.0}, "must be positive"),
        ({"p0": -1.0}, "must be positive"),
        ({"limits": "cobot_magik"}, "cobot_magic"),
    ],
)
def test_bad_input_is_named(change: dict, says: str):
    with pytest.raises(JidmError, match=says):
        eva_reward(**{"actions": torch.zeros(9, 14), "limits": LIMITS, "dt": DT, **change})
