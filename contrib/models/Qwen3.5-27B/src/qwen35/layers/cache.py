# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept between calls: keys and values of the attention layers, recurrent and conv state of the DeltaNet layers.

A *slot* is a row of every cache: what is kept for one sequence. A *row* is a row of a call's batch, and `seq_ids` names
the slot of each. Where tokens are drafted, the MTP head is one more attention layer, and `SpeculationState` is kept.

Letters: B rows of a call, S tokens per row, N slots, P positions, E head dim, K key dim, V value dim, W conv kernel,
D hidden, L DeltaNet layers, T tokens verified at a time (k drafts and the one before them); per rank: M KV heads, H
value heads, Hk key heads, Ch conv channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..configuration_qwen35 import LINEAR_ATTENTION, Qwen35InferenceConfig
from ..fp8_form import FP8, FP8_MAX
from ..kernel_selection import select_attention
from ..nxdi import KVCacheManager, get_tensor_model_parallel_size
from ..phase import Phase, real_tokens


class KeyValue(NamedTuple):
    """What an attention layer keeps: [N, M, P, E] each."""

    key: torch.Tensor
    value: torch.Tensor


class DeltaNetState(NamedTuple):
    """What a DeltaNet layer keeps: recurrent [N, H, K, V] float32, and conv [N, Ch, W - 1], its last inputs."""

    recurrent: torch.Tensor
    conv: torch.Tensor


LayerState = KeyValue | DeltaNetState


class DeltaNetTokens(NamedTuple):
    """What verified tokens would change of a DeltaNet layer's state (`ops.verify_delta_rule`), for B rows or N slots.

    conv_inputs [B, T, Ch] in torch_dtype; keys [B, T, Hk, K], u [B, T, H, V] and g [B, T, H] float32.
    """

    conv_inputs: torch.Tensor
    keys: torch.Tensor
    u: torch.Tensor
    g: torch.Tensor


class SpeculationState(NamedTuple):
    """What drafting keeps of each slot, beside the keys and values of the MTP head.

    The head pairs the decoder's output at a position with the next token. So of the last token that was taken in it
    has no key yet; that of a pair is at the index of the pair's token, and index 0 is masked.

    hidden [N, D]: the decoder's normed output at the last token that was taken in. rotary [N, 3] int32: that token's
    rotary positions. The rest is of the tokens that were verified last, for the call that takes in what the host
    accepts of them: verified_hidden [N, T, D], their outputs; conv_inputs [N, L, T, Ch]; and rank_one
    [N, L, T, Hk K + H V + H] float32, keys, u and g of `DeltaNetTokens` side by side.
    """

    hidden: torch.Tensor
    rotary: torch.Tensor
    verified_hidden: torch.Tensor
    conv_inputs: torch.Tensor
    rank_one: torch.Tensor


class SlotViews(NamedTuple):
    """What one slot holds, as views that can be read and written; each is one run of memory."""

    states: list[torch.Tensor]
    """Of its last token: recurrent [H, K, V] and conv state [Ch, W - 1] of each DeltaNet layer, in the order of the
    layers; where tokens are drafted, hidden [D] and rotary [3] too."""
    key_values: list[torch.Tensor]
    """Keys and values [P, E] of each head of each attention layer."""
    verified: list[torch.Tensor]
    """Of tokens that are verified and not yet taken in; empty where none are drafted."""


