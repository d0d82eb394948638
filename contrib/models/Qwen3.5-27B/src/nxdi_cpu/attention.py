# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention with NxDI's hooks; stands in for `modules.attention.{attention_base,gqa}`.

Letters: B batch, S new tokens, P cached tokens, N query heads and M KV heads of this rank, G = N // M, E head dim.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .config import InferenceConfig
from .layers import ColumnParallelLinear, RowParallelLinear, SPMDRank, divide, get_padding_length, require_inert
from .parallel_state import (
    TensorParallelGroup,
    get_tensor_model_parallel_group,
    model_parallel_is_initialized,
)
from .quantization import BaseQuantizeParallelLinear

KeyValue = tuple[torch.Tensor, torch.Tensor]
Checkpoint = MutableMapping[str, torch.Tensor]


class GQA(enum.Enum):
    """How KV heads are laid over the ranks."""

    CONVERT_TO_MHA = "convert-to-mha"
    REPLICATE_TO_TP_DEGREE = "replicate-to-tp-degree"


class FlashAttentionStrategy(enum.Enum):
    """Only NONE exists without a device."""

    NONE = 0


class QKNormPlacement(enum.Enum):
    PRE_ROPE = 0
    POST_ROPE = 1


def determine_sharding_strategy(
    tp_degree: int, source_key_value_heads: int, desired_sharding_strategy: GQA | None = None
) -> GQA:
    """One KV head per rank, by replication, where the KV heads divide the degree; else as many as query heads."""
    if tp_degree % source_key_value_heads == 0 and desired_sharding_strategy is not GQA.CONVERT_TO_MHA:
        return GQA.REPLICATE_TO_TP_DEGREE
    return GQA.CONVERT_TO_MHA


def get_shardable_head_counts(
    tp_degree: int, num_attention_heads: int, num_key_value_heads: int, sharding_strategy: GQA
) -> tuple[int, int]:
    """(query heads, KV heads) after padding and replication, both divisible by `tp_degree`."""
    query_heads = num_attention_heads + get_padding_length(num_attention_heads, tp_degree)
    if num_attention_heads == num_key_value_heads:
        return query_heads, query_heads
    if num_key_value_heads % tp_degree == 0:
        return query_heads, num_key_value_heads
    return query_heads, tp_degree if sharding_strategy is GQA.REPLICATE_TO_TP_DEGREE else query_heads


