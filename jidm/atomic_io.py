"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jidm.errors import InputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` if the block succeeds, removed if it fails.

    A reader sees the old file or the new one, never half of one, and a killed process leaves nothing under the name.
    The suffix is kept, because many writers choose their format by it.

    Raises:
        InputError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written, the folder {path.parent} does not exist; make it first")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale_temporaries(path: str | Path, *, older_than: float = 3600.0) -> None:
    """Remove what killed processes left beside `path` under temporary names `.<name>.<process>.tmp`.

    Files and folders stay as long as their process runs on this machine, or they changed within `older_than` seconds, for
    it may run on another one that shares the disk.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        process = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if not process.isdigit() or _is_running(int(process)):
            continue
        try:
            inside = [leftover, *leftover.iterdir()] if leftover.is_dir() else [leftover]
            if time.time() - max(x.stat().st_mtime for x in inside) > older_than:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError:
            continue  # somebody else was faster, or it is not ours to remove


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OSError):
        return True
    return True