class CacheLayout:
    """Where the flat list of caches, two tensors per layer, then those of drafting, has the state of each layer.

    The list may be a module's parameters, the buffers of a loaded model, or the outputs of a call.
    """

    def __init__(self, config: Qwen35InferenceConfig) -> None:
        self.is_linear = [kind == LINEAR_ATTENTION for kind in config.cached_layer_types]
        self.drafts = config.num_speculative_tokens > 0

    def parameter_names(self) -> list[str]:
        """The names of the entries as parameters of a `NeuronQwen35Model`, in the order of the list."""
        entries = 2 * len(self.is_linear) + self.drafts * len(SpeculationState._fields)
        return [f"kv_mgr.past_key_values.{i}" for i in range(entries)]

    def layer_state(self, entries: Sequence[torch.Tensor] | nn.ParameterList, layer: int) -> LayerState:
        """The entries of a layer, for all slots."""
        first, second = entries[2 * layer], entries[2 * layer + 1]
        return DeltaNetState(first, second) if self.is_linear[layer] else KeyValue(first, second)

    def speculation(self, entries: Sequence[torch.Tensor] | nn.ParameterList) -> SpeculationState:
        """The entries of drafting, for all slots."""
        return SpeculationState(*[*entries][2 * len(self.is_linear) :])

    def slot(self, entries: Sequence[torch.Tensor], slot: int) -> SlotViews:
        """Views of the entries of a slot, for all layers."""
        views = SlotViews([], [], [])
        for layer, is_linear in enumerate(self.is_linear):
            of_slot = [entry[slot] for entry in self.layer_state(entries, layer)]
            if is_linear:
                views.states.extend(of_slot)
            else:
                views.key_values.extend(head for entry in of_slot for head in entry)
        if self.drafts:
            hidden, rotary, *verified = (entry[slot] for entry in self.speculation(entries))
            views.states.extend((hidden, rotary))
            views.verified.extend(verified)
        return views


class CacheBytes(NamedTuple):
    """Bytes per rank, for all slots."""

    kv_cache: int
    recurrent_state: int
    conv_state: int
    speculation: int
    """`SpeculationState`; the keys and values of the MTP head are in kv_cache."""


def rows_are_slots(phase: Phase, rows: int, slots: int) -> bool:
    """Whether row b of a call is slot b: NxDI orders the rows so when a call reads the cache and has a row per slot."""
    return phase.reads_cache and rows == slots


