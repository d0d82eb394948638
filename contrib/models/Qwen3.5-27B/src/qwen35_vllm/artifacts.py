# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The model that the worker runs: found compiled, or compiled and kept, and loaded; on a CPU just loaded.

Compiled models are kept outside the checkpoint's directory, which may be read-only, shared or a hub's cache; see
`qwen35.serving.compiled` for what their names are made of and who makes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.configuration_qwen35 import Qwen35InferenceConfig, dtype_name
from qwen35.configuration_qwen35_vl import Qwen35VLInferenceConfig
from qwen35.error_text import first_three, shown
from qwen35.memory.fit import require_fits
from qwen35.modeling_qwen35 import NeuronQwen35ForCausalLM
from qwen35.modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from qwen35.serving.compiled import Progress, compile_once, is_compiled, place_of, record_of, weight_files
from qwen35.serving.loading import load_compiled_config

from .cores import VISIBLE_CORES, cores_of_replica
from .options import ConfigurationRefused, ServeOptions, inference_config, runs_on_neuron

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_model(vllm_config: VllmConfig, options: ServeOptions) -> Qwen35InferenceConfig:
    """Find out, before anything is started, what `load_model` would find out after that: in seconds.

    That is whether the checkpoint and the configuration do, whether a compiled model is the one that is wanted, and
    whether one that is not there may be compiled, and fits its instance. Returns the configuration that it will have.

    Raises:
        ConfigurationRefused: the model cannot be served so.
        ValueError: the checkpoint or the configuration does not do; in a line for each reason.
    """
    model = _model(vllm_config, options)
    directory = _directory(model, options)
    if directory is not None and not is_compiled(directory):
        if options.compile == "never":
            raise ConfigurationRefused(_not_there(directory))
        _require_place(directory, "cache_dir" if options.compiled_path is None else "compiled_path")
        require_fits(model)
    if directory is None or not is_compiled(directory):
        model.checkpoint_loader_fn()  # reads no tensor: only the names, shapes and dtypes
    return model.config


def load_model(vllm_config: VllmConfig, options: ServeOptions, progress: Progress) -> NeuronQwen35ForCausalLM:
    """The model that vLLM's configuration and ours name, loaded and ready to be called.

    On Neuron it takes the cores of its replica, see `cores`.

    Raises:
        ConfigurationRefused: see `check_model`.
        ValueError: the checkpoint or the configuration does not do, or the model does not fit its instance.
    """
    model = _model(vllm_config, options)
    directory = _directory(model, options)
    if runs_on_neuron() and (cores := cores_of_replica(vllm_config.parallel_config)) is not None:
        os.environ[VISIBLE_CORES] = cores
        progress(f"{VISIBLE_CORES}={cores} for this replica")
    if directory is None:
        progress(f"loading {model.model_path} on the CPU: there is no Neuron device here")
        model.to_cpu()
        return model
    if not is_compiled(directory):
        if options.compile == "never":
            raise ConfigurationRefused(_not_there(directory))
        compile_once(model, directory, progress)
    progress(f"loading {directory}")
    model.load(str(directory))
    return model


def _model(vllm_config: VllmConfig, options: ServeOptions) -> NeuronQwen35ForCausalLM:
    """The application, not loaded: as configured, or as it was compiled where `compiled_path` has one."""
    config = inference_config(vllm_config, options)
    path = options.compiled_path
    if path is not None and is_compiled(path):
        compiled = load_compiled_config(path)
        if problems := [*_mismatches(path, compiled, config, vllm_config, options)]:
            raise ConfigurationRefused(f"compiled_path={path}: {'; '.join(problems)}")
        compiled._name_or_path = config._name_or_path
        config = compiled
    takes_media = isinstance(config, Qwen35VLInferenceConfig)
    return (NeuronQwen35VLForCausalLM if takes_media else NeuronQwen35ForCausalLM)(config._name_or_path, config)


def _directory(model: NeuronQwen35ForCausalLM, options: ServeOptions) -> Path | None:
    """Where the compiled model is, or is to be; None where none is needed."""
    if options.compiled_path is not None or not runs_on_neuron():
        return options.compiled_path
    return place_of(model, options.cache_dir or _default_cache_dir())


