# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on the mini: what clients get, what happens when one leaves, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import openai
import transformers
import vllm
from openai import AsyncOpenAI
from packaging import version
from PIL import Image

import qwen35
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from qwen35.serving.runner import ModelRunner, Row
from qwen35.vision.media import Video
from support.models import load_neuron
from support.pictures import photograph, picture
from support.vllm_media import conversation, expected_inputs
from support.vllm_server import SECONDS_TO_END, Server, serve

pytestmark = pytest.mark.vllm

FACTS = json.loads((MINI_CHECKPOINT / "facts.json").read_text())
ARGUMENTS = ("--max-model-len", "512", "--max-num-seqs", "4", "--dtype", "float32")
DOCUMENT = Path(qwen35.__file__).parents[2] / "docs" / "serve.md"
LOGPROB_TOLERANCE = 1e-4  # two float32 implementations of 8 layers
LONG = {"max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    options = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    arguments = [*ARGUMENTS, "--structured-outputs-config", options, "--allowed-local-media-path", str(directory)]
    if version.parse(vllm.__version__).release >= (0, 33):  # 0.23 takes them of anybody
        arguments.append("--trust-request-mm-kwargs")
    with serve(directory / "log", *arguments) as running:
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


def as_file(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


TOKENS = {"return_token_ids": True, "ignore_eos": True}


def see(server: Server, addresses: Sequence[str], question: str, kind: str = "image_url", **options: Any) -> Any:
    """The first choice of the answer to a question about what is at some addresses."""
    content: Any = [{"type": kind, kind: {"url": address}} for address in addresses]
    content.append({"type": "text", "text": question})
    given = {"max_tokens": 8, "temperature": 0, "extra_body": TOKENS, **options}
    answer = server.client.chat.completions.create(
        model="mini", messages=[{"role": "user", "content": content}], logprobs=True, top_logprobs=2, **given
    )
    return answer.choices[0]


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers has no Qwen3.5 before 5")
def test_what_is_said_of_pictures_is_what_transformers_says(server: Server, count: int) -> None:
    from support.oracle import transformers_model

    model, worst = transformers_model(MINI_CHECKPOINT), 0.0
    for i in range(count):
        scene = photograph(i)
        choice = see(server, [data_address("image/png", as_file(scene, "PNG"))], "What is this?")
        inputs = expected_inputs(conversation(scene, "What is this?"))
        prompt, tokens = inputs.pop("input_ids"), choice.token_ids
        ids = torch.cat([prompt, torch.tensor([tokens])], dim=1)
        inputs |= {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 1020).int()}
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs).logits[0, prompt.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1)
        assert tokens == expected.argmax(-1).tolist(), i
        chosen = torch.tensor([one.logprob for one in choice.logprobs.content])
        worst = max(worst, float((chosen - expected[range(len(tokens)), tokens]).abs().max()))
    assert worst < LOGPROB_TOLERANCE, worst
    print(f"logprobs of {count} pictures differ from transformers' by at most {worst:.1e}")


@pytest.fixture(scope="module")
def seeing() -> TextGenerator:
    """The same checkpoint with its vision encoder, without vLLM."""
    config = qwen35.Qwen35VLInferenceConfig.from_pretrained(MINI_CHECKPOINT, default_neuron_config(512))
    generator = TextGenerator.load(MINI_CHECKPOINT, config)
    generator.generation_config.eos_token_id = []
    return generator


def test_addresses_of_each_kind_are_seen(server: Server, seeing: TextGenerator) -> None:
    image, path = picture(90, 70), server.log.parent / "picture.png"
    path.write_bytes(as_file(image, "PNG"))
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(path.parent)))
    Thread(target=web.serve_forever, daemon=True).start()
    try:
        expected = seeing.chat([conversation(image, image, "What is this?")], 8).tokens[0]
        http = f"http://127.0.0.1:{web.server_port}/{path.name}"
        for address in (data_address("image/png", path.read_bytes()), path.as_uri(), http):
            assert see(server, [address] * 2, "What is this?").token_ids == expected, address[:20]
    finally:
        web.shutdown()
        web.server_close()


def test_clips_are_seen_as_animations_and_as_frames(server: Server, seeing: TextGenerator, tmp_path: Path) -> None:
    frames = [picture(96, 64, seed=i) for i in range(4)]
    gif = as_file(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=250)
    (tmp_path / "clip.gif").write_bytes(gif)
    ask = [
        {"role": "user", "content": [{"type": "video", "video": tmp_path / "clip.gif"}, {"type": "text", "text": "?"}]}
    ]
    found = see(server, [data_address("video/gif", gif)], "?", "video_url").token_ids
    assert found == seeing.chat([ask], 8).tokens[0]
    ask[0]["content"][0]["fps"] = 1  # type: ignore[index]
    expected = seeing.chat([ask], 8).tokens[0]
    for asked in ({"mm_processor_kwargs": {"fps": 1}}, {"media_io_kwargs": {"video": {"fps": 1}}}):
        choice = see(server, [data_address("video/gif", gif)], "?", "video_url", extra_body={**TOKENS, **asked})
        assert choice.token_ids == expected
    files = [as_file(frame, "JPEG") for frame in frames]
    address = "data:video/jpeg;base64," + ",".join(base64.b64encode(file).decode() for file in files)
    decoded = [Image.open(io.BytesIO(file)) for file in files]
    found = see(server, [address], "?", "video_url").token_ids
    assert found == seeing.chat([conversation(Video(decoded, 1.0), "?")], 8).tokens[0]  # vLLM's rate of such frames


