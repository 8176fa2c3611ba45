"""Closer looks at two pictures: how the robot's brightness differs once a guessed joint step is undone.

Nothing in them is learned: trained weights of pixels, tried in their place, gave less precise steps than the robot's
mask alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.field.learned.blocks import doubled, reduced
from jidm.field.learned.config import FLOW_STRIDE, STRIDE, LearnedFieldConfig
from jidm.field.learned.matching import PairHead
from jidm.field.learned.network import Encoded
from jidm.solve.brightness import Brightness, aligned, carry_back, gradients, moved_along, path

_ROBOT = 0.01  # cells that show the robot with less than this probability are not compared
_LOOSE = 0.5  # [px] how far a cell's motion may be off before anything is seen


@dataclass(frozen=True)
class CloserLook:
    """How brightness is compared once.

    Attributes:
        scale: size of the pictures compared relative to (height, width); None = in all the detail there is.
        noise: brightness that differs where nothing is wrong, see `aligned`; larger while the step may still be off.
        settled: the step is nearly right: pixels that rather stayed in place than moved along count less, see
            `moved_along`. Earlier that would speak for whatever step is guessed.
    """

    scale: float | None
    noise: float
    settled: bool = False


CLOSER_LOOKS = (
    CloserLook(0.5, 0.4),
    CloserLook(0.5, 0.4),
    CloserLook(0.5, 0.4),
    CloserLook(1.0, 0.4),
    CloserLook(None, 0.1, settled=True),
    CloserLook(None, 0.05, settled=True),
)
"""From coarse to fine; each begins where the one before ended. Coarse ones cost little and bring large steps near."""


@runtime_checkable
class StepField(Protocol):
    """What reads pictures: a `LearnedField`, or what stands in for one."""

    @property
    def config(self) -> LearnedFieldConfig: ...
    @property
    def pair(self) -> PairHead: ...
    @property
    def delta_std(self) -> Tensor: ...
    @property
    def delta_correlation(self) -> Tensor: ...
    @property
    def step_spread(self) -> Tensor: ...
    @property
    def flow_spread(self) -> Tensor: ...
    @property
    def video_spread(self) -> Tensor: ...
    @property
    def looks_closer(self) -> Tensor: ...
    @property
    def guesses(self) -> Tensor: ...
    def guess(
        self, first: Encoded, second: Encoded, flows: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]: ...
    def encode(self, image: Tensor) -> Encoded: ...
    def state(self, seen: Encoded) -> tuple[Tensor, Tensor]: ...
    def jacobian(self, seen: Encoded, q: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class SeenAt:
    """A batch of pictures with the field at their joint positions.

    Attributes:
        jacobian: (B, 2, n, h, w) [px of the picture per rad or m].
        mask: (B, h, w) logit of each cell's showing the robot.
    """

    seen: Encoded
    jacobian: Float[Tensor, "b 2 n h w"]
    mask: Float[Tensor, "b h w"]

    @classmethod
    def of(cls, field: StepField, seen: Encoded, q: Float[Tensor, "b n"]) -> SeenAt:
        """Read the field at joint positions q [rad or m]."""
        return cls(seen, *field.jacobian(seen, q.to(seen.grey)))

    @cached_property
    def on_flow_grid(self) -> tuple[Float[Tensor, "b 2 n i j"], Float[Tensor, "b i j"]]:
        """Field and probability of the robot on the coarser grid of flow."""
        times = FLOW_STRIDE // STRIDE
        jacobian = reduced(self.jacobian.flatten(1, 2), times).unflatten(1, self.jacobian.shape[1:3])
        return jacobian, reduced(self.mask.sigmoid()[:, None], times)[:, 0]

    def fixed(self) -> SeenAt:
        """The same for a solve that must not bend the field."""
        return SeenAt(self.seen, self.jacobian.detach(), self.mask)

    def __getitem__(self, index: Any) -> SeenAt:
        """Index the batch axis."""
        part = SeenAt(self.seen[index], self.jacobian[index], self.mask[index])
        if (coarser := self.__dict__.get("on_flow_grid")) is not None:
            part.__dict__["on_flow_grid"] = tuple(x[index] for x in coarser)  # is not worked out again
        return part


@dataclass(frozen=True)
class Part:
    """Rows and columns of the field's grid around everything that shows the robot in any picture of a batch."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def showing(cls, mask: Float[Tensor, "b h w"]) -> Part:
        """A cell more on every side than the robot needs, so that what is interpolated between cells is right there."""
        robot = (mask.detach().sigmoid() > _ROBOT).any(0)
        h, w = robot.shape
        rows, columns = (robot.any(axis).nonzero()[:, 0].tolist() or [0] for axis in (1, 0))
        return cls(max(0, rows[0] - 1), min(h, rows[-1] + 2), max(0, columns[0] - 1), min(w, columns[-1] + 2))

    def of(self, grid: Tensor, times: int = 1) -> Tensor:
        """That part of a grid so many times as fine as the field's."""
        return grid[..., times * self.top : times * self.bottom, times * self.left : times * self.right]

    def corner(self, times: int = 1) -> tuple[int, int]:
        """First row and column on a grid so many times as fine as the field's."""
        return times * self.top, times * self.left


