# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""fp8 checkpoints, weights and caches, whole models: against transformers, over ranks, on NxDI's layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig, Qwen35VLInferenceConfig
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from support.compare import assert_close
from support.fp8_cases import MULTIPLES, dequantised, rounded, save_published, save_published_mini, write
from support.models import NO_NXDI, TINY, load_neuron, neuron_greedy, random_prompts, save_checkpoint

STEPS = 4
needs_transformers_5 = pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI wants transformers 4, which has no qwen3_5")


# --- Published checkpoints, against transformers ---------------------------------------------------------------------
def load_and_compare(path: Path, reference: Any, prompts: list[list[int]]) -> None:
    from support.oracle import reference_greedy

    expected_tokens, expected_logits = reference_greedy(reference, prompts, STEPS)
    tokens, logits = neuron_greedy(load_neuron(path, batch_size=len(prompts)), prompts, STEPS)
    assert torch.equal(tokens, expected_tokens)
    # float32 throughout, and the products of fp8 and bfloat16 numbers are exact in it.
    assert_close(logits, expected_logits, atol=1e-4, rtol=0)


@needs_transformers_5
@pytest.mark.parametrize(("shards", "scale_dtype"), [(1, torch.bfloat16), (3, torch.bfloat16), (1, torch.float32)])
def test_a_published_checkpoint_gives_the_logits_of_its_dequantised_weights(
    tmp_path: Path, shards: int, scale_dtype: torch.dtype
) -> None:
    from support.oracle import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    tensors = save_published(tmp_path, shards=shards, scale_dtype=scale_dtype)
    reference = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**TINY, **MULTIPLES})).eval()
    assert reference.load_state_dict(dequantised(tensors)) == ([], [])
    load_and_compare(tmp_path, reference, random_prompts([9, 17]))


@needs_transformers_5
@pytest.mark.parametrize("mini", [False, True], ids=["random", "mini"])
def test_a_published_checkpoint_gives_the_logits_that_transformers_has_by_itself(tmp_path: Path, mini: bool) -> None:
    from support.oracle import transformers_model

    pytest.importorskip("accelerate", reason="transformers loads fp8 with accelerate alone")
    path = tmp_path / "checkpoint"
    save_published_mini(path) if mini else save_published(path)
    reference = transformers_model(path).float()  # it leaves what is not in fp8 in the checkpoint's dtype
    load_and_compare(path, reference, random_prompts([9, 17]))


# --- Weights kept in fp8 ---------------------------------------------------------------------------------------------
def save_rounded(path: Path, source: Path) -> None:
    """Write the checkpoint at `source` with its matrices as fp8 rounds them, in float32, by the tests' own rounding."""
    write(path, rounded(load_file(source / "model.safetensors")), json.loads((source / "config.json").read_text()))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["random", "mini"])
def test_weights_in_fp8_give_the_logits_of_their_rounding(tmp_path: Path, kind: str) -> None:
    """On NxDI's layers as on the stand-ins: converted on a CPU too, which NxDI by itself does not do."""
    source = MINI_CHECKPOINT
    if kind == "random":
        save_checkpoint(source := tmp_path / "source")
    save_rounded(tmp_path / "rounded", source)
    prompts = random_prompts([9, 17])
    expected_tokens, expected = neuron_greedy(load_neuron(tmp_path / "rounded", batch_size=2), prompts, STEPS)
    model = load_neuron(source, batch_size=2, weights_dtype="fp8")
    assert any(p.dtype == torch.float8_e4m3fn for p in model.models[0].model.parameters())
    tokens, logits = neuron_greedy(model, prompts, STEPS)
    assert torch.equal(tokens, expected_tokens)
    # Scaled after the product instead of before it: float32 rounding, no more.
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("backend")
def test_a_published_checkpoint_kept_in_fp8_runs_within_the_error_of_its_second_rounding(tmp_path: Path) -> None:
    save_published(tmp_path)
    prompts = random_prompts([9, 17])
    _, expected = neuron_greedy(load_neuron(tmp_path, batch_size=2), prompts, 1)
    _, logits = neuron_greedy(load_neuron(tmp_path, batch_size=2, weights_dtype="fp8"), prompts, 1)
    relative = (logits - expected).norm() / expected.norm()
    assert 0.001 < relative < 0.15  # 0.027 of each matrix, through four layers of a random model


