# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The model's submodels in NxDI: the names of their inputs, padding to the compiled shapes, and making the module.

A submodel is compiled for one phase and some buckets. Its wrapper pads a call to a bucket and to the compiled batch,
and takes the padding off the outputs.

Letters: B rows, S tokens per row, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .layers.cache import rows_are_slots
from .nxdi import DecoderModelInstance, ModelWrapper, NeuronBaseModel
from .phase import Phase, first_tokens, mask_of_prompts, submodel_of

FLOAT32_SUFFIXES = (
    "A_log.weight", "dt_bias.weight", "norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"
)  # fmt: skip
"""Endings of the names of parameters that are float32 whatever `torch_dtype` is."""


class ModelInputs(NamedTuple):
    """The arguments of NxDI's traced `forward` (`NeuronBaseModel.forward`), which takes them by position.

    Shapes of those that are used: input_ids and position_ids [B, S]; attention_mask [B, S] of prompts from their
    beginning, else [B, cached tokens]; seq_ids [B]; rotary_position_id [B, S] after prompts or [B, 3, S];
    vision_embeddings [B, S, D]; vision_mask [B, S, 1].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    seq_ids: torch.Tensor
    sampling_params: torch.Tensor
    prev_hidden: torch.Tensor | None = None
    adapter_ids: torch.Tensor | None = None
    accepted_indices: torch.Tensor | None = None
    current_length: torch.Tensor | None = None
    medusa_mask: torch.Tensor | None = None
    scatter_index: torch.Tensor | None = None
    slot_mapping: torch.Tensor | None = None
    active_block_table: torch.Tensor | None = None
    num_queries: torch.Tensor | None = None
    computed_context_lens: torch.Tensor | None = None
    tile_q_indices: torch.Tensor | None = None
    tile_block_tables: torch.Tensor | None = None
    tile_masks: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    kv_cache: torch.Tensor | None = None
    active_mask: torch.Tensor | None = None
    rotary_position_id: torch.Tensor | None = None
    vision_embeddings: torch.Tensor | None = None
    vision_mask: torch.Tensor | None = None
    deepstack_vision_embeds: torch.Tensor | None = None

    def args(self) -> tuple[Any, ...]:
        """By position: the seven that NxDI always gives, then up to the last that is set, empty for None."""
        further = list(self[PLAIN_ARGUMENTS:])
        while further and further[-1] is None:
            further.pop()
        return *self[:PLAIN_ARGUMENTS], *(torch.empty(0) if value is None else value for value in further)

    def further_args(self) -> list[torch.Tensor]:
        """The `args` after those seven; NxDI's application takes them as `llava_args`."""
        return list(self.args()[PLAIN_ARGUMENTS:])

    def rows(self, chosen: torch.Tensor | slice) -> ModelInputs:
        """The chosen rows of every input that has rows."""
        rows = self.seq_ids.shape[0]
        return ModelInputs(*(select_rows(value, rows, chosen) for value in self))


PLAIN_ARGUMENTS = 7


def select_rows(value: Any, rows: int, chosen: torch.Tensor | slice) -> Any:
    """The chosen rows of a tensor that has `rows` of them; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows:
        return value[chosen]
    return value


class CallTokens(NamedTuple):
    """The tokens of a call, padded on the right; shapes as in `ModelInputs`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor


def align_tokens(
    phase: Phase, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
) -> CallTokens:
    """The tokens of a call with its padding moved to the right, where the submodels expect it.

    A prompt's state is that after its last token, and its keys are in the cache from position 0 on. So padding on the
    left moves to the right, in the prompt and in the mask of what is cached. The position of a decoding step is the
    number of cached tokens; NxDI's adapter gives the largest position of the prompt, which may be that of padding.
    Where prompts come without a mask, `mask_of_prompts` gives it.

    Raises:
        ValueError: the mask of prompts differs in shape from input_ids, or one of its rows has no token or has zeros
            between its tokens.
    """
    if attention_mask is None and phase is Phase.CONTEXT_ENCODING:
        return CallTokens(input_ids, mask_of_prompts(position_ids), position_ids)
    if attention_mask is None or phase is Phase.CONTINUATION:
        return CallTokens(input_ids, attention_mask, position_ids)
    lengths = attention_mask.sum(dim=1, keepdim=True)
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    aligned_mask = (index < lengths).to(attention_mask.dtype)
    if phase is Phase.TOKEN_GENERATION:
        return CallTokens(input_ids, aligned_mask, lengths)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids of prompts {list(input_ids.shape)}: "
            "pass one of the same shape, 1 at tokens and 0 at padding"
        )
    source = (first_tokens(attention_mask) + index).clamp(max=attention_mask.shape[1] - 1)
    ill = ((attention_mask.gather(1, source) > 0) & (index < lengths)).sum(dim=1, keepdim=True) != lengths
    if (ill | (lengths == 0)).any():
        row = int((ill | (lengths == 0)).flatten().int().argmax())
        what = "has zeros between its tokens" if lengths[row] else "has no token"
        raise ValueError(
            f"attention_mask {what} in row {row}: pad each prompt on one side, and give it a token at least"
        )
    real = aligned_mask > 0
    return CallTokens(
        torch.where(real, input_ids.gather(1, source), 0), aligned_mask, torch.where(real, index.expand_as(source), 0)
    )


