# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a configuration takes of a rank's HBM and time, before anything is compiled.

Weights, caches and states are counted from the modules of a rank on the meta device. **Activations and times are
modelled**: activations are the most bytes that live at once when a bucket's module runs there, operation by operation
as in plain PyTorch; times are rooflines, which collectives, launches and waits can only add to.

NxDI's own layers do not run without a process group: `walk_buckets`, and what needs it, wants the stand-ins, as
`nxdi.on_stand_ins` provides them.

A layout has one copy of DeltaNet's heads over all ranks, or `tp_degree` copies: whole on every rank, as published ports
have it, together with K and V caches of the DeltaNet layers that nothing reads.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..configuration_qwen35 import Qwen35ConfigError, Qwen35InferenceConfig
from ..configuration_qwen35_vl import Qwen35VisionConfig
from ..hardware import INSTANCES, Figure, Instance, rank_bandwidth, rank_flops, rank_hbm_bytes
from ..memory import RankBytes, WeightBytes, count_bytes, count_weights, count_whole_deltanet
from ..nxdi import NeuronConfig, as_rank, on_stand_ins
from ..vision.application import Qwen35VisionEncoder, Qwen35VisionInferenceConfig
from ..vision.encoder import NeuronQwen35VisionModel

if TYPE_CHECKING:
    from ..modeling_qwen35 import NeuronQwen35ForCausalLM

RESERVE = Figure(
    3_500_000_000,
    "bytes a rank for code, DMA rings, collectives and the compiler's scratch",
    "inferred: what NxDI pull request 128 reports in use at 128 tokens, 23.57 GiB, is 3.3 GB more than is counted here",
)
PROGRAM_INSTRUCTIONS = Figure(
    5_000_000,
    "instructions of a program, above which neuronx-cc gives up (NCC_EBVF030)",
    "its message, in github.com/aws-neuron/aws-neuron-sdk issue 819",
)
MATMUL_TILE = Figure(
    512,
    "columns that an instruction multiplies by a tile of at most 128 x 128",
    "nki/api/nki/isa/__init__.py, nc_matmul",
)
LENGTH_STEP = 128
"""Contexts are looked for in steps of NxDI's smallest bucket (`modules/autobucketing.py`)."""
MOST_LINES = 512
"""No larger batch is looked for."""


@dataclass(frozen=True)
class Program:
    """What a bucket of a submodel takes, which is compiled to a program of its own; modelled."""

    submodel: str
    bucket: int
    bytes: int
    """Most bytes of activations that live at once."""
    matmuls: int
    """Instructions of the Tensor engine, at least: the tiles of all matrix products outside the DeltaNet kernels."""


@dataclass(frozen=True)
class Layout:
    """Bytes of a rank."""

    weights: WeightBytes
    kv_cache: int
    recurrent_state: int
    conv_state: int
    activations: int
    """Of the largest bucket: programs take turns on one scratchpad (neuron-runtime/explore/device-memory.rst)."""
    reserve: int
    hbm: int

    @property
    def total(self) -> int:
        kept = self.kv_cache + self.recurrent_state + self.conv_state
        return self.weights.total + kept + self.activations + self.reserve

    @property
    def headroom(self) -> int:
        return self.hbm - self.total

    @property
    def fits(self) -> bool:
        return self.headroom >= 0


@dataclass(frozen=True)
class Limits:
    """What else fits; 0 where nothing does."""

    context: int
    """Most tokens of a sequence at this batch."""
    batch: int
    """Most cache lines at this context."""


