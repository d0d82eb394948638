# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Whole models with nki-library's MLP kernel, in the emulator, against the same models in plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import encode, load_tokenizer
from support.fp8_cases import MULTIPLES
from support.models import load_neuron, neuron_greedy, random_prompts, save_checkpoint
from support.nki_library import needs_library
from support.own_kernels import recorded_launches

pytestmark = pytest.mark.filterwarnings("ignore::nki_emulator.NkiWarning")
emulated = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

STEPS = 3
BF16 = torch.bfloat16


@needs_library
@emulated
@pytest.mark.usefixtures("nki_as_before")
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_a_model_decodes_by_the_kernel_as_by_torch(tmp_path: Path, weights_dtype: str | None, cores: int) -> None:
    save_checkpoint(tmp_path, **MULTIPLES)
    prompts = random_prompts([60, 17])
    options = dict(batch_size=2, torch_dtype=BF16, weights_dtype=weights_dtype, logical_nc_config=cores)
    exact_tokens, exact = neuron_greedy(load_neuron(tmp_path, batch_size=2, weights_dtype=weights_dtype), prompts, 2)
    _, plain = neuron_greedy(load_neuron(tmp_path, **options), prompts, 2)
    model = load_neuron(tmp_path, **options, mlp_kernel="nki")
    with recorded_launches() as launches:
        tokens, logits = neuron_greedy(model, prompts, 2)
    # A prompt is of two rows of 128 tokens, more than the kernel takes; the step after it is of two tokens.
    assert launches.grids == [(cores,)] * 4
    assert torch.equal(tokens[:, 0], exact_tokens[:, 0])
    errors = [float((y.float() - exact).norm() / exact.norm()) for y in (logits, plain)]
    assert errors[0] < 1.2 * errors[1] < 0.1, "bfloat16 rounds as much with the kernel as without it"


@needs_library
@emulated
@pytest.mark.usefixtures("nki_as_before")
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
@pytest.mark.parametrize("drafted", [0, 2])
def test_the_mini_says_the_same_through_the_kernel(drafted: int, weights_dtype: str | None) -> None:
    encoded = encode(load_tokenizer(MINI_CHECKPOINT), ["The capital of France is", "3 + 4 ="])
    prompts = [
        ids[mask > 0].tolist() for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    options = dict(
        batch_size=2, seq_len=32, torch_dtype=BF16, weights_dtype=weights_dtype, logical_nc_config=1,
        num_speculative_tokens=drafted,
    )  # fmt: skip
    expected, _ = neuron_greedy(load_neuron(MINI_CHECKPOINT, **options), prompts, STEPS)
    with recorded_launches() as launches:
        tokens, _ = neuron_greedy(load_neuron(MINI_CHECKPOINT, **options, mlp_kernel="nki"), prompts, STEPS)
    assert len(launches.grids) >= 2 * 8  # the prompt, of fewer tokens here, and a step over all eight layers
    assert torch.equal(tokens, expected)


@pytest.mark.usefixtures("backend", "library_is_there", "nki_as_before")
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
def test_long_prompts_give_the_same_with_the_weights_of_the_kernel(tmp_path: Path, weights_dtype: str | None) -> None:
    """No kernel runs: on NxDI's classes as on the stand-ins, the transposed weights load and keep their dtypes."""
    save_checkpoint(tmp_path, **MULTIPLES)
    prompts = random_prompts([120, 101])
    options = dict(batch_size=2, torch_dtype=BF16, weights_dtype=weights_dtype, logical_nc_config=1)
    _, exact = neuron_greedy(load_neuron(tmp_path, batch_size=2, weights_dtype=weights_dtype), prompts, 1)
    _, plain = neuron_greedy(load_neuron(tmp_path, **options), prompts, 1)
    model = load_neuron(tmp_path, **options, mlp_kernel="nki")
    dtypes = {name.rsplit(".", 1)[1]: p.dtype for name, p in model.models[0].model.named_parameters() if "mlp" in name}
    fp8 = {"weight": torch.float8_e4m3fn, "scale": torch.float32}
    assert dtypes == (fp8 if weights_dtype else {"weight": BF16})
    _, logits = neuron_greedy(model, prompts, 1)
    errors = [float((y.float() - exact).norm() / exact.norm()) for y in (logits, plain)]
    assert errors[0] < 1.2 * errors[1] < 0.1, "bfloat16 rounds as much with these weights as with the others"
