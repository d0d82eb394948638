# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts that are encoded in chunks, carrying state, conv inputs and keys: the same as in one piece.

The oracle for text is transformers on the whole prompt; for the way it is cut, the same model in one piece. Tolerance:
1e-4 on float32 logits of order one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwen35 import NeuronQwen35ForCausalLM, OnDeviceSamplingConfig, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.layers import attention
from qwen35.modeling_qwen35_vl import PlacedMedia
from support.compare import assert_close
from support.decoder_cases import CASES, STEPS, recorded, recorded_tensors
from support.models import load_neuron, neuron_greedy, random_prompts, right_padded, save_checkpoint
from support.vl_cases import EXAMPLE, IMAGE, START, Row, load, media, save_vl_checkpoint
from support.vl_cases import greedy as vl_greedy

pytestmark = pytest.mark.usefixtures("backend")

WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
SEQ_LEN = 256


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, seed=1)
    return path


@pytest.mark.parametrize(
    "options",
    [
        dict(prefill_chunk_size=16),
        dict(prefill_chunk_size=16, enable_bucketing=True, token_generation_buckets=[24, 64, 160]),
        dict(prefill_chunk_size=16, ctx_batch_size=1, is_continuous_batching=True),
        dict(prefill_chunk_size=32, ctx_batch_size=2, is_continuous_batching=True),
        dict(prefill_chunk_size=16, on_device_sampling_config=OnDeviceSamplingConfig(), output_logits=True),
    ],
    ids=["one bucket", "buckets", "one prompt at a time", "two prompts at a time", "sampled tokens and logits"],
)
def test_a_ragged_batch_in_chunks_generates_what_transformers_generates(options: dict[str, Any], path: Path) -> None:
    case = CASES[1]  # its longest prompt has 40 tokens
    tokens, logits = neuron_greedy(load_neuron(path, seq_len=160, batch_size=4, **options), case.prompts(), STEPS)
    expected_tokens, expected_logits = recorded(case)
    assert_close(logits, expected_logits, atol=1e-4, label="logits")
    assert torch.equal(tokens, expected_tokens)


def greedy_on_rank(path: str, prompts: list[list[int]], options: dict[str, Any]) -> Any:
    return neuron_greedy(load_neuron(Path(path), **options), prompts, STEPS)


def test_two_ranks_encode_in_chunks_too(path: Path, rank_pool: Callable[[int], Any]) -> None:
    options = dict(seq_len=160, batch_size=4, prefill_chunk_size=16, tp_degree=2)
    for tokens, _ in rank_pool(2).call(greedy_on_rank, str(path), CASES[1].prompts(), options):
        assert torch.equal(tokens, recorded(CASES[1])[0])


@pytest.fixture(scope="module")
def in_one_piece(path: Path) -> Any:
    return load_neuron(path, batch_size=3, seq_len=SEQ_LEN)


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_any_split_of_any_batch_is_the_same_as_one_piece(
    chunk: int, path: Path, in_one_piece: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "PRIOR_SCORES", 24 * max(chunk, 2))  # the cache in eleven blocks
    model = load_neuron(path, batch_size=3, seq_len=SEQ_LEN, prefill_chunk_size=max(chunk, 2))

    @settings(max_examples=8, phases=WITHOUT_SHRINKING)
    @given(st.lists(st.integers(1, min(6 * chunk + 40, SEQ_LEN - 3)), min_size=1, max_size=3), st.integers(0, 2**16))
    def run(lengths: list[int], seed: int) -> None:
        prompts = random_prompts(lengths, seed=seed)
        tokens, logits = neuron_greedy(model, prompts, 3)
        expected_tokens, expected_logits = neuron_greedy(in_one_piece, prompts, 3)
        assert_close(logits, expected_logits, atol=1e-4, label="logits")
        assert torch.equal(tokens, expected_tokens)

    run()


CUT = (([2, 0], [5, 16]), ([1], [16]), ([0, 2], [3, 16]), ([1, 2, 0], [7, 16, 16]), ([0], [15]))


def last_logits_of_pieces(
    model: NeuronQwen35ForCausalLM, prompts: list[list[int]], calls: Sequence[tuple[list[int], list[int]]]
) -> dict[int, torch.Tensor]:
    """The request engine's way: each call gives the next tokens of the rows it likes, of different cached lengths."""
    done = [0] * len(prompts)
    logits: dict[int, torch.Tensor] = {}
    for rows, sizes in calls:
        pieces = [prompts[row][done[row] : done[row] + size] for row, size in zip(rows, sizes, strict=True)]
        ids, mask = right_padded(pieces)
        starts = torch.tensor([done[row] for row in rows]).unsqueeze(1)
        positions = torch.where(mask > 0, starts + torch.arange(ids.shape[1]), 0)
        if any(done[row] for row in rows):
            mask = (torch.arange(int(starts.max())) < starts).long()
        outputs = model(ids, torch.tensor(rows), mask, positions).logits[:, -1]
        for i, row in enumerate(rows):
            done[row] += len(pieces[i])
            logits[row] = outputs[i]
    assert done == [len(prompt) for prompt in prompts]
    return logits


def test_the_caller_may_cut_a_prompt_anywhere(path: Path, in_one_piece: Any) -> None:
    prompts = random_prompts([50, 23, 37], seed=4)
    expected = neuron_greedy(in_one_piece, prompts, 1)[1][:, 0]
    model = load_neuron(path, batch_size=3, seq_len=SEQ_LEN, prefill_chunk_size=16, is_continuous_batching=True)
    for row, logits in last_logits_of_pieces(model, prompts, CUT).items():
        assert_close(logits, expected[row], atol=1e-4, label=f"row {row}")