def _pad_heads(tensor: torch.Tensor, dim: int, heads: int, groups: int, padded_heads: int) -> torch.Tensor:
    """Zero heads appended to each of `groups` equal runs of heads along `dim`."""
    if padded_heads == heads:
        return tensor
    grouped = tensor.unflatten(dim, (groups, heads // groups, -1))
    shape = list(grouped.shape)
    shape[dim + 1] = divide(padded_heads - heads, groups)
    return torch.cat([grouped, grouped.new_zeros(shape)], dim=dim + 1).flatten(dim, dim + 2)


def _parts_of(layer: nn.Module) -> tuple[str, ...]:
    """The names of the tensors of a linear layer without bias."""
    return ("weight", "scale") if isinstance(layer, BaseQuantizeParallelLinear) else ("weight",)


def _repeat_heads(tensor: torch.Tensor, heads: int, target_heads: int) -> torch.Tensor:
    if heads == target_heads:
        return tensor
    return tensor.unflatten(0, (heads, -1)).repeat_interleave(divide(target_heads, heads), dim=0).flatten(0, 1)


class BaseGroupQueryAttention(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        tp_degree: int = 1,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        desired_sharding_strategy: GQA | None = None,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.head_dim, self.tp_degree, self.dtype, self.bias = (
            hidden_size,
            head_dim,
            tp_degree,
            dtype,
            bias,
        )
        self.tensor_model_parallel_group = tensor_model_parallel_group or get_tensor_model_parallel_group()
        self._src_num_attention_heads, self._src_num_key_value_heads = num_attention_heads, num_key_value_heads
        self.sharding_strategy = determine_sharding_strategy(tp_degree, num_key_value_heads, desired_sharding_strategy)
        self.num_attention_heads, self.num_key_value_heads = get_shardable_head_counts(
            tp_degree, num_attention_heads, num_key_value_heads, self.sharding_strategy
        )

    def get_num_attention_heads(self) -> int:
        return self.num_attention_heads

    def get_num_key_value_heads(self) -> int:
        return self.num_key_value_heads

    def get_sharding_strategy(self) -> GQA:
        return self.sharding_strategy

    def _pad_query_heads(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        groups = self._src_num_key_value_heads if self.sharding_strategy is GQA.REPLICATE_TO_TP_DEGREE else 1
        return _pad_heads(tensor, dim, self._src_num_attention_heads, groups, self.num_attention_heads)


class GroupQueryAttention_QKV(BaseGroupQueryAttention):
    """Query, key and value projections; the checkpoint's `q_proj`, `k_proj`, `v_proj` move below this module."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        tp_degree: int = 1,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        desired_sharding_strategy: GQA | None = None,
        gather_output: bool = True,
        fused_qkv: bool = False,
        clip_qkv: float | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
        rms_norm_eps: float = 1e-6,
        qkv_kernel_enabled: bool = False,
        qkv_nki_kernel_enabled: bool = False,
        fused_rmsnorm_skip_gamma: bool = False,
        tiling_factor: int = 1,
        seq_len_threshold_for_cc_tiling: int = 16834,
        logical_nc_config: int = 1,
        qkv_kernel_nbsd_layout: bool = False,
        on_cpu: bool = False,
        rank_ordering: list[int] | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            head_dim,
            num_attention_heads,
            num_key_value_heads,
            tp_degree,
            dtype,
            bias,
            desired_sharding_strategy,
            tensor_model_parallel_group,
        )
        require_inert(
            "GroupQueryAttention_QKV",
            fused_qkv=fused_qkv,
            clip_qkv=clip_qkv,
            sequence_parallel_enabled=sequence_parallel_enabled,
            qkv_kernel_enabled=qkv_kernel_enabled,
            qkv_nki_kernel_enabled=qkv_nki_kernel_enabled,
            rank_ordering=rank_ordering,
        )

        def column(heads: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                hidden_size,
                heads * head_dim,
                bias=bias,
                gather_output=gather_output,
                dtype=dtype,
                tensor_model_parallel_group=self.tensor_model_parallel_group,
            )

        self.q_proj = column(self.num_attention_heads)
        self.k_proj = column(self.num_key_value_heads)
        self.v_proj = column(self.num_key_value_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rmsnorm: Any = None,
        adapter_ids: Any = None,
        residual: Any = None,
        cos_cache: Any = None,
        sin_cache: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states), residual

    def preshard_hook(self, model_state_dict: Checkpoint, prefix: str) -> bool:
        own = prefix.rsplit(".", 1)[0]
        parent = own.rsplit(".", 1)[0]
        for name, layer in self.named_children():
            for part in _parts_of(layer):
                tensor = model_state_dict.pop(f"{parent}.{name}.{part}")
                model_state_dict[f"{own}.{name}.{part}"] = (
                    self._pad_query_heads(tensor, 0)
                    if name == "q_proj"
                    else _repeat_heads(tensor, self._src_num_key_value_heads, self.num_key_value_heads)
                )
        return True


class GroupQueryAttention_O(BaseGroupQueryAttention):
    """Output projection; the checkpoint's `o_proj` moves below this module."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        tp_degree: int = 1,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        desired_sharding_strategy: GQA | None = None,
        input_is_parallel: bool = False,
        layer_name: str = "o_proj",
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
        rpl_reduce_dtype: torch.dtype | None = None,
        out_proj_kernel_enabled: bool = False,
        logical_nc_config: int = 1,
        rank_ordering: list[int] | None = None,
        tiling_factor: int = 1,
    ) -> None:
        super().__init__(
            hidden_size,
            head_dim,
            num_attention_heads,
            num_key_value_heads,
            tp_degree,
            dtype,
            bias,
            desired_sharding_strategy,
            tensor_model_parallel_group,
        )
        require_inert(
            "GroupQueryAttention_O",
            sequence_parallel_enabled=sequence_parallel_enabled,
            out_proj_kernel_enabled=out_proj_kernel_enabled,
            rank_ordering=rank_ordering,
        )
        self.layer_name = layer_name
        self.o_proj = RowParallelLinear(
            self.num_attention_heads * head_dim,
            hidden_size,
            bias=bias,
            input_is_parallel=input_is_parallel,
            dtype=dtype,
            tensor_model_parallel_group=self.tensor_model_parallel_group,
            reduce_dtype=rpl_reduce_dtype or dtype,
        )

    def forward(self, attention_output: torch.Tensor, adapter_ids: Any = None) -> torch.Tensor:
        return self.o_proj(attention_output)

    def preshard_hook(self, model_state_dict: Checkpoint, prefix: str) -> bool:
        own = prefix.rsplit(".", 1)[0]
        parent = own.rsplit(".", 1)[0]
        for part in _parts_of(self.o_proj):
            tensor = model_state_dict.pop(f"{parent}.{self.layer_name}.{part}")
            # The scales of a row-parallel layer are of its outputs, which have no heads.
            model_state_dict[f"{own}.o_proj.{part}"] = self._pad_query_heads(tensor, 1) if part == "weight" else tensor
        return True


@dataclass(frozen=True)
class NeuronAttentionBaseOutput:
    """What an attention layer returns; unpacks to its first four fields."""

    hidden_states: torch.Tensor
    present_key_value: KeyValue
    cos_cache: torch.Tensor | None = None
    sin_cache: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    attn_input_hidden_states: torch.Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.hidden_states, self.present_key_value, self.cos_cache, self.sin_cache))

    def __getitem__(self, i: int) -> Any:
        return getattr(self, fields(self)[i].name)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate-half position embedding of q and k [B, heads, S, E] by cos and sin [B, S, E]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


class NeuronAttentionBase(nn.Module):
    """Causal GQA with a KV cache; subclasses override the same hooks as on NxDI."""

    def __init__(
        self,
        config: InferenceConfig,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int | None = None,
        rotary_emb: nn.Module | None = None,
        rope_theta: float | None = None,
        use_scaled_rope: bool = False,
        rms_norm_eps: float | None = None,
        use_qk_norm: bool = False,
        qk_norm_placement: QKNormPlacement = QKNormPlacement.PRE_ROPE,
        q_layernorm: Callable[[torch.Tensor], torch.Tensor] | None = None,
        k_layernorm: Callable[[torch.Tensor], torch.Tensor] | None = None,
        post_transpose_layernorm: bool = False,
        clip_qkv: float | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        softmax_scale: float | None = None,
        num_cores_per_group: int = 1,
        sequence_parallel_enabled: bool | None = None,
        attention_chunk_size: int | None = None,
        is_post_global_attn_layer: bool = False,
        is_pre_global_attn_layer: bool = False,
        sliding_window: int | None = None,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
        o_proj_layer_name: str = "o_proj",
        learned_sinks_size: int | None = None,
        optimize_interleave_attn: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.neuron_config = config, config.neuron_config
        self.tensor_model_parallel_group = tensor_model_parallel_group or get_tensor_model_parallel_group()
        self.rank_util = SPMDRank(self.neuron_config.tp_degree) if model_parallel_is_initialized() else None
        self.tp_degree = self.tensor_model_parallel_group.size()
        self.torch_dtype = self.neuron_config.attention_dtype or self.neuron_config.torch_dtype
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rotary_emb, self.rope_theta, self.rms_norm_eps = rotary_emb, rope_theta, rms_norm_eps
        self.softmax_scale = math.sqrt(self.head_dim) if softmax_scale is None else softmax_scale
        self.q_layernorm, self.k_layernorm = q_layernorm, k_layernorm

        heads: dict[str, Any] = dict(
            hidden_size=hidden_size,
            head_dim=self.head_dim,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            tp_degree=self.tp_degree,
            dtype=self.torch_dtype,
            tensor_model_parallel_group=self.tensor_model_parallel_group,
        )
        self.qkv_proj = GroupQueryAttention_QKV(**heads, bias=qkv_bias, gather_output=False)
        self.o_proj = GroupQueryAttention_O(
            **heads,
            bias=o_bias,
            input_is_parallel=True,
            layer_name=o_proj_layer_name,
            rpl_reduce_dtype=self.neuron_config.rpl_reduce_dtype,
        )
        self.num_heads = divide(self.qkv_proj.get_num_attention_heads(), self.tp_degree)
        self._src_num_key_value_heads = num_key_value_heads
        self.num_key_value_heads = divide(self.qkv_proj.get_num_key_value_heads(), self.tp_degree)
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads

    def get_qkv_proj(self) -> GroupQueryAttention_QKV:
        return self.qkv_proj

    def get_o_proj(self) -> Callable[..., torch.Tensor]:
        return self.o_proj

    def apply_rotary_embedding(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        position_ids: torch.Tensor,
        cos_cache: torch.Tensor | None,
        sin_cache: torch.Tensor | None,
        use_polar_compatible_rope: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if self.rotary_emb is not None:
            if cos_cache is None or sin_cache is None:
                cos_cache, sin_cache = self.rotary_emb(V, position_ids)
            Q, K = apply_rotary_pos_emb(Q, K, cos_cache, sin_cache)
        return Q, K, cos_cache, sin_cache

    def prep_qkv_tensors(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        past_key_value: KeyValue | None,
        adapter_ids: Any = None,
        cos_cache: torch.Tensor | None = None,
        sin_cache: torch.Tensor | None = None,
        rmsnorm: Any = None,
        skip_rope: bool = False,
        residual: torch.Tensor | None = None,
        use_polar_compatible_rope: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, Any]:
        """Project, split into heads [B, heads, S, E], normalise and rotate."""
        Q, K, V, residual = self.get_qkv_proj()(
            hidden_states=hidden_states, rmsnorm=rmsnorm, adapter_ids=adapter_ids, residual=residual
        )

        def heads_front(x: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
            x = x.unflatten(-1, (-1, self.head_dim))
            return (norm(x) if norm is not None else x).transpose(1, 2)

        Q, K, V = heads_front(Q, self.q_layernorm), heads_front(K, self.k_layernorm), heads_front(V, None)
        if not skip_rope:
            Q, K, cos_cache, sin_cache = self.apply_rotary_embedding(
                Q, K, V, position_ids, cos_cache, sin_cache, use_polar_compatible_rope
            )
        return Q, K, V, cos_cache, sin_cache, residual

    def perform_prefill(
        self, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, q_len: int, bsz: int, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, FlashAttentionStrategy]:
        """Causal attention over the new tokens alone; right padding needs no mask beyond the causal one."""
        output = F.scaled_dot_product_attention(
            Q, K, V, is_causal=True, scale=1 / self.softmax_scale, enable_gqa=self.num_key_value_groups > 1
        )
        return output, FlashAttentionStrategy.NONE

    def attention_context_encode(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        q_len: int,
        bsz: int,
        attention_mask: torch.Tensor,
        past_key_value: KeyValue | None = None,
        active_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output, _ = self.perform_prefill(Q, K, V, q_len, bsz, attention_mask)
        return output.transpose(1, 2), K, V

    def compute_for_token_gen(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_value: KeyValue,
        attention_mask: torch.Tensor,
        active_mask: torch.Tensor | None,
        is_prefix_caching: bool = False,
    ) -> torch.Tensor:
        """Attention of the new token to itself and to the cache [B, M, P, E] where `attention_mask` [B, 1, 1, P]."""
        K_prior, V_prior = past_key_value
        # The G query heads of a KV head are rows of one product, so that the cache is read once and never repeated.
        grouped = Q.unflatten(1, (self.num_key_value_heads, -1)).flatten(2, 3) / self.softmax_scale
        prior = torch.matmul(grouped, K_prior.transpose(2, 3))
        prior = prior.masked_fill(~attention_mask, torch.finfo(prior.dtype).min)
        active = torch.matmul(grouped, K.transpose(2, 3))
        weights = torch.cat((prior, active), dim=-1).softmax(dim=-1, dtype=torch.float32).to(Q.dtype)
        length = prior.shape[-1]
        output = torch.matmul(weights[..., :length], V_prior) + torch.matmul(weights[..., length:], V)
        return output.reshape(Q.shape)

    def attention_tokengen(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_value: KeyValue,
        active_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        return self.compute_for_token_gen(Q, K, V, position_ids, past_key_value, attention_mask, active_mask)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_value: KeyValue | None = None,
        active_mask: torch.Tensor | None = None,
        adapter_ids: Any = None,
        cos_cache: torch.Tensor | None = None,
        sin_cache: torch.Tensor | None = None,
        rmsnorm: Any = None,
        rotary_position_ids: Any = None,
        kv_mgr: Any = None,
        get_kv_per_layer: bool = False,
        update_kv_per_layer: bool = False,
        residual: torch.Tensor | None = None,
        windowed_context_encoding_window_idx: int = -1,
        **kwargs: Any,
    ) -> NeuronAttentionBaseOutput:
        """hidden_states [B, S, D]; without `past_key_value` this is context encoding, with it token generation."""
        original_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(self.torch_dtype)
        bsz, q_len, _ = hidden_states.shape
        Q, K, V, cos_cache, sin_cache, residual = self.prep_qkv_tensors(
            position_ids if rotary_position_ids is None else rotary_position_ids,
            hidden_states,
            past_key_value,
            adapter_ids=adapter_ids,
            cos_cache=cos_cache,
            sin_cache=sin_cache,
            rmsnorm=rmsnorm,
            residual=residual,
        )
        if past_key_value is None:
            output, K, V = self.attention_context_encode(Q, K, V, q_len, bsz, attention_mask)
        else:
            output = self.attention_tokengen(
                Q, K, V, attention_mask, position_ids, past_key_value, active_mask, **kwargs
            ).transpose(1, 2)
        output = self.get_o_proj()(output.reshape(bsz, q_len, -1), adapter_ids=adapter_ids).to(original_dtype)
        return NeuronAttentionBaseOutput(output, (K, V), cos_cache, sin_cache, residual)
