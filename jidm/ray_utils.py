"""Sharing work by Ray: joining a cluster or starting one, and leaving it as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jidm.errors import InputError, MissingExtraError


@contextmanager
def ray_cluster(address: str, workers: int, jobs: int) -> Iterator[int]:
    """While it lasts, Ray is there; how many actors shall share the work.

    Args:
        address: of the cluster, "auto" for the one that runs here, "local" for one started and stopped for this.
        workers: actors wanted; 1 means one per CPU of the cluster.
        jobs: no more actors than that.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("sharing work by Ray", "ray", "ray") from None
    started = not ray.is_initialized()
    if started:
        where: dict[str, Any] = {"num_cpus": workers} if address == "local" else {"address": address}
        try:
            ray.init(**where, include_dashboard=None, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"no Ray cluster at '{address}' ({error}); start one, or use --ray local") from None
    try:
        wanted = workers if workers > 1 else int(ray.cluster_resources().get("CPU", 1))
        yield max(min(wanted, jobs), 1)
    finally:
        if started:
            ray.shutdown()
