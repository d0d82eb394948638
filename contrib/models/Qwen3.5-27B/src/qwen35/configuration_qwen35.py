# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Qwen3.5 decoder: the checkpoint's fields, flat, beside NxDI's run settings.

Letters: D hidden, H value heads, Hk key heads, K key head dim, V value head dim (all of the DeltaNet layers).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .device_settings import failing_features, read_settings, record_of_settings, record_problem, warn_once
from .error_text import first_three, one_line, shown
from .fp8_form import FP8, MODULES_NOT_CONVERTED, Fp8Form, parse_fp8
from .hardware import INSTANCES
from .json_files import read_json
from .kernel_selection import (
    AUTO,
    attention_problems,
    kernel_problems,
    leave_misfits_to_auto,
    mlp_problems,
    resolve_auto,
)
from .nxdi import InferenceConfig, KVQuantizationConfig, NeuronConfig

LINEAR_ATTENTION, FULL_ATTENTION = "linear_attention", "full_attention"
MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
_LAYER_TYPES = {LINEAR_ATTENTION, FULL_ATTENTION}

_COMMON = dict(
    model_type="qwen3_5_text", vocab_size=248320, head_dim=256, hidden_act="silu", max_position_embeddings=262144,
    rms_norm_eps=1e-6, tie_word_embeddings=False, full_attention_interval=4, linear_num_key_heads=16,
    linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, rope_theta=1e7,
    partial_rotary_factor=0.25, mrope_section=[11, 11, 10], mrope_interleaved=True, eos_token_id=248044,
)  # fmt: skip
QWEN35_PRESETS: dict[str, dict[str, Any]] = {
    "27B": _COMMON | dict(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=64, num_attention_heads=24, num_key_value_heads=4,
        linear_num_value_heads=48,
    ),
    "9B": _COMMON | dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4,
        linear_num_value_heads=32,
    ),
}  # fmt: skip
"""Text configs of published checkpoints: `Qwen35InferenceConfig(neuron_config, **QWEN35_PRESETS["27B"])`."""

_SHARDED_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip
_NEURON_SIZES = (
    "tp_degree", "seq_len", "max_context_length", "max_length", "batch_size", "ctx_batch_size", "tkg_batch_size",
    "max_batch_size", "kv_cache_batch_size",
)  # fmt: skip
_LARGEST = {
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "linear_num_key_heads": 1 << 16,
    "linear_num_value_heads": 1 << 16,
}
"""Sizes that something is listed for, one by one, before the checkpoint's headers are known to fit them."""

_LARGEST_SIZE = (1 << 31) - 1
_TOKEN_IDS = (
    "bos_token_id", "pad_token_id", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
)  # fmt: skip
_DEFAULT_ROPE_TYPES = ("default", "mrope")  # older dumps call the default frequencies mrope
_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", "rope_type")
# What transformers' configuration class assumes when config.json is silent.
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "layer_types": None,
    "partial_rotary_factor": 0.25,
    "mrope_section": None,
    "mrope_interleaved": True,
    "rope_type": "default",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "output_attentions": False,
    "output_hidden_states": False,
}
# Fields whose only legal value is the one the modules implement.
_FIXED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the MLP and the DeltaNet gates are written for SiLU"),
    "attention_bias": (False, "the projections have no bias"),
    "attn_output_gate": (True, "q_proj is read as query and gate"),
    "mrope_interleaved": (True, "frequencies are dealt to the three axes in turn"),
    "rope_type": ("default", "only unscaled rotary embeddings are implemented; drop the rope scaling"),
}
_QUANTISATIONS = ("quantization_config", "quantization", "compression_config")
"""Where quantised checkpoints say that they are: transformers' field, MLX's, and that of old compressed-tensors."""

_QUANTISERS = {"awq": "AWQ", "gptq": "GPTQ", "modelopt": "NVIDIA ModelOpt", "auto-round": "AutoRound"}
"""Names of methods, where `quant_method` has them in another form."""

_NO_ROLLBACK = (
    "NxDI's speculation cannot take a rejected token out of a DeltaNet state; num_speculative_tokens drafts with the "
    "checkpoint's own MTP head"
)
MOST_SPECULATIVE_TOKENS = 7
"""With the token before them eight: what the DeltaNet layers verify as one chunk."""

