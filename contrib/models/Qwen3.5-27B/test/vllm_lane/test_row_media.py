# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A row gets the embeddings and positions that the model itself places, piece by piece, and an item is encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from qwen35 import NeuronQwen35VLForCausalLM
from qwen35.serving.runner import Row
from qwen35_vllm.request_rows import ScheduledRequest
from qwen35_vllm.row_media import MediaEncoder, RowMedia
from support import vl_cases
from support.vl_cases import EXAMPLE, batches, media

pytestmark = pytest.mark.vllm

# Embeddings are of order one; encoded alone, their sums may be rounded otherwise than in a batch.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NeuronQwen35VLForCausalLM:
    path = tmp_path_factory.mktemp("vl") / "checkpoint"
    vl_cases.save_vl_checkpoint(path)
    return vl_cases.load(str(path))


def features_of(row: vl_cases.Row, name: str = "") -> list[MultiModalFeatureSpec]:
    """The items of a row as vLLM hands them over: of a video one placeholder from its first token to its last."""
    found = []
    for modality, grids, token, offset, suffix in (
        ("image", row.images, vl_cases.IMAGE, 0, ""),
        ("video", row.videos, vl_cases.VIDEO, 1, "_videos"),
    ):
        if not grids:
            continue
        names = f"pixel_values{suffix}", f"{modality}_grid_thw"
        grid = torch.tensor(grids)
        fields: Mapping[str, Any] = {
            names[0]: MultiModalFieldConfig.flat_from_sizes(modality, grid.prod(dim=1)),
            names[1]: MultiModalFieldConfig.batched(modality),
        }
        inputs: Any = {names[0]: row.pixels(grids, offset), names[1]: grid}
        here = torch.tensor([i for i, own in enumerate(row.ids) if own == token])
        sizes = (grid.prod(dim=1) // 4).tolist()
        items = MultiModalKwargsItems.from_hf_inputs(inputs, fields)[modality]
        for i, (item, own) in enumerate(zip(items, here.split(sizes), strict=True)):
            first, length = int(own[0]), int(own[-1] - own[0]) + 1
            is_embed = torch.zeros(length, dtype=torch.bool)
            is_embed[own - first] = True
            place = PlaceholderRange(first, length, None if is_embed.all() else is_embed)
            found.append(MultiModalFeatureSpec(item, modality, f"{name}{modality}{i}", place))
    return found


def request_of(
    row: vl_cases.Row, features: Sequence[MultiModalFeatureSpec], answered: Sequence[int] = ()
) -> ScheduledRequest:
    state = CachedRequestState(
        req_id="a",
        prompt_token_ids=row.ids,
        mm_features=[*features],
        sampling_params=SamplingParams(),
        generator=None,
        block_ids=([1],),
        num_computed_tokens=0,
        output_token_ids=[*answered],
    )
    return ScheduledRequest(state, Row(0, [*row.ids, *answered]), prompt_end=len(row.ids) + len(answered))


@contextmanager
def counted(model: NeuronQwen35VLForCausalLM) -> Iterator[list[list[int]]]:
    """The grids that the encoder is called with."""
    calls: list[list[int]] = []
    encode = model.vision.forward

    def record(pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        calls.extend(grids.tolist())
        return encode(pixels, grids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.vision, "forward", record)
        yield calls


@settings(max_examples=40, deadline=None)
@given(rows=batches(), chunk=st.integers(1, 24), answered=st.integers(0, 5))
def test_each_piece_has_the_columns_that_the_model_places(
    model: NeuronQwen35VLForCausalLM, rows: list[vl_cases.Row], chunk: int, answered: int
) -> None:
    for row in rows:
        if not (features := features_of(row)):
            continue
        placed = model.place(torch.tensor([row.ids]), **media([row]))
        request, encoder = request_of(row, features, [vl_cases.IMAGE] * answered), MediaEncoder(model)
        whole = len(row.ids) + answered
        while request.slot_row.cached < whole:
            start = request.slot_row.cached
            request.granted = min(start + chunk, whole)
            encoder.place(request, ())
            assert request.slot_row.placed is not None
            found = request.slot_row.placed.columns(start, chunk)
            expected = placed.columns(min(start, len(row.ids)), chunk)
            own = max(0, min(chunk, len(row.ids) - start))
            assert torch.equal(found.positions[:, :, :own], expected.positions[:, :, :own])
            assert torch.equal(found.mask[:, :own], expected.mask[:, :own]) and not found.mask[:, own:].any()
            torch.testing.assert_close(found.embeddings[:, :own], expected.embeddings[:, :own], **CLOSE)
            more = torch.arange(start + own, request.granted) + int(placed.rope_deltas)
            assert torch.equal(found.positions[0, :, own : request.granted - start], more.expand(3, -1))
            request.slot_row.cached = request.granted
        assert request.slot_row.rope_delta == int(placed.rope_deltas)


def test_pieces_of_several_rows_are_one_batch_for_the_model(model: NeuronQwen35VLForCausalLM) -> None:
    found = []
    for row in (EXAMPLE[0], EXAMPLE[2]):
        request = request_of(row, features_of(row))
        request.granted = len(row.ids)
        MediaEncoder(model).place(request, ())
        assert request.slot_row.placed is not None
        found.append(request.slot_row.placed.columns(0, 20))
    stacked = type(found[0]).stack(found)
    assert stacked.positions.shape == (2, 3, 20) and stacked.embeddings.shape == (2, 20, model.config.hidden_size)


def test_equal_items_are_encoded_once_until_they_are_dropped(model: NeuronQwen35VLForCausalLM) -> None:
    row, encoder = EXAMPLE[0], MediaEncoder(model)
    features = features_of(row)
    with counted(model) as calls:
        for _ in range(3):
            request = request_of(row, features)
            request.granted = len(row.ids)
            encoder.place(request, range(2))
        assert calls == [[1, 4, 6], [1, 2, 2]]
        encoder.drop(["image0", "never kept"])
        encoder.place(request, ())  # it holds what it was given
        assert len(calls) == 2
        again = request_of(row, features)
        again.granted = len(row.ids)
        encoder.place(again, [0])
        assert calls[2:] == [[1, 4, 6]]


def test_an_item_is_encoded_when_it_is_scheduled_and_held_until_it_is_passed(model: NeuronQwen35VLForCausalLM) -> None:
    row, encoder = EXAMPLE[0], MediaEncoder(model)
    request = request_of(row, features_of(row))
    with counted(model) as calls:
        request.granted = 1
        encoder.place(request, ())
        assert calls == []
        request.granted = 3
        encoder.place(request, [0])
        assert calls == [[1, 4, 6]]
        encoder.drop(["image0"])  # as soon as the scheduler has given all its tokens
        request.granted = len(row.ids)
        encoder.place(request, [1])
    media = request.slot_row.placed
    assert isinstance(media, RowMedia) and [item.embeddings is None for item in media.items] == [False, False]
    request.slot_row.cached = 8
    encoder.place(request, ())
    assert [item.embeddings is None for item in media.items] == [True, False]


def test_an_item_that_failed_is_tried_again(model: NeuronQwen35VLForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    row, encoder = EXAMPLE[0], MediaEncoder(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.vision, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            encoder.place(request_of(row, features_of(row)), [0])
    request = request_of(row, features_of(row))
    request.granted = len(row.ids)
    encoder.place(request, ())  # to the scheduler it is there


def test_only_what_is_scheduled_is_kept(model: NeuronQwen35VLForCausalLM) -> None:
    """A row that is restored with less than planned needs items that the scheduler has passed, and never drops."""
    row, encoder = EXAMPLE[0], MediaEncoder(model)
    request = request_of(row, features_of(row))
    request.granted = len(row.ids)
    with counted(model) as calls:
        encoder.place(request, [1])
        assert calls == [[1, 2, 2], [1, 4, 6]]
    assert [*encoder._kept] == ["image1"]
    media = request.slot_row.placed
    assert isinstance(media, RowMedia) and all(item.embeddings is not None for item in media.items)


def test_placeholders_that_are_not_those_of_the_grids_are_told(model: NeuronQwen35VLForCausalLM) -> None:
    row = EXAMPLE[0]
    with pytest.raises(ValueError, match="frames more than input_ids have runs"):
        RowMedia(model, [1, 2, 3], 0, features_of(row))
    short = vl_cases.Row([*row.ids[:2], *row.ids[3:]], images=row.images, seed=row.seed)
    with pytest.raises(ValueError, match="5 image placeholders at token 2, its grid makes 6 tokens"):
        RowMedia(model, short.ids, 0, features_of(row))
