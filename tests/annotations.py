"""Checks jidm's annotations while tests run: shapes by jaxtyping, types by beartype.

Names that a module imports for type checkers only (`if TYPE_CHECKING:`) do not exist when it runs, so an annotation
that speaks of one cannot be checked; exactly those are left out, all others hold.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from beartype import BeartypeConf, beartype

# Plain O(1) checks, and int accepted for float as PEP 484 says.
_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its annotations hold whenever it is called."""
    annotations = getattr(function, "__annotations__", None)
    if annotations:
        absent = _typing_only_names(getattr(sys.modules.get(function.__module__), "__file__", None))
        for key, annotation in list(annotations.items()):
            if isinstance(annotation, str) and _names(annotation) & absent:
                del annotations[key]
    return _CHECK(function)


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the checks of its annotations, to test its own error messages."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@cache
def _typing_only_names(file: str | None) -> frozenset[str]:
    if file is None or not Path(file).is_file():
        return frozenset()
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for inner in ast.walk(node):
                if isinstance(inner, (ast.Import, ast.ImportFrom)):
                    names |= {(alias.asname or alias.name).split(".")[0] for alias in inner.names}
    return frozenset(names)


@cache
def _names(annotation: str) -> frozenset[str]:
    tree = ast.parse(annotation.strip(), mode="eval")
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