def _default_cache_dir() -> Path:
    # Here, because vLLM is not where the other functions are tested.
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "qwen35"


def _not_there(directory: Path) -> str:
    return (
        f'compile=never, and there is no compiled model in {directory}: start once with "compile": "auto", or name '
        "what 'qwen35 compile' wrote as compiled_path"
    )


def _require_place(directory: Path, option: str) -> None:
    """Refuse to compile to where a directory cannot be made."""
    if directory.exists() and not is_compiled(directory):  # another process may have just compiled it
        raise ConfigurationRefused(
            f"{option}={directory} is there already, and is no compiled model: name a new directory, or what "
            "'qwen35 compile' wrote"
        )
    parent = next(path for path in directory.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigurationRefused(f"{option}: {directory} cannot be made: {parent} cannot be written to; name another")


def _mismatches(
    path: Path,
    compiled: Qwen35InferenceConfig,
    wanted: Qwen35InferenceConfig,
    vllm_config: VllmConfig,
    options: ServeOptions,
) -> Iterator[str]:
    """What is wrong with a model that was compiled elsewhere, a phrase each."""
    with_media, wanted_with_media = (isinstance(each, Qwen35VLInferenceConfig) for each in (compiled, wanted))
    if with_media != wanted_with_media:
        yield (
            "it takes images, and none are to be served: allow some, or compile it without --vision"
            if with_media
            else "it takes no images, which are to be served: compile it with --vision, or pass --language-model-only"
        )
        return
    neuron = compiled.neuron_config
    if neuron.on_cpu != wanted.neuron_config.on_cpu:
        made, here = ("a CPU", "a Neuron device") if neuron.on_cpu else ("Neuron", "no Neuron device")
        yield f"it was compiled for {made}, and there is {here} here: compile it for this machine"
    for flag, here, most in (
        ("--max-model-len", vllm_config.model_config.max_model_len, neuron.seq_len),
        ("--max-num-seqs", vllm_config.scheduler_config.max_num_seqs, neuron.kv_cache_batch_size),
    ):
        if here > most:
            yield f"it was compiled for {flag} {most}, and {here} is asked for: pass {flag} {most}"
    for flag, here, there in (
        ("--tensor-parallel-size", vllm_config.parallel_config.tensor_parallel_size, neuron.tp_degree),
        ("--dtype", dtype_name(wanted.neuron_config.torch_dtype), dtype_name(neuron.torch_dtype)),
    ):
        if here != there:
            yield f"it was compiled for {flag} {there}, not {here}: pass {flag} {there}"
    drafts = compiled.num_speculative_tokens
    if wanted.num_speculative_tokens != drafts:
        remedy = f"set its num_speculative_tokens to {drafts}" if drafts else "leave it out"
        asked = f"{wanted.num_speculative_tokens} as --speculative-config asks"
        yield f"it was compiled to draft {drafts} tokens, not {asked}: {remedy}"
    for name, value in options.neuron_fields().items():
        kept = getattr(neuron, name, None)
        if (kept is None) != (value is None) if name == "on_device_sampling_config" else kept != value:
            yield f"it was compiled with {name}={shown(kept)}: leave the option out, or compile another"
    fields, compiled_fields = _checkpoint_fields(wanted), _checkpoint_fields(compiled)
    if other := sorted(name for name in fields | compiled_fields if fields.get(name) != compiled_fields.get(name)):
        yield f"it was compiled of a checkpoint that differs in {first_three(other)}: compile it of this one"
    elif record_of(path).get("checkpoint", files := weight_files(Path(wanted._name_or_path))) != files:
        yield f"the weights in {wanted._name_or_path} are others than it was compiled of: compile it of these"


def _checkpoint_fields(config: Qwen35InferenceConfig) -> dict[str, Any]:
    """What a configuration has from the checkpoint, as JSON has it."""
    fields: dict[str, Any] = json.loads(config.to_json_string())
    return {name: value for name, value in fields.items() if name not in ("neuron_config", "_name_or_path")}
