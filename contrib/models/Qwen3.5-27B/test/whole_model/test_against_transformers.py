# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The decoder against transformers: logits and greedy tokens, over sizes, batches, padding and tensor parallelism.

Tolerance: 1e-4 on float32 logits of order one. Both sides sum the same products in another order; the longest chain
here (some 8 layers of sums of 64 to 256 terms) leaves about 1e-5.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from support.compare import assert_close
from support.models import load_neuron, neuron_greedy, random_prompts
from support.oracle import reference_greedy, save_reference

STEPS = 32
# An example costs a second, so a failure is reported as found: shrinking would take hours.
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
LOGIT_TOLERANCE = 1e-4


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, Any]:
    """Overrides of a text config whose heads divide by 4."""
    key_heads, kv_heads = 4 * draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
    rope = draw(
        st.sampled_from(
            [
                {"head_dim": 32, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
                {"head_dim": 16, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
                {"head_dim": 24, "partial_rotary_factor": 1.0, "mrope_section": [4, 4, 4]},
            ]
        )
    )
    head_dim = rope.pop("head_dim")
    return dict(
        hidden_size=draw(st.sampled_from([32, 48, 64])),
        intermediate_size=draw(st.sampled_from([32, 88])),
        num_hidden_layers=draw(st.integers(4, 8)),
        vocab_size=draw(st.sampled_from([97, 160])),
        num_attention_heads=kv_heads * draw(st.sampled_from([4, 8])),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * draw(st.integers(1, 3)),
        linear_key_head_dim=draw(st.sampled_from([16, 32])),
        linear_value_head_dim=draw(st.sampled_from([16, 32])),
        linear_conv_kernel_dim=draw(st.integers(2, 4)),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True, **rope},
    )


lengths = st.lists(st.one_of(st.integers(1, 4), st.integers(1, 90)), min_size=1, max_size=4)


def greedy_on_rank(path: str, options: dict[str, Any], prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return neuron_greedy(load_neuron(Path(path), **options), prompts, STEPS)


def check(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert_close(actual[1], expected[1], atol=LOGIT_TOLERANCE, rtol=0, label="logits [row, step, vocabulary]")
    assert torch.equal(actual[0], expected[0]), "greedy tokens differ"


@settings(max_examples=12, phases=WITHOUT_SHRINKING)
@given(checkpoints(), lengths, st.booleans(), st.integers(0, 2**16))
def test_greedy_generation_equals_transformers(
    overrides: dict[str, Any], lengths: list[int], bucketing: bool, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as path:
        reference = save_reference(Path(path), seed=seed, **overrides)
        prompts = random_prompts(lengths, overrides["vocab_size"], seed)
        options = dict(batch_size=len(prompts), enable_bucketing=bucketing, seq_len=max(lengths) + STEPS)
        check(
            greedy_on_rank(path, options, prompts),
            reference_greedy(reference, prompts, STEPS),
        )


@pytest.mark.parametrize("tp_degree", [2, 4])
def test_greedy_generation_with_tensor_parallelism_equals_transformers(tp_degree: int, rank_pool: Any) -> None:
    @settings(max_examples=4, phases=WITHOUT_SHRINKING)
    @given(checkpoints(), lengths, st.integers(0, 2**16))
    def run(overrides: dict[str, Any], lengths: list[int], seed: int) -> None:
        with tempfile.TemporaryDirectory() as path:
            reference = save_reference(Path(path), seed=seed, **overrides)
            prompts = random_prompts(lengths, overrides["vocab_size"], seed)
            options = dict(batch_size=len(prompts), tp_degree=tp_degree, seq_len=max(lengths) + STEPS)
            expected = reference_greedy(reference, prompts, STEPS)
            for actual in rank_pool(tp_degree).call(greedy_on_rank, path, options, prompts):
                check(actual, expected)

    run()


def test_query_heads_that_do_not_divide_are_padded_as_on_16_ranks_of_27b(rank_pool: Any, tmp_path: Path) -> None:
    # 27B has 24 query and 4 KV heads: at TP=16 every KV head serves 6 query heads on 4 ranks, padded to 8.
    # The same shape at a fourth: 6 query heads, 1 KV head, 4 ranks.
    reference = save_reference(tmp_path, num_attention_heads=6, num_key_value_heads=1)
    prompts = random_prompts([5, 17])
    expected = reference_greedy(reference, prompts, STEPS)
    options = dict(batch_size=2, tp_degree=4)
    for actual in rank_pool(4).call(greedy_on_rank, str(tmp_path), options, prompts):
        check(actual, expected)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 63, 64, 65])
def test_prompts_around_the_conv_window_and_the_chunk(length: int, tmp_path: Path) -> None:
    reference = save_reference(tmp_path)
    prompts = random_prompts([length])
    check(
        neuron_greedy(load_neuron(tmp_path), prompts, STEPS),
        reference_greedy(reference, prompts, STEPS),
    )


def test_generation_crosses_from_bucket_to_bucket(tmp_path: Path) -> None:
    reference = save_reference(tmp_path)
    prompts = random_prompts([120, 10])
    model = load_neuron(tmp_path, batch_size=2, seq_len=512, enable_bucketing=True)
    assert model.token_generation_model.neuron_config.buckets == [128, 256, 512]
    check(neuron_greedy(model, prompts, STEPS), reference_greedy(reference, prompts, STEPS))


def test_padding_is_found_in_the_mask_not_in_the_token_ids(tmp_path: Path) -> None:
    reference = save_reference(tmp_path, eos_token_id=7, pad_token_id=7)
    prompts = [[7, 3, 7, 7, 5, 7], [7], [9, 7, 1, 7, 7, 7, 7, 7, 7]]
    check(
        neuron_greedy(load_neuron(tmp_path, batch_size=3), prompts, STEPS),
        reference_greedy(reference, prompts, STEPS),
    )


def test_a_batch_larger_than_compiled_runs_in_pieces(tmp_path: Path) -> None:
    reference = save_reference(tmp_path)
    prompts = random_prompts([6, 2, 11])
    model = load_neuron(tmp_path, batch_size=3, ctx_batch_size=1, is_continuous_batching=True)
    check(neuron_greedy(model, prompts, STEPS), reference_greedy(reference, prompts, STEPS))


def test_prompts_follow_each_other_without_a_trace(tmp_path: Path) -> None:
    reference = save_reference(tmp_path)
    model = load_neuron(tmp_path)
    for seed, length in enumerate([40, 1, 9]):
        prompts = random_prompts([length], seed=seed)
        check(neuron_greedy(model, prompts, STEPS), reference_greedy(reference, prompts, STEPS))