@pytest.mark.parametrize(
    ("kind", "address", "told"),
    [
        ("image_url", "data:image/png;base64,AAAA", "cannot identify image file|Failed to load image"),
        ("image_url", data_address("image/png", as_file(photograph(1), "PNG")[:2000]), "truncated"),
        ("image_url", data_address("image/png", as_file(Image.new("1", (8200, 8200)), "PNG")), "8200.*8200"),
        ("image_url", data_address("image/png", as_file(Image.new("L", (900, 2)), "PNG")), "aspect ratio above 200"),
        ("image_url", "file:///etc/hostname", "must be a subpath of"),
        ("video_url", data_address("video/mp4", b"no video"), "PyAV|cannot be decoded"),
    ],
    ids=["no image", "truncated", "pixels", "ratio", "elsewhere", "no video"],
)
def test_a_bad_picture_is_told_and_the_others_go_on(server: Server, kind: str, address: str, told: str) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as refused:
        see(server, [address], "What is this?", kind)
    message = refused.value.body["message"] if isinstance(refused.value.body, dict) else ""
    assert len(message.splitlines()) == 1, message
    assert "Paris" in complete(server, "The capital of France is")


def test_a_prompt_that_is_too_long_with_its_pictures_is_told(server: Server) -> None:
    address = data_address("image/png", as_file(picture(128, 128), "PNG"))
    with pytest.raises(openai.BadRequestError, match="512"):
        see(server, [address] * 40, "What is this?")  # 40 times 16 tokens


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
        assert 0 < accepted <= drafted
        assert accepted == drafting.metric("spec_decode_num_accepted_tokens_per_pos_total")
        drafting.require_idle()
        ended = drafting.stop_in_the_middle()
        assert [reason for chunks, reason in ended if chunks] == ["length"] * sum(chunks > 0 for chunks, _ in ended)


def test_two_replicas_share_the_requests_and_reuse_the_prefixes_that_each_has(tmp_path: Path) -> None:
    """vLLM gives requests that come one after the other to its replicas in turn."""
    replicas = ("--data-parallel-size", "2", "--api-server-count", "1", "--enable-prompt-tokens-details")
    chunks = ("--additional-config", json.dumps({"qwen35": {"prefill_chunk_size": 32}}))
    with serve(tmp_path / "log", *ARGUMENTS, *replicas, *chunks) as server:
        for fact in FACTS[:6]:
            assert fact["answer"] in complete(server, fact["prompt"])
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        counted = re.findall(r'^vllm:request_success_total{engine="(\d)",finished_reason="stop".*} (\S+)$', text, re.M)
        assert {engine: float(number) for engine, number in counted} == {"0": 3, "1": 3}
        before = server.metrics("external_prefix_cache_queries_total")
        options: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
        answers = [server.client.completions.create(model="mini", prompt=[*range(100)], **options) for _ in range(4)]
        details = [answer.usage.prompt_tokens_details for answer in answers]
        assert [found.cached_tokens if found else 0 for found in details] == [0, 0, 96, 96]
        assert len({answer.choices[0].text for answer in answers}) == 1
        after = server.metrics("external_prefix_cache_queries_total")
        assert {engine: after[engine] - before[engine] for engine in after} == dict.fromkeys(after, 200)
        assert server.metrics("external_prefix_cache_hits_total") == dict.fromkeys(after, 96)
        assert not any(server.metrics("prefix_cache_hits_total").values()), "vLLM's own is off"
        sources = server.metrics("prompt_tokens_by_source_total", "source")
        assert (sources['source="external_kv_transfer"'], sources['source="local_cache_hit"']) == (192, 0)
        assert server.stop() == 0


def _code(language: str) -> list[str]:
    """The blocks of a language in the document."""
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_requests_of_the_document_are_answered(server: Server) -> None:
    requests = [block for block in _code("sh") if block.startswith("curl ")]
    for curl, said in zip(requests, ("Paris.", "red."), strict=True):
        answer = subprocess.run(
            ["bash", "-c", curl.replace("localhost:8000", f"127.0.0.1:{server.port}")], capture_output=True, text=True
        )
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == said, answer
    for script, said in zip(_code("python"), _code("text"), strict=True):
        ran = subprocess.run(
            [sys.executable, "-c", script.replace("localhost:8000", f"127.0.0.1:{server.port}")],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        # vLLM's versions set other spaces between the tokens of JSON.
        assert ran.stdout.replace('": "', '":"') == said
