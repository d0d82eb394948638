# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints here and on a hub; configurations of compiled models and of this machine; what ends a text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from transformers import GenerationConfig

from qwen35 import Qwen35InferenceConfig, Qwen35VLInferenceConfig
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.serving.loading import (
    MINI_CHECKPOINT,
    checkpoint_of,
    default_neuron_config,
    eos_token_ids,
    load_compiled_config,
    load_generation_config,
    resolve_checkpoint,
)
from qwen35.serving.prompts import load_tokenizer


@pytest.mark.parametrize("config_cls", [Qwen35InferenceConfig, Qwen35VLInferenceConfig])
def test_a_compiled_model_tells_its_class_and_its_checkpoint(
    config_cls: type[Qwen35InferenceConfig], tmp_path: Path
) -> None:
    config_cls.from_pretrained(MINI_CHECKPOINT, neuron_config=default_neuron_config(96, 3)).save(str(tmp_path))
    config = load_compiled_config(tmp_path)
    assert type(config) is config_cls
    assert (config.neuron_config.seq_len, config.neuron_config.batch_size) == (96, 3)
    assert checkpoint_of(tmp_path) == MINI_CHECKPOINT


def test_a_directory_that_was_not_compiled_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no neuron_config.json there; name what 'qwen35 compile' wrote"):
        load_compiled_config(tmp_path)


def test_a_checkpoint_that_is_gone_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    checkpoint, compiled = tmp_path / "checkpoint", tmp_path / "compiled"
    checkpoint.mkdir()
    shutil.copy(MINI_CHECKPOINT / "config.json", checkpoint)
    Qwen35InferenceConfig.from_pretrained(checkpoint, neuron_config=default_neuron_config(96)).save(str(compiled))
    shutil.rmtree(checkpoint)
    with pytest.raises(FileNotFoundError, match=r"compiled was compiled of .*checkpoint, which is gone: pass --model"):
        checkpoint_of(compiled)


def test_the_defaults_are_those_of_this_machine() -> None:
    neuron_config = default_neuron_config(96, batch_size=2, prefill_chunk_size=32)
    assert neuron_config.on_cpu is not NXDI_AVAILABLE
    assert neuron_config.torch_dtype is (torch.bfloat16 if NXDI_AVAILABLE else torch.float32)
    assert (neuron_config.seq_len, neuron_config.batch_size, neuron_config.prefill_chunk_size) == (96, 2, 32)
    assert default_neuron_config(96, torch_dtype=torch.float16).torch_dtype is torch.float16


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MINI_CHECKPOINT)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("generation", "top", "text", "expected"),
    [
        ({"eos_token_id": [5, 6]}, None, 7, [5, 6, 7, 1016]),
        ({"eos_token_id": 5}, [8, 5], [7], [5, 8, 7, 1016]),
        ({"eos_token_id": None}, None, None, [1016]),
        ({"eos_token_id": []}, None, 1014, [1014, 1016]),
        ({"do_sample": True, "temperature": 0.6}, 1014, None, [1014, 1016]),
        (None, None, 1014, [1014, 1016]),
        (None, None, None, [1016]),
    ],
)
def test_what_ends_a_text_is_whatever_the_checkpoint_says(
    generation: dict[str, Any] | None, top: Any, text: Any, expected: list[int], tmp_path: Path, tokenizer: Any
) -> None:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=default_neuron_config(96))
    shutil.copy(MINI_CHECKPOINT / "config.json", tmp_path)
    edit(tmp_path / "config.json", lambda c: (c.update(eos_token_id=top), c["text_config"].update(eos_token_id=text)))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    loaded = load_generation_config(tmp_path, config, tokenizer)
    assert loaded.eos_token_id == expected
    assert loaded.temperature == (generation or {}).get("temperature", GenerationConfig().temperature)


def test_the_end_of_a_turn_is_the_templates_where_the_tokenizer_has_another(tmp_path: Path) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>"))
    (tmp_path / "generation_config.json").unlink()
    assert eos_token_ids(tmp_path, 1024, load_tokenizer(tmp_path)) == [1014, 1016]


def test_what_the_tokenizer_says_beyond_the_vocabulary_ends_nothing(tokenizer: Any) -> None:
    assert eos_token_ids(Path("/nowhere"), 1016, tokenizer) == []


@pytest.mark.parametrize("value", ["<|im_end|>", 1.5, -1, 1024, [5, "6"], [[5]], {"id": 5}, True, [None], "A" * 9999])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "config.json, text_config"])
def test_a_broken_end_of_text_is_named_with_its_place(place: str, value: Any, tmp_path: Path, tokenizer: Any) -> None:
    fields = {"text_config": {"eos_token_id": value}} if place.endswith("text_config") else {"eos_token_id": value}
    (tmp_path / place.partition(",")[0]).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"{place}: eos_token_id=.* must be token ids in 0..1023, one or a") as error:
        eos_token_ids(tmp_path, 1024, tokenizer)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"max_new_tokens": "x", "temperature": [1]', "\udcff"])
