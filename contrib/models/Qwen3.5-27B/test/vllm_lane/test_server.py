# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on the mini: what clients get, what happens when one leaves, and how it ends."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import openai
import transformers
from openai import AsyncOpenAI

import qwen35
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from qwen35.serving.runner import ModelRunner, Row
from support.models import load_neuron
from support.vllm_server import SECONDS_TO_END, Server, serve

pytestmark = pytest.mark.vllm

FACTS = json.loads((MINI_CHECKPOINT / "facts.json").read_text())
ARGUMENTS = ("--max-model-len", "512", "--max-num-seqs", "4", "--dtype", "float32")
DOCUMENT = Path(qwen35.__file__).parents[2] / "docs" / "serve.md"
LOGPROB_TOLERANCE = 1e-4  # two float32 implementations of 8 layers
LONG = {"max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    with serve(log, *ARGUMENTS, "--structured-outputs-config", options) as running:
        yield running


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    """The same checkpoint without vLLM."""
    config = qwen35.Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, default_neuron_config(512))
    return TextGenerator.load(MINI_CHECKPOINT, config)


def complete(server: Server, prompt: str, **options: Any) -> str:
    given = {"max_tokens": 16, "temperature": 0, **options}
    return server.client.completions.create(model="mini", prompt=prompt, **given).choices[0].text


def test_completions_are_those_without_vllm(server: Server, generator: TextGenerator) -> None:
    for fact in FACTS[:6]:
        expected = generator.generate([fact["prompt"]], 16).texts[0]
        assert complete(server, fact["prompt"]) == expected
        assert fact["answer"] in expected


def test_chat_answers_whole_and_streamed(server: Server) -> None:
    for fact in FACTS[:4]:
        request: Any = {"model": "mini", "messages": [{"role": "user", "content": fact["question"]}], "max_tokens": 32}
        whole = server.client.chat.completions.create(**request, temperature=0).choices[0]
        assert fact["answer"] in (whole.message.content or "") and whole.finish_reason == "stop"
        stream = server.client.chat.completions.create(**request, temperature=0, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == whole.message.content
        assert len([piece for piece in pieces if piece]) > 1


def test_a_schema_is_kept(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
        "additionalProperties": False,
    }
    answer = server.client.chat.completions.create(
        model="mini",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "capital", "schema": schema}},
        max_tokens=64,
        temperature=0,
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert found.keys() == {"city", "sure"} and found["city"] in ("Paris", "Rome") and isinstance(found["sure"], bool)


@pytest.fixture(scope="module")
def logits_after() -> Callable[[list[int]], torch.Tensor]:
    """Logits [V] float32 after a sequence of tokens: of transformers where it has Qwen3.5, which it has from 5 on.

    Else of this package without vLLM, which other tests hold to transformers.
    """
    if hasattr(transformers, "Qwen3_5ForCausalLM"):
        model = transformers.AutoModelForCausalLM.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32)
        return torch.no_grad()(lambda tokens: model(torch.tensor([tokens])).logits[0, -1])
    runner = ModelRunner(load_neuron(MINI_CHECKPOINT))
    return lambda tokens: runner.encode([Row(0, [*tokens])]).all_logits()[0].float()


def test_logprobs_are_those_of_the_model(server: Server, logits_after: Callable[[list[int]], torch.Tensor]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_CHECKPOINT)
    worst = 0.0
    for fact in FACTS[:8]:
        answer = server.client.completions.create(
            model="mini", prompt=fact["prompt"], max_tokens=8, temperature=0, logprobs=5,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        ).choices[0]  # fmt: skip
        prompt, tokens = tokenizer(fact["prompt"])["input_ids"], answer.token_ids  # type: ignore[attr-defined]
        expected = torch.stack([logits_after([*prompt, *tokens[:i]]) for i in range(len(tokens))]).log_softmax(-1)
        assert tokens == expected.argmax(-1).tolist()
        assert answer.logprobs is not None and answer.logprobs.top_logprobs is not None
        chosen = torch.tensor(answer.logprobs.token_logprobs)
        worst = max(worst, float((chosen - expected[range(len(tokens)), tokens]).abs().max()))
        for row, top in zip(expected, answer.logprobs.top_logprobs, strict=True):
            found = torch.tensor(sorted(top.values(), reverse=True))
            worst = max(worst, float((found - row.topk(len(found)).values).abs().max()))
    assert worst < LOGPROB_TOLERANCE, worst


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_tokens": 5000}, "max_tokens"),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs is not served"),
        ({"temperature": -1}, "temperature"),
    ],
    ids=str,
)
def test_a_request_that_is_not_served_is_told_so_and_the_others_go_on(
    server: Server, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=told):
        complete(server, "The capital of France is", **options)
    assert "Paris" in complete(server, "The capital of France is")


