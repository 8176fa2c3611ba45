"""Third-party video with exact ground truth: two ViperX arms in MuJoCo (see SOURCE.md of the material). Prints JSON.

    python benchmarks/aloha.py --stride 4 --skip through

The files are looked for in aloha_sim of the folder that the environment variable JIDM_MATERIAL names, else in
../shared/material beside the repository.

Measured over the 12 arm joints of each episode:
  * two-frame steps decoded from the true pose, RMSE over the RMSE of predicting zero. `pair` uses the two images alone;
    `through` also the image between them, as in a video;
  * the whole episode tracked from its first pose only: error after 200 frames, share of joint positions within
    .05 rad, drift curve (plot), and images of flow, residual and re-projected surface in frames 0, 100 and 200.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from results import add_save, material, rows, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from aloha_scene import aloha_embodiment

from jidm import Camera, JacobianIDM, read_video
from jidm.estimation.analytic_measurement import AnalyticOptions
from jidm.fields.analytic import AnalyticField

EPISODES = {"transfer_cube_scripted": "transfer scripted", "insertion_human": "insertion human"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--material", type=Path, default=material("aloha_sim"))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/aloha"))
    parser.add_argument("--episodes", nargs="+", default=list(EPISODES))
    parser.add_argument("--frames", type=int, default=None, help="only so many frames of each episode")
    parser.add_argument("--stride", type=int, default=1, help="decode every so many-th step at the true pose")
    parser.add_argument("--skip", nargs="*", default=(), choices=("pair", "through", "tracked"))
    parser.add_argument("--no-contours", action="store_true")
    add_save(parser)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    robot, convention, camera = aloha_embodiment(args.material)
    idm = JacobianIDM.from_embodiment(
        robot, camera=Camera.from_dict(camera), options=AnalyticOptions(use_contours=not args.no_contours)
    )
    arm = np.array([name not in robot.gripper_joints for name in robot.joint_names])
    results = []
    for episode in args.episodes:
        video = read_video(args.material / f"aloha_sim_{episode}.mp4")[: args.frames]
        state = np.load(args.material / f"aloha_sim_{episode}_state.npz")["qpos"].astype(np.float64)
        q = np.asarray(convention.to_embodiment(state))[: args.frames]
        result: dict = {"benchmark": "aloha", "episode": episode, "frames": len(q)}
        for name, between in (("pair", 2), ("through", 1)):
            if name not in args.skip:
                result[name] = steps(idm, video, q, arm, args.stride, between)
        if "tracked" not in args.skip:
            result["tracked"] = tracked(idm, video, q, arm, args.out / f"{episode}.png")
        print(json.dumps(result, indent=2), flush=True)
        results.append(result)
    note = "Third-party MuJoCo video, 640x480 at 50 fps, 12 arm joints. Settings were chosen on these two episodes too."
    save(args.save, "aloha", [row for result in results for row in figures(result)], raw=results, note=note)


def figures(result: dict) -> list[dict]:
    """The rows of one episode."""
    name, made = EPISODES.get(result["episode"], result["episode"]), []
    for key, case in (("pair", ""), ("through", ", with the frame between")):
        if key in result:
            step = {"rmse_ratio": result[key]["ratio"], "correlation": result[key]["correlation"]}
            made += rows("vx300s_pair", "analytic", step, case=f"{name}, each step from the true pose{case}")
    if "tracked" in result:
        found = result["tracked"]
        whole = {
            "rmse_ratio": found["steps"]["ratio"],
            "position_error_200": found["error_after_200"],
            "position_share_200": found["within_0.05_to_200"],
            "position_error": found["mean_error"],
            "position_share": found["within_0.05"],
            "position_within_2_std": found["within_2_std"],
        }
        made += rows("vx300s_pair", "analytic", whole, case=f"{name}, tracked from the first pose")
    return made


def steps(idm: JacobianIDM, video, q: np.ndarray, arm: np.ndarray, stride: int, frame_stride: int) -> dict:  # type: ignore[no-untyped-def]
    error, truth = [], []
    for t in range(0, len(q) - 2, stride):
        clip = video.pixels[t : t + 3 : frame_stride].float() / 255
        motion = idm.decode(clip, q0=q[t], fps=50.0 / frame_stride)
        step = q[t + 2] - q[t]
        error.append((motion.position[-1].numpy() - q[t] - step)[arm])
        truth.append(step[arm])
    return step_figures(np.array(error), np.array(truth)) | {"stride": stride}


def step_figures(error: np.ndarray, truth: np.ndarray) -> dict:
    def rms(x: np.ndarray) -> float:
        return float(np.sqrt((x**2).mean()))

    worst = np.argsort(np.abs(error).max(1))[-3:]
    return {
        "rmse": rms(error),
        "rmse_of_zero": rms(truth),
        "ratio": rms(error) / rms(truth),
        "correlation": float(np.corrcoef((truth + error).ravel(), truth.ravel())[0, 1]),
        "ratio_per_joint": [round(rms(error[:, k]) / rms(truth[:, k]), 3) for k in range(truth.shape[1])],
        "ratio_without_first_5_steps": rms(error[5:]) / rms(truth[5:]),
        "worst_steps": [[int(k), round(float(np.abs(error[k]).max()), 3)] for k in worst],
    }


def tracked(idm: JacobianIDM, video, q: np.ndarray, arm: np.ndarray, image: Path) -> dict:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    motion = idm.decode(video, q0=q[0])
    seconds = (time.perf_counter() - started) / (len(q) - 1)
    position = motion.position.numpy()
    error = np.abs(position - q)[:, arm]
    step = (position[2:] - position[:-2] - (q[2:] - q[:-2]))[:, arm]
    head = error[:201]
    plot_drift(error, image)
    show_frames(idm, video, position, image)
    return {
        "error_after_200": float(error[min(200, len(q) - 1)].mean()),
        "mean_error_to_200": float(head.mean()),
        "within_0.05_to_200": float((head < 0.05).mean()),
        "mean_error": float(error.mean()),
        "within_0.05": float((error < 0.05).mean()),
        "error_per_joint": error.mean(0).round(4).tolist(),
        "within_2_std": float((error[1:] <= 2 * motion.position_std.numpy()[1:, arm]).mean()),
        "drift_every_50": error[::50].mean(1).round(4).tolist(),
        "steps": step_figures(step, (q[2:] - q[:-2])[:, arm]),
        "residual_px": float(motion.residual.mean()),
        "seconds_per_frame": seconds,
    }


def plot_drift(error: np.ndarray, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(error, color="0.8", linewidth=0.6)
    axes.plot(error.mean(1), color="C0", label="mean over 12 joints")
    axes.axhline(0.05, color="C3", linestyle=":", label="0.05 rad")
    axes.set(
        xlabel="frame", ylabel="|position error| [rad]", title=path.stem, ylim=(0, max(0.06, error.mean(1).max() * 1.2))
    )
    axes.legend(loc="upper left")
    figure.savefig(path.with_name(path.stem + "_drift.png"), dpi=120)
    plt.close(figure)


def show_frames(idm: JacobianIDM, video, position: np.ndarray, path: Path) -> None:  # type: ignore[no-untyped-def]
    """Rows: frames 0, 100, 200; columns: flow, flow the step leaves, surface re-projected at the decoded pose."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    estimator, field = idm.flow, idm.field
    assert estimator is not None and isinstance(field, AnalyticField)
    shown = [t for t in (0, 100, 200) if t + 2 < len(position)]
    figure, axes = plt.subplots(len(shown), 3, figsize=(15, 3.8 * len(shown)), layout="constrained", squeeze=False)
    for row, t in zip(axes, shown, strict=True):
        frames = video.pixels[[t, t + 2]].float() / 255
        flow = estimator(frames[0], frames[1]).flow
        pose = field.at(torch.from_numpy(position[t]).double())
        surface = pose.surface()
        seen = surface.visible
        moved = pose.surface(torch.from_numpy(position[t + 2] - position[t]).double()).points - surface.points
        uv = surface.points[seen].numpy()
        at = uv.round().astype(int)
        measured = flow[:, at[:, 1].clip(0, flow.shape[1] - 1), at[:, 0].clip(0, flow.shape[2] - 1)].T.numpy()
        residual = np.linalg.norm(measured - moved[seen].numpy(), axis=-1)
        image = frames[0].movedim(0, -1).numpy()
        row[0].imshow(flow.norm(dim=0), vmin=0, vmax=8)
        row[0].set_title(f"frame {t}: |flow| over 2 frames [px]")
        row[1].imshow(image)
        row[1].scatter(*uv.T, c=residual, s=2, vmin=0, vmax=4, cmap="inferno")
        row[1].set_title("flow the step leaves [px]")
        row[2].imshow(image)
        row[2].scatter(*uv.T, s=1, color="lime")
        row[2].set_title("surface at the decoded pose")
        for ax in row:
            ax.axis("off")
    figure.savefig(path.with_name(path.stem + "_frames.png"), dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
