# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The decode step of a layer in the emulator, against the formulas of the layer in float64.

Letters: B batch, T tokens of a step, H value heads, Hk key heads of a rank; K = V = 128. All times are modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

import nki_emulator
from qwen35.nki_kernels.decode_layer import deltanet_decode_layer
from qwen35.ops import causal_conv, decay_and_beta, recurrent_gated_delta_rule
from support.kernel_cases import assert_near

D = 128
EPS = 1e-6
HBM_BYTES_PER_NS = 2 * 360  # a logical core of two physical ones; Trainium2 has 2.9 TB/s for eight

# Relative to the largest element. float32 rounds at 6e-8 and some hundred products meet in a sum; bfloat16 operands are
# exact inside the kernel, so that only the output's own rounding, 2^-9 = 2e-3, is left.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
HARD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
STATE_TOLERANCE = 1e-5  # float32 whatever the operands


@dataclass
class Step:
    """Inputs of a decode step, in the order of the kernel."""

    qkv: Tensor
    z: Tensor
    a: Tensor
    b: Tensor
    conv_weight: Tensor
    conv_state: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    state: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, H, Hk."""
        B, T, H = self.a.shape
        return B, T, H, (self.qkv.shape[2] // D - H) // 2


def make(B: int, T: int, H: int, Hk: int, dtype: torch.dtype = torch.float32, zero: bool = False) -> Step:
    channels = (2 * Hk + H) * D
    return Step(
        qkv=torch.randn(B, T, channels).to(dtype),
        z=torch.randn(B, T, H * D).to(dtype),
        a=torch.randn(B, T, H).to(dtype),
        b=torch.randn(B, T, H).to(dtype),
        conv_weight=(torch.randn(channels, 4) / 2).to(dtype),
        conv_state=torch.randn(B, channels, 3).to(dtype),
        A_log=(1 + 15 * torch.rand(H)).log(),
        dt_bias=torch.randn(H),
        norm_weight=1 + torch.randn(D) / 10,
        state=torch.zeros(B, H, D, D) if zero else torch.randn(B, H, D, D) / 10,
    )


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def naive(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, state, conv state and the state after every token, in float64 and token by token."""
    B, T, H, Hk = step.sizes
    qkv, z, a, b, weight, history, A_log, dt_bias, norm, S = (x.double() for x in step.tensors())
    inputs = torch.cat((history, qkv.mT), dim=2)  # [B, Ch, 3 + T]
    outputs, states = [], []
    for t in range(T):
        y = silu((inputs[:, :, t : t + 4] * weight).sum(2)).view(B, -1, D)
        q, k, v = y[:, :Hk], y[:, Hk : 2 * Hk], y[:, 2 * Hk :]
        q = q / torch.sqrt(q.square().sum(-1, keepdim=True) + EPS) / D**0.5
        k = k / torch.sqrt(k.square().sum(-1, keepdim=True) + EPS)
        q, k = q.repeat_interleave(H // Hk, 1), k.repeat_interleave(H // Hk, 1)  # [B, H, K]
        g = -A_log.exp() * torch.log1p(torch.exp(-(a[:, t] + dt_bias).abs())) - A_log.exp() * (a[:, t] + dt_bias).relu()
        S = g.exp()[..., None, None] * S
        u = torch.sigmoid(b[:, t])[..., None] * (v - torch.einsum("bhkv,bhk->bhv", S, k))
        S = S + k[..., None] * u[..., None, :]
        o = torch.einsum("bhkv,bhk->bhv", S, q)
        o = o / torch.sqrt(o.square().mean(-1, keepdim=True) + EPS) * norm
        outputs.append((o * silu(z[:, t].view(B, H, D))).flatten(1))
        states.append(S)
    return torch.stack(outputs, 1), S, inputs[:, :, T:], torch.stack(states, 1)


def run(step: Step, grid: int | None, token_states: bool = False, timed: bool = False) -> nki_emulator.EmulationResult:
    return nki_emulator.emulate(
        deltanet_decode_layer, *step.tensors(), grid=grid, token_states=token_states, timed=timed
    )


def check(step: Step, grid: int | None, token_states: bool = False, tolerance: float | None = None) -> None:
    outputs = run(step, grid, token_states).outputs
    expected = naive(step)
    assert len(outputs) == (4 if token_states else 3)
    assert outputs[0].dtype == step.z.dtype and outputs[1].dtype == torch.float32
    if tolerance is None:
        tolerance = TOLERANCE[step.qkv.dtype]
    assert_near(outputs[0], expected[0], tolerance, "output")
    assert_near(outputs[1], expected[1], STATE_TOLERANCE, "state")
    assert torch.equal(outputs[2].double(), expected[2]), "the conv state is moved, not computed"
    if token_states:
        assert_near(outputs[3], expected[3], STATE_TOLERANCE, "states")


@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize(("H", "Hk"), [(3, 1), (6, 2), (2, 1), (1, 1)], ids=str)
def test_one_token_is_the_formula(B: int, H: int, Hk: int, grid: int | None) -> None:
    check(make(B, 1, H, Hk), grid)


@pytest.mark.parametrize("B", [1, 2, 3])
def test_bfloat16_operands_cost_the_rounding_of_the_output(B: int) -> None:
    check(make(B, 1, 6, 2, torch.bfloat16), 2)


@pytest.mark.parametrize("T", [2, 3, 4, 5, 8])
def test_several_tokens_return_the_state_after_each(T: int) -> None:
    check(make(1, T, 3, 1), 2, token_states=True)


@pytest.mark.parametrize(("B", "H", "Hk", "dtype"), [(2, 3, 1, torch.float32), (3, 6, 2, torch.bfloat16)], ids=str)
def test_several_tokens_of_several_sequences(B: int, H: int, Hk: int, dtype: torch.dtype) -> None:
    check(make(B, 3, H, Hk, dtype), 2, token_states=True)


def test_tokens_that_do_not_fit_together_are_taken_in_turn() -> None:
    check(make(2, 3, 12, 4), None, token_states=True)  # 24 heads on the core, so 2 tokens of 3 are prepared together


def test_several_tokens_are_as_many_steps_of_one() -> None:
    step = make(2, 4, 3, 1)
    together = run(step, 2).outputs
    state, conv_state = step.state, step.conv_state
    for t in range(4):
        one = replace(step, **{x: getattr(step, x)[:, t : t + 1].contiguous() for x in ("qkv", "z", "a", "b")})
        output, state, conv_state = run(replace(one, state=state, conv_state=conv_state), 2).outputs
        assert_near(output[:, 0], together[0][:, t].double(), 1e-6, f"output of token {t}")
    assert_near(state, together[1].double(), 1e-6, "state")
    assert torch.equal(conv_state, together[2])


@pytest.mark.parametrize("T", [1, 4])
def test_a_sequence_starts_from_zero(T: int) -> None:
    step = make(1, T, 6, 2, zero=True)
    check(replace(step, conv_state=torch.zeros_like(step.conv_state)), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("a", [-30.0, 0.0, 5.0, 60.0, 1e4])
def test_no_decay_is_too_strong(a: float, dtype: torch.dtype) -> None:
    """g from -1e-13 over -80 to -1.6e5 per token; exp(g) is then 0, which is a state like any other."""
    step = make(1, 3, 3, 1, dtype)
    a_rows = torch.full_like(step.a, a)
    a_rows[:, 1, 1] = 0  # not all heads and tokens alike
    step = replace(
        step, a=a_rows, A_log=torch.full_like(step.A_log, 16.0).log(), dt_bias=torch.zeros_like(step.dt_bias)
    )
    check(step, 2, token_states=True, tolerance=HARD_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_keys_written_at_full_strength_do_not_build_up_error(dtype: torch.dtype) -> None:
    """Every token erases what the one before wrote: beta = 1 to 2e-9, no decay, k and q the same for 8 tokens."""
    step = make(1, 8, 3, 1, dtype)
    same = torch.randn(1, 1, 2 * D).to(dtype)
    qkv, history = step.qkv.clone(), step.conv_state.clone()
    qkv[:, :, : 2 * D], history[:, : 2 * D] = same, same.mT
    step = replace(step, qkv=qkv, conv_state=history, b=torch.full_like(step.b, 20.0), a=torch.full_like(step.a, -30.0))
    check(step, 2, token_states=True, tolerance=HARD_TOLERANCE[dtype])


def test_a_padded_row_of_zeros_stays_finite() -> None:
    step = make(2, 1, 3, 1)
    for x in (step.qkv, step.conv_state, step.z):
        x[1] = 0
    check(step, 2)


def test_the_kernel_agrees_with_the_operators_that_the_layer_calls() -> None:
    step = make(2, 1, 6, 2)
    mixed, conv_state = causal_conv(step.qkv, step.conv_weight, step.conv_state)
    q, k, v = mixed.split((2 * D, 2 * D, 6 * D), dim=-1)
    g, beta = decay_and_beta(step.a, step.b, step.A_log, step.dt_bias)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    o, state = recurrent_gated_delta_rule(q, k, v, g, beta, step.state)
    normed = torch.nn.functional.rms_norm(o, (D,), step.norm_weight, EPS) * silu(step.z.unflatten(-1, (-1, D)))
    outputs = run(step, 2).outputs
    assert_near(outputs[0], normed.flatten(2).double(), 1e-5, "output")  # float32 on both sides
    assert_near(outputs[1], state.double(), 1e-5, "state")
    assert torch.equal(outputs[2], conv_state)


def test_inputs_are_left_alone() -> None:
    step = make(1, 2, 3, 1)
    before = [x.clone() for x in step.tensors()]
    run(step, 2, token_states=True)
    assert all(torch.equal(x, y) for x, y in zip(step.tensors(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize(
    ("B", "T", "H", "Hk", "dtype"),
    [
        (1, 8, 12, 4, torch.bfloat16),
        (4, 8, 12, 4, torch.float32),
        (5, 3, 12, 4, torch.float32),  # split by key heads, in several boxes
        (16, 1, 12, 4, torch.bfloat16),  # two boxes per core
        (8, 8, 3, 1, torch.float32),
        (1, 2, 48, 16, torch.float32),
    ],
    ids=str,
)
def test_large_steps_are_the_formula(B: int, T: int, H: int, Hk: int, dtype: torch.dtype, grid: int | None) -> None:
    check(make(B, T, H, Hk, dtype), grid, token_states=True)


# --- What the machine allows -----------------------------------------------------------------------------------------
def test_the_kernel_is_written_in_the_nki_language() -> None:
    assert nki_emulator.lint_kernel(deltanet_decode_layer) == []


@pytest.mark.parametrize(("H", "Hk"), [(12, 4), (3, 1)], ids=["TP=4", "TP=16"])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 8), (8, 1), (8, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_27b_shapes_fit_on_chip(B: int, T: int, H: int, Hk: int, dtype: torch.dtype) -> None:
    """Emulation raises when SBUF or PSUM overflows; half of SBUF is left to whatever the compiler keeps there."""
    cores = run(make(B, T, H, Hk, dtype), 2).report.cores
    assert max(core.peak_sbuf_bytes for core in cores) <= 96 * 1024
    assert max(core.peak_psum_banks for core in cores) <= 8


# --- Modelled time ---------------------------------------------------------------------------------------------------
def hbm_bound_ns(step: Step, outputs: tuple[Tensor, ...]) -> float:
    """Time to read every input once and to write every output once."""
    return sum(x.numel() * x.element_size() for x in (*step.tensors(), *outputs)) / HBM_BYTES_PER_NS


def show(B: int, T: int, H: int, Hk: int, grid: int = 2) -> float:
    """Print modelled time, bound and use of engines of a bfloat16 step; returns time over bound."""
    step = make(B, T, H, Hk, torch.bfloat16)
    result = run(step, grid, timed=True)
    bound, time = hbm_bound_ns(step, result.outputs), result.report.makespan_ns
    used = {name: f"{use.utilisation:.0%}" for name, use in result.report.cores[0].engines.items() if use.busy_ns}
    print(
        f"B={B} T={T} H={H} Hk={Hk}: {time / 1000:.2f} us, HBM bound {bound / 1000:.2f} us, {time / bound:.2f}x, {used}"
    )
    return time / bound


@pytest.mark.parametrize(("B", "limit"), [(1, 4.3), (8, 2.0)])
def test_a_step_takes_little_longer_than_its_memory_traffic(B: int, limit: float) -> None:
    """Modelled, TP=4. At B=1 two dependent DMA latencies, 1.6 us each, are already 1.4 times the traffic.

    In so short a kernel the Tensor engine stays at half speed, and a dependent activation costs 264 cycles.
    """
    assert show(B, 1, 12, 4) <= limit


def test_the_state_is_read_once_and_written_once() -> None:
    step = make(2, 4, 3, 1, torch.bfloat16)
    cores = run(step, 2, timed=True).report.cores
    state = step.state.numel() * 4
    small = sum(x.numel() * x.element_size() for x in step.tensors()[:-1])
    assert state <= sum(core.hbm_bytes_read for core in cores) <= state + 2 * small
    assert state <= sum(core.hbm_bytes_written for core in cores) <= state + small
