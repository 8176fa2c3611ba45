"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jidm.errors import InputError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
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
