# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The metrics that docs/serve.md names are there, on either version of vLLM, and count what it says."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import openai
import yaml

import qwen35
from support.vllm_server import Server, serve, spoil_mini

pytestmark = pytest.mark.vllm

DOCUMENT = Path(qwen35.__file__).parents[2] / "docs" / "serve.md"
SECTION = DOCUMENT.read_text(encoding="utf-8").partition("\n## Metrics\n")[2].partition("\n## ")[0]
ROWS, DRAFTS = 3, 3
PROMPT = [5, 6, 7, 8, 9]
BLOCK, BLOCKS = 16, 40
"""Two rows of 300 tokens, not three: the third is preempted."""


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    """A server that drafts and may preempt, and a token with which a prompt fails."""
    directory = tmp_path_factory.mktemp("metrics")
    token = spoil_mini(directory / "model")
    arguments = [
        "--max-model-len", "512", "--max-num-seqs", str(ROWS), "--dtype", "float32",
        "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS),
        "--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": DRAFTS}),
    ]  # fmt: skip
    with serve(directory / "log", *arguments, model=directory / "model") as server:
        complete(server, max_tokens=4)
        yield server, token


@pytest.fixture
def server(spoiled: tuple[Server, int]) -> Iterator[Server]:
    spoiled[0].require_idle()
    yield spoiled[0]
    spoiled[0].require_idle()


def exposition(server: Server) -> list[tuple[str, dict[str, str], float]]:
    """Each series that the server shows: name, labels, value."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    return [
        (name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
        for name, labels, value in re.findall(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE)
    ]


def value(server: Server, name: str, **labels: str) -> float:
    """The sum of the series of a name with these labels; 0 where there is none."""
    return sum(number for found, own, number in exposition(server) if found == name and labels.items() <= own.items())


def complete(server: Server, prompt: list[int] = PROMPT, **options: Any) -> Any:
    given = {"temperature": 0, "extra_body": {"ignore_eos": True}, **options}
    return server.client.completions.create(model="mini", prompt=prompt, **given)


def soon(holds: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it holds before the time is out: the server counts after it has answered."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


def documented() -> dict[str, list[dict[str, str]]]:
    """The names that the section has in code, and the labels that its queries match with them."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels in re.findall(r"((?:vllm:|http_)\w+)(?:\{([^}]*)\})?", SECTION):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    return found


def test_tokens_and_times_are_counted(server: Server) -> None:
    histograms = [
        f"vllm:{name}_seconds_count"
        for name in (
            "time_to_first_token",
            "request_time_per_output_token",
            "e2e_request_latency",
            "request_queue_time",
        )
    ]
    names = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", *histograms]
    before = [value(server, name) for name in names]
    for length in (7, 12):
        complete(server, max_tokens=length)
    assert soon(lambda: value(server, histograms[2]) == before[4] + 2)
    moved = [value(server, name) - old for name, old in zip(names, before, strict=True)]
    assert moved == [2 * len(PROMPT), 7 + 12, 2, 2, 2, 2]


def test_drafts_are_counted_up_to_the_end_of_an_answer(server: Server) -> None:
    names = [f"vllm:spec_decode_num_{name}_total" for name in ("drafts", "draft_tokens", "accepted_tokens")]
    by_place = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    before = [value(server, name) for name in (*names, by_place)]
    complete(server, max_tokens=50)
    steps, drafted, accepted, accepted_by_place = (
        value(server, name) - old for name, old in zip((*names, by_place), before, strict=True)
    )
    assert steps <= drafted <= DRAFTS * steps and 0 < accepted <= drafted
    assert accepted == accepted_by_place
    # The first token comes with the prompt; each step gives the accepted drafts and one more, perhaps past the end.
    assert 1 + accepted + steps in (50, 51)


def test_rows_running_and_waiting_requests_are_shown_while_they_are(server: Server) -> None:
    asked = {"stream": True, "max_tokens": 250}
    streams = [complete(server, **asked) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    assert value(server, "vllm:qwen35_rows") == ROWS
    assert soon(lambda: value(server, "vllm:qwen35_rows_in_use") == 2 == value(server, "vllm:num_requests_running"))
    assert 0 < value(server, "vllm:kv_cache_usage_perc") < 1
    more = [complete(server, **asked) for _ in range(4)]
    assert soon(lambda: value(server, "vllm:num_requests_waiting") > 0)
    ended = value(server, "vllm:request_success_total")
    for stream in (*streams, *more):
        stream.close()
    assert soon(lambda: value(server, "vllm:qwen35_rows_in_use") == 0)
    server.require_idle()
    assert value(server, "vllm:request_success_total") == ended, "vLLM counts no request whose client left"


def test_errors_are_counted(server: Server, spoiled: tuple[Server, int]) -> None:
    failed = value(server, "vllm:request_success_total", finished_reason="error")
    responses = [value(server, "http_requests_total", status=status) for status in ("4xx", "5xx")]
    with pytest.raises(openai.InternalServerError):
        complete(server, [5, spoiled[1], 6], max_tokens=4)
    with pytest.raises(openai.BadRequestError):
        complete(server, max_tokens=5000)
    assert soon(lambda: value(server, "vllm:request_success_total", finished_reason="error") == failed + 1)
    found = [value(server, "http_requests_total", status=status) for status in ("4xx", "5xx")]
    assert found == [count + 1 for count in responses]


def test_preemptions_are_counted(server: Server) -> None:
    before = value(server, "vllm:num_preemptions_total")
    streams = [complete(server, stream=True, max_tokens=300) for _ in range(ROWS)]
    lengths = [sum(1 for _ in stream) for stream in streams]
    assert all(lengths) and value(server, "vllm:num_preemptions_total") > before


def test_prompts_are_asked_of_the_prefix_cache(server: Server) -> None:
    hits, queries = (f"vllm:external_prefix_cache_{name}_total" for name in ("hits", "queries"))
    before = value(server, queries)
    complete(server, [9, 8, 7, 6, 5, 4], max_tokens=2)
    assert soon(lambda: value(server, queries) == before + 6)
    assert 0 <= value(server, hits) < value(server, queries)


def test_every_documented_metric_is_there_with_the_labels_of_its_queries(server: Server) -> None:
    """Last: a response of a status has a series once there was one."""
    series = exposition(server)
    names = documented()
    assert len(names) > 15
    for name, matched in names.items():
        # A histogram is named without the ends of its series in the text, with them in queries.
        own = [labels for found, labels, _ in series if found in (name, f"{name}_bucket")]
        assert own, f"{name} is in the document, and not in /metrics"
        for labels in matched:
            assert any(labels.items() <= each.items() for each in own), f"{name} has no series with {labels}"


def test_the_scrape_configuration_asks_where_the_metrics_are(server: Server) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]
    path = job.get("metrics_path", "/metrics")
    with urllib.request.urlopen(f"{server.url}{path}", timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