@pytest.mark.skipif(NXDI_AVAILABLE, reason="the ranks of a CPU are those of the stand-ins")
@pytest.mark.parametrize(
    ("tp_degree", "overrides"),
    [(2, {}), (4, {"num_attention_heads": 6, "num_key_value_heads": 2})],
    ids=["2", "padded heads"],
)
def test_ranks_with_their_shares_of_weights_and_scales_give_the_logits_of_one(
    tmp_path: Path, rank_pool: Any, tp_degree: int, overrides: dict[str, int]
) -> None:
    save_checkpoint(tmp_path, **overrides)
    prompts, options = random_prompts([9, 17]), dict(batch_size=2, weights_dtype="fp8")
    expected_tokens, expected = neuron_greedy(load_neuron(tmp_path, **options), prompts, STEPS)
    outputs = rank_pool(tp_degree).call(greedy_on_rank, tmp_path, options | {"tp_degree": tp_degree}, prompts)
    for tokens, logits in outputs:
        assert torch.equal(tokens, expected_tokens)
        assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def greedy_on_rank(path: Path, options: dict[str, Any], prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return neuron_greedy(load_neuron(path, **options), prompts, STEPS)


@pytest.mark.usefixtures("backend")
def test_bfloat16_activations_take_fp8_weights(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    prompts = random_prompts([9, 17])
    _, expected = neuron_greedy(load_neuron(tmp_path, batch_size=2, weights_dtype="fp8"), prompts, 1)
    model = load_neuron(tmp_path, batch_size=2, weights_dtype="fp8", torch_dtype=torch.bfloat16)
    # NxDI casts whole modules to bfloat16 on a CPU, scales and fp8 weights too.
    dtypes = {name.rsplit(".", 1)[1]: p.dtype for name, p in model.models[0].model.named_parameters() if "mlp" in name}
    assert dtypes == {"weight": torch.float8_e4m3fn, "scale": torch.float32}
    _, logits = neuron_greedy(model, prompts, 1)
    assert (logits.float() - expected).norm() / expected.norm() < 0.05  # bfloat16's own rounding


# --- Keys and values in fp8 ------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_keys_and_values_in_fp8_change_answers_little_and_take_a_quarter_of_float32(
    tmp_path: Path, weights_dtype: str | None
) -> None:
    save_checkpoint(tmp_path)
    prompts, options = random_prompts([30, 17]), dict(batch_size=2, weights_dtype=weights_dtype)
    exact = load_neuron(tmp_path, **options)
    tokens, expected = neuron_greedy(exact, prompts, STEPS)
    exact_entries = exact.cache_entries()[0]
    model = load_neuron(tmp_path, **options, kv_cache_dtype="fp8")
    found_tokens, logits = neuron_greedy(model, prompts, STEPS)
    assert torch.equal(logits[:, 0], expected[:, 0]), "a prompt in one piece reads no cache"
    assert not torch.equal(logits[:, 1], expected[:, 1])
    assert torch.equal(tokens[:, 0], found_tokens[:, 0])
    relative = (logits[:, 1] - expected[:, 1]).norm() / expected[:, 1].norm()
    assert relative < 0.05  # 2^-4 at most of each key and value
    kinds = [(e.dtype, x.nbytes // e.nbytes) for e, x in zip(model.cache_entries()[0], exact_entries, strict=True)]
    assert kinds == [(torch.float32, 1)] * 6 + [(torch.float8_e4m3fn, 4)] * 2


# --- Images ----------------------------------------------------------------------------------------------------------
@needs_transformers_5
@pytest.mark.parametrize("kept_in_fp8", [False, True], ids=["dequantised", "kept in fp8"])
def test_a_published_checkpoint_answers_questions_about_pictures(tmp_path: Path, kept_in_fp8: bool) -> None:
    """Its vision encoder is in bfloat16, and stays as it is."""
    from mini_images import held_out_images

    save_published_mini(tmp_path / "fp8")
    asked = held_out_images(12)
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture.frames[0]}, {"type": "text", "text": question.text}],
            }
        ]
        for picture, question in asked
    ]
    neuron_config = default_neuron_config(256, len(asked), weights_dtype="fp8" if kept_in_fp8 else None)
    config = Qwen35VLInferenceConfig.from_pretrained(tmp_path / "fp8", neuron_config=neuron_config)
    generator = TextGenerator.load(tmp_path / "fp8", config)
    vision = load_file(MINI_CHECKPOINT / "model.safetensors")
    weight = generator.model.vision.state_dict()["blocks.0.attn.proj.weight"]
    assert torch.equal(weight, vision["model.visual.blocks.0.attn.proj.weight"].to(weight.dtype))
    texts = generator.chat(conversations, max_new_tokens=6).texts
    right = sum(text == f"{question.answer}." for text, (_, question) in zip(texts, asked, strict=True))
    assert right >= 11, texts  # 97% in bfloat16


# --- What NxDI does with it ------------------------------------------------------------------------------------------
@pytest.mark.nxdi
@pytest.mark.skipif(not NXDI_AVAILABLE, reason=NO_NXDI)
@pytest.mark.parametrize("options", [{"weights_dtype": "fp8"}, {"kv_cache_dtype": "fp8"}, {}], ids=str)
def test_nxdi_lets_the_compiler_take_torchs_e4m3_for_trainiums_where_something_is_in_fp8(
    tmp_path: Path, options: dict[str, str]
) -> None:
    save_checkpoint(tmp_path)
    config = Qwen35InferenceConfig.from_pretrained(tmp_path, Qwen35NeuronConfig(**options))
    config = Qwen35InferenceConfig.from_json_string(config.to_json_string())  # as a compiled model is read again
    model = NeuronQwen35ForCausalLM(str(tmp_path), config)
    flag = "--experimental-unsafe-fp8e4m3fn-as-fp8e4m3"
    assert {flag in submodel.compiler_args for submodel in model.models} == {bool(options)}
