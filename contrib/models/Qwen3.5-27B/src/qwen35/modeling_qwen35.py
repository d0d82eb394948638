# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5's text decoder on NxDI: [3 gated DeltaNet + 1 gated attention] blocks with dense SwiGLU MLPs.

Read this file first. The parts it puts together:

- `configuration_qwen35`: the checkpoint's config.json and NxDI's options, validated at once;
- `gated_deltanet`, `attention`, `norms`, `rope`: the layers; `ops`: DeltaNet's operators in plain PyTorch;
- `cache`: what is kept between steps;
- `checkpoint`, `conversion`: Hugging Face weights to this module tree;
- `nxdi`: the seam to NxDI, or to the CPU stand-ins where it is not installed.

Letters: B batch, S tokens, D hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .attention import NeuronQwen35Attention
from .cache import Qwen35CacheManager
from .checkpoint import CheckpointReader
from .configuration_qwen35 import Qwen35InferenceConfig
from .conversion import convert_checkpoint
from .gated_deltanet import NeuronGatedDeltaNet
from .norms import Qwen35RMSNorm
from .nxdi import (
    CONTEXT_ENCODING_MODEL_TAG,
    ColumnParallelLinear,
    DecoderModelInstance,
    ModelWrapper,
    NeuronBaseForCausalLM,
    NeuronBaseModel,
    ParallelEmbedding,
    RowParallelLinear,
)


class Qwen35MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen35InferenceConfig) -> None:
        super().__init__()
        dtype = config.neuron_config.torch_dtype
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = ColumnParallelLinear(hidden, inner, bias=False, gather_output=False, dtype=dtype)
        self.up_proj = ColumnParallelLinear(hidden, inner, bias=False, gather_output=False, dtype=dtype)
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, input_is_parallel=True, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In place: on a CPU, fresh memory for a whole prompt costs as much as the arithmetic.
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class NeuronQwen35DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is DeltaNet or attention by `layer_types`."""

    def __init__(self, config: Qwen35InferenceConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_linear = config.layer_types[layer_idx] == "linear_attention"
        # The checkpoint's own names, so that a tensor is found where its name says.
        if self.is_linear:
            self.linear_attn = NeuronGatedDeltaNet(config)
        else:
            self.self_attn = NeuronQwen35Attention(config)
        self.mlp = Qwen35MLP(config)
        self.input_layernorm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """hidden_states [B, S, D]; the keywords are those NxDI's decoder loop passes to every layer.

        Returns (hidden_states, new state pair, cos, sin, None), the tuple that loop unpacks.
        """
        mixer = self.linear_attn if self.is_linear else self.self_attn
        mixed = mixer(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed.hidden_states
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, mixed.present_key_value, mixed.cos_cache, mixed.sin_cache, None


class NeuronQwen35Model(NeuronBaseModel):
    """The traced module: embedding, layers, norm, head, cache."""

    def setup_attr_for_model(self, config: Qwen35InferenceConfig) -> None:
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.max_batch_size = config.neuron_config.max_batch_size
        self.buckets = config.neuron_config.buckets

    def init_model(self, config: Qwen35InferenceConfig) -> None:
        neuron_config = config.neuron_config
        self.embed_tokens = ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype=neuron_config.torch_dtype,
            shard_across_embedding=True,
            pad=True,
        )
        self.layers = nn.ModuleList(NeuronQwen35DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = ColumnParallelLinear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            pad=True,
            # On a device the sampler reduces over the ranks; on a CPU it wants whole rows.
            gather_output=not self.on_device_sampling or neuron_config.on_cpu,
            dtype=neuron_config.torch_dtype,
        )

    def init_inference_optimization(self, config: Qwen35InferenceConfig) -> None:
        super().init_inference_optimization(config)
        self.kv_mgr = Qwen35CacheManager(config, num_kv_head=self.num_key_value_heads, global_rank=self.rank_util)

    def create_padding_mask(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Real tokens [B, S] bool of a prompt whose padding has position 0 (see Qwen35ModelWrapper.pad_inputs)."""
        if position_ids.shape[1] == 1:
            return None
        first = torch.arange(position_ids.shape[1], device=position_ids.device) == 0
        return (position_ids > 0) | first

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NeuronQwen35Model:
        # Every parameter is declared with the dtype it needs. A cast of the whole module, as NxDI makes under
        # cast_type="config" and on a CPU, would take A_log, the norms and the recurrent state down to bfloat16.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self


