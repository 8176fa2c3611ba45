"""Distributing work by Ray: connect to a cluster or start one, and restore the state afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jidm.errors import InputError, MissingExtraError


@contextmanager
def ray_cluster(address: str, workers: int | None, jobs: int) -> Iterator[int]:
    """Context in which Ray is initialized; its value is the number of actors to start.

    Ray is shut down at the end if it was started here.

    Args:
        address: of the cluster; "auto" for the one that runs on this machine, "local" for one that is started here.
        workers: actors wanted; one per CPU of the cluster if not given.
        jobs: upper bound of the number of actors.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("distributing work by Ray", "ray", "ray") from None
    started = not ray.is_initialized()
    if started:
        where: dict[str, Any] = {"num_cpus": workers} if address == "local" else {"address": address}
        try:
            ray.init(**where, include_dashboard=None, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"no Ray cluster at '{address}' ({error}); start one, or use --ray local") from None
    try:
        wanted = workers or int(ray.cluster_resources().get("CPU", 1))
        yield max(min(wanted, jobs), 1)
    finally:
        if started:
            ray.shutdown()
