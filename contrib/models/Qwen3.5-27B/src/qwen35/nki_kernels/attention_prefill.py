# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Context encoding: causal grouped-query attention at head_dim 64, 128 or 256.

The specification is `qwen35.ops.causal_attention`.
"""

from dataclasses import dataclass
from typing import Any

from .attention_pieces import (
    MASKED,
    TILE,
    Pool,
    check_dtypes,
    check_heads,
    make_identity,
    make_pool,
    parts,
    take,
    width,
)
from .common import Tensor
from .nki_seam import nisa, nki, nl

GROUP = 4
"""Key tiles of a block: its 512 float32 scores per query fill one PSUM bank of 2 KiB
(nki/guides/architecture/trainium_inferentia2_arch.rst, PSUM)."""

LOOKAHEAD = 2
"""Rows by which scores run ahead of P V, so that the Tensor engine need not wait for maximum, exp and transpose."""

QUERY_LEAD = 2
"""Rows by which Q^T runs ahead of the scores."""

MAX_TOKENS = 4096
"""Longest sequence in bfloat16; half of it in float32. SBUF then holds K^T and V of two heads, and two rows of scores
and three of p."""


@dataclass
class Row(nl.NKIObject):
    """One query tile of one head on its way through the stages, which set the fields from q_t in this order.

    q_t: [width(d), parts, 128(q)] operand type, Q^T.
    stats: [128(q), 2 blocks + 3] float32, see Pools; the sum is that of p before it is rounded.
    scores: [128(q), keys] float32, of the visible keys, in whole tiles, times E^-0.5.
    p: [128(q), keys] operand type, exp(score - maximum).
    o: [128(q), E] float32 in PSUM, the sum of p V so far.
    """

    b: int
    head: int
    tile: int
    kv: int
    q_t: Any = None
    stats: Any = None
    scores: Any = None
    p: Any = None
    o: Any = None


@dataclass
class KeyValue(nl.NKIObject):
    """One key-value head of one sequence.

    k_t: [width(d), parts, S] operand type. v: [128(token), S / 128, E] operand type. tiles: key tiles loaded so far.
    """

    b: int
    head: int
    k_t: Any = None
    v: Any = None
    tiles: int = 0


@dataclass
class Pools(nl.NKIObject):
    """Buffers of a launch. PSUM: score, moved and product take 3, 3 and 2 banks, all there are.

    score: [128, 512] float32. moved: [128, 4, 128] operand type. product: [128, E] float32.
    rows: [128, E] operand type, of Q. k_rows: [128, 4, E] operand type.
    q_t: [width, parts, 128], p_t: [128, 4, 128], p: [128, S], o: [128, E], all operand type. scores: [128, S] float32.
    stats: [128, 2 blocks + 3] float32: maxima and sums of the blocks, -maximum, sum and its inverse.
    """

    score: Pool
    moved: Pool
    product: Pool
    rows: Pool
    k_rows: Pool
    q_t: Pool
    p_t: Pool
    p: Pool
    o: Pool
    scores: Pool
    stats: Pool


@dataclass
class Constants(nl.NKIObject):
    """identity, mask: [128, 128] bfloat16; the mask is MASKED where key > query, else 0."""

    identity: Tensor
    mask: Tensor


@nki.jit
def attention_prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(E) + causal mask) V for whole sequences of a layer.

    Pseudocode, per core with its rows (a row is 128 queries of one head):

        for each sequence and key-value head:
            K^T = transpose(K)                                  # Tensor engine, as the rows reach the keys
            for each tile i of 128 queries, for each head of the group:
                for each block of 512 keys up to the diagonal:
                    s[block] = Q_i K[block]^T                   # two matmuls of contraction 128 where E is 256
                    s[last 128] += mask                         # a third one; key tiles beyond are never touched
                    m[block] = max(s[block])                    # the same instruction moves s to SBUF
                p = exp(s - max(m)), l = sum(p)                 # float32
                for each block:
                    O_i += transpose(p[block])^T V[block]       # in PSUM, never rescaled
                out_i = O_i / l

    Dimensions:
        B batch, S tokens, M key-value heads, N = M G query heads (head h reads key-value head h // G), E head dim.

    Args:
        q: [B, N, S, E] float32 or bfloat16, after its norm and rotary embedding, not scaled.
        k, v: [B, M, S, E], the same type.

    Returns:
        out: [B, N, S, E] in the type of q.

    Notes:
        Launch grid: none, 1, or 2 for LNC=2, which deals the rows of a key-value head to the cores in turn; each core
        holds K^T and V, and they exchange nothing.
        S is a multiple of 128, at most 4096 (2048 in float32). Pad on the right: queries never see later keys.
        The maximum of a row is exact, since a whole row of scores fits in SBUF; no running maximum, no rescaling.
        Scores, maximum, sum and accumulation are float32; with bfloat16 inputs p is rounded once.
        Pads must be finite: a probability of zero times an infinite value is not zero.
        bfloat16: 3e-3 of the largest output; float32: 1e-6, in up to 2.5 times the time.
        Time, modelled by nki_emulator and not measured on a device, bfloat16, 6 query heads and 1 key-value head on two
        cores: 23 us for 512 tokens, 48 us for 1024, 136 us for 2048 (docs/attention_kernels.md).
        Loops are unrolled over S, so code grows with S^2: 1972 instructions a core for those 2048 tokens.
    """
    B, N, S, E = q.shape
    M = k.shape[1]
    _check(q, k, v)
    out = nl.ndarray(q.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    constants = _make_constants()
    core, cores = nl.program_id(0), nl.num_programs(0)

    heads = []
    rows = []
    for b in range(B):
        for m in range(M):
            heads.append(KeyValue(b=b, head=m))
            for i in range((S // TILE) * (N // M)):
                if i % cores == core:
                    rows.append(Row(b=b, head=m * (N // M) + i % (N // M), tile=i // (N // M), kv=len(heads) - 1))
    pools = _make_pools(S, E, q.dtype)

    transposed = []  # blocks of p; the last one has yet to be copied to SBUF
    for step in range(-QUERY_LEAD, len(rows) + LOOKAHEAD):
        scored, known, used = step, step - 1, step - LOOKAHEAD
        blocks = 0
        for row in rows[max(used, 0) : max(scored + 1, 0)]:
            blocks = max(blocks, _blocks(row))
        if known >= 0 and known < len(rows):
            _find_maximum(rows[known], pools)
        for j in range(blocks):
            if scored >= 0 and scored < len(rows) and j < _blocks(rows[scored]):
                _score_block(rows[scored], j, heads[rows[scored].kv], pools, constants)
            if known >= 0 and known < len(rows) and j < _blocks(rows[known]):
                _exponentiate_block(rows[known], j)
            if used >= 0 and j < _blocks(rows[used]):
                transposed.append((rows[used], j, _transpose_block(rows[used], j, pools)))
                if len(transposed) > 1:
                    row, block, p_t = transposed[len(transposed) - 2]
                    _multiply_block(row, block, p_t, heads[row.kv], pools, out)
        if step + QUERY_LEAD < len(rows):
            coming = rows[step + QUERY_LEAD]
            _need_keys(heads[coming.kv], coming.tile + 1, k, v, pools)
            _load_query(coming, q, pools)
    if len(transposed) > 0:
        row, block, p_t = transposed[len(transposed) - 1]
        _multiply_block(row, block, p_t, heads[row.kv], pools, out)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes and types that the kernel takes."""
    B, N, S, E = q.shape
    M = k.shape[1]
    check_heads(N, M, E)
    assert k.shape == (B, M, S, E), f"k has shape {k.shape}, expected {(B, M, S, E)} from q"
    assert v.shape == k.shape, f"v has shape {v.shape}, k {k.shape}: they must be equal"
    check_dtypes(q.dtype, k.dtype, v.dtype)
    limit = MAX_TOKENS if q.dtype == nl.bfloat16 else MAX_TOKENS // 2
    assert S % TILE == 0 and S <= limit, f"S={S}: a multiple of {TILE} up to {limit} is needed"


def _blocks(row: Row) -> int:
    """Key blocks that a row sees."""
    return row.tile // GROUP + 1


def _tiles(row: Row, j: int) -> int:
    """Key tiles of its block j."""
    return min(GROUP, row.tile + 1 - j * GROUP)


def _make_pools(S: int, E: int, dtype: Any) -> Pools:
    """Buffers for sequences of S tokens with head dim E."""
    blocks = (S + GROUP * TILE - 1) // (GROUP * TILE)
    return Pools(
        score=make_pool(3, (TILE, GROUP * TILE), nl.float32, nl.psum),
        moved=make_pool(3, (TILE, GROUP, TILE), dtype, nl.psum),
        product=make_pool(2, (TILE, E), nl.float32, nl.psum),
        rows=make_pool(4, (TILE, E), dtype, nl.sbuf),
        k_rows=make_pool(2, (TILE, GROUP, E), dtype, nl.sbuf),
        q_t=make_pool(QUERY_LEAD + 1, (width(E), parts(E), TILE), dtype, nl.sbuf),
        p_t=make_pool(3, (TILE, GROUP, TILE), dtype, nl.sbuf),
        p=make_pool(LOOKAHEAD + 1, (TILE, S), dtype, nl.sbuf),
        o=make_pool(4, (TILE, E), dtype, nl.sbuf),
        scores=make_pool(2, (TILE, S), nl.float32, nl.sbuf),
        stats=make_pool(QUERY_LEAD + LOOKAHEAD + 2, (TILE, 2 * blocks + 3), nl.float32, nl.sbuf),
    )


def _make_constants() -> Constants:
    """Identity and the mask of the diagonal, made on chip."""
    zeros = nl.ndarray((TILE, TILE), dtype=nl.bfloat16, buffer=nl.sbuf)
    mask = nl.ndarray((TILE, TILE), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=zeros, value=0.0, engine=nisa.engine.vector)
    nisa.affine_select(
        dst=mask,
        pattern=[[-1, TILE]],
        channel_multiplier=1,
        on_true_tile=zeros,
        on_false_value=MASKED,
        cmp_op=nl.greater_equal,
    )
    return Constants(identity=make_identity(TILE, nl.bfloat16), mask=mask)


def _need_keys(head: KeyValue, tiles: int, k: Tensor, v: Tensor, pools: Pools) -> None:
    """Load K^T and V up to the block that contains key tile `tiles - 1`, as far as they are not there yet."""
    _, _, S, E = k.shape
    if head.tiles == 0:
        head.k_t = nl.ndarray((width(E), parts(E), S), dtype=k.dtype, buffer=nl.sbuf)
        head.v = nl.ndarray((TILE, S // TILE, E), dtype=v.dtype, buffer=nl.sbuf)
    for first in range(head.tiles, tiles, GROUP):
        count = min(GROUP, S // TILE - first)
        k_rows = take(pools.k_rows)
        for c in range(count):
            tokens = (first + c) * TILE
            nisa.dma_copy(dst=k_rows[:, c, :], src=k[head.b, head.head, tokens : tokens + TILE, :])
        for c in range(count):
            tokens = (first + c) * TILE
            nisa.dma_copy(dst=head.v[:, first + c, :], src=v[head.b, head.head, tokens : tokens + TILE, :])
        for part in range(parts(E)):
            moved = take(pools.moved)
            for c in range(count):
                rows = k_rows[:, c, part * TILE : part * TILE + width(E)]
                nisa.nc_transpose(dst=moved[0 : width(E), c, :], data=rows, engine=nisa.engine.tensor)
            columns = head.k_t[:, part, first * TILE : (first + count) * TILE]
            nisa.tensor_copy(dst=columns, src=moved[0 : width(E), 0:count, :], engine=nisa.engine.vector)
        head.tiles = first + count


def _load_query(row: Row, q: Tensor, pools: Pools) -> None:
    """Load Q of a row and transpose it."""
    E = q.shape[3]
    tokens = row.tile * TILE
    q_rows = take(pools.rows)
    moved = take(pools.moved)
    row.q_t = take(pools.q_t)
    nisa.dma_copy(dst=q_rows, src=q[row.b, row.head, tokens : tokens + TILE, :])
    for part in range(parts(E)):
        columns = q_rows[:, part * TILE : part * TILE + width(E)]
        nisa.nc_transpose(dst=moved[0 : width(E), part, :], data=columns, engine=nisa.engine.tensor)
    nisa.activation(dst=row.q_t, op=nl.copy, data=moved[0 : width(E), 0 : parts(E), :])
    row.stats = take(pools.stats)


def _score_block(row: Row, j: int, head: KeyValue, pools: Pools, constants: Constants) -> None:
    """Scores of one block and their maximum; the diagonal is masked in PSUM."""
    if j == 0:
        row.scores = take(pools.scores)
    first, count = j * GROUP * TILE, _tiles(row, j) * TILE
    bank = take(pools.score)
    scores = bank[:, 0:count]
    E = head.v.shape[2]
    for part in range(parts(E)):
        nisa.nc_matmul(
            dst=scores,
            stationary=row.q_t[:, part, :],
            moving=head.k_t[:, part, first : first + count],
            accumulate=part > 0,
        )
    if j + 1 == _blocks(row):
        diagonal = bank[:, count - TILE : count]
        nisa.nc_matmul(dst=diagonal, stationary=constants.identity, moving=constants.mask, accumulate=True)
    # One pass of the Vector engine frees the bank, scales the scores and gives the maximum.
    nisa.tensor_scalar_reduce(
        dst=row.scores[:, first : first + count],
        data=scores,
        op0=nl.multiply,
        operand0=E**-0.5,
        reduce_op=nl.maximum,
        reduce_res=row.stats[:, j : j + 1],
    )


def _find_maximum(row: Row, pools: Pools) -> None:
    """-maximum, once all scores of the row are known."""
    n = _blocks(row)
    row.p = take(pools.p)
    nisa.tensor_reduce(dst=row.stats[:, 2 * n : 2 * n + 1], op=nl.maximum, data=row.stats[:, 0:n], axis=1, negate=True)


def _exponentiate_block(row: Row, j: int) -> None:
    """p and its sum of one block. Between those of a row, the Scalar engine moves transposes of the row before."""
    n = _blocks(row)
    first, count = j * GROUP * TILE, _tiles(row, j) * TILE
    nisa.activation_reduce(
        dst=row.p[:, first : first + count],
        op=nl.exp,
        data=row.scores[:, first : first + count],
        bias=row.stats[:, 2 * n : 2 * n + 1],
        reduce_op=nl.add,
        reduce_res=row.stats[:, n + j : n + j + 1],
    )


def _transpose_block(row: Row, j: int, pools: Pools) -> Tensor:
    """P^T of one block: [128(key), tiles, 128(q)] operand type."""
    n = _blocks(row)
    if j == 0:  # the row was exponentiated a row ago: the Vector engine does not wait for its sums
        total, inverse = row.stats[:, 2 * n + 1 : 2 * n + 2], row.stats[:, 2 * n + 2 : 2 * n + 3]
        nisa.tensor_reduce(dst=total, op=nl.add, data=row.stats[:, n : 2 * n], axis=1)
        nisa.reciprocal(dst=inverse, data=total)
    first, count = j * GROUP * TILE, _tiles(row, j)
    moved, p_t = take(pools.moved), take(pools.p_t)
    for c in range(count):
        keys = row.p[:, first + c * TILE : first + (c + 1) * TILE]
        nisa.nc_transpose(dst=moved[:, c, :], data=keys, engine=nisa.engine.tensor)
    # The Vector engine, which moves the scores, would take longer than the matmuls.
    nisa.tensor_copy(dst=p_t[:, 0:count, :], src=moved[:, 0:count, :], engine=nisa.engine.scalar)
    return p_t


def _multiply_block(row: Row, j: int, p_t: Tensor, head: KeyValue, pools: Pools, out: Tensor) -> None:
    """O += P V of one block; after the last one the row is normalised and stored."""
    n = _blocks(row)
    if j == 0:
        row.o = take(pools.product)
    for c in range(_tiles(row, j)):
        nisa.nc_matmul(dst=row.o, stationary=p_t[:, c, :], moving=head.v[:, j * GROUP + c, :], accumulate=j + c > 0)
    if j + 1 == n:
        tokens = row.tile * TILE
        o = take(pools.o)
        nisa.activation(dst=o, op=nl.copy, data=row.o, scale=row.stats[:, 2 * n + 2 : 2 * n + 3])
        nisa.dma_copy(dst=out[row.b, row.head, tokens : tokens + TILE, :], src=o)
