"""Jobs shared among processes or the actors of a Ray cluster, each with a worker of its own that is created once."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from jidm.errors import JidmError
from jidm.ray_utils import ray_cluster

_WORKER_DIED = "a worker process died, perhaps out of memory; run the same again, with fewer workers, to do the rest"


class Worker(Protocol):
    """Does jobs by number. Doing a job that is already done must be harmless."""

    def run(self, job: int) -> None: ...


MakeWorker = Callable[..., Worker]


def run_in_processes(make_worker: MakeWorker, args: tuple[Any, ...], jobs: Sequence[int], count: int) -> Iterator[int]:
    """The jobs as they are done, in order, by `count` processes, each with a worker `make_worker(*args)`.

    Raises:
        JidmError: a process died.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A fork would share the simulator's and torch's threads; a fresh process does not.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            count, mp_context=context, initializer=_start_process, initargs=(make_worker, args)
        ) as pool:
            yield from pool.map(_run_in_process, jobs)
    except BrokenProcessPool:
        raise JidmError(_WORKER_DIED) from None


class _Actor:
    """The one worker of a process."""

    def __init__(self, make_worker: MakeWorker, args: tuple[Any, ...]) -> None:
        torch.set_num_threads(1)
        self._worker = make_worker(*args)

    def run(self, job: int) -> int:
        self._worker.run(job)
        return job


_actors: list[_Actor] = []  # in a worker process: its one actor


def _start_process(make_worker: MakeWorker, args: tuple[Any, ...]) -> None:
    _exit_with_parent()
    _actors.append(_Actor(make_worker, args))


def _run_in_process(job: int) -> int:
    return _actors[0].run(job)


def _exit_with_parent() -> None:
    """End this process when its parent was killed; otherwise it would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)  # the current job is left half done

    threading.Thread(target=wait, daemon=True).start()


def run_on_ray(
    make_worker: MakeWorker, args: tuple[Any, ...], jobs: Sequence[int], count: int | None, address: str
) -> Iterator[int]:
    """The jobs as they are done, in any order, by Ray actors, each with a worker `make_worker(*args)`.

    Args:
        count: actors; one per CPU of the cluster if not given.
        address: of the cluster, see `ray_cluster`.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: there is no such cluster.
        JidmError: an actor died and could not be restarted.
    """
    if not jobs:
        return
    with ray_cluster(address, count, len(jobs)) as actors:
        import ray
        from ray.util import ActorPool

        # A job may be done twice, so lost actors may be restarted and jobs tried again.
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Actor)
        pool: Any = ActorPool([actor.remote(make_worker, args) for _ in range(actors)])
        try:
            yield from pool.map_unordered(lambda worker, job: worker.run.remote(job), jobs)
        except ray.exceptions.RayActorError:
            raise JidmError(_WORKER_DIED) from None
