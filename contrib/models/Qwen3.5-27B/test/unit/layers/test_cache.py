# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept between steps, and where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.layers.cache import Qwen35CacheManager, write_slots
from qwen35.phase import Phase
from support.models import TINY, load_neuron, random_prompts, right_padded, save_checkpoint
from support.oracle import save_reference


def cache_of(path: Path, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    model = load_neuron(path, **options)
    return model, list(model.models[0].model.kv_mgr.past_key_values)


def test_deltanet_layers_hold_state_and_attention_layers_hold_keys_and_values(tmp_path: Path) -> None:
    save_reference(tmp_path)
    _, cache = cache_of(tmp_path, batch_size=3, seq_len=96, torch_dtype=torch.bfloat16)
    recurrent, conv = ((3, 8, 16, 16), torch.float32), ((3, 256, 3), torch.bfloat16)
    key_value = ((3, 2, 96 + 128, 32), torch.bfloat16)  # NxDI's room for rows that pad a batch
    expected = [recurrent, conv] * 3 + [key_value] * 2
    assert [(tuple(entry.shape), entry.dtype) for entry in cache] == expected


def test_a_longer_context_costs_deltanet_layers_nothing(tmp_path: Path) -> None:
    save_reference(tmp_path)
    sizes = [[entry.numel() for entry in cache_of(tmp_path, seq_len=length)[1]] for length in (64, 512)]
    assert sizes[0][:6] == sizes[1][:6]
    assert [8 * n for n in sizes[0][6:]] == sizes[1][6:]


def test_context_encoding_of_one_slot_leaves_the_others_alone(tmp_path: Path) -> None:
    save_reference(tmp_path)
    model, _ = cache_of(tmp_path, batch_size=3, ctx_batch_size=1, is_continuous_batching=True)

    def encode(slot: int, prompt: list[int]) -> None:
        ids, mask = right_padded([prompt])
        positions = torch.arange(len(prompt)).unsqueeze(0)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, seq_ids=torch.tensor([slot]))

    def kept_of(index: int) -> list[torch.Tensor]:
        return [entry[index].clone() for entry in model.models[0].model.kv_mgr.past_key_values]

    prompts = random_prompts([7, 5, 9])
    for index in (2, 0, 1):
        encode(index, prompts[index])
    before = [kept_of(0), kept_of(2)]
    assert all(entry.any() for entry in before[0] + before[1])
    encode(1, random_prompts([4], seed=5)[0])
    for kept, index in zip(before, (0, 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, kept_of(index), strict=True))


def test_a_new_prompt_starts_from_an_empty_state(tmp_path: Path) -> None:
    save_reference(tmp_path)
    model, _ = cache_of(tmp_path)
    ids, mask = right_padded(random_prompts([6]))
    positions = torch.arange(6).unsqueeze(0)

    def state() -> list[torch.Tensor]:
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
        return [entry.clone() for entry in model.models[0].model.kv_mgr.past_key_values][:6]

    first, second = state(), state()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(st.integers(2, 6), st.data())
