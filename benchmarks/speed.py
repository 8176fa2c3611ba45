"""Speed of the analytic field, the solver and the kinematics, as ratios to what one would use otherwise. Prints JSON.

Everything runs in one process on a few threads, interleaved, so that a busy machine slows all alike; the figures are
medians and ratios of medians.

    python benchmarks/speed.py [--runs 30] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from results import add_save, row, save

from jidm import AnalyticField, Embodiment, load_embodiment
from jidm.estimation.factors.flow import normal_equations
from jidm.estimation.gauss_newton import gauss_newton_step
from jidm.estimation.solver import solve_normal_equations
from jidm.robot.kinematics import Kinematics
from jidm.sim import Scene, random_motion
from jidm.sim.renderer import rasterize

WIDTH, HEIGHT = 320, 240
BATCH = 32


def medians(functions: dict[str, Callable[[], object]], runs: int, repeat: int = 1) -> dict[str, float]:
    """Median seconds of every piece, measured in turns."""
    for piece in functions.values():
        piece()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, piece in functions.items():
            began = time.perf_counter()
            for _ in range(repeat):
                piece()
            times[name].append((time.perf_counter() - began) / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def field_flow(field: AnalyticField, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Motion of the field's points from pose to pose, and which of them are visible."""
    pose = field.at(a)
    return pose.surface(b - a).points - pose.surface().points, pose.visible.float()


