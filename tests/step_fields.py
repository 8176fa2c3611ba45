"""Fields given by formula, to test solver and tracker with exact and with wrong measurements.

Most of their images encode the joint positions (channel k is joint k everywhere), so a pair of images determines the
exact motion; neither a network nor a simulator is involved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jidm.fields.free import Features, LearnedField, LearnedFieldConfig
from jidm.fields.free.blocks import luma
from jidm.fields.free.config import FIELD_STRIDE, FLOW_STRIDE
from jidm.fields.free.correlation import CorrelationHead

SIDE = 64
GRID, FLOW_GRID = SIDE // FIELD_STRIDE, SIDE // FLOW_STRIDE
FINGER = ("hinge1", "hinge2")


def config(
    joints: Sequence[str] = FINGER,
    *,
    height: int = SIDE,
    width: int = SIDE,
    delta_std: float = 0.05,
    **overrides: object,
) -> LearnedFieldConfig:
    """Config of a tiny network for revolute joints in +-1.2 rad."""
    n = len(joints)
    return LearnedFieldConfig(
        tuple(joints), ("revolute",) * n, height, width, (0.0,) * n, (0.6,) * n, (delta_std,) * n,
        (-1.2,) * n, (1.2,) * n, **overrides,  # type: ignore[arg-type]
    )  # fmt: skip


def untrained(seed: int = 0, **options: object) -> LearnedField:
    """A network with random weights."""
    torch.manual_seed(seed)
    return LearnedField(config(**options)).eval()  # type: ignore[arg-type]


def random_images(count: int, seed: int = 0, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Smooth random images (count, 3, H, W) in [0, 1]."""
    rough = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(rough, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def encode_configuration(q: Tensor) -> Tensor:
    """Images (*, 3, SIDE, SIDE) that encode joint positions (*, n), n <= 3."""
    padded = torch.nn.functional.pad(q, (0, 3 - q.shape[-1]))
    return padded[..., None, None].expand(*padded.shape, SIDE, SIDE)


def cell_centers(grid: int = GRID) -> Tensor:
    """(2, grid, grid) image coordinates of a grid's cells [px]."""
    c = (torch.arange(grid, dtype=torch.float64) + 0.5) * SIDE / grid - 0.5
    return torch.stack(torch.meshgrid(c, c, indexing="ij")[::-1])


class LinearMotion:
    """The whole image moves by a constant matrix times the step, so that linearization is exact."""

    def __init__(self, n: int = 2) -> None:
        matrix = torch.tensor([[40.0, 15.0], [-10.0, 30.0]], dtype=torch.float64)[:, :n]
        self.constant_jacobian = matrix[..., None, None].expand(-1, -1, GRID, GRID).clone()

    def jacobian(self, q: Tensor) -> Tensor:
        return self.constant_jacobian.expand(len(q), -1, -1, -1, -1)

    def flow(self, q: Tensor, q_next: Tensor, grid: int = GRID) -> Tensor:
        return torch.einsum("cnhw,bn->bchw", self.constant_jacobian[..., :grid, :grid], q_next - q)

    def robot_probability(self, q: Tensor) -> Tensor:
        return torch.ones(len(q), GRID, GRID, dtype=torch.float64)


class TwoPivots:
    """A soft-edged disc on two serial revolute joints: paths are curved.

    `x = a + R(q1) (b + R(q2) p)` for the disc's points p [px].
    """

    a = torch.tensor([20.0, 32.0], dtype=torch.float64)
    b = torch.tensor([9.0, 0.0], dtype=torch.float64)
    center = torch.tensor([5.0, 4.0], dtype=torch.float64)
    radius = 6.0

    def image_point(self, p: Tensor, q: Tensor) -> Tensor:
        """(2, ...) image coordinates of points p of the disc at pose q (2,)."""
        shape = p.shape
        inner = self.b[:, None] + _rotation(q[1]) @ p.flatten(1)
        return (self.a[:, None] + _rotation(q[0]) @ inner).reshape(shape)

    def body_point(self, x: Tensor, q: Tensor) -> Tensor:
        """The inverse of `image_point`."""
        inner = _rotation(-q[0]) @ (x.flatten(1) - self.a[:, None])
        return (_rotation(-q[1]) @ (inner - self.b[:, None])).reshape(x.shape)

    def jacobian(self, q: Tensor) -> Tensor:
        x, out = cell_centers(), []
        for one in q.double():
            pivot = self.image_point(torch.zeros(2, 1, dtype=torch.float64), one)[:, 0]
            lever_arms = [x - center[:, None, None] for center in (self.a, pivot)]
            out.append(torch.stack([torch.stack([-t[1], t[0]]) for t in lever_arms], 1))
        return torch.stack(out)

    def flow(self, q: Tensor, q_next: Tensor, grid: int = GRID) -> Tensor:
        x = cell_centers(grid)
        pairs = zip(q.double(), q_next.double(), strict=True)
        return torch.stack([self.image_point(self.body_point(x, a), b) - x for a, b in pairs])

    def robot_probability(self, q: Tensor, grid: int = GRID) -> Tensor:
        """Robot probability of each cell: a Gaussian fixed to the disc, so that sums approximate integrals."""
        offsets = [self.body_point(cell_centers(grid), one) - self.center[:, None, None] for one in q.double()]
        return torch.stack([(-d.square().sum(0) / (2 * self.radius**2)).exp() for d in offsets])

    def render(self, q: Tensor, scale: int = 1) -> Tensor:
        """(3, scale SIDE, scale SIDE) image of the disc with a pattern that moves with it, on black."""
        c = (torch.arange(SIDE * scale, dtype=torch.float64) + 0.5) / scale - 0.5
        offset = self.body_point(torch.stack(torch.meshgrid(c, c, indexing="ij")[::-1]), q.double())
        waves = [torch.sin(offset[0] / a + offset[1] / b) for a, b in ((1.5, 4), (-3, 2), (6, -5))]
        off = (offset - self.center[:, None, None]).square().sum(0)
        return (torch.stack(waves) / 4 + 0.5) * (-off / (2 * self.radius**2)).exp()


def _rotation(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


class ExactCorrelationHead(CorrelationHead):
    """Decodes both poses from the images and returns the exact flow between them, with errors on request."""

    def __init__(self, motion_model: LinearMotion | TwoPivots, n: int) -> None:
        super().__init__(8, 1, (FLOW_GRID // 2, FLOW_GRID // 2))
        self.motion_model, self.n = motion_model, n
        self.bidirectional = True
        self.drift = 0.0
        """Error of every joint of every step from which the flow is computed [rad]."""
        self.noise = 0.0
        """Flow that no joint explains, of alternating sign from cell to cell [px]."""

    def correlate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([first, second, 0 * first], 1), torch.cat([second, first, 0 * first + 1], 1)

    def initial_flow(self, window: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        here, there, back = window.chunk(3, 1)
        return self._flow_and_weight(here, there, back.amax((1, 2, 3)) > 0)

    def _flow_and_weight(self, here: Tensor, there: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        q, q_next = (x[:, : self.n, 0, 0] for x in (here, there))
        sign = torch.where(back, -1.0, 1.0).to(q)[:, None]
        flow = self.motion_model.flow(q, q_next + sign * self.drift, FLOW_GRID).to(here)
        v, u = torch.meshgrid(torch.arange(FLOW_GRID), torch.arange(FLOW_GRID), indexing="ij")
        flow = flow + self.noise * (1 - 2 * ((u + v) % 2)).to(flow)
        off = torch.full_like(flow[:, 0], -torch.inf)
        return flow, torch.where((back & (not self.bidirectional))[:, None, None], off, torch.zeros_like(off))


class ZeroFlowHead(CorrelationHead):
    """Measures zero flow everywhere."""

    def __init__(self) -> None:
        super().__init__(8, 1, (FLOW_GRID // 2, FLOW_GRID // 2))

    def correlate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first, second

    def initial_flow(self, window: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        nothing = window.new_zeros(len(window), 3, FLOW_GRID, FLOW_GRID)
        return nothing[:, :2], nothing[:, 2]


class ExactStepField:
    """A `JacobianPredictor` given by a motion model; the third channel of the later image must be the larger one (see
    `numbered_frames`)."""

    def __init__(self, motion_model: LinearMotion | TwoPivots, n: int = 2) -> None:
        self.config = config(FINGER[:n])
        self.motion_model, self.n = motion_model, n
        self.correlation = ExactCorrelationHead(motion_model, n)
        self.delta_std = torch.full((n,), 0.05, dtype=torch.float64)
        self.delta_correlation = torch.eye(n, dtype=torch.float64)
        self.step_std_scale = torch.ones(n, dtype=torch.float64)
        self.flow_std_scale = torch.ones(n, dtype=torch.float64)
        self.video_std_scale = torch.ones(n, dtype=torch.float64)
        self.use_refinement = torch.tensor(True)
        self.use_step_regression = torch.tensor(False)
        self.regressed_step = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        """Step and standard deviation [rad] that it regresses from any images."""
        self.pose_bias = torch.zeros(n, dtype=torch.float64)
        """Error of the predicted pose [rad]."""
        self.pose_std = 0.05
        self.queried: list[Tensor] = []
        """Poses at which the field was evaluated, in order."""

    @property
    def joint_names(self) -> tuple[str, ...]:
        return self.config.joint_names

    def encode(self, image: Tensor) -> Features:
        scales = {"half": 2, "quarter": 4, "eighth": 8, "sixteenth": 16, "coarse": 8}
        levels = {name: image[..., ::stride, ::stride] for name, stride in scales.items()}
        return Features(gray=luma(image), gray_downsampled=luma(image), **levels)

    def predict_pose(self, features: Features) -> tuple[Tensor, Tensor]:
        q = features.half[:, : self.n, 0, 0]
        return q + self.pose_bias.to(q), torch.full_like(q, self.pose_std)

    def regress_step(
        self, first: Features, second: Features, flows: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        mean, std = self.regressed_step
        return mean.expand(len(first.gray), -1), std.expand(len(first.gray), -1)

    def jacobian(self, features: Features, q: Tensor) -> tuple[Tensor, Tensor]:
        self.queried.append(q.clone())
        probability = self.motion_model.robot_probability(q).clamp(1e-30, 1 - 1e-12)
        return self.motion_model.jacobian(q).to(q), (probability / (1 - probability)).log().to(q)


def numbered_frames(q: Tensor) -> Tensor:
    """`encode_configuration` of a trajectory (T, n), n <= 2, with channel 2 counting the frames."""
    frames = encode_configuration(q).clone()
    frames[:, 2] = torch.arange(len(q), dtype=q.dtype)[:, None, None] / 1000
    return frames
