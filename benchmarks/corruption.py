"""Error of joint steps on corrupted flow over that on clean flow, robust weights and plain least squares side by side. Prints JSON.

    python benchmarks/corruption.py [--videos 4] [--frames 12]

Two corruptions: a share of the pixels has random flow; a textured background moves behind the robot, and no mask
tells the solver which pixels are background. Two sources of flow: the simulator's exact flow with a little noise, and
DIS on the images. One more case is harder than required: every pixel within 3 px of the silhouette boundary moves
with the background, as a poor flow estimator would have it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from results import add_save, row, save, settings

from jidm import AnalyticField, Camera, Embodiment, load_embodiment
from jidm.estimation.gauss_newton import gauss_newton_step
from jidm.flow import DisFlow, Flow
from jidm.sim import Appearance, Background, Scene, Texture, exact_flow, random_motion

FPS = 16.0
NOISE_PX = 0.05  # on the exact flow: 0 would make every ratio infinite
OUTLIER_FRACTION = 0.3
SOLVERS = {"robust": "tukey", "plain": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embodiment", default="panda")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--first-seed", type=int, default=3000)
    add_save(parser)
    args = parser.parse_args()
    robot = load_embodiment(args.embodiment)
    camera = robot.camera()
    field = AnalyticField(robot, camera)
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in range(args.first_seed, args.first_seed + args.videos):
        for case, flows, q in cases(robot, camera, args.frames, seed):
            for name, robust in SOLVERS.items():
                error = step_error(field, q, flows, robust)
                errors.setdefault(case, {}).setdefault(name, []).append(error)
    mean = {case: {name: float(np.mean(e)) for name, e in solvers.items()} for case, solvers in errors.items()}
    ratios = {
        case: {name: error / mean[case.split(",")[0] + ", clean"][name] for name, error in solvers.items()}
        for case, solvers in mean.items()
        if not case.endswith("clean")
    }
    report = {
        "benchmark": "corruption",
        **settings(args),
        "mean_error_rad": {c: {n: round(e, 6) for n, e in s.items()} for c, s in mean.items()},
        "ratios": {c: {n: round(x, 2) for n, x in s.items()} for c, s in ratios.items()},
    }
    print(json.dumps(report, indent=2))
    figures = [
        row(args.embodiment, name, "error_over_clean", ratio, case=case)
        for case, solvers in ratios.items()
        for name, ratio in solvers.items()
    ]
    seeds = range(args.first_seed, args.first_seed + args.videos)
    note = f"Textured skin; exact flow has {NOISE_PX:g} px of noise; the border is 3 px wide."
    save(args.save, "corruption", figures, raw=report, seeds=seeds, note=note)


def cases(robot: Embodiment, camera: Camera, frames: int, seed: int) -> list[tuple[str, list[Flow], np.ndarray]]:
    """Name, flow of every step, and true joint positions."""
    q = random_motion(robot, frames, 1 / FPS, seed)
    appearance = Appearance(texture=Texture("noise"))
    with Scene(robot, seed=seed, appearance=appearance) as scene:
        still = scene.render_video(q, camera)
        scene.appearance = replace(appearance, background=Background("moving", contrast=0.15, velocity=(0.012, 0.004)))
        moving = scene.render_video(q, camera)
    random = torch.Generator().manual_seed(seed)
    exact, moving_background, dragged_boundary = [], [], []
    for t in range(frames - 1):
        exact_motion = exact_flow(robot, camera, still.depth[t], still.link[t], q[t], q[t + 1])
        noise = NOISE_PX * torch.randn(exact_motion.flow.shape, generator=random)
        shift = torch.tensor([0.012, 0.004])[:, None, None] * camera.height
        everywhere = torch.ones(camera.height, camera.width)
        exact.append(Flow((exact_motion.flow + noise).float(), everywhere))
        robot_flow = exact_motion.flow + noise
        moving_background.append(
            Flow(torch.where(exact_motion.on_robot, robot_flow, shift + noise).float(), everywhere)
        )
        boundary = torch.nn.functional.max_pool2d(1.0 - exact_motion.on_robot[None].float(), 7, 1, 3)[0] > 0
        dragged_boundary.append(Flow(torch.where(boundary, shift + noise, robot_flow).float(), everywhere))
    dis = DisFlow()

    def estimated(rgb: np.ndarray) -> list[Flow]:
        images = torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 255
        return [dis(a, b) for a, b in pairwise(images)]

    dis_flows = estimated(still.rgb)
    return [
        ("exact flow, clean", exact, q),
        ("exact flow, 30 % random", [with_outliers(f, random) for f in exact], q),
        ("exact flow, moving background", moving_background, q),
        ("exact flow, border moves with the background", dragged_boundary, q),
        ("DIS, clean", dis_flows, q),
        ("DIS, 30 % random", [with_outliers(f, random) for f in dis_flows], q),
        ("DIS, moving background", estimated(moving.rgb), q),
    ]


def with_outliers(flow: Flow, random: torch.Generator) -> Flow:
    """The same with random vectors of up to 10 px at a share of the pixels, of full confidence."""
    outlier = torch.rand(flow.weight.shape, generator=random) < OUTLIER_FRACTION
    random_flow = 20 * torch.rand(flow.flow.shape, generator=random) - 10
    weight = torch.where(outlier, flow.weight.mean(), flow.weight)
    return Flow(torch.where(outlier, random_flow, flow.flow), weight)


def step_error(field: AnalyticField, q: np.ndarray, flows: list[Flow], robust: str | None) -> float:
    """Mean |error| of the steps at the true poses [rad], gripper left out."""
    arm = [k for k, name in enumerate(field.joint_names) if name not in field.embodiment.gripper_joints]
    total = []
    for t, flow in enumerate(flows):
        pose = field.at(torch.from_numpy(q[t]))
        surface = pose.surface()
        u, v = surface.points.round().long().unbind(-1)
        inside = pose.visible & (u >= 0) & (v >= 0) & (u < field.camera.width) & (v < field.camera.height)
        u, v = u.clamp(0, field.camera.width - 1), v.clamp(0, field.camera.height - 1)
        weight = flow.weight[v, u] * inside
        found = gauss_newton_step(pose, flow.flow[:, v, u].T.double(), weight.double(), robust=robust).delta_q
        total.append(np.abs(found.numpy() - (q[t + 1] - q[t]))[arm].mean())
    return float(np.mean(total))


if __name__ == "__main__":
    with torch.no_grad():
        main()
