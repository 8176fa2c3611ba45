"""How good videos look to the reward: the scales that everything else is measured by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jidm.adapters.reward.terms import TERMS, Scale
from jidm.checkpoint import find_checkpoint
from jidm.errors import InputError
from jidm.files import whole_file

_VERSION = 1
FILE = "reward.json"
"""Name of a calibration that lies beside a checkpoint."""


@dataclass(frozen=True)
class Calibration:
    """Scales of the terms on good videos of one robot, and what measured them.

    Attributes:
        scales: name of a term -> its scale.
        videos: how many they were measured on.
        reading: how motion was read off them: "followed" frame by frame, or "pairs", differentiably.
        made_by: which field, of which checkpoint, for which robot, by which options; plain JSON.
    """

    scales: Mapping[str, Scale]
    videos: int
    reading: str
    made_by: Mapping[str, Any]

    @classmethod
    def of(cls, worst: Mapping[str, Sequence[float]], *, reading: str, made_by: Mapping[str, Any]) -> Calibration:
        """From the terms' `worst` in good videos.

        Raises:
            InputError: there are too few.
        """
        scales = {name: Scale.of(values, TERMS[name].least) for name, values in worst.items()}
        return cls(scales, len(next(iter(worst.values()))), reading, json.loads(json.dumps(made_by)))

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads."""
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def beside(cls, checkpoint: str | Path) -> Calibration:
        """The one that lies in a checkpoint's folder.

        Args:
            checkpoint: a folder, the name of a bundled one, or a hub id.

        Raises:
            CheckpointError: there is no such checkpoint.
            InputError: nothing lies there.
        """
        folder, source = find_checkpoint(checkpoint)
        if not (folder / FILE).exists():
            raise InputError(f"{source} comes without scales for the reward; make them with `jidm calibrate`")
        return cls.load(folder / FILE)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it is something else.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.pop("version") != _VERSION:
                raise ValueError("written by another version of jidm")
            scales = {str(name): Scale(float(s["usual"]), float(s["far"])) for name, s in record["scales"].items()}
            return cls(scales, int(record["videos"]), str(record["reading"]), dict(record["made_by"]))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; make it with `jidm calibrate`") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no calibration of the reward: {error}") from None
