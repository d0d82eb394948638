# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the program of each bucket takes: most bytes of activations at once, and instructions for matrix products.

Both are modelled: a bucket's module runs on the meta device, operation by operation as in plain PyTorch. NxDI's own
layers do not run without a process group, so a walk wants the stand-ins, as `nxdi.on_stand_ins` provides them.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..hardware import Figure
from ..nxdi import InferenceConfig, NeuronBaseForCausalLM
from .counting import on_meta_rank

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

Model = TypeVar("Model", bound=NeuronBaseForCausalLM)


@dataclass(frozen=True)
class Program:
    """What one bucket of one submodel takes; each is compiled to a program of its own. Modelled."""

    submodel: str
    bucket: int
    bytes: int
    """Most bytes of activations that live at once."""
    matmuls: int
    """Instructions of the Tensor engine, at least: the tiles of all matrix products outside the NKI kernels."""


def most_activations(programs: Iterable[Program]) -> int:
    """Bytes of the program with the most activations: programs take turns on one scratchpad."""
    return max(program.bytes for program in programs)


def walk_buckets(model: NeuronBaseForCausalLM, which: slice = slice(None)) -> list[Program]:
    """What the buckets `which` of every submodel take; the model need not be loaded.

    Where the layers repeat in like blocks, only two blocks are walked. What the second leaves behind, and the products
    it does, every further block adds as well; what a layer needs for itself is freed before the next. A program that
    drafts goes over the layers more than once: a walk of a third block shows what one adds.
    """
    kinds = model.config.layer_types
    period = next(n for n in range(1, len(kinds) + 1) if kinds[:n] * (len(kinds) // n) == kinds)
    blocks = len(kinds) // period
    if blocks <= 2:
        return [program for program, _ in _walk(model, which, period)]
    found = [*_walk(_with_layers(model, 2 * period), which, period)]
    larger = {
        (p.submodel, p.bucket): p for p, _ in _walk(_with_layers(model, 3 * period), which, period, drafting=True)
    }
    programs = []
    for program, block in found:
        if (third := larger.get((program.submodel, program.bucket))) is not None:
            block = replace(third, bytes=third.bytes - program.bytes, matmuls=third.matmuls - program.matmuls)
        programs.append(
            replace(
                program,
                bytes=program.bytes + (blocks - 2) * block.bytes,
                matmuls=program.matmuls + (blocks - 2) * block.matmuls,
            )
        )
    return programs


def with_config(model: Model, config: InferenceConfig) -> Model:
    """The same application for a changed configuration, whose derived fields are set anew."""
    config.add_derived_config()
    return type(model)(model.model_path, config)


def _with_layers(model: Model, layers: int) -> Model:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    return with_config(model, config)


def _walk(
    model: NeuronBaseForCausalLM, which: slice, period: int, drafting: bool = False
) -> Iterator[tuple[Program, Program]]:
    """Programs, each with the bytes that its last `period` layers leave behind them and the products that they do.

    All, or with `drafting` those that draft.
    """
    for wrapper in model.models:
        if drafting and not wrapper.phase.drafts:
            continue
        instance = wrapper.get_model_instance()
        with on_meta_rank(model.config):
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
                after = after or [(0, 0)]  # a program that drafts alone runs no layer of the decoder
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
    """Follows every storage that operations make, from its first tensor to its last, and counts tiles of products.

    Args:
        resident: tensors whose storages are not counted: parameters, which are there before and after.
    """

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
