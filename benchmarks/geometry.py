"""Kinematics and analytic field against independent oracles, and PiPER against its manufacturer's figures. Prints JSON.

    python benchmarks/geometry.py [--poses 1000]

The oracles are those of the tests, which hold the same figures to their bounds: PyBullet and pinocchio for the poses
of all links, central differences for Jacobians, the manufacturer's URDF (third-party file) for PiPER.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from results import REPOSITORY, add_save, row, save
from scipy.optimize import minimize
from torch import Tensor

sys.path.insert(0, str(REPOSITORY / "tests"))
# Before jidm: their annotations are checked. By name, because tests are not type-checked.
anywhere, pinocchio_poses, pybullet_poses = attrgetter("anywhere", "pinocchio_poses", "pybullet_poses")(
    import_module("test_kinematics")
)
near_home, slopes = attrgetter("near_home", "slopes")(import_module("test_field_analytic"))
piper_anywhere, piper_poses, manufacturer_frames = attrgetter("anywhere", "poses", "manufacturer_frames")(
    import_module("test_embodiment_piper")
)

from jidm import AnalyticField, Embodiment, Kinematics, embodiment_names, load_embodiment  # noqa: E402

MANUFACTURER = "against the manufacturer's URDF, links 1 to 5", "against the manufacturer's URDF, link 6"


def kinematics_errors(poses: int) -> dict[str, float]:
    """The largest differences over all robots: of poses from either simulator, of Jacobians relative to the largest entry."""
    origin, turn, jacobian = 0.0, 0.0, 0.0
    for name in embodiment_names():
        robot = load_embodiment(name)
        kinematics = Kinematics.from_embodiment(robot)
        q = anywhere(robot, poses)
        with tempfile.TemporaryDirectory() as folder:
            oracles = (
                pinocchio_poses(robot, q),
                pybullet_poses(robot, q, Path(folder)),
            )
        ours = kinematics.link_poses(q).numpy()
        for theirs in oracles:
            origin = max(origin, float(np.abs(ours[..., :3, 3] - theirs[..., :3, 3]).max()))
            # |R - R'| = 2 sqrt(2) sin(angle / 2) in the Frobenius norm.
            distance = np.linalg.norm(ours[..., :3, :3] - theirs[..., :3, :3], axis=(-2, -1))
            turn = max(turn, float(distance.max() / np.sqrt(2)))
        jacobian = max(jacobian, link_jacobian_error(kinematics, anywhere(robot, seed=2)))
    return {"origin_error_m": origin, "orientation_error": turn, "jacobian_error": jacobian}


def link_jacobian_error(kinematics: Kinematics, q: Tensor) -> float:
    """Of linear and angular velocity of all links at q (n,), relative to the largest entry."""
    rotation = kinematics.link_poses(q)[:, :3, :3]
    slope = slopes(kinematics.link_poses, q)
    W = torch.einsum("lijn,lkj->nlik", slope[:, :3, :3], rotation)
    w = torch.stack([W[..., 2, 1], W[..., 0, 2], W[..., 1, 0]], dim=-1)
    truth = torch.cat([slope[:, :3, 3], w.permute(1, 2, 0)], dim=1)
    return relative(kinematics.link_jacobians(q), truth)


def image_jacobian_error() -> float:
    """Of the analytic field's surface points at a pose near home, over all robots."""
    worst = 0.0
    for name in embodiment_names():
        robot = load_embodiment(name)
        field = AnalyticField(robot, robot.camera(), points=500, occluders=1000)
        q = near_home(robot, seed=3)
        pose = field.at(q)

        def points(x: Tensor, pose: Any = pose, q: Tensor = q) -> Tensor:
            found: Tensor = pose.surface(x - q).points
            return found

        worst = max(worst, relative(pose.surface().jacobian, slopes(points, q)))
    return worst


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max())


def piper_reach() -> float:
    """The largest distance of the flange from joint 2 over all poses [mm]."""
    robot = load_embodiment("piper")

    def farthest(x: np.ndarray) -> float:
        q = np.array(robot.home, dtype=np.float64)
        q[2], q[4] = x
        return -distance(robot, q[None])

    start, bounds = np.array([-1.4, 0.2]), list(zip(robot.lower[[2, 4]], robot.upper[[2, 4]], strict=True))
    options = {"xatol": 1e-7, "fatol": 1e-9}
    return -float(minimize(farthest, start, method="Nelder-Mead", bounds=bounds, options=options).fun)


def distance(robot: Embodiment, q: np.ndarray) -> float:
    links = piper_poses(robot, q)
    return float(1e3 * np.linalg.norm(links["link6"][..., :3, 3] - links["link2"][..., :3, 3], axis=-1).max())


def manufacturer_errors() -> tuple[float, float] | None:
    """Differences of origins from the manufacturer's URDF [mm]: links 1 to 5, link 6; None where the file is absent."""
    robot = load_embodiment("piper")
    q = piper_anywhere(robot, 300)
    try:
        origins, _ = manufacturer_frames(robot.convention("maker_urdf").from_embodiment(q))
    except pytest.skip.Exception as missing:
        print(missing, file=sys.stderr)
        return None
    links = piper_poses(robot, q)
    ours = np.stack([links[f"link{i + 1}"] for i in range(6)], axis=1)
    error = 1e3 * np.linalg.norm(ours[..., :3, 3] - origins, axis=-1).max(axis=0)
    return float(error[:5].max()), float(error[5])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poses", type=int, default=1000, help="random poses of each robot")
    add_save(parser)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "benchmark": "geometry",
        "poses": args.poses,
        "kinematics": kinematics_errors(args.poses),
        "image_jacobian_error": image_jacobian_error(),
        "piper_reach_mm": piper_reach(),
        "piper_origin_error_mm": manufacturer_errors(),
    }
    print(json.dumps(found, indent=2))
    fk, slopes = f"poses against PyBullet and pinocchio, {args.poses:,} each", "Jacobians against central differences"
    figures = [
        row("every", "kinematics", key, found["kinematics"][key], case=case)
        for key, case in (("origin_error_m", fk), ("orientation_error", fk), ("jacobian_error", slopes))
    ]
    figures.append(row("every", "analytic", "jacobian_error", found["image_jacobian_error"], case=slopes))
    figures.append(row("piper", "urdf", "arm_reach", found["piper_reach_mm"]))
    for case, error in zip(MANUFACTURER, found["piper_origin_error_mm"] or (), strict=False):
        figures.append(row("piper", "urdf", "origin_error", error, case=case))
    save(args.save, "geometry", figures, raw=found, seeds=(0, 2, 3))


if __name__ == "__main__":
    main()