@dataclass(frozen=True)
class Work:
    """What a rank computes and moves, from the shapes of its parameters and caches. The times are modelled."""

    token_flops: int
    """A token: 2 for each weight of the layers' matrices, and three products with the state of each DeltaNet head."""
    pair_flops: int
    """A token and one that it attends to: the products with its key and its value, in all attention layers."""
    head_flops: int
    """A sequence and step: the output head, of the last token alone."""
    weight_bytes: int
    """Read by every program: all but the embedding, of which a token needs one row."""
    state_bytes: int
    """A sequence: recurrent and conv state, read and written."""
    token_bytes: int
    """A token in the KV cache."""
    flops_per_second: float
    bytes_per_second: float

    def ttft(self, tokens: int, piece: int, rows: int = 1) -> float:
        """Least seconds for `rows` prompts of `tokens` each, in pieces of at most `piece` tokens."""
        seconds = 0.0
        for start in range(0, tokens, piece):
            length = min(piece, tokens - start)
            pairs = length * start + length * (length + 1) // 2
            flops = length * self.token_flops + pairs * self.pair_flops + self.head_flops
            seconds += self._seconds(rows * flops, start + length, rows)
        return seconds

    def tpot(self, context: int, rows: int = 1) -> float:
        """Least seconds for a token of each of `rows` sequences that have `context` tokens in the cache."""
        flops = self.token_flops + context * self.pair_flops + self.head_flops
        return self._seconds(rows * flops, context, rows)

    def _seconds(self, flops: int, cached: int, rows: int) -> float:
        moved = self.weight_bytes + rows * (2 * self.state_bytes + cached * self.token_bytes)
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


@dataclass(frozen=True)
class VisionBytes:
    """Weights of the vision encoder: on the host, where it runs and takes no HBM, and what a rank would hold."""

    host: int
    rank: int | None
    """None where the ranks cannot split its heads."""


@dataclass(frozen=True)
class Column:
    """One layout with its limits and its work."""

    layout: Layout
    limits: Limits
    work: Work


@dataclass(frozen=True)
class Plan:
    """What a configuration takes on an instance."""

    instance: Instance
    tp_degree: int
    lnc: int
    dtype: torch.dtype
    seq_len: int
    lines: int
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
    neuron = model.neuron_config
    valid = tp_degrees(model, instance)
    programs = walk_buckets(model)
    resident, activations = count_resident(model), _largest(programs)

    def column(copies: int) -> Column:
        return Column(resident.layout(activations, copies), _limits(model, activations, copies), work_of(model, copies))

    return Plan(
        instance=instance,
        tp_degree=neuron.tp_degree,
        lnc=neuron.logical_nc_config,
        dtype=neuron.torch_dtype,
        seq_len=neuron.max_length,
        lines=neuron.kv_cache_batch_size,
        rows=neuron.tkg_batch_size,
        prompt_rows=neuron.ctx_batch_size,
        prompt_bucket=neuron.max_context_length,
        sharded=column(1),
        replicated=column(neuron.tp_degree),
        programs=tuple(programs),
        valid_tp_degrees=tuple(valid),
        vision=_vision(model.config),
    )


def require_fits(model: NeuronQwen35ForCausalLM) -> None:
    """Check that a model fits the instance that its configuration names; without a name, or on a CPU, do nothing.

    Warns of programs that are probably too long for the compiler.

    Raises:
        ValueError: it does not fit; the message says which context, batch and tensor-parallel degrees do.
    """
    neuron = model.neuron_config
    name = getattr(neuron, "instance", None)
    if neuron.on_cpu or name is None:
        return
    own = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("qwen35."))
    on_stand_ins(_require_fits, own, model.config.to_json_string(), name)


