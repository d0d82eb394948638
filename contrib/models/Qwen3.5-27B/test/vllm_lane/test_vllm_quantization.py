# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""fp8 behind vLLM: checkpoints in both forms are served, and options make of bf16 what they say.

The oracle is the engine of this package over the same checkpoint with the same settings: one prompt at a time, so that
buckets and batches are the same, and greedy tokens equal in bfloat16 too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig
from qwen35.cli import main
from qwen35.serving.engine import Qwen35Engine
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.request import Request
from qwen35_vllm.options import neuron_config, serve_options
from support.fp8_cases import save_published_mini
from support.models import random_prompts
from support.vllm_engines import answers, engine_of, worker_of

pytestmark = pytest.mark.vllm

PROMPTS = random_prompts([5, 40], vocab_size=1000)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini as a publisher quantises it: a scale a block."""
    path = tmp_path_factory.mktemp("fp8") / "published"
    save_published_mini(path)
    return path


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini as `qwen35 quantize` quantises it: a scale a row."""
    path = tmp_path_factory.mktemp("fp8") / "quantised"
    assert main(["quantize", str(path), "--model", str(MINI_CHECKPOINT)]) == 0
    assert json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8_per_channel"
    return path


def found_and_expected(path: Path, qwen35: Mapping[str, Any] | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """Tokens by vLLM and by the package's engine, and the settings that the served model has."""
    with engine_of(path, qwen35, **{"dtype": "bfloat16", "max_num_seqs": 2, **options}) as engine:
        found = [answers(engine, [prompt])[0] for prompt in PROMPTS]
        served = worker_of(engine)._runner._runner.model.neuron_config
        settings = neuron_config(engine.vllm_config, serve_options(engine.vllm_config))
    model = NeuronQwen35ForCausalLM(str(path), Qwen35InferenceConfig.from_pretrained(path, neuron_config=settings))
    model.to_cpu()
    own, expected = Qwen35Engine(model), []
    for prompt in PROMPTS:
        request = own.add(Request(prompt, max_new_tokens=8))
        expected.append([output.token for output in own.stream(request)])
    return found, expected, served


@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
@pytest.mark.parametrize("form", ["published", "quantised"])
def test_an_fp8_checkpoint_is_served(form: str, weights_dtype: str | None, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(form)
    found, expected, served = found_and_expected(path, {"weights_dtype": weights_dtype})
    assert found == expected
    assert (served.weights_dtype, served.torch_dtype) == (weights_dtype, torch.bfloat16)


def test_a_checkpoint_that_qwen35_quantised_is_served_in_float32(quantised: Path) -> None:
    found, expected, served = found_and_expected(quantised, dtype="float32")
    assert found == expected and served.torch_dtype == torch.float32


def test_an_fp8_checkpoint_is_served_with_drafts(published: Path) -> None:
    speculative = {"method": "mtp", "num_speculative_tokens": 2}
    found, expected, served = found_and_expected(published, {"weights_dtype": "fp8"}, speculative_config=speculative)
    assert found == expected and served.num_speculative_tokens == 2


@pytest.mark.parametrize(
    ("qwen35", "options", "weights", "cache"),
    [
        ({}, {"quantization": "fp8"}, "fp8", None),
        ({"weights_dtype": "fp8"}, {}, "fp8", None),
        ({}, {"kv_cache_dtype": "fp8"}, None, "fp8"),
        ({"kv_cache_dtype": "fp8"}, {}, None, "fp8"),
    ],
    ids=str,
)
def test_a_bf16_checkpoint_is_kept_in_fp8_when_asked(
    qwen35: dict[str, Any], options: dict[str, Any], weights: str | None, cache: str | None
) -> None:
    found, expected, served = found_and_expected(MINI_CHECKPOINT, qwen35, **options)
    assert found == expected
    assert (served.weights_dtype, served.kv_cache_dtype) == (weights, cache)
