"""Checks of command line values that need no heavy package, so that a wrong one is refused at once."""

from __future__ import annotations

import math
import re
from pathlib import Path

from jidm.errors import CheckpointError, InputError, did_you_mean


def check_positive(**values: float | None) -> None:
    """Refuse flags whose value is given, but not a positive number; names are those of the flags.

    Raises:
        InputError: a value is 0, negative or not finite.
    """
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{_flag(name)} {value:g} must be a positive number")


def check_at_least(least: int, **values: int | None) -> None:
    """Refuse flags whose value is given, but below `least`.

    Raises:
        InputError: a value is too small.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise InputError(f"{_flag(name)} {value} must be at least {least}")


def check_out_file(out: Path) -> None:
    """Refuse an output file that cannot be written, before the computation.

    Raises:
        InputError: it is a folder, or its folder does not exist.
    """
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give a file")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first")


def check_out_folder(out: Path) -> None:
    """Refuse an output folder that is a file or lies below one.

    Raises:
        InputError: it is.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--out {out}: {there} is a file; give a folder")


def check_exists(path: Path, *, file: bool = False) -> None:
    """Refuse an input that is not there.

    Args:
        path: file or folder.
        file: whether a folder is wrong, too.

    Raises:
        InputError: it does not exist, or is a folder where a file is meant.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if file and path.is_dir():
        raise InputError(f"{path} is a folder; give a file")


def check_device(device: str) -> None:
    """Refuse a name of a device that no machine has; whether this one has it, torch knows.

    Raises:
        InputError: it is neither cpu, cuda, cuda:N nor mps.
    """
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise InputError(f"--device '{device}' is unknown; choose cpu, cuda, cuda:1, ... or mps")


def check_checkpoint(checkpoint: str) -> None:
    """Refuse a checkpoint that is neither a path, nor bundled, nor of the form of a hub id.

    Raises:
        CheckpointError: it is none of these.
    """
    from jidm.bundled import bundled_folder

    bundled = [path.name for path in bundled_folder("checkpoints").iterdir() if path.is_dir()]
    if (
        "/" in checkpoint
        or checkpoint in bundled
        or Path(checkpoint).exists()
        or Path(f".{checkpoint}.previous").exists()
    ):
        return
    raise CheckpointError(
        f"no checkpoint '{checkpoint}': not a folder, and not a bundled one; {did_you_mean(checkpoint, bundled)}"
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
