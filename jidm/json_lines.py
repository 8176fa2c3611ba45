"""JSON Lines: one JSON value per line.

Lines end with a line feed only. Texts may contain what `str.splitlines` takes for an end of a line (U+2028, U+0085).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


def parse_json_lines(text: str) -> Iterator[Any]:
    """The values of all lines that are not empty, in order.

    Raises:
        ValueError: a line is not JSON; the message has its number.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from None


def format_json_lines(values: Iterable[Any]) -> str:
    """Values as JSON Lines.

    Raises:
        ValueError: a number is not finite, which JSON has no form for.
    """
    return "".join(f"{json.dumps(value, ensure_ascii=False, allow_nan=False)}\n" for value in values)
