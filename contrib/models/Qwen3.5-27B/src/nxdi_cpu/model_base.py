# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The traced decoder and the application around it; stands in for NxDI's `models.model_base`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import autobucketing
from .application_base import NeuronApplicationBase
from .config import InferenceConfig
from .kv_cache import KVCacheManager
from .layers import SPMDRank
from .model_wrapper import CONTEXT_ENCODING_MODEL_TAG, TOKEN_GENERATION_MODEL_TAG, ModelWrapper
from .parallel_state import gather_from_tensor_model_parallel_region
from .sampling import (
    create_sampler,
    infer_sampling_params,
    mask_padded_logits,
    prepare_sampling_params,
    validate_sampling_params,
)

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast


class NeuronBaseModel(nn.Module):
    """Embedding, decoder layers, norm, head and cache; `forward` is what gets traced on Neuron."""

    on_device_sampling: bool
    num_key_value_heads: int
    hidden_size: int
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    lm_head: Any
    kv_mgr: KVCacheManager

    def __init__(self, config: InferenceConfig, optimize_inference: bool = True) -> None:
        super().__init__()
        self.config, self.neuron_config = config, config.neuron_config
        self.sampler: Any = None
        self.batch_size = self.neuron_config.batch_size
        self.n_positions = self.neuron_config.n_positions
        self.vocab_size = config.vocab_size
        self.speculation_length = self.neuron_config.speculation_length
        self.padding_side = self.neuron_config.padding_side
        self.rank_util = SPMDRank(world_size=self.neuron_config.tp_degree)
        self.setup_attr_for_model(config)
        self.init_model(config)
        if optimize_inference:
            self.init_inference_optimization(config)

    def setup_attr_for_model(self, config: Any) -> None:
        raise NotImplementedError("setup_attr_for_model() is not implemented")

    def init_model(self, config: Any) -> None:
        raise NotImplementedError("init_model() is not implemented")

    def init_inference_optimization(self, config: Any) -> None:
        if self.on_device_sampling:
            self.sampler = create_sampler(config.neuron_config)
        self.kv_mgr = KVCacheManager(config, num_kv_head=self.num_key_value_heads, global_rank=self.rank_util)

    def _is_context_encoding(self, input_ids: torch.Tensor) -> bool:
        return input_ids.shape[-1] > 1 and input_ids.shape[-1] != self.speculation_length

    def create_attn_mask(
        self,
        attention_mask: torch.Tensor,
        is_for_context_encoding: bool,
        is_for_speculation: bool,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Cache mask [B, 1, 1, P] of a decoding step; none for a prompt, whose attention is causal by construction."""
        if is_for_context_encoding:
            return None
        return attention_mask[:, None, None, :].to(torch.bool)

    def create_padding_mask(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Real tokens of a padded prompt, for layers that need them; a hook."""
        return None

    def set_none_if_empty(self, param: torch.Tensor | None) -> torch.Tensor | None:
        return None if param is None or param.numel() == 0 else param

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        seq_ids: torch.Tensor,
        sampling_params: torch.Tensor,
        prev_hidden: torch.Tensor | None = None,
        adapter_ids: torch.Tensor | None = None,
        accepted_indices: torch.Tensor | None = None,
        current_length: torch.Tensor | None = None,
        medusa_mask: torch.Tensor | None = None,
        scatter_index: torch.Tensor | None = None,
        slot_mapping: torch.Tensor | None = None,
        active_block_table: torch.Tensor | None = None,
        num_queries: torch.Tensor | None = None,
        computed_context_lens: torch.Tensor | None = None,
        tile_q_indices: torch.Tensor | None = None,
        tile_block_tables: torch.Tensor | None = None,
        tile_masks: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        kv_cache: torch.Tensor | None = None,
        active_mask: torch.Tensor | None = None,
        rotary_position_id: torch.Tensor | None = None,
        vision_embeddings: torch.Tensor | None = None,
        vision_mask: torch.Tensor | None = None,
        deepstack_vision_embeds: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """[tokens or logits, (logits,) *caches]; input_ids and position_ids [B, S], attention_mask [B, bucket]."""
        is_for_context_encoding = self._is_context_encoding(input_ids)
        hidden_states, updated_kv_cache = self.get_model_output(
            input_ids=input_ids,
            seq_ids=seq_ids,
            attention_mask=self.create_attn_mask(
                attention_mask, is_for_context_encoding, False, position_ids=position_ids
            ),
            position_ids=position_ids,
            inputs_embeds=self.set_none_if_empty(inputs_embeds),
            rotary_position_ids=self.set_none_if_empty(rotary_position_id),
            update_cache=True,
            is_for_context_encoding=is_for_context_encoding,
            vision_embeddings=self.set_none_if_empty(vision_embeddings),
            vision_mask=self.set_none_if_empty(vision_mask),
            padding_mask=self.create_padding_mask(position_ids),
            kvcache_buffer=self.set_none_if_empty(kv_cache),
        )
        if position_ids.shape[-1] > 1:
            last = position_ids.max(dim=1, keepdim=True).indices
            hidden_states = torch.gather(hidden_states, 1, last.unsqueeze(1).expand(-1, 1, hidden_states.shape[-1]))
        logits = self.lm_head(hidden_states).float()
        gathered = self.lm_head.gather_output
        logits = mask_padded_logits(
            logits,
            torch.tensor(0) if gathered else self.rank_util.get_rank(),
            1 if gathered else self.neuron_config.tp_degree,
            self.lm_head.pad_size,
        )
        if not gathered:
            logits = gather_from_tensor_model_parallel_region(logits)
        if not self.on_device_sampling:
            return [logits, *updated_kv_cache]
        tokens = self.sampler(logits[:, -1, :], sampling_params, rank_id=self.rank_util.get_rank()).to(torch.int32)
        return [tokens, *([logits] if self.neuron_config.output_logits else []), *updated_kv_cache]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def encode_vision_to_input(
        self, inputs_embeds: torch.Tensor, vision_embeddings: torch.Tensor, vision_mask: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError("encode_vision_to_input is not implemented")

    def get_model_output(
        self,
        input_ids: torch.Tensor | None = None,
        seq_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: list[Any] | None = None,
        active_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prev_hidden: torch.Tensor | None = None,
        adapter_ids: torch.Tensor | None = None,
        rotary_position_ids: torch.Tensor | None = None,
        update_cache: bool = False,
        is_for_context_encoding: bool = False,
        vision_embeddings: torch.Tensor | None = None,
        vision_mask: torch.Tensor | None = None,
        deepstack_vision_embeds: Any = None,
        local_attn_mask: torch.Tensor | None = None,
        windowed_context_encoding_window_idx: int = -1,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, list[Any]]:
        """Normalised hidden states [B, S, D] and the updated flat cache list, or what each layer gave to update it."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if vision_embeddings is not None and vision_mask is not None and is_for_context_encoding:
            inputs_embeds = self.encode_vision_to_input(inputs_embeds, vision_embeddings, vision_mask)
        assert position_ids is not None
        position_ids = position_ids.long()
        if not is_for_context_encoding:
            past_key_values = self.kv_mgr.get_cache(seq_ids=seq_ids, seq_len=self.n_positions, **kwargs)
        hidden_states, cos_cache, sin_cache = inputs_embeds, None, None
        new_key_values = []
        for idx, layer in enumerate(self.layers):
            hidden_states, key_value, cos_cache, sin_cache, _ = layer(
                hidden_states,
                seq_ids=seq_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=None if past_key_values is None else past_key_values[idx],
                active_mask=active_mask,
                adapter_ids=adapter_ids,
                cos_cache=cos_cache,
                sin_cache=sin_cache,
                rotary_position_ids=rotary_position_ids,
                kv_mgr=self.kv_mgr,
                get_kv_per_layer=False,
                update_kv_per_layer=False,
                idx=idx,
                is_for_context_encoding=is_for_context_encoding,
                seq_len=self.n_positions,
                residual=None,
                local_mask=local_attn_mask,
                windowed_context_encoding_window_idx=windowed_context_encoding_window_idx,
                padding_mask=padding_mask,
                **kwargs,
            )
            new_key_values.append(key_value)
        if not update_cache:
            return self.norm(hidden_states), new_key_values
        updated = self.kv_mgr.update_cache(
            is_for_context_encoding=is_for_context_encoding,
            seq_ids=seq_ids,  # type: ignore[arg-type]
            position_ids=position_ids,
            new_key_values=new_key_values,
            seq_len=self.n_positions,
            **kwargs,
        )
        return self.norm(hidden_states), updated


class NeuronBaseForCausalLM(NeuronApplicationBase):
    """Routes a call to the context-encoding or the token-generation submodel."""

    _model_cls: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_config = self.config.get_text_config()
        self.vocab_size = self.text_config.vocab_size
        self.padding_side = self.neuron_config.padding_side
        self.kv_cache_populated = False
        self.async_mode = self.neuron_config.async_mode
        self.default_sampling_params = prepare_sampling_params(self.neuron_config.batch_size)
        self.model_wrapper = self.get_model_wrapper_cls()
        self.enable_context_encoding()
        self.enable_token_generation()

    def get_model_wrapper_cls(self) -> type[ModelWrapper]:
        return ModelWrapper

    def enable_context_encoding(self, **model_init_kwargs: Any) -> None:
        config = copy.deepcopy(self.config)
        neuron_config = config.neuron_config
        neuron_config.batch_size = self.neuron_config.ctx_batch_size
        neuron_config.n_active_tokens = self.neuron_config.max_context_length
        neuron_config.bucket_n_active_tokens = True
        neuron_config.is_prefill_stage = True
        neuron_config.buckets = autobucketing.generate_buckets_for_cte(config)
        self.context_encoding_model = self.model_wrapper(
            config=config,
            model_cls=self._model_cls,
            tag=CONTEXT_ENCODING_MODEL_TAG,
            compiler_args=self.get_compiler_args(),
            model_init_kwargs=model_init_kwargs,
        )
        self.models.append(self.context_encoding_model)

    def enable_token_generation(self, enable_wlt_optimization: bool = True, **model_init_kwargs: Any) -> None:
        config = copy.deepcopy(self.config)
        neuron_config = config.neuron_config
        neuron_config.batch_size = self.neuron_config.tkg_batch_size
        neuron_config.n_active_tokens = 1
        neuron_config.bucket_n_active_tokens = False
        neuron_config.sequence_parallel_enabled = False
        neuron_config.is_prefill_stage = False
        neuron_config.buckets = autobucketing.generate_buckets_for_tkg(config)
        self.token_generation_model = self.model_wrapper(
            config=config,
            model_cls=self._model_cls,
            tag=TOKEN_GENERATION_MODEL_TAG,
            compiler_args=self.get_compiler_args(),
            priority_model_idx=0 if enable_wlt_optimization else None,
            model_init_kwargs=model_init_kwargs,
        )
        self.models.append(self.token_generation_model)

    def _infer_attention_mask(
        self,
        position_ids: torch.Tensor,
        full_context_lens: torch.Tensor | None = None,
        computed_context_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mask [B, S] of a prompt, whose padding has positions below its index; of a step, mask [B, cached tokens]."""
        if position_ids.shape[-1] > 1:
            return (position_ids >= torch.arange(position_ids.shape[-1])).to(position_ids.dtype)
        return (torch.arange(int(position_ids.max())) < position_ids).to(position_ids.dtype)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        seq_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        sampling_params: torch.Tensor | None = None,
        prev_hidden: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        adapter_ids: torch.Tensor | None = None,
        medusa_args: Any = None,
        return_dict: bool | None = None,
        llava_args: list[torch.Tensor] = [],  # noqa: B006 - NxDI's signature; never written
        input_capture_hook: Any = None,
        tensor_capture_hook: Any = None,
        slot_mapping: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        full_context_lens: torch.Tensor | None = None,
        computed_context_lens: torch.Tensor | None = None,
        tf_args: Any = None,
    ) -> CausalLMOutputWithPast:
        """One step: a prompt when `position_ids` start at 0, else one token per row.

        input_ids [B, S]; attention_mask [B, S] of a prompt, [B, cached tokens] of a decoding step; position_ids [B, S].
        Returns `logits` [B, 1, V] float32 (None with on-device sampling and no output_logits) and `tokens`.
        """
        if input_ids is None:
            raise ValueError("input_ids is None: NxDI's forward takes token ids, inputs_embeds only beside them")
        if position_ids is None:
            raise ValueError("position_ids is None: NxDI's forward needs them; the prompt's count from 0")
        if attention_mask is None:
            attention_mask = self._infer_attention_mask(position_ids)
        if seq_ids is None:
            seq_ids = torch.arange(input_ids.shape[0])
        if sampling_params is None:
            sampling_params = self.default_sampling_params
        if self.neuron_config.on_device_sampling_config is not None:
            validate_sampling_params(sampling_params, self.neuron_config.on_device_sampling_config)
        self.sampling_params = infer_sampling_params(sampling_params)
        outputs, is_run_on_neuron = self._get_model_outputs(
            input_ids,
            attention_mask,
            position_ids,
            seq_ids,
            self.sampling_params,
            prev_hidden,
            adapter_ids,
            medusa_args,
            llava_args,
        )
        if not is_run_on_neuron:
            self._copy_past_key_values(outputs)
        return self._get_constructed_outputs(outputs, is_run_on_neuron)

    def _is_prefill(self, position_ids: torch.Tensor) -> bool:
        return position_ids.min().item() == 0

    def _get_model_outputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        seq_ids: torch.Tensor,
        sampling_params: torch.Tensor,
        prev_hidden: torch.Tensor | None,
        adapter_ids: torch.Tensor | None,
        medusa_args: Any,
        llava_args: Any,
        slot_mapping: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        full_context_lens: torch.Tensor | None = None,
        computed_context_lens: torch.Tensor | None = None,
        tf_args: Any = None,
    ) -> tuple[list[torch.Tensor], bool]:
        prefill = self._is_prefill(position_ids)
        submodel = self.context_encoding_model if prefill else self.token_generation_model
        outputs = submodel(
            input_ids,
            attention_mask,
            position_ids,
            seq_ids,
            sampling_params,
            prev_hidden,
            adapter_ids,
            *llava_args,
        )
        self.kv_cache_populated = self.kv_cache_populated or prefill
        return outputs, submodel.is_neuron()

    def _copy_past_key_values(self, outputs: list[torch.Tensor]) -> None:
        first = 2 if self.neuron_config.output_logits and self.on_device_sampling else 1
        for submodel in self.models:
            for cache, updated in zip(submodel.model.kv_mgr.past_key_values, outputs[first:], strict=True):
                cache.data = updated.data

    def _get_constructed_outputs(
        self, outputs: list[torch.Tensor] | torch.Tensor, is_run_on_neuron: bool
    ) -> CausalLMOutputWithPast:
        from transformers.modeling_outputs import CausalLMOutputWithPast  # takes seconds: only a call needs it

        first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]  # a device keeps the caches
        logits: torch.Tensor | None = first
        if self.on_device_sampling:
            logits = outputs[1] if self.neuron_config.output_logits else None
        result = CausalLMOutputWithPast(logits=logits, hidden_states=first, attentions=None)
        result.tokens = first
        return result

    def reset(self) -> None:
        """Expect a prompt in the next call."""
        self.kv_cache_populated = False

    def get_required_kwargs(self) -> list[str]:
        return []