def test_a_corrupt_generation_config_is_named(content: str, tmp_path: Path, tokenizer: Any) -> None:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=default_neuron_config(96))
    (tmp_path / "generation_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_generation_config(tmp_path, config, tokenizer)


# Checkpoints on a hub: huggingface_hub reads its settings when it is imported, so each is asked in a process of its own

COMMIT = "c0ffee" * 6 + "c0ff"
FETCHED = ("config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "merges.txt")
NOT_FETCHED = ("model.bin", "model.gguf", "picture.png", "README.md", "onnx/config.json", "original/model.safetensors")


class Hub(BaseHTTPRequestHandler):
    """Of the hub's interface, what `snapshot_download` asks: of `tiny/mini`, and with a token of `tiny/gated`."""

    def log_message(self, *args: Any) -> None:
        """Not on the test's output."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        body, status, headers = b"", 404, {"X-Error-Code": "RepoNotFound"}
        if "/tiny/gated" in path and self.headers.get("authorization") != "Bearer secret":
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif match := re.fullmatch(r"/api/models/tiny/(?:mini|gated)(/revision/[^/]+)?", path):
            status, headers = 200, {}
            if match[1] not in (None, "/revision/main", "/revision/v1", f"/revision/{COMMIT}"):
                status, headers = 404, {"X-Error-Code": "RevisionNotFound"}
            files = [{"rfilename": name} for name in (*FETCHED, *NOT_FETCHED)]
            body = json.dumps({"id": "tiny/mini", "sha": COMMIT, "siblings": files}).encode()
        elif re.fullmatch(rf"/api/models/tiny/(?:mini|gated)/tree/{COMMIT}", path):
            status, headers = 200, {}
            entries = [
                {"type": "file", "path": name, "size": len(name), "oid": f"{number:040x}"}
                for number, name in enumerate((*FETCHED, *NOT_FETCHED))
            ]
            body = json.dumps(entries).encode()
        elif match := re.fullmatch(rf"/tiny/(?:mini|gated)/resolve/{COMMIT}/(.*)", path):
            status, body = 200, match[1].encode()
            headers = {"ETag": f'"{(*FETCHED, *NOT_FETCHED).index(match[1]):040x}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a hub on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


RESOLVE = """
import sys
from qwen35.serving.loading import CHECKPOINT_FILES, CONFIG_FILES, resolve_checkpoint
model, revision, files = sys.argv[1:]
try:
    print(resolve_checkpoint(model, revision or None, {"all": CHECKPOINT_FILES, "config": CONFIG_FILES}[files]))
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""


def resolve(home: Path, model: str, revision: str = "", files: str = "all", **settings: str) -> str:
    """What a process prints that resolves `model` with the cache `home`."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **settings}
    command = [sys.executable, "-c", RESOLVE, model, revision, files]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def names_in(directory: str) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in Path(directory).rglob("*") if path.is_file()}


def test_of_a_hubs_repository_what_is_needed_is_fetched_once(hub: str, tmp_path: Path) -> None:
    config_only = resolve(tmp_path / "a", "tiny/mini", files="config", HF_ENDPOINT=hub)
    assert names_in(config_only) == {"config.json", "tokenizer.json", "chat_template.jinja"}
    fetched = resolve(tmp_path / "b", "tiny/mini", HF_ENDPOINT=hub)
    assert names_in(fetched) == {*FETCHED} and Path(fetched).name == COMMIT
    assert fetched == resolve(tmp_path / "b", "tiny/mini", "v1", HF_ENDPOINT=hub)
    # The cache does without the hub, offline and unreachable.
    assert fetched == resolve(tmp_path / "b", "tiny/mini", HF_HUB_OFFLINE="1")
    assert fetched == resolve(tmp_path / "b", "tiny/mini", HF_ENDPOINT="http://127.0.0.1:9")
    assert fetched == resolve(tmp_path / "b", "tiny/mini", COMMIT, HF_HUB_OFFLINE="1")


def test_a_token_opens_what_is_gated(hub: str, tmp_path: Path) -> None:
    refused = resolve(tmp_path, "tiny/gated", HF_ENDPOINT=hub)
    assert refused.startswith("OSError --model tiny/gated: no such directory here; on the hub one must accept")
    assert names_in(resolve(tmp_path, "tiny/gated", HF_ENDPOINT=hub, HF_TOKEN="secret")) == {*FETCHED}


@pytest.mark.parametrize(
    ("model", "revision", "offline", "words"),
    [
        ("tiny/absent", "", "0", "tiny/absent: no such directory here; the hub has none of this name: check it"),
        ("tiny/mini", "v9", "0", "tiny/mini at revision v9: no such directory here; the hub has no such revision"),
        ("tiny/mini", "", "1", "tiny/mini: no such directory here; not whole in the cache, nor fetched"),
        ("tiny/mini", "v1", "1", "tiny/mini at revision v1: no such directory here; not whole in the cache"),
    ],
)
def test_what_a_hub_does_not_give_is_said_in_one_line(
    model: str, revision: str, offline: str, words: str, hub: str, tmp_path: Path
) -> None:
    printed = resolve(tmp_path, model, revision, HF_ENDPOINT=hub, HF_HUB_OFFLINE=offline)
    assert printed.startswith("OSError ") and words in printed and "\n" not in printed


def test_a_hub_that_does_not_answer_is_said_in_one_line(tmp_path: Path) -> None:
    printed = resolve(tmp_path, "tiny/mini", HF_ENDPOINT="http://127.0.0.1:9")
    assert "not whole in the cache, nor fetched" in printed and "\n" not in printed


def test_a_path_that_exists_wins_and_no_other_path_is_asked_of_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny" / "mini").mkdir(parents=True)
    assert resolve_checkpoint("tiny/mini") == Path("tiny/mini")
    with pytest.raises(ValueError, match="--revision v1: tiny/mini is a directory here; leave it out"):
        resolve_checkpoint("tiny/mini", "v1")
    for path in ("/nowhere", "nowhere", "./tiny/absent", "a/b/c", "~/models/mini"):
        assert resolve_checkpoint(path) == Path(path)
