"""Joint conventions: the joint vectors of external data, as one invertible affine map per joint.

Data sets, robot firmware and other URDFs order joints differently, reverse their direction, shift their zero, use
degrees, or normalize grippers. With `x` the external vector and `q` jidm's (rad or m, in the order of
`embodiment.joint_names`), joint k is read from external column `order[k]`:

    q[k] = sign[k] * scale[k] * factor(unit[k]) * x[order[k]] + offset[k]

`factor` is 1 for rad, m and normalized, pi/180 for deg and 1/1000 for mm; `offset` is in rad or m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from jidm.errors import EmbodimentError, did_you_mean

UNIT_FACTOR: dict[str, float] = {"rad": 1.0, "deg": math.pi / 180.0, "m": 1.0, "mm": 1e-3, "normalized": 1.0}
"""Size of one external unit in rad or m; the size of a normalized joint's unit is its `scale` alone."""

Vector = TypeVar("Vector")
"""A numpy array or torch tensor (*batch, n); the result has its type, dtype and device."""


@dataclass(frozen=True)
class JointConvention:
    """One external convention of a robot's joint vector.

    All tuples have n entries, in the order of `joint_names` (the embodiment's order), except `external_names`, which is
    in the order of the external vector.

    Attributes:
        joint_names: the embodiment's joints, the order of `q`.
        external_names: the embodiment joint that each external column holds (a permutation of `joint_names`).
        sign: +1 or -1.
        scale: factor beside that of the unit, usually 1. For a normalized joint with range [low, high]:
            scale = high - low, offset = low.
        offset: `q` where the external vector is zero [rad or m].
        unit: unit of the external vector, one of the keys of `UNIT_FACTOR`.
    """

    joint_names: tuple[str, ...]
    external_names: tuple[str, ...]
    sign: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    unit: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.joint_names)
        for field in ("external_names", "sign", "scale", "offset", "unit"):
            value = tuple(getattr(self, field))
            object.__setattr__(self, field, value)
            if len(value) != n:
                raise EmbodimentError(f"joint convention: {field} has {len(value)} entries, the robot has {n} joints")
        if sorted(self.external_names) != sorted(self.joint_names) or len(set(self.joint_names)) != n:
            raise EmbodimentError(
                f"joint convention: external_names must hold every joint once; "
                f"got {', '.join(self.external_names)} for {', '.join(self.joint_names)}"
            )
        for name, sign, scale, offset, unit in zip(
            self.joint_names, self.sign, self.scale, self.offset, self.unit, strict=True
        ):
            if sign not in (-1, 1):
                raise EmbodimentError(f"joint convention: sign of '{name}' must be 1 or -1, got {sign}")
            if not (math.isfinite(scale) and scale > 0):
                raise EmbodimentError(
                    f"joint convention: scale of '{name}' must be positive and finite, got {scale}; reverse a joint by its sign"
                )
            if not math.isfinite(offset):
                raise EmbodimentError(f"joint convention: offset of '{name}' must be finite, got {offset}")
            if unit not in UNIT_FACTOR:
                raise EmbodimentError(
                    f"joint convention: unit of '{name}' is '{unit}': {did_you_mean(str(unit), UNIT_FACTOR)}"
                )

    @classmethod
    def make(
        cls,
        joint_names: Sequence[str],
        *,
        joint_types: Sequence[str] | None = None,
        order: Sequence[str] | None = None,
        sign: Mapping[str, int] | None = None,
        scale: Mapping[str, float] | None = None,
        offset: Mapping[str, float] | None = None,
        unit: Mapping[str, str] | None = None,
        normalized: Mapping[str, Sequence[float]] | None = None,
    ) -> JointConvention:
        """Convention from the differences to jidm's; joints that are not named have none (rad or m).

        Args:
            joint_names: the embodiment's joints, the order of `q`.
            joint_types: their types; the unit of prismatic joints is then m where none is given, else rad.
            order: joint held by each external column; the embodiment's order if not given.
            sign, scale, offset, unit: per joint name, see the class.
            normalized: joint name -> (q at external 0, q at external 1) [rad or m]; may be descending.

        Raises:
            EmbodimentError: unknown joint, or a joint given both a range and a sign, scale, offset or unit.
        """
        names = tuple(joint_names)
        arguments: dict[str, Mapping[str, Any] | None] = {
            "sign": sign, "scale": scale, "offset": offset, "unit": unit, "normalized": normalized
        }  # fmt: skip
        values: dict[str, dict[str, Any]] = {field: dict(mapping or {}) for field, mapping in arguments.items()}
        for field, mapping in values.items():
            for name in mapping:
                if name not in names:
                    raise EmbodimentError(f"joint convention: {field} names '{name}': {did_you_mean(name, names)}")
        for name, bounds in values.pop("normalized").items():
            if conflicts := [field for field, mapping in values.items() if name in mapping]:
                raise EmbodimentError(
                    f"joint convention: '{name}' is normalized and has {conflicts[0]} too; give one of them"
                )
            if len(bounds) != 2 or not bounds[0] != bounds[1]:
                raise EmbodimentError(
                    f"joint convention: range of '{name}' must be two different numbers, got {bounds}"
                )
            low, high = float(bounds[0]), float(bounds[1])
            values["offset"][name], values["scale"][name] = low, abs(high - low)
            values["sign"][name], values["unit"][name] = (1 if high > low else -1), "normalized"
        types = tuple(joint_types) if joint_types is not None else ("revolute",) * len(names)
        native = {x: "m" if t == "prismatic" else "rad" for x, t in zip(names, types, strict=True)}
        return cls(
            joint_names=names,
            external_names=names if order is None else tuple(order),
            sign=tuple(values["sign"].get(x, 1) for x in names),
            scale=tuple(float(values["scale"].get(x, 1.0)) for x in names),
            offset=tuple(float(values["offset"].get(x, 0.0)) for x in names),
            unit=tuple(values["unit"].get(x, native[x]) for x in names),
        )

    @classmethod
    def join(cls, parts: Mapping[str, JointConvention]) -> JointConvention:
        """Convention of a composed robot from those of its parts; names become `<part>_<name>`."""

        def joined(field: str, prefix: bool = False) -> tuple[Any, ...]:
            return tuple(
                f"{part}_{x}" if prefix else x for part, convention in parts.items() for x in getattr(convention, field)
            )

        return cls(
            joined("joint_names", True), joined("external_names", True),
            joined("sign"), joined("scale"), joined("offset"), joined("unit"),
        )  # fmt: skip

    @property
    def n(self) -> int:
        """Number of joints."""
        return len(self.joint_names)

    @property
    def order(self) -> tuple[int, ...]:
        """External column that holds joint k."""
        return tuple(self.external_names.index(x) for x in self.joint_names)

    @property
    def gain(self) -> NDArray[np.float64]:
        """(n,) rad or m of `q[k]` per unit of its external column, sign included."""
        return np.array([s * c * UNIT_FACTOR[u] for s, c, u in zip(self.sign, self.scale, self.unit, strict=True)])

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(n, n) linear part: `q = matrix @ x + offset`; a covariance maps as `matrix @ S @ matrix.T`."""
        matrix = np.zeros((self.n, self.n))
        matrix[np.arange(self.n), list(self.order)] = self.gain
        return matrix

    def to_embodiment(self, x: Vector) -> Vector:
        """External joint positions (*batch, n) to `q` (*batch, n) [rad or m]."""
        return self._apply(x, offset=True)

    def from_embodiment(self, q: Vector) -> Vector:
        """`q` (*batch, n) [rad or m] to external joint positions (*batch, n); inverse of `to_embodiment`."""
        return self._invert(q, offset=True)

    def delta_to_embodiment(self, x: Vector) -> Vector:
        """External steps or velocities (*batch, n) to jidm's; as `to_embodiment` but without the offset."""
        return self._apply(x, offset=False)

    def delta_from_embodiment(self, delta_q: Vector) -> Vector:
        """jidm's steps or velocities (*batch, n) [rad or m, per frame or second] to external ones; no offset."""
        return self._invert(delta_q, offset=False)

    def _apply(self, x: Any, *, offset: bool) -> Any:
        x = _as_floating(x, self.n)
        q = x[..., list(self.order)] * _as_like(self.gain, x)
        return q + _as_like(np.array(self.offset), x) if offset else q

    def _invert(self, q: Any, *, offset: bool) -> Any:
        q = _as_floating(q, self.n)
        x = (q - _as_like(np.array(self.offset), q) if offset else q) / _as_like(self.gain, q)
        return x[..., [self.joint_names.index(name) for name in self.external_names]]


def _as_floating(x: Any, n: int) -> Any:
    """x as a floating array or tensor of shape (*batch, n); integers would round the result."""
    if not hasattr(x, "new_tensor"):
        x = np.asarray(x)
        if not np.issubdtype(x.dtype, np.floating):
            x = x.astype(np.float64)
    elif not x.is_floating_point():
        x = x.double()
    if x.shape[-1:] != (n,):
        raise EmbodimentError(f"joint convention: vectors must end in {n} joints, got shape {tuple(x.shape)}")
    return x


def _as_like(values: NDArray[np.float64], x: Any) -> Any:
    """Constants in the dtype (and on the device) of x, without importing torch."""
    return x.new_tensor(values.tolist()) if hasattr(x, "new_tensor") else values.astype(x.dtype)
