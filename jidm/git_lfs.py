"""Pointers of Git LFS: the short texts that stand in the place of large files in a clone without `git lfs`."""

from __future__ import annotations

from pathlib import Path

from jidm.errors import JidmError

_POINTER_START = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024  # of Git LFS's specification


def is_lfs_pointer(source: Path | bytes) -> bool:
    """Whether a file, or the content of one, is a pointer; False if it cannot be read."""
    if isinstance(source, bytes):
        return len(source) < _MAX_POINTER_BYTES and source.startswith(_POINTER_START)
    try:
        if not source.is_file() or source.stat().st_size >= _MAX_POINTER_BYTES:
            return False
        return is_lfs_pointer(source.read_bytes())
    except OSError:
        return False


def refuse_lfs_pointer(path: str | Path, error: type[JidmError], *, content: bytes | None = None) -> None:
    """Raise an error of the given class, with the remedy, if a file is a pointer.

    Args:
        path: the file, or what a message calls it.
        error: class of the error.
        content: what the file holds, if it is no file of its own.
    """
    if is_lfs_pointer(Path(path) if content is None else content):
        raise error(
            f"{path}: a git-LFS pointer, not the file itself; run `git lfs pull` in the folder it was cloned to"
        )
