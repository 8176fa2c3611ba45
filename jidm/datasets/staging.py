"""Staging of files in a hidden folder of the data set: a partial file is never visible among the others, whenever the
process dies."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jidm.atomic_io import is_running

_STAGING_FOLDER = ".writing"
_STALE_AGE = 24 * 3600.0
"""Age [s] from which a folder of a process on another machine counts as left over."""


class StagingFolder:
    """The hidden folder of one data set, shared by all processes that write there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = root / _STAGING_FOLDER

    @contextmanager
    def temporary_folder(self, purpose: str) -> Iterator[Path]:
        """An empty folder for temporary files, removed afterwards."""
        folder = self._folder / f"{purpose}--{socket.gethostname()}--{os.getpid()}--{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True)
        except FileNotFoundError:  # another process removed the empty hidden folder in between
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def atomic_file(self, target: Path) -> Iterator[Path]:
        """A path to write to, which atomically becomes `target` if the block succeeds."""
        with self.temporary_folder("file") as folder:
            yield folder / target.name
            move(folder / target.name, target)

    def remove_stale(self, done: set[int]) -> None:
        """Remove the folders of dead processes and of the episodes `done`; those of running processes are kept."""
        for folder in self._folder.glob("*--*--*--*"):
            purpose, host, pid, _ = folder.name.split("--")
            finished = purpose.startswith("episode-") and int(purpose.split("-")[1]) in done
            if finished or _is_stale(folder, host, int(pid)):
                shutil.rmtree(folder, ignore_errors=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()


def move(source: Path, target: Path) -> None:
    """Move a file to its place atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _is_stale(folder: Path, host: str, pid: int) -> bool:
    if host == socket.gethostname():
        return not is_running(pid)
    try:
        return time.time() - folder.stat().st_mtime > _STALE_AGE
    except FileNotFoundError:
        return False
