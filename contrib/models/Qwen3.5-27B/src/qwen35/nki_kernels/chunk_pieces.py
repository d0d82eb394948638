# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Pieces of the chunked gated delta rule: constants, loads, gates, the inverse of a chunk, the state.

Letters: B batch, S tokens, H value heads, Hk key heads, R value heads of one key head, K key dim, V value dim,
C tokens per chunk, n chunks. On chip the first axis is the partition. A *unit* is one key head with up to four of its
value heads: their [C, 4, 128] float32 products fill one PSUM bank of 2 KiB
(nki/guides/architecture/trainium_inferentia2_arch.rst, PSUM).

The chunk form of `qwen35.ops.gated_delta_rule` is rewritten so that every scale is one number per token and head, which
Vector and Scalar instructions apply along partitions for free. With raw q, k, |k| = sqrt(sum k^2 + eps), D_ij the decay
from token j to i, d_i that from the chunk's start, e_j that to its end, and w_j = beta_j / |k_j|^2:

    A  = -tril(K K^T, -1) * D  diag(w)                 T = (I - A)^-1
    U' = diag(w) T (diag|k| V - diag(d) K S)           = diag(1/|k|) U
    O  = diag(1/|q| K^-0.5) ((Q K^T * D) U' + diag(d) Q S)
    S <- d_C S + K^T diag(e) U'

so neither q nor k is normalised, K K^T and Q K^T of 16-bit operands are exact up to the accumulation in float32, and a
key head computes them once for all of its value heads. The system is similar to the one of the normalised keys.
"""

from dataclasses import dataclass
from typing import Any

from .common import L2_EPS, Tensor
from .nki_seam import nisa, nl

BLOCK = 32
"""Side of the diagonal blocks that are inverted in place: one sub-array of the Tensor engine."""

TILED, PLAIN = "tiled", "plain"
"""How a chunk's system is inverted: on sub-arrays of the Tensor engine (`triangular_inverse`), or on the whole of it
(`plain_inverse`)."""

SMALL_LEVELS = 5
"""Merges 1 -> 2 -> 4 -> 8 -> 16 -> 32 that build the inverse of a block."""

UNIT_HEADS = 4
"""Value heads per unit at most, by the size of a PSUM bank."""


@dataclass
class Shape(nl.NKIObject):
    """Sizes of one launch, and the heads of this core: h0 is its first value head, k0 its first key head.

    inverse: TILED or PLAIN.
    """

    C: int
    K: int
    V: int
    heads: int
    key_heads: int
    h0: int
    k0: int
    dtype: Any
    inverse: str


@dataclass
class Unit(nl.NKIObject):
    """Key head `key` and value heads [first, first + R), counted from the first ones of this core."""

    key: int
    first: int
    R: int


@dataclass
class Constants(nl.NKIObject):
    """Masks and identities of a launch, made on chip. W is the side of the diagonal blocks: 32 if TILED, C if PLAIN.

    after: [C, C] float32, row t, column j: 1 where t > j.
    upto: [C, C] float32, row t, column i: 1 where t <= i.
    ones: [C, 128] float32.
    identity: [C, C] in the operand type.
    identity16: [C, C] bfloat16.
    blocks, blocks16: [C, W] float32, bfloat16, the identity of every diagonal block.
    merge: [C, log2 W, W] float32: ones on the diagonal and where level s = 2^i of the inverse couples two blocks of s.
    """

    after: Tensor
    upto: Tensor
    ones: Tensor
    identity: Tensor
    identity16: Tensor
    blocks: Tensor
    blocks16: Tensor
    merge: Tensor


@dataclass
class Segment(nl.NKIObject):
    """Some chunks of one sequence: inputs and everything that is one number per token and head.

    k, q: [C, n, key heads, K]; v: [C, n, heads, V], in the operand type.
    g: [C, n, heads] float32, zero beyond the valid length.
    w, neg_w: [C, n, heads] float32, beta / |k|^2 and its negative.
    d, neg_d: [C, n, heads] float32, decay from the chunk's start, inclusive, and its negative.
    w_end: [C, n, heads] float32, w times the decay to the chunk's end.
    chunk_decay: [K, n, heads] float32, decay over the chunk on every partition.
    k_norm: [C, n, key heads] float32, |k|.
    q_scale: [C, n, key heads] float32, K^-0.5 / |q|.
    """

    k: Tensor
    q: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    w: Tensor
    neg_w: Tensor
    d: Tensor
    neg_d: Tensor
    w_end: Tensor
    chunk_decay: Tensor
    k_norm: Tensor
    q_scale: Tensor


@dataclass
class Work(nl.NKIObject):
    """One chunk of one unit; the stages set the fields in this order.

    kq_t: [K, 2, C] operand type, K^T and Q^T.
    products: [C(j), 2, C(i)] float32, (K K^T)^T below and (Q K^T)^T on and below the diagonal.
    row_decay: [C(t), R, C(i)] float32, g_t where t <= i.
    D: [C(j), R, C(i)] float32, D^T.
    A: [C(j), R, C(i)] float32, A^T.
    P: [C(j), R, C(i)] operand type, (Q K^T * D)^T.
    v_scaled: [C, R, V] operand type, diag|k| V.
    step: [C, R, W] float32, what the next level multiplies by, I + (N masked to its pairs of blocks).
    xn: [C, R, 2, 32] float32, X^T | N^T of the diagonal blocks.
    half: [C, R, 32 or 64] float32, N = A X between the halves of blocks of 64 or 128.
    x: [C, R, 3, 32] float32, X^T | Y | X once the blocks have 32; Y is T of blocks 1, 3 against 0, 2, and in the rows
        of 0, 2 its transpose.
    halves: [C, R, 2, 32] float32, [[X_0, 0], [Y_1, X_1]], which is X of the first 64 rows, and of the others
        X^T = [[X_2^T, Y_2^T], [0, X_3^T]]: with both factors in one place each product of a half is one matmul, and no
        sum of row tiles is left to PSUM. Its zeros are never written.
    n_t: [C, R, C] float32, N^T, if PLAIN, in the place of the three before that.
    T: [C(j), R, C(i)] operand type, T^T.
    k_state, q_state: [C, R, V] operand type, -diag(d) K S and diag(d) Q S.
    u, u_end: [C, R, V] operand type, U' and diag(e) U'.
    """

    unit: Unit
    segment: Segment
    chunk: int
    kq_t: Any = None
    products: Any = None
    row_decay: Any = None
    D: Any = None
    A: Any = None
    P: Any = None
    v_scaled: Any = None
    step: Any = None
    xn: Any = None
    half: Any = None
    x: Any = None
    halves: Any = None
    n_t: Any = None
    k_state: Any = None
    T: Any = None
    u: Any = None
    u_end: Any = None
    q_state: Any = None


# --- Launch ----------------------------------------------------------------------------------------------------------
def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Any, valid_lengths: Any, inverse: str
) -> None:
    """Shapes and types that the kernels take, [B, S, ...] each; the two of type Any may be None."""
    B, S, Hk, K = k.shape
    H, V = v.shape[2], v.shape[3]
    assert q.shape == k.shape, f"q has shape {q.shape}, k {k.shape}: they must be equal"
    assert v.shape[0] == B and v.shape[1] == S, f"v has shape {v.shape}, expected [{B}, {S}, H, V] from k"
    assert H % Hk == 0, f"{H} value heads are not a multiple of {Hk} key heads"
    assert K <= nl.tile_size.pmax and V <= nl.tile_size.pmax, f"K={K} and V={V}: at most {nl.tile_size.pmax}"
    assert q.dtype == k.dtype and v.dtype == k.dtype, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one type is needed"
    assert k.dtype == nl.float32 or k.dtype == nl.bfloat16, f"k is {k.dtype}: float32 or bfloat16 is needed"
    assert g.shape == (B, S, H), f"g has shape {g.shape}, expected {(B, S, H)}"
    assert beta.shape == (B, S, H), f"beta has shape {beta.shape}, expected {(B, S, H)}"
    assert g.dtype == nl.float32 and beta.dtype == nl.float32, f"g, beta are {g.dtype}, {beta.dtype}: float32 is needed"
    assert inverse == TILED or inverse == PLAIN, f"inverse is {inverse}: {TILED} or {PLAIN} is needed"
    if initial_state != None:  # noqa: E711
        assert initial_state.shape == (B, H, K, V), f"state has shape {initial_state.shape}, expected {(B, H, K, V)}"
        assert initial_state.dtype == nl.float32, f"state is {initial_state.dtype}: float32 is needed"
    if valid_lengths != None:  # noqa: E711
        assert valid_lengths.shape == (B,), f"valid_lengths has shape {valid_lengths.shape}, expected {(B,)}"
        assert valid_lengths.dtype == nl.int32, f"valid_lengths is {valid_lengths.dtype}: int32 is needed"


def split_heads(H: int, Hk: int) -> tuple[int, int]:
    """First value head and number of value heads of this core: all of them, or one half with LNC=2."""
    cores = nl.num_programs(0)
    per_core = (H + cores - 1) // cores
    first = min(nl.program_id(0) * per_core, H)
    return first, min(per_core, H - first)


def make_units(shape: Shape, R: int) -> list[Unit]:
    """The heads of this core, grouped by key head (R value heads each) and cut at the size of a PSUM bank."""
    units = []
    first = 0
    for h in range(shape.heads):
        key = (shape.h0 + h) // R - shape.k0
        ends = h + 1 == shape.heads or (shape.h0 + h + 1) // R - shape.k0 != key or h + 1 - first == UNIT_HEADS
        if ends:
            units.append(Unit(key=key, first=first, R=h + 1 - first))
            first = h + 1
    return units


def block_width(shape: Shape) -> int:
    """W: side of the diagonal blocks that are merged in place."""
    return BLOCK if shape.inverse == TILED else shape.C


def inverse_levels(shape: Shape) -> int:
    """log2 W: merges 1 -> 2 -> 4 -> ... -> W."""
    levels, side = 0, 1
    while side < block_width(shape):
        levels, side = levels + 1, 2 * side
    return levels


def make_constants(shape: Shape) -> Constants:
    """Masks and identities, without reading HBM."""
    C = shape.C
    ones = nl.ndarray((C, 128), dtype=nl.float32, buffer=nl.sbuf)
    after = nl.ndarray((C, C), dtype=nl.float32, buffer=nl.sbuf)
    upto = nl.ndarray((C, C), dtype=nl.float32, buffer=nl.sbuf)
    identity16 = nl.ndarray((C, C), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0, engine=nisa.engine.gpsimd)
    ones_c = ones[:, 0:C]
    nisa.affine_select(
        dst=after,
        pattern=[[-1, C]],
        channel_multiplier=1,
        offset=-1,
        on_true_tile=ones_c,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    nisa.affine_select(
        dst=upto,
        pattern=[[1, C]],
        channel_multiplier=-1,
        on_true_tile=ones_c,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    nisa.affine_select(
        dst=identity16,
        pattern=[[-1, C]],
        channel_multiplier=1,
        on_true_tile=ones_c,
        on_false_value=0.0,
        cmp_op=nl.equal,
    )
    identity = identity16
    if shape.dtype != nl.bfloat16:
        identity = nl.ndarray((C, C), dtype=shape.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=identity, src=identity16, engine=nisa.engine.gpsimd)

    # In a block of W, row p and column c < p lie in the two halves of one block of 2s exactly if s <= p xor c < 2s.
    W, levels = block_width(shape), inverse_levels(shape)
    row = nl.ndarray((C, 1), dtype=nl.int32, buffer=nl.sbuf)
    column = nl.ndarray((C, W), dtype=nl.int32, buffer=nl.sbuf)
    differ = nl.ndarray((C, W), dtype=nl.int32, buffer=nl.sbuf)
    row_f = nl.ndarray((C, 1), dtype=nl.float32, buffer=nl.sbuf)
    differ_f = nl.ndarray((C, W), dtype=nl.float32, buffer=nl.sbuf)
    below = nl.ndarray((C, W), dtype=nl.float32, buffer=nl.sbuf)
    blocks = nl.ndarray((C, W), dtype=nl.float32, buffer=nl.sbuf)
    blocks16 = nl.ndarray((C, W), dtype=nl.bfloat16, buffer=nl.sbuf)
    at_least = nl.ndarray((C, levels + 1, W), dtype=nl.float32, buffer=nl.sbuf)
    merge = nl.ndarray((C, levels, W), dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=row, pattern=[[0, 1]], channel_multiplier=1)
    nisa.iota(dst=column, pattern=[[1, W]], channel_multiplier=0)
    nisa.tensor_scalar(dst=row, data=row, op0=nl.bitwise_and, operand0=W - 1)
    nisa.tensor_scalar(dst=differ, data=column, op0=nl.bitwise_xor, operand0=row)
    nisa.tensor_copy(dst=row_f, src=row, engine=nisa.engine.vector)
    nisa.tensor_copy(dst=differ_f, src=differ, engine=nisa.engine.vector)
    nisa.tensor_scalar(dst=blocks, data=differ_f, op0=nl.equal, operand0=0.0)
    nisa.tensor_copy(dst=blocks16, src=blocks, engine=nisa.engine.vector)
    nisa.tensor_scalar(dst=below, data=column, op0=nl.less, operand0=row_f)
    nisa.tensor_tensor(dst=differ_f, data1=differ_f, data2=below, op=nl.multiply)
    side = 1
    for i in range(levels + 1):
        nisa.tensor_scalar(dst=at_least[:, i, :], data=differ_f, op0=nl.greater_equal, operand0=float(side))
        side = 2 * side
    nisa.tensor_tensor(dst=merge, data1=at_least[:, 0:levels, :], data2=at_least[:, 1 : levels + 1, :], op=nl.subtract)
    every_level = blocks.ap(pattern=[[W, C], [0, levels], [1, W]])
    nisa.tensor_tensor(dst=merge, data1=merge, data2=every_level, op=nl.add)
    return Constants(
        after=after,
        upto=upto,
        ones=ones,
        identity=identity,
        identity16=identity16,
        blocks=blocks,
        blocks16=blocks16,
        merge=merge,
    )


# --- Loads and gates -------------------------------------------------------------------------------------------------
def make_segment(shape: Shape, n: int) -> Segment:
    """Room for n chunks."""
    C, heads, key_heads = shape.C, shape.heads, shape.key_heads
    key_tile = (C, n, key_heads, shape.K)
    gate_tile = (C, n, heads)
    return Segment(
        k=nl.ndarray(key_tile, dtype=shape.dtype, buffer=nl.sbuf),
        q=nl.ndarray(key_tile, dtype=shape.dtype, buffer=nl.sbuf),
        v=nl.ndarray((C, n, heads, shape.V), dtype=shape.dtype, buffer=nl.sbuf),
        g=nl.ndarray(gate_tile, dtype=nl.float32, buffer=nl.sbuf),
        beta=nl.ndarray(gate_tile, dtype=nl.float32, buffer=nl.sbuf),
        w=nl.ndarray(gate_tile, dtype=nl.float32, buffer=nl.sbuf),
        neg_w=nl.ndarray(gate_tile, dtype=nl.float32, buffer=nl.sbuf),
        d=nl.ndarray(gate_tile, dtype=nl.float32, buffer=nl.sbuf),
        neg_d=nl.ndarray(gate_tile, dtype=nl.float32, buffer=nl.sbuf),
        w_end=nl.ndarray(gate_tile, dtype=nl.float32, buffer=nl.sbuf),
        chunk_decay=nl.ndarray((shape.K, n, heads), dtype=nl.float32, buffer=nl.sbuf),
        k_norm=nl.ndarray((C, n, key_heads), dtype=nl.float32, buffer=nl.sbuf),
        q_scale=nl.ndarray((C, n, key_heads), dtype=nl.float32, buffer=nl.sbuf),
    )


def load_segment(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, b: int, first: int, n: int
) -> Segment:
    """Start the transfers of chunks [first, first + n) of sequence b; tokens beyond S read as zero.

    Args:
        q, k: [B, S, Hk, K]; v: [B, S, H, V]; g, beta: [B, S, H] float32, in HBM.
    """
    C, heads, key_heads = shape.C, shape.heads, shape.key_heads
    S = k.shape[1]
    h1, k1 = shape.h0 + heads, shape.k0 + key_heads
    s = make_segment(shape, n)
    for c in range(n):
        start = (first + c) * C
        rows = min(C, S - start)
        if rows < C:
            for tile in (s.k, s.q, s.v, s.g, s.beta):
                nisa.memset(dst=tile[:, c], value=0.0, engine=nisa.engine.gpsimd)
        stop = start + rows
        nisa.dma_copy(dst=s.k[0:rows, c], src=k[b, start:stop, shape.k0 : k1])
        nisa.dma_copy(dst=s.q[0:rows, c], src=q[b, start:stop, shape.k0 : k1])
        nisa.dma_copy(dst=s.g[0:rows, c], src=g[b, start:stop, shape.h0 : h1])
        nisa.dma_copy(dst=s.beta[0:rows, c], src=beta[b, start:stop, shape.h0 : h1])
        nisa.dma_copy(dst=s.v[0:rows, c], src=v[b, start:stop, shape.h0 : h1])
    return s


def mask_gates(shape: Shape, s: Segment, valid_lens: Tensor, b: int, first: int, n: int) -> None:
    """g = beta = 0 from the valid length of sequence b on: such tokens neither decay the state nor write to it.

    Args:
        valid_lens: [B] int32 in HBM.
        first: first chunk of the segment.
    """
    C, heads = shape.C, shape.heads
    length32 = nl.ndarray((C, 1), dtype=nl.int32, buffer=nl.sbuf)
    length = nl.ndarray((C, 1), dtype=nl.float32, buffer=nl.sbuf)
    token = nl.ndarray((C, n), dtype=nl.float32, buffer=nl.sbuf)
    # A stride of 0 over partitions is possible in HBM only (nki/api/nki/language/__init__.py, NkiTensor.ap). An engine
    # casts: DMA descriptors that hardware makes move bytes (nki/migration/index.rst, dge_mode type matching).
    nisa.dma_copy(dst=length32, src=valid_lens.ap(pattern=[[0, C], [1, 1]], offset=b))
    nisa.tensor_copy(dst=length, src=length32, engine=nisa.engine.gpsimd)
    nisa.iota(dst=token, pattern=[[C, n]], offset=first * C, channel_multiplier=1)
    nisa.tensor_scalar(dst=token, data=token, op0=nl.less, operand0=length)
    for gate in (s.g, s.beta):
        nisa.tensor_tensor(dst=gate, data1=gate, data2=token.ap(pattern=[[n, C], [1, n], [0, heads]]), op=nl.multiply)


def compute_gates(shape: Shape, consts: Constants, units: list[Unit], s: Segment, n: int) -> None:
    """Fill in what is one number per token and head: norms, decays from the start and to the end of each chunk.

    Sums of g over tokens are products with triangles of ones, so that each sums only what it needs: differences of one
    running sum would lose small decays after large ones (g reaches -80). exp only sees sums of g <= 0.
    """
    C, K, heads, key_heads = shape.C, shape.K, shape.heads, shape.key_heads
    squares = nl.ndarray((C, 2, n, key_heads), dtype=nl.float32, buffer=nl.sbuf)
    ignored = nl.ndarray((C, K), dtype=shape.dtype, buffer=nl.sbuf)
    for c in range(n):
        for h in range(key_heads):
            nisa.activation_reduce(
                dst=ignored, op=nl.square, data=s.k[:, c, h], reduce_op=nl.add, reduce_res=squares[:, 0, c, h : h + 1]
            )
            nisa.activation_reduce(
                dst=ignored, op=nl.square, data=s.q[:, c, h], reduce_op=nl.add, reduce_res=squares[:, 1, c, h : h + 1]
            )
    inverse = nl.ndarray((C, 2, n, key_heads), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=inverse, op=nl.rsqrt, data=squares, bias=L2_EPS)
    nisa.activation(dst=s.k_norm, op=nl.sqrt, data=squares[:, 0], bias=L2_EPS)
    nisa.tensor_scalar(dst=s.q_scale, data=inverse[:, 1], op0=nl.multiply, operand0=K**-0.5)
    nisa.tensor_tensor(dst=squares[:, 0], data1=inverse[:, 0], data2=inverse[:, 0], op=nl.multiply)
    for unit in units:
        of_key = squares.ap(pattern=[[2 * n * key_heads, C], [key_heads, n], [0, unit.R]], offset=unit.key)
        mine = slice_heads(unit)
        nisa.tensor_tensor(dst=s.w[:, :, mine], data1=s.beta[:, :, mine], data2=of_key, op=nl.multiply)
    nisa.tensor_scalar(dst=s.neg_w, data=s.w, op0=nl.multiply, operand0=-1.0)

    sums = nl.ndarray((C, 2, n * heads), dtype=nl.float32, buffer=nl.psum)
    total = nl.ndarray((K, n * heads), dtype=nl.float32, buffer=nl.psum)
    g = s.g.reshape((C, n * heads))
    nisa.nc_matmul(dst=sums[:, 0], stationary=consts.upto, moving=g, is_stationary_onezero=True, accumulate=False)
    nisa.nc_matmul(dst=sums[:, 1], stationary=consts.after, moving=g, is_stationary_onezero=True, accumulate=False)
    nisa.nc_matmul(dst=total, stationary=consts.ones[:, 0:K], moving=g, is_stationary_onezero=True, accumulate=False)
    nisa.activation(dst=s.d, op=nl.exp, data=sums[:, 0])
    nisa.activation(dst=s.w_end, op=nl.exp, data=sums[:, 1])
    nisa.activation(dst=s.chunk_decay, op=nl.exp, data=total)
    nisa.tensor_tensor(dst=s.w_end, data1=s.w_end, data2=s.w, op=nl.multiply)
    nisa.tensor_scalar(dst=s.neg_d, data=s.d, op0=nl.multiply, operand0=-1.0)


def slice_heads(unit: Unit) -> slice:
    """The value heads of a unit, as an index."""
    return nl.ds(unit.first, unit.R)


# --- State -----------------------------------------------------------------------------------------------------------
@dataclass
class State(nl.NKIObject):
    """State of the heads of this core.

    exact: [K, heads, V] float32, carried over the whole sequence.
    operand: the same in the operand type, for products; `exact` itself when that is float32.
    """

    exact: Tensor
    operand: Tensor


def load_state(shape: Shape, initial_state: Any, b: int) -> State:
    """State of sequence b from [B, H, K, V] float32 in HBM, or zeros where that is None."""
    K, V, heads = shape.K, shape.V, shape.heads
    exact = nl.ndarray((K, heads, V), dtype=nl.float32, buffer=nl.sbuf)
    operand = exact
    if initial_state == None:  # noqa: E711 ('is' is no NKI operator: nki/migration/index.rst, Language restrictions)
        nisa.memset(dst=exact, value=0.0, engine=nisa.engine.gpsimd)
    else:
        nisa.dma_copy(dst=exact, src=state_rows(shape, initial_state, b))
    if shape.dtype != nl.float32:
        operand = nl.ndarray((K, heads, V), dtype=shape.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=operand, src=exact, engine=nisa.engine.gpsimd)
    return State(exact=exact, operand=operand)


def store_state(shape: Shape, state: State, final_state: Tensor, b: int) -> None:
    """State of sequence b to [B, H, K, V] float32 in HBM."""
    nisa.dma_copy(dst=state_rows(shape, final_state, b), src=state.exact)


def state_rows(shape: Shape, x: Tensor, b: int) -> Tensor:
    """This core's heads of sequence b of a [B, H, K, V] tensor in HBM, seen as [K, heads, V]."""
    K, V, H = shape.K, shape.V, x.shape[1]
    return x.ap(pattern=[[V, K], [K * V, shape.heads], [1, V]], offset=(b * H + shape.h0) * K * V)
