"""Decode rendered videos of a robot: error at the true pose and tracked from the first pose. Prints JSON.

    python benchmarks/picture_decode.py --embodiment panda --videos 20 --frames 32

Nothing was tuned on these seeds (1000 and up; tuning used seeds below 100).
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
import torch
from results import add_save, rows, save, settings

from jidm import Embodiment, JacobianIDM, Kinematics, load_embodiment
from jidm.estimation.analytic_measurement import AnalyticOptions
from jidm.fields.analytic import AnalyticField
from jidm.sim import Appearance, Scene, random_motion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embodiment", default="panda")
    parser.add_argument("--camera", default="front")
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--appearance", default="plain", choices=("plain", "random"))
    parser.add_argument("--true-pose-steps", type=int, default=8, help="steps per video decoded from the true pose")
    parser.add_argument("--no-contours", action="store_true", help="without contours, to see what they bring")
    add_save(parser)
    args = parser.parse_args()

    robot = load_embodiment(args.embodiment)
    camera = robot.camera(args.camera)
    idm = JacobianIDM.from_embodiment(robot, camera=camera, options=AnalyticOptions(use_contours=not args.no_contours))
    arm_joints = np.array([name not in robot.gripper_joints for name in robot.joint_names])
    videos = []
    for k in range(args.videos):
        seed = args.first_seed + k
        q = random_motion(robot, args.frames, 1 / args.fps, seed)
        appearance = Appearance.plain() if args.appearance == "plain" else Appearance.random(seed)
        with Scene(robot, seed=seed, appearance=appearance) as scene:
            video = torch.from_numpy(scene.render_video(q, camera).rgb.copy())
        videos.append(one_video(idm, video, q, args, arm_joints) | {"seed": seed})
        print(json.dumps({k: v for k, v in videos[-1].items() if not isinstance(v, list)}), file=sys.stderr, flush=True)
    report = summary(videos, robot, args)
    print(json.dumps(report, indent=2))
    camera_text = f"{camera.width}x{camera.height} at {args.fps:g} fps"
    save(
        args.save,
        "picture_decode",
        figures(args.embodiment, report),
        raw=report,
        seeds=range(args.first_seed, args.first_seed + args.videos),
        note=f"{args.videos} videos of {args.frames} frames, {camera_text}, {args.appearance} appearance.",
    )


def figures(robot: str, report: dict) -> list[dict]:
    """The rows of the result."""
    true_pose = {"nve": report["nve_true_pose"], "nve_median": report["nve_true_pose_median_video"]}
    tracked = {
        "nve": report["nve_tracked"],
        "nve_median": report["nve_tracked_median_video"],
        "nve_over_true_pose": report["nve_tracked"] / report["nve_true_pose"],
        "position_error": report["position_error_mean"],
        "position_error_end": report["position_error_end"],
        "tip_error": report["tip_mm"],
        "reprojection": report["reprojection_px"],
        "position_within_2_std": report["within_2_std"],
    }
    return [
        *rows(robot, "analytic", true_pose, case="each step from the true pose"),
        *rows(robot, "analytic", tracked, case="tracked from the first pose"),
    ]


def one_video(
    idm: JacobianIDM, video: torch.Tensor, q: np.ndarray, args: argparse.Namespace, arm_joints: np.ndarray
) -> dict:
    started = time.perf_counter()
    tracked = idm.decode(video, q0=q[0], fps=args.fps)
    seconds = (time.perf_counter() - started) / (len(video) - 1)
    delta = np.diff(q, axis=0)
    tracked_error = np.abs(tracked.delta_q.numpy() - delta)
    steps = np.linspace(0, len(q) - 2, args.true_pose_steps).astype(int)
    true_error = np.stack(
        [np.abs(idm.decode(video[t : t + 2], q0=q[t], fps=args.fps).delta_q[0].numpy() - delta[t]) for t in steps]
    )
    position = tracked.position.numpy()
    tip_mm, reprojection = geometry_error(idm, position, q)
    return {
        "nve_tracked": ratio(tracked_error[:, arm_joints], delta[:, arm_joints]),
        "nve_true_pose": ratio(true_error[:, arm_joints], delta[steps][:, arm_joints]),
        "tracked_error": tracked_error.mean(0).tolist(),
        "true_error": true_error.mean(0).tolist(),
        "step": np.abs(delta).mean(0).tolist(),
        "step_true": np.abs(delta[steps]).mean(0).tolist(),
        "position_error_end": float(np.abs(position[-1] - q[-1])[arm_joints].mean()),
        "position_error_mean": float(np.abs(position - q)[:, arm_joints].mean()),
        "tip_mm": tip_mm,
        "reprojection_px": reprojection,
        "within_2_std": float((np.abs(position - q)[1:] <= 2 * tracked.position_std.numpy()[1:])[:, arm_joints].mean()),
        "seconds_per_frame": seconds,
    }


def ratio(error: np.ndarray, truth: np.ndarray) -> float:
    """NVE: mean |error| / mean |delta_q|."""
    return float(error.mean() / np.abs(truth).mean())


def geometry_error(idm: JacobianIDM, position: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """Mean end-effector error [mm] and mean re-projection error of the surface [px] over the tracked video."""
    robot, field = idm.embodiment, idm.field
    assert robot is not None and isinstance(field, AnalyticField)
    kinematics = Kinematics.from_embodiment(robot)
    tips = [robot.model.link_index(name) for name in robot.tip_links]
    both = torch.from_numpy(np.stack([position.astype(np.float64), q]))
    poses = kinematics.link_poses(both)[..., tips, :3, 3]
    surface = [field.at(x).surface() for x in both]
    visible = surface[1].visible
    px = (surface[0].points - surface[1].points).norm(dim=-1)[visible].mean()
    return float((poses[0] - poses[1]).norm(dim=-1).mean() * 1000), float(px)


def summary(videos: list[dict], robot: Embodiment, args: argparse.Namespace) -> dict:
    def mean(key: str) -> np.ndarray:
        return np.mean([video[key] for video in videos], axis=0)

    per_joint = {
        name: {"true_pose": round(float(a), 3), "tracked": round(float(b), 3)}
        for name, a, b in zip(
            robot.joint_names, mean("true_error") / mean("step_true"), mean("tracked_error") / mean("step"), strict=True
        )
    }
    arm_joints = np.array([name not in robot.gripper_joints for name in robot.joint_names])
    return {
        "benchmark": "picture_decode",
        **settings(args),
        "nve_true_pose": float(mean("true_error")[arm_joints].mean() / mean("step_true")[arm_joints].mean()),
        "nve_tracked": float(mean("tracked_error")[arm_joints].mean() / mean("step")[arm_joints].mean()),
        "nve_true_pose_median_video": float(np.median([video["nve_true_pose"] for video in videos])),
        "nve_tracked_median_video": float(np.median([video["nve_tracked"] for video in videos])),
        "per_joint": per_joint,
        "mean_step_rad": float(mean("step")[arm_joints].mean()),
        **{
            key: float(mean(key))
            for key in (
                "position_error_mean",
                "position_error_end",
                "tip_mm",
                "reprojection_px",
                "within_2_std",
                "seconds_per_frame",
            )
        },
    }


if __name__ == "__main__":
    main()
