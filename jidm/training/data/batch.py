"""What a model learns from: pairs of frames with their joint positions, and the image motion between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from jidm.errors import InputError
from jidm.flow.base import Flow


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B pairs of frames (t, t + k) of recordings, from anywhere in time and in any order.

    The grid of flow is (h, w) = (H / 4, W / 4); its cell (i, j) stands for the pixel (4 j + 1.5, 4 i + 1.5) of the
    image. Field and mask are on a grid (y, x) = (H / 2, W / 2), that of the learned field. Images may be larger by a
    whole factor s, the model's `input_scale`; px are those of the (H, W) image all the same. Flow is given in both
    directions or, where nothing measured it, in none; where a cell's flow is unknown, weight and flow are 0.

    Attributes:
        first, second: (B, 3, s H, s W) RGB in [0, 1].
        q, q_next: (B, n) joint positions at the two frames [rad or m].
        before: (B, 3, s H, s W) the frame one recorded step before `first` (at an episode's start, `first` itself).
        flow: (B, 2, h, w) from first to second, px of the (H, W) image, on the grid of `first`.
        weight: (B, h, w) confidence of the flow in [0, 1]; 0 = no supervision there.
        mask: (B, y, x) 1 where `first` shows the robot, else 0; None where that is unknown.
        flow_back, weight_back, mask_back: the same from second to first, on the grid of `second`.
        field: (B, 2, n, y, x) the exact field at `first` [px per rad or m], where it is known: in simulation.
        field_weight: (B, y, x) its confidence.
        field_back, field_weight_back: the same at `second`.
        tangent: (B, 2, h, w) image motion to first order [px]: what the field at `first` times `tangent_step` should
            be.
        tangent_weight: (B, h, w) its confidence.
        tangent_step: (B, n) the joint step that belongs to it [rad or m].
        tangent_back, tangent_weight_back, tangent_step_back: the same at `second`.
        random: (B, 2, n + 2) uniform numbers in [0, 1), n + 2 for each of the two frames, for losses that sample. They
            depend on seed and step, so a pair has the same ones in whichever process it is.
        episode, frame: (B,) where each pair comes from: episode index and t.
    """

    first: Float[Tensor, "B 3 H W"]
    second: Float[Tensor, "B 3 H W"]
    q: Float[Tensor, "B n"]
    q_next: Float[Tensor, "B n"]
    before: Float[Tensor, "B 3 H W"] | None = None
    flow: Float[Tensor, "B 2 h w"] | None = None
    weight: Float[Tensor, "B h w"] | None = None
    mask: Float[Tensor, "B y x"] | None = None
    flow_back: Float[Tensor, "B 2 h w"] | None = None
    weight_back: Float[Tensor, "B h w"] | None = None
    mask_back: Float[Tensor, "B y x"] | None = None
    field: Float[Tensor, "B 2 n y x"] | None = None
    field_weight: Float[Tensor, "B y x"] | None = None
    field_back: Float[Tensor, "B 2 n y x"] | None = None
    field_weight_back: Float[Tensor, "B y x"] | None = None
    tangent: Float[Tensor, "B 2 h w"] | None = None
    tangent_weight: Float[Tensor, "B h w"] | None = None
    tangent_step: Float[Tensor, "B n"] | None = None
    tangent_back: Float[Tensor, "B 2 h w"] | None = None
    tangent_weight_back: Float[Tensor, "B h w"] | None = None
    tangent_step_back: Float[Tensor, "B n"] | None = None
    random: Float[Tensor, "B 2 numbers"] | None = None
    episode: Int[Tensor, " B"] | None = None
    frame: Int[Tensor, " B"] | None = None

    def __post_init__(self) -> None:
        missing = [x is None for x in (self.flow, self.weight, self.flow_back, self.weight_back)]
        if any(missing) and not all(missing):
            raise InputError("flow is used in both directions; give flow, weight, flow_back and weight_back, or none")

    def __len__(self) -> int:
        return self.first.shape[0]

    @property
    def delta_q(self) -> Float[Tensor, "B n"]:
        """Joint step from first to second [rad or m]."""
        return self.q_next - self.q

    @property
    def flows(self) -> tuple[Flow, Flow] | None:
        """Flow from first to second and back; None where nothing measured it."""
        if self.flow is None or self.weight is None or self.flow_back is None or self.weight_back is None:
            return None
        return Flow(self.flow, self.weight), Flow(self.flow_back, self.weight_back)

    def random_numbers(self) -> Float[Tensor, "frames numbers"]:
        """`random` of all first frames, then of all second frames; drawn now where the batch has none."""
        if self.random is not None:
            return self.random.transpose(0, 1).flatten(0, 1)
        return torch.rand(2 * len(self), self.q.shape[1] + 2, device=self.q.device, dtype=self.q.dtype)

    def tensors(self) -> Iterator[tuple[str, Shaped[Tensor, "B ..."]]]:
        """Names and values of all fields that are not None."""
        for entry in fields(self):
            if (value := getattr(self, entry.name)) is not None:
                yield entry.name, value

    def to(self, device: str | torch.device) -> PairBatch:
        """The same pairs on another device."""
        return replace(self, **{name: x.to(device) for name, x in self.tensors()})

    def __getitem__(self, index: slice | Tensor) -> PairBatch:
        """Some of the pairs."""
        return replace(self, **{name: x[index] for name, x in self.tensors()})


def normal_from_uniform(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard normal numbers from uniform ones in [0, 1) by the inverse distribution, within 5 standard deviations."""
    return torch.special.ndtri(uniform.clamp(3e-7, 1 - 3e-7))


@dataclass(frozen=True)
class JointStats:
    """Per-joint statistics of the training data, from which models take their scales; n entries each [rad or m].

    Attributes:
        q_mean, q_std: mean and standard deviation of the positions.
        delta_std: standard deviation about zero of the steps between the frames of a pair.
        q_lower, q_upper: smallest and largest position.
        delta_correlation: n rows of n, correlation of the steps; empty = independent.
    """

    q_mean: tuple[float, ...]
    q_std: tuple[float, ...]
    delta_std: tuple[float, ...]
    q_lower: tuple[float, ...]
    q_upper: tuple[float, ...]
    delta_correlation: tuple[tuple[float, ...], ...] = ()
