"""The functional checks of `jidm doctor`: each probe runs one small real task and returns a short result.

Probes run in a process of their own (through `run`), because a broken build of torch or PyBullet does not raise an error but
kills the process.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path


def torch() -> str:
    import torch

    x = torch.rand(64, 64, dtype=torch.float64)
    if not torch.allclose(torch.linalg.solve(x + 64 * torch.eye(64), x), torch.linalg.inv(x + 64 * torch.eye(64)) @ x):
        raise RuntimeError("torch solves a linear system incorrectly")
    return f"{torch.get_num_threads()} threads"


def gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise LookupError(f"torch sees no CUDA device ({built})")
    x = torch.rand(64, 64, device="cuda")
    torch.linalg.inv(x @ x.T + torch.eye(64, device="cuda")).sum().item()
    return torch.cuda.get_device_name()


def torchvision() -> str:
    import torch
    import torchvision

    kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0.9, 0.8]), 0.5)
    if kept.tolist() != [0]:
        raise RuntimeError("torchvision's operators give wrong answers")
    return "its operators work with this torch"


def flow() -> str:
    import numpy as np
    import torch

    from jidm.flow import DisFlow

    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((1, 3, 24, 32))).float()
    big = torch.nn.functional.interpolate(image, size=(96, 128), mode="bicubic").clamp(0, 1)[0]
    measured = DisFlow()(big, big.roll(2, dims=-1)).flow[0, 24:72, 32:96].median().item()
    if abs(measured - 2.0) > 0.3:
        raise RuntimeError(f"DIS measures {measured:.2f} px for a shift of 2 px")
    return f"a shift of 2 px is measured as {measured:.2f} px"


def video() -> str:
    import torch

    from jidm.video.io import read_video, write_video

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"
        write_video(path, torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 48, 64), 10.0)
        back = read_video(path)
    if len(back) != 5:
        raise RuntimeError(f"{len(back)} of 5 frames came back")
    return "h264 written and read"


def sim() -> str:
    from jidm.robot.registry import load_embodiment
    from jidm.sim import Scene

    robot = load_embodiment("planar_finger_2")
    with Scene(robot) as scene:
        visible = int(scene.render(robot.home, robot.camera(next(iter(robot.cameras)))).on_robot.sum())
    if not visible:
        raise RuntimeError("the robot is not in its rendered image")
    return f"a robot rendered on {visible} pixels"


def meshes() -> str:
    from jidm.robot.registry import load_embodiment
    from jidm.robot.surface import sample_surface

    robot = load_embodiment("panda")
    return f"panda: {robot.n} joints, {len(sample_surface(robot.model, 500))} surface points"


def run(names: Iterable[str]) -> None:
    """Run probes and print a line of JSON for each: status (ok, none if there is nothing to check, broken) and detail."""
    for name in names:
        try:
            answer = {"status": "ok", "detail": globals()[name]()}
        except LookupError as error:
            answer = {"status": "none", "detail": str(error)}
        except BaseException as error:
            answer = {"status": "broken", "detail": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(answer), flush=True)
