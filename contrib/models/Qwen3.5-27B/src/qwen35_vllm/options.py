# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is configured: `--additional-config '{"qwen35": {...}}'`, typed, and the model's configuration from vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from qwen35.configuration_qwen35 import (
    DTYPES,
    FP8_NAME,
    Qwen35InferenceConfig,
    Qwen35NeuronConfig,
    is_size,
    read_config,
)
from qwen35.configuration_qwen35_vl import Qwen35VLInferenceConfig
from qwen35.error_text import one_line, shown
from qwen35.hardware import INSTANCES
from qwen35.json_files import Rule, wrong_fields
from qwen35.kernel_selection import AttentionKernel, DeltaNetInverse, DeltaNetKernel, MLPKernel
from qwen35.nxdi import NXDI_AVAILABLE, OnDeviceSamplingConfig
from qwen35.planning.recommended import device_neuron_config
from qwen35.serving.loading import resolve_checkpoint

from .plugin import neuron_devices

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

FP8_CACHE_NAMES = ("fp8", "fp8_e4m3")
"""vLLM's names, in --kv-cache-dtype, of what keys and values are kept in with kv_cache_dtype="fp8"."""

MODALITIES = ("image", "video")
"""vLLM's names of what a model with a vision encoder takes beside text."""

MEDIA_OPTIONS = ("min_pixels", "max_pixels", "fps")
"""What `mm_processor_kwargs` may ask: pixels of each image, at least and at most, and frames a second of videos."""

VIDEO_LOADER = "qwen35"
"""In vLLM's registry, `media_items.UndecodedVideo`; `--media-io-kwargs '{"video": {"video_backend": ...}}'` has
another."""

SECTION = "qwen35"
"""The key of `--additional-config` that is ours; other plugins have others."""


class ConfigurationRefused(Exception):
    """A configuration that is not served, in one line.

    Not a ValueError: vLLM's configuration classes would bury it under a dump of all that they were given.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


@dataclass(frozen=True)
class ServeOptions:
    """What `--additional-config '{"qwen35": {...}}'` may say, beside vLLM's own options.

    None stands for what is not given: as the model was compiled, if it was, and else as `qwen35 compile` does.

    Args:
        prefill_chunk_size: tokens of a prompt that are encoded at a time.
        ctx_batch_size: prompts that are encoded in one call.
        context_encoding_buckets, token_generation_buckets: lengths that are compiled, ascending.
        deltanet_kernel, deltanet_inverse, attention_kernel, mlp_kernel: which kernel runs, see `kernel_selection`.
        weights_dtype, kv_cache_dtype: "fp8", in place of vLLM's dtype, see `Qwen35NeuronConfig`.
        instance: a key of `hardware.INSTANCES`: that the model fits there is checked before it is compiled.
        on_device_sampling: let the device choose the tokens of steps in which every row is greedy.
        prompt_logprobs: compile what the log-probabilities of prompts need.
        compiled_path: where the model is, or is to be, compiled; what `qwen35 compile` wrote, for one. Without it, in
            `cache_dir` and below a name made of all that it depends on.
        cache_dir: by default ~/.cache/vllm/qwen35, beside what vLLM keeps itself.
        compile: whether to compile what is not there.
    """

    prefill_chunk_size: int | None = None
    ctx_batch_size: int | None = None
    context_encoding_buckets: tuple[int, ...] | None = None
    token_generation_buckets: tuple[int, ...] | None = None
    deltanet_kernel: str | None = None
    deltanet_inverse: str | None = None
    attention_kernel: str | None = None
    mlp_kernel: str | None = None
    weights_dtype: str | None = None
    kv_cache_dtype: str | None = None
    instance: str | None = None
    on_device_sampling: bool | None = None
    prompt_logprobs: bool | None = None
    compiled_path: Path | None = None
    cache_dir: Path | None = None
    compile: Literal["auto", "never"] = "auto"

    def neuron_fields(self) -> dict[str, Any]:
        """Fields of a `Qwen35NeuronConfig` and their values, for the options that are given."""
        named = (
            "prefill_chunk_size",
            "ctx_batch_size",
            "context_encoding_buckets",
            "token_generation_buckets",
            "deltanet_kernel",
            "deltanet_inverse",
            "attention_kernel",
            "mlp_kernel",
            "weights_dtype",
            "kv_cache_dtype",
            "instance",
        )
        given = {name: value for name in named if (value := getattr(self, name)) is not None}
        chosen = {name: [*value] if isinstance(value, tuple) else value for name, value in given.items()}
        if self.on_device_sampling is not None:
            # Logits too: only steps in which all rows are greedy do without them.
            chosen["on_device_sampling_config"] = OnDeviceSamplingConfig() if self.on_device_sampling else None
            chosen["output_logits"] = self.on_device_sampling
        if self.prompt_logprobs is not None:
            chosen["output_prompt_logits"] = self.prompt_logprobs
        return chosen


def _one_of(*choices: str) -> Rule:
    return (lambda value: value in choices, f"one of {', '.join(choices)}")


_SIZE: Rule = (is_size, "a positive whole number")
_SIZES: Rule = (
    lambda value: isinstance(value, list) and bool(value) and all(map(is_size, value)) and value == sorted({*value}),
    "a list of positive whole numbers, ascending",
)
_FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
_PATH: Rule = (lambda value: isinstance(value, str) and bool(value), "a path")
_RULES: dict[str, Rule] = {
    "prefill_chunk_size": _SIZE,
    "ctx_batch_size": _SIZE,
    "context_encoding_buckets": _SIZES,
    "token_generation_buckets": _SIZES,
    "deltanet_kernel": _one_of(*(kernel.value for kernel in DeltaNetKernel)),
    "deltanet_inverse": _one_of(*(inverse.value for inverse in DeltaNetInverse)),
    "attention_kernel": _one_of(*(kernel.value for kernel in AttentionKernel)),
    "mlp_kernel": _one_of(*(kernel.value for kernel in MLPKernel)),
    "weights_dtype": _one_of(FP8_NAME),
    "kv_cache_dtype": _one_of(FP8_NAME),
    "instance": _one_of(*INSTANCES),
    "on_device_sampling": _FLAG,
    "prompt_logprobs": _FLAG,
    "compiled_path": _PATH,
    "cache_dir": _PATH,
    "compile": _one_of("auto", "never"),
}


def serve_options(vllm_config: VllmConfig) -> ServeOptions:
    """The options in `vllm_config.additional_config`; null stands for an option that is not given.

    What vLLM has options of its own for is taken from there, too: `--kv-cache-dtype fp8`, and `--quantization fp8` of a
    checkpoint that is in bf16. Of one that is in fp8, vLLM has the same value without being asked.

    Raises:
        ConfigurationRefused: one is unknown, of a wrong kind, or outside our section; all such are named.
    """
    options, model = options_in(vllm_config.additional_config), vllm_config.model_config
    if model.quantization == FP8_NAME and getattr(model.hf_config, "quantization_config", None) is None:
        options = replace(options, weights_dtype=FP8_NAME)
    if vllm_config.cache_config.cache_dtype in FP8_CACHE_NAMES:
        options = replace(options, kv_cache_dtype=FP8_NAME)
    return options


def options_in(additional_config: Any) -> ServeOptions:
    """The options in an `--additional-config`.

    Raises:
        ConfigurationRefused: see `serve_options`.
    """
    # Of another class than a dictionary it is another plugin's.
    given = additional_config.get(SECTION, {}) if isinstance(additional_config, Mapping) else {}
    if isinstance(additional_config, Mapping) and (beside := sorted({*_RULES} & {*additional_config})):
        raise ConfigurationRefused(
            f'--additional-config: {", ".join(beside)} must be inside "{SECTION}": '
            f"""write '{{"{SECTION}": {{"{beside[0]}": ...}}}}'"""
        )
    if isinstance(given, Mapping):
        problems = [f"{shown(name)} is unknown" for name in given if name not in _RULES] + wrong_fields(given, _RULES)
    else:
        problems = [f"{shown(given)} must be an object"]
    if problems:
        raise ConfigurationRefused(
            f'--additional-config, "{SECTION}": {"; ".join(problems)}; its options are {", ".join(_RULES)}'
        )
    taken: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None:
            path = Path(value).expanduser().absolute() if _RULES[name] is _PATH else None
            taken[name] = tuple(value) if isinstance(value, list) else path or value
    return ServeOptions(**taken)


def runs_on_neuron() -> bool:
    """Whether the model is compiled for a device and runs there; else it runs on this machine's CPU."""
    return NXDI_AVAILABLE and bool(neuron_devices())


