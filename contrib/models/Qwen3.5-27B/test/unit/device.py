# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A loaded model as the host sees it on a device, on a CPU.

NxD's loaded model (`trace/spmd.py` at NxD 2.29) is a script module. It keeps the caches of every local rank in
`nxd_model.state`, by the name of the parameter, and its programs update them in place. A call returns the outputs that
are no caches, of the first rank, and a single one bare.
"""

# No annotations from __future__: TorchScript reads them.
from collections.abc import Callable
from typing import Any

import torch

from qwen35 import NeuronQwen35ForCausalLM


class _NxDModel(torch.nn.Module):
    state: list[dict[str, torch.Tensor]]

    def __init__(self, state: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.state = state

    def forward(self) -> int:
        return len(self.state)


class _Program(torch.jit.ScriptModule):  # type: ignore[no-untyped-call]
    """A submodel of the loaded model."""

    def __init__(self, nxd_model: Any, run: Callable[..., Any]) -> None:
        super().__init__()
        self.nxd_model = nxd_model
        self.__dict__["run"] = run  # past what would be scripted

    def __call__(self, *inputs: torch.Tensor) -> Any:
        return self.__dict__["run"](*inputs)


def _program(nxd_model: Any, modules: list[Any], continues: bool) -> _Program:
    """Each rank computes with its own CPU module, on a copy of its caches."""

    def run(*inputs: torch.Tensor) -> Any:
        returned = []
        for module, state in zip(modules, nxd_model.state, strict=True):
            module.n_positions, module.continues = inputs[1].shape[1], continues
            for entry, buffer in zip(module.kv_mgr.past_key_values, state.values(), strict=True):
                entry.data = buffer.clone()
            outputs = module(*inputs)
            for buffer, new in zip(state.values(), outputs[-len(state) :], strict=True):
                buffer.copy_(new)
            returned.append(outputs[: -len(state)])
        return returned[0] if len(returned[0]) > 1 else returned[0][0]

    return _Program(nxd_model, run)


def put_on_device(*ranks: NeuronQwen35ForCausalLM) -> NeuronQwen35ForCausalLM:
    """The first model, loaded on a CPU before, on a device whose ranks hold the modules of all these models.

    They need not be shards of one checkpoint: with weights of its own each rank has caches of its own.
    """
    state = [
        {
            f"kv_mgr.past_key_values.{i}": torch.zeros_like(entry)
            for i, entry in enumerate(rank.models[0].model.kv_mgr.past_key_values)
        }
        for rank in ranks
    ]
    nxd_model = torch.jit.script(_NxDModel(state))
    for submodels in zip(*(rank.models for rank in ranks), strict=True):
        submodels[0].model = _program(nxd_model, [submodel.model for submodel in submodels], submodels[0].continues)
    assert all(submodel.is_neuron() for submodel in ranks[0].models)
    return ranks[0]


def kept(model: NeuronQwen35ForCausalLM) -> list[list[torch.Tensor]]:
    """What each rank of a model, on a device or not, keeps between steps: two tensors a layer."""
    loaded: Any = model.context_encoding_model.model
    if model.context_encoding_model.is_neuron():
        return [[*state.values()] for state in loaded.nxd_model.state]
    return [[entry.data for entry in loaded.kv_mgr.past_key_values]]
