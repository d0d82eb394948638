# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a model fits a device: the bytes of a rank, the contexts and batches that fit, and the check of `compile`.

Weights, caches and states are counted on the modules of a rank; activations are modelled (`programs`); the reserve is
inferred.

A layout has one copy of DeltaNet's heads over all ranks, or `tp_degree` copies: whole on every rank, as published ports
have it, together with K and V caches of the DeltaNet layers that nothing reads.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..configuration_qwen35 import FULL_ATTENTION
from ..hardware import INSTANCES, Figure, Instance, detected_instance, rank_hbm_bytes
from ..nxdi import NeuronBaseForCausalLM, on_stand_ins
from .counting import RankBytes, WeightBytes, count_bytes, count_weights, count_whole_deltanet, rank_module
from .programs import PROGRAM_INSTRUCTIONS, Model, Program, most_activations, walk_buckets, with_config

RESERVE = Figure(
    3_500_000_000,
    "bytes per rank for code, DMA rings, collectives and the compiler's scratch",
    "inferred: what NxDI pull request 128 reports in use at 128 tokens, 23.57 GiB, is 3.3 GB more than is counted here",
)
LENGTH_STEP = 128
"""Contexts are looked for in steps of NxDI's smallest bucket (`modules/autobucketing.py`)."""
MOST_SLOTS = 512
"""No larger batch is looked for."""


@dataclass(frozen=True)
class Layout:
    """Bytes of one rank."""

    weights: WeightBytes
    kv_cache: int
    recurrent_state: int
    conv_state: int
    speculation: int
    activations: int
    """Of the largest bucket: programs take turns on one scratchpad (neuron-runtime/explore/device-memory.rst)."""
    reserve: int
    hbm: int

    @property
    def total(self) -> int:
        kept = self.kv_cache + self.recurrent_state + self.conv_state + self.speculation
        return self.weights.total + kept + self.activations + self.reserve

    @property
    def headroom(self) -> int:
        return self.hbm - self.total

    @property
    def fits(self) -> bool:
        return self.headroom >= 0


@dataclass(frozen=True)
class Resident:
    """What a rank holds between programs, in bytes counted on its module."""

    weights: WeightBytes
    whole_deltanet: int
    """Of the DeltaNet layers' weights, if this rank held them whole."""
    kept: RankBytes
    kv_cache_of_all_layers: int
    """If the DeltaNet layers had a KV cache too."""
    hbm: int

    def layout(self, activations: int, copies: int = 1) -> Layout:
        """With bytes of activations, and `copies` of DeltaNet's heads over all ranks: 1 or `tp_degree`."""
        return Layout(
            weights=self.weights if copies == 1 else replace(self.weights, deltanet=self.whole_deltanet),
            kv_cache=self.kept.kv_cache if copies == 1 else self.kv_cache_of_all_layers,
            recurrent_state=copies * self.kept.recurrent_state,
            conv_state=copies * self.kept.conv_state,
            speculation=self.kept.speculation,
            activations=activations,
            reserve=RESERVE.value,
            hbm=self.hbm,
        )


@dataclass(frozen=True)
class Limits:
    """What else fits; 0 where nothing does."""

    context: int
    """Most tokens of a sequence at this batch."""
    batch: int
    """Most slots of the cache at this context."""


def require_fits(model: NeuronBaseForCausalLM) -> None:
    """Check that a model fits the instance that its configuration names, else the one that this machine is.

    On a CPU, and where no instance is named or detected, nothing is checked. Warns of programs that are probably too
    long for the compiler, of a model that does not fit an instance that nobody named, and of a named one that is not
    this machine.

    Raises:
        ValueError: it does not fit the named one; the message says which context, batch and tensor-parallel degrees do.
    """
    neuron = model.neuron_config
    if neuron.on_cpu:
        return
    name, detected = getattr(neuron, "instance", None), detected_instance()
    if name is not None:
        if detected is not None and detected.name != name:
            warnings.warn(
                f"this machine is a {detected.name}: instance={name!r} is what the model is compiled for",
                stacklevel=2,
            )
        _require_fits_on(model, name)
    elif detected is not None:
        try:
            _require_fits_on(model, detected.name)
        except ValueError as error:
            warnings.warn(f"this machine is a {detected.name}, and nothing else is named: {error}", stacklevel=2)


