"""A planar arm of two textured links, rendered and moved by formula: pairs with exact flow without a simulator."""

from __future__ import annotations

import torch
from torch import Tensor

from jidm.fields.free.config import FIELD_STRIDE, FLOW_STRIDE
from jidm.training.data.batch import JointStats, PairBatch

SIDE = 32
JOINTS = ("shoulder", "elbow")
TYPES = ("revolute", "revolute")
STATS = JointStats((0.0, 0.0), (0.5, 0.5), (0.1, 0.1), (-1.0, -1.0), (1.0, 1.0))

_LENGTH, _WIDTH, _BASE = 11.0, 3.0, (16.0, 26.0)  # [px]


def link_coordinates(q: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Link at each point (-1 none), and its position along and across that link [px]."""
    origin, angle = torch.tensor(_BASE), torch.zeros(())
    link, along, across = (
        torch.full(points.shape[:-1], -1),
        torch.zeros(points.shape[:-1]),
        torch.zeros(points.shape[:-1]),
    )
    for k in range(len(q)):
        angle = angle + q[k]
        ahead = torch.stack([angle.sin(), -angle.cos()])
        side = torch.stack([angle.cos(), angle.sin()])
        s, d = (points - origin) @ ahead, (points - origin) @ side
        inside = (s >= 0) & (s <= _LENGTH) & (d.abs() <= _WIDTH)
        link = torch.where(inside, k, link)
        along, across = torch.where(inside, s, along), torch.where(inside, d, across)
        origin = origin + _LENGTH * ahead
    return link, along, across


def points_on_links(q: Tensor, link: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """The inverse: image coordinates of points on the links [px]."""
    origin, angle, out = torch.tensor(_BASE), torch.zeros(()), torch.zeros(*link.shape, 2)
    for k in range(len(q)):
        angle = angle + q[k]
        ahead = torch.stack([angle.sin(), -angle.cos()])
        side = torch.stack([angle.cos(), angle.sin()])
        out = torch.where((link == k)[..., None], origin + along[..., None] * ahead + across[..., None] * side, out)
        origin = origin + _LENGTH * ahead
    return out


def render(q: Tensor) -> Tensor:
    """(3, SIDE, SIDE) image in [0, 1], four samples per pixel."""
    c = (torch.arange(2 * SIDE) + 0.5) / 2 - 0.5
    v, u = torch.meshgrid(c, c, indexing="ij")
    link, s, d = link_coordinates(q, torch.stack([u, v], -1))
    channels = [0.55 + 0.4 * torch.sin(0.9 * s + 0.5 * d + 2.0 * k + 1.5 * link) for k in range(3)]
    rgb = torch.where(link >= 0, torch.stack(channels), torch.tensor(0.2))
    return torch.nn.functional.avg_pool2d(rgb[None], 2)[0]


def flow_on_grid(q: Tensor, q_next: Tensor, stride: int = FLOW_STRIDE) -> tuple[Tensor, Tensor]:
    """Exact flow (2, h, w) [px] on the grid of that stride, and the robot's mask (h, w)."""
    c = torch.arange(SIDE // stride) * stride + (stride - 1) / 2
    v, u = torch.meshgrid(c, c, indexing="ij")
    here = torch.stack([u, v], -1)
    link, s, d = link_coordinates(q, here)
    moved = torch.where((link >= 0)[..., None], points_on_links(q_next, link, s, d) - here, torch.zeros(()))
    return moved.permute(2, 0, 1), (link >= 0).float()


def arm_batch(count: int, seed: int = 0, *, with_flow: bool = True) -> PairBatch:
    """Pairs (and the frames before) of the arm at random poses, moving at constant velocity."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(count, 2, generator=generator) * 1.2 - 0.6
    step = (torch.rand(count, 2, generator=generator) * 2 - 1) * 0.15
    times = [q + k * step for k in (-1, 0, 1)]
    before, first, second = (torch.stack([render(x) for x in row]) for row in times)
    flows = {}
    for suffix, a, b in (("", times[1], times[2]), ("_back", times[2], times[1])):
        flow, mask = (torch.stack(x) for x in zip(*(flow_on_grid(x, y) for x, y in zip(a, b)), strict=True))
        fine = torch.stack([flow_on_grid(x, y, FIELD_STRIDE)[1] for x, y in zip(a, b, strict=True)])
        flows |= {f"flow{suffix}": flow, f"mask{suffix}": fine, f"weight{suffix}": torch.ones_like(mask)}
    return PairBatch(first, second, times[1], times[2], before=before, **(flows if with_flow else {}))


def arm_video(frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(T, 3, SIDE, SIDE) frames of a smooth motion and its (T, 2) joint positions."""
    phase = torch.rand(2, generator=torch.Generator().manual_seed(seed)) * 6.28
    t = torch.arange(frames)[:, None] * torch.tensor([0.21, 0.33])
    q = 0.5 * torch.sin(t + phase)
    return torch.stack([render(x) for x in q]), q