_OFF = "num_speculative_tokens=0"
_ONE_ROW = "the DeltaNet state is one row per sequence, compiled for one batch size, never paged, shared or windowed"
_PLAIN_ATTENTION = "the full-attention layers take NxDI's plain path (heads of 256 dims, an output gate)"
_MATRICES_ONLY = "of the weights, weights_dtype='fp8' puts the matrices in fp8, and activations are not quantised"
_TP_ONLY = "of the parallel modes only tp_degree is implemented"
# NxDI's fields for what weights_dtype and kv_cache_dtype ask for. Two of its defaults are int8 and a scale per tensor.
_FP8_WEIGHTS: dict[str, Any] = {
    "quantized": True,
    "quantization_type": "per_channel_symmetric",
    "quantization_dtype": "f8e4m3",
    "modules_to_not_convert": MODULES_NOT_CONVERTED,
}
_FP8_KV_CACHE: dict[str, Any] = {"kv_cache_quant": True, "kv_quant_config": None}
_NXDI_SWITCHES = ("quantized", "kv_cache_quant", "kv_quant_config")
# NeuronConfig features that Qwen3.5 does without: (fields, the only value supported, why). None and False are the same.
_NEURON_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("padding_side", "right", "the DeltaNet state is read after the last real token of a right-padded row"),
    ("is_block_kv_layout is_prefix_caching is_chunked_prefill", False, _ONE_ROW),
    ("chunked_prefill_config windowed_context_encoding_size token_generation_batches", None, _ONE_ROW),
    ("is_medusa enable_fused_speculation enable_eagle_speculation", False, _NO_ROLLBACK),
    ("token_tree_config", None, _NO_ROLLBACK),
    ("speculation_length", 0, _NO_ROLLBACK),
    ("fused_qkv flash_decoding_enabled k_cache_transposed attn_kernel_enabled", False, _PLAIN_ATTENTION),
    ("attn_tkg_nki_kernel_enabled attn_tkg_builtin_kernel_enabled", False, _PLAIN_ATTENTION),
    ("attn_block_tkg_nki_kernel_enabled attn_block_cte_nki_kernel_enabled", False, _PLAIN_ATTENTION),
    ("qkv_kernel_enabled qkv_nki_kernel_enabled out_proj_kernel_enabled", False, _PLAIN_ATTENTION),
    ("mlp_kernel_enabled mlp_tkg_nki_kernel_enabled", False, "mlp_kernel='nki' asks for the kernel"),
    ("quantized_mlp_kernel_enabled", False, _MATRICES_ONLY),
    ("activation_quantization_type", None, _MATRICES_ONLY),
    ("cp_degree mlp_cp_degree attention_dp_degree pp_degree ep_degree", 1, _TP_ONLY),
    ("sequence_parallel_enabled vocab_parallel", False, _TP_ONLY),
    ("layer_boundary_markers", False, "the marker calls have no CPU form"),
    ("lora_config tensor_capture_config tensor_replacement_config", None, "the layers have no hooks for it"),
)


class Qwen35ConfigError(ValueError):
    """A configuration that cannot run; `problems` holds one line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [*map(one_line, problems)]
        super().__init__(
            "this Qwen3.5 configuration cannot run:\n" + "\n".join(f"  - {line}" for line in self.problems)
        )


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights and activations may be, by name."""

FP8_NAME = "fp8"
"""The one value of `weights_dtype` and `kv_cache_dtype` beside None."""


def dtype_name(dtype: torch.dtype | str) -> str:
    """ "bfloat16", of torch.bfloat16 or of its name."""
    return str(dtype).removeprefix("torch.")


