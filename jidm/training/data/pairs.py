"""Pairs of frames for training: which ones each step takes, and their tensors.

The pairs of step s depend on (seed, s) alone. So a resumed run continues with exactly the pairs it would have seen, and
several processes take disjoint parts of one common batch without communicating.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from jidm.errors import DatasetError, InputError
from jidm.fields.free.config import FIELD_STRIDE, FLOW_STRIDE
from jidm.robot.kinematics import Kinematics
from jidm.training.data.batch import PairBatch
from jidm.training.data.flow_cache import EstimatedFlow
from jidm.training.data.frame_store import FrameStore
from jidm.training.data.geometric_flow import (
    DepthView,
    downsample_flow,
    exact_field,
    geometric_flow,
    grid_intrinsics,
    link_poses,
)

_BORDER_WEIGHT = 0.5
"""Weight of the exact field in cells beside the robot, some of whose pixels still show it."""


@dataclass(frozen=True, eq=False)
class SampledPairs:
    """B pairs of frames as rows of a frame store.

    Attributes:
        before, first, second: (B,) rows at t - k, t and t + k; `before` is clamped to the episode's start.
        stride: (B,) k.
        episode: (B,) position of the episode in the store.
        background: (B,) row of the frame whose background the pair gets, -1 = keeps its own; None = all keep theirs.
    """

    before: Int[Tensor, " B"]
    first: Int[Tensor, " B"]
    second: Int[Tensor, " B"]
    stride: Int[Tensor, " B"]
    episode: Int[Tensor, " B"]
    background: Int[Tensor, " B"] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: slice | Tensor) -> SampledPairs:
        """Some of the pairs."""
        return replace(self, **{name: x[index] for name, x in vars(self).items() if x is not None})

    def shard(self, rank: int, world: int) -> SampledPairs:
        """Every world-th pair, starting with the rank-th."""
        return self[rank::world]


class PairSampler:
    """Draws pairs uniformly over strides and, for each stride, over all positions where it fits into an episode.

    Args:
        store: the recording.
        strides: the k to draw from [frames].
        seed: of the draws.

    Raises:
        InputError: a stride is not positive.
        DatasetError: no episode is long enough for a pair.
    """

    def __init__(self, store: FrameStore, strides: Sequence[int], *, seed: int) -> None:
        if not strides or min(strides) < 1:
            raise InputError(f"strides must be whole numbers from 1, got {tuple(strides)}")
        self.seed, self.min_stride = seed, min(strides)
        self._first, self._length = store.first.numpy(), store.length.numpy()
        longest = int(self._length.max())
        if longest <= self.min_stride:
            raise DatasetError(
                f"{store.source}: the longest episode has {longest} frames, {self.min_stride + 1} are needed for strides "
                f"{', '.join(map(str, strides))}; use smaller --strides"
            )
        self._strides = np.array([k for k in strides if k < longest])
        # For each stride, how many pairs start in all episodes up to each.
        self._cumulative = np.maximum(self._length[None] - self._strides[:, None], 0).cumsum(1)

    def sample(self, step: int, size: int) -> SampledPairs:
        """The common batch of training step `step`."""
        return self._sample(np.random.default_rng((self.seed, step)), size)

    def sample_backgrounds(self, step: int, size: int, fraction: float) -> Int[Tensor, " B"]:
        """For that fraction of the pairs of a step a random frame of the recording; -1 for the others."""
        random = np.random.default_rng((self.seed, step, 4))
        rows = random.integers(self._length.sum(), size=size)
        return torch.from_numpy(np.where(random.random(size) < fraction, rows, -1))

    def fixed_sample(self, size: int) -> SampledPairs:
        """A batch for validation, the same every time and for every seed."""
        return self._sample(np.random.default_rng((0, 0, 1)), size)

    def _sample(self, random: np.random.Generator, size: int) -> SampledPairs:
        which = random.integers(len(self._strides), size=size)
        pair = (random.random(size) * self._cumulative[which, -1]).astype(np.int64)
        episode = (self._cumulative[which] <= pair[:, None]).sum(1)
        earlier = np.where(episode > 0, self._cumulative[which, np.maximum(episode - 1, 0)], 0)
        start, k = self._first[episode], self._strides[which]
        first = start + pair - earlier
        rows = {"before": np.maximum(first - k, start), "first": first, "second": first + k}
        return SampledPairs(**{n: torch.from_numpy(x) for n, x in {**rows, "stride": k, "episode": episode}.items()})


class PairSource:
    """Assembles batches from a frame store.

    Args:
        store: the recording.
        kinematics: of the robot whose joints are `store.state_names`; needed for exact flow.
        estimated_flow: flow estimated from the images, where there is no exact one.
        static_background: whether everything but the robot is known to stand still, which makes zero flow there exact.
        before: whether the frames before the pairs are included.
        device: where batches are assembled; the tables are copied there once.

    Raises:
        DatasetError: exact flow is asked for and the recording has no geometry.
    """

    def __init__(
        self, store: FrameStore, *, kinematics: Kinematics | None = None, estimated_flow: EstimatedFlow | None = None,
        static_background: bool = False, before: bool = False, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.store, self.kinematics, self.estimated_flow = store, kinematics, estimated_flow
        self.static_background, self.before = static_background, before
        self.device, self._q = torch.device(device), store.q
        if kinematics is not None and store.geometry is None:
            raise DatasetError(f"{store.source}: exact flow needs recorded depth, links and cameras; use --flow dis")
        self._tables = {"frames": store.frames, "state": store.state, "joints": store.joints}
        if (g := store.geometry) is not None:
            self._tables["link"] = g.link
            if kinematics is not None:
                self._tables |= {"depth": g.depth, "intrinsics": g.intrinsics, "T": g.T_camera_base}
        if self.device.type != "cpu":
            self._tables = {name: x.to(self.device) for name, x in self._tables.items()}

    def batch(self, pairs: SampledPairs) -> PairBatch:
        """The tensors of the sampled pairs in float32, with exact flow and field, or estimated flow, or neither."""
        state = {name: self._take("state", getattr(pairs, name)) for name in ("first", "second")}
        fields: dict[str, Any] = {
            "first": self._images_with_background(pairs, pairs.first),
            "second": self._images_with_background(pairs, pairs.second),
            "q": self._learned_joints(state["first"]),
            "q_next": self._learned_joints(state["second"]),
            "episode": self.store.episode[pairs.episode],
            "frame": pairs.first - self.store.first[pairs.episode],
        }
        if self.before:
            fields["before"] = self._images_with_background(pairs, pairs.before)
        if self.kinematics is not None:
            fields |= self._exact_targets(self.kinematics, pairs, state["first"], state["second"])
        elif self.estimated_flow is not None:
            forward, backward = self.estimated_flow.for_pairs(pairs.first, pairs.stride)
            motion = {
                "flow": forward.flow, "weight": forward.weight,
                "flow_back": backward.flow, "weight_back": backward.weight,
                **self._central_difference(self.estimated_flow, pairs),
            }  # fmt: skip
            fields |= {name: x.to(self.device) for name, x in motion.items()}
        return PairBatch(**fields)

    def frames_at(self, rows: Int[Tensor, " T"]) -> tuple[Float[Tensor, "T 3 H W"], Float[Tensor, "T n"]]:
        """Single frames of the recording, RGB in [0, 1], and their joint positions [rad or m]."""
        return self._images(rows), self._learned_joints(self._take("state", rows))

    def _exact_targets(
        self, kinematics: Kinematics, pairs: SampledPairs, q: Tensor, q_next: Tensor
    ) -> dict[str, Tensor]:
        poses = link_poses(kinematics, torch.cat([q, q_next]))
        first, second = self._view(pairs.first, poses[: len(q)]), self._view(pairs.second, poses[len(q) :])
        same_pose = (first.T_camera_base == second.T_camera_base).flatten(1).all(1)
        static_camera = same_pose & (first.intrinsics == second.intrinsics).all(1)
        factor = FLOW_STRIDE // FIELD_STRIDE
        fields: dict[str, Tensor] = {}
        for suffix, view, other in (("", first, second), ("_back", second, first)):
            flow, weight = geometric_flow(view, other)
            field, field_weight = exact_field(view.dilated(), kinematics)
            fields["field" + suffix] = self._learned_joints(field, 2) * FIELD_STRIDE
            border = torch.where(view.link >= 0, 1.0, _BORDER_WEIGHT).to(field_weight)
            fields["field_weight" + suffix] = field_weight * border
            flow, weight = downsample_flow(flow * FIELD_STRIDE, weight, factor)
            if self.static_background:
                weight = weight + _static_background_mask(view, other, factor) * static_camera[:, None, None]
            fields["flow" + suffix], fields["weight" + suffix] = flow, weight
            fields["mask" + suffix] = (view.link >= 0).to(flow.dtype)
        return fields

    def _central_difference(self, estimated_flow: EstimatedFlow, pairs: SampledPairs) -> dict[str, Tensor]:
        """First-order motion by a central difference: half of (flow to t + k minus flow to t - k), both from frame t.

        The curvature of the paths is the same in both and cancels. At an episode's ends, where one of the two frames
        does not exist, the one-sided difference is used.
        """
        k, fields = pairs.stride, {}
        start = self.store.first[pairs.episode]
        stop = start + self.store.length[pairs.episode]
        for suffix, t, sign in (("", pairs.first, 1.0), ("_back", pairs.second, -1.0)):
            has_next, has_previous = t + k < stop, t - k >= start
            to_next, _ = estimated_flow.for_pairs(torch.where(has_next, t, t - k), k)
            _, to_previous = estimated_flow.for_pairs(torch.where(has_previous, t - k, t), k)
            exists = torch.stack([has_next, has_previous]).float()
            a, b = (exists / exists.sum(0))[..., None]  # coefficients (B, 1) of the two differences
            motion = a[..., None, None] * to_next.flow - b[..., None, None] * to_previous.flow
            ones = torch.ones_like(to_next.weight)
            weight = torch.where(has_next[:, None, None], to_next.weight, ones)
            weight = weight * torch.where(has_previous[:, None, None], to_previous.weight, ones)
            q, q_next = self._q[t], self._q[torch.minimum(t + k, stop - 1)]
            q_previous = self._q[torch.maximum(t - k, start)]
            step = a * (q_next - q) - b * (q_previous - q)
            fields["tangent" + suffix], fields["tangent_weight" + suffix] = sign * motion, weight
            fields["tangent_step" + suffix] = sign * step.float()
        return fields

    def _images_with_background(self, pairs: SampledPairs, rows: Tensor) -> Tensor:
        """Images of the sampled pairs in front of the background that was sampled for them.

        Where the other frame shows the robot, the own background is kept. Flow that was estimated from the images
        belongs to their own backgrounds, so with estimated flow they are kept as well.
        """
        own = self._images(rows)
        if pairs.background is None or self.estimated_flow is not None or "link" not in self._tables:
            return own
        other = pairs.background.clamp(min=0)
        kept = torch.maximum(self._robot_mask(rows, own), self._robot_mask(other, own))
        kept = torch.maximum(kept, (pairs.background < 0).to(kept)[:, None, None, None])
        return torch.lerp(self._images(other), own, kept)

    def _robot_mask(self, rows: Tensor, like: Tensor) -> Tensor:
        """(B, 1, H, W) fraction of each pixel that the robot covers, interpolated from the recorded grid."""
        robot = (self._take("link", rows) >= 0).to(like)[:, None]
        return F.interpolate(robot, size=like.shape[-2:], mode="bilinear", align_corners=False)

    def _view(self, rows: Tensor, poses: Tensor) -> DepthView:
        height, width = self.store.size
        depth = self._take("depth", rows)
        K = grid_intrinsics(self._take("intrinsics", rows), height, width, *depth.shape[1:])
        return DepthView(depth, self._take("link", rows), K, self._take("T", rows), poses)

    def _take(self, name: str, rows: Tensor) -> Num[Tensor, "B ..."]:
        return self._tables[name].index_select(0, rows.to(self.device))

    def _images(self, rows: Tensor) -> Tensor:
        return self._take("frames", rows).to(torch.float32).mul_(1 / 255)

    def _learned_joints(self, state: Tensor, axis: int = 1) -> Tensor:
        return state.index_select(axis, self._tables["joints"]).float()


def _static_background_mask(first: DepthView, second: DepthView, factor: int) -> Tensor:
    """(B, h, w) on a grid coarser by `factor`: 1 where neither frame shows the robot in the cell or next to it."""
    robot = F.max_pool2d(((first.link >= 0) | (second.link >= 0)).float()[:, None], factor)
    return 1 - F.max_pool2d(robot, 3, stride=1, padding=1)[:, 0]