def test_rows_are_written_in_their_slots_and_ids_out_of_range_nowhere(slots: int, data: st.DataObject) -> None:
    """Against plain loops; the manager sees a batch of any size, with ids in any order at context encoding."""
    phase = data.draw(st.sampled_from((Phase.CONTEXT_ENCODING, Phase.TOKEN_GENERATION)))
    prompt = phase is Phase.CONTEXT_ENCODING
    ids = data.draw(st.lists(st.integers(-1, slots + 1), min_size=1, max_size=slots, unique=True))
    if not prompt and len(ids) == slots:
        ids = [i if i in ids else -1 for i in range(slots)]  # row b of a decoding batch of all slots is slot b
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(batch_size=slots, seq_len=8), **TINY)
    manager = Qwen35CacheManager(config, num_kv_head=config.num_key_value_heads)
    tokens = 3 if prompt else 1
    positions = torch.arange(tokens).repeat(len(ids), 1) if prompt else 4 + torch.arange(len(ids)).unsqueeze(1)
    row = torch.arange(1.0, len(ids) + 1).view(-1, 1, 1, 1)
    for layer in (0, 3):
        old = [entry.clone() for entry in manager.layer_state(layer)]
        shapes = [(len(ids), *entry.shape[1:]) for entry in old]
        if layer == 3:  # attention: keys and values of the new tokens
            shapes = [(rows, heads, tokens, dims) for rows, heads, _, dims in shapes]
        new = tuple(row.view(-1, *[1] * (len(shape) - 1)).expand(shape) for shape in shapes)
        updated = manager.update_kv_by_layer_id(layer, torch.tensor(ids), positions, new, phase)
        for entry, before in zip(updated, old, strict=True):
            for slot in range(slots):
                expected = before[slot].clone()
                if slot in ids:
                    at = ids.index(slot)
                    if layer == 3:
                        expected[:, positions[at]] = at + 1
                    else:
                        expected[:] = at + 1
                kept = entry[slot, :, :8] if layer == 3 else entry[slot]  # beyond the length lies what nothing reads
                assert torch.equal(kept, expected[:, :8] if layer == 3 else expected), (layer, slot, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phase", [Phase.CONTEXT_ENCODING, Phase.TOKEN_GENERATION])
def test_keys_and_values_in_fp8_are_clamped_to_what_trainium_holds_and_come_back_in_torch_dtype(
    dtype: torch.dtype, phase: Phase
) -> None:
    options = dict(batch_size=2, seq_len=8, torch_dtype=dtype, kv_cache_dtype="fp8")
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(**options), **TINY)
    manager = Qwen35CacheManager(config, num_kv_head=config.num_key_value_heads)
    assert {e.dtype for e in manager.layer_state(3)} == {torch.float8_e4m3fn}
    # 248 would round to 256, which Trainium reads as infinity; 1.06 is between 1 and 1.125.
    written = {0.0: 0.0, 1.06: 1.0, 239.0: 240.0, 240.0: 240.0, 248.0: 240.0, 1e4: 240.0, -300.0: -240.0, 2**-9: 2**-9}
    values = torch.tensor([*written], dtype=dtype)
    expected = torch.tensor([*written.values()], dtype=dtype)
    new = torch.zeros(2, 2, 1, 32, dtype=dtype)
    new[..., : len(values)] = values
    positions = torch.zeros(2, 1, dtype=torch.long)
    manager.update_kv_by_layer_id(3, torch.arange(2), positions, (new, new), phase)
    for entry in manager.get_kv_by_layer_id(3, 8, phase=Phase.TOKEN_GENERATION, seq_ids=torch.tensor([1])):
        assert entry.dtype == dtype and entry.shape == (1, 2, 8, 32)
        assert torch.equal(entry[0, 0, 0, : len(values)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_rows_take_the_dtype_of_the_cache(dtype: torch.dtype) -> None:
    written = torch.tensor([True, False])
    assert write_slots(torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3), written).dtype == dtype


def test_drafting_adds_a_layer_and_what_it_keeps_of_each_slot(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, mtp=True)
    model, cache = cache_of(tmp_path, batch_size=3, seq_len=96, torch_dtype=torch.bfloat16, num_speculative_tokens=2)
    layout = model.cache_layout
    assert len(cache) == len(layout.parameter_names()) == 2 * 5 + 5
    head = layout.layer_state(cache, 4)
    assert [tuple(entry.shape) for entry in head] == [(3, 2, 96 + 128, 32)] * 2
    kept = layout.speculation(cache)
    assert {name: (tuple(entry.shape), entry.dtype) for name, entry in kept._asdict().items()} == {
        "hidden": ((3, 64), torch.bfloat16),
        "rotary": ((3, 3), torch.int32),
        "verified_hidden": ((3, 3, 64), torch.bfloat16),
        "conv_inputs": ((3, 3, 3, 256), torch.bfloat16),  # slots, DeltaNet layers, a token and its drafts, channels
        "rank_one": ((3, 3, 3, 4 * 16 + 8 * 16 + 8), torch.float32),
    }
    views = layout.slot(cache, 1)
    assert len(views.states) == 2 * 3 + 2 and len(views.key_values) == 2 * 2 * 2 and len(views.verified) == 3
    assert all(view.is_contiguous() for group in views for view in group), "each is copied in one run"


def test_a_cleared_slot_holds_nothing_of_verified_tokens_either(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, mtp=True)
    model, cache = cache_of(tmp_path, batch_size=2, num_speculative_tokens=2)
    for entry in cache:
        entry.fill_(1)
    model.clear_slot(1)
    assert all(entry[0].all() and not entry[1].any() for entry in cache)
