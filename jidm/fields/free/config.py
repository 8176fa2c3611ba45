"""What a learned field is made for and how large it is: everything needed to rebuild it from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jidm.errors import CheckpointError, InputError

STRIDE = 2
"""Pixels of the picture per cell of the field's grid."""

FLOW_STRIDE = 4
"""Pixels per cell of the grid on which motion is told, matched or measured elsewhere."""

COARSE_STRIDE = 8
"""Pixels per cell of the grid on which pictures are first matched."""

_ENCODER_STRIDE = 16  # pixels per cell of the encoder's coarsest level


@dataclass(frozen=True)
class NetworkSize:
    """Channels of the network.

    Attributes:
        levels: at 1/2, 1/4, 1/8 and 1/16 of the picture.
        decoder: of the field's decoder, and of its last level, on the field's own grid.
        match: of the matching features and of the pair head.
    """

    levels: tuple[int, int, int, int]
    decoder: tuple[int, int]
    match: int


SIZES: Mapping[str, NetworkSize] = {
    "tiny": NetworkSize((16, 32, 48, 64), (32, 16), 32),
    "small": NetworkSize((24, 48, 72, 96), (48, 24), 32),
    "base": NetworkSize((32, 64, 96, 160), (64, 32), 48),
}


@dataclass(frozen=True)
class LearnedFieldConfig:
    """What a `LearnedField` is made for.

    Attributes:
        joint_names, joint_types: of the n joints, the order of every Jacobian's columns.
        height, width: of the pictures in which the field is told [px], multiples of 16.
        q_mean, q_std: mean and standard deviation of the training poses, per joint [rad or m].
        delta_std: standard deviation of the training steps, per joint [rad or m]; the scale of its column of the
            field, so that the network's own numbers are pixels.
        q_lower, q_upper: range of the training poses, per joint [rad or m].
        size: "tiny", "small" or "base".
        search_radius: largest motion between two frames that the matching sees at once [cells of 8 px].
        backbone: "own", or what else encodes the picture, see `make_encoder`.
        delta_correlation: n rows of n: how the training steps of any two joints go together; empty = not at all.
        input_scale: the pictures it reads are this many times as high and as wide. Encoder and field see them reduced to
            height x width, which costs little; closer looks compare every pixel, which measures small motions.
        step_regression: whether it also has a head that guesses steps by regression.
    """

    joint_names: tuple[str, ...]
    joint_types: tuple[str, ...]
    height: int
    width: int
    q_mean: tuple[float, ...]
    q_std: tuple[float, ...]
    delta_std: tuple[float, ...]
    q_lower: tuple[float, ...]
    q_upper: tuple[float, ...]
    size: str = "tiny"
    search_radius: int = 2
    backbone: str = "own"
    input_scale: int = 1
    delta_correlation: tuple[tuple[float, ...], ...] = ()
    step_regression: bool = True

    def __post_init__(self) -> None:
        n = len(self.joint_names)
        for name in ("joint_types", "q_mean", "q_std", "delta_std", "q_lower", "q_upper"):
            if len(getattr(self, name)) != n:
                raise InputError(f"{name} has {len(getattr(self, name))} entries for {n} joints")
        for name in ("q_mean", "q_std", "delta_std", "q_lower", "q_upper"):
            if not all(math.isfinite(x) for x in getattr(self, name)):
                raise InputError(f"{name} must be finite, got {getattr(self, name)}")
        if n == 0 or min(*self.q_std, *self.delta_std) <= 0:
            raise InputError("a learned field needs joints, each with a positive q_std and delta_std")
        if self.delta_correlation and {n} != {len(self.delta_correlation), *map(len, self.delta_correlation)}:
            raise InputError(f"delta_correlation must be {n} rows of {n} numbers")
        if (
            self.height % _ENCODER_STRIDE
            or self.width % _ENCODER_STRIDE
            or min(self.height, self.width) < 2 * _ENCODER_STRIDE
        ):
            raise InputError(
                f"height and width must be multiples of {_ENCODER_STRIDE} and at least {2 * _ENCODER_STRIDE}, "
                f"got {self.height} x {self.width}; resize the pictures"
            )
        if self.size not in SIZES:
            raise InputError(f"unknown size '{self.size}'; known: {', '.join(SIZES)}")
        if self.search_radius < 1:
            raise InputError(f"reach must be at least 1 cell, got {self.search_radius}")
        if self.input_scale < 1:
            raise InputError(f"detail must be a whole number from 1, got {self.input_scale}")

    @property
    def n(self) -> int:
        """Number of joints."""
        return len(self.joint_names)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the pictures it reads [px]."""
        return self.height * self.input_scale, self.width * self.input_scale

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the field."""
        return self.height // STRIDE, self.width // STRIDE

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LearnedFieldConfig:
        """The inverse of `dataclasses.asdict`, from JSON.

        Raises:
            CheckpointError: an entry is unknown or missing.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CheckpointError(f"the field's configuration has unknown entries: {', '.join(unknown)}")
        entries: dict[str, Any] = {k: _tuples(v) for k, v in values.items()}
        try:
            return cls(**entries)
        except TypeError as error:
            raise CheckpointError(f"the field's configuration is incomplete: {error}") from None


def _tuples(value: Any) -> Any:
    """Lists of lists as JSON gives them back, as tuples."""
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value
