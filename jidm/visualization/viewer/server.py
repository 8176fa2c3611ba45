"""Starting and stopping viser."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

from jidm.errors import InputError, MissingExtraError


def require_viser() -> None:
    """Fail early, before a video is decoded, where viser is missing.

    Raises:
        MissingExtraError: viser is not installed.
    """
    try:
        import viser  # noqa: F401
    except ImportError:
        raise MissingExtraError("the viewer", "viser", "view") from None


def check_port(host: str, port: int) -> None:
    """Fail if nothing can listen there: viser takes the next free port without a word if this one is in use.

    Raises:
        InputError: the port is in use, or the address is not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "the port is in use" if in_use else getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen on {host}:{port}: {reason}; choose another port, or 0 for any free one"
        ) from None


def start_server(host: str, port: int) -> Any:
    """A viser server on exactly this port; 0 lets the system choose.

    Raises:
        InputError: the port is in use, or the address is not this machine's.
        MissingExtraError: viser is not installed.
    """
    require_viser()
    check_port(host, port)
    import viser

    with _without_banner():
        server = viser.ViserServer(host=host, port=port, verbose=False)
    if port not in (0, server.get_port()):  # taken in between
        stop_server(server)
        check_port(host, port)
    return server


def stop_server(server: Any) -> None:
    """Stop a viser server."""
    with _without_banner():
        server.stop()


@contextlib.contextmanager
def _without_banner() -> Iterator[None]:
    """viser prints through rich's console, whatever `verbose` says."""
    import rich

    console = rich.get_console()
    quiet, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = quiet
