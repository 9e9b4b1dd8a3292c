"""What a server tells Prometheus: the batcher's numbers as they are when asked, and how long answers took."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..batcher import Batcher
from ..gauges import GAUGES
from ..results import GenerationResult

__all__ = ["Metrics"]

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, batcher: Batcher) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_BatcherCollector(batcher))
        self._ttft = Histogram("vflow_time_to_first_token_seconds", "From the request to its first token.", buckets=SECONDS, registry=self._registry)
        self._whole = Histogram("vflow_request_seconds", "From the request to the end of its answer.", buckets=SECONDS, registry=self._registry)
        self._refused = Counter("vflow_http_errors", "Requests that got an error, by status.", ["status"], registry=self._registry)

    def answered(self, result: GenerationResult, seconds: float) -> None:
        """A request has been answered, ``seconds`` after it came."""
        self._ttft.observe(result.ttft_s)
        self._whole.observe(seconds)

    def refused(self, status: int) -> None:
        """A request has got an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _BatcherCollector(Collector):
    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def collect(self) -> Iterator[Metric]:
        stats = self._batcher.stats()
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, getattr(stats, field))
        for name, text, value in (
            ("vflow_prompt_tokens", "Tokens that entered the language model.", stats.prompt_tokens),
            ("vflow_generated_tokens", "Tokens of answers.", stats.new_tokens),
            ("vflow_visual_tokens", "Visual tokens of images before pruning.", stats.visual_tokens),
            ("vflow_visual_tokens_kept", "Visual tokens after the last stage.", stats.visual_tokens_kept),
        ):
            yield CounterMetricFamily(name, text, value)
        ended = CounterMetricFamily("vflow_requests", "Requests that have ended, by how.", labels=["outcome"])
        for outcome, count in stats.requests.items():
            ended.add_metric([outcome], count)
        yield ended