def _require_fits_on(model: NeuronBaseForCausalLM, name: str) -> None:
    # Of a subclass made elsewhere, the class of this package that another process can import.
    package = __name__.partition(".")[0]
    own = next(kind for kind in type(model).__mro__ if kind.__module__.startswith(f"{package}."))
    on_stand_ins(_require_fits, own, model.config.to_json_string(), name)


def _require_fits(model_cls: Any, config_json: str, name: str) -> None:
    model: NeuronBaseForCausalLM = model_cls("", model_cls.get_config_cls().from_json_string(config_json))
    degrees = tp_degrees(model, INSTANCES[name])
    programs = walk_buckets(model, slice(-1, None))
    layout = count_resident(model).layout(most_activations(programs))
    if not layout.fits:
        raise ValueError(_refusal(model, layout, name, degrees))
    for program in programs:
        if program.matmuls > PROGRAM_INSTRUCTIONS.value:
            warnings.warn(_too_long(model, program), stacklevel=2)


def _refusal(model: NeuronBaseForCausalLM, layout: Layout, name: str, degrees: list[int]) -> str:
    neuron, possible = model.neuron_config, limits(model, layout.activations)
    fitting = [degree for degree in degrees if layout_of(_with_tp_degree(model, degree)).fits]
    remedies = [
        f"lower {field} to at most {most}"
        for field, most in (("seq_len", possible.context), ("kv_cache_batch_size", possible.batch))
        if most
    ]
    remedies += [f"set tp_degree to {' or '.join(map(str, fitting))}"] if fitting else []
    return (
        f"seq_len={neuron.max_length} with kv_cache_batch_size={neuron.kv_cache_batch_size} at "
        f"tp_degree={neuron.tp_degree} needs {layout.total / 1e9:.1f} GB of HBM per rank, instance={name!r} has "
        f"{layout.hbm / 1e9:.1f} GB: {', or '.join(remedies) or 'use a larger instance'}; see 'qwen35 plan'"
    )


def _too_long(model: NeuronBaseForCausalLM, program: Program) -> str:
    field = "max_context_length" if model.config.prefill_chunk_size is None else "prefill_chunk_size"
    return (
        f"{program.submodel}, bucket {program.bucket}: at least {program.matmuls / 1e6:.1f} M instructions "
        f"(modelled), and neuronx-cc gives up above {PROGRAM_INSTRUCTIONS.value / 1e6:.0f} M; should it "
        f"say NCC_EBVF030, lower {field}={model.neuron_config.max_context_length}"
    )


def tp_degrees(model: NeuronBaseForCausalLM, instance: Instance) -> list[int]:
    """The tensor-parallel degrees of the checkpoint that the instance has ranks for.

    Raises:
        ValueError: the configured degree is more than that.
    """
    neuron = model.neuron_config
    ranks = instance.ranks(neuron.logical_nc_config)
    valid = [degree for degree in model.config.valid_tp_degrees() if degree <= ranks]
    if neuron.tp_degree > ranks:
        raise ValueError(
            f"tp_degree={neuron.tp_degree} exceeds the {ranks} logical cores of {instance.name} at "
            f"logical_nc_config={neuron.logical_nc_config}; valid degrees: {', '.join(map(str, valid))}"
        )
    return valid


