# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Token generation: attention of 1 to 8 new tokens per row to the cache and to each other.

The specification is `qwen35.ops.cached_attention`. The keys of a row are dealt to the cores in two halves (flash
decoding, arXiv 2205.14135 applied to parts of the keys) and the partial results merged.
"""

from dataclasses import dataclass
from typing import Any

from .attention_pieces import (
    MASKED,
    PSUM_BANK_BYTES,
    TILE,
    Pool,
    check_cache,
    check_dtypes,
    check_heads,
    item_bytes,
    make_identity,
    make_pool,
    parts,
    take,
    width,
)
from .common import Tensor
from .nki_seam import nisa, nki, nl

MAX_TOKENS = 8
"""Most new tokens of a row."""

MAX_QUERIES = 48
"""Most queries of a key-value head, G T: their scores of a bank's key tiles fit one bank of PSUM."""

MAX_COLUMNS = 512
"""Most queries of a launch, B N T: the results of all are merged at once, and fit one bank of PSUM."""

RUN_BYTES = 8192
"""Of consecutive tokens that a partition loads at once: DMA then reaches 96% of its peak, 512 bytes reach 58%."""

SLABS = 4
"""Loads of a core's keys there are at least, where it has as many tiles: the engines start on the first of them."""

SEGMENT = 128
"""Most key tiles whose scores are kept for an exact maximum; longer halves of a cache give several partial results."""

SCORE_BYTES = 98304
"""Of a partition, for the scores and p of the segments under way: many queries make segments shorter."""

KEY_SLABS, VALUE_SLABS = 3, 6
"""Loads of keys and of values that are under way or in use: values come while the maximum is found."""

KEY_LEAD = 2
"""Banks of K^T by which transposes run ahead of scores, so that the Tensor engine need not wait for K^T to be moved."""


@dataclass
class Slab(nl.NKIObject):
    """128 `run` consecutive tokens of the cache from position `first`; partition p holds `run` of them from p run on.

    column, place: of its first tile among the key tiles of its core, and of its segment.
    """

    first: int
    run: int
    column: int
    place: int


@dataclass
class Segment(nl.NKIObject):
    """Keys of one row and key-value head that one maximum is taken of.

    b, m: row and key-value head. partial: which of the core's partial results of this head it is.
    slabs: of the cache. tiles: key tiles in the slabs. has_new: whether the new tokens are one more tile and slab.
    scores: [128(key), G T, tiles] float32. hidden: [128(key), tiles] float32, MASKED or 0.
    maxima: [128(key), G T, slabs] float32. largest: [128, 1] float32, the maximum of all keys, a query on a partition.
    p: as scores, operand type. last_bank: banks of K^T of the launch up to the end of this segment.
    """

    b: int
    m: int
    partial: int
    slabs: list[Any]
    tiles: int
    has_new: bool
    scores: Any = None
    hidden: Any = None
    maxima: Any = None
    largest: Any = None
    p: Any = None
    last_bank: int = 0

    def spans(self) -> list[Any]:
        """First column and number of columns of each slab, the new tokens included."""
        found = []
        for slab in self.slabs:
            found.append((slab.place, slab.run))
        if self.has_new:
            found.append((self.tiles, 1))
        return found


@dataclass
class KeyBank(nl.NKIObject):
    """K^T [width(d), parts, count, 128(token)] of tiles `first`.. of slab number `slab` of a segment."""

    segment: Any
    k_t: Any
    slab: int
    first: int
    count: int


@dataclass
class KeyQueue(nl.NKIObject):
    """The banks of a launch that are transposed so far, in order, and how many of them are scored."""

    banks: list[Any]
    scored: int


