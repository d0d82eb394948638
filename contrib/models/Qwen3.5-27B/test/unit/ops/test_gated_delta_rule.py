# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in plain PyTorch, against the formula written out token by token in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qwen35.ops import (
    chunk_gated_delta_rule,
    commit_delta_rule,
    decay_and_beta,
    l2norm,
    recurrent_gated_delta_rule,
    verify_delta_rule,
)
from support.compare import assert_close

Rule = Callable[..., tuple[Tensor, Tensor]]
FORMS = pytest.mark.parametrize("rule", [chunk_gated_delta_rule, recurrent_gated_delta_rule])

# Error relative to the largest element. float32 rounds at 6e-8; a few hundred tokens and sums over 128 dimensions bring
# that to 5e-7 with random keys and 4e-6 with equal ones, where the chunk's triangular system is worst conditioned.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads cost more than they save on tensors this small, a hundred times more when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence for one batch row, one value head and one token at a time, in float64."""
    (B, S, Hk, K), (H, V) = q.shape, v.shape[2:]
    keys, queries, values, decay, write = (x.double().numpy() for x in (k, q, v, g, beta))
    state = np.zeros((B, H, K, V)) if initial_state is None else initial_state.double().numpy().copy()
    o = np.zeros((B, S, H, V))
    for b, h, t in np.ndindex(B, H, S):
        k_t, q_t = keys[b, t, h // (H // Hk)], queries[b, t, h // (H // Hk)]
        k_t = k_t / np.sqrt(k_t @ k_t + 1e-6)
        q_t = q_t / np.sqrt(q_t @ q_t + 1e-6) / np.sqrt(K)
        s = state[b, h] * np.exp(decay[b, t, h])
        u = (values[b, t, h] - s.T @ k_t) * write[b, t, h]
        state[b, h] = s + np.outer(k_t, u)
        o[b, t, h] = state[b, h].T @ q_t
    return torch.from_numpy(o), torch.from_numpy(state)


def inputs(B: int, S: int, Hk: int, R: int, K: int, V: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, g, beta: normal, with the mild gates of most heads of the model: g in (-0.5, 0), beta in (0, 1)."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, S, *heads, generator=rng) for heads in ((Hk, K), (Hk, K), (Hk * R, V)))
    g, beta = (torch.rand(B, S, Hk * R, generator=rng) for _ in range(2))
    return [q, k, v, -0.5 * g, beta]


def check(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = TOLERANCE, label: str = ""
) -> None:
    for name, a, e in zip(("o", "state"), actual, expected, strict=True):
        # The floor is for single tokens whose q and k are nearly orthogonal: all that is left of o is rounding.
        assert_close(a, e, atol=tolerance * max(e.abs().max().item(), 1e-2), label=f"{label} {name}")


@settings(max_examples=40)
@given(
    B=st.integers(1, 3),
    S=st.integers(1, 200),
    Hk=st.integers(1, 3),
    R=st.integers(1, 3),
    K=st.integers(2, 40),
    V=st.integers(1, 40),
    with_state=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_both_forms_compute_the_recurrence(
    B: int, S: int, Hk: int, R: int, K: int, V: int, with_state: bool, seed: int
) -> None:
    x = inputs(B, S, Hk, R, K, V, seed)
    state = torch.randn(B, Hk * R, K, V, generator=torch.Generator().manual_seed(seed)) if with_state else None
    expected = naive(*x, state)
    check(chunk_gated_delta_rule(*x, state), expected, label="chunk")
    check(recurrent_gated_delta_rule(*x, state), expected, label="recurrent")


@FORMS
@pytest.mark.parametrize("S", [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 257, 300])
def test_lengths_around_chunk_and_segment_borders_are_right(rule: Rule, S: int) -> None:
    x = inputs(1, S, 2, 2, 16, 8)
    state = torch.randn(1, 4, 16, 8)
    check(rule(*x, state), naive(*x, state))


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 8, 16, 64, 128, 512])
def test_every_chunk_size_gives_the_same_answer(chunk_size: int) -> None:
    x = inputs(1, 270, 1, 3, 16, 8)
    check(chunk_gated_delta_rule(*x, chunk_size=chunk_size), naive(*x))


@FORMS
def test_the_heads_of_the_27b_model_share_keys_in_groups_of_three(rule: Rule) -> None:
    x = inputs(1, 70, 16, 3, 128, 128)
    check(rule(*x), naive(*x))


def strong_gates(S: int) -> dict[str, Tensor]:
    """Log-decays [1, S, 4] that overflow exp(-cumsum(g)) or lose the small among the large."""
    rng = torch.Generator().manual_seed(1)
    uniform = torch.rand(1, S, 4, generator=rng)
    a = 14 * torch.rand(1, S, 4, generator=rng) - 2
    gates = {"A_16_and_large_dt": decay_and_beta(a, a, torch.full((4,), 16.0).log(), torch.ones(4))[0]}
    assert gates["A_16_and_large_dt"].min() < -80
    gates["all_zero"] = torch.zeros(1, S, 4)
    gates["down_to_20"] = -20 * uniform
    for large in (30.0, 100.0, 1000.0):
        gates[f"{large:g}_among_small"] = torch.where(uniform < 0.3, -large, -0.01)
        gates[f"{large:g}_among_zero"] = torch.where(uniform < 0.3, -large, 0.0)
    return gates


@pytest.mark.parametrize("chunk_size", [32, 64, 128])
@pytest.mark.parametrize("gates", list(strong_gates(8)))
def test_strong_decay_neither_overflows_nor_drowns_weak_decay(gates: str, chunk_size: int) -> None:
    q, k, v, _, beta = inputs(1, 256, 2, 2, 32, 16)
    x = (q, k, v, strong_gates(256)[gates], beta)
    # No extra tolerance: sums of g between two tokens are formed without cancellation.
    check(chunk_gated_delta_rule(*x, chunk_size=chunk_size), naive(*x), label="chunk")
    check(recurrent_gated_delta_rule(*x), naive(*x), label="recurrent")


@pytest.mark.parametrize("chunk_size", [32, 64, 128])
@pytest.mark.parametrize("keys", ["identical", "correlated", "alternating"])
def test_repeated_keys_with_full_writes_stay_accurate(keys: str, chunk_size: int) -> None:
    q, k, v, g, beta = inputs(1, 256, 2, 2, 64, 32)
    common = torch.randn(1, 1, 2, 64)
    sign = 1 - 2 * (torch.arange(256) % 2).view(1, 256, 1, 1)
    k = {"identical": common.expand_as(k), "correlated": 0.9 * common + 0.1 * k, "alternating": sign * common}[keys]
    x = (q, k, v, 2e-3 * g, 1 - 0.01 * beta)
    check(chunk_gated_delta_rule(*x, chunk_size=chunk_size), naive(*x), label="chunk")
    check(recurrent_gated_delta_rule(*x), naive(*x), label="recurrent")


@FORMS
def test_padded_tokens_change_neither_state_nor_real_outputs(rule: Rule) -> None:
    lengths = [300, 1, 64, 90]
    q, k, v, g, beta = inputs(4, 300, 2, 2, 16, 8)
    state = torch.randn(4, 4, 16, 8)
    real = torch.arange(300)[None, :, None] < torch.tensor(lengths)[:, None, None]
    o, final = rule(q, k, v, g * real, beta * real, state)  # q, k and v of padded tokens hold anything
    for b, n in enumerate(lengths):
        row = [x[b : b + 1, :n] for x in (q, k, v, g, beta)]
        # The same sums, which a library may order by the size of its batch.
        check((o[b : b + 1, :n], final[b : b + 1]), rule(*row, state[b : b + 1]), tolerance=1e-6, label=f"row {b}")


@FORMS
def test_a_row_of_padding_alone_keeps_its_state_to_the_bit(rule: Rule) -> None:
    q, k, v, g, beta = inputs(2, 40, 2, 2, 16, 8)
    state = torch.randn(2, 4, 16, 8)
    assert_close(rule(q, k, v, 0 * g, 0 * beta, state)[1], state)


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (31, 64), (100,), (256,), (257, 258)])
def test_pieces_with_carried_state_equal_one_piece(cuts: tuple[int, ...]) -> None:
    x = inputs(2, 300, 2, 2, 16, 8)
    state: Tensor | None = None
    outputs = []
    for start, stop in zip((0, *cuts), (*cuts, 300), strict=True):
        rule = recurrent_gated_delta_rule if stop - start < 4 else chunk_gated_delta_rule  # as prefill and decode do
        o, state = rule(*(part[:, start:stop] for part in x), state)
        outputs.append(o)
    assert state is not None
    check((torch.cat(outputs, dim=1), state), naive(*x))