def test_images_are_refused(server: Server) -> None:
    content: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    with pytest.raises(openai.BadRequestError, match="not a multimodal model"):
        server.client.chat.completions.create(model="mini", messages=[{"role": "user", "content": content}])


def test_rows_of_clients_that_hang_up_are_free_again(server: Server) -> None:
    for _ in range(8):  # twice as many as there are rows
        stream = server.client.completions.create(model="mini", prompt="Once", stream=True, **LONG)
        next(iter(stream))
        stream.close()
    body = json.dumps({"model": "mini", "prompt": "Once", "max_tokens": 400, "ignore_eos": True}).encode()
    for _ in range(4):  # before the first token, without a word
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
            head.append(f"Content-Length: {len(body)}")
            connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
            time.sleep(0.05)
    server.require_idle()
    assert "Paris" in complete(server, "The capital of France is")


def test_two_hundred_at_once_over_four_rows(server: Server) -> None:
    prompts = [fact["prompt"] for fact in FACTS[:20]]
    alone = {prompt: complete(server, prompt, max_tokens=6) for prompt in prompts}

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:

            async def ask(prompt: str) -> str:
                answer = await client.completions.create(model="mini", prompt=prompt, max_tokens=6, temperature=0)
                return answer.choices[0].text

            return await asyncio.gather(*(ask(prompts[i % len(prompts)]) for i in range(200)))

    answers = asyncio.run(ask_all())
    assert answers == [alone[prompts[i % len(prompts)]] for i in range(200)]
    server.require_idle()


def test_a_server_with_drafts_gives_the_same_answers_and_lets_them_end(server: Server, tmp_path: Path) -> None:
    """At SIGTERM, with --shutdown-timeout, those that have begun; `test_server_failure.py` has what is without it."""
    speculative = json.dumps({"method": "mtp", "num_speculative_tokens": 3})
    more = ("--speculative-config", speculative, "--shutdown-timeout", str(SECONDS_TO_END))
    with serve(tmp_path / "log", *ARGUMENTS, *more) as drafting:
        for options in ({"temperature": 0}, {"temperature": 1, "seed": 5}, {"temperature": 0, "stop": ["."]}):
            for fact in FACTS[:4]:
                asked = {"model": "mini", "prompt": fact["prompt"], "max_tokens": 32, **options}
                plain = server.client.completions.create(**asked).choices[0]
                streamed = [*drafting.client.completions.create(stream=True, **asked)]
                assert "".join(chunk.choices[0].text for chunk in streamed) == plain.text
                assert streamed[-1].choices[0].finish_reason == plain.finish_reason
        drafted = drafting.metric("spec_decode_num_draft_tokens_total")
        accepted = drafting.metric("spec_decode_num_accepted_tokens_total")
        assert 0 < accepted < drafted
        assert accepted == drafting.metric("spec_decode_num_accepted_tokens_per_pos_total")
        drafting.require_idle()
        ended = drafting.stop_in_the_middle()
        assert [reason for chunks, reason in ended if chunks] == ["length"] * sum(chunks > 0 for chunks, _ in ended)


def test_two_replicas_share_the_requests(tmp_path: Path) -> None:
    with serve(tmp_path / "log", *ARGUMENTS, "--data-parallel-size", "2", "--api-server-count", "1") as server:
        for fact in FACTS[:6]:
            assert fact["answer"] in complete(server, fact["prompt"])
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        counted = re.findall(r'^vllm:request_success_total{engine="(\d)",finished_reason="stop".*} (\S+)$', text, re.M)
        assert {engine: float(number) for engine, number in counted} == {"0": 3, "1": 3}
        assert server.stop() == 0


def _code(language: str) -> list[str]:
    """The blocks of a language in the document."""
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_requests_of_the_document_are_answered(server: Server) -> None:
    (curl,) = [block for block in _code("sh") if block.startswith("curl ")]
    answer = subprocess.run(
        ["bash", "-c", curl.replace("localhost:8000", f"127.0.0.1:{server.port}")], capture_output=True, text=True
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Paris.", answer
    (script,) = _code("python")
    ran = subprocess.run(
        [sys.executable, "-c", script.replace("localhost:8000", f"127.0.0.1:{server.port}")],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    (said,) = _code("text")
    # vLLM's versions set other spaces between the tokens of JSON.
    assert ran.stdout.replace('": "', '":"') == said