class Qwen35CacheManager(KVCacheManager):
    """NxDI's cache manager that keeps a `DeltaNetState` where a DeltaNet layer would have keys and values.

    NxDI aliases, copies and resets its flat `past_key_values` list, two entries per layer. DeltaNet's state in the
    place of a K/V pair therefore needs no further outputs and no dummy cache.
    """

    def __init__(self, config: Qwen35InferenceConfig, num_kv_head: int, **kwargs: Any) -> None:
        # The base class allocates K and V for every layer it counts: let it count none, then allocate per layer type.
        without_layers = copy.copy(config)
        without_layers.num_hidden_layers = 0
        super().__init__(without_layers, num_kv_head, **kwargs)
        self.config = config
        self.attention, self.layout = select_attention(config), CacheLayout(config)

        slots = config.neuron_config.kv_cache_batch_size + config.neuron_config.kv_cache_padding_size
        ranks = get_tensor_model_parallel_size()
        recurrent = (
            slots,
            config.linear_num_value_heads // ranks,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        conv = (slots, config.conv_dim // ranks, config.linear_conv_kernel_dim - 1)
        dtype = config.neuron_config.torch_dtype
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            pair
            for is_linear in self.layout.is_linear
            for pair in (
                ((recurrent, torch.float32), (conv, dtype))
                if is_linear
                else ((self.k_shape, self.cache_dtype), (self.v_shape, self.cache_dtype))
            )
        ]
        if self.layout.drafts:
            shapes += _speculation_shapes(config, slots, ranks)
        self.past_key_values = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=entry_dtype), requires_grad=False) for shape, entry_dtype in shapes
        )

    def layer_state(self, layer: int) -> LayerState:
        """The entries of a layer, for all slots."""
        return self.layout.layer_state(self.past_key_values, layer)

    @property
    def speculation(self) -> SpeculationState:
        """The entries of drafting, for all slots."""
        return self.layout.speculation(self.past_key_values)

    def nbytes(self) -> CacheBytes:
        """What this rank keeps, counted."""
        states = [self.layer_state(layer) for layer in range(len(self.layout.is_linear))]
        linear = [state for state in states if isinstance(state, DeltaNetState)]
        return CacheBytes(
            kv_cache=sum(entry.nbytes for state in states if isinstance(state, KeyValue) for entry in state),
            recurrent_state=sum(state.recurrent.nbytes for state in linear),
            conv_state=sum(state.conv.nbytes for state in linear),
            speculation=sum(entry.nbytes for entry in self.speculation) if self.layout.drafts else 0,
        )

    def get_cache(  # type: ignore[override]
        self, seq_len: int, seq_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> list[LayerState]:
        """What each of the decoder's layers keeps, as `get_kv_by_layer_id` gives it; NxDI would count all entries."""
        layers = range(self.config.num_hidden_layers)
        return [self.get_kv_by_layer_id(idx=layer, seq_len=seq_len, seq_ids=seq_ids, **kwargs) for layer in layers]

    def get_kv_by_layer_id(  # type: ignore[override] # NxDI passes keywords, more than are needed
        self,
        idx: int,
        seq_len: int,
        phase: Phase,
        seq_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LayerState:
        """What layer `idx` keeps for the rows of a call, keys and values up to `seq_len`; `seq_ids` [B].

        A kernel reads a cache where it is, since a cut would be a copy: it gets all positions, and where it finds the
        slots of its rows itself, all slots. Keys and values that are kept in fp8 come in torch_dtype.
        """
        state = self.layer_state(idx)
        if isinstance(state, KeyValue):
            of_decoder = idx < self.config.num_hidden_layers  # the MTP head attends without a kernel
            reads = of_decoder and self.attention.reads_cache(phase, seq_len)
            if reads and self._kernel_finds_slots(phase, seq_ids):
                return state
            state = KeyValue(*(entry[:, :, :seq_len] for entry in state))
        return type(state)(*(self.rows_of(entry, seq_ids, phase) for entry in state))

    def rows_of(self, entry: torch.Tensor, seq_ids: torch.Tensor | None, phase: Phase) -> torch.Tensor:
        """The rows [B, ...] of a call in an entry [N, ...]; `seq_ids` [B]."""
        slots = self.kv_cache_batch_size
        if seq_ids is None or rows_are_slots(phase, seq_ids.shape[0], slots):
            rows = entry[:slots]
        else:
            rows = entry.index_select(0, seq_ids.clamp(0, slots - 1))
        return rows.to(self.neuron_config.torch_dtype) if rows.dtype == FP8 else rows

    def _kernel_finds_slots(self, phase: Phase, seq_ids: torch.Tensor | None) -> bool:
        """Whether row b is in slot b, or the kernel of the phase takes the slots of its rows."""
        if phase is Phase.CONTINUATION:
            return True
        return seq_ids is None or rows_are_slots(phase, seq_ids.shape[0], self.kv_cache_batch_size)

    def update_kv_by_layer_id(  # type: ignore[override]
        self,
        idx: int,
        seq_ids: torch.Tensor,
        position_ids: torch.Tensor,
        kv_per_layer: LayerState,
        phase: Phase,
        **kwargs: Any,
    ) -> LayerState:
        """The caches of layer `idx` with the rows of `kv_per_layer` in slots `seq_ids` [B]; other slots as they were.

        A row whose id is outside 0..kv_cache_batch_size - 1 pads the compiled batch and is written nowhere.
        """
        caches = self.layer_state(idx)
        if isinstance(caches, KeyValue):
            positions = self._cache_positions(position_ids, caches.key.shape[2], phase)
            pairs = zip(caches, kv_per_layer, strict=True)
            slots = self._written_slots(seq_ids)
            return KeyValue(*(write_tokens(cache, rows, slots, positions) for cache, rows in pairs))
        pairs = zip(caches, kv_per_layer, strict=True)
        return DeltaNetState(*(self.written(cache, rows, seq_ids, phase) for cache, rows in pairs))

    def _written_slots(self, seq_ids: torch.Tensor) -> torch.Tensor:
        """seq_ids [B] with -1 for rows that are written nowhere."""
        return torch.where(seq_ids < self.kv_cache_batch_size, seq_ids, -1)

    def written(self, entry: torch.Tensor, rows: torch.Tensor, seq_ids: torch.Tensor, phase: Phase) -> torch.Tensor:
        """An entry [N, ...] with the rows [B, ...] of a call in slots `seq_ids` [B]; other slots as they were."""
        slots = entry.shape[0]
        if slots == 1:  # the only slot, and a batch of one row needs no padding
            return rows.to(entry.dtype)
        seq_ids = self._written_slots(seq_ids)
        if rows_are_slots(phase, seq_ids.shape[0], slots):
            return write_slots(entry, rows, seq_ids >= 0)
        hits = torch.arange(slots, device=seq_ids.device).unsqueeze(1) == seq_ids
        row_of_slot = (hits * torch.arange(seq_ids.shape[0], device=seq_ids.device)).sum(dim=1)
        return write_slots(entry, rows.index_select(0, row_of_slot), hits.any(dim=1))

    def update_all(self, layers: Mapping[int, LayerState], speculation: SpeculationState | None = None) -> list[Any]:
        """The flat list of entries with those of some layers, and of drafting, replaced; others as they were.

        NxD wants every entry among a program's outputs, and not as the parameter itself.
        """
        kept = [*self.past_key_values] if speculation is None else [*self.past_key_values[: -len(speculation)]]
        updated = [entry.view(entry.shape) for entry in kept] + [*(speculation or ())]
        for layer, state in layers.items():
            updated[2 * layer : 2 * layer + 2] = state
        return updated

    @staticmethod
    def _cache_positions(position_ids: torch.Tensor, length: int, phase: Phase) -> torch.Tensor:
        """Where keys and values of tokens at position_ids [B, S] are written in a cache of `length`: [B or 1, S]."""
        if not phase.reads_cache:  # a prompt from its beginning: its padding too, which later tokens overwrite
            return torch.arange(position_ids.shape[1], device=position_ids.device).unsqueeze(0)
        real = real_tokens(position_ids, phase)
        return position_ids if real is None else torch.where(real, position_ids, length - 1)


def _speculation_shapes(
    config: Qwen35InferenceConfig, slots: int, ranks: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each entry of a rank's `SpeculationState`."""
    dtype = config.neuron_config.torch_dtype
    tokens, layers = config.num_speculative_tokens + 1, len(config.linear_attention_layers)
    rank_one = (config.key_dim + config.value_dim + config.linear_num_value_heads) // ranks
    shapes = dict(
        hidden=((slots, config.hidden_size), dtype),
        rotary=((slots, 3), torch.int32),
        verified_hidden=((slots, tokens, config.hidden_size), dtype),
        conv_inputs=((slots, layers, tokens, config.conv_dim // ranks), dtype),
        rank_one=((slots, layers, tokens, rank_one), torch.float32),
    )
    return [shapes[name] for name in SpeculationState._fields]


def write_tokens(
    cache: torch.Tensor, rows: torch.Tensor, seq_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """cache [N, M, P, E] with rows [B, M, S, E] in slots seq_ids [B] at positions [B or 1, S].

    A row with a negative id goes to the last position of the last slot, which nothing reads: NxDI lengthens the cache
    when `apply_seq_ids_mask` is set. Whole rows of E are written, as NxDI's `update_cache_const_indices` does for a
    prompt; its `torch.scatter` for a decoding step indexes every single element. In place on a CPU, where a new cache
    would be a copy of the old; a cache that is traced must not change, because it serves the trace of every bucket.
    """
    last_slot, last_position = cache.shape[0] - 1, cache.shape[2] - 1
    real = (seq_ids >= 0).unsqueeze(1)
    slots = torch.where(real, seq_ids.unsqueeze(1), last_slot)
    positions = torch.where(real, positions, last_position)
    heads = torch.arange(cache.shape[1], device=seq_ids.device)
    indices = (slots.unsqueeze(1).int(), heads.view(1, -1, 1).int(), positions.unsqueeze(1).int())
    return (cache.index_put_ if cache.is_cpu else cache.index_put)(indices, as_kept(rows, cache.dtype))


def as_kept(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values in the dtype of a cache; NxDI's cast to fp8 does not clamp, and 448 is NaN on Trainium."""
    return (rows.clamp(-FP8_MAX, FP8_MAX) if dtype == FP8 else rows).to(dtype)


def write_slots(cache: torch.Tensor, rows: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """cache [N, ...] with slot n from rows [N, ...] where written [N] is true.

    Selection instead of a scatter: a state is written whole, and the compiler fuses the choice with what computes it.
    """
    return torch.where(written.view(-1, *[1] * (cache.dim() - 1)), rows.to(cache.dtype), cache)
