"""The cache of decoded recordings: folders that are made once, appear whole, and are evicted, least recently used
first.

Every choice of episodes, image size and input scale is a folder of its own, gigabytes for a large recording; without a
limit a month of experiments would fill a disk.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from jidm.atomic_io import remove_stale_temporaries
from jidm.errors import InputError

_LIMIT_GB = 30.0
_CACHE_NAME = re.compile(r".+-[0-9a-f]{16}")
_RECENT_SECONDS = 3600.0
"""[s] A folder used within this time may be read by a training that is running, and is kept."""


def default_cache() -> Path:
    """The cache folder: the environment variable JIDM_CACHE, else `~/.cache/jidm`."""
    return Path(
        os.environ.get("JIDM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jidm"
    ).expanduser()


def cached_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made now if it does not exist.

    After making one, the least recently used folders beside it are removed until all together hold no more than
    JIDM_CACHE_GB (an environment variable; 30 by default). Those used within the last hour stay.

    Args:
        folder: its path; the cache is its parent.
        make: fills the empty folder it is given. If it raises, no folder is left.

    Raises:
        InputError: JIDM_CACHE_GB is not a number.
    """
    if not folder.is_dir():
        limit = _limit_bytes()
        _make(folder, make)
        _evict(folder, limit)
    os.utime(folder)
    return folder


def _limit_bytes() -> float:
    text = os.environ.get("JIDM_CACHE_GB") or str(_LIMIT_GB)
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise InputError(f"JIDM_CACHE_GB is '{text}'; give a number of gigabytes")
    return limit


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill the folder under a temporary name and rename it; if another process was first, its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        make(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _evict(newest: Path, limit: float) -> None:
    """Remove old folders, only ones that a cache made: JIDM_CACHE may name a folder that also holds other things."""
    for leftover in newest.parent.glob(".*.tmp"):
        remove_stale_temporaries(newest.with_name(leftover.name[1:].rsplit(".", 2)[0]))
    others = [x for x in newest.parent.iterdir() if x != newest and x.is_dir() and _CACHE_NAME.fullmatch(x.name)]
    total = _size(newest) + sum(map(_size, others))
    for folder in sorted(others, key=lambda x: x.stat().st_mtime):
        if total <= limit or time.time() - folder.stat().st_mtime < _RECENT_SECONDS:
            return
        total -= _size(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
