"""Threads that compute requests, in lanes that do not wait for one another."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from jidm.errors import Cancelled

_NICE_INCREMENT = 10  # niceness of the low-priority threads, relative to the others

_T = TypeVar("_T")


class Lane:
    """Computes in some threads, first come, first served.

    Args:
        name: of the threads.
        workers: number of threads.
        low_priority: whether the system prefers other threads.
        on_queued: called with 1 for each computation that begins to wait for a thread, with -1 when it no longer does.
    """

    def __init__(self, name: str, workers: int, *, low_priority: bool, on_queued: Callable[[int], None]) -> None:
        initializer = _lower_priority if low_priority else None
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=initializer)
        self._on_queued, self._jobs, self._is_closed = on_queued, set[Future[Any]](), False

    async def compute(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """The function's value. If this is cancelled before a thread begins, it is not called; else its value is dropped.

        Raises:
            Cancelled: no thread began before the lane was closed.
        """

        def call() -> _T:
            self._on_queued(-1)
            return function(*arguments)

        if self._is_closed:
            raise Cancelled("closed")
        self._on_queued(1)
        job = self._executor.submit(call)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        try:
            done = asyncio.wrap_future(job)
            await asyncio.wait({done})
        finally:  # also if cancelled
            if job.cancel():
                self._on_queued(-1)
            del job  # tracebacks hold this frame, and the job all that the traceback holds
        if done.cancelled():
            raise Cancelled("closed")
        return done.result()

    def close(self) -> None:
        """Start nothing more."""
        self._is_closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def finish(self, timeout: float) -> int:
        """After `close`: wait for the computations under way; returns how many are still not done after the timeout [s]."""
        jobs = [asyncio.wrap_future(job) for job in list(self._jobs)]
        return len((await asyncio.wait(jobs, timeout=timeout))[1]) if jobs else 0


def _lower_priority() -> None:
    """Lower the priority of this thread; only Linux has priorities per thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE_INCREMENT)
