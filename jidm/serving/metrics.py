"""What a server counts, in the format Prometheus reads."""

from __future__ import annotations

from jidm.errors import MissingExtraError

_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counters of one server, kept apart from those of other servers in the process."""

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError:
            raise MissingExtraError("serving", "prometheus_client", "serve") from None
        self._registry = CollectorRegistry()
        self.latency = Histogram(
            "jidm_request_seconds", "From a request's arrival to its answer", ("kind",), buckets=_BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        self.queue = Gauge("jidm_queue", "Requests waiting for a worker", registry=self._registry)
        self.clients = Gauge("jidm_clients", "Open connections", registry=self._registry)
        self.rejected = Counter(
            "jidm_rejected", "What was refused", ("why",), registry=self._registry
        )  # messages, connections, tokens

    def text(self) -> bytes:
        """All of them."""
        from prometheus_client import generate_latest

        return bytes(generate_latest(self._registry))
