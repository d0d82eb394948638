# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Walks a model as tracing would; stands in for NxD's `trace.model_builder`.

NxD traces each submodel once per bucket: it makes the module, asks for it and its aliases at that bucket, and runs it
on the sample inputs. Here the same calls are made on the meta device, in the shapes of one rank, and what a trace or
the runtime would refuse later is an error now. No weight is read and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .parallel_state import as_rank

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ModelContainer:
    model_instance: Any
    example_inputs: Sequence[Inputs]
    compiler_args: str | None
    bucket_config: Any
    priority_model_idx: int | None


class ModelBuilder:
    """Collects submodels by key, then walks each over its buckets."""

    def __init__(
        self,
        router: Any,
        tp_degree: int,
        checkpoint_loader: Callable[[], Any],
        start_rank_id: int = 0,
        pp_degree: int = 1,
        ep_degree: int = 1,
        local_ranks_size: int | None = None,
        world_size: int | None = None,
        compiler_workdir: str | None = None,
        master_proc_env_vars: dict[str, str] | None = None,
        debug: bool = False,
        num_cores_per_group: int = 1,
        init_custom_process_group_fn: Callable[[], None] | None = None,
        logical_nc_config: int = 1,
        weights_to_skip_layout_optimization: set[str] = set(),  # noqa: B006 - NxD's signature; never written
        compiler_flag_hook: Any = None,
    ) -> None:
        self.tp_degree, self.start_rank_id = tp_degree, start_rank_id
        self.model_collection: dict[str, ModelContainer] = {}

    def add(
        self,
        key: str,
        model_instance: Any,
        example_inputs: Sequence[Inputs],
        compiler_args: str | None = None,
        bucket_config: Any = None,
        priority_model_idx: int | None = None,
    ) -> ModelBuilder:
        self.model_collection[key] = ModelContainer(
            model_instance, example_inputs, compiler_args, bucket_config, priority_model_idx
        )
        return self

    def trace(
        self, initialize_model_weights: bool = True, dry_run: bool = False, disable_fail_fast: bool = False
    ) -> None:
        """Run every submodel at every bucket on the meta device.

        Raises:
            TraceError: inputs, outputs or aliases that the Neuron runtime would refuse; all of them are listed.
        """
        problems: list[str] = []
        programs: dict[str, str] = {}
        for key, container in self.model_collection.items():
            instance = container.model_instance
            with as_rank(self.start_rank_id, self.tp_degree), torch.device("meta"), torch.no_grad():
                instance.load_module()
                for i, inputs in enumerate(tqdm(container.example_inputs, desc=f"Walking {key}", delay=1)):
                    module, aliases = instance.get(i)
                    outputs = module(*(tensor.to("meta") for tensor in inputs))
                    found = [*input_problems(inputs), *alias_problems(module, aliases, outputs)]
                    this, shapes = f"{key}, bucket {i}", shapes_of(inputs)
                    if shapes in programs:
                        found.append(f"inputs of the shapes of {programs[shapes]}: only one of the two would ever run")
                    programs[shapes] = this
                    problems += [f"{this}: {line}" for line in found]
        if problems:
            raise TraceError(problems)


class TraceError(ValueError):
    """A submodel that would not trace or run; `problems` holds one line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("the model cannot be traced:\n" + "\n".join(f"  - {line}" for line in problems))


def shapes_of(inputs: Sequence[torch.Tensor]) -> str:
    """The key by which a loaded model finds the program of a call."""
    return str([list(tensor.shape) for tensor in inputs])


def input_problems(inputs: Inputs) -> list[str]:
    """Sample inputs are what every later call is held against; the wrapper turns int64 into int32 before each."""
    return [
        f"input {i} is {tensor.dtype}; the wrapper never passes that"
        for i, tensor in enumerate(inputs)
        if tensor.dtype in (torch.int64, torch.float64)
    ]


def alias_problems(
    module: torch.nn.Module, aliases: dict[torch.nn.Parameter, int], outputs: Sequence[torch.Tensor]
) -> list[str]:
    """An alias makes the runtime write an output over a parameter: every state once, in the same shape and dtype."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    state = [name for name in names.values() if ".past_key_values." in f".{name}"]
    problems = [f"an aliased tensor is no parameter of the module: {p.shape}" for p in aliases if id(p) not in names]
    problems += [f"{name} has no alias" for name in state if name not in {names.get(id(p)) for p in aliases}]
    if sorted(aliases.values()) != [*range(len(outputs) - len(aliases), len(outputs))]:
        problems.append(f"{len(outputs)} outputs, the aliases are {sorted(aliases.values())}: they must be the last")
    for parameter, index in aliases.items():
        output = outputs[index] if index < len(outputs) else None
        if output is None or output.shape != parameter.shape or output.dtype != parameter.dtype:
            found = "no output" if output is None else f"{output.dtype} {tuple(output.shape)}"
            problems.append(
                f"{names.get(id(parameter))} is {parameter.dtype} {tuple(parameter.shape)}, output {index} is {found}"
            )
        elif output is parameter:
            problems.append(f"{names.get(id(parameter))} is returned as it came: the step would not change it")
    return problems