@FORMS
def test_inputs_are_left_as_they_were_and_the_state_is_a_new_tensor(rule: Rule) -> None:
    x = [*inputs(1, 40, 2, 1, 16, 8), torch.randn(1, 2, 16, 8)]
    before = [t.clone() for t in x]
    rule(*x)[1].fill_(7.0)
    for now, then in zip(x, before, strict=True):
        assert_close(now, then)


@FORMS
def test_views_of_a_fused_projection_and_a_strided_state_are_accepted(rule: Rule) -> None:
    fused = torch.randn(2, 50, 2 * 32 + 48)
    q, k, v = (x.unflatten(-1, (-1, n)) for x, n in zip(fused.split((32, 32, 48), dim=-1), (16, 16, 12), strict=True))
    _, _, _, g, beta = inputs(2, 50, 2, 2, 16, 12)
    state = torch.randn(2, 16, 4, 12).transpose(1, 2)
    check(rule(q, k, v, g, beta, state), naive(q, k, v, g, beta, state))


@FORMS
def test_bfloat16_inputs_are_computed_in_float32(rule: Rule) -> None:
    q, k, v, g, beta = inputs(1, 70, 2, 2, 16, 8)
    narrow = [x.bfloat16() for x in (q, k, v)]
    o, state = rule(*narrow, g, beta)
    wide_o, wide_state = rule(*(x.float() for x in narrow), g, beta)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(o, wide_o.bfloat16())
    assert_close(state, wide_state)