class Qwen35NeuronConfig(NeuronConfig):
    """NxDI's settings with the one default that Qwen3.5 needs changed, and what only this model has.

    `enable_bucketing` stays False as in NxDI.

    Args:
        deltanet_kernel: a `DeltaNetKernel` or its value, kept as the value.
        deltanet_inverse: "auto", a `DeltaNetInverse` or its value; what "auto" stands for is kept.
        attention_kernel: an `AttentionKernel` or its value, kept as the value; or one for each phase, by its name:
            {"context_encoding": "torch"} leaves the others at auto.
        mlp_kernel: "auto", an `MLPKernel` or its value; what "auto" stands for is kept. NxDI's mlp_kernel_enabled is
            for its own MLPs.
        prefill_chunk_size: tokens of a prompt that are encoded at a time; prompts up to seq_len then need no bucket
            longer than this. None encodes a prompt in one piece, of at most max_context_length.
        output_prompt_logits: give the logits after every token of a prompt, not only after the last one: a program then
            returns a bucket's tokens times the vocabulary in float32.
        weights_dtype: "fp8" keeps the matrices of the layers in float8_e4m3fn with a scale per output channel, on
            NxDI's quantised layers, whatever the checkpoint has them in: half the memory. `fp8_form.KEPT` lists what
            stays in torch_dtype. None keeps all in torch_dtype.
        kv_cache_dtype: "fp8" keeps keys and values in float8_e4m3fn, clamped to +-240, without scales; None keeps them
            in torch_dtype.
        instance: where the model will run, a key of `hardware.INSTANCES`: compiling for a device then first checks that
            it fits there, and refuses what does not. None takes the instance that this machine is, if it is one, and
            only warns, since one machine may compile for another.
        num_speculative_tokens: tokens that the checkpoint's MTP head drafts a step, 0 to 7; 0 decodes without it.
            NxDI's speculation_length is for its own draft models and stays 0.
        settings: a device settings file, see `device_settings`: a kernel field left at "auto" is what the file says.
            It is read here and now; the kernels are kept, with a record of the file in the field `device_settings`.
        device_settings: such a record, of a saved configuration.

    Raises:
        ValueError: `settings` is not there or not valid.
    """

    def __init__(
        self,
        deltanet_kernel: str = AUTO,
        deltanet_inverse: str = AUTO,
        attention_kernel: str | Mapping[str, str] = AUTO,
        prefill_chunk_size: int | None = None,
        output_prompt_logits: bool = False,
        instance: str | None = None,
        num_speculative_tokens: int = 0,
        weights_dtype: str | None = None,
        kv_cache_dtype: str | None = None,
        mlp_kernel: str = AUTO,
        settings: str | os.PathLike[str] | None = None,
        device_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("cast_type", "as-declared")
        # NxDI wants another checkpoint's path with `quantized`, and a saved kv_quant_config comes back as a dictionary.
        nxdi_fields = {name: kwargs.pop(name) for name in (*_FP8_WEIGHTS, *_FP8_KV_CACHE) if name in kwargs}
        if prefill_chunk_size is not None:
            kwargs["max_context_length"] = prefill_chunk_size
        self.prefill_chunk_size, self.output_prompt_logits = prefill_chunk_size, output_prompt_logits
        super().__init__(**kwargs)
        given = {
            "deltanet_kernel": _value_of(deltanet_kernel),
            "deltanet_inverse": _value_of(deltanet_inverse),
            "attention_kernel": _value_of(attention_kernel),
            "mlp_kernel": _value_of(mlp_kernel),
        }
        self.device_settings = device_settings
        if settings is None:
            kernels, _ = resolve_auto(given, {})
        else:
            found = read_settings(settings)
            kernels, taken = resolve_auto(given, found.kernels)
            self.device_settings = record_of_settings(settings, found, taken)
        self.deltanet_kernel, self.deltanet_inverse = kernels["deltanet_kernel"], kernels["deltanet_inverse"]
        self.attention_kernel, self.mlp_kernel = kernels["attention_kernel"], kernels["mlp_kernel"]
        self.instance = instance
        self.num_speculative_tokens = num_speculative_tokens
        self.weights_dtype, self.kv_cache_dtype = weights_dtype, kv_cache_dtype
        if weights_dtype == FP8_NAME:
            nxdi_fields |= _FP8_WEIGHTS
        if kv_cache_dtype == FP8_NAME:
            nxdi_fields |= _FP8_KV_CACHE | {"kv_quant_config": KVQuantizationConfig()}
        for name, value in nxdi_fields.items():
            setattr(self, name, value)


def _value_of(kernel: Any) -> Any:
    """What an argument that is an enum's member or its value, or has one for each phase, is kept as."""
    if isinstance(kernel, Mapping):
        return {key: _value_of(value) for key, value in kernel.items()}
    return kernel.value if isinstance(kernel, Enum) else kernel


class Qwen35InferenceConfig(InferenceConfig):
    """The text config of a checkpoint, flat and under its own field names, plus `neuron_config`.

    A nested `text_config` and rope dictionary are flattened and dropped, whoever loaded them. Precedence: keyword
    arguments over what `load_config` loaded; within that, nested over top-level. Two groups of fields differ:

    - `tie_word_embeddings` is true where either level says so: transformers' text class reads the nested flag, its
      vision-language class the one at the top. It counts only for a checkpoint that has the embedding or the head
      alone; one with both keeps both, as in transformers.
    - Rope settings are taken from one level, the nested one if it has any, and there from `rope_scaling` before
      `rope_parameters` before plain fields, as in transformers. A rope type that is not implemented is refused in any
      of these places.

    Raises:
        Qwen35ConfigError: naming every field that is missing, wrong or unsupported.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    full_attention_interval: int = 4
    layer_types: list[str]  # one a layer; every interval-th is full attention when the checkpoint has no list
    hidden_act: str
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float
    partial_rotary_factor: float
    mrope_section: list[int]  # rotated frequencies of the time, height and width axes; dealt in turn when absent
    mrope_interleaved: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    # Unset for text-only checkpoints. Class attributes stay out of the JSON, where NxDI would expect a dict.
    _name_or_path: str
    vision_config: dict[str, Any] | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None

    def __init__(
        self,
        neuron_config: NeuronConfig,
        fused_spec_config: Any = None,
        load_config: Callable[[Any], None] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        def load_flat(config: Qwen35InferenceConfig) -> None:
            assert load_config is not None
            load_config(config)
            config._flatten()  # before the keyword arguments, so that they win over nested values

        super().__init__(neuron_config, fused_spec_config, load_flat if load_config else None, metadata, **kwargs)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, neuron_config: NeuronConfig | None = None, **kwargs: Any
    ) -> Qwen35InferenceConfig:
        """Read `path`/config.json, of a text-only or a vision-language checkpoint; `kwargs` override its fields."""
        fields = {name: value for name, value in read_config(path).items() if cls._is_field(name)}
        fields.setdefault("model_type", None)
        fields["_name_or_path"] = str(path)  # where a compiled model finds its checkpoint again
        neuron_config = Qwen35NeuronConfig() if neuron_config is None else neuron_config
        return cls(neuron_config, load_config=lambda config: vars(config).update(fields), **kwargs)

    @classmethod
    def get_neuron_config_cls(cls) -> type[NeuronConfig]:
        return Qwen35NeuronConfig

    def get_required_attributes(self) -> list[str]:
        return [*_SIZES, "rope_theta", *_DEFAULTS]

    @classmethod
    def _is_field(cls, name: str) -> bool:
        """Whether config.json may set `name`: not what NxDI and this class keep under that name for themselves."""
        own = getattr(cls, name, None)
        kept = name in ("neuron_config", "fused_spec_config")
        return not (kept or callable(own) or isinstance(own, property))

    def _flatten(self) -> None:
        """Lift nested fields to the top level. Doing it twice changes nothing.

        Raises:
            Qwen35ConfigError: a nested config is no object, or names a dtype that torch lacks.
        """
        fields = vars(self)
        text = as_dict(fields.pop("text_config", None), "text_config")
        dtypes = [place.pop(name, None) for place in (text, fields) for name in ("dtype", "torch_dtype")]
        for declared in [dtype for dtype in reversed(dtypes) if dtype is not None]:
            self._take_dtype(declared)
        tied = [place["tie_word_embeddings"] for place in (fields, text) if "tie_word_embeddings" in place]
        rope, nested_rope = _take_rope(fields), _take_rope(text)
        unsupported = [of["rope_type"] for of in (rope, nested_rope) if of.get("rope_type", "default") != "default"]
        own = {"model_type", "architectures", "transformers_version", "_name_or_path", "text_config", "vision_config"}
        fields.update({name: value for name, value in text.items() if name not in own and self._is_field(name)})
        fields.update(nested_rope or rope)
        if unsupported:
            self.rope_type = unsupported[0]
        if tied:
            self.tie_word_embeddings = next((flag for flag in tied if not isinstance(flag, bool)), any(tied))
        for name in _QUANTISATIONS:
            if name in fields and fields[name] is None:
                del fields[name]  # transformers 4 takes a field that is there for a quantisation
        vision = as_dict(fields.pop("vision_config", None), "vision_config")
        if vision:
            self.vision_config = vision

    def _take_dtype(self, declared: Any) -> None:
        """Run in the checkpoint's dtype unless the caller asked for one.

        Raises:
            Qwen35ConfigError: torch has no such dtype.
        """
        dtype = getattr(torch, dtype_name(declared), None)
        if not isinstance(dtype, torch.dtype):
            name = shown(declared).strip("'")
            raise Qwen35ConfigError(
                [f"torch_dtype={name} is not supported: torch has no such dtype; set it to bfloat16 or float32"]
            )
        if self.neuron_config is not None and not self.neuron_config.overrides_torch_dtype:
            self.neuron_config.torch_dtype = dtype

    def add_derived_config(self) -> None:
        """Bring whatever was set into the flat form and fill in defaults; a saved config passes unchanged."""
        self.num_cores_per_group = 1
        self._flatten()
        for name, default in _DEFAULTS.items():
            if name not in vars(self):
                setattr(self, name, default)
        layers: Any = getattr(self, "num_hidden_layers", None)
        interval: Any = self.full_attention_interval
        if self.layer_types is None and is_size(layers, _LARGEST["num_hidden_layers"]) and is_size(interval):
            self.layer_types = [LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(layers)]
        head_dim, factor = getattr(self, "head_dim", None), self.partial_rotary_factor
        if self.mrope_section is None and is_size(head_dim) and is_number(factor) and 0 < factor <= 1:
            self.mrope_section = [(self.rotary_dim // 2 + 2 - axis) // 3 for axis in range(3)]
        if self.neuron_config is not None:
            # NxDI's "config" casts every floating parameter, buffer and checkpoint tensor to torch_dtype. A_log,
            # dt_bias, the norms and the recurrent state must stay float32, so each module's declared dtype has to win.
            self.neuron_config.cast_type = "as-declared"
            if self.neuron_config.attn_kernel_enabled is None:
                # NxDI takes None for "where the length allows": a kernel for heads of at most 128 dims, on a CPU too.
                self.neuron_config.attn_kernel_enabled = False
            # A batch is compiled for a number of rows; with fewer, the rest must not write to the lines of sequences
            # that wait. A single line is never idle in its own batch, and needs no room for what is masked.
            # The padding of a chunk needs that room too, and that of a step with fewer drafts than most.
            masked = self.neuron_config.kv_cache_batch_size > 1 or self.prefill_chunk_size is not None
            masked = masked or self.num_speculative_tokens != 0
            self.neuron_config.apply_seq_ids_mask = masked

    @property
    def output_prompt_logits(self) -> bool:
        """Whether prompts give logits after every token; a plain NeuronConfig has no such option."""
        return bool(getattr(self.neuron_config, "output_prompt_logits", False))

    @property
    def prefill_chunk_size(self) -> int | None:
        """Tokens of a prompt that are encoded at a time, or None; a plain NeuronConfig does not know of it."""
        size: int | None = getattr(self.neuron_config, "prefill_chunk_size", None)
        return size

    @property
    def num_speculative_tokens(self) -> int:
        """Tokens that the MTP head drafts a step, or 0; a plain NeuronConfig does not know of it."""
        number: int = getattr(self.neuron_config, "num_speculative_tokens", 0)
        return number

    @property
    def cached_layer_types(self) -> list[str]:
        """The kind of every layer that keeps something between calls: the decoder's, then the MTP head's if it drafts.

        The index in it is the number of a layer.
        """
        return [*self.layer_types, *[FULL_ATTENTION] * (self.num_speculative_tokens > 0)]

    @property
    def rotary_dim(self) -> int:
        """Leading dims of each attention head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        """Hk * K, the width of q and of k in a DeltaNet layer."""
        return int(self.linear_num_key_heads * self.linear_key_head_dim)

    @property
    def value_dim(self) -> int:
        """H * V, the width of v and of z in a DeltaNet layer."""
        return int(self.linear_num_value_heads * self.linear_value_head_dim)

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: q | k | v."""
        return 2 * self.key_dim + self.value_dim

    @property
    def full_attention_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION]

    @property
    def linear_attention_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind == LINEAR_ATTENTION]

    @property
    def fp8_form(self) -> Fp8Form | None:
        """How the checkpoint scales its fp8 weights, or None where its config.json says of none."""
        value = getattr(self, "quantization_config", None)
        return parse_fp8(value) if isinstance(value, Mapping) else None

    @property
    def matrix_dtype(self) -> torch.dtype:
        """dtype of the matrices of the layers: torch_dtype, or fp8."""
        dtype: torch.dtype = FP8 if self.neuron_config.quantized else self.neuron_config.torch_dtype
        return dtype

    def padded_num_attention_heads(self, tp_degree: int) -> int:
        """Attention heads once NxDI has added zero heads, as many to each KV group, to fill `tp_degree` ranks."""
        return int(self.num_attention_heads + -self.num_attention_heads % tp_degree)

    def valid_tp_degrees(self) -> list[int]:
        """Every `tp_degree` that this checkpoint can be sharded to."""
        return [tp for tp in range(1, self.linear_num_key_heads + 1) if _tp_obstacle(self, tp) is None]

    def validate_config(self) -> None:
        """Check everything and report it at once.

        Raises:
            Qwen35ConfigError: one line for each problem, with field, value and remedy.
        """
        if getattr(self, "model_type", MODEL_TYPES[0]) not in MODEL_TYPES:
            # Alone: the fields of another architecture would only bury it.
            raise Qwen35ConfigError([_model_type_problem(self.model_type)])
        malformed = dict(_malformed_fields(self))
        self._leave_misfits_to_auto(malformed.keys())
        problems = [*malformed.values(), *_structure_problems(self, malformed.keys())]
        if self.neuron_config is None:
            problems.append("neuron_config=None: pass a Qwen35NeuronConfig")
        else:
            problems += _neuron_problems(self, malformed.keys())
        if problems:
            raise Qwen35ConfigError(problems)
        super().validate_config()
        if record := self._device_settings:
            for line in failing_features(self, record["failing"]):
                warn_once(f"{record['file']}: {line}")

    @property
    def _device_settings(self) -> dict[str, Any] | None:
        """The record of the settings file, if there is one; a plain NeuronConfig does not know of it."""
        record: dict[str, Any] | None = getattr(self.neuron_config, "device_settings", None)
        return record

    def _leave_misfits_to_auto(self, malformed: Any) -> None:
        """Of the kernels that a settings file chose, leave those that cannot run this model to the default, and say so.

        Here, because the checks refuse such a kernel, and before the model's fields are there nobody knows.
        """
        record = self._device_settings
        if not record or record_problem(record) or _ill_sizes(self.neuron_config):
            return
        for line in leave_misfits_to_auto(self, record["kernels"], malformed):
            warn_once(f"{record['file']}: {line}; the default takes its place")


_SIZES = [name for name, kind in Qwen35InferenceConfig.__annotations__.items() if kind == "int"]


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields in `path`/config.json.

    Raises:
        Qwen35ConfigError: there is no such file, or it holds no JSON object.
    """
    directory = Path(path)
    file = directory / "config.json"
    try:
        fields = read_json(file)
    except FileNotFoundError:
        raise Qwen35ConfigError([f"{file} does not exist; {_directory_remedy(directory)}"]) from None
    except ValueError as error:
        raise Qwen35ConfigError([str(error)]) from error
    if not isinstance(fields, dict):
        raise Qwen35ConfigError([f"{file} holds a {type(fields).__name__}, not an object; download it again"])
    return fields


def _directory_remedy(directory: Path) -> str:
    """What to do about a directory without config.json, from what else is in it."""
    if gguf := sorted(file.name for file in directory.glob("*.gguf")):
        return f"GGUF files ({first_three(gguf)}) are not read, use the bf16 safetensors checkpoint"
    if (directory / "adapter_config.json").exists():
        return "an adapter is not a checkpoint, merge it into its base model and save that"
    return "pass a downloaded checkpoint's directory"


def as_dict(value: Any, name: str = "") -> dict[str, Any]:
    """A copy of a nested config, which transformers, NxDI and JSON hold as object, namespace and dict.

    Raises:
        Qwen35ConfigError: `name` is none of these.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    if not hasattr(value, "__dict__"):
        raise Qwen35ConfigError([f"{name}={shown(value)} must be an object; take it from the checkpoint's config.json"])
    return dict(vars(value))


def is_size(value: Any, largest: int = _LARGEST_SIZE) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    """Whether it is an integer of 0 or more, as token ids are."""
    return is_size(value) or (value == 0 and type(value) is int)


def _is_end(value: Any) -> bool:
    """Whether `eos_token_id` may be this: a token id, several, or null."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(map(is_count, value))
    return value is None or is_count(value)


def _take_rope(place: dict[str, Any]) -> dict[str, Any]:
    """Remove the rope settings from one level of a config and return them flat.

    As in transformers, `rope_scaling` takes the place of `rope_parameters`, and plain fields are for what is in
    neither. The type is the first that is not the default one, though transformers drops that of the dictionary which
    it does not use: who wrote it wanted it.

    Raises:
        Qwen35ConfigError: one of the two is no object; or `rope_scaling` leaves rope_theta to `rope_parameters`, where
            transformers would take 10000 instead.
    """
    older, newer = (as_dict(place.pop(name, None), name) for name in ("rope_scaling", "rope_parameters"))
    plain = {name: place.pop(name) for name in _ROPE_FIELDS if name in place}
    types = [of.get("rope_type", of.get("type", "default")) for of in (older, newer) if of]
    types = types or [plain.get("rope_type", "default")]
    kind = next((kind for kind in types if kind not in _DEFAULT_ROPE_TYPES), "default")
    chosen = older or newer
    if kind != "default":
        chosen = newer | older  # the type is refused, and should not be blamed for what the other has
    rope = plain | {name: chosen[name] for name in _ROPE_FIELDS if name in chosen}
    if "rope_theta" in newer and "rope_theta" not in rope:
        raise Qwen35ConfigError(
            ["rope_scaling has no rope_theta and takes the place of rope_parameters, which has one; move it there"]
        )
    if rope or chosen:
        rope["rope_type"] = kind
    return rope


def _quantisation_problem(config: Qwen35InferenceConfig) -> str | None:
    """What config.json says of a quantisation, if it does."""
    for name in _QUANTISATIONS:
        value = getattr(config, name, None)
        if value is None:
            continue
        method = value.get("quant_method", value.get("quant_algo")) if isinstance(value, Mapping) else None
        if method is None and isinstance(value, Mapping):
            if value.keys() >= {"group_size", "bits"}:
                method = "MLX"
            elif value.keys() & {"load_in_4bit", "load_in_8bit"}:
                method = "bitsandbytes"
        form = f"quantised with {_QUANTISERS.get(str(method), method)}" if method else "quantised"
        why = "which is not read"
        if name == "quantization_config" and isinstance(value, Mapping):
            try:
                if parse_fp8(value) is not None:
                    continue
            except ValueError as error:
                why = f"and {error}"
        return f"{name}={shown(value)}: the checkpoint is {form}, {why}; use the bf16 checkpoint"
    return None


def _model_type_problem(model_type: Any) -> str:
    hint = "this package runs the dense Qwen3.5 and Qwen3.6 checkpoints"
    if str(model_type).startswith("qwen3_5_moe"):
        hint = "the mixture-of-experts models are not supported yet; use a dense Qwen3.5 checkpoint"
    return f"model_type={shown(model_type)} is not one of {', '.join(MODEL_TYPES)}; {hint}"


def _malformed_fields(config: Qwen35InferenceConfig) -> Iterator[tuple[str, str]]:
    """(field, problem) for each architecture field that is missing, ill-typed or out of its range."""
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        **{name: (is_size, "must be a positive integer") for name in _SIZES if name not in _LARGEST},
        **{
            name: (partial(is_size, largest=most), f"must be a positive integer of at most {most}")
            for name, most in _LARGEST.items()
        },
        "rms_norm_eps": (lambda v: is_number(v) and v > 0, "must be a positive number"),
        "rope_theta": (lambda v: is_number(v) and v > 0, "must be a positive number, in rope_parameters"),
        "partial_rotary_factor": (lambda v: is_number(v) and 0 < v <= 1, "must be a number in (0, 1]"),
        "tie_word_embeddings": (lambda v: isinstance(v, bool), "must be true or false"),
        "mrope_section": (
            lambda v: v is None or (isinstance(v, list | tuple) and len(v) == 3 and all(map(is_count, v))),
            "must be three integers of 0 or more, or absent",
        ),
        "layer_types": (
            # None is left when the list could not be derived, for a reason that has its own line.
            lambda v: v is None or (isinstance(v, list | tuple) and {*map(str, v)} <= _LAYER_TYPES),
            f"must be a list of '{LINEAR_ATTENTION}' and '{FULL_ATTENTION}', or absent",
        ),
        "eos_token_id": (_is_end, "must be a token id, a list of them, or null"),
        **{name: (lambda v: v is None or is_count(v), "must be a token id or null") for name in _TOKEN_IDS},
    }
    for name, (accepts, remedy) in rules.items():
        if not hasattr(config, name):
            yield name, f"{name} is missing: it {remedy}; take it from the checkpoint's config.json"
        elif not accepts(getattr(config, name)):
            yield name, f"{name}={shown(getattr(config, name))} {remedy}; take it from the checkpoint's config.json"


