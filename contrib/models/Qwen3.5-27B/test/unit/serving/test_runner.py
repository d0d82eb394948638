# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The calls that rows are put into, and that prompts in any pieces give the logits of one.

Tolerance: 1e-4 on float32 logits of order one, as in test_long_prompts.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35 import NeuronQwen35ForCausalLM, OnDeviceSamplingConfig
from qwen35.modeling_qwen35_vl import PlacedMedia
from qwen35.phase import Phase, Submodel
from qwen35.serving.runner import ModelRunner, Row, decoding_inputs, encoding_inputs, next_piece
from support.compare import assert_close
from support.decoder_cases import recorded_tensors
from support.models import load_neuron, random_prompts, save_checkpoint
from support.simulated_device import host_reads, put_on_simulated_device
from support.vl_cases import EXAMPLE, load, media, save_vl_checkpoint

pytestmark = pytest.mark.usefixtures("backend")

WITHOUT_SHRINKING = (HypothesisPhase.explicit, HypothesisPhase.generate)
SEQ_LEN, SLOTS, CHUNK = 128, 4, 16


@pytest.mark.parametrize(
    ("cached", "piece"), [(0, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (5, [5, 6, 7]), (7, [7]), (8, [8, 9]), (9, [9])]
)
def test_a_piece_ends_at_a_multiple_of_the_chunk_wherever_it_begins(cached: int, piece: list[int]) -> None:
    assert next_piece(Row(0, [*range(10)], cached), 4) == piece


def test_first_pieces_are_right_padded_to_the_longest() -> None:
    inputs = encoding_inputs([Row(2, [5, 6, 7]), Row(0, [8])], 4)
    assert inputs.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert inputs.seq_ids.tolist() == [2, 0]
    assert inputs.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert inputs.placed is None


def test_later_pieces_count_on_and_their_mask_tells_what_is_cached() -> None:
    inputs = encoding_inputs([Row(1, [*range(9)], cached=4), Row(3, [*range(4)], cached=2)], 4)
    assert inputs.input_ids.tolist() == [[4, 5, 6, 7], [2, 3, 0, 0]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert inputs.position_ids.tolist() == [[4, 5, 6, 7], [2, 3, 0, 0]]


@pytest.mark.parametrize(
    ("cached", "phase", "mask"), [(0, Phase.CONTEXT_ENCODING, [[1]]), (4, Phase.CONTINUATION, [[1, 1, 1, 1]])]
)
def test_a_piece_of_one_token_is_no_decoding_step(cached: int, phase: Phase, mask: list[list[int]]) -> None:
    inputs = encoding_inputs([Row(0, [*range(cached), 9], cached)], 4)
    assert inputs.phase is phase
    assert inputs.input_ids.tolist() == [[9]]
    assert inputs.position_ids.tolist() == [[cached]]
    assert inputs.attention_mask.tolist() == mask


def test_decoding_takes_the_token_after_those_cached() -> None:
    inputs = decoding_inputs([Row(3, [4, 5, 6], cached=2), Row(0, [7, 8], cached=1)])
    assert inputs.phase is Phase.TOKEN_GENERATION
    assert inputs.input_ids.tolist() == [[6], [8]]
    assert inputs.seq_ids.tolist() == [3, 0]
    assert inputs.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert inputs.position_ids.tolist() == [[2], [1]]


def placed(tokens: int) -> PlacedMedia:
    """Made-up columns: the position of each token is its index, on all axes."""
    index = torch.arange(tokens)
    return PlacedMedia(index.expand(1, 3, -1), index.view(1, -1, 1).float(), index.unsqueeze(0) > 0, torch.tensor([7]))


def test_media_come_as_the_columns_of_the_pieces() -> None:
    rows = [Row(slot, [1] * tokens, cached=4, placed=placed(tokens)) for slot, tokens in ((0, 9), (1, 5))]
    columns = encoding_inputs(rows, 4).placed
    assert columns is not None
    assert columns.positions[:, 0].tolist() == [[4, 5, 6, 7], [4, 0, 0, 0]]
    assert columns.embeddings[..., 0].tolist() == [[4, 5, 6, 7], [4, 0, 0, 0]]
    assert columns.mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert columns.rope_deltas.tolist() == [7, 7]


@pytest.mark.parametrize(
    "other",
    [Row(1, [1, 2], cached=1), Row(1, [1, 2], placed=placed(2)), Row(1, [])],
    ids=["continues", "media", "empty"],
)
def test_rows_that_cannot_share_a_call_are_refused(other: Row) -> None:
    with pytest.raises(
        ValueError, match=r"cannot share a call \(slot 0: 0 of 2 cached, .*slot 1: .* cached.*one submodel"
    ):
        encoding_inputs([Row(0, [1, 2]), other], 4)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, seed=1)
    return path


@pytest.fixture(scope="module")
def in_one_piece(path: Path) -> ModelRunner:
    return ModelRunner(load_neuron(path, seq_len=SEQ_LEN, batch_size=SLOTS))


@pytest.fixture(scope="module")
def in_pieces(path: Path) -> ModelRunner:
    options = dict(batch_size=SLOTS, ctx_batch_size=2, is_continuous_batching=True, prefill_chunk_size=CHUNK)
    return ModelRunner(load_neuron(path, seq_len=SEQ_LEN, **options))


def test_rows_of_one_submodel_are_batched_in_their_order_up_to_the_compiled_number(in_pieces: ModelRunner) -> None:
    rows = [Row(0, [1, 2], cached=1), Row(1, [1]), Row(2, [1, 2, 3], cached=2), Row(3, [1, 2], cached=1)]
    assert in_pieces.batch(rows) == [rows[0], rows[2]]
    assert in_pieces.batch(rows[1:]) == [rows[1]]
    assert rows[0].submodel == Submodel(Phase.CONTINUATION, with_media=False)


def test_any_split_gives_the_logits_of_one_piece(in_pieces: ModelRunner, in_one_piece: ModelRunner) -> None:
    @settings(max_examples=25, phases=WITHOUT_SHRINKING)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        lengths = data.draw(st.lists(st.integers(1, 6 * CHUNK), min_size=1, max_size=SLOTS))
        prompts = random_prompts(lengths, seed=data.draw(st.integers(0, 2**16)))
        slots = data.draw(st.permutations(range(SLOTS)))
        whole = [Row(slot, [*prompt]) for slot, prompt in enumerate(prompts)]
        rows = [Row(slot, []) for slot, _ in zip(slots, prompts, strict=False)]
        logits: dict[Row, torch.Tensor] = {}
        # A scheduler gives rows more of their tokens as it likes; the runner cuts that into pieces.
        while growing := [i for i, row in enumerate(rows) if len(row.tokens) < len(prompts[i])]:
            for i in data.draw(st.lists(st.sampled_from(growing), min_size=1, unique=True)):
                start = len(rows[i].tokens)
                rows[i].tokens += prompts[i][start : start + data.draw(st.integers(1, 3 * CHUNK))]
            while pending := [row for row in rows if row.cached < len(row.tokens)]:
                called = in_pieces.batch(pending)
                logits |= zip(called, in_pieces.encode(called).all_logits(), strict=True)
        expected = in_one_piece.encode(whole).all_logits()
        assert [row.cached for row in rows] == [row.cached for row in whole] == lengths
        assert_close(torch.stack([logits[row] for row in rows]), expected, atol=1e-4, label="logits [row, V]")
        for row in (*rows, *whole):
            row.tokens.append(5)
        decoded, expected = in_pieces.decode(rows).all_logits(), in_one_piece.decode(whole).all_logits()
        assert_close(decoded, expected, atol=1e-4, label="logits [row, V] of a step")
        assert [row.cached for row in rows] == [length + 1 for length in lengths]

    run()


def test_prompts_with_media_in_pieces_give_the_logits_of_transformers(tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    runner = ModelRunner(load(str(tmp_path), prefill_chunk_size=4, ctx_batch_size=1, is_continuous_batching=True))
    for slot, row in enumerate(EXAMPLE):
        prompt = Row(slot, [*row.ids], placed=runner.place(row.ids, media([row])))
        assert (prompt.placed is None) == (not media([row]))
        while prompt.cached < len(prompt.tokens):
            logits = runner.encode([prompt]).all_logits()
        assert_close(logits[0], recorded_tensors("vision-language")[1][slot, 0], atol=1e-4, label=f"row {slot}")


def test_a_call_that_fails_leaves_its_rows_as_they_were(in_pieces: ModelRunner) -> None:
    rows = [Row(1, [1, 2, 3]), Row(1, [4, 5])]
    with pytest.raises(ValueError, match=r"seq_ids=\[1, 1\]"):
        in_pieces.encode(rows)
    assert [row.cached for row in rows] == [0, 0]


def greedy_on_device(path: Path, **options: object) -> NeuronQwen35ForCausalLM:
    return load_neuron(
        path,
        seq_len=SEQ_LEN,
        batch_size=SLOTS,
        ctx_batch_size=2,
        is_continuous_batching=True,
        prefill_chunk_size=CHUNK,
        on_device_sampling_config=OnDeviceSamplingConfig(**options),
        output_logits=True,
    )


@pytest.mark.parametrize("simulated", [False, True], ids=["cpu", "device"])
def test_tokens_alone_are_the_most_likely_ones_and_the_logits_stay_on_the_device(path: Path, simulated: bool) -> None:
    model = greedy_on_device(path)
    runner = ModelRunner(put_on_simulated_device(model) if simulated else model)
    prompts = random_prompts([5, 40])
    rows = [Row(slot, [*prompt]) for slot, prompt in zip((2, 0), prompts, strict=True)]
    whole = [Row(slot, [*prompt]) for slot, prompt in zip((3, 1), prompts, strict=True)]
    for part in (rows, whole):
        while pending := [row for row in part if row.cached < len(row.tokens)]:
            runner.encode(runner.batch(pending), tokens_only=True)
        for row in part:
            row.tokens.append(7)
    before = len(host_reads(model)) if simulated else 0
    for _ in range(3):
        outputs = runner.decode(rows, tokens_only=True)
        assert outputs.logits is None and outputs.tokens is not None
        expected = runner.decode(whole)
        assert torch.equal(outputs.tokens.long(), expected.all_logits().argmax(dim=-1))
        for row, other, token in zip(rows, whole, outputs.tokens.tolist(), strict=True):
            row.tokens.append(token)
            other.tokens.append(token)
    if simulated:
        tokens, logits = torch.Size([SLOTS]), torch.Size([SLOTS, 1, model.config.vocab_size])
        assert host_reads(model)[before:] == [tokens, tokens, logits] * 3
        assert all(shape.numel() <= SLOTS for shape in host_reads(model)[:before]), "logits of prompts were read"


def test_a_device_that_draws_is_not_asked_for_the_most_likely_tokens(path: Path, backend: str) -> None:
    assert ModelRunner(greedy_on_device(path)).device_is_greedy
    assert ModelRunner(greedy_on_device(path, do_sample=True, dynamic=True)).device_is_greedy  # it gets top_k=1
    runner = ModelRunner(greedy_on_device(path, do_sample=True))
    assert not runner.device_is_greedy
    if backend == "stand-ins":  # NxDI's own draws want a device
        assert runner.encode([Row(0, [1, 2, 3])], tokens_only=True).logits is not None


@pytest.mark.parametrize("simulated", [False, True], ids=["cpu", "device"])
def test_logits_of_all_tokens_of_a_prompt_are_those_that_its_beginnings_end_with(
    path: Path, in_one_piece: ModelRunner, simulated: bool
) -> None:
    model = load_neuron(
        path,
        seq_len=SEQ_LEN,
        batch_size=SLOTS,
        ctx_batch_size=2,
        is_continuous_batching=True,
        prefill_chunk_size=CHUNK,
        output_prompt_logits=True,
    )
    runner = ModelRunner(put_on_simulated_device(model) if simulated else model)
    (prompt,) = random_prompts([2 * CHUNK + 3])
    row, pieces = Row(1, [*prompt]), []
    while row.cached < len(prompt):
        outputs = runner.encode([row])
        pieces.append(*outputs.prompt_logits)
        assert torch.equal(outputs.all_logits()[0], pieces[-1][-1])
    found = torch.cat(pieces)
    expected = [in_one_piece.encode([Row(0, prompt[: i + 1])]).all_logits()[0] for i in range(len(prompt))]
    assert_close(found, torch.stack(expected), atol=1e-4, label="logits [token, V]")
    row.tokens.append(5)
    assert runner.decode([row]).prompt_logits == ()
