"""Everything that defines a reward, as plain values that can be sent to other processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jidm.camera.model import Camera
from jidm.errors import InputError
from jidm.flow import FlowEstimator, RaftFlow
from jidm.idm import JacobianIDM
from jidm.rewards.executability import ExecutabilityReward
from jidm.rewards.term_scales import TermScales
from jidm.robot.registry import load_embodiment


@dataclass(frozen=True)
class RewardConfig:
    """Configuration of an executability reward.

    Attributes:
        scales: JSON file, see `TermScales`; the one in the checkpoint's folder if None.
        checkpoint: folder, bundled name or hub id; None for an analytic field.
        embodiment: a registered name or a path, as for `load_embodiment`; the checkpoint's own if None.
        mesh_roots: folders of the meshes of a URDF file, as for `load_embodiment`.
        links: of the exact field, as for `JacobianIDM.from_embodiment`.
        camera: `Camera.to_dict`; None for the learned field itself.
        flow: name of a flow estimator; the IDM's default if None.
        raft_weights: file of RAFT's weights, in place of `flow`.
        limits: joint limits inside the decoder, "none" or "position".
        device: where the network runs.
        weights: of terms, in place of the defaults.
        fps: of the videos [1/s], in place of what the files state.
        q0: (n,) joint positions in the first frame of every video [rad or m], or file name -> positions; None if the
            network estimates them.
    """

    scales: str | None = None
    checkpoint: str | None = None
    embodiment: str | None = None
    mesh_roots: Sequence[str] = ()
    links: Sequence[str] | None = None
    camera: Mapping[str, Any] | None = None
    flow: str | None = None
    raft_weights: str | None = None
    limits: str = "none"
    device: str = "cpu"
    weights: Mapping[str, float] = field(default_factory=dict)
    fps: float | None = None
    q0: Sequence[float] | Mapping[str, Sequence[float]] | None = None

    def build_idm(self) -> JacobianIDM:
        """The decoder.

        Raises:
            InputError: neither a checkpoint nor an embodiment with its camera is given.
        """
        camera = None if self.camera is None else Camera.from_dict(dict(self.camera))
        flow: str | FlowEstimator | None = (
            self.flow if self.raft_weights is None else RaftFlow(weights=self.raft_weights)
        )
        robot = None if self.embodiment is None else load_embodiment(self.embodiment, mesh_roots=self.mesh_roots)
        if self.checkpoint is not None:
            return JacobianIDM.from_pretrained(
                self.checkpoint, embodiment=robot, camera=camera, flow=flow, device=self.device,
                limits=self.limits, links=self.links,
            )  # fmt: skip
        if robot is None or camera is None:
            raise InputError("a reward needs a checkpoint, or an embodiment and its camera")
        return JacobianIDM.from_embodiment(
            robot, camera=camera, flow=flow or "dis", limits=self.limits, links=self.links
        )

    def build(self) -> ExecutabilityReward:
        """The reward."""
        return ExecutabilityReward(self.build_idm(), self.load_scales(), weights=self.weights)

    def load_scales(self) -> TermScales:
        """The scales of the terms.

        Raises:
            InputError: there are none.
        """
        if self.scales is not None:
            return TermScales.load(self.scales)
        if self.checkpoint is None:
            raise InputError("an analytic field has no scales for the reward; make them with `jidm fit-scales`")
        return TermScales.from_checkpoint(self.checkpoint)

    def initial_pose(self, video: str) -> Sequence[float] | None:
        """Joint positions in the first frame of a video; None if the network estimates them.

        Raises:
            InputError: q0 maps file names to positions and lacks this file.
        """
        if self.q0 is None or not isinstance(self.q0, Mapping):
            return self.q0
        for name in (video, Path(video).name):
            if name in self.q0:
                return self.q0[name]
        raise InputError(f"q0 has no initial pose for {video}")

    @cached_property
    def content_hash(self) -> str:
        """Hash of everything that defines the reward: the scales' values instead of their path, not the device and folders."""
        record = asdict(self) | {"scales": asdict(self.load_scales())}
        del record["device"], record["mesh_roots"]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
