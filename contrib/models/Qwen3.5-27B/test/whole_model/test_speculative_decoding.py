# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Decoding with drafts gives the tokens of decoding without, whatever the drafts are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.serving.runner import ModelRunner, Row
from support import vl_cases
from support.models import load_neuron, random_prompts, save_checkpoint
from support.own_kernels import recorded_launches
from support.ranks import RankPool
from support.simulated_device import put_on_simulated_device
from support.speculation import Decoded, Doctor, decode_plainly, decode_with_drafts, save_markov_checkpoint

LENGTHS = (1, 2, 17, 40)
NEW = 24


def rows_of(prompts: list[list[int]]) -> list[Row]:
    return [Row(slot, [*prompt]) for slot, prompt in enumerate(prompts)]


def oracle(continuations: list[list[int]], lengths: list[int], wrong: Callable[[int, int], bool], k: int) -> Doctor:
    """Drafts that are the true continuation, but for those places of it that are chosen as wrong."""

    def doctor(number: int, row: Row) -> None:
        done = len(row.tokens) - lengths[number]
        true = continuations[number][done : done + min(k, len(row.drafts))]
        row.drafts = [(token + 1) % 160 if wrong(number, done + i) else token for i, token in enumerate(true)]

    return doctor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "checkpoint"
    save_checkpoint(path, 1, mtp=True)
    return path


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> list[list[int]]:
    """Greedy tokens without a head, some more than are asked for."""
    model = load_neuron(checkpoint, batch_size=len(LENGTHS))
    return decode_plainly(model, rows_of(random_prompts(LENGTHS)), NEW + 8)


def expected(truth: list[list[int]]) -> list[list[int]]:
    return [tokens[:NEW] for tokens in truth]


