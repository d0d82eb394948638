# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Inputs by name, calls padded to what was compiled, and a check that what must be float32 is."""

from __future__ import annotations

import pytest
import torch

from nxdi_cpu.model_builder import TraceError
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.submodels import ModelInputs, Qwen35ModelWrapper, require_float32
from support.models import right_padded
from support.tracing import OPTIONS, small_application, traced


def inputs_of(prompts: list[list[int]], slots: list[int]) -> ModelInputs:
    """The plain inputs of prompts from their beginning."""
    ids, mask = right_padded(prompts)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as NxDI's adapter gives them
    rows = len(prompts)
    return ModelInputs(ids, mask, positions, torch.tensor(slots), torch.ones(rows, 3), torch.empty(0), torch.empty(0))


def test_inputs_go_by_position_with_empty_tensors_between() -> None:
    inputs = inputs_of([[1, 2]], [0])
    assert len(inputs.args()) == 7 and inputs.further_args() == []
    rotary = torch.zeros(1, 1)
    args = inputs._replace(rotary_position_id=rotary).args()
    assert args[21] is rotary and len(args) == 22
    assert [tensor.numel() for tensor in args[7:21]] == [0] * 14


def test_chosen_rows_are_chosen_of_every_input_that_has_rows() -> None:
    chosen = inputs_of([[1, 2, 3], [4], [5, 6]], [2, 0, 1]).rows(torch.tensor([2, 0]))
    assert chosen.input_ids.tolist() == [[5, 6, 0], [1, 2, 3]] and chosen.seq_ids.tolist() == [1, 2]
    assert chosen.sampling_params.shape == (2, 3) and chosen.prev_hidden is not None and chosen.prev_hidden.numel() == 0


def test_a_prompt_is_padded_to_its_bucket_at_position_0() -> None:
    wrapper = small_application(**OPTIONS["buckets"]).models[0]
    assert wrapper.neuron_config.buckets == [128, 256, 512]
    padded = ModelInputs(*wrapper.pad_inputs(*inputs_of([[5], [6, 7, 8]], [0, 1]).args()))
    assert padded.input_ids.shape == padded.attention_mask.shape == padded.position_ids.shape == (2, 128)
    assert padded.position_ids[:, :4].tolist() == [[0, 0, 0, 0], [0, 1, 2, 0]] and not padded.position_ids[:, 4:].any()
    assert padded.attention_mask.sum(dim=1).tolist() == [1, 3]


@pytest.mark.parametrize(("length", "bucket"), [(127, 128), (128, 128), (129, 256), (512, 512)])
def test_a_prompt_may_fill_its_bucket_to_the_last_token(length: int, bucket: int) -> None:
    wrapper = small_application(**OPTIONS["buckets"]).models[0]
    inputs = inputs_of([[1] * length] * 2, [0, 1])
    assert ModelInputs(*wrapper.pad_inputs(*inputs.args())).input_ids.shape == (2, bucket)


@pytest.mark.parametrize(
    ("submodel", "slots", "padded_ids", "places"),
    [
        ("context_encoding_model", [2], [2], [0]),
        ("token_generation_model", [1, 3], [-1, 1, -1, 3], [1, 3]),
    ],
)
def test_rows_that_pad_a_batch_have_an_id_that_writes_nowhere(
    submodel: str, slots: list[int], padded_ids: list[int], places: list[int]
) -> None:
    (wrapper,) = (each for each in small_application(**OPTIONS["continuous"]).models if each.tag == submodel)
    padded, found = wrapper._pad_batch(inputs_of([[slot + 10] for slot in slots], slots))
    assert padded.seq_ids.tolist() == padded_ids and found.tolist() == places
    assert padded.input_ids[found].flatten().tolist() == [slot + 10 for slot in slots]


@pytest.mark.parametrize("spoil", ["a_log", "state"])
def test_a_cast_of_what_must_be_float32_is_found(spoil: str, lone_rank: None) -> None:
    _, module, _, _ = next(traced(small_application()))
    if spoil == "a_log":
        decay = module.layers[0].linear_attn.A_log
        decay.weight = torch.nn.Parameter(decay.weight.bfloat16(), requires_grad=False)
        name = r"layers\.0\.linear_attn\.A_log\.weight"
    else:
        module.kv_mgr.past_key_values[2] = torch.nn.Parameter(module.kv_mgr.past_key_values[2].bfloat16(), False)
        name = "recurrent state of layer 1"
    with pytest.raises(TypeError, match=rf"{name} is torch\.bfloat16.*cast_type='as-declared'"):
        require_float32(module)


@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's own compile needs the compiler")
def test_two_programs_that_a_loaded_model_could_not_tell_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen35ModelWrapper, "_mark", lambda _, inputs: inputs)
    app = small_application(**OPTIONS["prompts in chunks"])
    message = r"continuation_model, bucket 0: inputs of the shapes of context_encoding_model, bucket 0: only"
    with pytest.raises(TraceError, match=message):
        app.get_builder().trace()