@dataclass(frozen=True, eq=False)
class Matched:
    """What was matched, one way.

    Attributes:
        flow: (B, 2, h, w) on the grid of flow [px of the picture].
        log_weight: (B, h, w) of its confidence (inverse variance, 1/px^2).
    """

    flow: Float[Tensor, "b 2 h w"]
    log_weight: Float[Tensor, "b h w"]


@dataclass(frozen=True, eq=False)
class Compared:
    """Brightness compared around where a step leads, one way.

    Attributes:
        flow: (B, 2, h, w) where it leads, in the part of the field's grid that was compared [px of the picture].
        brightness: what the robot's pixels say around it.
        part: of the grid.
    """

    flow: Float[Tensor, "b 2 h w"]
    brightness: Brightness
    part: Part


def seen_motion(
    look: Matched | Compared, size: tuple[int, int]
) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b h w"]]:
    """Motion on the robot as a look measured it: around where it looked, corrected cell by cell by what brightness asks for.

    Returns:
        Flow [px of the picture] on the field's grid of that size, and in [0, 1] how much of it was measured: along edges
        half of it is. Both are 0 where nothing was compared.
    """
    if isinstance(look, Matched):
        weight = look.log_weight.exp()
        weight = weight / weight.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]
        return doubled(look.flow), doubled(weight[:, None])[:, 0]
    curvature, slope = (x.movedim((-2, -1), (1, 2)) for x in (look.brightness.curvature, look.brightness.slope))
    damped = curvature + torch.eye(2).to(curvature) / _LOOSE**2
    left = torch.linalg.solve(damped, -slope)
    told = torch.linalg.solve(damped, curvature).diagonal(dim1=-2, dim2=-1).mean(-1)
    flow = look.flow.new_zeros(len(look.flow), 2, *size)
    weight = flow[:, 0].clone()
    look.part.of(flow)[:] = look.flow * (told > 0)[:, None] + left.movedim(-1, 1)
    look.part.of(weight)[:] = told
    return flow, weight


def _path(here: SeenAt, there: SeenAt, part: Part, step: Float[Tensor, "b n"]) -> Float[Tensor, "b 2 h w"]:
    """Flow of a step on a part of the grid it starts from [px of the picture]."""
    ahead = torch.einsum("bcnhw,bn->bchw", part.of(here.jacobian).detach(), step)
    back = torch.einsum("bcnhw,bn->bchw", there.jacobian.detach(), step)
    return path(ahead, back, STRIDE, part.corner())


def closer_look(how: CloserLook, here: SeenAt, there: SeenAt, part: Part, step: Float[Tensor, "b n"]) -> Compared:
    """Brightness around where a step [rad or m] leads, on the field's grid."""
    guess = _path(here, there, part, step)
    first, second = (_scaled(x.seen, how.scale) for x in (here, there))
    side = first.shape[-1] // here.mask.shape[-1]  # pixels compared per cell of the field
    larger = side / STRIDE
    carried = carry_back(second, _enlarged(guess, side) * larger, part.corner(side))
    robot, one = _robot(here, part, side), part.of(first, side)
    if how.settled:
        robot = moved_along(robot, one, part.of(second, side), carried)
    seen = aligned(one, carried, robot, noise=how.noise, cell=side, larger=larger)
    return Compared(guess, seen, part)


def _robot(at: SeenAt, part: Part, side: int) -> Float[Tensor, "b 1 h w"]:
    """How much each pixel of a part counts, `side` of them per cell."""
    robot = part.of(at.mask).sigmoid()[:, None]
    return _enlarged(torch.where(robot > _ROBOT, robot, 0), side)


def _scaled(seen: Encoded, scale: float | None) -> Float[Tensor, "b 1 h w"]:
    if scale is None:
        return seen.grey
    return reduced(seen.small, round(1 / scale))


def _enlarged(grid: Float[Tensor, "b c h w"], times: int) -> Tensor:
    return F.interpolate(grid, scale_factor=float(times), mode="bilinear", align_corners=False)


@torch.no_grad()
def unlike(
    first: SeenAt, second: SeenAt, part: Part, step: Float[Tensor, "b n"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Mean squares of the brightness by which the robot differs after a step, and of its slope [1/px of the picture]."""
    robot, image = _robot(first, part, STRIDE), part.of(first.seen.small, STRIDE)
    there = _enlarged(_path(first, second, part, step), STRIDE)
    carried = carry_back(second.seen.small, there, part.corner(STRIDE))
    along = gradients((image + carried) / 2)
    squares = ((carried - image).square(), along[0].square() + along[1].square())
    total = robot.flatten(1).sum(-1).clamp(min=1e-6)
    error, slope = ((x.mean(1, keepdim=True) * robot).flatten(1).sum(-1) / total for x in squares)
    return error, slope
