"""`jidm label`: a data set with actions out of one without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from jidm.errors import InputError


@dataclass(frozen=True)
class Label:
    """Decode every episode of a data set, or every video of a folder, and write a data set with the actions they show."""

    source: tyro.conf.Positional[Path]
    """LeRobot data set (v3.0, v2.1, v2.0), or folder of videos of one size and rate."""

    checkpoint: str | None = None
    """Trained field: a checkpoint folder, a bundled name or a hub id. It needs neither --camera nor --q0."""

    embodiment: str | None = None
    """Robot: a name from `jidm embodiments`. The checkpoint's own if not given."""

    camera: str | None = None
    """Calibrated camera, for the exact field of URDF and camera: a JSON file, or a named camera of the robot."""

    image_key: str | None = None
    """Which camera of the data set is decoded; may be left out where there is only one."""

    q0: tuple[str, ...] = ()
    """Joint positions in every first frame [rad or m], where the source does not hold them: numbers or `home`."""

    out: Path = Path("labelled")
    """Folder of the new data set; what is there already is kept, so a stopped run goes on."""

    action: Literal["joint_position", "joint_velocity", "joint_delta"] = "joint_position"
    """What the action of a frame is: the position in the next one, the velocity until then, or the step."""

    window: int | None = None
    """Decode in overlapping windows of so many frames and average them; each episode as a whole if not given."""

    overlap: float = 0.5
    """Share of a window that the next one repeats."""

    version: Literal["v3.0", "v2.1"] = "v3.0"
    """Layout of the new data set."""

    modality: bool = False
    """Write meta/modality.json as GR00T reads it."""

    fps: float | None = None
    """Frame rate of videos that do not know theirs [1/s]."""

    shard: str = "0/1"
    """Which part of the episodes, i/N: for a batch queue. Parts may share --out."""

    def run(self) -> int:
        from jidm.cli.inputs import read_q0
        from jidm.cli.text import parse_shard
        from jidm.control.action_labeling import LabelOptions, label_dataset
        from jidm.idm import JacobianIDM

        options = LabelOptions(action_space=self.action, window=self.window, overlap=self.overlap)
        if self.checkpoint is not None:
            idm = JacobianIDM.from_pretrained(self.checkpoint, embodiment=self.embodiment, camera=self.camera)
        elif self.embodiment is not None and self.camera is not None:
            idm = JacobianIDM.from_embodiment(self.embodiment, camera=self.camera)
        else:
            raise InputError("name what decodes: --checkpoint, or --embodiment with --field-camera")
        if self.q0 and idm.embodiment is None:
            raise InputError("--q0 needs --embodiment: nobody says what joints the numbers belong to")
        start = read_q0(self.q0, idm.embodiment) if self.q0 and idm.embodiment is not None else None
        result = label_dataset(
            self.source, idm, self.out, image_key=self.image_key, options=options, version=self.version, modality=self.modality,
            q0=start, fps=self.fps, shard=parse_shard(self.shard), progress=print,
        )  # fmt: skip
        print(f"{self.out}: {result.written} episodes; {len(result.problems)} could not be labelled")
        return 1 if result.problems and not result.written else 0
