# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Loading, sharding and "compiling" a model; stands in for NxDI's `models.application_base`.

Without a device there is nothing to compile: `compile` walks the model as tracing would and writes the configuration
(and the shards, when asked for) just as NxDI does; `load` puts the weights into CPU modules. A script written for
Trainium runs unchanged.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from .config import InferenceConfig, NeuronConfig
from .layers import ColumnParallelLinear
from .model_builder import ModelBuilder
from .parallel_state import get_tensor_model_parallel_rank, initialize_model_parallel
from .sharding import get_sharded_checkpoint

COMPILED_MODEL_FILE_NAME = "model.pt"


def normalize_path(path: str | os.PathLike[str]) -> str:
    """The path with one trailing slash."""
    return os.path.join(os.path.normpath(path), "")


class NeuronApplicationBase(nn.Module):
    def __init__(
        self,
        model_path: str | os.PathLike[str],
        config: InferenceConfig | None = None,
        neuron_config: NeuronConfig | None = None,
    ) -> None:
        super().__init__()
        model_path = normalize_path(model_path)
        if config is None:
            config = self.get_config_cls().load(model_path)
        if neuron_config is not None:
            config.neuron_config = neuron_config
        self.validate_config(config)
        self.config, self.neuron_config = config, config.neuron_config
        self.on_device_sampling = self.neuron_config.on_device_sampling_config is not None
        self.model_path = model_path
        self.models: list[Any] = []
        self._builder: ModelBuilder | None = None
        self.is_compiled = os.path.isfile(model_path + COMPILED_MODEL_FILE_NAME)
        self.is_loaded_to_neuron = False

    @classmethod
    def validate_config(cls, config: InferenceConfig) -> None:
        if not hasattr(config, "neuron_config"):
            raise ValueError("config has no neuron_config: build it with a NeuronConfig")

    @classmethod
    def get_config_cls(cls) -> type[InferenceConfig]:
        raise NotImplementedError("get_config_cls is not implemented")

    @classmethod
    def get_neuron_config_cls(cls) -> type[NeuronConfig]:
        return cls.get_config_cls().get_neuron_config_cls()

    def get_compiler_args(self) -> str | None:
        return None

    def get_builder(self, debug: bool = False) -> ModelBuilder:
        """The builder that traces the submodels, each added with its instance and sample inputs."""
        if self._builder is None:
            self._builder = ModelBuilder(
                router=None,
                tp_degree=self.neuron_config.tp_degree,
                start_rank_id=self.neuron_config.start_rank_id,
                checkpoint_loader=self.checkpoint_loader_fn,
                debug=debug,
                logical_nc_config=self.neuron_config.logical_nc_config,
            )
            for model in self.models:
                self._builder.add(
                    key=model.tag,
                    model_instance=model.get_model_instance(),
                    example_inputs=model.input_generator(),
                    compiler_args=model.compiler_args,
                    priority_model_idx=model.priority_model_idx,
                )
        return self._builder

    def compile(
        self,
        compiled_model_path: str | os.PathLike[str],
        debug: bool = False,
        pre_shard_weights_hook: Any = None,
        dry_run: bool = False,
        disable_fail_fast: bool = False,
    ) -> None:
        """Write neuron_config.json, walk every submodel as tracing would, and write the shards when they are wanted."""
        self.config.save(normalize_path(compiled_model_path))
        self.get_builder(debug).trace(initialize_model_weights=False, dry_run=dry_run)
        if not dry_run:
            self.shard_weights(compiled_model_path, debug, pre_shard_weights_hook)
            self.is_compiled = True

    def shard_weights(
        self, compiled_model_path: str | os.PathLike[str], debug: bool = False, pre_shard_weights_hook: Any = None
    ) -> None:
        """Write `weights/tp{rank}_sharded_checkpoint.safetensors` for every local rank, when that is asked for."""
        raise NotImplementedError("shard_weights is not implemented")

    def load(
        self,
        compiled_model_path: str | os.PathLike[str],
        start_rank_id: int | None = None,
        local_ranks_size: int | None = None,
        skip_warmup: bool = False,
    ) -> None:
        """Put the weights of this process's rank into its modules: from the shards written by `compile`, if any."""
        self._load_modules(compiled_model_path if self.neuron_config.save_sharded_checkpoint else None)

    def to_cpu(self) -> None:
        """Convert the checkpoint and put the weights of this process's rank into its modules.

        Raises:
            NotImplementedError: a dtype or feature that CPU inference does not have.
            RuntimeError: tp_degree > 1 outside a job of as many processes.
        """
        self._load_modules(None)

    def _load_modules(self, sharded_path: str | os.PathLike[str] | None) -> None:
        neuron_config = self.neuron_config
        if neuron_config.torch_dtype == torch.bfloat16 and neuron_config.tp_degree > 1:
            raise NotImplementedError("torch_dtype=bfloat16 with tp_degree > 1: gloo reduces float32 only, use float32")
        if neuron_config.tp_degree > 1 and not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) != neuron_config.tp_degree:
                raise RuntimeError(
                    f"tp_degree={neuron_config.tp_degree} needs one process per rank on a CPU: start the script with "
                    f"'torchrun --nproc-per-node {neuron_config.tp_degree}'"
                )
            dist.init_process_group("gloo")
        initialize_model_parallel(tensor_model_parallel_size=neuron_config.tp_degree)
        rank = get_tensor_model_parallel_rank()
        checkpoint: MutableMapping[str, torch.Tensor]
        if sharded_path is not None:
            checkpoint = load_file(Path(sharded_path, "weights", f"tp{rank}_sharded_checkpoint.safetensors"))
        else:
            checkpoint = self.checkpoint_loader_fn()
        module = self.models[0].model_cls(self.config)  # after the checkpoint was held against the configuration
        if sharded_path is None:
            get_sharded_checkpoint(checkpoint, module, rank, neuron_config.tp_degree)
        _assign_weights(module, checkpoint)
        for wrapper in self.models:
            wrapper.model = module
        self.eval()

    def checkpoint_loader_fn(self, mmap: bool = False) -> MutableMapping[str, torch.Tensor]:
        """The whole checkpoint in the Neuron layout, of `config._name_or_path` if that exists, else of `model_path`."""
        path = getattr(self.config, "_name_or_path", None)
        return self.get_state_dict(path if path and os.path.exists(path) else self.model_path, self.config)

    @classmethod
    def get_state_dict(cls, model_name_or_path: str, config: Any) -> MutableMapping[str, torch.Tensor]:
        raise NotImplementedError("get_state_dict is not implemented")

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict: Any, config: Any) -> Any:
        return state_dict

    @staticmethod
    def load_hf_model(model_path: str) -> nn.Module:
        raise NotImplementedError("load_hf_model is not implemented")

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError("update_state_dict_for_tied_weights is not implemented")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def reset(self) -> None:
        """Forget the model's state."""


def _assign_weights(module: nn.Module, checkpoint: MutableMapping[str, torch.Tensor]) -> None:
    """Give every parameter but the caches its tensor, without a second copy in memory.

    Raises:
        ValueError: a parameter has no tensor, or one of another shape or dtype; all are listed.
    """
    targets = {name: p for name, p in module.named_parameters() if ".past_key_values." not in f".{name}"}
    problems = [f"{name}: no tensor in the checkpoint" for name in targets if name not in checkpoint]
    for name in tqdm(targets.keys() & checkpoint.keys(), desc="Loading", unit="tensor", leave=False, delay=1):
        parameter, tensor = targets[name], checkpoint[name]
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            problems.append(
                f"{name}: the checkpoint has {tensor.dtype} {tuple(tensor.shape)}, "
                f"the module declares {parameter.dtype} {tuple(parameter.shape)}"
            )
        else:
            parameter.data = tensor
    if problems:
        raise ValueError("the weights do not fit the modules:\n  " + "\n  ".join(sorted(problems)))
    for child in module.modules():
        if isinstance(child, ColumnParallelLinear):
            child.lay_out_for_decoding()
