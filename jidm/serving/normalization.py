"""Quantile normalization to [-1, 1], as openpi and LingBot's models use it.

`x_n = (x - q01) / (q99 - q01 + 1e-6) * 2 - 1` (openpi, LingBot-VA); values outside the quantiles lie outside [-1, 1].
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError, did_you_mean

_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class QuantileNormalizer:
    """Normalizes d numbers by their quantiles.

    Args:
        q01, q99: (d,) 1 % and 99 % quantiles of the data.

    Raises:
        InputError: they are not d finite numbers each, or q01 exceeds q99.
    """

    q01: NDArray[np.float64]
    q99: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in ("q01", "q99"):
            value = np.array(getattr(self, name), dtype=np.float64)
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        if self.q01.ndim != 1 or self.q01.shape != self.q99.shape:
            raise InputError(f"q01 and q99 must be equally many numbers, got {self.q01.shape} and {self.q99.shape}")
        if not (np.isfinite(self.q01).all() and np.isfinite(self.q99).all() and (self.q01 <= self.q99).all()):
            raise InputError("q01 and q99 must be finite, and q01 not above q99")

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], feature: str | None = None) -> QuantileNormalizer:
        """Read quantiles from the files of other projects.

        Args:
            source: openpi's `norm_stats.json`, LeRobot's `stats.json`, a Python file with a dictionary literal of `q01` and
                `q99` such as LingBot's configurations (it is parsed, never run), or any of these as a dictionary.
            feature: which one, if there are several: "actions" or "state" of openpi, "action" or "observation.state" of
                LeRobot.

        Raises:
            InputError: there are none, or several and no feature is given.
        """
        where = source if isinstance(source, (str, Path)) else "the statistics"
        by_feature = dict(_all_quantiles(_load_content(source)))
        if not by_feature:
            raise InputError(
                f"{where}: holds no q01 and q99; means or ranges are no quantiles: compute them from the data"
            )
        if feature is None and len(by_feature) == 1:
            feature = next(iter(by_feature))
        if feature not in by_feature:
            raise InputError(f"{where}: which quantiles? {did_you_mean(feature or '', by_feature)}")
        try:
            low, high = (np.array(x, dtype=np.float64) for x in by_feature[feature])
        except (TypeError, ValueError):
            raise InputError(f"{where}: q01 and q99 must be lists of numbers") from None
        return cls(low, high)

    def normalize(self, x: ArrayLike) -> NDArray[np.float64]:
        """(*batch, d) from units of the data to about [-1, 1]."""
        return (self._checked(x) - self.q01) / (self.q99 - self.q01 + _EPS) * 2 - 1

    def denormalize(self, x: ArrayLike) -> NDArray[np.float64]:
        """(*batch, d) from about [-1, 1] to units of the data."""
        return (self._checked(x) + 1) / 2 * (self.q99 - self.q01 + _EPS) + self.q01

    def _checked(self, x: ArrayLike) -> NDArray[np.float64]:
        values = np.asarray(x, dtype=np.float64)
        if values.shape[-1:] != self.q01.shape:
            raise InputError(f"these quantiles are of {len(self.q01)} numbers, got shape {values.shape}")
        return values


def _load_content(source: str | Path | Mapping[str, Any]) -> Any:
    """The dictionary or dictionaries of a file."""
    if isinstance(source, Mapping):
        return source
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {source}: {error}") from None
    try:
        if Path(source).suffix != ".py":
            return json.loads(text)
        return dict(enumerate(_literals(ast.parse(text))))
    except (ValueError, SyntaxError, RecursionError) as error:
        raise InputError(f"{source}: {error}") from None


def _all_quantiles(content: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Every dictionary with q01 and q99, by its key."""
    if not isinstance(content, Mapping):
        return
    if "q01" in content and "q99" in content:
        yield name, (content["q01"], content["q99"])
        return
    for key, value in content.items():
        yield from _all_quantiles(value, str(key))


def _literals(tree: ast.AST) -> Iterator[dict[str, Any]]:
    """Dictionary literals with q01 and q99, whose lists may be added and repeated: `[0.1] + [0.] * 29`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            if "q01" in keys and "q99" in keys:
                yield {name: _numbers(node.values[keys.index(name)]) for name in ("q01", "q99")}


def _numbers(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_numbers(node.left), *_numbers(node.right)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        times = ast.literal_eval(node.right)
        if isinstance(times, int) and 0 <= times <= 1000:
            return _numbers(node.left) * times
    return list(ast.literal_eval(node))
