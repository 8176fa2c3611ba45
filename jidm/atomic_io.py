"""Atomic file writes: a file appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from jidm.errors import InputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` if the block succeeds, removed if it fails.

    A reader sees the old file or the new one, never a part of it, and a killed process leaves no file of that name. The
    suffix is kept, because many writers choose their format by it.

    Raises:
        InputError: the folder does not exist, or the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: cannot be written, it is a folder; give a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written, the folder {path.parent} does not exist; make it first")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_files(folder: str | Path, patterns: Sequence[str]) -> Iterator[Path]:
    """A temporary folder; if the block succeeds, its files take the place of an earlier result in `folder`.

    The files of the earlier result are removed before the first new one appears, so a folder never holds files of two
    results. If the block fails, the earlier result stays. Other files are not touched.

    Args:
        folder: made if it does not exist.
        patterns: names of all files that a result may consist of, as for `Path.glob`.

    Raises:
        InputError: the folder is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder")
    is_new = not folder.exists()
    remove_stale_temporaries(folder / "result")
    temporary = folder / f".result.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        new = sorted(temporary.iterdir())
        for old in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            old.unlink()
        for path in new:
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # only if nothing is in it


_STALE_AGE = 3600.0
"""Age [s] from which a temporary file counts as left over by a process of another machine that shares the disk."""


def remove_stale_temporaries(path: str | Path) -> None:
    """Remove the temporary files and folders `.<name>.<process>.tmp` that killed processes left beside `path`.

    They are kept while their process runs on this machine, and for an hour after their last change, because the process
    may run on another machine that shares the disk.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        process = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if not process.isdigit() or is_running(int(process)):
            continue
        try:
            inside = [leftover, *leftover.iterdir()] if leftover.is_dir() else [leftover]
            if time.time() - max(x.stat().st_mtime for x in inside) > _STALE_AGE:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError:
            continue  # another process removed it, or removal is not permitted


def is_running(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OSError):
        return True
    return True
