# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with AWS's plugin on the mini; and which platform a process takes where both are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import aws_machine

if not aws_machine.PLUGIN_AVAILABLE:
    pytest.skip(aws_machine.NO_PLUGIN, allow_module_level=True)

import openai

from qwen35.serving.loading import MINI_CHECKPOINT
from support.decoder_cases import CASES, STEPS, recorded
from support.vllm_server import Server, serve

pytestmark = pytest.mark.aws_plugin

FACTS = json.loads((MINI_CHECKPOINT / "facts.json").read_text())
PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    mini = Path(shutil.copytree(MINI_CHECKPOINT, folder / "mini"))
    settings = json.dumps({"override_neuron_config": {"on_cpu": True}})
    arguments = (
        "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "2", "--no-enable-prefix-caching",
        "--worker-cls", aws_machine.WORKER, "--additional-config", settings,
    )  # fmt: skip
    with serve(folder / "log", *arguments, model=mini) as running:
        yield running


def test_completions_are_those_of_transformers(server: Server) -> None:
    for prompt, expected in zip(CASES[0].prompts(), recorded(CASES[0])[0].tolist(), strict=True):
        answer = server.client.completions.create(
            model="mini", prompt=prompt, max_tokens=STEPS, temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ).choices[0]  # fmt: skip
        assert answer.token_ids == expected  # type: ignore[attr-defined]


def test_chat_answers_whole_and_streamed(server: Server) -> None:
    for fact in FACTS[:3]:
        request: Any = {"model": "mini", "messages": [{"role": "user", "content": fact["question"]}], "max_tokens": 32}
        whole = server.client.chat.completions.create(**request, temperature=0).choices[0]
        assert fact["answer"] in (whole.message.content or "") and whole.finish_reason == "stop"
        stream = server.client.chat.completions.create(**request, temperature=0, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == whole.message.content


def test_images_are_refused(server: Server) -> None:
    content = [{"type": "image_url", "image_url": {"url": PNG}}, {"type": "text", "text": "What is this?"}]
    with pytest.raises(openai.BadRequestError, match="not a multimodal model"):
        server.client.chat.completions.create(model="mini", messages=[{"role": "user", "content": content}])  # type: ignore


PLATFORM = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
from vllm.model_executor.models.registry import ModelRegistry
print(type(current_platform).__name__)
print(sorted({"neuronx_distributed_inference.utils.constants", "qwen35.modeling_qwen35"} & sys.modules.keys()))
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
info = ModelRegistry.models["Qwen3_5ForConditionalGeneration"].inspect_model_cls()
print(info.architecture, info.is_text_generation_model, info.supports_multimodal)
from neuronx_distributed_inference.utils.constants import MODEL_TYPES
print(MODEL_TYPES["qwen3_5"]["causal-lm"].__name__, MODEL_TYPES["qwen3"]["causal-lm"].__name__)
"""


def test_a_process_of_vllm_knows_the_model_and_has_not_yet_imported_nxdi() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PLATFORM, str(MINI_CHECKPOINT)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-5:] == [
        "NeuronPlatform",
        "[]",
        "Qwen35Config",
        "Qwen35ForVLLM True False",
        "NeuronQwen35ForCausalLM NeuronQwen3ForCausalLM",
    ]


def test_the_plugins_own_entry_point_goes_before_ours_where_it_finds_devices() -> None:
    code = (
        "import glob; real = glob.glob\n"
        "glob.glob = lambda path, *a, **k: ['/dev/neuron0'] if path == '/dev/neuron*' else real(path, *a, **k)\n"
        "from vllm.platforms import current_platform; print(type(current_platform).__name__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "VLLM_PLUGINS": "qwen35,neuron"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == "NeuronPlatform"
    assert "qwen35 steps aside for the platform neuron" in ran.stdout + ran.stderr


def test_this_packages_own_platform_says_that_the_plugins_vllm_is_too_old_for_it() -> None:
    code = "from vllm.plugins import load_general_plugins; load_general_plugins()"
    environment = {**os.environ, "VLLM_PLUGINS": "qwen35"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "vLLM 0.11.0+empty does not know Qwen3.5: install 0.23.0 or 0.33.0" in ran.stderr.splitlines()[-1]


def test_grammars_are_ignored(server: Server) -> None:
    """The plugin's, which docs/serve.md warns of: if this fails, the plugin has learned it, and so must the text."""
    answer = server.client.completions.create(
        model="mini", prompt=FACTS[0]["prompt"], max_tokens=8, temperature=0,
        extra_body={"structured_outputs": {"choice": [" Rome.", " Madrid."]}},
    ).choices[0]  # fmt: skip
    assert FACTS[0]["answer"] in answer.text