class Qwen35DecoderModelInstance(DecoderModelInstance):
    """Makes the traced module, and checks that what must be float32 still is."""

    def load_module(self) -> None:
        """Build the module.

        Raises:
            TypeError: a decay parameter or a recurrent state is not float32.
        """
        super().load_module()
        state = self.module.kv_mgr.past_key_values
        recurrent = {f"recurrent state of layer {i}": state[2 * i] for i in self.config.linear_attention_layers}
        decays = {n: p for n, p in self.module.named_parameters() if n.endswith(("A_log.weight", "dt_bias.weight"))}
        cast = [name for name, p in {**recurrent, **decays}.items() if p.dtype != torch.float32]
        if cast:
            raise TypeError(f"float32 lost in tracing: {', '.join(cast)}; set cast_type='as-declared'")


class Qwen35ModelWrapper(ModelWrapper):
    """NxDI's wrapper with positions that tell padding from tokens, and rows in the order of their cache lines."""

    def get_model_instance(self) -> DecoderModelInstance:
        return Qwen35DecoderModelInstance(model_cls=self.model_cls, config=self.config, **self.model_init_kwargs)

    def pad_inputs(self, *args: torch.Tensor, pad_type: str = "first_fit") -> tuple[torch.Tensor, ...]:
        """Pad to the bucket; padding gets position 0.

        NxDI gives padding position 1, which in a prompt of one token cannot be told from its second token: the state
        would take in padding, and the last token would be looked for one place too far.
        """
        padded = super().pad_inputs(*args, pad_type=pad_type)
        if self.tag != CONTEXT_ENCODING_MODEL_TAG:
            return padded
        attention_mask, position_ids = padded[1], padded[2]
        return (*padded[:2], torch.where(attention_mask > 0, position_ids, 0), *padded[3:])

    def _forward(self, *args: torch.Tensor) -> Any:
        if not self.is_neuron():
            # Tracing sets the bucket once in each traced copy; the one module of a CPU serves every bucket.
            self.model.n_positions = args[1].shape[1]
        return super()._forward(*args)

    def forward(self, *args: Any, pad_type: str = "first_fit") -> Any:
        """Run the rows in ascending order of seq_ids, in which NxDI pairs them with cache lines, and put them back."""
        seq_ids = args[3]
        if seq_ids.shape[0] == 1 or bool((seq_ids[1:] > seq_ids[:-1]).all()):
            return super().forward(*args, pad_type=pad_type)
        order = torch.argsort(seq_ids)
        sorted_args = (a.index_select(0, order) if isinstance(a, torch.Tensor) and a.numel() else a for a in args)
        outputs = super().forward(*sorted_args, pad_type=pad_type)
        back = torch.argsort(order)
        if isinstance(outputs, torch.Tensor):
            return outputs.index_select(0, back)
        rows = 2 if self.neuron_config.output_logits and self.neuron_config.on_device_sampling_config else 1
        return [output.index_select(0, back) for output in outputs[:rows]] + list(outputs[rows:])


class NeuronQwen35ForCausalLM(NeuronBaseForCausalLM):
    """Qwen3.5 as an NxDI application: `compile`, `load` (or `to_cpu`), and `generate` through the HF adapter."""

    _model_cls = NeuronQwen35Model

    @classmethod
    def get_config_cls(cls) -> type[Qwen35InferenceConfig]:
        return Qwen35InferenceConfig

    def get_model_wrapper_cls(self) -> type[ModelWrapper]:
        return Qwen35ModelWrapper

    @classmethod
    def get_state_dict(
        cls, model_name_or_path: str | os.PathLike[str], config: Qwen35InferenceConfig
    ) -> MutableMapping[str, torch.Tensor]:
        """The checkpoint in the Neuron layout, each tensor read and converted when it is asked for.

        Raises:
            CheckpointError: a file is missing, truncated or no checkpoint.
            ConversionError: tensors are missing, unexpected or mis-shaped.
        """
        return convert_checkpoint(CheckpointReader(model_name_or_path), config)

    @staticmethod
    def convert_hf_to_neuron_state_dict(
        state_dict: MutableMapping[str, torch.Tensor], config: Qwen35InferenceConfig
    ) -> MutableMapping[str, torch.Tensor]:
        return convert_checkpoint(state_dict, config)

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict: MutableMapping[str, torch.Tensor]) -> None:
        """Nothing is left to do: the conversion fills lm_head from the embedding of a tied checkpoint."""

    @staticmethod
    def load_hf_model(model_path: str, **kwargs: Any) -> nn.Module:
        """The transformers model of a checkpoint; needs transformers >= 5."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model_path, **kwargs)