def _require_fits(model_cls: Any, config_json: str, name: str) -> None:
    model: NeuronQwen35ForCausalLM = model_cls("", model_cls.get_config_cls().from_json_string(config_json))
    neuron = model.neuron_config
    degrees = tp_degrees(model, INSTANCES[name])
    programs = walk_buckets(model, slice(-1, None))
    layout = count_resident(model).layout(_largest(programs))
    if layout.fits:
        for program in programs:
            if program.matmuls > PROGRAM_INSTRUCTIONS.value:
                field = "max_context_length" if model.config.prefill_chunk_size is None else "prefill_chunk_size"
                warnings.warn(
                    f"{program.submodel}, bucket {program.bucket}: at least {program.matmuls / 1e6:.1f} M instructions "
                    f"(modelled), and neuronx-cc gives up above {PROGRAM_INSTRUCTIONS.value / 1e6:.0f} M; should it "
                    f"say NCC_EBVF030, lower {field}={neuron.max_context_length}",
                    stacklevel=2,
                )
        return
    limits = _limits(model, layout.activations)
    fitting = [degree for degree in degrees if layout_of(_with_tp_degree(model, degree)).fits]
    remedies = [
        f"lower {field} to at most {most}"
        for field, most in (("seq_len", limits.context), ("kv_cache_batch_size", limits.batch))
        if most
    ]
    remedies += [f"set tp_degree to {' or '.join(map(str, fitting))}"] if fitting else []
    raise ValueError(
        f"seq_len={neuron.max_length} with kv_cache_batch_size={neuron.kv_cache_batch_size} at "
        f"tp_degree={neuron.tp_degree} needs {layout.total / 1e9:.1f} GB of HBM a rank, instance={name!r} has "
        f"{layout.hbm / 1e9:.1f} GB: {', or '.join(remedies) or 'use a larger instance'}; see 'qwen35 plan'"
    )


def tp_degrees(model: NeuronQwen35ForCausalLM, instance: Instance) -> list[int]:
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


# --- Memory ----------------------------------------------------------------------------------------------------------
def resized(model: NeuronQwen35ForCausalLM, seq_len: int, lines: int) -> NeuronQwen35ForCausalLM:
    """The model for another context and number of cache lines; what was equal to the old number follows the new."""
    config = copy.deepcopy(model.config)
    neuron = config.neuron_config
    old_length, old_lines = neuron.max_length, neuron.kv_cache_batch_size
    chunk = [] if config.prefill_chunk_size is None else ["prefill_chunk_size"]
    for name in ("seq_len", "max_length", "n_positions", "max_context_length", *chunk):
        value = getattr(neuron, name)
        setattr(neuron, name, seq_len if value == old_length else min(value, seq_len))
    for name in ("batch_size", "tkg_batch_size", "max_batch_size", "kv_cache_batch_size", "ctx_batch_size"):
        value = getattr(neuron, name)
        follows = value == old_lines and not (name == "ctx_batch_size" and neuron.is_continuous_batching)
        setattr(neuron, name, lines if follows else min(value, lines))
    for name, last in (
        ("context_encoding_buckets", neuron.max_context_length),
        ("token_generation_buckets", neuron.max_length),
    ):
        if buckets := getattr(neuron, name):
            setattr(neuron, name, [*(bucket for bucket in buckets if bucket < last), last])
    return _with_config(model, config)


def _with_tp_degree(model: NeuronQwen35ForCausalLM, tp_degree: int) -> NeuronQwen35ForCausalLM:
    config = copy.deepcopy(model.config)
    config.neuron_config.tp_degree = tp_degree
    return _with_config(model, config)


def _with_config(model: NeuronQwen35ForCausalLM, config: Qwen35InferenceConfig) -> NeuronQwen35ForCausalLM:
    config.add_derived_config()
    return type(model)(model.model_path, config)


@contextmanager
def _on_a_rank(config: Qwen35InferenceConfig) -> Iterator[None]:
    with as_rank(0, config.neuron_config.tp_degree), torch.device("meta"), torch.no_grad():
        yield


@dataclass(frozen=True)
class Resident:
    """What a rank holds between programs, counted on its module, for any layout."""

    weights: WeightBytes
    whole_deltanet: int
    kept: RankBytes
    kv_cache_of_all_layers: int
    hbm: int

    def layout(self, activations: int, copies: int = 1) -> Layout:
        """With `copies` of DeltaNet's heads over all ranks; more than one as published ports have it."""
        return Layout(
            weights=self.weights if copies == 1 else replace(self.weights, deltanet=self.whole_deltanet),
            kv_cache=self.kept.kv_cache if copies == 1 else self.kv_cache_of_all_layers,
            recurrent_state=copies * self.kept.recurrent_state,
            conv_state=copies * self.kept.conv_state,
            activations=activations,
            reserve=RESERVE.value,
            hbm=self.hbm,
        )


