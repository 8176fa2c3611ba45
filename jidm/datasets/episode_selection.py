"""Selection of episodes by a short expression of lists, ranges and rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from jidm.errors import InputError

FORMS = "'all', 'none', numbers and ranges like '0-79,90', 'last-digit:1,6', 'every:10' or 'every:10+3', 'not ...'"
"""The forms of an expression. Ranges include both ends; `every:10+3` is 3, 13, 23, ..."""


def select_episodes(expression: str, available: Iterable[int]) -> tuple[int, ...]:
    """The available episode indices that the expression selects, in ascending order.

    Numbers in a list must exist; ranges may contain gaps, because recordings do.

    Args:
        expression: one of `FORMS`; several, joined by ';', select their union.
        available: the data set's episode indices.

    Raises:
        InputError: the expression has another form, or names an episode that does not exist.
    """
    known = sorted(set(available))
    selected: set[int] = set()
    for part in expression.split(";"):
        selected |= _parse_part(part.strip(), known)
    return tuple(sorted(selected))


def _parse_part(part: str, known: Sequence[int]) -> set[int]:
    if part.startswith("not "):
        return set(known) - _parse_part(part[4:].strip(), known)
    if part in ("all", "none"):
        return set(known) if part == "all" else set()
    if match := re.fullmatch(r"last-digit:\s*(\d(?:\s*,\s*\d)*)", part):
        digits = {int(x) for x in match[1].split(",")}
        return {x for x in known if x % 10 in digits}
    if match := re.fullmatch(r"every:(\d+)(?:\+(\d+))?", part):
        period, first = int(match[1]), int(match[2] or 0)
        if period:
            return {x for x in known if x % period == first % period}
    if re.fullmatch(r"\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*", part):
        return _parse_list(part, known)
    raise InputError(f"episodes '{part}' are not understood; use {FORMS}")


def _parse_list(part: str, known: Sequence[int]) -> set[int]:
    selected: set[int] = set()
    for item in part.split(","):
        first, _, last = (x.strip() for x in item.partition("-"))
        if last:
            selected |= {x for x in known if int(first) <= x <= int(last)}
        elif int(first) in known:
            selected.add(int(first))
        else:
            raise InputError(f"there is no episode {first}; the data set has {describe_episodes(known)}")
    return selected


def describe_episodes(episodes: Sequence[int]) -> str:
    """A short description of indices: '3 episodes (0, 1, 7)', '72 episodes (1 to 99)'."""
    if not episodes:
        return "no episodes"
    shown = ", ".join(map(str, episodes)) if len(episodes) <= 6 else f"{min(episodes)} to {max(episodes)}"
    return f"{len(episodes)} episode{'s' * (len(episodes) > 1)} ({shown})"