@FORMS
def test_float64_inputs_stay_in_float64(rule: Rule) -> None:
    x = [t.double() for t in inputs(1, 70, 2, 2, 16, 8)]
    o, state = rule(*x)
    assert o.dtype == state.dtype == torch.float64
    check((o, state), naive(*x), tolerance=1e-14)  # float64 rounds at 1e-16


@FORMS
@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_outputs_are_those_of_transformers(rule: Rule, name: str) -> None:
    theirs = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    x = inputs(2, 100, 2, 3, 128, 128)
    state = torch.randn(2, 6, 128, 128)
    expected = getattr(theirs, name)(*x, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    check(rule(*x, state), expected)


@FORMS
def test_the_traced_graph_holds_no_operator_that_the_neuron_compiler_refuses(rule: Rule) -> None:
    x = [*inputs(2, 80, 2, 2, 16, 8), torch.randn(2, 4, 16, 8)]
    graph = make_fx(torch.func.functionalize(lambda *args: rule(*args)))(*x)
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    refused = ("scatter", "index_put", "triangular", "scalar_dense", "nonzero", "masked_select")
    assert not [n for n in names if any(r in n for r in refused)], names
    check(graph(*x), rule(*x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_are_right_in_the_linear_regime_of_softplus_and_never_positive(dtype: torch.dtype) -> None:
    a = torch.tensor([-100.0, -20.0, -1.0, 0.0, 1.0, 5.0, 19.0, 21.0, 50.0, 1000.0]).to(dtype).view(1, -1, 1)
    A_log, dt_bias = torch.tensor([0.01, 1.0, 16.0]).log(), torch.tensor([-3.0, 0.0, 1.0])
    g, beta = decay_and_beta(a.expand(1, -1, 3), a.expand(1, -1, 3), A_log, dt_bias)
    assert g.dtype == beta.dtype == torch.float32
    assert (g <= 0).all() and g.min() < -15000
    softplus = np.logaddexp(0.0, (a.float() + dt_bias).double().numpy())
    assert_close(g, torch.from_numpy(-np.exp(A_log.double().numpy()) * softplus), rtol=1e-6, atol=1e-30)
    assert_close(beta, a.double().sigmoid().expand(1, -1, 3), rtol=1e-6, atol=1e-30)


def test_l2norm_adds_epsilon_to_the_sum_of_squares() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    expected = (
        torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]]) / torch.tensor([25.000001, 1e-6, 2e-6]).sqrt()[:, None]
    )
    assert_close(l2norm(x), expected, rtol=1e-6)
    assert l2norm(x.bfloat16()).dtype == torch.float32


