"""Docstrings say `lower, upper: limits [rad]` for two arguments at once; the API pages show one entry for each."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^( +)((?:\w+, )+\w+)(: .*(?:\n\1 +\S.*)*)", flags=re.M)


def split(docstring: str) -> str:
    """The docstring with every shared entry repeated for each of its names."""

    def repeated(match: re.Match[str]) -> str:
        indent, names, text = match.groups()
        return "\n".join(f"{indent}{name}{text}" for name in names.split(", "))

    return _SHARED.sub(repeated, docstring)


class SharedEntries(griffe.Extension):
    """Splits shared entries before they are parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = split(obj.docstring.value)
