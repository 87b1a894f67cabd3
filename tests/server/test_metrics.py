from __future__ import annotations

import asyncio
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.config import EngineConfig
from scheduler.messages import EngineStats
from server.engine_client import EngineState
from server.metrics import Metrics
from server.supervisor import Supervisor
from tests.server.harness import Answer, answers, call, make_app, post

EXPECTED = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:spec_decode_num_drafts": "counter",
    "vllm:spec_decode_num_draft_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:prompt_tokens_cached": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:admission_rejections": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "http_requests": "counter",
    "latentd_unauthenticated": "gauge",
    "latentd_ready": "gauge",
    "latentd_nan_logits": "counter",
    "latentd_engine_restarts": "counter",
    "latentd_engine_step_age_seconds": "gauge",
}


def values(text: str) -> dict[str, float]:
    """`name{labels but engine and model}` -> value, buckets left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
            if "le" not in labels:
                found[sample.name + "".join(f"|{v}" for _, v in sorted(labels.items()))] = sample.value
    return found


@pytest.mark.parametrize(
    "accept",
    [
        b"",
        b"*/*",
        b"text/plain",
        b"application/openmetrics-text; version=1.0.0",
        b"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.4",
    ],
)
def test_names_types_and_format_survive_every_scraper(accept: bytes) -> None:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"))
        return await call(app, "GET", "/metrics", headers=[(b"accept", accept)])

    answer = asyncio.run(run())
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = answer.body.decode()
    assert "_created" not in text
    assert {family.name: family.type for family in text_string_to_metric_families(text)} == EXPECTED


def test_figures_of_requests() -> None:
    async def run() -> str:
        app, _ = make_app(answers("one two three"))
        for data in ({"prompt": "Hello"}, {"prompt": "Hello", "stop": "two"}):
            assert (await post(app, "/v1/completions", data)).status == 200
        assert (await post(app, "/v1/completions", {"prompt": 1})).status == 400
        return (await call(app, "GET", "/metrics")).body.decode()

    found = values(asyncio.run(run()))
    tokens = found["vllm:generation_tokens_total"]
    assert tokens > 2
    assert found["vllm:request_success_total|length"] == 1
    assert found["vllm:request_success_total|stop"] == 1
    assert found["vllm:time_to_first_token_seconds_count"] == 2
    assert found["vllm:inter_token_latency_seconds_count"] == tokens - 2
    for phase in ("queue", "prefill", "decode", "inference"):
        assert found[f"vllm:request_{phase}_time_seconds_count"] == 2
    assert found["vllm:request_generation_tokens_sum"] == tokens
    assert found["vllm:request_prompt_tokens_sum"] == found["vllm:prompt_tokens_total"] > 0
    assert found["vllm:request_params_max_tokens_sum"] == 32
    assert found["http_requests_total|/v1/completions|POST|200"] == 2
    assert found["http_requests_total|/v1/completions|POST|400"] == 1


def test_figures_of_the_engine() -> None:
    metrics = Metrics("m", Supervisor(EngineConfig(model_dir="/none")))
    stats = EngineStats(num_running=3, num_waiting=2, num_blocks=8, free_blocks=2, num_steps=1, step_tokens=40)
    metrics.observe(stats)
    metrics.observe(stats)  # a heartbeat repeats the last step
    text = metrics.render().decode()
    found = values(text)
    assert found["vllm:num_requests_running"] == 3
    assert found["vllm:num_requests_waiting"] == 2
    assert found["vllm:kv_cache_usage_perc"] == 0.75
    assert found["vllm:iteration_tokens_total_count"] == 1
    assert re.search(r'vllm:cache_config_info\{block_size="64",.*num_gpu_blocks="8"\} 1.0', text)


def test_totals_go_on_where_a_dead_engine_left_them() -> None:
    metrics = Metrics("m", Supervisor(EngineConfig(model_dir="/none")))
    totals = {"num_preemptions": 2, "prefix_queries": 10, "prefix_hits": 5, "nan_logits": 1}
    metrics.observe(EngineStats(num_running=3, num_waiting=1, num_blocks=8, num_steps=7, **totals))
    metrics.observe(EngineStats())  # it has died
    found = values(metrics.render().decode())
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["vllm:kv_cache_usage_perc"] == 0
    metrics.observe(EngineStats(num_blocks=8, num_steps=9, **totals))
    metrics.observe(EngineStats())
    metrics.observe(EngineStats(num_blocks=8, num_steps=1, num_preemptions=1))
    found = values(metrics.render().decode())
    assert found["vllm:num_preemptions_total"] == 5
    assert found["vllm:prefix_cache_queries_total"] == 20
    assert found["vllm:prefix_cache_hits_total"] == 10
    assert found["latentd_nan_logits_total"] == 2


def test_whether_it_is_ready_shows() -> None:
    async def run(state: EngineState) -> dict[str, float]:
        app, engine = make_app(answers("ok"), state)
        engine.step_age = 7.0
        return values((await call(app, "GET", "/metrics")).body.decode())

    for state in EngineState:
        found = asyncio.run(run(state))
        is_ready = state is EngineState.READY
        assert (found["latentd_ready"], found["latentd_engine_step_age_seconds"]) == (is_ready, 7.0 * is_ready)
        assert found["latentd_engine_restarts_total"] == 0


def test_a_thousand_paths_add_one_series() -> None:
    async def run() -> tuple[int, int]:
        app, _ = make_app(answers("ok"))
        await call(app, "GET", "/scan")
        before = len(values((await call(app, "GET", "/metrics")).body.decode()))
        for index in range(1000):
            await call(app, "GET", f"/scan/{index}")
            await call(app, "GET", f"/v1/models/{index}")
        return before, len(values((await call(app, "GET", "/metrics")).body.decode()))

    before, after = asyncio.run(run())
    assert after - before <= 2  # /metrics itself, and the route of the models


def test_listening_to_the_world_without_a_key_shows() -> None:
    async def run(**options: object) -> float:
        app, _ = make_app(answers("ok"), **options)
        return values((await call(app, "GET", "/metrics")).body.decode())["latentd_unauthenticated"]

    assert asyncio.run(run()) == 0
    assert asyncio.run(run(host="0.0.0.0")) == 1
    assert asyncio.run(run(host="0.0.0.0", api_key=("k",))) == 0