def test_arguments_that_do_not_fit_are_named() -> None:
    q, k, v, g, beta = inputs(1, 4, 2, 2, 16, 8)
    with pytest.raises(ValueError, match="chunk_size=48 is not a power of two"):
        chunk_gated_delta_rule(q, k, v, g, beta, chunk_size=48)
    with pytest.raises(ValueError, match="3 value heads are not a multiple of 2 key heads"):
        recurrent_gated_delta_rule(q, k, v[:, :, :3], g, beta)
    with pytest.raises(ValueError, match=r"g has shape \[1, 4, 2\], expected \[1, 4, 4\]"):
        chunk_gated_delta_rule(q, k, v, g[:, :, :2], beta)
    with pytest.raises(ValueError, match=r"initial_state has shape \[1, 2, 16, 8\], expected \[1, 4, 16, 8\]"):
        chunk_gated_delta_rule(q, k, v, g, beta, torch.zeros(1, 2, 16, 8))


# --- Tokens of which a prefix is kept --------------------------------------------------------------------------------
@settings(max_examples=40)
@given(
    T=st.integers(1, 8),
    Hk=st.integers(1, 3),
    R=st.integers(1, 3),
    K=st.integers(2, 40),
    V=st.integers(1, 40),
    accepted=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    integers=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**16),
)
def test_a_commit_gives_the_state_after_any_number_of_the_verified_tokens(
    T: int, Hk: int, R: int, K: int, V: int, accepted: list[int], integers: torch.dtype, seed: int
) -> None:
    counts = [min(n, T) for n in accepted]
    q, k, v, g, beta = inputs(len(counts), T, Hk, R, K, V, seed)
    state = torch.randn(len(counts), Hk * R, K, V, generator=torch.Generator().manual_seed(seed))
    o, keys, u = verify_delta_rule(q, k, v, g, beta, state)
    committed = commit_delta_rule(keys, u, g, state, torch.tensor(counts, dtype=integers))
    expected_o, _ = naive(q, k, v, g, beta, state)
    for b, n in enumerate(counts):
        row = [x[b : b + 1] for x in (q, k, v, g, beta)]
        expected = naive(*(x[:, :n] for x in row), state[b : b + 1])[1] if n else state[b : b + 1].double()
        check((o[b], committed[b]), (expected_o[b], expected[0]), label=f"row {b}, {n} tokens")


@pytest.mark.parametrize("gates", list(strong_gates(8)))
def test_a_commit_keeps_the_accuracy_under_strong_decay(gates: str) -> None:
    q, k, v, _, beta = inputs(1, 8, 2, 2, 32, 16)
    x, state = (q, k, v, strong_gates(8)[gates], beta), torch.randn(1, 4, 32, 16)
    o, keys, u = verify_delta_rule(*x, state)
    for n in range(1, 9):
        expected_o, expected = naive(*(part[:, :n] for part in x), state)
        check((o[:, :n], commit_delta_rule(keys, u, x[3], state, torch.tensor([n]))), (expected_o, expected))


