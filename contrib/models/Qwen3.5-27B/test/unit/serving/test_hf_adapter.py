# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""transformers' generate over our model: padding, numbers of rows, copies and media as transformers has them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, TextStreamer

from qwen35 import HuggingFaceGenerationAdapter, NeuronQwen35ForCausalLM
from support.models import load_neuron, random_prompts
from support.oracle import reference_greedy, save_reference, transformers_model, vl_reference_greedy
from support.vl_cases import EXAMPLE, load, media, options, save_vl_checkpoint

STEPS, SEQ_LEN, SLOTS = 6, 64, 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_reference(path, seed=3)
    return path


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    return transformers_model(path)


@pytest.fixture(scope="module")
def model(path: Path) -> NeuronQwen35ForCausalLM:
    return load_neuron(path, batch_size=SLOTS, seq_len=SEQ_LEN)


def padded(prompts: list[list[int]], sides: list[str], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask with padding of 7, a real id, on the side named for each row."""
    length = max(map(len, prompts)) + extra
    ids, mask = [], []
    for prompt, side in zip(prompts, sides, strict=True):
        blank = [7] * (length - len(prompt))
        ids.append(blank + prompt if side == "left" else prompt + blank)
        mask.append([0] * len(blank) + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * len(blank))
    return torch.tensor(ids), torch.tensor(mask)


def greedy(**more: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=STEPS, pad_token_id=0, eos_token_id=None, **more)


@pytest.mark.parametrize("chunk", [None, 8])
def test_rows_padded_on_either_side_give_what_they_give_alone(chunk: int | None, path: Path, reference: Any) -> None:
    adapter = HuggingFaceGenerationAdapter(
        load_neuron(path, batch_size=SLOTS, seq_len=SEQ_LEN, prefill_chunk_size=chunk)
    )

    @settings(max_examples=15)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=2 * SLOTS))
        prompts = random_prompts(lengths, seed=data.draw(st.integers(0, 99)))
        sides = data.draw(st.lists(st.sampled_from(("left", "right")), min_size=len(lengths), max_size=len(lengths)))
        ids, mask = padded(prompts, sides, data.draw(st.integers(0, 3)))
        output = adapter.generate(ids, attention_mask=mask, generation_config=greedy())
        assert torch.equal(output[:, : ids.shape[1]], ids)
        assert torch.equal(output[:, ids.shape[1] :], reference_greedy(reference, prompts, STEPS)[0])

    run()


@pytest.mark.parametrize("positions", ["counted from the first token", "counted over the columns"])
def test_a_left_padded_call_of_the_model_gives_the_logits_of_a_right_padded_one(
    positions: str, model: NeuronQwen35ForCausalLM
) -> None:
    prompts = random_prompts([3, 9, 5])
    (left, left_mask), (right, right_mask) = padded(prompts, ["left"] * 3), padded(prompts, ["right"] * 3)
    counted = (left_mask.cumsum(1) - 1).masked_fill(left_mask == 0, 1)
    columns = torch.arange(left.shape[1]).repeat(3, 1)
    expected = model(right, attention_mask=right_mask, position_ids=columns).logits
    given_positions = counted if positions == "counted from the first token" else columns
    assert torch.equal(model(left, attention_mask=left_mask, position_ids=given_positions).logits, expected)


@pytest.mark.parametrize(
    ("row", "what"), [([1, 0, 1], "has zeros between its tokens"), ([0, 0, 0], "has no token")], ids=["hole", "empty"]
)
def test_a_mask_that_is_no_padding_is_refused(row: list[int], what: str, model: NeuronQwen35ForCausalLM) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=f"attention_mask {what} in row 1"):
        HuggingFaceGenerationAdapter(model).generate(
            ids, attention_mask=torch.tensor([[1, 1, 1], row]), generation_config=greedy()
        )


def test_more_rows_than_slots_in_a_call_of_the_model_are_refused(model: NeuronQwen35ForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"seq_ids=\[0, 1, 2, 3\].*raise kv_cache_batch_size=3"):
        model(torch.ones(4, 2, dtype=torch.long), position_ids=torch.arange(2).repeat(4, 1))


def test_a_group_that_ends_earlier_is_padded_like_a_row_that_does(
    model: NeuronQwen35ForCausalLM, reference: Any
) -> None:
    prompts = random_prompts([4] * 4, seed=8)
    alone, _ = reference_greedy(reference, prompts, STEPS)
    eos = int(alone[3, 1])  # of the second group; the first has the row that goes on longest
    output = HuggingFaceGenerationAdapter(model).generate(
        torch.tensor(prompts),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=STEPS, pad_token_id=0, eos_token_id=eos),
    )
    for tokens, row in zip(alone.tolist(), output[:, 4:].tolist(), strict=True):
        end = tokens.index(eos) + 1 if eos in tokens else STEPS
        assert row == tokens[:end] + [0] * (len(row) - end)


def test_copies_of_a_row_come_next_to_it(model: NeuronQwen35ForCausalLM, reference: Any) -> None:
    prompts = random_prompts([4, 4], seed=2)
    output = HuggingFaceGenerationAdapter(model).generate(
        torch.tensor(prompts),
        do_sample=True,
        top_k=1,
        num_return_sequences=2,
        max_new_tokens=STEPS,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(output[:, 4:], reference_greedy(reference, prompts, STEPS)[0].repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_beams=2), "beam_search needs"),
        (dict(num_beams=2, do_sample=True), "beam_sample needs"),
        (dict(prompt_lookup_num_tokens=2), "assisted_generation needs"),
        (dict(guidance_scale=1.5), "guidance_scale=1.5"),
        (dict(return_dict_in_generate=True, output_hidden_states=True), "output_hidden_states=True"),
        (dict(return_dict_in_generate=True, output_attentions=True), "output_attentions=True"),
        (dict(max_new_tokens=SEQ_LEN), f"prompt of 5 tokens with {SEQ_LEN} new ones exceeds seq_len={SEQ_LEN}"),
        (dict(max_new_tokens=None, max_length=SEQ_LEN + 2), f"with {SEQ_LEN - 3} new ones exceeds seq_len={SEQ_LEN}"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("as_config", [True, False])
def test_what_cannot_be_right_is_refused_before_anything_runs(
    given: dict[str, Any], message: str, as_config: bool, path: Path
) -> None:
    model = load_neuron(path, batch_size=SLOTS, seq_len=SEQ_LEN)
    ids = torch.tensor(random_prompts([5]))
    chosen = {"max_new_tokens": 4, "pad_token_id": 0, **given}
    with pytest.raises(ValueError, match=message):
        if as_config:
            HuggingFaceGenerationAdapter(model).generate(ids, generation_config=GenerationConfig(**chosen))
        else:
            HuggingFaceGenerationAdapter(model).generate(ids, **chosen)
    assert not any(entry.any() for entries in model.cache_entries() for entry in entries)


@pytest.mark.parametrize("as_config", [True, False])
def test_without_a_length_20_new_tokens_must_fit(as_config: bool, path: Path) -> None:
    model = load_neuron(path, batch_size=SLOTS, seq_len=SEQ_LEN)
    adapter = HuggingFaceGenerationAdapter(model)
    plain: dict[str, Any] = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    chosen = {"generation_config": GenerationConfig(**plain)} if as_config else plain
    longest = SEQ_LEN - 19  # the last new token is not taken in
    for length in (longest + 1, SEQ_LEN):
        with pytest.raises(ValueError, match=f"prompt of {length} tokens with 20 new ones exceeds seq_len={SEQ_LEN}"):
            adapter.generate(torch.tensor(random_prompts([length])), **chosen)
    assert not any(entry.any() for entries in model.cache_entries() for entry in entries)
    assert adapter.generate(torch.tensor(random_prompts([longest])), **chosen).shape == (1, longest + 20)


def test_an_answer_may_fill_the_context_to_the_last_token(model: NeuronQwen35ForCausalLM) -> None:
    ids, mask = padded(random_prompts([5, 40]), ["left", "right"])
    output = HuggingFaceGenerationAdapter(model).generate(
        ids, attention_mask=mask, max_new_tokens=SEQ_LEN - 39, eos_token_id=None, pad_token_id=0, do_sample=False
    )
    assert output.shape == (2, SEQ_LEN + 1)


def test_nobody_is_told_to_pad_on_the_left(model: NeuronQwen35ForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    logger = logging.getLogger("transformers.generation.utils")
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.addHandler(caplog.handler)
        HuggingFaceGenerationAdapter(model).generate(ids, attention_mask=mask, generation_config=greedy())
        logger.removeHandler(caplog.handler)
    assert "padding" not in caplog.text


def test_a_streamer_gets_the_prompt_and_each_token(model: NeuronQwen35ForCausalLM) -> None:
    class Recorder(TextStreamer):
        def __init__(self) -> None:
            self.got: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.flatten().tolist())

        def end(self) -> None:
            self.got.append([])

    recorder, ids = Recorder(), torch.tensor(random_prompts([5]))
    output = HuggingFaceGenerationAdapter(model).generate(ids, generation_config=greedy(), streamer=recorder)
    assert recorder.got == [ids[0].tolist(), *([token] for token in output[0, 5:].tolist()), []]


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1, 0, 0, 2, 1, 1]], ids=["fewer than slots", "more than slots"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_images_padded_on_either_side_equal_transformers(rows: list[int], side: str, tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    model, reference = load(str(tmp_path)), transformers_model(tmp_path)
    chosen = [EXAMPLE[i % len(EXAMPLE)] for i in rows]
    ids, mask = padded([row.ids for row in chosen], [side] * len(chosen))
    config = options(4)
    config.return_dict_in_generate = config.output_logits = False
    tokens = HuggingFaceGenerationAdapter(model).generate(
        ids, attention_mask=mask, generation_config=config, **media(chosen)
    )[:, ids.shape[1] :]
    for row, answer in zip(chosen, tokens, strict=True):
        assert torch.equal(answer, vl_reference_greedy(reference, row, 4)[0])


@pytest.mark.parametrize("chunk", [None, 8])
def test_logits_that_are_no_numbers_name_their_prompt_and_leave_nothing_behind(
    chunk: int | None, tmp_path: Path
) -> None:
    save_vl_checkpoint(tmp_path)
    model = load(str(tmp_path), prefill_chunk_size=chunk)
    adapter = HuggingFaceGenerationAdapter(model)
    short = torch.tensor([[3, 4, 5]])
    clean = adapter.generate(short, generation_config=greedy())
    chosen = [EXAMPLE[1]] * 4 + [EXAMPLE[0]]  # in the second group
    ids, mask = padded([row.ids for row in chosen], ["right"] * 5)
    inputs = media(chosen)
    inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
    with pytest.raises(ValueError, match="prompt 4: 160 of 160 logits are nan or infinite"):
        adapter.generate(ids, attention_mask=mask, generation_config=greedy(), **inputs)
    for entries in model.cache_entries():
        for slot in range(2):
            assert not any(view.any() for views in model.cache_layout.slot(entries, slot) for view in views)
    for rows in (1, 2, 3):
        again = adapter.generate(short.repeat(rows, 1), generation_config=greedy())
        assert torch.equal(again, clean.repeat(rows, 1))


def test_tokens_that_transformers_rules_out_are_no_failure(model: NeuronQwen35ForCausalLM) -> None:
    output = HuggingFaceGenerationAdapter(model).generate(
        torch.tensor([[3, 4, 5]]), generation_config=greedy(bad_words_ids=[[9]], suppress_tokens=[8])
    )
    assert output.shape == (1, 3 + STEPS)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_in_the_slots(error: type[BaseException], model: NeuronQwen35ForCausalLM) -> None:
    def fail(row: int, ids: torch.Tensor) -> list[int]:
        raise error

    with pytest.raises(error):
        HuggingFaceGenerationAdapter(model).generate(
            torch.tensor(random_prompts([4] * SLOTS)), generation_config=greedy(), prefix_allowed_tokens_fn=fail
        )
    layout = model.cache_layout
    for entries in model.cache_entries():
        for slot in range(SLOTS):
            assert not any(view.any() for views in layout.slot(entries, slot) for view in views)


@pytest.mark.parametrize("rows", [2, SLOTS, 2 * SLOTS + 1])
@pytest.mark.parametrize("copies", [1, 2])
def test_allowed_tokens_are_asked_for_with_the_number_of_the_row(
    rows: int, copies: int, model: NeuronQwen35ForCausalLM
) -> None:
    output = HuggingFaceGenerationAdapter(model).generate(
        torch.full((rows, 3), 5),
        do_sample=True,
        num_return_sequences=copies,
        max_new_tokens=1,
        prefix_allowed_tokens_fn=lambda row, ids: [10 + row],
    )
    assert output[:, 3].tolist() == [10 + row for row in range(rows * copies)]


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
def test_what_may_count_rows_is_refused_for_more_rows_than_slots(name: str, model: NeuronQwen35ForCausalLM) -> None:
    calls = []

    def spy(input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        calls.append(len(input_ids))
        return scores if name == "logits_processor" else torch.zeros(len(input_ids), dtype=torch.bool)

    adapter = HuggingFaceGenerationAdapter(model)
    given: dict[str, Any] = {"generation_config": greedy(), name: [spy]}
    with pytest.raises(ValueError, match=f"{name} of {SLOTS + 1} sequences.*pass fewer rows"):
        adapter.generate(torch.full((SLOTS + 1, 3), 5), **given)
    assert not calls
    adapter.generate(torch.full((SLOTS, 3), 5), **given)
    assert calls == [SLOTS] * STEPS


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(inputs=IDS, input_ids=IDS), "inputs and input_ids are both given.*pass one of them"),
        (dict(), "input_ids is None: give token ids"),
        (dict(inputs=[[1, 2]]), "input_ids is of type list: pass a tensor of integers"),
        (dict(inputs=IDS[0]), r"input_ids is a tensor \[3\] of int64: pass"),
        (dict(inputs=IDS.float()), r"input_ids is a tensor \[2, 3\] of float32: pass"),
        (dict(inputs=IDS.bool()), r"input_ids is a tensor \[2, 3\] of bool: pass"),
        (dict(inputs=IDS[:0]), r"input_ids is a tensor \[0, 3\] of int64: pass .* at least one row and token"),
        (dict(inputs=IDS[:, :0]), r"input_ids is a tensor \[2, 0\] of int64: pass .* at least one row and token"),
        (dict(inputs=IDS, attention_mask=[[1] * 3] * 2), r"attention_mask is of type list: pass a tensor \[2, 3\]"),
        (dict(inputs=IDS, attention_mask=torch.ones(1, 3)), r"attention_mask is a tensor \[1, 3\] of float32: pass"),
        (dict(inputs=IDS, attention_mask=torch.ones(2, 1, 1, 3)), r"attention_mask is a tensor \[2, 1, 1, 3\]"),
        (dict(inputs=IDS, attention_mask=torch.full((2, 3), 2)), "attention_mask has values other than 0 and 1: set"),
        (
            dict(inputs=IDS, attention_mask=torch.full((2, 3), torch.nan)),
            "attention_mask has values other than 0 and 1",
        ),
        (dict(inputs=IDS, pixel_values=torch.ones(4, 96)), "pixel_values is given to a model of text: load"),
    ],
)
def test_inputs_that_are_no_batch_are_refused_in_one_line(
    given: dict[str, Any], message: str, model: NeuronQwen35ForCausalLM
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        HuggingFaceGenerationAdapter(model).generate(generation_config=greedy(), **given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_may_be_of_any_dtype(dtype: torch.dtype, model: NeuronQwen35ForCausalLM) -> None:
    ids, mask = padded(random_prompts([3, 9, 5, 1]), ["left", "right", "left", "right"])
    adapter = HuggingFaceGenerationAdapter(model)
    expected = adapter.generate(ids, attention_mask=mask, generation_config=greedy())
    assert torch.equal(adapter.generate(ids, attention_mask=mask.to(dtype), generation_config=greedy()), expected)


@pytest.mark.parametrize("rows", [3, 5], ids=["fewer than slots", "more than slots"])
def test_media_that_do_not_belong_together_are_refused(rows: int, tmp_path: Path) -> None:
    save_vl_checkpoint(tmp_path)
    model = load(str(tmp_path))
    chosen = [EXAMPLE[i % len(EXAMPLE)] for i in range(rows)]
    ids, mask = padded([row.ids for row in chosen], ["left"] * rows)
    whole = media(chosen)
    for change, message in (
        ({"pixel_values": None}, "only image_grid_thw of pixel_values and image_grid_thw is given"),
        ({"image_grid_thw": None}, "only pixel_values of pixel_values and image_grid_thw is given"),
        ({"pixel_values_videos": None}, "only video_grid_thw of"),
        ({"video_grid_thw": None}, "only pixel_values_videos of"),
        ({"image_grid_thw": whole["image_grid_thw"].float()}, r"image_grid_thw is a tensor \[\d, 3\] of float32: pass"),
        ({"image_grid_thw": whole["image_grid_thw"].flatten()}, r"image_grid_thw is a tensor \[\d+\] of int64: pass"),
        ({"image_grid_thw": whole["image_grid_thw"].tolist()}, "image_grid_thw is a list: pass the tensor"),
        ({"pixel_values": whole["pixel_values"][:-1]}, r"pixel_values has shape \[\d+, 96\], grid_thw and"),
    ):
        inputs = {**whole, **change}
        with pytest.raises(ValueError, match=message):
            HuggingFaceGenerationAdapter(model).generate(ids, attention_mask=mask, generation_config=greedy(), **inputs)
        assert not any(entry.any() for entries in model.cache_entries() for entry in entries)
