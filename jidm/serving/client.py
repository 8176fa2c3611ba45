"""Talking to a server from Python."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from numpy.typing import ArrayLike

from jidm.errors import InputError, JidmError, MissingExtraError
from jidm.serving.codec import MessageLimits, pack, unpack


class ServerError(JidmError):
    """The server refused a request or cannot be reached; the message is its own."""


class Client:
    """A connection to `jidm serve`, or to another server that speaks openpi's protocol.

    Args:
        host, port: where it listens. token: what it asks for.
        timeout: how long an answer may take [s].

    Attributes:
        metadata: what the server says its numbers mean.

    Raises:
        ServerError: nobody answers there.
        MissingExtraError: websockets is not installed.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 8765, *, token: str | None = None, timeout: float = 30.0
    ) -> None:
        try:
            from websockets.sync.client import connect
        except ImportError:
            raise MissingExtraError("the client", "websockets", "serve") from None
        self._timeout, self._address = timeout, f"{host}:{port}"
        headers = None if token is None else {"Authorization": f"Api-Key {token}"}
        try:
            self._socket = connect(
                f"ws://{host}:{port}", compression=None, max_size=MessageLimits().size, additional_headers=headers,
                open_timeout=timeout,
            )  # fmt: skip
        except Exception as error:
            raise ServerError(f"no server answers at {self._address}: {error}") from None
        self.metadata: dict[str, Any] = self._receive()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to an observation: a map of names to numbers and arrays.

        Raises:
            ServerError: it refuses the observation, or the connection is lost.
            InputError: the observation holds what cannot be sent.
        """
        message = pack(dict(observation))
        try:
            self._socket.send(message)
        except Exception as error:
            raise ServerError(f"{self._address}: {error}") from None
        return self._receive()

    def reset(self, q: ArrayLike | None = None) -> None:
        """Begin anew, with the robot at joint positions q (n,) [rad or m]."""
        self.infer({"endpoint": "reset"} if q is None else {"endpoint": "reset", "q": q})

    def close(self) -> None:
        """Say goodbye."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._socket.recv(timeout=self._timeout)
        except TimeoutError:
            raise ServerError(f"{self._address}: no answer within {self._timeout} s") from None
        except Exception as error:
            raise ServerError(f"{self._address}: {error}") from None
        if isinstance(message, str):
            raise ServerError(message)
        try:
            answer = unpack(message)
        except InputError as error:
            raise ServerError(f"{self._address}: {error}") from None
        if not isinstance(answer, dict):
            raise ServerError(f"{self._address}: answers are maps, this is a {type(answer).__name__}")
        return answer
