# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Beginnings of prompts that are restored: bit for bit what a cold run gives, never those of another prompt.

On a CPU, and on a simulated device of two ranks, where the caches are behind the loaded model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwen35 import (
    NeuronQwen35ForCausalLM,
    OnDeviceSamplingConfig,
    Qwen35InferenceConfig,
    Qwen35NeuronConfig,
)
from qwen35.serving import prefix_cache
from qwen35.serving.prefix_cache import Medium, PrefixCache, digest_of
from support.models import load_neuron, random_prompts, save_checkpoint
from support.simulated_device import kept, put_on_simulated_device

pytestmark = pytest.mark.usefixtures("backend")

BLOCK, SLOTS, SEQ_LEN = 8, 2, 96
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)


OPTIONS: dict[str, Any] = dict(
    batch_size=SLOTS, ctx_batch_size=1, seq_len=SEQ_LEN, prefill_chunk_size=BLOCK, is_continuous_batching=True
)


@pytest.fixture(scope="module", params=["CPU", "CPU, keys and values in fp8", "simulated device"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    paths = [tmp_path_factory.mktemp(f"checkpoint{seed}") for seed in (1, 2)]
    for seed, path in enumerate(paths, start=1):
        save_checkpoint(path, seed=seed)
    if request.param == "CPU":
        return load_neuron(paths[0], **OPTIONS)
    if request.param.endswith("fp8"):
        return load_neuron(paths[0], **OPTIONS, kv_cache_dtype="fp8")
    return put_on_simulated_device(*(load_neuron(path, **OPTIONS) for path in paths))


def encode(model: Any, slot: int, prompt: list[int], cache: PrefixCache | None, media: Any = ()) -> tuple[int, Any]:
    """(tokens restored, logits of the last token and what the slot then holds)."""
    chain = None if cache is None else cache.chain(prompt, media)
    restored = 0 if cache is None or chain is None else cache.restore(slot, chain)
    for start in range(restored, len(prompt), BLOCK):
        piece = torch.tensor([prompt[start : start + BLOCK]])
        positions = start + torch.arange(piece.shape[1]).unsqueeze(0)
        mask = torch.ones(1, start or piece.shape[1], dtype=torch.long)
        logits = model(piece, torch.tensor([slot]), mask, positions).logits[0, -1]
        if cache is not None and chain is not None and (start + piece.shape[1]) % cache.block == 0:
            cache.store(slot, chain, start + BLOCK)
    linear = {2 * i + pair for i in model.config.linear_attention_layers for pair in (0, 1)}
    held = [
        (entry[slot] if i in linear else entry[slot, :, : len(prompt)]).clone()
        for rank in kept(model)
        for i, entry in enumerate(rank)
    ]
    return restored, [logits.clone(), *held]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    # As bytes: torch compares no fp8 tensors.
    pairs = [
        (a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in zip(first, second, strict=True)
    ]
    return all(torch.equal(*pair) for pair in pairs)


def test_a_warm_run_is_bit_identical_to_a_cold_one_in_any_slot(model: Any) -> None:
    @settings(max_examples=30, phases=WITHOUT_SHRINKING)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        budget = data.draw(st.sampled_from([1 << 18, 1 << 19, 1 << 30]))
        cache = PrefixCache(model, budget, block_tokens=data.draw(st.sampled_from([None, BLOCK, 2 * BLOCK])))
        # Few tokens, so that prompts share beginnings of any length.
        prompts = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=2, max_size=6))
        for prompt in prompts:
            shared = data.draw(st.sampled_from(prompts))[: data.draw(st.integers(0, 40))]
            prompt = [*shared, *prompt]
            cold = encode(model, 0, prompt, None)[1]
            restored, warm = encode(model, data.draw(st.integers(0, SLOTS - 1)), prompt, cache)
            assert restored % cache.block == 0 and restored < len(prompt)
            assert equal(warm, cold)
            assert cache.nbytes <= cache.budget_bytes

    run()


def test_the_longest_shared_boundary_is_restored(model: Any) -> None:
    cache = PrefixCache(model, budget_bytes=1 << 30)
    (prompt,) = random_prompts([40])
    assert encode(model, 0, prompt, cache)[0] == 0
    assert encode(model, 1, prompt, cache)[0] == 32, "the last token must be encoded again"
    assert encode(model, 1, [*prompt, 5], cache)[0] == 40
    assert encode(model, 0, [*prompt[:20], 0, *prompt[21:]], cache)[0] == 16
    assert encode(model, 0, [prompt[0] + 1, *prompt[1:]], cache)[0] == 0


def test_larger_blocks_keep_more_tokens_in_the_same_memory(model: Any) -> None:
    (prompt,) = random_prompts([40])
    small, large = PrefixCache(model, 1 << 30), PrefixCache(model, 1 << 30, block_tokens=2 * BLOCK)
    assert encode(model, 0, prompt, small)[0] == encode(model, 0, prompt, large)[0] == 0
    assert small.blocks == 5 and large.blocks == 2
    assert encode(model, 0, prompt, large)[0] == 32
    states = sum(entry[0].nbytes for rank in kept(model) for entry in rank[:6])  # of a slot, in three DeltaNet layers
    token = (small.nbytes - 5 * states) / 40
    assert large.nbytes == 2 * states + 32 * token


def test_pixels_of_the_same_bytes_and_another_dtype_or_shape_are_another_image() -> None:
    pixels, grid = torch.arange(24, dtype=torch.float16).reshape(4, 6), torch.tensor([1, 2, 2])
    others = [pixels, pixels.view(torch.bfloat16), pixels.view(torch.float32), pixels.reshape(2, 12)]
    assert len({digest_of(each, grid) for each in others}) == len(others)
    assert digest_of(pixels.t().contiguous().t(), grid) == digest_of(pixels.clone(), grid.clone())


def test_equal_tokens_with_another_image_are_another_prompt(model: Any) -> None:
    cache = PrefixCache(model, budget_bytes=1 << 30)
    (prompt,) = random_prompts([30])
    grid = torch.tensor([1, 2, 2])
    one, other = (digest_of(torch.full((4, 3), value), grid) for value in (0.0, 1e-7))
    assert one != other != digest_of(torch.full((4, 3), 0.0), torch.tensor([1, 1, 4]))
    encode(model, 0, prompt, cache, [Medium(10, one)])
    assert encode(model, 0, prompt, cache, [Medium(10, one)])[0] == 24
    assert encode(model, 0, prompt, cache, [Medium(10, other)])[0] == 8
    assert encode(model, 0, prompt, cache, [Medium(11, one)])[0] == 8


def test_the_least_recently_used_ends_go_first_and_beginnings_last(model: Any) -> None:
    first, second = random_prompts([24, 24], seed=3)
    cache = PrefixCache(model, budget_bytes=1 << 30)
    encode(model, 0, first, cache)
    size = cache.nbytes // cache.blocks
    cache = PrefixCache(model, budget_bytes=4 * size)
    encode(model, 0, first, cache)
    encode(model, 0, second, cache)
    assert cache.blocks == 4 and cache.nbytes == 4 * size
    assert encode(model, 0, [*second, 1], cache)[0] == 24
    assert encode(model, 0, [*first, 1], cache)[0] == 8


def test_what_a_cache_cannot_work_with_is_refused(model: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="prefill_chunk_size is not set"):
        PrefixCache(load_neuron(tmp_path), 1)
    with pytest.raises(ValueError, match="9 tokens are not whole blocks of 8"):
        PrefixCache(model, 1).store(0, PrefixCache(model, 1).chain([1] * 9), 9)
    for block in (0, BLOCK + 1):
        with pytest.raises(ValueError, match=rf"block_tokens={block}: must be a multiple of prefill_chunk_size=8"):
            PrefixCache(model, 1, block)
    with pytest.raises(ValueError, match="budget_bytes=-1"):
        PrefixCache(model, -1)
    neuron_config = Qwen35NeuronConfig(
        prefill_chunk_size=BLOCK, async_mode=True, on_device_sampling_config=OnDeviceSamplingConfig()
    )
    config = Qwen35InferenceConfig.from_pretrained(tmp_path, neuron_config=neuron_config)
    with pytest.raises(ValueError, match="async_mode=True"):
        PrefixCache(NeuronQwen35ForCausalLM(str(tmp_path), config), 1)


def test_a_block_that_would_be_dropped_at_once_is_not_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = random_prompts([40, 24])
    cache = PrefixCache(model, budget_bytes=1 << 30)
    encode(model, 0, first, cache)
    cache = PrefixCache(model, budget_bytes=2 * cache.nbytes // 5)
    encode(model, 0, second, cache)
    reads: list[int] = []
    to_host = prefix_cache._to_host
    monkeypatch.setattr(prefix_cache, "_to_host", lambda view: reads.append(view.nbytes) or to_host(view))  # type: ignore[func-returns-value]
    encode(model, 0, first, cache)
    assert sum(reads) == cache.nbytes and cache.blocks == 2, "two of five blocks, in the place of the other prompt's"