def rendered_field(field: AnalyticField, scene: Scene, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense field the usual way: distance and link of every pixel from a renderer, then J of each."""
    camera = field.camera
    scene.set_configuration(q)
    _, depth, link, _ = rasterize(scene, camera, scene.appearance.light)
    ids = torch.from_numpy(link).long()
    v, u = (ids >= 0).nonzero().unbind(-1)
    p = camera.unproject(torch.stack([u, v], dim=-1).float(), torch.from_numpy(depth)[v, u])
    poses = field.kinematics.link_poses(q)
    jacobian = torch.zeros(2, q.shape[-1], camera.height, camera.width)
    jacobian[:, :, v, u] = field._image_jacobian(camera, poses, p, ids[v, u]).permute(1, 2, 0)
    return jacobian, (ids >= 0).float()


def field_and_solve(runs: int) -> dict[str, object]:
    """Field at a pose, at its points and solved from a given flow, against rendering depth and links and making J."""
    robot = load_embodiment("panda")
    camera = robot.camera().resized(WIDTH, HEIGHT)
    field = AnalyticField(robot, camera)
    q = torch.from_numpy(random_motion(robot, 200, 1 / 16, 0)).float()
    flows = [field_flow(field, a, b) for a, b in pairwise(q)]
    counter = iter(range(10**9))

    def sparse(iterations: int) -> None:
        k = next(counter) % len(flows)
        gauss_newton_step(field.at(q[k]), *flows[k], iterations=iterations)

    # Many poses at once, as for a known trajectory: the overhead of the calls is shared.
    light = AnalyticField(robot, camera, points=2000, occluders=12000)
    many = {
        name: (any_field, *field_flow(any_field, q[:BATCH], q[1 : BATCH + 1]))
        for name, any_field in (("default", field), ("light", light))
    }

    def batched(name: str, iterations: int) -> None:
        any_field, flow, weight = many[name]
        gauss_newton_step(any_field.at(q[:BATCH]), flow, weight, iterations=iterations)

    unseen = torch.zeros(2, HEIGHT, WIDTH)
    scene = Scene(robot, supersample=1)

    def dense() -> None:
        jacobian, mask = field.dense(q[next(counter) % len(flows)], HEIGHT, WIDTH)
        solve_normal_equations(normal_equations(jacobian, unseen, mask))

    def rendered() -> None:
        jacobian, mask = rendered_field(field, scene, q[next(counter) % len(flows)])
        solve_normal_equations(normal_equations(jacobian, unseen, mask))

    took = medians(
        {
            "field_and_one_solve": lambda: sparse(1),
            "field_and_full_solve": lambda: sparse(8),
            "batched_one_solve": lambda: batched("default", 1),
            "batched_full_solve": lambda: batched("default", 8),
            "batched_light_one_solve": lambda: batched("light", 1),
            "batched_light_full_solve": lambda: batched("light", 8),
            "dense_field_and_solve": dense,
            "rendered_field_and_solve": rendered,
        },
        runs,
    )
    scene.close()
    took = {name: t / BATCH if name.startswith("batched") else t for name, t in took.items()}
    return {
        "frames_per_second": {name: round(1 / t, 1) for name, t in took.items()},
        "over_rendering": {
            name: round(took["rendered_field_and_solve"] / t, 3)
            for name, t in took.items()
            if name != "rendered_field_and_solve"
        },
    }


def solver(runs: int) -> dict[str, object]:
    """Normal equations and solve on dense fields, against the usual form and against reading J once."""
    batch, n, height, width = 16, 7, 120, 160
    random = torch.Generator().manual_seed(0)
    J = torch.randn(batch, 2, n, height, width, generator=random)
    f = torch.randn(batch, 2, height, width, generator=random)
    w = torch.rand(batch, height, width, generator=random)
    copy = torch.empty_like(J)

    def permuted() -> torch.Tensor:
        A = J.permute(0, 3, 4, 1, 2).reshape(batch, -1, n)
        b = f.permute(0, 2, 3, 1).reshape(batch, -1, 1)
        Aw = A * w[..., None].expand(batch, height, width, 2).reshape(batch, -1, 1)
        H = Aw.transpose(1, 2) @ A + 1e-4 * torch.eye(n)
        return torch.linalg.solve(H, Aw.transpose(1, 2) @ b)

    ours = solve_normal_equations(normal_equations(J, f, w), ridge=0.0).delta_q
    assert torch.allclose(ours, permuted()[..., 0], atol=1e-3), "the two forms must agree before they are compared"
    took = medians(
        {
            "normal_equations_and_solve": lambda: solve_normal_equations(normal_equations(J, f, w)),
            "normal_equations": lambda: normal_equations(J, f, w),
            "permuted_matmul_and_solve": permuted,
            "sum_of_J": lambda: J.sum(),
            "copy_of_J": lambda: copy.copy_(J),
        },
        runs,
    )
    ours_s = took["normal_equations_and_solve"]
    return {
        "ms": {name: round(1000 * t, 2) for name, t in took.items()},
        "over_permuted": round(took["permuted_matmul_and_solve"] / ours_s, 2),
        "reads_of_J_by_sum": round(ours_s / took["sum_of_J"], 2),
        "reads_of_J_by_copy": round(ours_s / took["copy_of_J"], 2),
    }


def kinematics(runs: int) -> dict[str, object]:
    """Pose and Jacobian of the Panda's hand for batches of joint positions, against pytorch_kinematics."""
    import pytorch_kinematics as pk

    robot = load_embodiment("panda")
    tip = "panda_hand"
    chain = pk.build_serial_chain_from_urdf(_urdf_without_meshes(robot), tip).to(dtype=torch.float32)
    ours = Kinematics.from_embodiment(robot)
    link = robot.model.link_index(tip)
    result: dict[str, object] = {}
    for batch in (1, 64, 4096):
        low, high = (torch.from_numpy(np.array(x)).float() for x in (robot.lower, robot.upper))
        q = low + torch.rand(batch, robot.n, generator=torch.Generator().manual_seed(0)) * (high - low)
        arm = q[:, :7].contiguous()

        def all_links(q: torch.Tensor = q) -> tuple[torch.Tensor, torch.Tensor]:
            poses = ours.link_poses(q)
            return poses, ours.link_jacobians(q)

        def one_link(q: torch.Tensor = q) -> tuple[torch.Tensor, torch.Tensor]:
            return ours.link_pose_and_jacobian(q, link)

        def theirs(arm: torch.Tensor = arm) -> tuple[torch.Tensor, torch.Tensor]:
            return chain.jacobian(arm, ret_eef_pose=True)

        pose, jacobian = one_link()
        their_jacobian, their_pose = theirs()
        assert torch.allclose(pose, their_pose, atol=1e-5), "poses must agree before times are compared"
        assert torch.allclose(jacobian[..., :7], their_jacobian, atol=1e-5), "Jacobians too"
        took = medians(
            {"ours": one_link, "all_links": all_links, "theirs": theirs}, runs, repeat=20 if batch < 100 else 2
        )
        result[str(batch)] = {
            "ms": {name: round(1000 * t, 3) for name, t in took.items()},
            "over_theirs": round(took["theirs"] / took["ours"], 2),
        }
    return result


def _urdf_without_meshes(robot: Embodiment) -> str:
    from dataclasses import replace

    from jidm.robot.urdf.writer import write_urdf

    links = tuple(replace(link, visuals=(), collisions=()) for link in robot.model.links)
    return write_urdf(replace(robot.model, links=links))


FIELDS = {
    "field_and_one_solve": ("analytic", "one solve"),
    "field_and_full_solve": ("analytic", "full re-linearization"),
    "batched_one_solve": ("analytic_batched", "one solve"),
    "batched_full_solve": ("analytic_batched", "full re-linearization"),
    "batched_light_one_solve": ("analytic_batched_light", "one solve"),
    "batched_light_full_solve": ("analytic_batched_light", "full re-linearization"),
    "dense_field_and_solve": ("analytic_dense", "one solve"),
    "rendered_field_and_solve": ("rendered", "one solve"),
}
"""What is timed -> method and case."""


def figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result."""
    made = []
    for metric, key in (("frames_per_second", "frames_per_second"), ("speed_over_rendering", "over_rendering")):
        for name, value in report["field_and_solve"][key].items():
            method, case = FIELDS[name]
            made.append(row("panda", method, metric, value, case=case))
    solving, whole = report["solver"], "normal equations and solve"
    alone = solving["ms"]["normal_equations"] / solving["ms"]["sum_of_J"]
    made += [
        row("any", "solver", "speed_over_permuted", solving["over_permuted"], case=whole),
        row("any", "solver", "reads_of_j", solving["reads_of_J_by_sum"], case=whole),
        row("any", "solver", "reads_of_j", alone, case="normal equations alone"),
    ]
    for batch, found in report["kinematics"].items():
        over = found["over_theirs"]
        made.append(row("panda", "kinematics", "speed_over_pytorch_kinematics", over, case=f"batch {batch}"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    add_save(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        report = {
            "benchmark": "speed",
            "threads": args.threads,
            "field_and_solve": field_and_solve(args.runs),
            "solver": solver(args.runs),
            "kinematics": kinematics(args.runs),
        }
    print(json.dumps(report, indent=2))
    note = (
        "Panda at 320x240; default field 4,000 points and 20,000 in the z-buffer, light field 2,000 and 12,000; solver at "
        "B=16, 120x160, n=7."
    )
    save(args.save, "speed", figures(report), raw=report, seeds=(0,), note=note)


if __name__ == "__main__":
    main()