OPTIONS: dict[str, dict[str, Any]] = {
    "one batch": dict(batch_size=4),
    "two rows, four slots": dict(
        batch_size=2, ctx_batch_size=1, kv_cache_batch_size=4, max_batch_size=4, is_continuous_batching=True
    ),
    "chunks and buckets": dict(
        batch_size=4, prefill_chunk_size=16, enable_bucketing=True, token_generation_buckets=[32, 48, 128],
        context_encoding_buckets=[16],
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("two_programs", [False, True], ids=["one program", "two programs"])
def test_right_and_wrong_drafts_leave_the_tokens(
    checkpoint: Path, truth: list[list[int]], options: dict[str, Any], two_programs: bool, backend: str
) -> None:
    model = load_neuron(checkpoint, num_speculative_tokens=3, **options)
    chosen = random.Random(0)
    wrong = {(row, place) for row in range(4) for place in range(NEW + 8) if chosen.random() < 0.25}
    doctor = oracle(truth, [*LENGTHS], lambda row, place: (row, place) in wrong, 3)
    decoded = decode_with_drafts(model, rows_of(random_prompts(LENGTHS)), NEW, doctor, lambda step: two_programs)
    assert decoded.tokens == expected(truth)
    assert {0, 1, 2, 3} == {number for accepted in decoded.accepted for number in accepted}
    assert len({len(accepted) for accepted in decoded.accepted}) > 1, "rows go at their own pace"


@pytest.mark.parametrize("k", range(1, 8))
def test_right_drafts_give_one_token_more_than_drafts_a_step(checkpoint: Path, truth: list[list[int]], k: int) -> None:
    model = load_neuron(checkpoint, num_speculative_tokens=k, batch_size=4)
    doctor = oracle(truth, [*LENGTHS], lambda row, place: False, k)
    decoded = decode_with_drafts(
        model, rows_of(random_prompts(LENGTHS)), NEW, doctor, two_programs=lambda step: step % 2 == 1
    )
    assert decoded.tokens == expected(truth)
    assert decoded.steps == -(-(NEW - 1) // (k + 1))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_random_head_leaves_the_tokens(checkpoint: Path, truth: list[list[int]], k: int) -> None:
    model = load_neuron(checkpoint, num_speculative_tokens=k, batch_size=4)
    assert decode_with_drafts(model, rows_of(random_prompts(LENGTHS)), NEW).tokens == expected(truth)


def test_a_head_that_knows_the_next_token_gives_one_more_than_it_drafts(tmp_path: Path) -> None:
    save_markov_checkpoint(tmp_path, seed=2)
    prompts = random_prompts(LENGTHS)
    true = decode_plainly(load_neuron(tmp_path, batch_size=4), rows_of(prompts), NEW)
    for k in (1, 3, 7):
        model = load_neuron(tmp_path, num_speculative_tokens=k, batch_size=4)
        decoded = decode_with_drafts(model, rows_of(prompts), NEW)
        assert decoded.tokens == true
        assert decoded.steps == -(-(NEW - 1) // (k + 1))


def test_a_step_may_be_decoded_without_drafts_between(checkpoint: Path, truth: list[list[int]]) -> None:
    model = load_neuron(checkpoint, num_speculative_tokens=3, batch_size=4)
    rows = rows_of(random_prompts(LENGTHS))
    assert decode_plainly(model, rows, 9) == [tokens[:9] for tokens in truth]
    runner = ModelRunner(model)
    after_decoding = [[*row.tokens] for row in rows]
    runner.draft(rows)
    warm = [row.drafts for row in rows]
    fresh = [Row(row.slot, tokens[:-1]) for row, tokens in zip(rows, after_decoding, strict=True)]
    runner.encode(fresh)
    for row, tokens in zip(fresh, after_decoding, strict=True):
        row.tokens.append(tokens[-1])
    runner.draft(fresh)
    assert [row.drafts for row in fresh] == warm, "decoding keeps the head's cache as encoding does"


def test_drafts_end_where_the_slot_is_full(checkpoint: Path) -> None:
    (prompt,) = random_prompts([40])
    plain = load_neuron(checkpoint, seq_len=48)
    true = decode_plainly(plain, [Row(0, [*prompt])], 9)
    model = load_neuron(checkpoint, seq_len=48, num_speculative_tokens=7)
    doctor = oracle(true, [40], lambda row, place: False, 7)
    row = Row(0, [*prompt])
    decoded = decode_with_drafts(model, [row], 9, doctor)
    assert decoded.tokens == true
    assert decoded.accepted == [[7]] and row.cached == 48 and row.drafts == []


def test_drafts_are_verified_on_keys_and_values_as_an_fp8_cache_rounds_them(checkpoint: Path, backend: str) -> None:
    (prompt, following), options = random_prompts([9, 8]), dict(kv_cache_dtype="fp8")
    plain = ModelRunner(load_neuron(checkpoint, **options))
    row, one_by_one = Row(0, [*prompt]), []
    plain.encode([row])
    for token in following:
        row.tokens.append(token)
        one_by_one.append(plain.decode([row]).all_logits()[0])
    runner = ModelRunner(load_neuron(checkpoint, num_speculative_tokens=7, **options))
    row = Row(0, [*prompt])
    runner.encode([row])
    row.tokens.append(following[0])
    runner.draft([row])
    row.drafts = following[1:]
    # float32, logits of order one; without rounding what precedes a draft they are 0.006 apart.
    torch.testing.assert_close(runner.verify([row])[0], torch.stack(one_by_one), atol=1e-4, rtol=0)


@pytest.mark.parametrize("on_device", [False, True], ids=["CPU", "simulated device"])
def test_rows_with_images_and_video_keep_their_tokens(tmp_path: Path, on_device: bool, backend: str) -> None:
    vl_cases.save_vl_checkpoint(tmp_path, mtp=True)
    examples = vl_cases.EXAMPLE
    options: dict[str, Any] = dict(prefill_chunk_size=16, seq_len=64)

    def rows(model: Any) -> list[Row]:
        runner = ModelRunner(model)
        placed = [runner.place(row.ids, vl_cases.media([row])) for row in examples]
        return [Row(i, [*row.ids], placed=own) for i, (row, own) in enumerate(zip(examples, placed, strict=True))]

    plain = vl_cases.load(str(tmp_path), **options)
    true = decode_plainly(plain, rows(plain), NEW)
    model = vl_cases.load(str(tmp_path), num_speculative_tokens=3, **options)
    lengths = [len(row.ids) for row in examples]
    doctor = oracle(true, lengths, lambda row, place: (row + place) % 5 in (0, 3), 3)
    with_media = rows(model)
    decoding: Any = put_on_simulated_device(model) if on_device else model
    decoded = decode_with_drafts(decoding, with_media, 12, doctor, lambda step: step % 2 == 1)
    assert decoded.tokens == [tokens[:12] for tokens in true]
    assert len({*range(4)} & {number for accepted in decoded.accepted for number in accepted}) > 2


def test_kernels_verify_and_take_in_as_plain_pytorch_does(tmp_path: Path) -> None:
    heads = dict(linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=1, linear_num_value_heads=2)
    save_checkpoint(tmp_path, 3, mtp=True, num_hidden_layers=2, full_attention_interval=2, **heads)
    prompts = random_prompts([5, 2])
    true = decode_plainly(load_neuron(tmp_path, batch_size=2), rows_of(prompts), 12)
    model = load_neuron(tmp_path, batch_size=2, num_speculative_tokens=2, deltanet_kernel="fused")
    doctor = oracle(true, [5, 2], lambda row, place: (row + place) % 4 == 1, 2)
    decoded = decode_with_drafts(model, rows_of(prompts), 8, doctor, lambda step: step % 2 == 1)
    assert decoded.tokens == [tokens[:8] for tokens in true]
    assert {0, 2} <= {number for accepted in decoded.accepted for number in accepted}


@pytest.mark.slow
def test_200_random_models_and_batches_with_random_heads_give_their_tokens(tmp_path: Path) -> None:
    differing = []
    for seed in range(200):
        chosen = random.Random(seed)
        fields = dict(
            num_hidden_layers=chosen.randint(1, 4),
            full_attention_interval=chosen.randint(1, 3),
            num_attention_heads=chosen.choice([2, 4]),
            num_key_value_heads=chosen.choice([1, 2]),
            linear_num_key_heads=chosen.choice([1, 2]),
            linear_num_value_heads=chosen.choice([2, 4]),
            linear_conv_kernel_dim=chosen.randint(2, 4),
            tie_word_embeddings=chosen.random() < 0.3,
        )
        path = tmp_path / str(seed)
        save_checkpoint(path, seed, mtp=True, **fields)
        rows, k = chosen.randint(1, 4), chosen.randint(1, 7)
        options: dict[str, Any] = dict(batch_size=rows)
        if chosen.random() < 0.5:
            options["prefill_chunk_size"] = chosen.choice([4, 8, 16])
        prompts = random_prompts([chosen.randint(1, 40) for _ in range(rows)], seed=seed)
        true = decode_plainly(load_neuron(path, **options), rows_of(prompts), 16 + k)
        wrong = {(row, place) for row in range(rows) for place in range(16 + k) if chosen.random() < 0.3}
        doctor = oracle(true, [*map(len, prompts)], lambda row, place, wrong=wrong: (row, place) in wrong, k)
        model = load_neuron(path, num_speculative_tokens=k, **options)
        for each in (lambda number, row: None, doctor):
            decoded = decode_with_drafts(model, rows_of(prompts), 16, each, lambda step: step % 3 == 1)
            if decoded.tokens != [tokens[:16] for tokens in true]:
                differing.append((seed, fields, options, k))
    assert differing == []


def decoded_on_a_rank(path: Path, prompts: list[list[int]], truth: list[list[int]], **options: Any) -> Decoded:
    model = load_neuron(path, batch_size=len(prompts), **options)
    doctor = oracle(truth, [*map(len, prompts)], lambda row, place: (row + place) % 3 == 1, 3)
    return decode_with_drafts(model, rows_of(prompts), NEW, doctor, lambda step: step % 2 == 1)


@pytest.mark.parametrize("tp_degree", [2, 4])
def test_ranks_accept_alike(
    checkpoint: Path, truth: list[list[int]], rank_pool: Callable[[int], RankPool], tp_degree: int
) -> None:
    prompts = random_prompts(LENGTHS)
    for decoded in rank_pool(tp_degree).call(
        decoded_on_a_rank, checkpoint, prompts, truth, tp_degree=tp_degree, num_speculative_tokens=3
    ):
        assert decoded.tokens == expected(truth)


@pytest.mark.parametrize("two_programs", [False, True], ids=["one program", "two programs"])
def test_drafts_leave_the_tokens_where_kernels_verify_and_commit(tmp_path: Path, two_programs: bool) -> None:
    path, lengths = tmp_path / "checkpoint", (3, 9)
    dims = dict(linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=1, linear_num_value_heads=2)
    save_checkpoint(path, 1, mtp=True, **dims)
    truth = decode_plainly(load_neuron(path, batch_size=2), rows_of(random_prompts(lengths)), 14)
    wrong = {(0, 2), (0, 7), (1, 4)}
    model = load_neuron(path, batch_size=2, num_speculative_tokens=3, deltanet_kernel="fused")
    doctor = oracle(truth, [*lengths], lambda row, place: (row, place) in wrong, 3)
    with recorded_launches() as launches:
        decoded = decode_with_drafts(model, rows_of(random_prompts(lengths)), 10, doctor, lambda step: two_programs)
    assert decoded.tokens == [tokens[:10] for tokens in truth]
    assert len({number for accepted in decoded.accepted for number in accepted}) > 1
    names = {key[0] for key in launches.compiled}
    assert {"deltanet_verify_layer", "deltanet_commit_layer"} <= names and "deltanet_decode_layer" not in names
