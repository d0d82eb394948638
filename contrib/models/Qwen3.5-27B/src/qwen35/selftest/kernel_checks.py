# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A kernel alone: one program that launches it as the model does, held against float64.

Shapes are those of a rank of 27B at TP=4, in bfloat16 with float32 states, on `LNC` cores. On a device the program is
compiled and run there, which has not happened yet; elsewhere the emulator runs the kernel.

Letters: B rows, T new tokens, H value heads, Hk key heads, D = 128 their dim; of attention N query heads, E = 256 their
dim, P positions of the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hardware import DEFAULT_LNC
from ..kernel_selection import DeltaNetInverse, DeltaNetKernel
from ..layers import kernel_launch
from ..nki_kernels.library_mlp import library_problem
from ..nxdi import NXDI_AVAILABLE, compile_program
from ..ops import (
    cached_attention,
    causal_attention,
    commit_conv,
    commit_delta_rule,
    recurrent_gated_delta_rule,
)
from .deltanet_cases import HEAD_DIM, NORM_EPS, SEED, KernelCase, KernelName, layer_step, make_inputs
from .outcome import Absent, CheckFailed, Values
from .recorded import recorded

LNC = DEFAULT_LNC.value

BFLOAT16_ERROR = 1e-2
"""Largest error over the largest value: some roundings of 4e-3 of bfloat16; in the emulator 2e-3 to 6e-3 come out."""

FLOAT32_ERROR = 1e-5
"""The same where all is float32: some hundred roundings of 6e-8."""

WARM_UP, TIMED_CALLS = 3, 20

Tensors = tuple[Tensor, ...]
Launch = Callable[..., Any]


@dataclass(frozen=True)
class KernelCheck:
    """A launch, and what it should give.

    Attributes:
        what: the kernel and the shape, for people.
        inputs: makes its tensors, the same each time.
        launch: takes them, and gives a tensor or several.
        expected: of the inputs in float64, what `observed` should be.
        observed: of inputs and outputs in float64, what is compared; the outputs themselves unless it says otherwise.
        tolerance: largest error of each over its largest expected value.
    """

    what: str
    inputs: Callable[[], Tensors]
    launch: Launch
    expected: Callable[..., Tensors]
    observed: Callable[[Tensors, Tensors], Tensors] = lambda inputs, outputs: outputs
    tolerance: float = BFLOAT16_ERROR


class _Program(torch.nn.Module):
    """What is compiled: the launch alone."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self.launch = launch

    def forward(self, *inputs: Tensor) -> Any:
        return self.launch(*inputs)


def run_kernel_check(name: str, workdir: Path) -> Values:
    """Compile and run a kernel of `KERNELS`; what the compiler leaves is in `workdir`.

    Raises:
        Absent: it is of nki-library, which is not here.
        CheckFailed: it is further from float64 than its tolerance.
    """
    check = KERNELS[name]
    if check.launch is _mlp and (problem := library_problem()):
        raise Absent(f"nki-library is not here ({problem})")
    inputs = check.inputs()
    start = time.monotonic()
    program = compile_program(_Program(check.launch), inputs, LNC, str(workdir / "compiler"))
    compile_s = time.monotonic() - start
    outputs = _tuple(program(*inputs))
    error = _require_near(check, inputs, outputs)
    measured = _measure(program, inputs) if NXDI_AVAILABLE else None
    return {
        "error": error,
        "tolerance": check.tolerance,
        "modelled_us": recorded().modelled_us.get(name),
        "measured_us": measured,
        "compile_s": compile_s if NXDI_AVAILABLE else None,
    }


def _require_near(check: KernelCheck, inputs: Tensors, outputs: Tensors) -> float:
    """The largest of the outputs' relative errors, none above the tolerance."""
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    found = check.observed(exact, tuple(x.double() for x in outputs))
    worst = 0.0
    for number, (actual, expected) in enumerate(zip(found, check.expected(*exact), strict=True)):
        if actual.shape != expected.shape:
            raise CheckFailed(f"output {number} has shape {list(actual.shape)}, not {list(expected.shape)}")
        errors = (actual - expected).abs().nan_to_num(nan=torch.inf)
        at = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
        error = float(errors[at] / expected.abs().max())
        if error > check.tolerance:
            raise CheckFailed(
                f"output {number}: error {error:.1e} of the largest value, more than {check.tolerance:.0e}; at "
                f"{list(at)} it is {float(actual[at]):.6g}, in float64 {float(expected[at]):.6g}"
            )
        worst = max(worst, error)
    return worst


