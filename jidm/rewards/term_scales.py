"""How good videos look to the reward: the scales that everything else is measured by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jidm.atomic_io import atomic_write
from jidm.checkpoint import find_checkpoint
from jidm.errors import InputError
from jidm.rewards.terms import TERMS, TermScale

_VERSION = 1
SCALES_FILE = "reward.json"
"""Name of a calibration that lies beside a checkpoint."""


@dataclass(frozen=True)
class TermScales:
    """Scales of the terms on good videos of one robot, and what measured them.

    Attributes:
        terms: name of a term -> its scale.
        num_videos: how many they were measured on.
        mode: how motion was read off them: "followed" frame by frame, or "pairs", differentiably.
        provenance: which field, of which checkpoint, for which robot, by which options; plain JSON.
    """

    terms: Mapping[str, TermScale]
    num_videos: int
    mode: str
    provenance: Mapping[str, Any]

    @classmethod
    def from_tail_means(
        cls, tail_means: Mapping[str, Sequence[float]], *, mode: str, provenance: Mapping[str, Any]
    ) -> TermScales:
        """From the terms' `tail_means` in good videos.

        Raises:
            InputError: there are too few.
        """
        scales = {
            name: TermScale.from_tail_means(values, TERMS[name].min_spread) for name, values in tail_means.items()
        }
        return cls(scales, len(next(iter(tail_means.values()))), mode, json.loads(json.dumps(provenance)))

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path) -> TermScales:
        """The one that lies in a checkpoint's folder.

        Args:
            checkpoint: a folder, the name of a bundled one, or a hub id.

        Raises:
            CheckpointError: there is no such checkpoint.
            InputError: nothing lies there.
        """
        folder, source = find_checkpoint(checkpoint)
        if not (folder / SCALES_FILE).exists():
            raise InputError(f"{source} comes without scales for the reward; make them with `jidm calibrate`")
        return cls.load(folder / SCALES_FILE)

    @classmethod
    def load(cls, path: str | Path) -> TermScales:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it is something else.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.pop("version") != _VERSION:
                raise ValueError("written by another version of jidm")
            scales = {str(name): TermScale(float(s["usual"]), float(s["far"])) for name, s in record["scales"].items()}
            return cls(scales, int(record["videos"]), str(record["reading"]), dict(record["made_by"]))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; make it with `jidm calibrate`") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no calibration of the reward: {error}") from None
