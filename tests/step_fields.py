"""Fields whose answers are known by formula: what the solver and the follower must make of right and wrong pixels.

Most of their pictures carry the joint positions themselves (channel k holds joint k everywhere), so a pair of pictures tells
the exact motion; no network and no simulator is involved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jidm.field.learned import Encoded, LearnedField, LearnedFieldConfig
from jidm.field.learned.blocks import luma
from jidm.field.learned.config import FLOW_STRIDE, STRIDE
from jidm.field.learned.matching import PairHead

SIDE = 64
GRID, FLOW_GRID = SIDE // STRIDE, SIDE // FLOW_STRIDE
FINGER = ("hinge1", "hinge2")


def config(
    joints: Sequence[str] = FINGER, *, height: int = SIDE, width: int = SIDE, delta_std: float = 0.05, **more: object
) -> LearnedFieldConfig:
    """Of a tiny network for revolute joints that turn up to 1.2 rad."""
    n = len(joints)
    return LearnedFieldConfig(
        tuple(joints), ("revolute",) * n, height, width, (0.0,) * n, (0.6,) * n, (delta_std,) * n,
        (-1.2,) * n, (1.2,) * n, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def untrained(seed: int = 0, **options: object) -> LearnedField:
    """A network with weights of a seed; its field is scaled so that steps move pixels."""
    torch.manual_seed(seed)
    return LearnedField(config(**options)).eval()  # type: ignore[arg-type]


def pictures(count: int, seed: int = 0, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Smooth random pictures (count, 3, H, W) in [0, 1]."""
    rough = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(rough, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def telling(q: Tensor) -> Tensor:
    """Pictures (*, 3, SIDE, SIDE) that carry joint positions (*, n), n <= 3."""
    padded = torch.nn.functional.pad(q, (0, 3 - q.shape[-1]))
    return padded[..., None, None].expand(*padded.shape, SIDE, SIDE)


def cells(grid: int = GRID) -> Tensor:
    """(2, grid, grid) where a grid's cells lie in the picture [px]."""
    c = (torch.arange(grid, dtype=torch.float64) + 0.5) * SIDE / grid - 0.5
    return torch.stack(torch.meshgrid(c, c, indexing="ij")[::-1])


class LinearWorld:
    """The picture moves as a whole by a fixed matrix times the step, whatever the pose: linearising errs nowhere."""

    def __init__(self, n: int = 2) -> None:
        matrix = torch.tensor([[40.0, 15.0], [-10.0, 30.0]], dtype=torch.float64)[:, :n]
        self.fixed = matrix[..., None, None].expand(-1, -1, GRID, GRID).clone()

    def jacobian(self, q: Tensor) -> Tensor:
        return self.fixed.expand(len(q), -1, -1, -1, -1)

    def flow(self, q: Tensor, q_next: Tensor, grid: int = GRID) -> Tensor:
        return torch.einsum("cnhw,bn->bchw", self.fixed[..., :grid, :grid], q_next - q)

    def shown(self, q: Tensor) -> Tensor:
        return torch.ones(len(q), GRID, GRID, dtype=torch.float64)


class TwoPivots:
    """A soft-edged disc that turns about a pivot which itself turns about another: paths are curved.

    `x = a + R(q1) (b + R(q2) p)` for the disc's points p [px].
    """

    a = torch.tensor([20.0, 32.0], dtype=torch.float64)
    b = torch.tensor([9.0, 0.0], dtype=torch.float64)
    centre = torch.tensor([5.0, 4.0], dtype=torch.float64)
    radius = 6.0

    def place(self, p: Tensor, q: Tensor) -> Tensor:
        """(2, ...) picture coordinates of points p at pose q (2,)."""
        shape = p.shape
        inner = self.b[:, None] + _turn(q[1]) @ p.flatten(1)
        return (self.a[:, None] + _turn(q[0]) @ inner).reshape(shape)

    def point(self, x: Tensor, q: Tensor) -> Tensor:
        """The inverse of `place`."""
        inner = _turn(-q[0]) @ (x.flatten(1) - self.a[:, None])
        return (_turn(-q[1]) @ (inner - self.b[:, None])).reshape(x.shape)

    def jacobian(self, q: Tensor) -> Tensor:
        x, out = cells(), []
        for one in q.double():
            pivot = self.place(torch.zeros(2, 1, dtype=torch.float64), one)[:, 0]
            turns = [x - centre[:, None, None] for centre in (self.a, pivot)]
            out.append(torch.stack([torch.stack([-t[1], t[0]]) for t in turns], 1))
        return torch.stack(out)

    def flow(self, q: Tensor, q_next: Tensor, grid: int = GRID) -> Tensor:
        x = cells(grid)
        pairs = zip(q.double(), q_next.double(), strict=True)
        return torch.stack([self.place(self.point(x, a), b) - x for a, b in pairs])

    def shown(self, q: Tensor, grid: int = GRID) -> Tensor:
        """How much of the robot is in each cell: a bell that rides on the disc, so sums over cells are integrals."""
        away = [self.point(cells(grid), one) - self.centre[:, None, None] for one in q.double()]
        return torch.stack([(-d.square().sum(0) / (2 * self.radius**2)).exp() for d in away])

    def picture(self, q: Tensor, detail: int = 1) -> Tensor:
        """(3, detail SIDE, detail SIDE) the disc with a pattern that moves with it, on black."""
        c = (torch.arange(SIDE * detail, dtype=torch.float64) + 0.5) / detail - 0.5
        away = self.point(torch.stack(torch.meshgrid(c, c, indexing="ij")[::-1]), q.double())
        waves = [torch.sin(away[0] / a + away[1] / b) for a, b in ((1.5, 4), (-3, 2), (6, -5))]
        off = (away - self.centre[:, None, None]).square().sum(0)
        return (torch.stack(waves) / 4 + 0.5) * (-off / (2 * self.radius**2)).exp()


def _turn(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


class TellingPair(PairHead):
    """Reads both poses off the pictures and says the world's exact flow, or that of a step that drifts."""

    def __init__(self, world: LinearWorld | TwoPivots, n: int) -> None:
        super().__init__(8, 1, (FLOW_GRID // 2, FLOW_GRID // 2))
        self.world, self.n = world, n
        self.both_ways = True
        self.drift = 0.0
        """Added to every joint of every step that the flow tells [rad]."""
        self.noise = 0.0
        """Motion that no joint can make, to and fro from cell to cell [px]."""

    def correlate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([first, second, 0 * first], 1), torch.cat([second, first, 0 * first + 1], 1)

    def start(self, window: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        here, there, back = window.chunk(3, 1)
        return self._told(here, there, back.amax((1, 2, 3)) > 0)

    def _told(self, here: Tensor, there: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        q, q_next = (x[:, : self.n, 0, 0] for x in (here, there))
        way = torch.where(back, -1.0, 1.0).to(q)[:, None]
        flow = self.world.flow(q, q_next + way * self.drift, FLOW_GRID).to(here)
        v, u = torch.meshgrid(torch.arange(FLOW_GRID), torch.arange(FLOW_GRID), indexing="ij")
        flow = flow + self.noise * (1 - 2 * ((u + v) % 2)).to(flow)
        off = torch.full_like(flow[:, 0], -torch.inf)
        return flow, torch.where((back & (not self.both_ways))[:, None, None], off, torch.zeros_like(off))


class Blind(PairHead):
    """Sees no motion anywhere."""

    def __init__(self) -> None:
        super().__init__(8, 1, (FLOW_GRID // 2, FLOW_GRID // 2))

    def correlate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first, second

    def start(self, window: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        nothing = window.new_zeros(len(window), 3, FLOW_GRID, FLOW_GRID)
        return nothing[:, :2], nothing[:, 2]


class KnownField:
    """A `StepField` over a world; the third channel of the later picture must be the larger one (see `in_order`)."""

    def __init__(self, world: LinearWorld | TwoPivots, n: int = 2) -> None:
        self.config = config(FINGER[:n])
        self.world, self.n = world, n
        self.pair = TellingPair(world, n)
        self.delta_std = torch.full((n,), 0.05, dtype=torch.float64)
        self.delta_correlation = torch.eye(n, dtype=torch.float64)
        self.step_spread = torch.ones(n, dtype=torch.float64)
        self.flow_spread = torch.ones(n, dtype=torch.float64)
        self.video_spread = torch.ones(n, dtype=torch.float64)
        self.looks_closer = torch.tensor(True)
        self.guesses = torch.tensor(False)
        self.guessed = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        """Step and standard deviation [rad] that it guesses, whatever it sees."""
        self.read_off = torch.zeros(n, dtype=torch.float64)
        """Error of the pose read off pictures [rad]."""
        self.read_std = 0.05
        self.asked: list[Tensor] = []
        """Poses at which the field was read, in order."""

    @property
    def joint_names(self) -> tuple[str, ...]:
        return self.config.joint_names

    def encode(self, image: Tensor) -> Encoded:
        scales = {"half": 2, "quarter": 4, "eighth": 8, "sixteenth": 16, "coarse": 8}
        levels = {name: image[..., ::stride, ::stride] for name, stride in scales.items()}
        return Encoded(grey=luma(image), small=luma(image), **levels)

    def state(self, seen: Encoded) -> tuple[Tensor, Tensor]:
        q = seen.half[:, : self.n, 0, 0]
        return q + self.read_off.to(q), torch.full_like(q, self.read_std)

    def guess(self, first: Encoded, second: Encoded, flows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        mean, std = self.guessed
        return mean.expand(len(first.grey), -1), std.expand(len(first.grey), -1)

    def jacobian(self, seen: Encoded, q: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(q.clone())
        shown = self.world.shown(q).clamp(1e-30, 1 - 1e-12)
        return self.world.jacobian(q).to(q), (shown / (1 - shown)).log().to(q)


def in_order(q: Tensor) -> Tensor:
    """`telling` pictures of a film (T, n), n <= 2: channel 2 counts the frames."""
    frames = telling(q).clone()
    frames[:, 2] = torch.arange(len(q), dtype=q.dtype)[:, None, None] / 1000
    return frames
