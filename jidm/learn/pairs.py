"""Pairs of frames for training: which ones a step takes, and their tensors.

The pairs of step s depend on (seed, s) alone. So a run that was cut off goes on with exactly the pairs it would have
seen, and several processes take disjoint parts of one common batch without talking to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from jidm.errors import DatasetError, InputError
from jidm.learn.batch import FIELD_STRIDE, GRID_STRIDE, PairBatch
from jidm.learn.carried import View, carried_flow, coarser, exact_field, grid_intrinsics, link_poses
from jidm.learn.estimated import EstimatedFlow
from jidm.learn.recording import Recording
from jidm.robot.kinematics import Kinematics

_BESIDE = 0.5
"""What the field counts in cells beside the robot, some of whose pixels still show it."""


@dataclass(frozen=True, eq=False)
class Draw:
    """B triples of frames: rows of the recording's tables.

    Attributes:
        before, first, second, third: (B,) rows at t - k, t, t + k and t + k + k'; `before` stops at the episode's start.
        stride: (B,) k.
        episode: (B,) place of the episode in the recording.
        backdrop: (B,) row of the frame whose background the pair gets, -1 = keeps its own; None = all keep theirs.
    """

    before: Int[Tensor, " B"]
    first: Int[Tensor, " B"]
    second: Int[Tensor, " B"]
    third: Int[Tensor, " B"]
    stride: Int[Tensor, " B"]
    episode: Int[Tensor, " B"]
    backdrop: Int[Tensor, " B"] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: slice | Tensor) -> Draw:
        """Some of the triples."""
        chosen = {name: getattr(self, name)[index] for name in self.__dataclass_fields__ if name != "backdrop"}
        return Draw(**chosen, backdrop=None if self.backdrop is None else self.backdrop[index])

    def part(self, rank: int, world: int) -> Draw:
        """Every world-th triple, from the rank-th on."""
        return self[rank::world]


class PairSampler:
    """Draws triples evenly over strides and, for a pair of strides, over all places where it fits into an episode.

    Args:
        strides: the k to draw from [frames]; both steps of a triple are drawn independently.
        third: whether a frame t + k + k' is needed; without it `third` repeats `second`.

    Raises:
        DatasetError: no episode is long enough for a pair.
    """

    def __init__(self, recording: Recording, strides: Sequence[int], *, seed: int, third: bool = True) -> None:
        if not strides or min(strides) < 1:
            raise InputError(f"strides must be whole numbers from 1, got {tuple(strides)}")
        self.seed, self.third, self.smallest = seed, third, min(strides)
        self._first, self._length = recording.first.numpy(), recording.length.numpy()
        longest = int(self._length.max())
        steps = [(k, j) for k in strides for j in (strides if third else (0,)) if k + j < longest]
        if not steps:
            needed = min(strides) * (2 if third else 1) + 1
            raise DatasetError(
                f"{recording.source}: the longest episode has {longest} frames, {needed} are needed for strides "
                f"{', '.join(map(str, strides))}; use smaller --strides"
            )
        self._steps = np.array(steps)
        # How many starts there are in all episodes up to each, per pair of strides.
        free = np.maximum(self._length[None] - self._steps.sum(1)[:, None], 0)
        self._until = free.cumsum(1)

    def draw(self, step: int, size: int) -> Draw:
        """The common batch of training step `step`."""
        return self._draw(np.random.default_rng((self.seed, step)), size)

    def backdrops(self, step: int, size: int, share: float) -> Int[Tensor, " B"]:
        """For that share of the pairs of a step a frame of the recording, any one; -1 for the others."""
        random = np.random.default_rng((self.seed, step, 4))
        rows = random.integers(self._length.sum(), size=size)
        return torch.from_numpy(np.where(random.random(size) < share, rows, -1))

    def fixed(self, size: int) -> Draw:
        """A batch to measure by, the same every time and for every seed."""
        return self._draw(np.random.default_rng((0, 0, 1)), size)

    def _draw(self, random: np.random.Generator, size: int) -> Draw:
        which = random.integers(len(self._steps), size=size)
        place = (random.random(size) * self._until[which, -1]).astype(np.int64)
        episode = (self._until[which] <= place[:, None]).sum(1)
        earlier = np.where(episode > 0, self._until[which, np.maximum(episode - 1, 0)], 0)
        start = self._first[episode]
        first = start + place - earlier
        k, j = self._steps[which].T
        rows = {"before": np.maximum(first - k, start), "first": first, "second": first + k, "third": first + k + j}
        return Draw(**{n: torch.from_numpy(x) for n, x in {**rows, "stride": k.copy(), "episode": episode}.items()})


class PairSource:
    """Makes batches out of a recording.

    Args:
        recording: the tables.
        kinematics: moves the robot's links, in the order of `recording.state_names`; needed for exact flow.
        estimated: flow measured in the pictures, where there is no exact one.
        static_background: whether everything but the robot stays where it is, so that zero flow there is a fact.
        before, third: whether those frames are handed out.
        device: where batches are put together; the tables are copied there once.
    """

    def __init__(
        self, recording: Recording, *, kinematics: Kinematics | None = None, estimated: EstimatedFlow | None = None,
        static_background: bool = False, before: bool = True, third: bool = True, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.recording, self.kinematics, self.estimated = recording, kinematics, estimated
        self.static_background, self.before, self.third = static_background, before, third
        self.device, self._q = torch.device(device), recording.q
        if kinematics is not None and recording.geometry is None:
            raise DatasetError(
                f"{recording.source}: exact flow needs recorded depth, links and cameras; use --flow dis"
            )
        self._tables = {"frames": recording.frames, "state": recording.state, "joints": recording.joints}
        if (g := recording.geometry) is not None:
            self._tables["link"] = g.link
            if kinematics is not None:
                self._tables |= {"depth": g.depth, "intrinsics": g.intrinsics, "T": g.T_camera_base}
        if self.device.type != "cpu":
            self._tables = {name: x.to(self.device) for name, x in self._tables.items()}

    def batch(self, draw: Draw) -> PairBatch:
        """The drawn pairs, float32, with the best flow there is."""
        state = {name: self._take("state", getattr(draw, name)) for name in ("first", "second")}
        fields: dict[str, Any] = {
            "first": self._drawn(draw, draw.first),
            "second": self._drawn(draw, draw.second),
            "q": self._learned(state["first"]),
            "q_next": self._learned(state["second"]),
            "episode": self.recording.episode[draw.episode],
            "frame": draw.first - self.recording.first[draw.episode],
        }
        if self.before:
            fields["before"] = self._drawn(draw, draw.before)
        if self.third:
            fields["third"] = self._drawn(draw, draw.third)
            fields["q_third"] = self._learned(self._take("state", draw.third))
        if self.kinematics is not None:
            fields |= self._exact(self.kinematics, draw, state["first"], state["second"])
        elif self.estimated is not None:
            flow = self.estimated.between(draw.first, draw.stride) | self._central(self.estimated, draw)
            fields |= {name: x.to(self.device) for name, x in flow.items()}
        return PairBatch(**fields)

    def shown(self, rows: Int[Tensor, " T"]) -> tuple[Float[Tensor, "T 3 H W"], Float[Tensor, "T n"]]:
        """Single frames of the recording, and their joint positions [rad or m]."""
        return self._pictures(rows), self._learned(self._take("state", rows))

    def _exact(self, kinematics: Kinematics, draw: Draw, q: Tensor, q_next: Tensor) -> dict[str, Tensor]:
        poses = link_poses(kinematics, torch.cat([q, q_next]))
        one, two = self._view(draw.first, poses[: len(q)]), self._view(draw.second, poses[len(q) :])
        still = (one.T_camera_base == two.T_camera_base).flatten(1).all(1) & (one.intrinsics == two.intrinsics).all(1)
        fields: dict[str, Tensor] = {}
        for tail, a, b in (("", one, two), ("_back", two, one)):
            flow, weight = carried_flow(a, b)
            field, beside = exact_field(a.widened(), kinematics)
            fields["field" + tail] = self._learned(field, 2) * FIELD_STRIDE
            fields["field_weight" + tail] = beside * torch.where(a.link >= 0, 1.0, _BESIDE).to(beside)
            times = GRID_STRIDE // FIELD_STRIDE
            flow, weight = coarser(flow * FIELD_STRIDE, weight, times)
            if self.static_background:
                weight = weight + _surely_background(a, b, times) * still[:, None, None]
            fields["flow" + tail], fields["weight" + tail] = flow, weight
            fields["mask" + tail] = (a.link >= 0).to(flow.dtype)
        return fields

    def _central(self, estimated: EstimatedFlow, draw: Draw) -> dict[str, Tensor]:
        """First-order motion out of measured flow: half the way ahead less half the way back from the same frame.

        The paths' curvature is the same in both and cancels. At an episode's end, where one of them is missing, the
        other one stands alone.
        """
        k, fields = draw.stride, {}
        start = self.recording.first[draw.episode]
        stop = start + self.recording.length[draw.episode]
        state = self._q
        for tail, at, sign in (("", draw.first, 1.0), ("_back", draw.second, -1.0)):
            has = torch.stack([at + k < stop, at - k >= start]).float()
            ahead = estimated.between(torch.where(at + k < stop, at, at - k), k)
            behind = estimated.between(torch.where(at - k >= start, at - k, at), k)
            share = (has / has.sum(0))[:, :, None, None]
            motion = share[0][:, None] * ahead["flow"] - share[1][:, None] * behind["flow_back"]
            sure = torch.where(has[0, :, None, None] > 0, ahead["weight"], torch.ones_like(ahead["weight"]))
            sure = sure * torch.where(has[1, :, None, None] > 0, behind["weight_back"], torch.ones_like(sure))
            there, then = torch.minimum(at + k, stop - 1), torch.maximum(at - k, start)
            moved = share[0, :, 0] * (state[there] - state[at]) - share[1, :, 0] * (state[then] - state[at])
            fields["tangent" + tail], fields["tangent_weight" + tail] = sign * motion, sure
            fields["tangent_step" + tail] = sign * moved.float()
        return fields

    def _drawn(self, draw: Draw, rows: Tensor) -> Tensor:
        """Pictures of the drawn pairs, before the background that was drawn for them.

        Where the other frame shows a robot of its own, theirs stays: one robot is enough. Flow measured in the pictures is
        that of their own backgrounds, so with it they keep them.
        """
        own = self._pictures(rows)
        if draw.backdrop is None or self.estimated is not None or "link" not in self._tables:
            return own
        other = draw.backdrop.clamp(min=0)
        kept = torch.maximum(self._robot(rows, own), self._robot(other, own))
        kept = torch.maximum(kept, (draw.backdrop < 0).to(kept)[:, None, None, None])
        return torch.lerp(self._pictures(other), own, kept)

    def _robot(self, rows: Tensor, like: Tensor) -> Tensor:
        """(B, 1, H, W) how much of each pixel the robot covers, as fine as is known."""
        robot = (self._take("link", rows) >= 0).to(like)[:, None]
        return F.interpolate(robot, size=like.shape[-2:], mode="bilinear", align_corners=False)

    def _view(self, rows: Tensor, poses: Tensor) -> View:
        height, width = self.recording.size
        depth = self._take("depth", rows)
        K = grid_intrinsics(self._take("intrinsics", rows), height, width, *depth.shape[1:])
        return View(depth, self._take("link", rows), K, self._take("T", rows), poses)

    def _take(self, name: str, rows: Tensor) -> Num[Tensor, "B ..."]:
        return self._tables[name].index_select(0, rows.to(self.device))

    def _pictures(self, rows: Tensor) -> Tensor:
        return self._take("frames", rows).to(torch.float32).mul_(1 / 255)

    def _learned(self, state: Tensor, axis: int = 1) -> Tensor:
        return state.index_select(axis, self._tables["joints"]).float()


def _surely_background(one: View, two: View, times: int) -> Tensor:
    """(B, h, w) on a grid so many times as coarse: 1 where neither frame shows the robot in the cell or next to it."""
    robot = F.max_pool2d(((one.link >= 0) | (two.link >= 0)).float()[:, None], times)
    return 1 - F.max_pool2d(robot, 3, stride=1, padding=1)[:, 0]
