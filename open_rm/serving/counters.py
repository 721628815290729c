"""What is counted and timed, in Prometheus' text form at /metrics; what was mended in texts is also said once in the log."""

import logging
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from open_rm.errors import quote
from open_rm.serving.texts import MENDED

LOG = logging.getLogger("open_rm.serving")
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 180)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Counters:
    """All of the server's metrics, in a registry of their own.

    Args:
        waiting: how many texts wait or are scored, asked for at each scrape.
    """

    def __init__(self, waiting: Callable[[], int]):
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "open_rm_requests", "Requests by path and HTTP status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "open_rm_request_seconds",
            "From a request's head to its answer.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.gone = Counter("open_rm_clients_gone", "Requests whose client left before the answer.", registry=registry)
        self.texts = Counter("open_rm_texts", "Texts that were scored.", registry=registry)
        self.tokens = Counter("open_rm_tokens", "Tokens of these texts.", registry=registry)
        self.batch_texts = Histogram(
            "open_rm_batch_texts", "Texts that were scored together.", buckets=TEXTS, registry=registry
        )
        self.batch_seconds = Histogram(
            "open_rm_batch_seconds", "How long scoring them took.", buckets=SECONDS, registry=registry
        )
        self.failed = Counter("open_rm_failed_batches", "Batches that the model could not score.", registry=registry)
        self.mended = Counter(
            "open_rm_mended_texts", "Texts that were not as the template writes them.", ["what"], registry=registry
        )
        for what in MENDED:
            self.mended.labels(what)
        Gauge("open_rm_waiting_texts", "Texts that wait or are scored.", registry=registry).set_function(waiting)
        self._said: set[str] = set()

    def count_mended(self, what: str, example: str) -> None:
        """A text that was not as the template writes it; the first of each kind is said, the rest are counted."""
        self.mended.labels(what).inc()
        if what not in self._said:
            self._said.add(what)
            LOG.warning("texts %s: %s (said once; /metrics counts them)", MENDED[what], quote(example))

    def page(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self.registry)
