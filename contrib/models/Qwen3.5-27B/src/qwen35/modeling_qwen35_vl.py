# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Images and video: the vision encoder's tokens among the text's, and positions on three axes.

The encoder runs on the host and its tokens are placed by the host, so that the traced decoder only chooses, token by
token, between an embedding it looks up and one it is given. A prompt without images takes the text decoder's own
submodel and pays for none of this.

Letters: B batch, S tokens of the prompt, D hidden, F merged tokens of all images, or all videos, of a call.
"""

from __future__ import annotations

import copy
import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .configuration_qwen35 import Qwen35InferenceConfig
from .configuration_qwen35_vl import MEDIA_TOKENS, Qwen35VLInferenceConfig
from .modeling_qwen35 import NeuronQwen35ForCausalLM, NeuronQwen35Model
from .nxdi import ModelWrapper
from .phase import Phase, Submodel, phase_of
from .submodels import PLAIN_ARGUMENTS, ModelInputs, Qwen35ModelWrapper, align_tokens, pad_columns
from .vision.encoder import NeuronQwen35VisionModel
from .vision.positions import checked_grids
from .vision.rope_index import get_rope_index
from .weights.checkpoint import CheckpointReader
from .weights.conversion import unchanged
from .weights.vision_rules import convert_vision_checkpoint


class NeuronQwen35VLModel(NeuronQwen35Model):
    """The text decoder whose embeddings may come from outside."""

    def embed(
        self, input_ids: torch.Tensor, vision_embeddings: torch.Tensor | None, vision_mask: torch.Tensor | None
    ) -> torch.Tensor:
        embeds = super().embed(input_ids, vision_embeddings, vision_mask)
        if vision_embeddings is None or vision_mask is None:
            return embeds
        return self.encode_vision_to_input(embeds, vision_embeddings, vision_mask)

    def encode_vision_to_input(
        self, inputs_embeds: torch.Tensor, vision_embeddings: torch.Tensor, vision_mask: torch.Tensor
    ) -> torch.Tensor:
        """inputs_embeds [B, S, D], or vision_embeddings [B, S, D] where vision_mask [B, S, 1] is 1."""
        return torch.where(vision_mask > 0, vision_embeddings, inputs_embeds)


class Qwen35VLModelWrapper(Qwen35ModelWrapper):
    """The text decoder's wrapper, with the inputs that images add."""

    def input_generator(self) -> list[tuple[torch.Tensor, ...]]:
        """One tuple of sample inputs per bucket.

        Prompts of text have the seven plain ones. Decoding adds rotary positions [B, 1], with drafts [B, S]; a prompt
        with images rotary positions [B, 3, S], vision embeddings [B, S, D] and a mask [B, S, 1].
        """
        return [self._add_media(ModelInputs(*inputs)).args() for inputs in super().input_generator()]

    def _add_media(self, inputs: ModelInputs) -> ModelInputs:
        zeros = torch.zeros_like(inputs.input_ids)
        if not self.phase.encodes_prompts:
            return inputs._replace(rotary_position_id=zeros)
        if not self.takes_media:
            return inputs
        return inputs._replace(
            rotary_position_id=zeros.unsqueeze(1).repeat(1, 3, 1),
            vision_embeddings=torch.zeros(*zeros.shape, self.config.hidden_size, dtype=self.neuron_config.torch_dtype),
            vision_mask=zeros.unsqueeze(-1),
        )

    def pad_inputs(self, *args: torch.Tensor, pad_type: str = "first_fit") -> tuple[torch.Tensor, ...]:
        padded = super().pad_inputs(*args, pad_type=pad_type)
        inputs = ModelInputs(*padded)
        bucket = inputs.input_ids.shape[1]
        if self.phase.drafts and inputs.rotary_position_id is not None:
            return inputs._replace(rotary_position_id=pad_columns(inputs.rotary_position_id, bucket)).args()
        if not self.takes_media:
            return padded

        def fit(tensor: torch.Tensor | None, dim: int) -> torch.Tensor:
            assert tensor is not None, "prompts with media come with all three"
            cut = tensor.narrow(dim, 0, min(bucket, tensor.shape[dim]))
            return F.pad(cut, (0, 0) * (tensor.dim() - 1 - dim) + (0, bucket - cut.shape[dim]))

        return inputs._replace(
            rotary_position_id=fit(inputs.rotary_position_id, 2),
            vision_embeddings=fit(inputs.vision_embeddings, 1),
            vision_mask=fit(inputs.vision_mask, 1),
        ).args()