def _structure_problems(config: Qwen35InferenceConfig, malformed: Any) -> Iterator[str]:
    """Problems between well-formed fields, and unsupported architectures."""

    def formed(*names: str) -> bool:
        return malformed.isdisjoint(names)

    for name, (value, reason) in _FIXED.items():
        if getattr(config, name, value) != value:
            yield f"{name}={shown(getattr(config, name))} is not supported, only {value!r}: {reason}"
    if problem := _quantisation_problem(config):
        yield problem
    groups = (("linear_num_value_heads", "linear_num_key_heads"), ("num_attention_heads", "num_key_value_heads"))
    for many, few in groups:
        if formed(many, few) and getattr(config, many) % getattr(config, few):
            yield (
                f"{many}={getattr(config, many)} is not a multiple of {few}={getattr(config, few)}; "
                "each of the latter serves the same number of the former, correct config.json"
            )
    kinds, layers = config.layer_types, getattr(config, "num_hidden_layers", None)
    if formed("layer_types", "num_hidden_layers") and kinds is not None and len(kinds) != layers:
        yield (
            f"layer_types has {len(kinds)} entries for num_hidden_layers={layers}; "
            "give one entry per layer (to cut layers, cut both)"
        )
    if formed("linear_conv_kernel_dim") and config.linear_conv_kernel_dim < 2:
        yield f"linear_conv_kernel_dim={config.linear_conv_kernel_dim} must be 2 or more, to leave a state to carry"
    if formed("pad_token_id", "vocab_size") and config.pad_token_id is not None:
        if config.pad_token_id >= config.vocab_size:
            yield f"pad_token_id={config.pad_token_id} is outside vocab_size={config.vocab_size}; set it to null"
    if formed("head_dim", "partial_rotary_factor"):
        rotated = config.head_dim * config.partial_rotary_factor
        if rotated != int(rotated) or rotated % 2 or not rotated:
            yield (
                f"partial_rotary_factor={config.partial_rotary_factor} of head_dim={config.head_dim} is {rotated} "
                "dims; choose a factor that gives a positive even integer"
            )
        elif formed("mrope_section") and config.mrope_section and sum(config.mrope_section) != rotated // 2:
            yield (
                f"mrope_section={list(config.mrope_section)} sums to {sum(config.mrope_section)}; it must sum to "
                f"{int(rotated // 2)}, half of the {int(rotated)} rotated dims"
            )


