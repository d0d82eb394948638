# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A simulated device: a loaded model as the host sees it on a device, computed on a CPU.

NxD's loaded model (`trace/spmd.py` at NxD 2.29) is a script module. It keeps the caches of every local rank in
`nxd_model.state`, by the name of the parameter, and its programs update them in place. It finds the program of a call
by the shapes of the inputs, and returns the first rank's outputs without the caches: a list, or a lone tensor.
"""

# No annotations from __future__: TorchScript reads them.
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nxdi_cpu.model_builder import shapes_of
from qwen35 import NeuronQwen35ForCausalLM
from qwen35.phase import Phase


class _NxDModel(torch.nn.Module):
    state: list[dict[str, torch.Tensor]]

    def __init__(self, state: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.state = state

    def forward(self) -> int:
        return len(self.state)


class _OnDevice:
    """An output that is still on the device."""

    def __init__(self, output: torch.Tensor, reads: list[torch.Size]) -> None:
        self._output, self._reads = output, reads

    def cpu(self) -> torch.Tensor:
        self._reads.append(self._output.shape)
        return self._output


class _Ranked:
    """NxD's model within the loaded one: the state, and calls whose outputs stay on the device, a list a rank."""

    def __init__(self, nxd_model: Any, loaded: Any) -> None:
        self._nxd_model, self._loaded = nxd_model, loaded

    @property
    def state(self) -> list[dict[str, torch.Tensor]]:
        return self._nxd_model.state  # type: ignore[no-any-return]

    def forward_ranked(self, inputs: list[list[torch.Tensor]]) -> list[list[_OnDevice]]:
        outputs = self._loaded.__dict__["run"](*inputs[0])
        each = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return [[_OnDevice(output, self._loaded.__dict__["reads"]) for output in each] for _ in inputs]


class _LoadedModel(torch.jit.ScriptModule):  # type: ignore[no-untyped-call]
    """The programs of all submodels and buckets; `run` calls that of the inputs' shapes."""

    def __init__(self, nxd_model: Any, run: Callable[..., Any]) -> None:
        super().__init__()
        # Past what would be scripted.
        self.__dict__["run"] = run
        self.__dict__["reads"] = []
        self.__dict__["nxd_model"] = _Ranked(nxd_model, self)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        outputs = self.__dict__["run"](*inputs)
        each = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        self.__dict__["reads"] += [output.shape for output in each]
        return outputs


@dataclass(frozen=True)
class _Program:
    """A bucket of a submodel: each rank computes with its own CPU module, on a copy of its caches."""

    modules: list[Any]
    bucket: int
    phase: Phase
    dtypes: list[torch.dtype]

    def __call__(self, state: list[dict[str, torch.Tensor]], inputs: tuple[torch.Tensor, ...]) -> Any:
        assert [tensor.dtype for tensor in inputs] == self.dtypes, "the program was made for other dtypes"
        returned = []
        for module, buffers in zip(self.modules, state, strict=True):
            module.n_positions, module.phase = self.bucket, self.phase
            for entry, buffer in zip(module.kv_mgr.past_key_values, buffers.values(), strict=True):
                entry.data = buffer.clone()
            outputs = module(*inputs)
            for buffer, new in zip(buffers.values(), outputs[-len(buffers) :], strict=True):
                buffer.copy_(new)
            returned.append(outputs[: -len(buffers)])
        return returned[0] if len(returned[0]) > 1 else returned[0][0]


def put_on_simulated_device(*ranks: NeuronQwen35ForCausalLM) -> NeuronQwen35ForCausalLM:
    """The first model, moved to a simulated device whose ranks have the modules of all these models.

    All are loaded on a CPU before. They need not be shards of one checkpoint: ranks with weights of their own have
    caches of their own.
    """
    state = [
        {
            f"kv_mgr.past_key_values.{i}": torch.zeros_like(entry)
            for i, entry in enumerate(rank.models[0].model.kv_mgr.past_key_values)
        }
        for rank in ranks
    ]
    nxd_model = torch.jit.script(_NxDModel(state))
    programs: dict[str, _Program] = {}
    for submodels in zip(*(rank.models for rank in ranks), strict=True):
        wrapper = submodels[0]
        for bucket, samples in zip(wrapper.neuron_config.buckets, wrapper.input_generator(), strict=True):
            programs[shapes_of(samples)] = _Program(
                modules=[each.model for each in submodels],
                bucket=bucket,
                phase=wrapper.phase,
                dtypes=[tensor.dtype for tensor in samples],
            )
    loaded = _LoadedModel(nxd_model, lambda *inputs: programs[shapes_of(inputs)](nxd_model.state, inputs))
    loaded.__dict__["phase_of"] = lambda inputs: programs[shapes_of(inputs)].phase
    for wrapper in ranks[0].models:
        wrapper.model = loaded
    assert all(submodel.is_neuron() for submodel in ranks[0].models)
    return ranks[0]


def host_reads(model: NeuronQwen35ForCausalLM) -> list[torch.Size]:
    """Shapes of the outputs that were brought from the simulated device to the host so far, oldest first."""
    reads: list[torch.Size] = model.context_encoding_model.model.__dict__["reads"]
    return reads


Fault = Callable[[Phase, list[int], torch.Tensor], None]
"""Gets the phase of a call, the slots of its rows, -1 of those that pad it, and its logits [B, 1, V]."""


@contextmanager
def faults(model: NeuronQwen35ForCausalLM, fault: Fault) -> Iterator[None]:
    """Let `fault` see each call of a program once it has run: it may change the logits, or raise what the call raises.

    The caches have been updated by then, so that nobody can go on from them. On a CPU it is the module that is called,
    which has written keys and values in place, and whose new states are lost when the call fails.
    """
    if model.context_encoding_model.is_neuron():
        loaded = model.context_encoding_model.model
        run = loaded.__dict__["run"]

        def run_with_fault(*inputs: torch.Tensor) -> Any:
            outputs = run(*inputs)
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            fault(loaded.__dict__["phase_of"](inputs), inputs[3].tolist(), logits)
            return outputs

        loaded.__dict__["run"] = run_with_fault
        try:
            yield
        finally:
            loaded.__dict__["run"] = run
        return
    with ExitStack() as hooks:
        for module in {id(submodel.model): submodel.model for submodel in model.models}.values():
            handle = module.register_forward_hook(
                lambda module, inputs, outputs: fault(module.phase, inputs[3].tolist(), outputs[0])
            )
            hooks.callback(handle.remove)
        yield


def kept(model: NeuronQwen35ForCausalLM) -> list[list[torch.Tensor]]:
    """What each rank of a model, on the simulated device or on a CPU, keeps between steps: two tensors per layer."""
    loaded: Any = model.context_encoding_model.model
    if model.context_encoding_model.is_neuron():
        return [[*state.values()] for state in loaded.nxd_model.state]
    return [[entry.data for entry in loaded.kv_mgr.past_key_values]]