@dataclass(frozen=True)
class PlacedMedia:
    """What images and videos add to B prompts, for S of their tokens: all, or those of a chunk.

    positions [B, 3, S] on the axes; embeddings [B, S, D], zero at text; mask [B, S] bool, true where they are;
    rope_deltas [B], what a decoding step adds to the index of its token.
    """

    positions: torch.Tensor
    embeddings: torch.Tensor
    mask: torch.Tensor
    rope_deltas: torch.Tensor

    def columns(self, start: int, width: int) -> PlacedMedia:
        """`width` tokens from `start`, padded on the right."""

        def cut(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            part = tensor.narrow(dim, start, min(width, tensor.shape[dim] - start))
            return F.pad(part, (0, 0) * (tensor.dim() - 1 - dim) + (0, width - part.shape[dim]))

        return PlacedMedia(cut(self.positions, 2), cut(self.embeddings, 1), cut(self.mask, 1), self.rope_deltas)

    @classmethod
    def stack(cls, rows: Sequence[PlacedMedia]) -> PlacedMedia:
        """Rows of the same number of tokens as one batch."""
        return cls(*(torch.cat([getattr(row, field.name) for row in rows]) for field in fields(cls)))


def media_arguments(rotary_position_id: torch.Tensor, **further: torch.Tensor) -> list[torch.Tensor]:
    """`llava_args` of NxDI's application: rotary positions, and embeddings and mask of prompts with media."""
    nothing = torch.empty(0)
    plain = ModelInputs(*[nothing] * PLAIN_ARGUMENTS)
    return plain._replace(rotary_position_id=rotary_position_id, **further).further_args()


def require_pairs(**media: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    """Check that pixels come with grids, by the name of what they are.

    Raises:
        ValueError: one of the two is missing; the prompt would be answered without its images.
    """
    for name, (pixels, grids) in media.items():
        if (pixels is None) != (grids is None):
            raise ValueError(f"{name} have only one of pixels and grid_thw; pass both as the processor gave them")


class NeuronQwen35VLForCausalLM(NeuronQwen35ForCausalLM):
    """Qwen3.5 with images and video: the decoder of `NeuronQwen35ForCausalLM` and the vision encoder on the host.

    `HuggingFaceGenerationAdapter(model).generate(**inputs)` takes what the checkpoint's processor gives;
    `generation.TextGenerator.chat` takes messages with paths, images and frames. Every prompt
    starts anew: for a caller that does not pass `rope_deltas`, a slot keeps the offset between token index and position
    of its prompt until it gets another.
    """

    _model_cls = NeuronQwen35VLModel
    config: Qwen35VLInferenceConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vision: NeuronQwen35VisionModel | None = None
        # By slot of the cache: of the prompt that entered it last, or what a caller passed.
        self.rope_deltas = torch.zeros(self.neuron_config.kv_cache_batch_size, dtype=torch.long)

    @classmethod
    def get_config_cls(cls) -> type[Qwen35VLInferenceConfig]:
        return Qwen35VLInferenceConfig

    def get_model_wrapper_cls(self) -> type[ModelWrapper]:
        return Qwen35VLModelWrapper

    def enable_context_encoding(self, **model_init_kwargs: Any) -> None:
        """Two submodels: prompts of text, and prompts with images."""
        super().enable_context_encoding(**model_init_kwargs)
        config = copy.deepcopy(self.context_encoding_model.config)
        self.add_submodel(Submodel(Phase.CONTEXT_ENCODING, with_media=True), config, **model_init_kwargs)

    def enable_token_generation(self, *args: Any, **kwargs: Any) -> None:
        super().enable_token_generation(*args, **kwargs)
        if self.config.prefill_chunk_size is not None:
            config = copy.deepcopy(self.submodel(Submodel(Phase.CONTINUATION)).config)
            self.add_submodel(Submodel(Phase.CONTINUATION, with_media=True), config)

    def load(self, compiled_model_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        super().load(compiled_model_path, *args, **kwargs)
        self._load_vision()

    def to_cpu(self) -> None:
        super().to_cpu()
        self._load_vision()

    def _load_vision(self) -> None:
        path = getattr(self.config, "_name_or_path", None)
        path = path if path and Path(path).exists() else self.model_path
        self.vision = NeuronQwen35VisionModel.from_pretrained(path, self.neuron_config.torch_dtype)

    @classmethod
    def get_state_dict(
        cls, model_name_or_path: str | os.PathLike[str], config: Qwen35InferenceConfig
    ) -> MutableMapping[str, torch.Tensor]:
        """The decoder's tensors; those of the vision encoder, which `load` reads, are held against the configuration.

        Raises:
            CheckpointError, ConversionError: as for text, and where the vision encoder's tensors do not fit.
        """
        assert isinstance(config, Qwen35VLInferenceConfig)
        with CheckpointReader(model_name_or_path) as reader:
            convert_vision_checkpoint(reader, config.vision, config.neuron_config.torch_dtype, unchanged)
        return super().get_state_dict(model_name_or_path, config)

    def get_required_kwargs(self) -> list[str]:
        return ["pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"]

    @torch.no_grad()
    def forward(  # type: ignore[override] # the rest of NxDI's arguments goes by keyword
        self,
        input_ids: torch.Tensor,
        seq_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        placed: PlacedMedia | None = None,
        rope_deltas: torch.Tensor | None = None,
        phase: Phase | None = None,
        **kwargs: Any,
    ) -> Any:
        """As for text. A prompt may come with images and videos, in the order of their placeholders, rows in order.

        Args:
            pixel_values: patches of all images; image_grid_thw: [N, 3] their grids, as the processor gives them.
            pixel_values_videos, video_grid_thw: the same of videos.
            mm_token_type_ids: what transformers 5's processor adds; the placeholders say the same.
            placed: instead of these, the columns of what `place` gave for whole prompts that belong to input_ids: for
                a caller that gives prompts in pieces.
            rope_deltas: [B] int64, of the prompt of each row: for a caller that moves prompts between slots, or
                restores them. By default those of the prompts that entered the slots last.

        Raises:
            ValueError: pixels come without grids, or grids without pixels, or placeholders and grids do not match,
                before the encoder runs; or a prompt with images is continued without `placed`.
        """
        phase = phase_of(position_ids, attention_mask) if phase is None else phase
        assert position_ids is not None, "phase_of requires them, and so must a caller that gives the phase"
        input_ids, attention_mask, position_ids = align_tokens(phase, input_ids, attention_mask, position_ids)
        slots = torch.arange(input_ids.shape[0]) if seq_ids is None else seq_ids.long()
        begins = phase is Phase.CONTEXT_ENCODING
        media = (pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if begins and placed is None and any(tensor is not None for tensor in media):
            placed = self.place(input_ids, attention_mask, *media)
        extra: Sequence[torch.Tensor] = []
        if rope_deltas is not None:
            self.rope_deltas[slots] = rope_deltas
        elif placed is not None:
            self.rope_deltas[slots] = placed.rope_deltas
        elif begins:
            self.rope_deltas[slots] = 0
        if placed is not None:
            extra = media_arguments(
                placed.positions, vision_embeddings=placed.embeddings, vision_mask=placed.mask.int().unsqueeze(-1)
            )
        elif phase is Phase.TOKEN_GENERATION:
            extra = media_arguments(position_ids + self.rope_deltas[slots].unsqueeze(1))
        elif self.rope_deltas[slots].any():
            raise ValueError(
                f"seq_ids={slots.tolist()} hold prompts with images, and placed is None: pass the next columns of what "
                "place() gave for the whole prompts"
            )
        return super().forward(input_ids, seq_ids, attention_mask, position_ids, phase, llava_args=extra, **kwargs)

    def run_drafting(
        self,
        phase: Phase,
        input_ids: torch.Tensor,
        seq_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        rope_deltas: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """As for text; rope_deltas [B] int64 as of `forward`."""
        if rope_deltas is not None:
            self.rope_deltas[seq_ids] = rope_deltas
        rotary = position_ids + self.rope_deltas[seq_ids].unsqueeze(1)
        return super().run_drafting(phase, input_ids, seq_ids, attention_mask, position_ids, rotary)

    @torch.no_grad()
    def place(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> PlacedMedia:
        """Encode the images and videos of whole prompts input_ids [B, S], and place them; arguments as in `forward`.

        Raises:
            ValueError: pixels come without grids, or grids without pixels, or placeholders and grids do not match;
                before the encoder runs.
        """
        require_pairs(images=(pixel_values, image_grid_thw), videos=(pixel_values_videos, video_grid_thw))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions, deltas = get_rope_index(self.config, input_ids, mask, image_grid_thw, video_grid_thw)
        embeddings, placed = self._place(
            input_ids.masked_fill(mask == 0, -1),
            [(pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)],
        )
        return PlacedMedia(positions, embeddings, placed, deltas)

    def check_media(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> None:
        """What `place` would check for an unpadded prompt input_ids [1, S], without encoding anything.

        Raises:
            ValueError: placeholders, grids and pixels do not match.
        """
        media = {"images": (pixel_values, image_grid_thw), "videos": (pixel_values_videos, video_grid_thw)}
        require_pairs(**media)
        get_rope_index(self.config, input_ids, torch.ones_like(input_ids), image_grid_thw, video_grid_thw)
        for pixels, grids in media.values():
            if pixels is not None and grids is not None:
                checked_grids(pixels, grids, self.config.vision)

    def _place(
        self, input_ids: torch.Tensor, media: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Vision embeddings [B, S, D], zero at text, and the mask [B, S] of where they are."""
        assert self.vision is not None, "calling comes after loading"
        embeddings = torch.zeros(*input_ids.shape, self.config.hidden_size, dtype=self.neuron_config.torch_dtype)
        placed = torch.zeros_like(input_ids, dtype=torch.bool)
        for name, (pixels, grids) in zip(MEDIA_TOKENS, media, strict=True):
            if pixels is not None and grids is not None:
                here = input_ids == getattr(self.config, name)
                embeddings[here] = self.vision(pixels, grids)
                placed |= here
        return embeddings, placed

    def _columns_of(self, llava_args: Sequence[torch.Tensor], columns: slice) -> Sequence[torch.Tensor]:
        if len(llava_args) == 0:
            return llava_args
        *empty, rotary, embeddings, mask = llava_args
        return [*empty, rotary[:, :, columns], embeddings[:, columns], mask[:, columns]]