def _tp_obstacle(config: Qwen35InferenceConfig, tp: int) -> str | None:
    """Why the checkpoint cannot be split over `tp` ranks, if it cannot."""
    for count, what in (
        (config.linear_num_key_heads, "key heads"),
        (config.linear_num_value_heads, "value heads"),
        (config.intermediate_size, "intermediate_size columns"),
        (config.hidden_size, "hidden_size columns"),
    ):
        if count % tp:
            return f"does not divide the {count} {what}"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads % tp and tp % kv_heads:
        return f"neither divides the {kv_heads} KV heads nor is a multiple of them"
    if heads % tp and (tp % kv_heads or (config.padded_num_attention_heads(tp) - heads) % kv_heads):
        return f"does not divide the {heads} attention heads, even padded by KV group"
    return None


def _speculation_problems(config: Qwen35InferenceConfig) -> Iterator[str]:
    """Problems of drafting with the MTP head."""
    neuron, number = config.neuron_config, config.num_speculative_tokens
    if not is_count(number) or number > MOST_SPECULATIVE_TOKENS:
        yield (
            f"num_speculative_tokens={shown(number)} must be a whole number of 0..{MOST_SPECULATIVE_TOKENS}; "
            "0 decodes without drafts"
        )
        return
    if number == 0:
        return
    asked = f"num_speculative_tokens={number}"
    layers = getattr(config, "mtp_num_hidden_layers", None)
    if layers not in (None, 0, 1):  # 0 or no such field: whether there is a head, the tensors say
        yield f"{asked} with mtp_num_hidden_layers={shown(layers)}: only a head of one layer is supported; set {_OFF}"
    if getattr(config, "mtp_use_dedicated_embeddings", None):
        yield f"{asked} with mtp_use_dedicated_embeddings=True: a head with its own is not supported; set {_OFF}"
    if neuron.on_device_sampling_config is not None:
        yield (
            f"{asked} with on_device_sampling_config: greedy steps choose on the device without it, and sampled tokens "
            "are accepted on the host; set on_device_sampling_config=None"
        )
    if neuron.async_mode:
        yield f"{asked} with async_mode=True: a step begins where the accepted tokens of the last end; set it to False"