def count_resident(model: NeuronQwen35ForCausalLM) -> Resident:
    """What a rank holds between programs."""
    with _on_a_rank(model.config):
        module = model._model_cls(model.config)
    kept, config = count_bytes(module), model.config
    return Resident(
        weights=count_weights(module),
        whole_deltanet=count_whole_deltanet(module),
        kept=kept,
        kv_cache_of_all_layers=kept.kv_cache * config.num_hidden_layers // max(len(config.full_attention_layers), 1),
        hbm=rank_hbm_bytes(model.neuron_config.logical_nc_config),
    )


def layout_of(model: NeuronQwen35ForCausalLM, copies: int = 1) -> Layout:
    """The bytes of a rank, with `copies` of DeltaNet's heads over all ranks."""
    return count_resident(model).layout(_largest(walk_buckets(model, slice(-1, None))), copies)


def _largest(programs: Iterable[Program]) -> int:
    return max(program.bytes for program in programs)


def _limits(model: NeuronQwen35ForCausalLM, activations: int, copies: int = 1) -> Limits:
    """What else fits, given the activations of the model as it is."""
    neuron, longest = model.neuron_config, model.config.max_position_embeddings

    def headroom(seq_len: int, lines: int) -> int:
        other = resized(model, seq_len, lines)
        resident = count_resident(other)
        free = resident.layout(0, copies).headroom
        if free < 0:  # whatever the activations: a walk takes seconds for the longest buckets
            return free
        if (seq_len, lines) == (neuron.max_length, neuron.kv_cache_batch_size):
            return free - activations
        return free - _largest(walk_buckets(other, slice(-1, None)))

    def length(step: int) -> int:
        return min(step * LENGTH_STEP, longest)

    steps = largest(lambda step: headroom(length(step), neuron.kv_cache_batch_size), -(-longest // LENGTH_STEP))
    return Limits(context=length(steps), batch=largest(lambda lines: headroom(neuron.max_length, lines), MOST_LINES))


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


# --- Programs --------------------------------------------------------------------------------------------------------
def walk_buckets(model: NeuronQwen35ForCausalLM, which: slice = slice(None)) -> list[Program]:
    """What some buckets of every submodel take.

    Of a model of like blocks of layers two are walked: what the second leaves behind and multiplies every further one
    does too, and what a layer needs for itself is freed before the next.
    """
    kinds = model.config.layer_types
    period = next(n for n in range(1, len(kinds) + 1) if kinds[:n] * (len(kinds) // n) == kinds)
    blocks = len(kinds) // period
    if blocks <= 2:
        return [program for program, _ in _walk(model, which, period)]
    return [
        replace(
            program,
            bytes=program.bytes + (blocks - 2) * block.bytes,
            matmuls=program.matmuls + (blocks - 2) * block.matmuls,
        )
        for program, block in _walk(_with_layers(model, 2 * period), which, period)
    ]


def _with_layers(model: NeuronQwen35ForCausalLM, layers: int) -> NeuronQwen35ForCausalLM:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    return _with_config(model, config)


def _walk(model: NeuronQwen35ForCausalLM, which: slice, period: int) -> Iterator[tuple[Program, Program]]:
    """Programs, each with the bytes that its last `period` layers leave behind them and the products that they do."""
    for wrapper in model.models:
        instance = wrapper.get_model_instance()
        with _on_a_rank(model.config):
            instance.load_module()
            samples = wrapper.input_generator()  # here, where a mask of 512 rows of 256K tokens takes no memory
            for i in range(len(samples))[which]:
                module, aliases = instance.get(i)
                inputs = samples[i]
                with _Run(module.parameters()) as run:
                    run.add(inputs)
                    hooks = [layer.register_forward_hook(run.mark) for layer in module.layers]
                    outputs = module(*inputs)
                for hook in hooks:
                    hook.remove()
                # What an alias writes over a parameter takes no room of its own.
                peak, after = run.replay(without=[outputs[position] for position in aliases.values()])
                program = Program(wrapper.tag, wrapper.neuron_config.buckets[i], peak, run.matmuls)
                before = after[-1 - period] if len(after) > period else after[-1]
                yield (
                    program,
                    replace(program, bytes=after[-1][0] - before[0], matmuls=after[-1][1] - before[1]),
                )


_PRODUCTS = {
    # The first of their two factors.
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.baddbmm: 1,
    torch.ops.aten.baddbmm_: 1,
}


def tiles_of_product(left: torch.Size, right: torch.Size) -> int:
    """Instructions of the Tensor engine for [..., m, k] x [..., k, n]: either factor may be the one that stays."""
    *batch, m, k = left
    n = right[-1]
    staying, moving = (lambda size: -(-size // 128)), (lambda size: -(-size // MATMUL_TILE.value))
    return math.prod(batch) * staying(k) * min(staying(m) * moving(n), staying(n) * moving(m))


class _Run(TorchDispatchMode):
    """Follows the storages that operations make, from the first tensor on each until the last is gone, and counts the
    tiles of matrix products."""

    def __init__(self, resident: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.matmuls = 0
        self._numbers = {tensor.untyped_storage()._cdata: -1 for tensor in resident}  # by address, while it lives
        self._changes: list[tuple[int, int]] = []  # (number of the storage, bytes more or less)
        self._sizes: list[int] = []
        self._marks: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        first = _PRODUCTS.get(func.overloadpacket)
        if first is not None:
            self.matmuls += tiles_of_product(args[first].shape, args[first + 1].shape)
        leaves = output if isinstance(output, (list, tuple)) else [output]
        self.add(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        return output

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._numbers:
                number = self._numbers[storage._cdata] = len(self._sizes)
                self._sizes.append(storage.nbytes())
                self._changes.append((number, storage.nbytes()))
                weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, address: int) -> None:
        number = self._numbers.pop(address)
        self._changes.append((number, -self._sizes[number]))

    def mark(self, *_: Any) -> None:
        """Remember this moment."""
        self._marks.append((len(self._changes), self.matmuls))

    def replay(self, without: Sequence[torch.Tensor]) -> tuple[int, list[tuple[int, int]]]:
        """Most bytes at once, and bytes and tiles at each mark, leaving out the storages of some tensors."""
        left_out = {self._numbers[tensor.untyped_storage()._cdata] for tensor in without}
        sizes = (0 if number in left_out else change for number, change in self._changes)
        history = list(itertools.accumulate(sizes, initial=0))
        return max(history), [(history[mark], matmuls) for mark, matmuls in self._marks]


# --- Work and vision -------------------------------------------------------------------------------------------------
def work_of(model: NeuronQwen35ForCausalLM, copies: int = 1) -> Work:
    """What a rank computes and moves, with `copies` of DeltaNet's heads over all ranks."""
    with _on_a_rank(model.config):
        module: Any = model._model_cls(model.config)
    config, neuron = model.config, model.neuron_config
    weights = count_weights(module)
    deltanet = weights.deltanet if copies == 1 else count_whole_deltanet(module)
    linear, full = config.linear_attention_layers, config.full_attention_layers
    states = [module.kv_mgr.layer_state(i) for i in range(config.num_hidden_layers)]
    products = sum(
        parameter.numel() * (copies if ".linear_attn." in name else 1)
        for name, parameter in module.layers.named_parameters()
        if parameter.dim() == 2
    )
    return Work(
        token_flops=2 * products + 6 * copies * sum(states[i][0][0].numel() for i in linear),
        pair_flops=4 * sum(module.layers[i].self_attn.gate_proj.weight.shape[0] for i in full),
        head_flops=2 * module.lm_head.weight.numel(),
        weight_bytes=weights.total - weights.embedding - weights.deltanet + deltanet,
        state_bytes=copies * sum(state[0].nbytes for i in linear for state in states[i]),
        token_bytes=sum(state[0, :, 0].nbytes for i in full for state in states[i]),
        flops_per_second=rank_flops(neuron.logical_nc_config, neuron.torch_dtype),
        bytes_per_second=rank_bandwidth(neuron.logical_nc_config),
    )


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
    with _on_a_rank(config):
        return VisionBytes(host, nbytes(Qwen35VisionEncoder(on_device)))
