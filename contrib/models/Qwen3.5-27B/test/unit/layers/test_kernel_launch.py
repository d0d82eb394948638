# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The model computes the same with each kernel, launched in the emulator, as in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from qwen35 import ops
from qwen35.kernel_selection import KERNEL_ENVIRONMENT
from qwen35.layers import gated_deltanet
from qwen35.layers.cache import DeltaNetState
from qwen35.nki_kernels.fused_chunked import deltanet_fused_chunked_layer
from qwen35.phase import Phase
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import encode, load_tokenizer
from support.models import load_neuron, neuron_greedy


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def mini_tokens(kernel: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = encode(load_tokenizer(MINI_CHECKPOINT), ["The capital of France is", "3 + 4 ="])
    prompts = [
        ids[: int(n)].tolist() for ids, n in zip(encoded["input_ids"], encoded["attention_mask"].sum(1), strict=True)
    ]
    model = load_neuron(MINI_CHECKPOINT, batch_size=2, seq_len=16, deltanet_kernel=kernel)
    return neuron_greedy(model, prompts, steps)


@pytest.mark.parametrize("kernel", ["fused", "chunked", "recurrent"])
def test_the_mini_says_the_same_through_the_kernels_in_the_emulator(kernel: str) -> None:
    tokens, logits = mini_tokens(kernel, 3)
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
