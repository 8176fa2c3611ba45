"""Scales of the reward's terms, fitted to good videos."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jidm.atomic_io import atomic_write
from jidm.checkpoint import REWARD_SCALES, find_checkpoint
from jidm.errors import InputError
from jidm.rewards.terms import TermScale

_VERSION = 2


@dataclass(frozen=True)
class TermScales:
    """Scales of the terms on good videos of one robot, and their provenance.

    Attributes:
        terms: term -> its scale.
        num_videos: number of videos they were fitted to.
        mode: how the videos were analyzed: "tracked" from frame to frame, or in "pairs", differentiably.
        provenance: field, checkpoint, robot and options of the decoder; JSON values.
    """

    terms: Mapping[str, TermScale]
    num_videos: int
    mode: str
    provenance: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path) -> TermScales:
        """The scales in a checkpoint's folder.

        Args:
            checkpoint: a folder, the name of a bundled one, or a hub id.

        Raises:
            CheckpointError: there is no such checkpoint.
            InputError: it has no scales.
        """
        folder, source = find_checkpoint(checkpoint)
        if not (folder / REWARD_SCALES).exists():
            raise InputError(f"{source} has no scales for the reward; make them with `jidm fit-scales`")
        return cls.load(folder / REWARD_SCALES)

    @classmethod
    def load(cls, path: str | Path) -> TermScales:
        """Read a file that `save` wrote.

        Raises:
            InputError: there is no such file, or it holds something else.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.pop("version") != _VERSION:
                raise ValueError("written by another version of jidm")
            scales = {
                str(name): TermScale(float(s["median"]), float(s["spread"])) for name, s in record["terms"].items()
            }
            return cls(scales, int(record["num_videos"]), str(record["mode"]), dict(record["provenance"]))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; make it with `jidm fit-scales`") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} holds no scales of the reward: {error}") from None

    def check(self, terms: Iterable[str], *, mode: str, provenance: Mapping[str, Any]) -> None:
        """Check that the scales apply to a reward.

        Args:
            terms: names that the reward uses.
            mode, provenance: of the reward's analyzer.

        Raises:
            InputError: a term is missing, or the scales were fitted in another mode or with another decoder.
        """
        missing = [name for name in terms if name not in self.terms]
        if missing:
            raise InputError(f"the scales lack {', '.join(missing)}; fit them again")
        if self.mode != mode:
            raise InputError(
                f"the scales were fitted to videos analyzed as '{self.mode}', not '{mode}'; fit them again"
            )
        for key, value in provenance.items():
            if self.provenance.get(key) != value:
                raise InputError(
                    f"the scales were fitted with {key} {self.provenance.get(key)}, not {value}; fit them again"
                )