def test_a_commit_keeps_the_accuracy_when_each_token_erases_the_one_before() -> None:
    q, k, v, g, beta = inputs(1, 8, 2, 2, 64, 32)
    x, state = (q, k[:, :1].expand_as(k), v, 2e-3 * g, 1 - 0.01 * beta), torch.randn(1, 4, 64, 32)
    o, keys, u = verify_delta_rule(*x, state)
    for n in range(1, 9):
        expected_o, expected = naive(*(part[:, :n] for part in x), state)
        check((o[:, :n], commit_delta_rule(keys, u, x[3], state, torch.tensor([n]))), (expected_o, expected))


def test_a_row_with_nothing_accepted_keeps_its_state_to_the_bit() -> None:
    x, state = inputs(2, 4, 2, 2, 16, 8), torch.randn(2, 4, 16, 8)
    _, keys, u = verify_delta_rule(*x, state)
    assert_close(commit_delta_rule(keys, u, x[3], state, torch.tensor([0, 4]))[0], state[0])


def test_what_was_rejected_never_reaches_the_state_not_even_nan() -> None:
    x, state = inputs(1, 4, 2, 2, 16, 8), torch.randn(1, 4, 16, 8)
    _, keys, u = verify_delta_rule(*x, state)
    clean = commit_delta_rule(keys, u, x[3], state, torch.tensor([2]))
    for rejected in (keys, u, x[3]):
        rejected[:, 2:] = torch.nan
    assert_close(commit_delta_rule(keys, u, x[3], state, torch.tensor([2])), clean)


def test_verification_reads_the_state_and_writes_nothing() -> None:
    x = [*inputs(2, 3, 2, 2, 16, 8), torch.randn(2, 4, 16, 8)]
    before = [t.clone() for t in x]
    _, keys, u = verify_delta_rule(*x)
    commit_delta_rule(keys, u, x[3], x[5], torch.tensor([1, 3])).fill_(7.0)
    for now, then in zip(x, before, strict=True):
        assert_close(now, then)


def test_verification_keeps_bfloat16_out_of_what_is_committed() -> None:
    q, k, v, g, beta = inputs(1, 4, 2, 2, 16, 8)
    narrow = [x.bfloat16() for x in (q, k, v)]
    state = torch.randn(1, 4, 16, 8)
    o, keys, u = verify_delta_rule(*narrow, g, beta, state)
    assert (o.dtype, keys.dtype, u.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = naive(*(x.float() for x in narrow), g, beta, state)[1]
    committed = commit_delta_rule(keys, u, g, state, torch.tensor([4]))
    assert_close(committed, exact, atol=TOLERANCE * exact.abs().max().item())


def test_the_traced_commit_follows_counts_that_it_was_not_traced_with() -> None:
    def step(*args: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta, state, accepted = args
        o, keys, u = verify_delta_rule(q, k, v, g, beta, state)
        return o, commit_delta_rule(keys, u, g, state, accepted)

    x = [*inputs(2, 4, 2, 2, 16, 8), torch.randn(2, 4, 16, 8)]
    graph = make_fx(torch.func.functionalize(step))(*x, torch.tensor([1, 4]))
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    refused = ("scatter", "index_put", "triangular", "scalar_dense", "nonzero", "masked_select")
    assert not [n for n in names if any(r in n for r in refused)], names
    check(graph(*x, torch.tensor([3, 0])), step(*x, torch.tensor([3, 0])))


def test_a_commit_names_arguments_that_do_not_fit() -> None:
    x, state = inputs(2, 4, 2, 2, 16, 8), torch.randn(2, 4, 16, 8)
    _, keys, u = verify_delta_rule(*x, state)
    with pytest.raises(ValueError, match=r"accepted has shape \[2, 1\], expected \[2\]"):
        commit_delta_rule(keys, u, x[3], state, torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"initial_state has shape \[2, 4, 8, 16\], expected \[2, 4, 16, 8\]"):
        commit_delta_rule(keys, u, x[3], state.mT, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"u has shape \[2, 3, 4, 8\], expected \[2, 4, 4, 8\]"):
        commit_delta_rule(keys, u[:, :3], x[3], state, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"g has shape \[2, 4, 3\], expected \[2, 4, 4\]"):
        commit_delta_rule(keys, u, x[3][..., :3], state, torch.ones(2, dtype=torch.int64))