def count_resident(model: NeuronBaseForCausalLM) -> Resident:
    """What a rank holds between programs; the model need not be loaded."""
    module, kinds = rank_module(model), model.config.cached_layer_types
    kept = count_bytes(module)
    return Resident(
        weights=count_weights(module),
        whole_deltanet=count_whole_deltanet(module),
        kept=kept,
        kv_cache_of_all_layers=kept.kv_cache * len(kinds) // max(kinds.count(FULL_ATTENTION), 1),
        hbm=rank_hbm_bytes(model.neuron_config.logical_nc_config),
    )


def layout_of(model: NeuronBaseForCausalLM, copies: int = 1) -> Layout:
    """The bytes of a rank, with `copies` of DeltaNet's heads over all ranks: 1 or `tp_degree`."""
    return count_resident(model).layout(most_activations(walk_buckets(model, slice(-1, None))), copies)


def limits(model: NeuronBaseForCausalLM, activations: int, copies: int = 1) -> Limits:
    """What else fits, given the bytes of activations of the model as it is."""
    neuron, longest = model.neuron_config, model.config.max_position_embeddings

    def headroom(seq_len: int, slots: int) -> int:
        other = resized(model, seq_len, slots)
        free = count_resident(other).layout(0, copies).headroom
        if free < 0:  # whatever the activations: a walk takes seconds for the longest buckets
            return free
        if (seq_len, slots) == (neuron.max_length, neuron.kv_cache_batch_size):
            return free - activations
        return free - most_activations(walk_buckets(other, slice(-1, None)))

    def length(step: int) -> int:
        return min(step * LENGTH_STEP, longest)

    steps = largest(lambda step: headroom(length(step), neuron.kv_cache_batch_size), -(-longest // LENGTH_STEP))
    return Limits(context=length(steps), batch=largest(lambda slots: headroom(neuron.max_length, slots), MOST_SLOTS))


def largest(headroom: Callable[[int], int], limit: int) -> int:
    """The largest n from 1 to `limit` with headroom(n) >= 0, or 0; headroom falls with n.

    Few calls where it falls nearly in proportion, as memory does: the next n is where a straight line is 0, or the
    middle when that did not halve what is left.
    """
    low, high = 1, limit
    if (at_high := headroom(high)) >= 0:
        return limit
    if (at_low := headroom(low)) < 0:
        return 0
    halved = True
    while high - low > 1:
        left = high - low
        step = left * at_low // (at_low - at_high) if halved else left // 2
        middle = low + min(max(step, 1), left - 1)
        found = headroom(middle)
        if found >= 0:
            low, at_low = middle, found
        else:
            high, at_high = middle, found
        halved = 2 * (high - low) <= left
    return low


def resized(model: Model, seq_len: int, slots: int) -> Model:
    """The model for another context and number of slots; what was equal to the old number follows the new."""
    config = copy.deepcopy(model.config)
    neuron = config.neuron_config
    old_length, old_slots = neuron.max_length, neuron.kv_cache_batch_size
    chunk = [] if config.prefill_chunk_size is None else ["prefill_chunk_size"]
    for name in ("seq_len", "max_length", "n_positions", "max_context_length", *chunk):
        value = getattr(neuron, name)
        setattr(neuron, name, seq_len if value == old_length else min(value, seq_len))
    for name in ("batch_size", "tkg_batch_size", "max_batch_size", "kv_cache_batch_size", "ctx_batch_size"):
        value = getattr(neuron, name)
        follows = value == old_slots and not (name == "ctx_batch_size" and neuron.is_continuous_batching)
        setattr(neuron, name, slots if follows else min(value, slots))
    for name, last in (
        ("context_encoding_buckets", neuron.max_context_length),
        ("token_generation_buckets", neuron.max_length),
    ):
        if buckets := getattr(neuron, name):
            setattr(neuron, name, [*(bucket for bucket in buckets if bucket < last), last])
    return with_config(model, config)


def _with_tp_degree(model: Model, tp_degree: int) -> Model:
    config = copy.deepcopy(model.config)
    config.neuron_config.tp_degree = tp_degree
    return with_config(model, config)