def require_float32(module: NeuronBaseModel) -> None:
    """Check that no cast reached what must be float32: an error in a decay is exponentiated at every token.

    Raises:
        TypeError: a decay parameter, a norm or a recurrent state has another dtype.
    """
    cache: Any = module.kv_mgr
    kept = {
        f"recurrent state of layer {i}": cache.layer_state(i).recurrent for i in module.config.linear_attention_layers
    }
    kept |= {n: p for n, p in module.named_parameters() if n.endswith(FLOAT32_SUFFIXES)}
    cast = [f"{name} is {p.dtype}" for name, p in kept.items() if p.dtype != torch.float32]
    if cast:
        raise TypeError(f"float32 was lost: {', '.join(cast)}; set cast_type='as-declared'")


class Qwen35DecoderModelInstance(DecoderModelInstance):
    """Makes the module that is traced for a phase, and checks that what must be float32 is."""

    def __init__(self, *args: Any, phase: Phase, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.phase = phase

    def load_module(self) -> None:
        super().load_module()
        require_float32(self.module)
        self.module.phase = self.phase

    def get(self, bucket_rank: int | None, **kwargs: Any) -> Any:
        """NxDI's, whose caches follow one output: a step with drafts has three."""
        module, aliases = super().get(bucket_rank, **kwargs)
        further = 2 if self.phase is Phase.SPECULATION else 0
        self.input_output_aliases = {parameter: index + further for parameter, index in aliases.items()}
        return module, self.input_output_aliases


class Qwen35ModelWrapper(ModelWrapper):
    """NxDI's wrapper. Padding tokens are told by their position, and rows that pad a batch are written nowhere."""

    _tokens_only: bool = False  # of the call in progress: NxDI's forward passes no argument on to `_forward`

    @property
    def phase(self) -> Phase:
        """What this submodel does. Where it reads the cache, its buckets are lengths of what is cached."""
        return submodel_of(self.tag).phase

    @property
    def takes_media(self) -> bool:
        """Whether prompts come with embeddings of images or videos."""
        return submodel_of(self.tag).with_media

    def get_model_instance(self) -> DecoderModelInstance:
        return Qwen35DecoderModelInstance(
            model_cls=self.model_cls, config=self.config, phase=self.phase, **self.model_init_kwargs
        )

    def input_generator(self) -> list[tuple[torch.Tensor, ...]]:
        """NxDI's sample inputs, one tuple per bucket; those of continuations differ in shape from those of prompts."""
        return [self._mark(ModelInputs(*inputs)).args() for inputs in super().input_generator()]

    def _mark(self, inputs: ModelInputs) -> ModelInputs:
        """Replace NxDI's placeholders [B] for hidden states and adapters by empty tensors, which mean none.

        A loaded model finds the program to run by the shapes of its inputs alone. A chunk that follows as many cached
        tokens as it has itself would look like a prompt of this length, and a step with drafts like a short chunk. So
        which of the two are empty tells continuations, and the two programs of as many tokens, from all others.
        """
        none = torch.empty(0)
        match self.phase:
            case Phase.CONTINUATION:
                return inputs._replace(prev_hidden=none)
            case Phase.SPECULATION | Phase.DRAFT:
                return inputs._replace(adapter_ids=none)
            case Phase.VERIFICATION:
                return inputs._replace(prev_hidden=none, adapter_ids=none)
        return inputs

    def get_target_bucket(self, *args: torch.Tensor, strategy: str = "first_fit") -> int:
        """The bucket for an attention mask [B, length]; a prompt may be as long as its bucket.

        NxDI takes the next larger bucket for such a prompt, which doubles the work on one of exactly 512 tokens.
        """
        length = ModelInputs(*args).attention_mask.shape[1]
        if self.phase.encodes_prompts and strategy == "first_fit" and length in self.neuron_config.buckets:
            return length
        return super().get_target_bucket(*args, strategy=strategy)

    def pad_inputs(self, *args: torch.Tensor, pad_type: str = "first_fit") -> tuple[torch.Tensor, ...]:
        """Pad a prompt to the bucket of its longest row; padding gets position 0.

        NxDI gives padding position 1, which in a prompt of one token cannot be told from its second token: the state
        would take in padding, and the last token would be looked for one place too far.
        """
        if self.phase is Phase.TOKEN_GENERATION:
            return super().pad_inputs(*args, pad_type=pad_type)
        inputs = ModelInputs(*args)
        if self.phase.reads_cache:
            bucket, tokens = self.get_target_bucket(*args, strategy=pad_type), self.neuron_config.n_active_tokens
            return self._mark(
                inputs._replace(
                    input_ids=pad_columns(inputs.input_ids, tokens),
                    attention_mask=pad_columns(inputs.attention_mask, bucket),
                    position_ids=pad_columns(inputs.position_ids, tokens),
                )
            ).args()
        longest = int(inputs.attention_mask.sum(dim=1).max())
        cut = inputs._replace(
            input_ids=inputs.input_ids[:, :longest],
            attention_mask=inputs.attention_mask[:, :longest],
            position_ids=inputs.position_ids[:, :longest],
        )
        bucket = self.get_target_bucket(*cut.args(), strategy=pad_type)
        attention_mask = pad_columns(cut.attention_mask, bucket)
        position_ids = pad_columns(cut.position_ids, bucket)
        return cut._replace(
            input_ids=pad_columns(cut.input_ids, bucket),
            attention_mask=attention_mask,
            position_ids=torch.where(attention_mask > 0, position_ids, 0),
        ).args()

    def _forward(self, *args: torch.Tensor) -> Any:
        if self._tokens_only and self.is_neuron():
            # What `forward_ranked` returns stays on the device, a list for each rank of this process, until it is read.
            ranks = self.neuron_config.local_ranks_size
            tokens, *_ = self.model.nxd_model.forward_ranked([[*args] for _ in range(ranks)])[0]
            return [tokens.cpu()]
        if not self.is_neuron():
            # Tracing sets these once in each traced copy; the one module of a CPU serves every submodel and bucket.
            self.model.n_positions, self.model.phase = ModelInputs(*args).attention_mask.shape[1], self.phase
        return super()._forward(*args)

    def forward(self, *args: Any, pad_type: str = "first_fit", tokens_only: bool = False) -> Any:
        """Run any number of rows, in ascending order of their seq_ids, in pieces of the compiled batch.

        Under `tokens_only` a device's outputs are [tokens, None], and its logits are not read.
        """
        self._tokens_only = tokens_only
        outputs = self._run_pieces(*args, pad_type=pad_type)
        return [*outputs, None] if tokens_only and self.is_neuron() else outputs

    def _run_pieces(self, *args: Any, pad_type: str) -> Any:
        inputs, batch = ModelInputs(*args), self.neuron_config.batch_size
        rows = inputs.seq_ids.shape[0]
        if self.model is None or rows == batch:
            return super().forward(*args, pad_type=pad_type)
        if self.async_mode:  # the outputs are still on the device; NxDI cuts the pieces and picks the rows later
            return super().forward(*self._pad_batch(inputs)[0].args(), pad_type=pad_type)
        pieces: list[list[torch.Tensor]] = []
        for start in range(0, rows, batch):
            padded, places = self._pad_batch(inputs.rows(slice(start, start + batch)))
            outputs = super().forward(*padded.args(), pad_type=pad_type)
            if self.is_neuron():
                outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
                pieces.append([output.index_select(0, places) for output in outputs])
                continue
            state = self.model.kv_mgr.past_key_values
            first = len(outputs) - len(state)
            pieces.append([output.index_select(0, places) for output in outputs[:first]])
            for entry, new in zip(state, outputs[first:], strict=True):
                entry.data = new.data  # read by the next piece; on a device these outputs are aliased to the caches
        merged = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        if not self.is_neuron():
            return [*merged, *self.model.kv_mgr.past_key_values]
        return merged if len(merged) > 1 or self._tokens_only else merged[0]

    def _pad_batch(self, inputs: ModelInputs) -> tuple[ModelInputs, torch.Tensor]:
        """The inputs padded to whole compiled batches, and the place of each given row in them.

        The rows added are copies of the first with the id -1, which are written nowhere; those that NxDI adds would be
        written to idle slots.
        """
        batch, seq_ids = self.neuron_config.batch_size, inputs.seq_ids.long()
        rows = seq_ids.shape[0]
        in_slots = rows_are_slots(self.phase, batch, self.neuron_config.kv_cache_batch_size)
        places = seq_ids if in_slots else torch.arange(rows)
        source = torch.zeros(-(-rows // batch) * batch, dtype=torch.long)
        source[places] = torch.arange(rows)
        padded_ids = torch.full_like(source, -1)
        padded_ids[places] = seq_ids
        return inputs.rows(source)._replace(seq_ids=padded_ids), places


def pad_columns(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """[B, S] as [B, width], zeros on the right."""
    return F.pad(tensor, (0, width - tensor.shape[1]))


def cache_entries(submodel: ModelWrapper, names: Sequence[str]) -> list[list[torch.Tensor]]:
    """What every rank of this process keeps between calls: flat lists, as `CacheLayout` reads them.

    On a CPU that is what the process's one rank keeps. On a device NxD holds the entries of all local ranks in the
    loaded model's `state`, under the names of the parameters, and its programs update them in place. Indices and slices
    of either are views that `copy_` reads and writes; on a CPU a call may replace the entries, so ask again after each.

    Args:
        submodel: any that is loaded: all share what is kept.
        names: of the entries as parameters, `CacheLayout.parameter_names`.
    """
    if not submodel.is_neuron():
        return [[entry.data for entry in submodel.model.kv_mgr.past_key_values]]
    return [[buffers[name] for name in names] for buffers in submodel.model.nxd_model.state]
