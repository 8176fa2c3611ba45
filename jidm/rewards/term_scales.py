"""Scales of the reward's terms, fitted to good videos."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jidm.atomic_io import atomic_write
from jidm.checkpoint import REWARD_SCALES, find_checkpoint
from jidm.errors import InputError
from jidm.rewards.recognition import Recognition
from jidm.rewards.terms import TermScale

_VERSION = 3
_MIN_FRAMES = 6  # of the shortest videos that scales are fitted to
_LENGTH_RATIO = 2  # between the lengths that scales are fitted to


@dataclass(frozen=True)
class TermScales:
    """Scales of the terms on good videos of one robot, and their provenance.

    The worst steps of a short video are less bad than those of a long one, its first steps are decoded better, and its
    background is known less. So a scale holds for one length of video, and scales between lengths are interpolated.

    Attributes:
        frames: lengths of the videos, ascending.
        terms: term -> its scale at each length.
        eva_penalty: median of EVA's penalty at each length: every decoder leaves some jitter.
        recognition: distribution of the keypoints; None if the field is not learned.
        num_videos: number of videos they were fitted to.
        mode: how the videos were analyzed: "tracked" from frame to frame, or in "pairs", differentiably.
        provenance: field, checkpoint, robot and options of the decoder; JSON values.
    """

    frames: tuple[int, ...]
    terms: Mapping[str, tuple[TermScale, ...]]
    eva_penalty: tuple[float, ...]
    recognition: Recognition | None
    num_videos: int
    mode: str
    provenance: Mapping[str, Any]

    def term_scale(self, name: str, frames: int) -> TermScale:
        """Scale of a term for videos of this many frames."""
        scales = self.terms[name]
        return TermScale(
            self._interpolate([x.median for x in scales], frames), self._interpolate([x.spread for x in scales], frames)
        )

    def median_eva_penalty(self, frames: int) -> float:
        """Median of EVA's penalty in good videos of this many frames."""
        return self._interpolate(self.eva_penalty, frames)

    def _interpolate(self, values: Sequence[float], frames: int) -> float:
        """Linear in the logarithm of the length; constant outside the fitted lengths."""
        return float(np.interp(math.log(frames), [math.log(x) for x in self.frames], values))

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"version": _VERSION, **asdict(self)}) + "\n", encoding="utf-8")

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
                raise ValueError("written by another version of jidm; fit them again with `jidm fit-scales`")
            recognition = record["recognition"]
            if recognition is not None:
                recognition = Recognition(
                    tuple(map(float, recognition["mean"])), tuple(map(float, recognition["whitening"])), _scale(recognition["scale"])
                )  # fmt: skip
            terms = {str(name): tuple(_scale(x) for x in scales) for name, scales in record["terms"].items()}
            frames, eva_penalty = tuple(map(int, record["frames"])), tuple(map(float, record["eva_penalty"]))
            if not frames or any(len(x) != len(frames) for x in (*terms.values(), eva_penalty)):
                raise ValueError("every term needs a scale for each length")
            return cls(
                frames, terms, eva_penalty, recognition, int(record["num_videos"]), str(record["mode"]), dict(record["provenance"])
            )  # fmt: skip
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


def fitted_lengths(frames: int) -> tuple[int, ...]:
    """Lengths that scales are fitted to, for good videos of this many frames: ascending by about a factor of two."""
    lengths, length = [], _MIN_FRAMES
    while length * _LENGTH_RATIO**0.5 < frames:
        lengths.append(length)
        length *= _LENGTH_RATIO
    return (*lengths, frames)


def not_tighter_when_shorter(scales: Sequence[TermScale]) -> tuple[TermScale, ...]:
    """Scales of ascending lengths whose spread is at least that of every longer length.

    In short videos most values are 0 and a few are not, as the background is known only where the robot moved away, so their 90th
    percentile says little about the rest.
    """
    widest, spreads = 0.0, []
    for scale in reversed(scales):
        widest = max(widest, scale.spread)
        spreads.append(widest)
    return tuple(TermScale(scale.median, spread) for scale, spread in zip(scales, reversed(spreads), strict=True))


def _scale(record: Mapping[str, Any]) -> TermScale:
    return TermScale(float(record["median"]), float(record["spread"]))
