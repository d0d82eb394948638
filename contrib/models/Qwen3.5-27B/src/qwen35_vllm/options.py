# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is configured: `--additional-config '{"qwen35": {...}}'`, typed, and the model's configuration from vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from qwen35.configuration_qwen35 import DTYPES, Qwen35InferenceConfig, Qwen35NeuronConfig, is_size
from qwen35.error_text import shown
from qwen35.hardware import INSTANCES
from qwen35.json_files import Rule, wrong_fields
from qwen35.kernel_selection import DeltaNetInverse, DeltaNetKernel
from qwen35.nxdi import NXDI_AVAILABLE, OnDeviceSamplingConfig
from qwen35.planning.recommended import device_neuron_config
from qwen35.serving.loading import resolve_checkpoint

from .plugin import neuron_devices

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SECTION = "qwen35"
"""The key of `--additional-config` that is ours; other plugins have others."""


class ConfigurationRefused(Exception):
    """A configuration that is not served, in one line.

    Not a ValueError, which vLLM's configuration classes would bury under a dump of all they were given.
    """


@dataclass(frozen=True)
class ServeOptions:
    """What `--additional-config '{"qwen35": {...}}'` may say, beside vLLM's own options.

    Args:
        prefill_chunk_size: tokens of a prompt that are encoded at a time; None: as `qwen35 compile` has it.
        ctx_batch_size: prompts that are encoded in one call.
        context_encoding_buckets, token_generation_buckets: lengths that are compiled; None: as `qwen35 compile`.
        deltanet_kernel, deltanet_inverse: which kernel runs, see `kernel_selection`.
        instance: a key of `hardware.INSTANCES`: that the model fits there is checked before it is compiled.
        compiled_path: a directory that `qwen35 compile` wrote; None: one that is found or made in the cache.
        compile: whether to compile what is not there.
        on_device_sampling: let the device choose the tokens of steps in which every row is greedy.
        prompt_logprobs: compile what logprobs of prompts need.
    """

    prefill_chunk_size: int | None = None
    ctx_batch_size: int = 1
    context_encoding_buckets: tuple[int, ...] | None = None
    token_generation_buckets: tuple[int, ...] | None = None
    deltanet_kernel: str = DeltaNetKernel.AUTO.value
    deltanet_inverse: str = DeltaNetInverse.TILED.value
    instance: str | None = None
    compiled_path: Path | None = None
    compile: Literal["auto", "never"] = "auto"
    on_device_sampling: bool = False
    prompt_logprobs: bool = False


def _one_of(*choices: str) -> Rule:
    return (lambda value: value in choices, f"one of {', '.join(choices)}")


_SIZE: Rule = (is_size, "a positive whole number")
_SIZES: Rule = (
    lambda value: isinstance(value, list) and bool(value) and all(map(is_size, value)) and value == sorted({*value}),
    "a list of positive whole numbers that ascend",
)
_FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
_RULES: dict[str, Rule] = {
    "prefill_chunk_size": _SIZE,
    "ctx_batch_size": _SIZE,
    "context_encoding_buckets": _SIZES,
    "token_generation_buckets": _SIZES,
    "deltanet_kernel": _one_of(*(kernel.value for kernel in DeltaNetKernel)),
    "deltanet_inverse": _one_of(*(inverse.value for inverse in DeltaNetInverse)),
    "instance": _one_of(*INSTANCES),
    "compiled_path": (lambda value: isinstance(value, str) and bool(value), "a path"),
    "compile": _one_of("auto", "never"),
    "on_device_sampling": _FLAG,
    "prompt_logprobs": _FLAG,
}


def serve_options(vllm_config: VllmConfig) -> ServeOptions:
    """The options in `vllm_config.additional_config`; null stands for an option that is not given.

    Raises:
        ConfigurationRefused: one is unknown or of a wrong kind; all are named.
    """
    given = _section(vllm_config.additional_config)
    problems = [f"{name} is unknown" for name in given if name not in _RULES] + wrong_fields(given, _RULES)
    if problems:
        raise ConfigurationRefused(
            f'--additional-config, "{SECTION}": {"; ".join(problems)}; it has {", ".join(_RULES)}'
        )
    taken = {name: value for name, value in given.items() if value is not None}
    for name, value in taken.items():
        if isinstance(value, list):
            taken[name] = tuple(value)
    if "compiled_path" in taken:
        taken["compiled_path"] = Path(taken["compiled_path"]).expanduser().absolute()
    return ServeOptions(**taken)


def _section(additional_config: Any) -> Mapping[str, Any]:
    if not isinstance(additional_config, Mapping):
        return {}  # another class, of a plugin that is not this one
    section = additional_config.get(SECTION, {})
    if not isinstance(section, Mapping):
        raise ConfigurationRefused(
            f'--additional-config, "{SECTION}": {shown(section)} must be an object; it has {", ".join(_RULES)}'
        )
    return section


def runs_on_neuron() -> bool:
    """Whether the model is compiled and runs on a device; else it runs on this machine's CPU."""
    return NXDI_AVAILABLE and bool(neuron_devices())


def checkpoint_of(vllm_config: VllmConfig) -> Path:
    """The directory of the checkpoint that vLLM was given, fetched if a hub has it.

    Raises:
        ConfigurationRefused: it is not there, or cannot be fetched.
    """
    model = vllm_config.model_config
    try:
        return resolve_checkpoint(model.model, None if Path(model.model).exists() else model.revision).resolve()
    except (OSError, ValueError) as error:
        raise ConfigurationRefused(str(error)) from error


def neuron_config(vllm_config: VllmConfig, options: ServeOptions) -> Qwen35NeuronConfig:
    """NxDI's settings for vLLM's: tp_degree is its tensor-parallel size, seq_len its max_model_len, the batch its
    max_num_seqs."""
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype) and dtype in DTYPES.values(), "the platform refuses others"
    chosen: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name in ("context_encoding_buckets", "token_generation_buckets", "deltanet_kernel", "deltanet_inverse")
        if (value := getattr(options, name)) is not None
    }
    if options.on_device_sampling:
        chosen |= {"on_device_sampling_config": OnDeviceSamplingConfig(), "output_logits": True}
    if options.prompt_logprobs:
        chosen["output_prompt_logits"] = True
    batch = vllm_config.scheduler_config.max_num_seqs
    return device_neuron_config(
        None if options.instance is None else INSTANCES[options.instance],
        vllm_config.parallel_config.tensor_parallel_size,
        vllm_config.model_config.max_model_len,
        batch,
        dtype,
        prompt_bucket=options.prefill_chunk_size,
        on_cpu=not runs_on_neuron(),
        ctx_batch_size=options.ctx_batch_size,
        is_continuous_batching=batch > options.ctx_batch_size or batch > 1,
        **chosen,
    )


def inference_config(vllm_config: VllmConfig, options: ServeOptions) -> Qwen35InferenceConfig:
    """The model's configuration, of the checkpoint's config.json and `neuron_config`.

    Raises:
        Qwen35ConfigError: naming every field that is missing, wrong or unsupported.
    """
    path = checkpoint_of(vllm_config)
    return Qwen35InferenceConfig.from_pretrained(path, neuron_config=neuron_config(vllm_config, options))


assert [field.name for field in fields(ServeOptions)] == [*_RULES]
