# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in plain PyTorch: what the NKI kernels are tested against, and the CPU path of the model.

Every value head carries a state S: [K, V], the transpose of the paper's, through (arXiv 2412.06464, equation 10)

    S <- exp(g) S                  forget
    u  = beta (v - S^T k)          what the state gets wrong about v at key k
    S <- S + k u^T                 correct it
    o  = S^T q                     read

for each token. `recurrent_gated_delta_rule` is these four lines; `chunk_gated_delta_rule` takes a chunk of tokens at
once, with matrix products. Speculative decoding computes the outputs of several tokens before it knows how many of them
stay: `verify_delta_rule`, then `commit_delta_rule`.

Letters: B batch, S tokens, H value heads, Hk key heads (H = Hk R; value head h reads key head h // R), K key dim,
V value dim, C tokens per chunk, n chunks.

Both compute in float32 whatever the dtype of q, k and v, or in float64 when all is float64. They are written for
inference: states are updated in place on private copies, so a backward pass through them raises. Shapes and control
flow are static, and there is no scatter and no triangular solver, so that the Neuron compiler can trace them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 32
"""Default C, measured on 2 AVX-512 cores with 8 to 48 heads: 64 takes 1.1 to 1.2 times as long, 128 1.5 to 1.7 times.
16 gains a tenth at 48 heads, loses nearly as much at 8, and doubles the steps that a compiler unrolls."""

SEGMENT = 256
"""Tokens whose chunks are prepared together: enough to amortise calls over few heads, yet the [C, C] matrices of 48
heads (1.6 MB each at C = 32) stay in cache until the scan reads them."""

LARGEST_DOUBLED_BLOCK = 8
"""Powers of a strictly lower triangular block cancel in the sum that inverts it: with identical keys the result is good
to 2e-6 for blocks of 8, 6e-4 for 16, and overflows at 128. Larger blocks are merged from halves instead."""


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, in float32 or wider; not x / max(|x|, eps)."""
    x = _cast(x, _wide(x.dtype))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def decay_and_beta(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log-decay g = -exp(A_log) softplus(a + dt_bias) <= 0 and write strength beta = sigmoid(b), in float32.

    Args:
        a, b: [B, S, H], the two gate projections of the layer.
        A_log, dt_bias: [H]. A = exp(A_log) reaches 16, so g per token reaches -80 and below.

    Returns:
        g, beta: [B, S, H] float32.
    """
    return -A_log.float().exp() * F.softplus(a.float() + dt_bias.float()), b.float().sigmoid()


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule, token by token (arXiv 2412.06464, equation 10). The form for decode.

    Args:
        q, k: [B, S, Hk, K], raw: the l2-norm of both and the K^-0.5 scale of q are applied here.
        v: [B, S, H, V].
        g: [B, S, H] float32, log-decay <= 0; 0 at padded tokens.
        beta: [B, S, H] float32, in [0, 1]; 0 at padded tokens, which then leave the state as it is.
        initial_state: [B, H, K, V] float32, or None for zeros. Not modified.

    Returns:
        o: [B, S, H, V] in v.dtype.
        final_state: [B, H, K, V] float32.
    """
    B, S, Hk, R, K, V = _sizes(q, k, v, g, beta, initial_state)
    dtype = _wide(v.dtype)
    state = _initial(initial_state, (B, Hk, R, K, V), dtype, v.device)
    # Per token a row vector for each key head, [B, Hk, 1, 1, K], which broadcasts over its R value heads.
    qk = l2norm(torch.stack((q, k), dim=1)).view(B, 2, S, Hk, 1, 1, K)
    queries, keys = (qk[:, 0] * K**-0.5).unbind(1), qk[:, 1].unbind(1)
    values = _cast(v, dtype).reshape(B, S, Hk, R, 1, V).unbind(1)
    decays = _cast(g, dtype).exp().reshape(B, S, Hk, R, 1, 1).unbind(1)
    betas = _cast(beta, dtype).reshape(B, S, Hk, R, 1, 1).unbind(1)

    outputs = []
    for q_t, k_t, v_t, decay_t, beta_t in zip(queries, keys, values, decays, betas, strict=True):
        state = state * decay_t
        u = beta_t * (v_t - k_t @ state)
        state.addcmul_(k_t.mT, u)  # in place on the product above, never on the caller's state
        outputs.append(q_t @ state)
    o = torch.stack(outputs, dim=1).view(B, S, Hk * R, V)
    return _cast(o, v.dtype), state.view(B, Hk * R, K, V)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule in chunks of tokens (arXiv 2406.06484 section 3, with the gates of arXiv 2412.06464).

    Same contract as `recurrent_gated_delta_rule`, and any S >= 1; chunk_size is a power of two. With rows for tokens,
    D_ij = exp(g_{j+1} + ... + g_i) for i >= j the decay from token j to token i, d_i = exp(g_1 + ... + g_i) the decay
    from the chunk's start, and S the state there:

        A  = -diag(beta) (K K^T * D), strictly lower
        U  = (I - A)^-1 diag(beta) (V - diag(d) K S)
        O  = diag(d) Q S + (Q K^T * D) U
        S <- d_C S + (diag(D_C) K)^T U
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size} is not a power of two")
    B, S, Hk, R, K, V = _sizes(q, k, v, g, beta, initial_state)
    dtype = _wide(v.dtype)
    state = _initial(initial_state, (B, Hk, R, K, V), dtype, v.device).clone(memory_format=torch.contiguous_format)

    outputs: list[Tensor] = []
    for start in range(0, S, max(SEGMENT, chunk_size)):
        tokens = slice(start, start + max(SEGMENT, chunk_size))
        qs, ks, vs, gs, betas = (_cast(_whole_chunks(x[:, tokens], chunk_size), dtype) for x in (q, k, v, g, beta))
        outputs += _segment(qs, ks, vs, gs, betas, state, chunk_size, v.dtype)
    return torch.cat(outputs, dim=1)[:, :S].flatten(2, 3), state.view(B, Hk * R, K, V)


def verify_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of T tokens of which a prefix will be kept, without writing the state; `commit_delta_rule` moves it on.

    The chunk form of `chunk_gated_delta_rule`, with all T tokens in one chunk, so that the state is read once.

    Args:
        q, k: [B, T, Hk, K], raw as in `recurrent_gated_delta_rule`.
        v: [B, T, H, V].
        g, beta: [B, T, H] float32, as there.
        initial_state: [B, H, K, V] float32.

    Returns:
        o: [B, T, H, V] in v.dtype; o_t depends on tokens 1 to t alone.
        keys: [B, T, Hk, K] float32, and
        u: [B, T, H, V] float32: token t adds keys_t u_t^T to the state, once it has decayed.
    """
    B, T, Hk, R, K, V = _sizes(q, k, v, g, beta, initial_state)
    dtype, C = _wide(v.dtype), 1 << (T - 1).bit_length()
    q, k, values, g, beta = (_cast(_whole_chunks(x, C), dtype) for x in (q, k, v, g, beta))
    chunk = _prepare(q, k, values, g, beta, C)
    u, o = _solve(chunk, 0, _initial(initial_state, (B, Hk, R, K, V), dtype, v.device))
    o, u = (x.movedim(-2, 1)[:, :T].flatten(2, 3) for x in (o, u))
    return _cast(o, v.dtype), chunk.kq[0, :, :, 0, :T].transpose(1, 2), u


def commit_delta_rule(keys: Tensor, u: Tensor, g: Tensor, initial_state: Tensor, accepted: Tensor) -> Tensor:
    """The state after the first accepted[b] of the T tokens of row b that `verify_delta_rule` went through:

        S <- exp(g_1 + ... + g_n) S + sum over t <= n of exp(g_{t+1} + ... + g_n) keys_t u_t^T,  n = accepted[b]

    Args:
        keys: [B, T, Hk, K] and
        u: [B, T, H, V], float32, from `verify_delta_rule`.
        g: [B, T, H] float32, what it was given.
        initial_state: [B, H, K, V] float32, likewise; not modified.
        accepted: [B] integers, 0 to T; 0 leaves a row's state as it is. What is not accepted may hold anything.

    Returns:
        state: [B, H, K, V] float32.
    """
    B, T, Hk, K = keys.shape
    H, V = u.shape[2:]
    for name, x, shape in (
        ("u", u, (B, T, H, V)),
        ("g", g, (B, T, H)),
        ("initial_state", initial_state, (B, H, K, V)),
        ("accepted", accepted, (B,)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)} from keys {list(keys.shape)}")
    real = (torch.arange(T, device=g.device) < accepted.unsqueeze(1)).unsqueeze(-1)  # [B, T, 1]
    g = torch.where(real, _cast(g, u.dtype), 0.0)
    # Sums of what follows each token, not differences of sums, which lose small decays after large ones.
    to_end = F.pad(g[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1).exp()
    u = torch.where(real.unsqueeze(-1), u * to_end.unsqueeze(-1), 0.0)
    keys = torch.where(real.unsqueeze(-1), keys, 0.0)
    rows = u.unflatten(2, (Hk, -1)).movedim(1, 3)  # [B, Hk, R, T, V]
    columns = keys.permute(0, 2, 3, 1).unsqueeze(2).expand(-1, -1, H // Hk, -1, -1)  # [B, Hk, R, K, T]
    written = (columns @ rows).flatten(1, 2)
    return initial_state * g.sum(1).exp()[..., None, None] + written


class _Chunks(NamedTuple):
    """What n chunks need no state for, and v.

    kq: [n, B, Hk, 1, 2 C, K], normalised keys, then normalised and scaled queries.
    v: [n, B, Hk, R, C, V].
    from_start, to_end: [n, B, Hk, R, C, 1], the decays d and D_C.
    T: [n, B, Hk, R, C, C], (I - A)^-1 diag(beta).
    P: the same shape, Q K^T * D.
    """

    kq: Tensor
    v: Tensor
    from_start: Tensor
    to_end: Tensor
    T: Tensor
    P: Tensor


def _prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, C: int) -> _Chunks:
    """`_Chunks` of whole chunks, given as in `chunk_gated_delta_rule`."""
    Hk, K = q.shape[2:]
    R = v.shape[2] // Hk

    # K K^T and Q K^T are one product, once per key head.
    q, k = l2norm(q).mul_(K**-0.5), l2norm(k)
    kq = torch.cat((_chunks(k, C, Hk, 1), _chunks(q, C, Hk, 1)), dim=-2)
    kk, qk = (kq @ kq[..., :C, :].mT).split(C, dim=-2)  # [n, B, Hk, 1, C, C]
    # Contiguous, because a product inherits the memory order of its operands, and batched matrix products would copy.
    v, g, beta = (_chunks(x, C, Hk, R).contiguous() for x in (v, g.unsqueeze(-1), beta.unsqueeze(-1)))

    # D sums the g between two tokens. Differences of one running sum, the usual form, lose the small decays that follow
    # large ones (1e-4 of the output at g = -100, none here), and need a mask before exp so as not to overflow.
    between = torch.ones(C, C, dtype=g.dtype, device=g.device).tril(-1)
    D = (between * g).cumsum(dim=-2).exp_()  # [n, B, Hk, R, C, C]; 1 above the diagonal, where kk and qk are masked
    A = (D * kk.tril(-1)).mul_(-beta)
    return _Chunks(
        kq=kq,
        v=v,
        from_start=g.cumsum(dim=-2).exp_(),
        to_end=D[..., -1:, :].mT,
        T=_inverse(A.flatten(0, -3)).view_as(A) * beta.mT,
        P=D * qk.tril(),
    )


def _solve(chunks: _Chunks, c: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """U and O of chunk c, [B, Hk, R, C, V], from the state before it, [B, Hk, R, K, V]."""
    k_state, q_state = (chunks.kq[c] @ state).split(chunks.v.shape[-2], dim=-2)  # [B, Hk, R, C, V]
    u = chunks.T[c] @ torch.addcmul(chunks.v[c], chunks.from_start[c], k_state, value=-1)
    return u, torch.addcmul(chunks.P[c] @ u, chunks.from_start[c], q_state)


def _segment(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, C: int, out_dtype: torch.dtype
) -> list[Tensor]:
    """Runs whole chunks, given as in `chunk_gated_delta_rule`, and moves state [B, Hk, R, K, V] on in place.

    Returns:
        One output [B, C, Hk, R, V] per chunk.
    """
    chunks = _prepare(q, k, v, g, beta, C)
    R, outputs = chunks.v.shape[3], []
    for c in range(chunks.v.shape[0]):
        u, o = _solve(chunks, c, state)
        outputs.append(_cast(o.movedim(-2, 1), out_dtype))
        u = u * chunks.to_end[c]  # scales [C, V] per value head; scaling K would undo its sharing
        k_heads = chunks.kq[c, ..., :C, :].expand(-1, -1, R, -1, -1)
        state.mul_(chunks.from_start[c, ..., -1:, :]).flatten(0, 2).baddbmm_(k_heads.flatten(0, 2).mT, u.flatten(0, 2))
    return outputs


def _inverse(A: Tensor) -> Tensor:
    """(I - A)^-1 for strictly lower triangular A: [M, C, C], C a power of two, with matrix products only.

    Halves are merged, [[I - A11, 0], [-A21, I - A22]]^-1 = [[X1, 0], [X2 A21 X1, X2]], which stays accurate when keys
    are equal and beta is 1. torch.linalg.solve_triangular is not known to the Neuron compiler; on CPU it takes as long
    for C = 32 on one thread, 1.4 times as long for C = 64, and up to 2 times on two threads, since it solves one matrix
    after another. So there is one form for both.
    """
    C = A.shape[-1]
    if C <= LARGEST_DOUBLED_BLOCK:
        # I + A + ... + A^{C-1} = (I + A^{C/2}) ... (I + A^2) (I + A), exact because A^C = 0.
        X = A + torch.eye(C, dtype=A.dtype, device=A.device)
        for _ in range(C.bit_length() - 2):
            A = A @ A
            X = torch.baddbmm(X, A, X)
        return X
    half = C // 2
    diagonal = torch.stack((A[:, :half, :half], A[:, half:, half:]), dim=1)
    X1, X2 = _inverse(diagonal.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
    below = X2 @ A[:, half:, :half] @ X1
    return torch.cat((F.pad(X1, (0, half)), torch.cat((below, X2), dim=-1)), dim=-2)


def _chunks(x: Tensor, C: int, Hk: int, R: int) -> Tensor:
    """[B, n C, Hk R, D] as a view [n, B, Hk, R, C, D]."""
    return x.unflatten(2, (Hk, R)).unflatten(1, (-1, C)).movedim((1, 2), (0, -2))


def _whole_chunks(x: Tensor, C: int) -> Tensor:
    """Zeros after the last token, up to whole chunks: g = 0 and beta = 0 make them leave the state as it is."""
    pad = -x.shape[1] % C
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)) if pad else x


def _initial(state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state [B, H, K, V], or zeros, as [B, Hk, R, K, V]; shares memory with the caller's where it can."""
    return torch.zeros(shape, dtype=dtype, device=device) if state is None else _cast(state, dtype).view(shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes a microsecond even to do nothing: together a tenth of a decode step of 8 heads."""
    return x if x.dtype == dtype else x.to(dtype)


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """B, S, Hk, R, K, V, after checking that the arguments agree on them."""
    B, S, Hk, K = k.shape
    H, V = v.shape[2:]
    if H % Hk:
        raise ValueError(f"{H} value heads are not a multiple of {Hk} key heads")
    state_shape = (B, H, K, V) if initial_state is None else initial_state.shape
    found = (q.shape, v.shape, g.shape, beta.shape, state_shape)
    expected = ((B, S, Hk, K), (B, S, H, V), (B, S, H), (B, S, H), (B, H, K, V))
    if found != expected:
        wrong = next(i for i, shape in enumerate(expected) if found[i] != shape)
        name = ("q", "v", "g", "beta", "initial_state")[wrong]
        raise ValueError(
            f"{name} has shape {list(found[wrong])}, expected {list(expected[wrong])} from k {list(k.shape)}"
        )
    return B, S, Hk, H // Hk, K, V
