"""The errors of jidm. Every message names what is wrong, where, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class JidmError(Exception):
    """Root of all errors jidm raises on purpose; the command line prints it as one line."""


class InputError(JidmError, ValueError):
    """A value, shape or file given by the caller cannot be used."""


class UrdfError(InputError):
    """A URDF file is malformed, unsafe or ambiguous; the message names file and element."""


class EmbodimentError(InputError):
    """A robot descriptor is unknown, incomplete or contradicts its URDF."""


class CameraError(InputError):
    """A camera file or matrix is not a pinhole camera in the OpenCV convention."""


class VideoError(InputError):
    """A video cannot be read or written, has an ambiguous layout, or is too short."""


class DatasetError(InputError):
    """A recorded data set is missing files or columns, or contradicts itself or the robot."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, of another kind, or was made for another robot."""


class Cancelled(JidmError):
    """Work was stopped before its end because its result is no longer wanted."""


class MissingExtraError(JidmError, ImportError):
    """An optional dependency is absent; the message says how to install it.

    Args:
        feature: what needs it.
        package: its name.
        extra: the extra of jidm that holds it; None if none does.
    """

    def __init__(self, feature: str, package: str, extra: str | None) -> None:
        command = f"pip install {package}" if extra is None else install_command(extra)
        super().__init__(f"{feature} needs the package '{package}': {command}")


def install_command(extra: str) -> str:
    """The pip command that adds an extra to this installation of jidm: a checkout, or a package from a wheel."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "pyproject.toml").is_file():
        return f"pip install 'jidm[{extra}]'"
    where = "." if checkout == Path.cwd() else checkout
    return f"pip install -e '{where}[{extra}]'"


class JidmWarning(UserWarning):
    """Something is left out or guessed, and work goes on; the command line prints it as one line."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the name of the error's class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown name" message: the closest known name if there is one, and all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}known: {', '.join(known) or 'none'}"
