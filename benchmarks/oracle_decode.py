"""Decode with the simulator's exact flow: what the field and the solver alone lose. Prints JSON.

    python benchmarks/oracle_decode.py --embodiment panda
    python benchmarks/oracle_decode.py --embodiment allegro_right

A joint counts as unseen by the oracle where, at the true pose, the image motion that it alone can cause (per radian or
per 0.1 m, over all visible surface points of a dense sampling) is below the threshold.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from results import add_save, rows, save, settings

from jidm import AnalyticField, JacobianIDM, load_embodiment
from jidm.estimation.analytic_measurement import AnalyticOptions
from jidm.estimation.factors.flow import normal_equations
from jidm.estimation.solver import solve_normal_equations
from jidm.flow import Flow
from jidm.sim import Scene, exact_flow, random_motion

UNSEEN_PX = 2.0
SHOWN = {
    "step_error": "delta_q_error",
    "drift_mean": "drift_end_mean",
    "drift_worst": "drift_end_max",
    "unseen_flagged": "unseen_flagged",
    "seen_not_flagged": "seen_not_flagged",
}
"""Metric -> its name here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embodiment", default="panda")
    parser.add_argument("--camera", default="front")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--videos", type=int, default=3)
    parser.add_argument("--points", type=int, default=4000, help="surface points in use")
    parser.add_argument("--first-seed", type=int, default=2000)
    add_save(parser)
    args = parser.parse_args()
    robot = load_embodiment(args.embodiment)
    camera = robot.camera(args.camera)
    idm = JacobianIDM.from_embodiment(robot, camera=camera, points=args.points, options=AnalyticOptions(refine="none"))
    reference_field = AnalyticField(robot, camera, points=40000, occluders=40000, seed=99)
    joint_scale = torch.tensor([0.1 if t == "prismatic" else 1.0 for t in robot.joint_types], dtype=torch.float64)
    totals = []
    for k in range(args.videos):
        q = random_motion(robot, args.frames, 1 / args.fps, args.first_seed + k)
        with Scene(robot, seed=args.first_seed + k) as scene:
            video = scene.render_video(q, camera)
        flows = [
            exact_flow(robot, camera, video.depth[t], video.link[t], q[t], q[t + 1]) for t in range(args.frames - 1)
        ]
        flow = Flow(
            torch.stack([torch.as_tensor(f.flow) for f in flows]).float(),
            torch.stack([torch.as_tensor(f.on_robot) for f in flows]).float(),
        )
        motion = idm.decode(
            torch.from_numpy(video.rgb.copy()).double() / 255,
            q0=q[0],
            fps=args.fps,
            flow=Flow(flow.flow.double(), flow.weight.double()),
        )
        pose = reference_field.at(torch.from_numpy(q[:-1]))
        surface = pose.surface()
        equations = normal_equations(
            surface.jacobian, torch.zeros_like(surface.points), surface.visible.to(surface.points)
        )
        oracle = solve_normal_equations(equations, joint_scale=joint_scale, min_motion=UNSEEN_PX)
        totals.append(compare(motion, q, oracle.observable.numpy(), joint_scale.numpy()))
        print(json.dumps(totals[-1]), flush=True)
    mean = {key: float(np.nanmean([t[key] for t in totals])) for key in totals[0]}
    report = {"benchmark": "oracle_decode", **settings(args), **mean}
    print(json.dumps(report, indent=2))
    save(
        args.save,
        "oracle_decode",
        rows(args.embodiment, "exact_flow", {metric: mean[key] for metric, key in SHOWN.items()}),
        raw=report,
        seeds=range(args.first_seed, args.first_seed + args.videos),
        note=f"{args.videos} videos of {args.frames} frames at {args.fps:g} fps; the simulator's exact flow.",
    )


def compare(motion, q: np.ndarray, observable: np.ndarray, joint_scale: np.ndarray) -> dict[str, float]:  # type: ignore[no-untyped-def]
    error = np.abs(motion.delta_q.numpy() - np.diff(q, axis=0)) / joint_scale
    always = observable.all(0)
    drift = np.abs(motion.position[-1].numpy() - q[-1]) / joint_scale
    reported_observable = motion.observable.numpy()
    return {
        "delta_q_error": float(error[observable].mean()),
        "delta_q_error_max": float(error[observable].max()),
        "drift_end_mean": float(drift[always].mean()),
        "drift_end_max": float(drift[always].max()),
        "unseen_share": float((~observable).mean()),
        "unseen_flagged": float((~reported_observable[~observable]).mean()) if (~observable).any() else float("nan"),
        "worst_joint": int(np.argmax(np.where(always, drift, 0))),
        "seen_not_flagged": float(reported_observable[observable].mean()),
    }


if __name__ == "__main__":
    main()
