# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank of 27B holds, counted from its real modules, on NxDI and on the stand-ins."""

from __future__ import annotations

from typing import Any

import pytest

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS
from qwen35.memory.counting import RankBytes, rank_module

pytestmark = pytest.mark.usefixtures("backend")


def model_27b(**options: Any) -> NeuronQwen35ForCausalLM:
    config = Qwen35InferenceConfig(Qwen35NeuronConfig(**options), **QWEN35_PRESETS["27B"])
    return NeuronQwen35ForCausalLM("no-such-checkpoint", config)


def bytes_of_27b(**options: Any) -> RankBytes:
    return model_27b(**options).bytes_per_rank()


def replicated_in_27b(tp_degree: int) -> set[str]:
    module = rank_module(model_27b(tp_degree=tp_degree))
    weights = {n: p for n, p in module.named_parameters() if "past_key_values" not in n}
    return {n for n, p in weights.items() if not getattr(p, "tensor_model_parallel", False)}


@pytest.mark.parametrize(("tp_degree", "gigabytes"), [(1, 54), (4, 13.6), (8, 6.9), (16, 3.6)])
def test_27b_is_sharded_without_replicated_weights(tp_degree: int, gigabytes: float, rank_pool: Any) -> None:
    (counted,) = rank_pool(1).call(bytes_of_27b, tp_degree=tp_degree)
    assert counted.weights <= 1e9 * gigabytes, str(counted)
    (replicated,) = rank_pool(1).call(replicated_in_27b, tp_degree)
    assert all("norm" in name.split(".")[-2] for name in replicated), replicated


def test_27b_on_4_ranks_keeps_half_a_gigabyte_for_32k_tokens(rank_pool: Any) -> None:
    (counted,) = rank_pool(1).call(bytes_of_27b, tp_degree=4, seq_len=32768)
    # 16 layers of K and V, one KV head of 256 dims in bfloat16; 48 of 12 states of 128 x 128 float32 and 3 conv inputs.
    assert counted.kv_cache == 16 * 2 * 32768 * 256 * 2
    assert counted.recurrent_state == 48 * 12 * 128 * 128 * 4
    assert counted.conv_state == 48 * 3 * 2560 * 2
    assert counted.kept <= 0.6e9


def test_a_head_that_drafts_three_tokens_costs_27b_a_layer_and_what_it_verifies(rank_pool: Any) -> None:
    (without,) = rank_pool(1).call(bytes_of_27b, tp_degree=4, seq_len=32768)
    (counted,) = rank_pool(1).call(bytes_of_27b, tp_degree=4, seq_len=32768, num_speculative_tokens=3)
    # fc, q and its gate, k, v, o and the MLP, bfloat16, over 4 ranks; norms of 5,120 and 256, float32, on each.
    matrices = 2 * 5120 * 5120 + (3 * 24 + 2 * 4) * 256 * 5120 + 3 * 5120 * 17408
    norms_and_ranks = (6 * 5120 + 2 * 256) * 4 - 5120 * 4 + 4
    assert counted.weights - without.weights == matrices * 2 // 4 + norms_and_ranks
    assert counted.kv_cache == 17 * 2 * (32768 + 128) * 256 * 2  # room for masked tokens
    conv_inputs, rank_one = 48 * 4 * 2560 * 2, 48 * 4 * (4 * 128 + 12 * 128 + 12) * 4
    assert counted.speculation == 5 * 5120 * 2 + 3 * 4 + conv_inputs + rank_one
    assert without.speculation == 0


def test_every_slot_beyond_one_costs_its_cache_its_state_and_room_for_masked_rows(rank_pool: Any) -> None:
    (one,) = rank_pool(1).call(bytes_of_27b, tp_degree=4, seq_len=1024)
    (four,) = rank_pool(1).call(bytes_of_27b, tp_degree=4, seq_len=1024, batch_size=4)
    assert four.kv_cache == 4 * one.kv_cache * (1024 + 128) // 1024
    assert (four.recurrent_state, four.conv_state) == (4 * one.recurrent_state, 4 * one.conv_state)
    assert four.weights == one.weights


def test_27b_in_fp8_on_4_ranks_takes_7_5_gb_with_an_mtp_layer(rank_pool: Any) -> None:
    (bf16,) = rank_pool(1).call(bytes_of_27b, tp_degree=4)
    (fp8,) = rank_pool(1).call(bytes_of_27b, tp_degree=4, weights_dtype="fp8")
    # The matrices: half. Their scales: float32, the rank's rows of column-parallel layers, all of row-parallel ones.
    column = (48 * 16384 + 16 * 14336 + 64 * 2 * 17408) // 4
    row = (48 + 16 + 64) * 5120
    matrices = 48 * (16384 * 5120 + 5120 * 6144) + 16 * (14336 * 5120 + 5120 * 6144) + 64 * 3 * 17408 * 5120
    assert bf16.weights - fp8.weights == matrices // 4 - 4 * (column + row)
    # An attention layer more, and mtp.fc [5120, 10240] in bfloat16.
    mtp = (14336 + 6144 + 3 * 17408) * 5120 // 4 + 4 * (14336 // 4 + 2 * 17408 // 4 + 2 * 5120) + 2 * 5120 * 10240 // 4
    assert fp8.weights + mtp + 4 * 6 * 5120 <= 7.5e9


def test_keys_and_values_in_fp8_take_half_and_states_what_they_took(rank_pool: Any) -> None:
    (bf16,) = rank_pool(1).call(bytes_of_27b, tp_degree=4, seq_len=32768)
    (fp8,) = rank_pool(1).call(bytes_of_27b, tp_degree=4, seq_len=32768, kv_cache_dtype="fp8")
    assert 2 * fp8.kv_cache == bf16.kv_cache
    assert (fp8.recurrent_state, fp8.conv_state) == (bf16.recurrent_state, bf16.conv_state)
