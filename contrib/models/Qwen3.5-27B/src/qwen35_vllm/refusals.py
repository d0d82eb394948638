# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What of vLLM's own options is not served, each by its name and with what to do.

What needs methods of the model's class vLLM refuses itself, and does so before: pipeline parallel, and LoRA in 0.33.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qwen35.configuration_qwen35 import DTYPES, dtype_name
from qwen35.error_text import shown
from qwen35.fp8_form import BLOCK_METHOD, CHANNEL_METHOD

from .connector import RowConnector
from .options import FP8_CACHE_NAMES, MEDIA_OPTIONS, runs_on_neuron

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SPECULATION = {
    "rejection_sample_method": "standard",
    "draft_sample_method": "greedy",
    "enable_adaptive_verification": False,
    "draft_lm_head_quantization": None,
}
"""Of --speculative-config, what would change how drafts are made or accepted, and the value that is as served."""

_LOAD_FORMATS = ("auto", "hf", "safetensors")


def refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """What is not served of a configuration, a phrase each."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if vllm_config.lora_config is not None:
        yield "--enable-lora: LoRA is not supported, merge an adapter into its checkpoint and run without `enable_lora`"
    yield from _speculation_refusals(vllm_config)
    if model.quantization not in (None, BLOCK_METHOD, CHANNEL_METHOD):
        yield f"--quantization {model.quantization}: only fp8 is served; use the bf16 or the fp8 checkpoint"
    if model.runner_type != "generate":
        yield f"--runner {model.runner_type}: the model generates text; leave it out"
    if model.dtype not in DTYPES.values():
        yield f"--dtype {dtype_name(model.dtype)}: gates and decays overflow it; pass bfloat16 or float32"
    if cache.cache_dtype not in ("auto", dtype_name(model.dtype), *FP8_CACHE_NAMES):
        yield f"--kv-cache-dtype {cache.cache_dtype}: keys and values are kept in --dtype or fp8; pass fp8, or none"
    connector = vllm_config.kv_transfer_config
    if connector is not None and connector.kv_connector != RowConnector.__name__:
        yield f"--kv-transfer-config, {connector.kv_connector}: a row has no blocks to transfer; leave it out"
    if _get(cache, "kv_offloading_size") is not None:
        yield "--kv-offloading-size: a row has no blocks to move to the host; leave it out"
    if model.enable_prompt_embeds:
        yield "--enable-prompt-embeds: the compiled programs take token ids; leave it out"
    if model.hf_overrides:
        yield "--hf-overrides: the model is configured by the checkpoint's config.json; change it there"
    if model.hf_config_path is not None:
        yield "--hf-config-path: the model is configured by the checkpoint's config.json; leave it out"
    if vllm_config.load_config.load_format not in _LOAD_FORMATS:
        yield f"--load-format {vllm_config.load_config.load_format}: safetensors are read; leave it out"
    if vllm_config.load_config.download_dir is not None:
        yield "--download-dir: set HF_HOME, which the hub's own client reads"
    yield from _media_refusals(model.multimodal_config)
    yield from _parallel_refusals(vllm_config)


def _media_refusals(media: Any) -> Iterator[str]:
    if media is None:
        return
    if media.enable_mm_embeds:
        yield "--enable-mm-embeds: images and videos are encoded here; leave it out"
    if media.mm_encoder_only:
        yield "--mm-encoder-only: the model generates text; leave it out"
    if media.video_pruning_rate:
        yield f"--video-pruning-rate {media.video_pruning_rate}: videos keep all their tokens; leave it out"
    if unknown := sorted({*(media.mm_processor_kwargs or {})} - {*MEDIA_OPTIONS}):
        yield f"--mm-processor-kwargs, {shown(unknown[0])}: give {', '.join(MEDIA_OPTIONS)}"


def _speculation_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if speculative.method != "mtp" or speculative.model != vllm_config.model_config.model:
        yield (
            f"--speculative-config, method {speculative.method} of {speculative.model}: only the checkpoint's own head "
            """drafts; pass '{"method": "mtp", "num_speculative_tokens": K}'"""
        )
    for name, served in _SPECULATION.items():
        if (value := _get(speculative, name, served)) != served:
            yield f"--speculative-config, {name}={shown(value)}: drafts change no token; leave it out"


def _parallel_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size", "nnodes"):
        if _get(parallel, name, 1) > 1:
            yield f"--{name.replace('_', '-')} {getattr(parallel, name)}: of one machine, only tensor and data parallel"
    if parallel.distributed_executor_backend not in ("uni", "mp", None):
        yield f"--distributed-executor-backend {parallel.distributed_executor_backend}: one process drives all ranks"
    if parallel.tensor_parallel_size > 1 and not runs_on_neuron():
        yield (
            f"--tensor-parallel-size {parallel.tensor_parallel_size}: there is no Neuron device here, and on a CPU a "
            "rank is a process, while vLLM has one; pass 1"
        )


def _get(config: Any, name: str, default: Any = None) -> Any:
    """A field that one of vLLM's versions lacks."""
    return getattr(config, name, default)
