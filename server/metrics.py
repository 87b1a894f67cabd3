"""Prometheus metrics under vLLM's names, types and buckets, so that dashboards and autoscalers read them unchanged.

The engine's figures are kept as they arrive and turned into samples when somebody scrapes. The exposition is text
format 0.0.4 whatever the scraper asks for: in OpenMetrics, prometheus_client renames `vllm:x` to `vllm_x`.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.config import BLOCK_SIZE
from scheduler.messages import EngineStats
from server.supervisor import Supervisor

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# fmt: off
_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)
# fmt: on
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_COUNTS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
"""1, 2, 5, ... 500,000 tokens."""

_TOTALS = {
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the cache."),
    "num_preemptions": ("vllm:num_preemptions", "Preemptions."),
    "num_drafts": ("vllm:spec_decode_num_drafts", "Times that tokens of a request were guessed."),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Tokens guessed."),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens", "Tokens guessed that were right."),
    "nan_logits": ("latentd_nan_logits", "Requests ended because the model's logits were not finite."),
}
"""Field of `EngineStats` -> its counter's name and meaning."""
_LABELS = ("model_name", "engine")
_ENGINE = "0"


class Metrics:
    """All metrics of one daemon, in a registry of its own."""

    def __init__(self, model_name: str, supervisor: Supervisor) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # `_created` series double the exposition and no dashboard reads them
        self.registry = CollectorRegistry()
        self._labels = (model_name, _ENGINE)
        self._engine = _EngineCollector(self._labels, supervisor)
        self.registry.register(self._engine)

        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that gave a first token.")
        self._prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._time_to_first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self._inter_token_latency = self._histogram("inter_token_latency_seconds", "Time between tokens.", _TOKEN)
        self._time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, by request.", _TOKEN
        )
        self._e2e_latency = self._histogram("e2e_request_latency_seconds", "Arrival to end.", _REQUEST)
        self._queue_time = self._histogram("request_queue_time_seconds", "Arrival to first step.", _REQUEST)
        self._prefill_time = self._histogram("request_prefill_time_seconds", "First step to first token.", _REQUEST)
        self._decode_time = self._histogram("request_decode_time_seconds", "First token to last.", _REQUEST)
        self._inference_time = self._histogram("request_inference_time_seconds", "First step to last token.", _REQUEST)
        self._request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens by request.", _COUNTS)
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens by request.", _COUNTS
        )
        self._request_max_tokens = self._histogram("request_params_max_tokens", "max_tokens by request.", _COUNTS)
        self._iteration_tokens = self._histogram("iteration_tokens_total", "Tokens by engine step.", _STEP_TOKENS)
        self._success = Counter(
            "vllm:request_success",
            "Requests by how they ended.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused at the door, by reason.",
            (*_LABELS, "reason"),
            registry=self.registry,
        )
        self._http = Counter("http_requests", "HTTP answers.", ("handler", "method", "status"), registry=self.registry)
        self.unauthenticated = Gauge(
            "latentd_unauthenticated",
            "1 when the server listens beyond this machine without an API key.",
            registry=self.registry,
        )

    def observe(self, stats: EngineStats) -> None:
        """Take the figures of a step or a heartbeat, or empty ones when the engine has died."""
        if stats.num_steps > self._engine.stats.num_steps:
            self._iteration_tokens.observe(stats.step_tokens)
        self._engine.observe(stats)

    def on_submit(self, prompt_tokens: int, max_tokens: int) -> None:
        self._request_prompt_tokens.observe(prompt_tokens)
        self._request_max_tokens.observe(max_tokens)

    def on_first_tokens(self, seconds: float, num_tokens: int, prompt_tokens: int, cached_tokens: int) -> None:
        """The first output of a request, `seconds` after its arrival."""
        self._time_to_first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._prompt_tokens_cached.inc(cached_tokens)
        self._generation_tokens.inc(num_tokens)

    def on_tokens(self, seconds: float, num_tokens: int) -> None:
        """A later output, `seconds` after the one before."""
        self._inter_token_latency.observe(seconds)
        self._generation_tokens.inc(num_tokens)

    def on_finish(self, reason: str, num_tokens: int, seconds: float, decode_seconds: float) -> None:
        """The end of a request: `seconds` since its arrival, `decode_seconds` from the first to the last token."""
        self._success.labels(*self._labels, reason).inc()
        self._e2e_latency.observe(seconds)
        self._request_generation_tokens.observe(num_tokens)
        if num_tokens > 1:
            self._time_per_output_token.observe(decode_seconds / (num_tokens - 1))

    def on_phases(self, queue_seconds: float, prefill_seconds: float, decode_seconds: float) -> None:
        """Where the time of a request went that got to its first token."""
        self._queue_time.observe(queue_seconds)
        self._prefill_time.observe(prefill_seconds)
        self._decode_time.observe(decode_seconds)
        self._inference_time.observe(prefill_seconds + decode_seconds)

    def on_rejection(self, reason: str) -> None:
        self._rejections.labels(*self._labels, reason).inc()

    def on_http(self, handler: str, method: str, status: int) -> None:
        """`handler` is a route's template or `other`: labels never come from a client."""
        self._http.labels(handler, method, str(status)).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self.registry)
        return histogram.labels(*self._labels)


class _EngineCollector(Collector):
    """The newest figures of the engine, as samples."""

    def __init__(self, labels: tuple[str, ...], supervisor: Supervisor) -> None:
        self.stats = EngineStats()
        self._labels = labels
        self._supervisor = supervisor
        self._before: Counts[str] = Counts()
        """Totals of the engines before this one, each of which has counted from zero."""

    def observe(self, stats: EngineStats) -> None:
        if stats.num_steps < self.stats.num_steps:
            self._before.update({name: getattr(self.stats, name) for name in _TOTALS})
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        stats, supervisor = self.stats, self._supervisor
        usage = 1 - stats.free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests waiting for blocks or a row.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the latent blocks in use, 0 to 1.", usage)
        for field, (name, text) in _TOTALS.items():
            family = CounterMetricFamily(name, text, labels=_LABELS)
            family.add_metric(self._labels, self._before[field] + getattr(stats, field))
            yield family
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Shape of the latent cache.", labels=(*_LABELS, "block_size", "num_gpu_blocks")
        )
        info.add_metric((*self._labels, str(BLOCK_SIZE), str(stats.num_blocks)), 1)
        yield info
        yield GaugeMetricFamily("latentd_ready", "1 while requests are taken.", value=float(supervisor.is_ready))
        yield CounterMetricFamily(
            "latentd_engine_restarts", "Engines started after one that died.", value=supervisor.restarts
        )
        yield GaugeMetricFamily(
            "latentd_engine_step_age_seconds",
            "Time since the engine last ended a step or was idle; one second is idle, more is a long step.",
            value=supervisor.step_age,
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family
