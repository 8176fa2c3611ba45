"""`jidm label`: a data set with actions out of one without."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jidm.cli.model_args import ModelArgs


@dataclass(frozen=True)
class Label:
    """Decode every episode of a data set, or every video of a folder, and write a data set with the decoded actions."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """LeRobot data set (v3.0, v2.1, v2.0), or folder of videos of one size and frame rate."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """The decoder. --q0 is used where the source has no joint positions."""

    image_key: str | None = None
    """Camera of the data set to decode; may be omitted if there is only one."""

    out: Path = Path("labeled")
    """Folder of the new data set; episodes already there are kept, so an interrupted run resumes."""

    action: Literal["joint_position", "joint_velocity", "joint_delta"] = "joint_position"
    """Action of a frame: the position in the next one, the mean velocity until then, or the step."""

    window: int | None = None
    """Decode in overlapping windows of this many frames and average them; each episode as a whole if not given."""

    overlap: float = 0.5
    """Fraction of a window that the next one repeats."""

    version: Literal["v3.0", "v2.1"] = "v3.0"
    """Layout of the new data set."""

    modality: bool = False
    """Also write meta/modality.json for GR00T."""

    fps: float | None = None
    """Frame rate of videos whose files state none [1/s]."""

    shard: str = "0/1"
    """Do shard i of N (i/N), for batch queues. Shards may share --out."""

    def run(self) -> int:
        from jidm.cli.text import parse_shard
        from jidm.control.action_labeling import LabelOptions, label_dataset

        options = LabelOptions(action_space=self.action, window=self.window, overlap=self.overlap)
        idm = self.model.build_idm(self._frame_size)
        result = label_dataset(
            self.source, idm, self.out, image_key=self.image_key, options=options, version=self.version, modality=self.modality,
            q0=self.model.initial_pose(idm.embodiment), fps=self.fps, shard=parse_shard(self.shard), progress=print,
        )  # fmt: skip
        print(f"{self.out}: {result.written} episodes; {len(result.problems)} could not be labeled")
        return 1 if result.problems and not result.written else 0

    def _frame_size(self) -> tuple[int, int]:
        from jidm.control.episode_sources import open_episodes

        return open_episodes(self.source, image_key=self.image_key, fps=self.fps).frame_size