@dataclass
class Operands(nl.NKIObject):
    """Inputs of a launch in HBM, and what is on chip throughout; W = B N T columns, one for each query.

    q_t: [width(d), parts, W] operand type, Q^T. new_k_t: [width(d), parts, B M T], K^T of the new tokens.
    new_v: [T, B M, E], V of the new tokens. new_mask: [T, G T] float32, MASKED where key > query.
    lengths: [128, B] float32. positions: [128(key), tiles of this core] float32, of the tokens in the core's slabs.
    identity, ones: [128, 128] float32. partials: [128, segments of a head, 2 + parts, W] float32: maximum and sum of p,
    on every partition, and O^T of each partial result. sums: [128(key), segments of a head, W], of p on each partition.
    """

    k_cache: Any
    v_cache: Any
    queries: int
    heads: int
    q_t: Any
    new_k_t: Any
    new_v: Any
    new_mask: Any
    lengths: Any
    positions: Any
    identity: Any
    ones: Any
    sums: Any
    partials: Any


@dataclass
class Pools(nl.NKIObject):
    """Buffers of a launch. PSUM: moved, score, product and small take 3, 2, 2 and 1 banks, all there are.

    k, v: [128(token), run, E] operand type. moved, k_t: [width(d), parts, tiles of a bank, 128(token)] operand type.
    score: [128(key), G T, tiles of a bank] float32. product: [width(d), G T] float32, O^T. small: [128, 512] float32.
    scores, hidden, maxima, largest, p: see Segment. sums: as maxima, of p. stats: [128, G T] float32.
    """

    k: Pool
    v: Pool
    moved: Pool
    k_t: Pool
    score: Pool
    product: Pool
    small: Pool
    scores: Pool
    hidden: Pool
    maxima: Pool
    largest: Pool
    p: Pool
    sums: Pool
    stats: Pool


