"""Plain text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from jidm.errors import InputError, JidmError


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `i/N`.

    Raises:
        InputError: it is not of this form, or i is not below N.
    """
    part, slash, count = text.partition("/")
    if not (slash and part.isdigit() and count.isdigit() and int(part) < int(count)):
        raise InputError(f"--shard must be i/N with i below N, for instance 0/4, got '{text}'")
    return int(part), int(count)


def one_line(error: Exception) -> str:
    """What went wrong, in one line; an error that jidm did not mean to raise is called a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, JidmError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {text or 'no message'} (a bug in jidm; --traceback shows where)"
