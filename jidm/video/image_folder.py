"""Folders of images as videos: which files, in which order.

Names are ordered by the numbers in them, as a person reads them: `frame_2` before `frame_10`, and times in seconds as times,
`1700000000.025` before `1700000000.05`. A folder whose names have two readings is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise, takewhile
from pathlib import Path

from jidm.errors import VideoError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

_NUMBERS = re.compile(r"(\d+(?:\.\d+)*)")
_SIGNED = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]\d+)?", re.IGNORECASE)  # as Python writes numbers
_RENAME = "name them by one counter of fixed width, like frame_000012.png"

SortKey = tuple[tuple[int, Decimal, str], ...]


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in the order of the numbers in their names.

    Raises:
        VideoError: there are none, or their order is ambiguous.
    """
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
    if not files:
        raise VideoError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    keys = _sort_keys(folder, [file.stem for file in files])
    ordered = sorted(zip(keys, (file.name for file in files), files, strict=True), key=lambda item: item[:2])
    for (key, name, _), (next_key, next_name, _) in pairwise(ordered):
        if key == next_key:
            raise VideoError(f"{folder}: {name} and {next_name} have the same number; {_RENAME}")
    return [file for *_, file in ordered]


def _sort_keys(folder: Path, stems: Sequence[str]) -> list[SortKey]:
    if numbers := _signed_numbers(stems):
        return [((0, number, ""),) for number in numbers]
    names = [_NUMBERS.split(stem) for stem in stems]  # text and numbers in turn
    decimals, counters = ([_key(name, decimals=reading) for name in names] for reading in (True, False))
    agree = len(set(decimals)) == len(set(counters)) and _order(decimals) == _order(counters)
    return decimals if agree or _are_decimals(folder, names) else counters


def _signed_numbers(stems: Sequence[str]) -> list[Decimal]:
    """One number per name, where the names differ only in it and some have a sign or an exponent; else empty."""
    start, end = _common_text(stems), _common_text([stem[::-1] for stem in stems])
    if stems[0][:start] in ("-", "+"):
        start = 0  # the sign of all of them; behind a word it separates
    inner = [stem[start : len(stem) - end] for stem in stems]
    if all(map(_SIGNED.fullmatch, inner)) and any(not text.replace(".", "").isdigit() for text in inner):
        return [Decimal(text) for text in inner]
    return []


def _common_text(stems: Sequence[str]) -> int:
    """Length of the text before the first digit that all begin with."""
    return sum(1 for _ in takewhile(lambda x: len(set(x)) == 1 and not x[0].isdigit(), zip(*stems, strict=False)))


def _order(keys: Sequence[SortKey]) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__)


def _key(name: Sequence[str], *, decimals: bool) -> SortKey:
    """Numbers sort before text, and by their value. "1.25" is one number or two; "1.2.3" is always three."""
    key: list[tuple[int, Decimal, str]] = []
    for k, part in enumerate(name):
        if k % 2 == 0:
            key += [(1, Decimal(0), part)] if part else []
        elif decimals and part.count(".") == 1:
            key.append((0, Decimal(part), ""))
        else:
            key += [(0, Decimal(number), "") for number in part.split(".")]
    return tuple(key)


def _are_decimals(folder: Path, names: Sequence[Sequence[str]]) -> bool:
    """Whether "1.25" is one and a quarter, or number 25 of part 1, where the order depends on it.

    Raises:
        VideoError: the names are written as neither of the two, or as both, usually are.
    """
    pairs = [(name, k) for name in names for k in range(1, len(name), 2) if name[k].count(".") == 1]
    parts = [name[k].split(".")[1] for name, k in pairs]
    if any(part[0] == "0" and len(part) > 1 for part in parts):
        return True  # no counter of varying width has leading zeros
    counts = defaultdict(set)
    for name, k in pairs:
        before, _, part = name[k].partition(".")
        counts[(*name[:k], before)].add(int(part))
    ends_in_zero = any(part[-1] == "0" and len(part) > 1 for part in parts)  # str(time) never does
    are_counters = all(map(_is_counter, counts.values()))
    if are_counters == ends_in_zero:
        return not are_counters
    short, long = ("".join(f(pairs, key=lambda pair: len(pair[0][pair[1]]))[0]) for f in (min, max))
    raise VideoError(
        f"{folder}: names like {short} and {long} may be decimal numbers or pairs of counters, which differ in their order; "
        f"{_RENAME}"
    )


def _is_counter(numbers: set[int]) -> bool:
    """Whether they are, up to a quarter, all the numbers of their range, and not all but the multiples of ten."""
    low, high = min(numbers), max(numbers)
    tens = high // 10 - (low - 1) // 10
    return 4 * (high - low + 1 - len(numbers)) <= len(numbers) and (tens < 2 or any(x % 10 == 0 for x in numbers))
