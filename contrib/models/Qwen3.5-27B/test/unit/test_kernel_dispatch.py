# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which DeltaNet kernel runs, and that the model says the same with each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen35 import Qwen35ConfigError, Qwen35InferenceConfig, Qwen35NeuronConfig, ops
from qwen35.configuration_qwen35 import QWEN35_PRESETS
from qwen35.kernel_selection import (
    KERNEL_ENVIRONMENT,
    DeltaNetInverse,
    DeltaNetKernel,
    select_deltanet_inverse,
    select_deltanet_kernel,
)
from qwen35.layers import gated_deltanet
from qwen35.layers.cache import DeltaNetState
from qwen35.nki_kernels.fused_chunked import deltanet_fused_chunked_layer
from qwen35.phase import Phase
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import encode, load_tokenizer
from support.models import load_neuron, neuron_greedy
from support.oracle import save_reference


def config(**options: object) -> Qwen35InferenceConfig:
    return Qwen35InferenceConfig(Qwen35NeuronConfig(**options), **QWEN35_PRESETS["27B"])


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_auto_is_fused_on_a_device_and_torch_on_a_cpu() -> None:
    assert select_deltanet_kernel(config()) is DeltaNetKernel.FUSED
    assert select_deltanet_kernel(config(on_cpu=True)) is DeltaNetKernel.TORCH


@pytest.mark.parametrize("kernel", [kernel for kernel in DeltaNetKernel if kernel is not DeltaNetKernel.AUTO])
def test_a_configured_kernel_is_taken_and_survives_saving(kernel: DeltaNetKernel, tmp_path: Path) -> None:
    for given in (kernel, kernel.value):
        config(deltanet_kernel=given).save(tmp_path)
        assert select_deltanet_kernel(Qwen35InferenceConfig.load(tmp_path)) is kernel


@pytest.mark.parametrize("inverse", DeltaNetInverse)
def test_a_configured_inverse_is_taken_and_survives_saving(inverse: DeltaNetInverse, tmp_path: Path) -> None:
    for given in (inverse, inverse.value):
        config(deltanet_inverse=given).save(tmp_path)
        assert select_deltanet_inverse(Qwen35InferenceConfig.load(tmp_path)) is inverse
    assert select_deltanet_inverse(config()) is DeltaNetInverse.TILED


def test_an_unknown_inverse_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(Qwen35ConfigError, match=r"deltanet_inverse='exact' is unknown; set it to tiled, plain"):
        config(deltanet_inverse="exact")


@pytest.mark.parametrize(("name", "kernel"), KERNEL_ENVIRONMENT.items())
def test_the_environment_overrides_the_configuration(
    name: str, kernel: DeltaNetKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    assert select_deltanet_kernel(config(deltanet_kernel="chunked")) is kernel
    monkeypatch.setenv(name, "0")
    assert select_deltanet_kernel(config(deltanet_kernel="chunked")) is DeltaNetKernel.CHUNKED


def test_two_overrides_at_once_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_NKI", "1")
    monkeypatch.setenv("USE_NKI_FUSED", "1")
    with pytest.raises(Qwen35ConfigError, match="USE_NKI_FUSED and USE_NKI are all set"):
        config()


def test_an_unknown_kernel_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(Qwen35ConfigError, match=r"deltanet_kernel='fast' is unknown; set it to auto, fused"):
        config(deltanet_kernel="fast")


def test_a_kernel_for_other_head_sizes_is_an_error(tmp_path: Path) -> None:
    save_reference(tmp_path)
    with pytest.raises(Qwen35ConfigError, match="128 dims, not 16 and 16; use 'torch'"):
        load_neuron(tmp_path, deltanet_kernel="fused")


def mini_tokens(kernel: str, steps: int, inverse: str = "tiled") -> tuple[torch.Tensor, torch.Tensor]:
    encoded = encode(load_tokenizer(MINI_CHECKPOINT), ["The capital of France is", "3 + 4 ="])
    prompts = [
        ids[: int(n)].tolist() for ids, n in zip(encoded["input_ids"], encoded["attention_mask"].sum(1), strict=True)
    ]
    model = load_neuron(MINI_CHECKPOINT, batch_size=2, seq_len=16, deltanet_kernel=kernel, deltanet_inverse=inverse)
    return neuron_greedy(model, prompts, steps)


@pytest.mark.parametrize(
    ("kernel", "inverse"),
    [("fused", "tiled"), ("fused", "plain"), ("chunked", "tiled"), ("chunked", "plain"), ("recurrent", "tiled")],
)
def test_the_mini_says_the_same_through_the_kernels_in_the_emulator(kernel: str, inverse: str) -> None:
    tokens, logits = mini_tokens(kernel, 3, inverse)
    expected_tokens, expected_logits = mini_tokens("torch", 3)
    assert torch.equal(tokens, expected_tokens)
    # float32 kernels: 5e-7 of the largest output of a layer, through six of them.
    torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("phase", "tokens"),
    [(Phase.TOKEN_GENERATION, 1), (Phase.TOKEN_GENERATION, 8), (Phase.CONTINUATION, 8), (Phase.CONTINUATION, 9)],
)
def test_a_layer_continues_from_a_state_by_kernel_as_by_torch(phase: Phase, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = []
    hidden = torch.randn(1, tokens, 128, generator=generator)
    state = DeltaNetState(
        torch.randn(1, 8, 128, 128, generator=generator), torch.randn(1, 2048, 3, generator=generator)
    )
    for kernel in ("fused", "torch"):
        model = load_neuron(MINI_CHECKPOINT, deltanet_kernel=kernel)
        with torch.no_grad():
            output, new_state = model.models[0].model.layers[0].linear_attn(hidden, phase, state)
        outputs.append((output, *new_state))
    for actual, expected in zip(*outputs, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_fused_kernel_is_right_on_what_the_mini_computes(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(tensors)
        return ops.chunk_gated_delta_rule(*tensors)

    monkeypatch.setattr(gated_deltanet, "chunk_gated_delta_rule", record)
    text = " ".join(["The capital of France is Paris. 3 + 4 = 7. The largest planet is Jupiter."] * 6)
    ids = encode(load_tokenizer(MINI_CHECKPOINT), [text])
    model = load_neuron(MINI_CHECKPOINT, seq_len=256)
    model(**ids, position_ids=torch.arange(ids["input_ids"].shape[1]).unsqueeze(0))
    assert len(calls) == 6 and min(float(g.min()) for _, _, _, g, *_ in calls) < -20
    for q, k, v, g, beta, _ in calls:
        # The oracle gets the rounded operands: what is measured is the kernel, not the rounding of its input.
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        expected = ops.recurrent_gated_delta_rule(*(x.double() for x in (q, k, v, g, beta)))
        for actual, reference in zip(deltanet_fused_chunked_layer(q, k, v, g, beta), expected, strict=True):
            assert (actual.double() - reference).abs().max() <= tolerance * reference.abs().max()
