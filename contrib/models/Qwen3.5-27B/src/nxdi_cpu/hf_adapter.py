# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""transformers' `generate` over an NxDI application; stands in for `utils.hf_adapter`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from .application_base import NeuronApplicationBase
from .config import InferenceConfig, to_dict, to_torch_dtype
from .sampling import prepare_sampling_params


def load_pretrained_config(
    model_path_or_name: str | os.PathLike[str] | None = None, hf_config: PretrainedConfig | None = None
) -> Callable[[InferenceConfig], None]:
    """A `load_config` hook that copies a transformers configuration into an InferenceConfig.

    Raises:
        ValueError: neither or both arguments are given.
    """
    if (model_path_or_name is None) == (hf_config is None):
        raise ValueError("give exactly one of model_path_or_name and hf_config")

    def load_config(self: InferenceConfig) -> None:
        config = AutoConfig.from_pretrained(model_path_or_name) if hf_config is None else hf_config
        values = config.to_dict()
        dtype = values.pop("dtype", None) or values.pop("torch_dtype", None)
        values.pop("torch_dtype", None)
        if dtype is not None and not self.neuron_config.overrides_torch_dtype:
            self.neuron_config.torch_dtype = to_torch_dtype(dtype) if isinstance(dtype, str) else dtype
        for name, value in values.items():
            if isinstance(getattr(config, name, None), PretrainedConfig):
                values[name] = SimpleNamespace(**value)
        self.__dict__.update(values)
        if getattr(config, "attribute_map", None):
            self.attribute_map = config.attribute_map

    return load_config


def to_pretrained_config(config: InferenceConfig) -> PretrainedConfig:
    """The transformers view of an InferenceConfig; what `generate` reads."""
    values = copy.deepcopy(to_dict(config))
    for name in ("neuron_config", "vision_config"):
        values.pop(name, None)
    return PretrainedConfig(**values)


class HuggingFaceGenerationAdapter(PreTrainedModel, GenerationMixin):
    """Gives a loaded application transformers' `generate`, with right padding and without a transformers cache."""

    config_class = PretrainedConfig

    def __init__(
        self,
        model: NeuronApplicationBase,
        input_start_offsets: list[int] | None = None,
        capture_draft_logits: bool = False,
    ) -> None:
        super().__init__(to_pretrained_config(model.config))
        self.neuron_model: Any = model
        self.neuron_config = model.config.neuron_config
        self.on_device_sampling = self.neuron_config.on_device_sampling_config is not None
        self.prev_kv_cache_populated = False
        self.forward = model.forward

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; every call starts a new conversation."""
        self.neuron_model.reset()
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The model holds its own cache."""

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        pad_token = generation_config._pad_token_tensor
        has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        rows = input_ids.shape[0]
        if model_kwargs.get("attention_mask") is None:  # transformers 5 drops a mask of ones
            model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        model_kwargs["sampling_params"] = prepare_sampling_params(
            rows, generation_config.top_k or 0, generation_config.top_p or 1.0, generation_config.temperature or 1.0
        )
        unfinished = torch.ones(rows, dtype=torch.long)
        scores: tuple[torch.Tensor, ...] = ()
        raw_logits: tuple[torch.Tensor, ...] = ()
        while unfinished.any():
            model_inputs = self.prepare_inputs_for_generation(input_ids, **model_kwargs)
            model_kwargs["attention_mask"] = model_inputs["attention_mask"]
            outputs = self(**model_inputs, return_dict=True)
            if outputs.logits is not None:
                logits = outputs.logits[:, -1, :]
                step_scores = logits_processor(input_ids, logits)
                if generation_config.return_dict_in_generate and generation_config.output_scores:
                    scores += (step_scores,)
                if generation_config.return_dict_in_generate and generation_config.output_logits:
                    raw_logits += (logits,)
            if self.on_device_sampling:
                tokens = outputs.tokens.long()
            elif generation_config.do_sample:
                tokens = torch.multinomial(step_scores.softmax(dim=-1), 1).squeeze(1)
            else:
                tokens = step_scores.argmax(dim=-1)
            if has_eos:
                tokens = torch.where(unfinished.bool(), tokens, pad_token)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores or None, logits=raw_logits or None)
        return input_ids

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        sampling_params: torch.Tensor | None = None,
        adapter_ids: torch.Tensor | None = None,
        divergence_idx: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The prompt with positions counted over its real tokens, then one token per row at the next position."""
        assert attention_mask is not None, "_sample always makes one"
        self.prev_kv_cache_populated = self.neuron_model.kv_cache_populated
        # Always from the mask: the position_ids that transformers 5 puts into kwargs are those of the prompt.
        if self.prev_kv_cache_populated:
            input_ids = input_ids[:, -1:]
            position_ids = attention_mask.long().sum(-1, keepdim=True)
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        model_inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "sampling_params": sampling_params,
            "adapter_ids": adapter_ids,
        }
        for name in self.neuron_model.get_required_kwargs():
            model_inputs[name] = kwargs.get(name)
        return model_inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_for_token_generation: bool | None = None,
        is_encoder_decoder: bool = False,
    ) -> dict[str, Any]:
        """A decoding step adds one cached token per row: on the left, where the ones of a right-padded mask are."""
        if is_for_token_generation is None:
            is_for_token_generation = self.prev_kv_cache_populated
        mask = model_kwargs.get("attention_mask")
        if mask is not None and is_for_token_generation:
            model_kwargs["attention_mask"] = torch.cat([mask.new_ones((mask.shape[0], 1)), mask], dim=-1)
        return model_kwargs

    @property
    def device(self) -> torch.device:
        """Where tokens are given and taken, whatever the model runs on."""
        return torch.device("cpu")
