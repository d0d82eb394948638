# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and videos of the rows: each is encoded once, on the host, and placed where its tokens are.

vLLM's scheduler plans with an encoder cache: it says in which step an item is to be encoded, before the first of its
tokens is given, and which items may be dropped. Requests with equal items, by vLLM's identifiers, share one encoding.
A row encodes its prompt in pieces, which may be later than its tokens are given; so it holds what it was given until it
is encoded, whether or not the cache drops it.

Letters: S tokens of a piece, F tokens of an item, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwen35.modeling_qwen35_vl import NeuronQwen35VLForCausalLM, PlacedMedia
from qwen35.vision.rope_index import get_rope_index

from .request_rows import ScheduledRequest

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

_FIELDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
"""By modality, the names of pixels and grid in what `media_processor` gave."""


@dataclass
class _Item:
    """An image or a video of a row.

    Args:
        feature: what vLLM has of it.
        tokens: [F] the indices of its tokens in the prompt, ascending.
        embeddings: [F, D], once it is encoded.
    """

    feature: MultiModalFeatureSpec
    tokens: torch.Tensor
    embeddings: torch.Tensor | None = None

    def begins_before(self, stop: int) -> bool:
        return bool(self.tokens[0] < stop)

    def ends_before(self, start: int) -> bool:
        return bool(self.tokens[-1] < start)


class RowMedia:
    """What images and videos add to a prompt and what was answered to it before: `Placed` of a row.

    Args:
        model: whose rows they are for.
        prompt: its tokens.
        answered: tokens after it that are encoded anew, as those of a request that was preempted.
        features: where vLLM has placed which.

    Raises:
        ValueError: the placeholders in the prompt are not those of the grids.
    """

    def __init__(
        self,
        model: NeuronQwen35VLForCausalLM,
        prompt: Sequence[int],
        answered: int,
        features: Iterable[MultiModalFeatureSpec],
    ) -> None:
        self._hidden, self._dtype = model.config.hidden_size, model.neuron_config.torch_dtype
        self.items = [
            _Item(feature, _indices(feature)) for feature in sorted(features, key=lambda each: each.mm_position.offset)
        ]
        ids = torch.tensor([[*prompt]])
        positions, self.rope_deltas = get_rope_index(
            model.config, ids, torch.ones_like(ids), *(self._grids(modality) for modality in _FIELDS)
        )
        after = torch.arange(len(prompt), len(prompt) + answered) + self.rope_deltas
        self._positions = torch.cat([positions, after.expand(1, 3, -1)], dim=2)

    def _grids(self, modality: str) -> torch.Tensor | None:
        """[N, 3], or None where there are none."""
        grids = [_fields(item.feature)[1] for item in self.items if item.feature.modality == modality]
        return torch.stack(grids) if grids else None

    def hold(self, start: int, stop: int, encoding_of: Callable[[MultiModalFeatureSpec], torch.Tensor]) -> None:
        """Hold the encodings [F, D] of the items that have some of these tokens, and no longer those of items before.

        Raises:
            ValueError: an item has not as many tokens as its encoding.
        """
        for item in self.items:
            if item.ends_before(start):
                item.embeddings = None
            elif item.begins_before(stop) and item.embeddings is None:
                embeddings = encoding_of(item.feature)
                if len(embeddings) != len(item.tokens):
                    raise ValueError(f"an item of {len(item.tokens)} tokens was encoded to {len(embeddings)}")
                item.embeddings = embeddings

    def columns(self, start: int, width: int) -> PlacedMedia:
        """`width` tokens from `start`, padded on the right; what is among them is held."""
        positions = self._positions[:, :, start : start + width]
        embeddings, mask = torch.zeros(1, width, self._hidden, dtype=self._dtype), torch.zeros(1, width).bool()
        for item in self.items:
            if item.begins_before(start + width) and not item.ends_before(start):
                assert item.embeddings is not None, "held, since its tokens were given"
                own = (item.tokens >= start) & (item.tokens < start + width)
                here = item.tokens[own] - start
                embeddings[0, here], mask[0, here] = item.embeddings[own], True
        padding = (0, width - positions.shape[2])
        return PlacedMedia(torch.nn.functional.pad(positions, padding), embeddings, mask, self.rope_deltas)


class MediaEncoder:
    """Encodes the items of requests, and keeps those that were scheduled until the scheduler drops them."""

    def __init__(self, model: NeuronQwen35VLForCausalLM) -> None:
        self._model = model
        self._kept: dict[str, torch.Tensor] = {}

    def drop(self, identifiers: Iterable[str]) -> None:
        """Forget what the scheduler has no room for any more."""
        for identifier in identifiers:
            self._kept.pop(identifier, None)

    def drop_all(self) -> None:
        """Forget all."""
        self._kept.clear()

    def place(self, request: ScheduledRequest, scheduled: Iterable[int]) -> None:
        """Encode the scheduled ones of a request's items, and let its row have those whose tokens it was given.

        Raises:
            ValueError: an item cannot be encoded, or its placeholders are not those of its grid.
        """
        state, row = request.state, request.slot_row
        prompt = state.prompt_token_ids or ()
        if row.placed is None:
            row.placed = RowMedia(self._model, prompt, len(row.tokens) - len(prompt), state.mm_features)
            row.rope_delta = int(row.placed.rope_deltas)
        assert isinstance(row.placed, RowMedia)
        for i in scheduled:
            feature = state.mm_features[i]
            if feature.identifier not in self._kept:
                self._kept[feature.identifier] = self._encode(feature)
        row.placed.hold(row.cached, request.granted, self._encoding_of)

    def _encoding_of(self, feature: MultiModalFeatureSpec) -> torch.Tensor:
        """[F, D]; encoded anew, and not kept, where the scheduler has none that it would drop.

        So it is with an item that failed before, and with one of tokens that were to be restored.
        """
        kept = self._kept.get(feature.identifier)
        return self._encode(feature) if kept is None else kept

    def _encode(self, feature: MultiModalFeatureSpec) -> torch.Tensor:
        """[F, D]; one at a time: who is beside it does not change a bit of it."""
        assert self._model.vision is not None, "the model is loaded"
        pixels, grid = _fields(feature)
        return self._model.vision(pixels, grid.unsqueeze(0))


def _indices(feature: MultiModalFeatureSpec) -> torch.Tensor:
    """[F] where the tokens of an item are in the prompt."""
    place = feature.mm_position
    own = torch.arange(place.length) if place.is_embed is None else place.is_embed.nonzero().flatten()
    return place.offset + own


def _fields(feature: MultiModalFeatureSpec) -> tuple[Any, Any]:
    """Pixels [P, patch size] and grid [3] of an item."""
    assert feature.data is not None, "vLLM gives a request its items' data before it is scheduled"
    pixels, grid = (feature.data[name].data for name in _FIELDS[feature.modality])
    return pixels, grid
