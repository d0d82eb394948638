# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of a model and of its run; stands in for NxDI's `models.config`.

Kept: every `NeuronConfig` field that a dense decoder's code path reads or that a model should refuse by name, with
NxDI's names, defaults and JSON form, so that a `neuron_config.json` written here loads there and the other way round.
Left out: the classes that configure mixtures of experts, LoRA, quantisation and tensor capture; their fields keep
whatever they are given.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

CONFIG_FILE = "neuron_config.json"

_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_LONG_CONTEXT = 32 * 1024
_LONG_CONTEXT_SCRATCHPAD_PAGE_SIZE = 1024


def to_torch_dtype(dtype_str: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`.

    Raises:
        ValueError: not a floating dtype that weights may have.
    """
    if dtype_str not in _DTYPES:
        raise ValueError(f"Unsupported dtype: {dtype_str}; expected one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, dtype_str)
    return dtype


def to_dict(obj: Any) -> Any:
    """`obj` as JSON-ready dicts, lists and scalars; objects become their `__dict__`, classes their import path."""
    if type(obj) is dict:
        return {key: to_dict(value) for key, value in obj.items()}
    if type(obj) is list:
        return [to_dict(value) for value in obj]
    if isinstance(obj, type):
        return {"__module__": obj.__module__, "__name__": obj.__name__}
    if isinstance(obj, torch.dtype):
        return str(obj).removeprefix("torch.")
    if hasattr(obj, "__dict__"):
        return {key: to_dict(value) for key, value in vars(obj).items()}
    return obj


class _Derived(NamedTuple):
    compute: Callable[[Any], Any]


def _derived(compute: Callable[[Any], Any]) -> Any:
    """A default computed from the fields above it."""
    return _Derived(compute)


class OnDeviceSamplingConfig:
    """How the sampler picks tokens. NxDI turns `top_k_kernel_enabled` on by platform; there is no kernel here."""

    do_sample: bool = False
    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0
    dynamic: bool = False
    deterministic: bool = False
    global_topk: int = 256
    on_device_sampling_config: bool = True
    top_k_kernel_enabled: bool = False
    sampling_dp_degree: int = 1

    def __init__(self, **kwargs: Any) -> None:
        for name in OnDeviceSamplingConfig.__annotations__:
            setattr(self, name, kwargs.get(name, getattr(OnDeviceSamplingConfig, name)))


class NeuronConfig:
    """Settings of a run. The annotations below are the whole list: name, type and default, in the order they are set.

    Unknown keyword arguments are logged and dropped, as NxDI does.

    Raises:
        ValueError: settings that contradict each other.
    """

    # Shapes
    batch_size: int = 1
    padding_side: str = "right"
    allow_input_truncation: bool = False
    seq_len: int = 128
    n_active_tokens: int = _derived(lambda c: c.seq_len)
    n_positions: int = _derived(lambda c: c.seq_len)
    max_context_length: int = _derived(lambda c: c.seq_len)
    max_new_tokens: int | None = _derived(lambda c: c.seq_len - c.max_context_length)
    max_length: int = _derived(lambda c: c.seq_len)
    on_cpu: bool = False
    output_logits: bool = False
    is_prefill_stage: bool | None = None  # set for each submodel by the application, never by the user

    # Dtypes
    torch_dtype: torch.dtype = torch.bfloat16
    overrides_torch_dtype: bool = True  # False when torch_dtype was left to the checkpoint
    cast_type: str = "config"
    rpl_reduce_dtype: torch.dtype | None = None
    attention_dtype: torch.dtype | None = None

    # Batching and buckets
    ctx_batch_size: int = _derived(lambda c: c.batch_size)
    tkg_batch_size: int = _derived(lambda c: c.batch_size)
    max_batch_size: int = _derived(lambda c: c.batch_size)
    spec_batch_size: int = _derived(lambda c: c.batch_size)
    is_continuous_batching: bool = False
    kv_cache_batch_size: int = _derived(lambda c: c.batch_size)
    kv_cache_padding_size: int = 0
    apply_seq_ids_mask: bool = False
    enable_bucketing: bool = False
    buckets: list[int] = _derived(lambda c: [c.seq_len])
    bucket_n_active_tokens: bool = False
    context_encoding_buckets: list[int] | None = None
    prefix_buckets: list[int] | None = None
    token_generation_buckets: list[int] | None = None
    token_generation_batches: list[int] | None = None

    # Sampling and execution
    on_device_sampling_config: OnDeviceSamplingConfig | None = None
    disable_argmax_kernel: bool = False
    async_mode: bool = False
    skip_warmup: bool = False

    # Distribution
    tp_degree: int = 1
    cp_degree: int = 1
    mlp_cp_degree: int = 1
    attention_dp_degree: int = 1
    pp_degree: int = 1
    ep_degree: int = 1
    world_size: int = _derived(lambda c: c.tp_degree * c.pp_degree * c.ep_degree)
    start_rank_id: int = 0
    local_ranks_size: int = _derived(lambda c: c.world_size)
    save_sharded_checkpoint: bool = False
    skip_sharding: bool = False
    vocab_parallel: bool = False
    sequence_parallel_enabled: bool = False
    weight_gather_seq_len_threshold: int = 32768
    logical_nc_config: int = 1  # NxDI: 2 on trn2 and trn3, 1 elsewhere; a CPU has no cores to pair
    lm_head_pad: bool = _derived(lambda c: c.logical_nc_config > 1)
    lm_head_pad_alignment_size: int = 1

    # Attention and KV cache
    fused_qkv: bool = False
    qk_layernorm: bool = False
    flash_decoding_enabled: bool = False
    disable_kv_cache_tiling: bool = False
    k_cache_transposed: bool = False
    is_block_kv_layout: bool = False
    pa_num_blocks: int = _derived(lambda c: c.batch_size)
    pa_block_size: int = _derived(lambda c: c.seq_len)
    is_prefix_caching: bool = False
    windowed_context_encoding_size: int | None = None
    chunked_prefill_config: Any = None

    # Kernels and compiler
    attn_kernel_enabled: bool | None = None
    strided_context_parallel_kernel_enabled: bool = False
    qkv_kernel_enabled: bool = False
    qkv_nki_kernel_enabled: bool = False
    qkv_cte_nki_kernel_fuse_rope: bool = False
    qkv_kernel_nbsd_layout: bool = False
    qkv_kernel_fuse_residual_add: bool = False
    mlp_kernel_enabled: bool = False
    mlp_tkg_nki_kernel_enabled: bool = False
    mlp_kernel_fuse_residual_add: bool = False
    quantized_mlp_kernel_enabled: bool = False
    out_proj_kernel_enabled: bool = False
    fused_rmsnorm_skip_gamma: bool = False
    attn_tkg_nki_kernel_enabled: bool = False
    attn_tkg_builtin_kernel_enabled: bool = False
    attn_block_tkg_nki_kernel_enabled: bool = False
    attn_block_tkg_nki_kernel_cache_update: bool = False
    attn_block_tkg_nki_kernel_cascaded_attention: bool = False
    attn_block_cte_nki_kernel_enabled: bool = False
    layer_boundary_markers: bool = False
    cc_pipeline_tiling_factor: int = 2
    seq_len_threshold_for_cc_tiling: int = 16384
    switch_cc: bool = False
    target: str | None = None
    enable_spill_reload_dge: bool = False
    enable_output_completion_notifications: bool = False
    scratchpad_page_size: int | None = _derived(
        lambda c: _LONG_CONTEXT_SCRATCHPAD_PAGE_SIZE if c.max_context_length >= _LONG_CONTEXT else None
    )

    # Features that a model may refuse
    quantized: bool = False
    quantized_checkpoints_path: str | None = None
    quantization_type: str = "per_tensor_symmetric"
    quantization_dtype: str = "int8"
    kv_cache_quant: bool = False
    kv_quant_config: Any = None
    activation_quantization_type: str | None = None
    modules_to_not_convert: list[str] | None = None
    speculation_length: int = 0
    enable_fused_speculation: bool = False
    enable_eagle_speculation: bool = False
    is_eagle_draft: bool = False
    token_tree_config: Any = None
    is_medusa: bool = False
    medusa_speculation_length: int = 0
    num_medusa_heads: int = 0
    medusa_tree: Any = None
    lora_config: Any = None
    tensor_capture_config: Any = None
    tensor_replacement_config: Any = None

    # Functions of the fields above, not settings: recomputed when a saved config is read
    is_chunked_prefill: bool
    enable_token_tree: bool
    kv_cache_tiling: bool
    kv_cache_update_with_kernel: bool
    enable_long_context_mode: bool
    tile_cc: bool

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("torch_dtype") is None:
            kwargs["overrides_torch_dtype"] = False
        for name in ("world_size", "local_ranks_size", "torch_dtype"):
            if kwargs.get(name, 0) is None:  # None here means "derive it"
                del kwargs[name]
        for name in _SETTINGS:
            default = getattr(NeuronConfig, name)
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
            else:
                setattr(self, name, default.compute(self) if isinstance(default, _Derived) else default)
        self.is_prefill_stage = None
        self.max_new_tokens = self.max_new_tokens or None
        for name in ("torch_dtype", "rpl_reduce_dtype", "attention_dtype"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, to_torch_dtype(getattr(self, name)))
        if isinstance(self.on_device_sampling_config, dict):
            self.on_device_sampling_config = OnDeviceSamplingConfig(**self.on_device_sampling_config)
        if self.token_generation_batches is not None and not isinstance(self.token_generation_batches, list):
            self.token_generation_batches = [self.token_generation_batches]
        self.enable_fused_speculation = self.enable_fused_speculation or self.enable_eagle_speculation

        self.is_chunked_prefill = self.chunked_prefill_config is not None
        self.enable_token_tree = self.token_tree_config is not None
        self.kv_cache_tiling = self.kv_cache_update_with_kernel = self.tile_cc = False
        self.enable_long_context_mode = self.max_context_length >= _LONG_CONTEXT
        unknown = {name: value for name, value in kwargs.items() if name not in NeuronConfig.__annotations__}
        if unknown:
            logging.warning(f"NeuronConfig init: Unexpected keyword arguments: {unknown}")
        self._check()

    def _check(self) -> None:
        if self.cast_type not in ("config", "as-declared"):
            raise ValueError(f"cast_type={self.cast_type!r}: must be 'config' or 'as-declared'")
        if self.attention_dtype not in (None, self.torch_dtype) and self.cast_type != "as-declared":
            raise ValueError(
                f"attention_dtype={self.attention_dtype} differs from torch_dtype={self.torch_dtype}; "
                "set cast_type='as-declared' to run with two precisions"
            )
        if self.max_context_length > self.max_length:
            raise ValueError(f"max_context_length={self.max_context_length} exceeds max_length={self.max_length}")
        for name, limit in (
            ("context_encoding_buckets", self.max_context_length),
            ("token_generation_buckets", self.max_length),
            ("token_generation_batches", self.tkg_batch_size),
        ):
            buckets = getattr(self, name)
            if buckets is not None:
                buckets.sort()
                if buckets[-1] > limit:
                    raise ValueError(f"{name}: the largest, {buckets[-1]}, exceeds {limit}")
        for name in ("cp_degree", "attention_dp_degree"):
            if self.tp_degree % getattr(self, name):
                raise ValueError(f"tp_degree={self.tp_degree} is not a multiple of {name}={getattr(self, name)}")


# A field without a default is computed in __init__; all others are settings.
_SETTINGS = [name for name in NeuronConfig.__annotations__ if hasattr(NeuronConfig, name)]


class InferenceConfig:
    """A `NeuronConfig` plus the architecture of one checkpoint, as attributes.

    Args:
        neuron_config: settings of the run.
        fused_spec_config: draft model of fused speculation; kept, unused here.
        load_config: called with this object to set its attributes, e.g. NxDI's `load_pretrained_config(path)`.
        metadata: anything to keep beside the config.
        kwargs: attributes that override the loaded ones.
    """

    attribute_map: Mapping[str, str] = {}  # other name -> attribute's name

    def __init__(
        self,
        neuron_config: NeuronConfig,
        fused_spec_config: Any = None,
        load_config: Callable[[Any], None] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.neuron_config = neuron_config
        self.fused_spec_config = fused_spec_config
        if load_config is None:
            self.load_config()
        else:
            load_config(self)
        self.metadata = metadata
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.add_derived_config()
        self.validate_config()

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(self.attribute_map.get(key, key), value)

    def __getattribute__(self, key: str) -> Any:
        if key == "attribute_map":
            return super().__getattribute__(key)
        return super().__getattribute__(super().__getattribute__("attribute_map").get(key, key))

    def add_derived_config(self) -> None:
        """Set what follows from other attributes; models override it."""
        self.num_cores_per_group = 1

    def load_config(self) -> None:
        """Set the attributes of the model when no `load_config` is given; models may override it."""

    def get_required_attributes(self) -> list[str]:
        """Names that must be set for the config to be valid."""
        return []

    def validate_config(self) -> None:
        """Raises: ValueError: a required attribute is missing."""
        missing = [name for name in self.get_required_attributes() if not hasattr(self, name)]
        if missing:
            raise ValueError(f"Config must define {missing}")

    def get_text_config(self) -> InferenceConfig:
        """The decoder's config: `text_config` when there is one, else this."""
        text_config: InferenceConfig | None = getattr(self, "text_config", None)
        return self if text_config is None else text_config

    @classmethod
    def get_neuron_config_cls(cls) -> type[NeuronConfig]:
        """Class that `neuron_config` is read into; models override it."""
        return NeuronConfig

    def save(self, model_path: str | os.PathLike[str]) -> None:
        """Write `neuron_config.json` into the folder `model_path`, made if absent."""
        Path(model_path).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(model_path) / CONFIG_FILE)

    def to_json_file(self, json_file: str | os.PathLike[str]) -> None:
        """Write the config to `json_file`, whole or not at all."""
        unfinished = Path(f"{os.fspath(json_file)}.{os.getpid()}.tmp")
        try:
            unfinished.write_text(self.to_json_string() + "\n", encoding="utf-8")
            unfinished.replace(json_file)
        finally:
            unfinished.unlink(missing_ok=True)

    def to_json_string(self) -> str:
        return json.dumps(to_dict(self), indent=2, sort_keys=True)

    @classmethod
    def load(cls, model_path: str | os.PathLike[str], **kwargs: Any) -> InferenceConfig:
        """Read `neuron_config.json` from the folder `model_path`; `kwargs` override what it says."""
        return cls.from_json_file(Path(model_path) / CONFIG_FILE, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str], **kwargs: Any) -> InferenceConfig:
        return cls.from_json_string(Path(json_file).read_text(encoding="utf-8"), **kwargs)

    @classmethod
    def from_json_string(cls, json_string: str, **kwargs: Any) -> InferenceConfig:
        attributes = json.loads(json_string) | kwargs
        if isinstance(attributes.get("neuron_config"), dict):
            attributes["neuron_config"] = cls.get_neuron_config_cls()(**attributes["neuron_config"])
        return cls(**attributes)