def test_a_prompt_may_fill_the_context_to_the_last_token(path: Path) -> None:
    prompts = random_prompts([96], seed=6)
    expected = neuron_greedy(load_neuron(path, seq_len=96), prompts, 1)[1]
    logits = neuron_greedy(load_neuron(path, seq_len=96, prefill_chunk_size=64), prompts, 1)[1]
    assert_close(logits, expected, atol=1e-4, label="logits")


@pytest.mark.parametrize("chunk", [4, 16])
def test_images_and_video_are_encoded_in_chunks(chunk: int, tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    tokens, logits = vl_greedy(load(str(tmp_path), prefill_chunk_size=chunk), EXAMPLE, STEPS)
    expected_tokens, expected_logits = recorded_tensors("vision-language")
    assert_close(logits, expected_logits, atol=1e-4, label="logits")
    assert torch.equal(tokens, expected_tokens)


def test_the_caller_may_cut_prompts_of_text_where_images_are_possible(tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    prompts = random_prompts([50, 23, 37], seed=4)
    expected = neuron_greedy(load(str(tmp_path)), prompts, 1)[1][:, 0]
    model = load(str(tmp_path), prefill_chunk_size=16, is_continuous_batching=True)
    for row, logits in last_logits_of_pieces(model, prompts, CUT).items():
        assert_close(logits, expected[row], atol=1e-4, label=f"row {row}")


def test_the_caller_may_cut_prompts_with_images(tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    model = load(str(tmp_path), prefill_chunk_size=8, is_continuous_batching=True)
    rows, prompts = torch.tensor([2, 0]), [EXAMPLE[2], EXAMPLE[0]]
    ids = [torch.tensor([prompt.ids]) for prompt in prompts]
    placed = [model.place(row, **media([prompt])) for row, prompt in zip(ids, prompts, strict=True)]

    def take(which: list[int], start: int, sizes: list[int], **given: Any) -> torch.Tensor:
        tokens, mask = right_padded([ids[i][0, start : start + n].tolist() for i, n in zip(which, sizes, strict=True)])
        positions = torch.where(mask > 0, start + torch.arange(tokens.shape[1]), 0)
        cached = mask.new_ones(len(which), start) if start else mask
        return model(tokens, rows[which], cached, positions, **given).logits[:, -1]

    def columns(which: list[int], start: int, width: int) -> PlacedMedia:
        return PlacedMedia.stack([placed[i].columns(start, width) for i in which])

    take([0, 1], 0, [8, 8], placed=columns([0, 1], 0, 8))
    with pytest.raises(ValueError, match=r"seq_ids=\[2\] hold prompts with images, and placed is None"):
        take([0], 8, [8])
    expected = recorded_tensors("vision-language")[1][:, 0]
    logits = take([0, 1], 8, [8, 6], placed=columns([0, 1], 8, 8))
    assert_close(logits[1], expected[0], atol=1e-4, label="row 0")
    logits = take([0], 16, [2], placed=columns([0], 16, 2))
    assert_close(logits[0], expected[2], atol=1e-4, label="row 2")


def test_an_image_may_end_in_a_chunk_of_one_token(tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    rows = [Row([3, START, *[IMAGE] * 7], images=[(1, 4, 6), (1, 2, 2)])]  # nine tokens in chunks of four
    tokens, logits = vl_greedy(load(str(tmp_path), prefill_chunk_size=4), rows, 2)
    expected_tokens, expected_logits = vl_greedy(load(str(tmp_path)), rows, 2)
    assert_close(logits, expected_logits, atol=1e-4, label="logits")
    assert torch.equal(tokens, expected_tokens)


def test_a_prompt_longer_than_the_context_is_refused_before_its_first_chunk(path: Path) -> None:
    model = load_neuron(path, seq_len=96, prefill_chunk_size=64)
    with pytest.raises(ValueError, match=r"prompt of 97 tokens with 1 new ones exceeds seq_len=96"):
        neuron_greedy(model, random_prompts([97]), 1)
    state = model.models[0].model.kv_mgr.past_key_values
    assert not any(entry.any() for entry in state)


@pytest.mark.parametrize("lengths", [[40, 40], [40, 30]], ids=["even", "ragged"])
def test_a_continuation_longer_than_a_chunk_is_refused(lengths: list[int], path: Path) -> None:
    model = load_neuron(path, batch_size=2, seq_len=SEQ_LEN, prefill_chunk_size=16)
    prompts = random_prompts(lengths, seed=4)
    with pytest.raises(ValueError, match=r"32 tokens continue prompts and exceed prefill_chunk_size=16"):
        last_logits_of_pieces(model, prompts, (([0, 1], [8, 8]), ([0, 1], [n - 8 for n in lengths])))


def test_a_chunk_size_bounds_the_buckets_of_prompts(path: Path) -> None:
    neuron_config = Qwen35NeuronConfig(seq_len=1024, prefill_chunk_size=256, enable_bucketing=True)
    config = Qwen35InferenceConfig.from_pretrained(path, neuron_config=neuron_config)
    assert config.neuron_config.max_context_length == config.prefill_chunk_size == 256
    assert type(config).from_json_string(config.to_json_string()).prefill_chunk_size == 256
    prompts, decoding, continuation = (
        wrapper.neuron_config.buckets for wrapper in NeuronQwen35ForCausalLM(path, config).models
    )
    assert prompts == [128, 256] and decoding == [128, 256, 512, 1024]
    assert continuation == [256, 512, 1024], "a chunk or more is cached"


def test_a_continuation_without_a_chunk_size_is_an_error_that_names_it(in_one_piece: Any) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"no continuation_model: position_ids .*prefill_chunk_size"):
        in_one_piece(ids, torch.tensor([0]), torch.ones(1, 4, dtype=torch.long), torch.tensor([[4, 5, 6]]))
