"""Configurations of models that read images of a robot: everything needed to rebuild one from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from jidm.errors import CheckpointError, InputError, did_you_mean

FIELD_STRIDE = 2
"""Pixels of the image per cell of the field's grid."""

FLOW_STRIDE = 4
"""Pixels per cell of the grid of flow, matched by the network or measured elsewhere."""

COARSE_STRIDE = 8
"""Pixels per cell of the grid on which the correlation volume is computed."""

ENCODER_STRIDE = 16
"""Pixels per cell of the encoders' coarsest level; both sides of an image are multiples of it."""

FLOW_SCALE = 2.0
"""[px] Image motion of a typical joint step: the unit of flow inside networks, so that weights start near 1."""

ConfigT = TypeVar("ConfigT", bound="ModelConfig")


@dataclass(frozen=True)
class NetworkSize:
    """Channels of the network.

    Attributes:
        levels: of the encoder, at 1/2, 1/4, 1/8 and 1/16 of the image.
        decoder: of the field's decoder, and of its last level, which is on the field's own grid.
        match: of the matching features and of the correlation head.
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
class ModelConfig:
    """What every trainable model is made for: joints, image size and the scales of the training data.

    Attributes:
        joint_names, joint_types: of the n joints, the order of every joint axis.
        height, width: of the images [px], multiples of 16.
        q_mean, q_std: mean and standard deviation of the training poses, per joint [rad or m].
        delta_std: standard deviation of the training steps, per joint [rad or m].
        q_lower, q_upper: range of the training poses, per joint [rad or m].
        size: of the network, one of `size_names`.
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

    size_names: ClassVar[tuple[str, ...]] = tuple(SIZES)

    def __post_init__(self) -> None:
        n = len(self.joint_names)
        scales = ("q_mean", "q_std", "delta_std", "q_lower", "q_upper")
        for name in ("joint_types", *scales):
            if len(getattr(self, name)) != n:
                raise InputError(f"{name} has {len(getattr(self, name))} entries for {n} joints; give one per joint")
        if bad := [name for name in scales if not all(math.isfinite(x) for x in getattr(self, name))]:
            raise InputError(f"{', '.join(bad)} must be finite; check the recorded joint positions")
        if n == 0 or min(*self.q_std, *self.delta_std) <= 0:
            raise InputError("a model needs joints, each with a positive q_std and delta_std")
        sides = self.height, self.width
        if any(side % ENCODER_STRIDE for side in sides) or min(sides) < 2 * ENCODER_STRIDE:
            raise InputError(
                f"height and width must be multiples of {ENCODER_STRIDE} and at least {2 * ENCODER_STRIDE}, "
                f"got {self.height} x {self.width}; resize the images"
            )
        check_choice("size", self.size, self.size_names)

    @property
    def n(self) -> int:
        """Number of joints."""
        return len(self.joint_names)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the images that the model reads [px]."""
        return self.height, self.width

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """The inverse of `dataclasses.asdict`, from JSON.

        Raises:
            CheckpointError: an entry is unknown or missing.
        """
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise CheckpointError(
                f"{cls.__name__} has unknown entries: {', '.join(unknown)}; another version wrote them"
            )
        entries: dict[str, Any] = {k: _tuples(v) for k, v in values.items()}
        try:
            return cls(**entries)
        except TypeError as error:
            raise CheckpointError(f"{cls.__name__} is incomplete: {error}; train the model again") from None


@dataclass(frozen=True)
class LearnedFieldConfig(ModelConfig):
    """What a `LearnedField` is made for; as `ModelConfig`, and

    Attributes:
        search_radius: largest motion between two frames inside the correlation window [cells of 8 px].
        backbone: "own", or the name of another image encoder, see `make_encoder`.
        input_scale: the images it reads are so many times as high and as wide as height x width. Encoder and field see
            them reduced to height x width, which costs little; photometric refinement compares every pixel, which
            measures small motions.
        delta_correlation: n rows of n: correlation of the training steps of any two joints; empty = independent.
        step_regression: whether it also has a head that regresses joint steps.

    `height` and `width` are those of the image in whose pixels the field is given; `delta_std` scales each joint's
    column of the field, so that the network's own numbers are pixels.
    """

    search_radius: int = 2
    backbone: str = "own"
    input_scale: int = 1
    delta_correlation: tuple[tuple[float, ...], ...] = ()
    step_regression: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.n
        if self.delta_correlation and {n} != {len(self.delta_correlation), *map(len, self.delta_correlation)}:
            raise InputError(f"delta_correlation must be {n} rows of {n} numbers")
        if self.search_radius < 1:
            raise InputError(f"search_radius must be at least 1 cell, got {self.search_radius}")
        if self.input_scale < 1:
            raise InputError(f"input_scale must be a whole number from 1, got {self.input_scale}")

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the images that the field reads [px]."""
        return self.height * self.input_scale, self.width * self.input_scale

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the field."""
        return self.height // FIELD_STRIDE, self.width // FIELD_STRIDE


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        InputError: naming the alternatives.
    """
    if value not in known:
        raise InputError(f"unknown {option} '{value}'; {did_you_mean(value, known)}")


def _tuples(value: Any) -> Any:
    """Lists of lists, as JSON gives them back, as tuples."""
    return tuple(_tuples(x) for x in value) if isinstance(value, (list, tuple)) else value