@nki.jit
def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, bucket: int
) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V of 1 to 8 new tokens per row, over cached keys and the new ones up to each query.

    Pseudocode, per core with its half of the positions:

        for each row, key-value head and segment of up to 16,384 positions:
            for each 128 keys:                                     # on the partitions
                s[keys] = K^T[keys]^T Q^T / sqrt(E) + hidden       # K is transposed by the Tensor engine
            m = max(s)                                             # over tiles, then over partitions by a transpose
            for each 128 keys:
                p[keys] = exp(s[keys] - m), l += p[keys]
                O^T += V[keys]^T p[keys]                           # in PSUM, no transpose of p
            l = ones^T l                                           # over partitions
        merge (m, l, O^T) of the segments, then of the cores; out = O / l

    Dimensions:
        B rows, T new tokens, M key-value heads, N = M G query heads, P positions of the cache, E head dim.

    Args:
        q: [B, N, T, E] float32 or bfloat16, after its norm and rotary embedding, not scaled.
        k, v: [B, M, T, E], the same type: the new tokens, which are not in the cache yet.
        k_cache, v_cache: [slots, M, P, E], the same type; row b is in slot b.
        lengths: [B] int32: row b sees positions below lengths[b] of its slot.
        bucket: positions of the cache that are read, a multiple of 128 up to P; every length is at most that.

    Returns:
        out: [B, N, T, E] in the type of q.

    Notes:
        Launch grid: none, 1, or 2 for LNC=2, whose cores exchange their partial results once.
        E is 64, 128 or 256; T is at most 8, G T at most 48, B N T at most 512, B M T at most 128.
        The cache is read whole, not cut to the bucket before: a cut would be a copy.
        Cached values that are hidden must be finite: a probability of zero times an infinite value is not zero.
        Scores, maximum, sum and accumulation are float32; with bfloat16 inputs p is rounded once.
        Time, modelled by nki_emulator and not measured on a device: benchmarks/bench_kernels.py.
        Loops are unrolled: 6 instructions of the Tensor engine for each 128 keys.
    """
    B, N, T, E = q.shape
    M = k.shape[1]
    _check(q, k, v, k_cache, v_cache, lengths, bucket)
    out = nl.ndarray(q.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    core, cores = nl.program_id(0), nl.num_programs(0)

    slabs = _deal_slabs(bucket, core, cores, B * M, N // M * T, E, q.dtype)
    segments = _make_segments(slabs, B, M, core + 1 == cores)
    partials = len(segments) // (B * M)
    pools = _make_pools(slabs, N // M * T, E, q.dtype)
    operands = _load_operands(q, k, v, k_cache, v_cache, lengths, slabs, partials, pools)
    # Scores run two segments ahead of V p, and K^T two banks ahead of scores: no engine waits for what is in between.
    keys = KeyQueue(banks=[], scored=0)
    for i in range(len(segments) + 2):
        if i < len(segments):
            _score_segment(segments[i], keys, operands, pools)
        if i >= 1 and i - 1 < len(segments):
            _score_until(segments[i - 1].last_bank, keys, operands, pools)
            _reduce_maxima(segments[i - 1], operands, pools)
        if i >= 2:
            _multiply_segment(segments[i - 2], operands, pools)
        if i >= 1 and i - 1 < len(segments):
            _exponentiate(segments[i - 1], operands, pools)
    _total(operands, pools)
    result = _merge(operands.partials, partials)
    if cores > 1:
        both = nl.ndarray((TILE, cores, 2 + parts(E), B * N * T), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=both[:, 0, :, :], src=result[:, 0, :, :], engine=nisa.engine.vector)
        other = 1 - core
        nisa.sendrecv(dst=both[:, 1, :, :], src=both[:, 0, :, :], send_to_rank=other, recv_from_rank=other, pipe_id=0)
        result = _merge(both, cores)
    _store(result, out, operands, pools, core, cores)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, bucket: int) -> None:
    """Shapes and types that the kernel takes."""
    B, N, T, E = q.shape
    M = k.shape[1]
    check_heads(N, M, E)
    check_dtypes(q.dtype, k.dtype, v.dtype)
    check_cache(q, k, v, k_cache, v_cache, lengths, bucket)
    assert T <= MAX_TOKENS, f"T={T}: 1 to {MAX_TOKENS} new tokens are needed"
    queries = N // M * T
    assert queries <= MAX_QUERIES, f"{queries} queries of a key-value head: at most {MAX_QUERIES} are possible"
    assert B * N * T <= MAX_COLUMNS, f"{B * N * T} queries in all rows: at most {MAX_COLUMNS} are possible"
    assert B * M * T <= TILE, f"{B * M * T} new keys in all rows: at most {TILE} are possible"


def _bank_tiles(E: int, dtype: Any) -> int:
    """Key tiles whose K^T fills one bank of PSUM."""
    return PSUM_BANK_BYTES // (parts(E) * TILE * item_bytes(dtype))


def _deal_slabs(bucket: int, core: int, cores: int, heads: int, queries: int, E: int, dtype: Any) -> list[Slab]:
    """The slabs of this core for each of `heads`: the first core has the first positions, and a tile more if odd."""
    tiles = bucket // TILE
    share = (tiles + cores - 1) // cores
    first, last = core * share, min(tiles, core * share + share)
    longest = min(RUN_BYTES // (E * item_bytes(dtype)), max(1, (last - first) * heads // SLABS))
    # Scores of three segments and p of two are kept.
    segment = min(SEGMENT, SCORE_BYTES // (queries * (3 * 4 + 2 * item_bytes(dtype))))
    slabs = []
    column = 0
    while first < last:
        place = column % segment
        run = min(longest, last - first, segment - place)
        slabs.append(Slab(first=first * TILE, run=run, column=column, place=place))
        first += run
        column += run
    return slabs


def _make_segments(slabs: list[Slab], B: int, M: int, has_new: bool) -> list[Segment]:
    """The segments of every row and head, in order; the last one of each has the new tokens, if this core has them."""
    groups: list[list[Slab]] = [[]]
    for slab in slabs:
        if slab.column > 0 and slab.place == 0:
            groups.append([])
        groups[len(groups) - 1].append(slab)
    segments = []
    for b in range(B):
        for m in range(M):
            for i in range(len(groups)):
                tiles = 0
                for slab in groups[i]:
                    tiles += slab.run
                is_last = i + 1 == len(groups)
                segments.append(Segment(b=b, m=m, partial=i, slabs=groups[i], tiles=tiles, has_new=has_new and is_last))
    return segments


def _make_pools(slabs: list[Slab], queries: int, E: int, dtype: Any) -> Pools:
    """Buffers for the slabs of this core; `queries` is G T."""
    bank = _bank_tiles(E, dtype)
    run, tiles = 1, 0
    for slab in slabs:
        run, tiles = max(run, slab.run), max(tiles, slab.place + slab.run)
    spans = min(len(slabs), tiles) + 1
    tiles += 1  # of the new tokens
    return Pools(
        k=make_pool(KEY_SLABS, (TILE, run, E), dtype, nl.sbuf),
        v=make_pool(VALUE_SLABS, (TILE, run, E), dtype, nl.sbuf),
        moved=make_pool(KEY_LEAD + 1, (width(E), parts(E), bank, TILE), dtype, nl.psum),
        k_t=make_pool(KEY_LEAD + 1, (width(E), parts(E), bank, TILE), dtype, nl.sbuf),
        score=make_pool(2, (TILE, queries, bank), nl.float32, nl.psum),
        product=make_pool(2, (width(E), queries), nl.float32, nl.psum),
        small=make_pool(1, (TILE, 4 * TILE), nl.float32, nl.psum),
        scores=make_pool(3, (TILE, queries, tiles), nl.float32, nl.sbuf),
        hidden=make_pool(2, (TILE, tiles), nl.float32, nl.sbuf),
        maxima=make_pool(3, (TILE, queries, spans), nl.float32, nl.sbuf),
        largest=make_pool(2, (TILE, 1), nl.float32, nl.sbuf),
        p=make_pool(2, (TILE, queries, tiles), dtype, nl.sbuf),
        sums=make_pool(2, (TILE, queries, spans), nl.float32, nl.sbuf),
        stats=make_pool(3, (TILE, queries), nl.float32, nl.sbuf),
    )


# --- Operands ---------------------------------------------------------------------------------------------------------
def _load_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    slabs: list[Slab],
    partials: int,
    pools: Pools,
) -> Operands:
    """Everything but the cache, and the constants."""
    B, N, T, E = q.shape
    M = k.shape[1]
    whole_numbers = nl.ndarray((TILE, B), dtype=nl.int32, buffer=nl.sbuf)
    lengths_column = nl.ndarray((TILE, B), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=whole_numbers, src=lengths.ap(pattern=[[0, TILE], [1, B]], offset=0))  # on every partition
    nisa.tensor_copy(dst=lengths_column, src=whole_numbers, engine=nisa.engine.vector)
    new_v = nl.ndarray((T, B * M, E), dtype=v.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=new_v, src=v.ap(pattern=[[E, T], [T * E, B * M], [1, E]], offset=0))
    ones = nl.ndarray((TILE, TILE), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0, engine=nisa.engine.vector)
    return Operands(
        k_cache=k_cache,
        v_cache=v_cache,
        queries=N // M * T,
        heads=M,
        q_t=_load_transposed(q, pools),
        new_k_t=_load_transposed(k, pools),
        new_v=new_v,
        new_mask=_make_new_mask(T, N // M),
        lengths=lengths_column,
        positions=_make_positions(slabs),
        identity=make_identity(TILE, nl.float32),
        ones=ones,
        sums=nl.ndarray((TILE, partials, B * N * T), dtype=nl.float32, buffer=nl.sbuf),
        partials=nl.ndarray((TILE, partials, 2 + parts(E), B * N * T), dtype=nl.float32, buffer=nl.sbuf),
    )


def _load_transposed(x: Tensor, pools: Pools) -> Tensor:
    """x [B, H, T, E] as [width(d), parts, B H T] on chip."""
    B, H, T, E = x.shape
    columns = B * H * T
    x_t = nl.ndarray((width(E), parts(E), columns), dtype=x.dtype, buffer=nl.sbuf)
    for first in range(0, columns, TILE):
        count = min(TILE, columns - first)
        rows = nl.ndarray((TILE, E), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=rows[0:count, :], src=x.ap(pattern=[[E, count], [1, E]], offset=first * E))
        for part in range(parts(E)):
            moved = take(pools.moved)[:, 0, 0, 0:count]
            nisa.nc_transpose(
                dst=moved, data=rows[0:count, part * TILE : part * TILE + width(E)], engine=nisa.engine.tensor
            )
            nisa.tensor_copy(dst=x_t[:, part, first : first + count], src=moved, engine=nisa.engine.vector)
    return x_t


def _make_new_mask(T: int, G: int) -> Tensor:
    """[T(key), G T] float32 of the new tokens: MASKED where the key comes after the query."""
    zeros = nl.ndarray((T, G * T), dtype=nl.float32, buffer=nl.sbuf)
    mask = nl.ndarray((T, G * T), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=zeros, value=0.0, engine=nisa.engine.vector)
    nisa.affine_select(
        dst=mask,
        pattern=[[0, G], [1, T]],
        channel_multiplier=-1,
        on_true_tile=zeros,
        on_false_value=MASKED,
        cmp_op=nl.greater_equal,
    )
    return mask


def _make_positions(slabs: list[Slab]) -> Any:
    """[128, tiles] float32: the position of the token of each partition and key tile; None without slabs."""
    if len(slabs) == 0:
        return None
    last = slabs[len(slabs) - 1]
    positions = nl.ndarray((TILE, last.column + last.run), dtype=nl.float32, buffer=nl.sbuf)
    for slab in slabs:
        nisa.iota(
            dst=positions[:, slab.column : slab.column + slab.run],
            pattern=[[1, slab.run]],
            offset=slab.first,
            channel_multiplier=slab.run,
        )
    return positions


# --- A segment --------------------------------------------------------------------------------------------------------
def _score_segment(segment: Segment, keys: KeyQueue, operands: Operands, pools: Pools) -> None:
    """Scaled and masked scores of a segment and the maxima of its slabs; its last KEY_LEAD banks are left waiting."""
    E = operands.k_cache.shape[3]
    segment.scores, segment.hidden, segment.maxima = take(pools.scores), take(pools.hidden), take(pools.maxima)
    if segment.tiles > 0:
        start = segment.slabs[0].column
        nisa.tensor_scalar(
            dst=segment.hidden[:, 0 : segment.tiles],
            data=operands.positions[:, start : start + segment.tiles],
            op0=nl.greater_equal,
            operand0=operands.lengths[:, segment.b : segment.b + 1],
            op1=nl.multiply,
            operand1=MASKED,
        )
    if segment.has_new:
        _score_new(segment, operands, pools)
    bank = _bank_tiles(E, operands.k_cache.dtype)
    for i in range(len(segment.slabs)):
        slab = segment.slabs[i]
        k_rows = take(pools.k)
        nisa.dma_copy(dst=k_rows[:, 0 : slab.run, :], src=_slab_of(operands.k_cache, slab, segment))
        for first in range(0, slab.run, bank):
            count = min(bank, slab.run - first)
            k_t = _transpose_keys(k_rows, first, count, E, pools)
            keys.banks.append(KeyBank(segment=segment, k_t=k_t, slab=i, first=first, count=count))
            _score_until(len(keys.banks) - KEY_LEAD, keys, operands, pools)
    segment.last_bank = len(keys.banks)


def _score_until(count: int, keys: KeyQueue, operands: Operands, pools: Pools) -> None:
    """Score waiting banks until `count` of the launch are scored."""
    for i in range(keys.scored, count):
        _score_bank(keys.banks[i], operands, pools)
    keys.scored = max(keys.scored, count)


def _slab_of(cache: Tensor, slab: Slab, segment: Segment) -> Tensor:
    """[128, run, E] of the cache [slots, M, P, E]: what partition p loads is consecutive."""
    _, M, P, E = cache.shape
    start = ((segment.b * M + segment.m) * P + slab.first) * E
    return cache.ap(pattern=[[slab.run * E, TILE], [E, slab.run], [1, E]], offset=start)


def _transpose_keys(k_rows: Tensor, first: int, count: int, E: int, pools: Pools) -> Tensor:
    """K^T [width(d), parts, count, 128(token)] of tiles `first`.. of a slab."""
    moved, k_t = take(pools.moved), take(pools.k_t)
    for part in range(parts(E)):
        for c in range(count):
            columns = k_rows[:, first + c, part * TILE : part * TILE + width(E)]
            nisa.nc_transpose(dst=moved[:, part, c, :], data=columns, engine=nisa.engine.tensor)
    # Vector and Scalar in turn: either alone takes longer than the keys take to arrive.
    engine = nisa.engine.vector if pools.k_t.taken % 2 == 0 else nisa.engine.scalar
    nisa.tensor_copy(dst=k_t[:, :, 0:count, :], src=moved[:, :, 0:count, :], engine=engine)
    return k_t


def _score_bank(keys: KeyBank, operands: Operands, pools: Pools) -> None:
    """Scores of the keys of a bank; after the last of a slab, the maxima of that slab."""
    segment = keys.segment
    E, queries, count = operands.k_cache.shape[3], operands.queries, keys.count
    slab = segment.slabs[keys.slab]
    column = slab.place + keys.first
    query = (segment.b * operands.heads + segment.m) * queries
    score = take(pools.score)
    for c in range(count):
        for part in range(parts(E)):
            nisa.nc_matmul(
                dst=score[:, :, c],
                stationary=keys.k_t[:, part, c, :],
                moving=operands.q_t[:, part, query : query + queries],
                accumulate=part > 0,
            )
    tiles = segment.hidden.shape[1]
    nisa.scalar_tensor_tensor(
        dst=segment.scores[:, :, column : column + count],
        data=score[:, :, 0:count],
        op0=nl.multiply,
        operand0=E**-0.5,
        op1=nl.add,
        operand1=segment.hidden.ap(pattern=[[tiles, TILE], [0, queries], [1, count]], offset=column),
    )
    if keys.first + count == slab.run:
        _reduce_span(segment.maxima, nl.maximum, segment.scores, slab.place, slab.run, keys.slab)


def _score_new(segment: Segment, operands: Operands, pools: Pools) -> None:
    """Scores of the new tokens, the last column of the segment; partitions beyond them are masked."""
    E, queries = operands.k_cache.shape[3], operands.queries
    T = operands.new_v.shape[0]
    head = segment.b * operands.heads + segment.m
    score = take(pools.score)
    for part in range(parts(E)):
        nisa.nc_matmul(
            dst=score[0:T, :, 0],
            stationary=operands.new_k_t[:, part, head * T : head * T + T],
            moving=operands.q_t[:, part, head * queries : head * queries + queries],
            accumulate=part > 0,
        )
    nisa.memset(dst=segment.scores[:, :, segment.tiles], value=MASKED, engine=nisa.engine.gpsimd)
    nisa.scalar_tensor_tensor(
        dst=segment.scores[0:T, :, segment.tiles],
        data=score[0:T, :, 0],
        op0=nl.multiply,
        operand0=E**-0.5,
        op1=nl.add,
        operand1=operands.new_mask,
    )
    _reduce_span(segment.maxima, nl.maximum, segment.scores, segment.tiles, 1, len(segment.slabs))


def _reduce_span(dst: Tensor, op: Any, values: Tensor, column: int, count: int, span: int) -> None:
    """dst[:, :, span] is the reduction of columns of values [128, G T, tiles]."""
    nisa.tensor_reduce(dst=dst[:, :, span], op=op, data=values[:, :, column : column + count], axis=2)


def _reduce_maxima(segment: Segment, operands: Operands, pools: Pools) -> None:
    """The maximum of all keys of a segment, [G T, 1]."""
    queries = operands.queries
    of_partition = take(pools.stats)
    _reduce_span(of_partition.reshape((TILE, queries, 1)), nl.maximum, segment.maxima, 0, len(segment.spans()), 0)
    turned = pools.small.tiles[0][0:queries, 0:TILE]
    nisa.nc_transpose(dst=turned, data=of_partition, engine=nisa.engine.tensor)
    segment.largest = take(pools.largest)
    nisa.tensor_reduce(dst=segment.largest[0:queries, :], op=nl.maximum, data=turned, axis=1)


def _exponentiate(segment: Segment, operands: Operands, pools: Pools) -> None:
    """p of a segment, and the sums of its partitions and its maximum, to the partial results."""
    queries = operands.queries
    first = (segment.b * operands.heads + segment.m) * queries
    # ones^T diag(m) has the maxima on every partition.
    diagonal, maximum = take(pools.stats), take(pools.stats)
    nisa.tensor_scalar(
        dst=diagonal[0:queries, :],
        data=operands.identity[0:queries, 0:queries],
        op0=nl.multiply,
        operand0=segment.largest[0:queries, :],
    )
    spread = pools.small.tiles[0][:, TILE : TILE + queries]
    nisa.nc_matmul(
        dst=spread,
        stationary=operands.ones[0:queries, :],
        moving=diagonal[0:queries, :],
        is_stationary_onezero=True,
        accumulate=False,
    )
    nisa.tensor_copy(dst=maximum, src=spread, engine=nisa.engine.vector)
    segment.p, sums = take(pools.p), take(pools.sums)
    spans = segment.spans()
    for i in range(len(spans)):
        column, count = spans[i]
        scores = segment.scores[:, :, column : column + count]
        nisa.tensor_tensor(
            dst=scores,
            data1=scores,
            data2=maximum.ap(pattern=[[queries, TILE], [1, queries], [0, count]], offset=0),
            op=nl.subtract,
        )
        nisa.activation(dst=segment.p[:, :, column : column + count], op=nl.exp, data=scores)
        _reduce_span(sums, nl.add, segment.p, column, count, i)
    place = operands.partials[:, segment.partial, 0, first : first + queries]
    nisa.tensor_copy(dst=place, src=maximum, engine=nisa.engine.gpsimd)
    nisa.tensor_reduce(
        dst=operands.sums[:, segment.partial, first : first + queries],
        op=nl.add,
        data=sums[:, :, 0 : len(spans)],
        axis=2,
    )


def _multiply_segment(segment: Segment, operands: Operands, pools: Pools) -> None:
    """O^T of a segment, to the partial results."""
    E, queries = operands.k_cache.shape[3], operands.queries
    head = segment.b * operands.heads + segment.m
    products = []
    for _ in range(parts(E)):
        products.append(take(pools.product))
    for slab in segment.slabs:
        v_rows = take(pools.v)
        nisa.dma_copy(dst=v_rows[:, 0 : slab.run, :], src=_slab_of(operands.v_cache, slab, segment))
        for c in range(slab.run):
            column = slab.place + c
            _multiply_tile(products, v_rows[:, c, :], segment.p[:, :, column], column == 0)
    if segment.has_new:
        T, column = operands.new_v.shape[0], segment.tiles
        _multiply_tile(products, operands.new_v[:, head, :], segment.p[0:T, :, column], column == 0)
    for part in range(parts(E)):
        place = operands.partials[0 : width(E), segment.partial, 2 + part, head * queries : head * queries + queries]
        nisa.tensor_copy(dst=place, src=products[part], engine=nisa.engine.scalar)


def _multiply_tile(products: list[Any], values: Tensor, p: Tensor, is_first: bool) -> None:
    """O^T [width(d), G T] of each part of the head dim += values [128(key), E]^T p [128(key), G T]."""
    E = values.shape[1]
    for part in range(parts(E)):
        nisa.nc_matmul(
            dst=products[part],
            stationary=values[:, part * TILE : part * TILE + width(E)],
            moving=p,
            accumulate=not is_first,
        )


# --- Partial results --------------------------------------------------------------------------------------------------
def _total(operands: Operands, pools: Pools) -> None:
    """Sums of p over partitions, on every partition of the partial results: one matmul with ones for each."""
    _, partials, W = operands.sums.shape
    for i in range(partials):
        total = pools.small.tiles[0][:, 0:W]
        nisa.nc_matmul(
            dst=total,
            stationary=operands.ones,
            moving=operands.sums[:, i, :],
            is_stationary_onezero=True,
            accumulate=False,
        )
        nisa.tensor_copy(dst=operands.partials[:, i, 1, :], src=total, engine=nisa.engine.vector)


def _merge(partials: Tensor, count: int) -> Tensor:
    """One partial result [128, 1, 2 + parts, W] of `count`: of each query the same maximum, sum and O^T of all keys."""
    if count == 1:
        return partials
    _, _, fields, W = partials.shape
    row = count * fields * W
    merged = nl.ndarray((TILE, 1, fields, W), dtype=nl.float32, buffer=nl.sbuf)
    weights = nl.ndarray((TILE, count, W), dtype=nl.float32, buffer=nl.sbuf)
    maxima = partials.ap(pattern=[[row, TILE], [1, W], [fields * W, count]], offset=0)
    nisa.tensor_reduce(dst=merged[:, 0, 0, :], op=nl.maximum, data=maxima, axis=2)
    nisa.tensor_tensor(
        dst=weights,
        data1=partials[:, :, 0, :],
        data2=merged.ap(pattern=[[fields * W, TILE], [0, count], [1, W]], offset=0),
        op=nl.subtract,
    )
    nisa.activation(dst=weights, op=nl.exp, data=weights)
    nisa.tensor_tensor(
        dst=partials[:, :, 1:fields, :],
        data1=partials[:, :, 1:fields, :],
        data2=weights.ap(pattern=[[count * W, TILE], [W, count], [0, fields - 1], [1, W]], offset=0),
        op=nl.multiply,
    )
    weighted = partials.ap(pattern=[[row, TILE], [1, (fields - 1) * W], [fields * W, count]], offset=W)
    nisa.tensor_reduce(dst=merged[:, 0, 1:fields, :], op=nl.add, data=weighted, axis=2)
    return merged


def _store(result: Tensor, out: Tensor, operands: Operands, pools: Pools, core: int, cores: int) -> None:
    """out = O / l: parts of the head dim, and blocks of 128 queries, are dealt to the cores in turn."""
    _, _, _, E = out.shape
    W = result.shape[3]
    inverse = nl.ndarray((TILE, W), dtype=nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=result[:, 0, 1, :])
    dealt = 0
    for first in range(0, W, TILE):
        count = min(TILE, W - first)
        for part in range(parts(E)):
            dealt += 1
            if dealt % cores == core:
                normed = nl.ndarray((width(E), count), dtype=nl.float32, buffer=nl.sbuf)
                nisa.tensor_tensor(
                    dst=normed,
                    data1=result[0 : width(E), 0, 2 + part, first : first + count],
                    data2=inverse[0 : width(E), first : first + count],
                    op=nl.multiply,
                )
                moved = pools.small.tiles[0][0:count, 0 : width(E)]
                nisa.nc_transpose(dst=moved, data=normed, engine=nisa.engine.tensor)
                rows = nl.ndarray((count, width(E)), dtype=out.dtype, buffer=nl.sbuf)
                nisa.tensor_copy(dst=rows, src=moved, engine=nisa.engine.vector)
                place = out.ap(pattern=[[E, count], [1, width(E)]], offset=first * E + part * TILE)
                nisa.dma_copy(dst=place, src=rows)
