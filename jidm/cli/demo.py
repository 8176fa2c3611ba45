"""`jidm demo`: render a robot video, decode it, and compare with the true motion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jidm.atomic_io import atomic_write, replaced_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.estimation.result import JointMotion
    from jidm.robot.embodiment import Embodiment


@dataclass(frozen=True)
class Demo:
    """Render a robot video, decode it, and report the errors."""

    out: Path = Path("jidm_demo")
    """Folder for input.mp4, overlay.mp4, plot.png, errors.csv, motion.npz, motion.csv, truth.npy and summary.json."""

    embodiment: str = "panda"
    """Robot: a name from `jidm embodiments`, a URDF file, or a folder with an embodiment.toml."""

    mesh_roots: tuple[Path, ...] = ()
    """Folders of the meshes of a URDF file, besides its own: a package, the folder above, or where a mesh's path continues."""

    camera: str = "front"
    """Camera of the robot."""

    frames: int = 32
    """Length of the video."""

    fps: float = 16.0
    """Frame rate [1/s]."""

    seed: int = 0
    """Seed of the motion."""

    def run(self) -> int:
        from jidm.cli.checks import check_at_least, check_out_folder, check_positive
        from jidm.robot.registry import load_embodiment

        check_at_least(2, frames=self.frames)
        check_positive(fps=self.fps)
        check_at_least(0, seed=self.seed)
        check_out_folder(self.out)
        robot = load_embodiment(self.embodiment, mesh_roots=self.mesh_roots)
        robot.find_camera(self.camera)
        import numpy as np
        from tqdm import tqdm

        from jidm.cli.decode import decode_file
        from jidm.cli.outputs import RESULT_FILES, summary_text, write_results
        from jidm.idm import JacobianIDM
        from jidm.sim import Scene, random_motion
        from jidm.video.io import write_video

        camera = robot.camera(self.camera)
        truth = random_motion(robot, self.frames, 1.0 / self.fps, self.seed)
        with (
            replaced_files(self.out, (*RESULT_FILES, "input.mp4", "truth.npy", "errors.csv")) as folder,
            Scene(robot, seed=self.seed) as scene,
        ):
            np.save(folder / "truth.npy", truth)
            video = folder / "input.mp4"
            bar = tqdm(truth, desc="rendering", unit="frame", delay=2, leave=False)
            write_video(video, (scene.render(q, camera).rgb for q in bar), self.fps)
            idm = JacobianIDM.from_embodiment(robot, camera=camera, flow="dis")
            decoded = decode_file(video, idm, q0=truth[0], fps=self.fps)
            errors = joint_errors(decoded.motion, truth)
            position = decoded.motion.position

            def render(t: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
                image = scene.render(position[t], camera)
                return image.rgb, image.on_robot

            tip = tip_errors(robot, position, truth)
            extra = {"video": str(self.out / "input.mp4"), "errors": errors, "tip_error_mm": tip}
            write_results(decoded, folder, truth=truth, render=render, extra=extra)
            write_errors(folder / "errors.csv", errors)
        print(summary_text(decoded), error_text(errors, tip), sep="\n\n")
        print(f"\nwritten to {self.out}/: see overlay.mp4 and plot.png")
        arguments = f"--embodiment {self.embodiment} --camera {self.camera} --q0 {self.out}/truth.npy --out jidm_decode"
        print(f"the same with jidm decode: jidm decode {self.out}/input.mp4 {arguments}")
        return 0


def joint_errors(motion: JointMotion, truth: NDArray[Any]) -> list[dict[str, Any]]:
    """Error table over the valid steps: one row per joint, the last row over all revolute joints.

    Columns: `joint`; `unit`; `moved` mean |true delta_q| and `error` mean |error of delta_q| [unit per frame]; `nve` their
    ratio (0 is perfect, 1 is a constant answer of zero); `end_error` |error| of the last position [unit]; `within_2std`
    fraction of steps whose error is within two standard deviations; `observable` fraction of steps.

    Args:
        motion: the decoded motion.
        truth: (T, n) true positions [rad or m].
    """
    import numpy as np

    valid = motion.valid.bool().cpu().numpy()
    moved = np.abs(np.diff(truth, axis=0))[valid]
    error = np.abs(motion.delta_q.double().cpu().numpy() - np.diff(truth, axis=0))[valid]
    std = np.sqrt(np.diagonal(motion.covariance.double().cpu().numpy(), axis1=-2, axis2=-1))[valid]
    end = np.abs(motion.position[-1].double().cpu().numpy() - truth[-1])
    observable = motion.observable.cpu().numpy()[valid]
    revolute = np.array([kind != "prismatic" for kind in motion.joint_types])

    def row(name: str, which: NDArray[Any], unit: str) -> dict[str, Any]:
        m, e = float(moved[:, which].mean()), float(error[:, which].mean())
        return {
            "joint": name,
            "unit": unit,
            "moved": m,
            "error": e,
            "nve": e / m if m > 0 else None,
            "end_error": float(end[which].mean()),
            "within_2std": float((error <= 2 * std)[:, which].mean()),
            "observable": float(observable[:, which].mean()),
        }

    if not len(moved):
        return []
    each = np.eye(len(revolute), dtype=bool)
    rows = [row(name, each[k], "rad" if revolute[k] else "m") for k, name in enumerate(motion.joint_names)]
    return [*rows, row("all revolute", revolute, "rad")] if revolute.any() else rows


def tip_errors(robot: Embodiment, position: Any, truth: NDArray[Any]) -> dict[str, float]:
    """Distance between decoded and true position of the first tip link [mm]: mean over the video, and in the last frame.

    Args:
        robot: whose joints these are.
        position, truth: (T, n) decoded and true joint positions [rad or m].
    """
    import torch

    from jidm.evaluation.metrics import tip_error
    from jidm.robot.kinematics import Kinematics

    if not robot.tip_links:
        return {}
    tip = robot.model.link_index(robot.tip_links[0])
    decoded, true = (torch.as_tensor(q).double().cpu() for q in (position, truth))
    distance = tip_error(Kinematics.from_embodiment(robot), [tip], decoded, true)[:, 0] * 1000
    return {"mean": float(distance.mean()), "end": float(distance[-1])}


def write_errors(path: Path, rows: list[dict[str, Any]]) -> None:
    """The error table as CSV; the file appears whole or not at all."""
    import csv

    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def error_text(rows: list[dict[str, Any]], tip: dict[str, float]) -> str:
    """The error table as text."""
    from jidm.cli.text import columns

    if not rows:
        return "no step of this video could be decoded"
    head = ("JOINT", "MOVED/FRAME", "ERROR/FRAME", "ERROR/MOVED", "END ERROR", "WITHIN 2 STD", "OBSERVABLE")
    body = [
        (
            r["joint"],
            f"{r['moved']:.5f} {r['unit']}",
            f"{r['error']:.5f} {r['unit']}",
            "-" if r["nve"] is None else f"{r['nve']:.3f}",
            f"{r['end_error']:.4f} {r['unit']}",
            f"{r['within_2std']:.0%}",
            f"{r['observable']:.0%}",
        )
        for r in rows
    ]
    tail = f"\nerror of the tip: {tip['mean']:.2f} mm on average, {tip['end']:.2f} mm at the end" if tip else ""
    return "errors\n" + columns([head, *body]) + tail
