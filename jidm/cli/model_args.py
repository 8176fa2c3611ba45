"""Command line options that define a decoder, shared by all verbs that decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jidm.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.camera.model import Camera
    from jidm.checkpoint import Checkpoint
    from jidm.idm import JacobianIDM
    from jidm.rewards.config import RewardConfig
    from jidm.robot.embodiment import Embodiment

FrameSize = Callable[[], tuple[int, int]]
"""Gives (width, height) of the video; called only if a camera has to be resized to it."""


@dataclass(frozen=True)
class ModelArgs:
    """The decoder: a trained field, or the analytic field of a robot in a calibrated camera.

    Attributes:
        checkpoint: Trained field: a checkpoint folder, a bundled name (panda-sim, ...) or a hub id. It needs
            neither --camera nor --q0.
        embodiment: Robot: a name from `jidm embodiments`, a URDF file, or a folder with an embodiment.toml. The
            checkpoint's own if not given.
        mesh_roots: Folders of the meshes of a URDF file, besides its own: a package, the folder above, or where a mesh's path
            continues.
        links: Links whose surface the exact field samples: names or patterns ('arm_*'); all if not given. Joints that move
            none of them are held. Choose also links that pass in front.
        camera: Calibrated camera of the video: a JSON file (width, height, K, T_camera_base; or eye, target, fov_y), or
            the name of one of the robot's cameras (front, ...). With a checkpoint, the analytic field of URDF and camera
            replaces the learned one; `trained` is the camera of its training data.
        q0: Joint positions in the first frame [rad or m]: one number per joint, `home`, or a .npy or .json file.
        flow: Optical flow estimator. If not given: dis for an analytic field; a learned field matches the frames itself.
            raft downloads its weights unless --raft-weights names them.
        raft_weights: Local file of RAFT (large) weights, .pth or .safetensors; implies --flow raft.
        limits: Joint limits enforced while decoding: all (positions and velocities), position, or none. If not given:
            none for rewards, which refuse all, and all otherwise. Sped-up or generated videos may exceed velocity limits;
            then use position.
        device: Where a trained field runs: cpu, cuda, cuda:1, ..., or mps on a Mac. An analytic field runs on the CPU.
    """

    checkpoint: str | None = None
    embodiment: str | None = None
    mesh_roots: tuple[Path, ...] = ()
    links: tuple[str, ...] = ()
    camera: str | None = None
    q0: tuple[str, ...] = ()
    flow: Literal["dis", "raft"] | None = None
    raft_weights: Path | None = None
    limits: Literal["all", "position", "none"] | None = None
    device: str = "cpu"

    @property
    def embodiment_file(self) -> str | None:
        """Absolute path of --embodiment if it is a file or folder; None if it is a name, or not given."""
        if self.embodiment is None or not Path(self.embodiment).exists():
            return None
        from jidm.robot.registry import embodiment_names

        return None if self.embodiment in embodiment_names() else str(Path(self.embodiment).absolute())

    def build_idm(
        self, frame_size: FrameSize | None = None, *, q0_required: bool = False, check_q0: bool = True
    ) -> JacobianIDM:
        """The decoder. A wrong option fails before the video is opened.

        Args:
            frame_size: of the video; the camera is resized to it.
            q0_required: refuse a decoder without --q0 that cannot estimate the initial pose.
            check_q0: whether --q0 is the pose of one video; not if it may be a file of many.

        Raises:
            InputError: an option is missing or wrong.
        """
        robot, checkpoint, camera = self._resolve(frame_size, q0_required=q0_required, check_q0=check_q0)
        from jidm.idm import JacobianIDM

        options: dict[str, Any] = {"camera": camera, "limits": self.limits or "all", "links": self.links or None}
        if self.raft_weights is not None:
            from jidm.flow import RaftFlow

            options["flow"] = RaftFlow(weights=self.raft_weights)
        elif self.flow is not None:
            options["flow"] = self.flow
        if checkpoint is not None:
            return JacobianIDM.from_pretrained(checkpoint, embodiment=robot, device=self.device, **options)
        assert robot is not None
        return JacobianIDM.from_embodiment(robot, **options)

    def initial_pose(self, robot: Embodiment | None) -> NDArray[Any] | None:
        """(n,) --q0 as joint positions [rad or m]; None if it is not given.

        Args:
            robot: whose joints they are.

        Raises:
            InputError: they do not fit the robot, or it is unknown.
        """
        from jidm.cli.inputs import read_q0

        if not self.q0:
            return None
        if robot is None:
            raise InputError("--q0 needs --embodiment: it is unknown which joints the numbers belong to")
        return read_q0(self.q0, robot)

    def reward_config(self, scales: Path | None, frame_size: FrameSize, fps: float | None) -> RewardConfig:
        """The reward with this decoder, as values that can be sent to other processes.

        Args:
            scales: JSON file; those in the checkpoint's folder if None.
            frame_size: of the videos.
            fps: frame rate of the videos [1/s]; as the files state if None.

        Raises:
            InputError: an option is missing or wrong.
        """
        from jidm.cli.inputs import read_poses

        poses = read_poses(self.q0)
        robot, _, camera = self._resolve(frame_size, check_q0=poses is None)
        from jidm.rewards.config import RewardConfig

        if poses is None and (pose := self.initial_pose(robot)) is not None:
            poses = pose.tolist()
        return RewardConfig(
            scales=None if scales is None else str(scales), checkpoint=self.checkpoint, embodiment=self.embodiment,
            camera=None if camera is None else camera.to_dict(), flow=self.flow,
            mesh_roots=tuple(map(str, self.mesh_roots)), links=self.links or None,
            raft_weights=None if self.raft_weights is None else str(self.raft_weights), limits=self.limits or "none",
            device=self.device, fps=fps, q0=poses,
        )  # fmt: skip

    def check(self, *, q0_required: bool = False, check_q0: bool = True) -> Embodiment | None:
        """The robot, if it is given, after all that can be checked without heavy packages.

        Args:
            q0_required, check_q0: as for `build_idm`.

        Raises:
            InputError: an option is missing or wrong.
        """
        from jidm.cli.checks import check_checkpoint, check_device, check_exists
        from jidm.robot.registry import load_embodiment

        if self.mesh_roots and self.embodiment is None:
            raise InputError("--mesh-roots needs --embodiment, the URDF file whose meshes lie there")
        if self.links and self.camera is None and self.checkpoint is not None:
            raise InputError("--links needs --camera as well: only the exact field samples links")
        robot = None if self.embodiment is None else load_embodiment(self.embodiment, mesh_roots=self.mesh_roots)
        if self.links and robot is not None:
            robot.model.match_links(self.links)
        if self.checkpoint is None:
            needed = {"embodiment": robot, "camera": self.camera, **({"q0": self.q0} if q0_required else {})}
            for name, value in needed.items():
                if not value:
                    flags = ", ".join(f"--{flag}" for flag in needed)
                    raise InputError(f"--{name} is missing: without --checkpoint, give {flags}")
            if self.device != "cpu":
                raise InputError("--device is for --checkpoint; an analytic field runs on the CPU, leave --device out")
        else:
            if self.camera not in (None, "trained") and robot is None:
                raise InputError("--camera needs --embodiment as well: the exact field is that of a robot")
            check_checkpoint(self.checkpoint)
        check_device(self.device)
        if self.raft_weights is not None:
            check_exists(self.raft_weights, file=True)
        if robot is not None:
            if self.camera is not None and not (self.camera == "trained" and self.checkpoint is not None):
                robot.find_camera(self.camera)
            if check_q0:
                self.initial_pose(robot)
        return robot

    def _resolve(
        self, frame_size: FrameSize | None, *, q0_required: bool = False, check_q0: bool = True
    ) -> tuple[Embodiment | None, Checkpoint | None, Camera | None]:
        """Robot, checkpoint and camera, as far as they are given."""
        robot = self.check(q0_required=q0_required, check_q0=check_q0)
        from jidm.camera.model import Camera
        from jidm.checkpoint import load_checkpoint
        from jidm.cli.inputs import resize_camera

        checkpoint = None if self.checkpoint is None else load_checkpoint(self.checkpoint)
        camera = None
        if self.camera == "trained" and checkpoint is not None:
            camera = Camera.from_dict(checkpoint.training_camera())
        elif self.camera is not None:
            assert robot is not None
            camera = robot.camera(self.camera)
        if camera is not None and frame_size is not None:
            camera = resize_camera(camera, *frame_size())
        return robot, checkpoint, camera