def checkpoint_of(model: ModelConfig) -> Path:
    """The directory of the checkpoint that vLLM was given, fetched if a hub has it.

    Raises:
        ConfigurationRefused: it is not there, or cannot be fetched.
    """
    try:
        return resolve_checkpoint(model.model, None if Path(model.model).exists() else model.revision).absolute()
    except OSError as error:
        raise ConfigurationRefused(str(error)) from error


def has_vision(checkpoint: Path) -> bool:
    """Whether a checkpoint says that it has a vision encoder."""
    return bool(read_config(checkpoint).get("vision_config"))


def takes_media(vllm_config: VllmConfig) -> bool:
    """Whether requests may have images or videos: the checkpoint can, and vLLM's limits leave some."""
    model = vllm_config.model_config
    limits = model.multimodal_config
    if limits is None or not any(limits.get_limit_per_prompt(modality) for modality in MODALITIES):
        return False
    return has_vision(checkpoint_of(model))


def num_speculative_tokens(vllm_config: VllmConfig) -> int:
    """Tokens that are drafted a step; 0 without --speculative-config."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else speculative.num_speculative_tokens


def neuron_config(vllm_config: VllmConfig, options: ServeOptions) -> Qwen35NeuronConfig:
    """NxDI's settings for vLLM's and ours.

    tp_degree is vLLM's tensor-parallel size, seq_len its max_model_len, the batch its max_num_seqs, and drafts are as
    many as its speculative configuration says.
    """
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype) and dtype in DTYPES.values(), "the platform refuses others"
    chosen = options.neuron_fields() | {"num_speculative_tokens": num_speculative_tokens(vllm_config)}
    instance, chunk = chosen.pop("instance", None), chosen.pop("prefill_chunk_size", None)
    return device_neuron_config(
        None if instance is None else INSTANCES[instance],
        vllm_config.parallel_config.tensor_parallel_size,
        vllm_config.model_config.max_model_len,
        vllm_config.scheduler_config.max_num_seqs,
        dtype,
        prompt_bucket=chunk,
        on_cpu=not runs_on_neuron(),
        save_sharded_checkpoint=True,
        **chosen,
    )


def inference_config(vllm_config: VllmConfig, options: ServeOptions) -> Qwen35InferenceConfig:
    """The model's configuration, of the checkpoint's config.json and `neuron_config`; with images where they are taken.

    Raises:
        ConfigurationRefused: there is no such checkpoint.
        Qwen35ConfigError: naming every field that is missing, wrong or unsupported.
    """
    path = checkpoint_of(vllm_config.model_config)
    config_cls = Qwen35VLInferenceConfig if takes_media(vllm_config) else Qwen35InferenceConfig
    return config_cls.from_pretrained(path, neuron_config=neuron_config(vllm_config, options))


assert [field.name for field in fields(ServeOptions)] == [*_RULES]
