# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The plan of a configuration: what it takes of a rank's HBM and time, before anything is compiled.

Weights, caches and states are counted from the modules of a rank on the meta device. **Activations and times are
modelled** (`memory.programs`, `work`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..configuration_qwen35 import QWEN35_PRESETS, Qwen35ConfigError, Qwen35InferenceConfig, Qwen35NeuronConfig
from ..configuration_qwen35_vl import QWEN35_VISION_PRESETS, Qwen35VisionConfig
from ..hardware import Instance
from ..memory.counting import on_meta_rank
from ..memory.fit import Layout, Limits, count_resident, layout_of, limits, tp_degrees
from ..memory.programs import Program, most_activations, walk_buckets
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..nxdi import NeuronConfig
from ..vision.application import Qwen35VisionEncoder, Qwen35VisionInferenceConfig
from ..vision.encoder import NeuronQwen35VisionModel
from .recommended import RECOMMENDED
from .step import StepModel, not_modelled, step_model_of
from .work import Work, work_of


@dataclass(frozen=True)
class VisionBytes:
    """Weights of the vision encoder, which runs on the host and takes no HBM there."""

    host: int
    rank: int | None
    """What a rank would hold instead; None where the ranks cannot split its heads."""


@dataclass(frozen=True)
class Column:
    """One layout with its limits and its work."""

    layout: Layout
    limits: Limits
    work: Work
    step: StepModel | None
    """None where `Plan.not_modelled` says why."""


@dataclass(frozen=True)
class Plan:
    """What a configuration takes on an instance."""

    instance: Instance
    tp_degree: int
    lnc: int
    dtype: torch.dtype
    """Of activations, and of weights and of keys and values where the two below are None."""
    weights_dtype: str | None
    kv_cache_dtype: str | None
    seq_len: int
    slots: int
    """Sequences that the cache holds."""
    rows: int
    """Sequences of a decoding step."""
    prompt_rows: int
    """Sequences whose prompts are encoded together."""
    prompt_bucket: int
    """Tokens of the largest context-encoding bucket."""
    sharded: Column
    replicated: Column
    """For comparison, as in published ports. Its activations are taken to be those of `sharded`."""
    programs: tuple[Program, ...]
    valid_tp_degrees: tuple[int, ...]
    """Of this checkpoint on this instance."""
    not_modelled: str | None
    """Why times by part are not modelled, in one line; None where they are."""
    vision: VisionBytes | None

    @property
    def fits(self) -> bool:
        return self.sharded.layout.fits


def plan(model: NeuronQwen35ForCausalLM, instance: Instance) -> Plan:
    """Count what `model`, an application that need not be loaded, takes on `instance`.

    `logical_nc_config` says which share of a chip a rank has.

    Raises:
        ValueError: the instance has fewer ranks than `tp_degree`.
    """
    neuron: Any = model.neuron_config
    valid = tp_degrees(model, instance)
    programs = walk_buckets(model)
    resident, activations = count_resident(model), most_activations(programs)
    reason = not_modelled(model)

    def column(copies: int) -> Column:
        return Column(
            layout=resident.layout(activations, copies),
            limits=limits(model, activations, copies),
            work=work_of(model, copies),
            step=step_model_of(model, copies) if reason is None else None,
        )

    return Plan(
        instance=instance,
        tp_degree=neuron.tp_degree,
        lnc=neuron.logical_nc_config,
        dtype=neuron.torch_dtype,
        weights_dtype=getattr(neuron, "weights_dtype", None),
        kv_cache_dtype=getattr(neuron, "kv_cache_dtype", None),
        seq_len=neuron.max_length,
        slots=neuron.kv_cache_batch_size,
        rows=neuron.tkg_batch_size,
        prompt_rows=neuron.ctx_batch_size,
        prompt_bucket=neuron.max_context_length,
        sharded=column(1),
        replicated=column(neuron.tp_degree),
        programs=tuple(programs),
        valid_tp_degrees=tuple(valid),
        not_modelled=reason,
        vision=_vision(model.config),
    )


def preset_application(name: str, neuron_config: Qwen35NeuronConfig) -> NeuronQwen35ForCausalLM:
    """A published checkpoint's model by its name in `QWEN35_PRESETS`; there are no weights behind it."""
    fields: dict[str, Any] = QWEN35_PRESETS[name]
    vision = QWEN35_VISION_PRESETS.get(name)
    return NeuronQwen35ForCausalLM(name, Qwen35InferenceConfig(neuron_config, **fields, vision_config=vision))


@cache
def recommended_layout(name: str) -> Layout:
    """The bytes of a rank of a recommended configuration, by its name in `RECOMMENDED`."""
    return layout_of(preset_application("27B", RECOMMENDED[name].neuron_config()))


def _vision(config: Qwen35InferenceConfig) -> VisionBytes | None:
    if config.vision_config is None:
        return None
    vision, dtype = Qwen35VisionConfig.from_dict(config.vision_config), config.neuron_config.torch_dtype

    def nbytes(module: torch.nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    with torch.device("meta"):
        host = nbytes(NeuronQwen35VisionModel(vision, dtype))
    neuron = NeuronConfig(tp_degree=config.neuron_config.tp_degree, torch_dtype=dtype, buckets=[vision.merge_unit])
    try:
        on_device = Qwen35VisionInferenceConfig(neuron, load_config=lambda c: vars(c).update(vars(vision)))
    except Qwen35ConfigError:
        return VisionBytes(host, None)
    with on_meta_rank(config):
        return VisionBytes(host, nbytes(Qwen35VisionEncoder(on_device)))
