# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""NxDI's async mode over our wrapper: the next decoding step is queued before the last one is read.

Async mode exists on a device only. Here NxDI's own `async_execution` and wrapper run, and one thing is replaced: the
runtime below them. `SimulatedRuntime` takes the inputs of every rank and returns outputs that are not on the host yet,
a list per rank, as the traced model's `forward_async` does; its steps are computed by the CPU module.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen35 import NeuronQwen35ForCausalLM, OnDeviceSamplingConfig
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.phase import Phase
from support.decoder_cases import CASES, STEPS, recorded
from support.models import NO_NXDI, load_neuron, right_padded

pytestmark = [pytest.mark.nxdi, pytest.mark.skipif(not NXDI_AVAILABLE, reason=NO_NXDI)]


class SimulatedOutputs(list):  # type: ignore[type-arg]
    """Outputs of every rank, [[tensor, ...] per rank], which NxDI must fetch from the simulated device."""


class SimulatedRuntime:
    """A traced submodel on a simulated device of one rank: the state stays there, outputs are fetched later."""

    def __init__(self, module: Any, phase: Phase) -> None:
        self.module, self.phase, self.queued = module, phase, 0
        self.nxd_model = SimpleNamespace(forward_async=self.forward_async)

    def forward_async(self, ranked: list[list[Any]]) -> SimulatedOutputs:
        (inputs,) = ranked
        self.module.n_positions, self.module.phase = inputs[1].shape[1], self.phase
        outputs = self.module(*(tensor.detach() for tensor in inputs))
        state = self.module.kv_mgr.past_key_values
        for entry, new in zip(state, outputs[-len(state) :], strict=True):
            entry.data = new.data
        self.queued += 1
        return SimulatedOutputs([outputs[: -len(state)]])


@pytest.fixture
def load_on_simulated_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """load(path, **options): a loaded model, and the simulated runtimes of its submodels."""
    from neuronx_distributed_inference.models import model_wrapper
    from neuronx_distributed_inference.modules import async_execution

    for module in (async_execution, model_wrapper):  # the real one asks for a tensor of the Neuron backend
        monkeypatch.setattr(module, "is_ranked_io", lambda value: isinstance(value, SimulatedOutputs))

    def load(path: Path, **options: Any) -> tuple[NeuronQwen35ForCausalLM, list[SimulatedRuntime]]:
        model = load_neuron(path, on_device_sampling_config=OnDeviceSamplingConfig(), **options)
        module = model.models[0].model
        runtimes = [SimulatedRuntime(module, wrapper.phase) for wrapper in model.models]
        model.async_mode = True
        for wrapper, runtime in zip(model.models, runtimes, strict=True):
            monkeypatch.setattr(wrapper, "is_neuron", lambda: True)
            wrapper.async_mode = wrapper.neuron_config.async_mode = True
            object.__setattr__(wrapper, "_modules", {**wrapper._modules})
            wrapper._modules.pop("model", None)
            wrapper.__dict__["model"] = runtime
        model.neuron_config.async_mode = True
        return model, runtimes

    return load


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 0]], ids=str)
def test_queued_steps_give_the_tokens_of_steps_that_wait(
    slots: list[int], load_on_simulated_device: Any, tmp_path: Path
) -> None:
    case = CASES[1]
    model, runtimes = load_on_simulated_device(case.checkpoint(tmp_path), batch_size=4, seq_len=160)
    prompts = [case.prompts()[slot] for slot in slots]  # slot i has prompt i
    ids, mask = right_padded(prompts)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    seq_ids = torch.tensor(slots)
    tokens = [model(ids, seq_ids, mask, positions).tokens]
    lengths = mask.sum(dim=1, keepdim=True)
    for step in range(STEPS - 1):
        positions = lengths + step
        mask = (torch.arange(int(positions.max())) < positions).long()
        tokens.append(model(tokens[-1].view(-1, 1).long(), seq_ids, mask, positions).tokens)
    expected, _ = recorded(case)
    assert torch.equal(torch.stack([row.view(-1) for row in tokens], dim=1).long(), expected[slots])
    assert sum(runtime.queued for runtime in runtimes) > STEPS, "no step was ever queued ahead"
