"""A small decoded run for tests of the viewer: a planar finger of two links over a textured ground, moved exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from jidm.cli.outputs import DecodeResult, write_results
from jidm.estimation.result import JointMotion
from jidm.fields.analytic import AnalyticField
from jidm.flow import Flow
from jidm.robot.registry import load_embodiment
from jidm.video.io import open_video, write_video
from jidm.visualization.overlay import draw_points
from jidm.visualization.viewer.viewed_run import ViewedRun, recorded_motion

ROBOT, FRAMES, FPS = "planar_finger_2", 8, 10.0
WIDTH, HEIGHT = 128, 96
STD = (0.02, 0.05)


class ExactFlow:
    """The flow of the decoded steps themselves, so that nothing is left unexplained; still off the robot."""

    def __init__(self, field: AnalyticField, motion: JointMotion) -> None:
        self._flows = []
        for t in range(len(motion.delta_q)):
            jacobian, _ = field.dense(motion.position[t].float(), HEIGHT, WIDTH)
            self._flows.append(torch.einsum("cnhw,n->chw", jacobian, motion.delta_q[t].float()))
        self._next = 0

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> Flow:
        flow = self._flows[int(first[2, 0, 0] * 255)]  # the corner tells the frame
        return Flow(flow, torch.ones(first.shape[-2:]))


def motion_of_finger() -> JointMotion:
    """Both joints move at constant speed; step 2 is not valid, joint 2 is not observable in step 4."""
    robot = load_embodiment(ROBOT)
    q = np.array(robot.home) + np.linspace(0, 1, FRAMES)[:, None] * np.array([0.5, -0.4])
    motion = recorded_motion(robot.joint_names, robot.joint_types, np.arange(FRAMES) / FPS, q)
    std = torch.tensor(STD, dtype=torch.float64)
    valid, observable = motion.valid.clone(), motion.observable.clone()
    valid[2], observable[4, 1] = False, False
    return replace(
        motion, valid=valid, observable=observable, position_std=std.expand(FRAMES, 2).clone(),
        covariance=torch.diag(std**2).expand(FRAMES - 1, 2, 2).clone(), provenance={"seed": 0},
    )  # fmt: skip


def finger_run() -> ViewedRun:
    """The motion with images of it, in a camera of 128 x 96 px."""
    robot, motion = load_embodiment(ROBOT), motion_of_finger()
    camera = robot.camera().resized(WIDTH, HEIGHT)
    field = AnalyticField(robot, camera, points=4000, occluders=12000)
    frames = []
    for t in range(FRAMES):
        ground = np.random.default_rng(0).integers(60, 200, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        image = draw_points(ground, field, motion.position[t])
        image[0, 0] = (0, 0, t)
        frames.append(torch.from_numpy(image).permute(2, 0, 1))
    return ViewedRun("finger", frames, WIDTH, HEIGHT, motion, robot, camera, field, ExactFlow(field, motion))


def decode_folder(folder: Path) -> Path:
    """What `jidm decode` writes for `finger_run`, with its video beside it."""
    run = finger_run()
    folder.mkdir()
    video = folder.parent / "finger.mp4"
    write_video(video, (frame.permute(1, 2, 0).numpy() for frame in run.frames), FPS)
    write_results(
        DecodeResult(run.motion, run.robot, run.camera, open_video(video), FPS, "DisFlow", 1.0), folder, overlay=False
    )
    return folder