def _ill_sizes(neuron: NeuronConfig) -> list[str]:
    """The sizes of the run that are no positive integers."""
    return [name for name in _NEURON_SIZES if not is_size(getattr(neuron, name))]


def _neuron_problems(config: Qwen35InferenceConfig, malformed: Any) -> Iterator[str]:
    """Problems of the run settings, by themselves and against the checkpoint."""
    neuron = config.neuron_config
    fixed = list(_NEURON_FIXED)
    for name, fields in (("weights_dtype", _FP8_WEIGHTS), ("kv_cache_dtype", _FP8_KV_CACHE)):
        value = getattr(neuron, name, None)  # a plain NeuronConfig has neither
        if value is None:
            fixed += [(field, None, f"{name}={FP8_NAME!r} sets it") for field in fields if field in _NXDI_SWITCHES]
        elif value != FP8_NAME:
            yield f"{name}={shown(value)} is not supported; set it to {FP8_NAME!r}, or None for torch_dtype"
    for names, supported, reason in fixed:
        for name in names.split():
            value = getattr(neuron, name, supported)  # absent: this NxDI has no such feature
            if value != supported and not (value in (None, False) and supported in (None, False)):
                yield f"{name}={value!r} is not supported: {reason}; set {name}={supported!r}"
    if config.fused_spec_config is not None:
        yield f"fused_spec_config is not supported: {_NO_ROLLBACK}; leave it out"
    if neuron.torch_dtype not in DTYPES.values():
        reason = "gates and decays overflow float16; " if neuron.torch_dtype == torch.float16 else ""
        yield f"torch_dtype={neuron.torch_dtype} is not supported: {reason}set torch_dtype to bfloat16 or float32"
    yield from _speculation_problems(config)
    yield from kernel_problems(config, malformed)
    if (record := config._device_settings) is not None and (problem := record_problem(record)):
        yield f"device_settings: {problem}; pass settings=FILE in place of it"
    instance = getattr(neuron, "instance", None)
    if instance is not None and instance not in INSTANCES:
        yield f"instance={instance!r} is unknown; set it to {', '.join(INSTANCES)}, or None to be warned alone"
    if neuron.on_cpu and neuron.torch_dtype == torch.bfloat16 and neuron.tp_degree != 1:
        yield f"torch_dtype=bfloat16 with tp_degree={neuron.tp_degree} on a CPU: gloo reduces float32, set it to that"
    if neuron.attention_dtype not in (None, neuron.torch_dtype):
        yield f"attention_dtype={neuron.attention_dtype} differs from torch_dtype={neuron.torch_dtype}; leave it unset"

    if config.output_prompt_logits and neuron.on_device_sampling_config is not None:
        yield (
            "output_prompt_logits=True with on_device_sampling_config: the device would choose after the last column "
            "of a bucket, its padding; set one of them only"
        )
    ill = _ill_sizes(neuron)
    yield from (f"{name}={getattr(neuron, name)!r} must be a positive integer" for name in ill)
    for small, large, remedy in (
        ("max_context_length", "seq_len", "lower it or raise seq_len"),
        ("ctx_batch_size", "kv_cache_batch_size", "raise kv_cache_batch_size: each sequence needs a slot of the cache"),
        ("tkg_batch_size", "kv_cache_batch_size", "raise kv_cache_batch_size: each sequence needs a slot of the cache"),
    ):
        if small not in ill and large not in ill and getattr(neuron, small) > getattr(neuron, large):
            yield f"{small}={getattr(neuron, small)} exceeds {large}={getattr(neuron, large)}; {remedy}"
    if not ill:
        yield from attention_problems(config, malformed)
        yield from mlp_problems(config, malformed)
    if neuron.ctx_batch_size != neuron.tkg_batch_size and not neuron.is_continuous_batching:
        yield (
            f"ctx_batch_size={neuron.ctx_batch_size} differs from tkg_batch_size={neuron.tkg_batch_size}; "
            "set is_continuous_batching=True, so that slots are found by sequence id"
        )
    if neuron.async_mode and neuron.on_cpu:
        yield "async_mode=True has no CPU form: the next step is queued on a device; set async_mode=False with on_cpu"
    if neuron.async_mode and neuron.tkg_batch_size != neuron.kv_cache_batch_size:
        yield (
            f"async_mode=True with tkg_batch_size={neuron.tkg_batch_size} and kv_cache_batch_size="
            f"{neuron.kv_cache_batch_size}: NxDI picks its outputs by slot; make the two equal"
        )
    for name in ("seq_len", "max_length"):
        if name not in ill and "max_position_embeddings" not in malformed:
            if getattr(neuron, name) > config.max_position_embeddings:
                yield (
                    f"{name}={getattr(neuron, name)} exceeds max_position_embeddings={config.max_position_embeddings} "
                    f"of this checkpoint; lower {name}"
                )
    if "tp_degree" not in ill and malformed.isdisjoint(_SHARDED_SIZES):
        obstacle = _tp_obstacle(config, neuron.tp_degree)
        if obstacle:
            valid = ", ".join(map(str, config.valid_tp_degrees()))
            yield f"tp_degree={neuron.tp_degree} {obstacle} of this checkpoint; valid degrees: {valid}"