def _measure(program: Launch, inputs: Tensors) -> float:
    """Median microseconds of a call, from the host: the launch and the moving of inputs and outputs are in it."""
    times = []
    for _ in range(WARM_UP + TIMED_CALLS):
        start = time.perf_counter()
        program(*inputs)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[WARM_UP:])


def _tuple(outputs: Any) -> Tensors:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# --- DeltaNet --------------------------------------------------------------------------------------------------------
def _state(heads: int) -> Tensor:
    return torch.randn(1, heads, HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(SEED + 1)) / 10


def _prompt_inputs(tokens: int, heads: int, after_state: bool) -> Tensors:
    case = KernelCase(KernelName.FUSED, tokens=tokens, heads=heads, key_heads=heads // 3)
    return (*make_inputs(case), *([_state(heads)] if after_state else []))


def _prompt_launch(kernel: DeltaNetKernel, inverse: DeltaNetInverse, *tensors: Tensor) -> Any:
    q, k, v, g, beta, *state = tensors
    return kernel_launch.prefill(kernel, inverse, LNC, q, k, v, g, beta, state[0] if state else None)


def _prompt(
    kernel: DeltaNetKernel,
    tokens: int,
    inverse: DeltaNetInverse = DeltaNetInverse.TILED,
    after_state: bool = False,
    heads: int = 12,
) -> KernelCheck:
    inverted = "" if kernel is DeltaNetKernel.RECURRENT else f", {inverse.value} inverse"
    after = " after a state" if after_state else ""
    return KernelCheck(
        what=f"delta rule, {kernel.value}{inverted}: {tokens} tokens{after}, {heads} heads",
        inputs=partial(_prompt_inputs, tokens, heads, after_state),
        launch=partial(_prompt_launch, kernel, inverse),
        expected=recurrent_gated_delta_rule,
    )


_STEP = ("qkv", "z", "a", "b", "conv_weight", "conv_state", "A_log", "dt_bias", "norm_weight", "recurrent_state")


def _decode(*tensors: Tensor) -> Any:
    return kernel_launch.decode(LNC, **dict(zip(_STEP, tensors, strict=True)), norm_eps=NORM_EPS)


def _verify(*tensors: Tensor) -> Any:
    return kernel_launch.verify(LNC, **dict(zip(_STEP, tensors, strict=True)), norm_eps=NORM_EPS)


def _commit(*tensors: Tensor) -> Any:
    names = ("keys", "u", "g", "recurrent_state", "qkv", "conv_state", "accepted")
    return kernel_launch.commit(LNC, **dict(zip(names, tensors, strict=True)))


def _decoded(*step: Tensor) -> Tensors:
    """Output, recurrent and conv state of a decoding step."""
    window = torch.cat((step[5], step[0].mT), dim=2)
    return (*layer_step(*step), window[:, :, 1:])


def _verified(inputs: Tensors, outputs: Tensors) -> Tensors:
    """The output, and the state that taking in all verified tokens would give."""
    output, keys, u, g = outputs
    return output, commit_delta_rule(keys, u, g, inputs[-1], torch.full((output.shape[0],), output.shape[1]))


def _committed(keys: Tensor, u: Tensor, g: Tensor, state: Tensor, qkv: Tensor, conv: Tensor, n: Tensor) -> Tensors:
    return commit_delta_rule(keys, u, g, state, n.long()), commit_conv(qkv, conv, n.long())


def _case_inputs(case: KernelCase) -> Tensors:
    return tuple(make_inputs(case))


# --- Attention and MLP -----------------------------------------------------------------------------------------------
def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(SEED)
    return [torch.randn(shape, generator=rng).to(torch.bfloat16) for shape in shapes]


def _prompt_attention_inputs(tokens: int) -> Tensors:
    return tuple(_normal((1, 6, tokens, 256), (1, 1, tokens, 256), (1, 1, tokens, 256)))


def _cached_inputs(tokens: int, positions: int, lengths: list[int], slots: list[int]) -> Tensors:
    """q, k, v of the new tokens, the caches, the cached tokens of each row, and with `slots` where the rows are."""
    B, kept = len(lengths), len(lengths) + 1
    new = _normal(*((B, heads, tokens, 256) for heads in (6, 1, 1)), *2 * [(kept, 1, positions, 256)])
    places = [torch.tensor(slots, dtype=torch.int32)] if slots else []
    return (*new, torch.tensor(lengths, dtype=torch.int32), *places)


def _attend_prompt(*tensors: Tensor) -> Any:
    return kernel_launch.attend_prompt(LNC, *tensors)


def _continue_cached(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor
) -> Any:
    return kernel_launch.continue_cached(LNC, q, k, v, keys, values, lengths, slots, keys.shape[2])


def _attend_cached(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Any:
    return kernel_launch.attend_cached(LNC, q, k, v, keys, values, lengths, keys.shape[2])


def _prompt_attended(*tensors: Tensor) -> Tensors:
    return (causal_attention(*tensors),)


def _cache_attended(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor | None = None
) -> Tensors:
    if slots is not None:
        keys, values = keys[slots.long()], values[slots.long()]
    return (cached_attention(q, k, v, keys, values, lengths),)


def _mlp_inputs() -> Tensors:
    """x [1, 1, D] and the weights of a rank, [D, I] twice and [I, D], such that the result is of order one."""
    x, gate, up, down = _normal((1, 1, 1024), (1024, 1024), (1024, 1024), (1024, 1024))
    return x, gate / 32, up / 32, down / 32


def _mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Any:
    return kernel_launch.mlp(LNC, x, (gate, up, down), None)


def _mlp_of(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensors:
    return ((torch.nn.functional.silu(x @ gate) * (x @ up)) @ down,)


_FUSED, _CHUNKED, _PLAIN = DeltaNetKernel.FUSED, DeltaNetKernel.CHUNKED, DeltaNetInverse.PLAIN

KERNELS = {
    "fused": _prompt(_FUSED, 512),
    "fused-after-state": _prompt(_FUSED, 512, after_state=True),
    "fused-plain": _prompt(_FUSED, 512, _PLAIN),
    "fused-plain-after-state": _prompt(_FUSED, 512, _PLAIN, after_state=True),
    "looped": _prompt(DeltaNetKernel.LOOPED, 1024, after_state=True),
    "chunked": _prompt(_CHUNKED, 256, after_state=True),
    "chunked-plain": _prompt(_CHUNKED, 256, _PLAIN, after_state=True),
    "recurrent": _prompt(DeltaNetKernel.RECURRENT, 32, after_state=True, heads=3),
    "decode": KernelCheck(
        "DeltaNet layer, one token: 1 row, 12 heads",
        partial(_case_inputs, KernelCase(KernelName.DECODE)),
        _decode,
        _decoded,
    ),
    "verify": KernelCheck(
        "DeltaNet layer, 4 tokens verified: 1 row, 12 heads",
        partial(_case_inputs, KernelCase(KernelName.VERIFY, tokens=4)),
        _verify,
        layer_step,
        _verified,
    ),
    "commit": KernelCheck(
        "state after 2 of 4 verified tokens: 2 rows, 12 heads",
        partial(_case_inputs, KernelCase(KernelName.COMMIT, batch=2, tokens=4)),
        _commit,
        _committed,
        tolerance=FLOAT32_ERROR,
    ),
    "attention-prompt": KernelCheck(
        "attention, prompt of 512 tokens: 6 heads", partial(_prompt_attention_inputs, 512), _attend_prompt,
        _prompt_attended,
    ),
    "attention-continuation": KernelCheck(
        "attention, 256 tokens after 700 cached: 6 heads",
        partial(_cached_inputs, 256, 1024, [700], [1]),
        _continue_cached,
        _cache_attended,
    ),
    "attention-decode": KernelCheck(
        "attention, one token after 3 and 1,500 cached: 2 rows, 6 heads",
        partial(_cached_inputs, 1, 2048, [3, 1500], []),
        _attend_cached,
        _cache_attended,
    ),
    "mlp": KernelCheck("nki-library's MLP, one token: 1,024 by 1,024", _mlp_inputs, _mlp, _mlp_of),
}  # fmt: skip
"""Every kernel that a model may launch, by name."""
