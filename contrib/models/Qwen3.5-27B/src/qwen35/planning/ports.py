# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What ports of 27B measured on devices, as they published it, held against the modelled times."""

from __future__ import annotations

from dataclasses import dataclass

from .step import PROMPT, StepModel

LAYERS, HIDDEN_BYTES = 64, 2 * 5120
"""Of 27B in bfloat16: other models are not compared."""

PORT_CONTEXT = 128
"""Cached tokens that a token is modelled with here; of one port only it is known, and it matters little."""


@dataclass(frozen=True)
class Port:
    """A published port, with seconds that it measured of 27B in bfloat16 at batch 1."""

    name: str
    machine: str
    tp_degree: int
    token: float
    prompt: float | None
    """Of 1,024 tokens, where it was published."""
    whole_deltanet: bool
    """Whether every rank holds all DeltaNet heads; where False, it is not known to."""
    note: str


PORTS = (
    Port("NxDI pull request 128", "trn2.3xlarge", 4, 53e-3, None, True, "sequences of 128 tokens"),
    Port("a change set of vLLM Neuron", "trn2.3xlarge", 4, 48.5e-3, 284e-3, False, "DeltaNet in plain PyTorch"),
    Port("a contrib model for NxDI", "trn2.48xlarge", 8, 21.6e-3, None, False, "prompts of 16 tokens"),
)


@dataclass(frozen=True)
class Comparison:
    """A port beside the modelled times of this model, seconds."""

    port: Port
    token: float
    whole_deltanet: float
    """What DeltaNet whole on every rank is modelled to add to a token; 0 where the port is not known to have it."""
    prompt: float

    @property
    def token_unexplained(self) -> float:
        """What the port measured beyond that."""
        return self.port.token - self.token - self.whole_deltanet

    @property
    def layer_unexplained(self) -> float:
        """The same, of a layer."""
        return self.token_unexplained / LAYERS


def compare(ours: StepModel, whole: StepModel) -> list[Comparison]:
    """The ports of the same model and degree beside `ours`; `whole` is the same with DeltaNet whole on every rank."""
    if (ours.deltanet_layers + ours.attention_layers, ours.hidden_bytes) != (LAYERS, HIDDEN_BYTES):
        return []
    token, prompt = ours.decode(PORT_CONTEXT).modelled, ours.prompt(PROMPT).modelled
    added = whole.decode(PORT_CONTEXT).modelled - token
    ports = (port for port in PORTS if port.tp_degree == ours.ranks)
    return [Comparison(port, token, added if port.whole_deltanet else 0.0, prompt) for port in ports]
