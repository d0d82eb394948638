# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Continuation of a prompt: attention of a chunk of tokens to the cache and to each other.

The specification is `qwen35.ops.cached_attention`. The cached keys come in steps of a loop that runs on the device
(nki/deep-dives/nki-dynamic-loops.rst), as often as a row has keys: the program is the same for every length.
"""

from dataclasses import dataclass
from typing import Any

from .attention_pieces import (
    TILE,
    Pool,
    check_cache,
    check_dtypes,
    check_heads,
    make_pool,
    parts,
    restart,
    take,
    width,
)
from .common import Tensor
from .nki_seam import nisa, nki, nl

GROUP = 4
"""Key tiles of a block: its 512 float32 scores per query fill one PSUM bank of 2 KiB
(nki/guides/architecture/trainium_inferentia2_arch.rst, PSUM)."""

STEP_TILES = 16
"""Key tiles of a step of the loop. Each step finds maxima anew and rescales what was summed: the longer the better."""

LOOKAHEAD = 2
"""Rows by which scores run ahead of P V, so that the Tensor engine need not wait for maximum, exp and transpose."""

MAX_TOKENS = 2048
"""Longest chunk in bfloat16; half of it in float32. SBUF then holds Q^T and O of all rows of a core."""

MAX_QUERIES = 12288
"""Most queries of a core that share a key-value head in bfloat16; half of them in float32: 6 heads of MAX_TOKENS."""

LOWEST = -1e30
"""The maximum before any key, negated and scaled below: what is summed so far, nothing, gets the weight exp(-1e30)."""

MAX_ROWS = 16777216
"""Of the cache: float32 counts them, up to 2^24."""

UNBOUNDED = 1e9
"""A bound beyond every key."""


@dataclass
class Row(nl.NKIObject):
    """128 queries of one head on their way through one step; index is its place in `State`.

    stats: [128(q), blocks + 4] float32: maxima of the blocks, their maximum, -E^-0.5 times the new maximum, the
    weight of what was summed before, the sum of p. scores: [128(q), keys] float32. p: the same, operand type.
    o: [128(q), E] float32 in PSUM.
    """

    head: int
    tile: int
    index: int
    stats: Any = None
    scores: Any = None
    p: Any = None
    o: Any = None


@dataclass
class Keys(nl.NKIObject):
    """Keys of one step: the new ones, or some of the cache.

    k_t: [width(d), parts, 128 tiles] operand type. v: [128(token), tiles, E]. low, high: [128, 1] float32, the first
    visible key of the step and the one after the last; None for the new ones, of which a query sees those up to itself.
    """

    k_t: Any
    v: Any
    tiles: int
    low: Any = None
    high: Any = None


@dataclass
class State(nl.NKIObject):
    """What the rows of a core carry from step to step.

    q_t: [width(d), parts, rows, 128(q)] operand type. negative: [128(q), rows] float32, -E^-0.5 times the maximum.
    total: [128(q), rows] float32. o: [128(q), rows, E] float32. bounds: [128(q), GROUP + 2] float32: 0, the keys that
    a query sees of a block whose tile 0, 1, 2, 3 is its own, UNBOUNDED.
    """

    q_t: Any
    negative: Any
    total: Any
    o: Any
    bounds: Any


@dataclass
class Place(nl.NKIObject):
    """Where the loop is in the cache. A step moves it on as it begins, to what the next one will read.

    position: [128, 1] float32, the first key of the next step. start: [128, 1] float32, where it reads from: the same,
    but for a last step that would go beyond the bucket. k_offset, v_offset: [1, 1] int32, the row of the cache
    [slots M P, E] at which the next step reads keys, and this one values. low, high: see Keys, of this step. length,
    base, stride, last: [128, 1] float32, lengths[b], first row of the slot and head, keys of a step, largest start.
    """

    position: Any
    start: Any
    k_offset: Any
    v_offset: Any
    low: Any
    high: Any
    length: Any
    base: Any
    stride: Any
    last: Any


@dataclass
class Pools(nl.NKIObject):
    """Buffers of a launch. PSUM: score, moved and product take 3, 3 and 2 banks, all there are.

    score: [128, 512] float32. moved: [128, 4, 128] operand type. product: [128, E] float32.
    rows: [128, E] operand type. p_t: [128, 4, 128], p: [128, keys], out: [128, E], all operand type.
    scores: [128, keys] float32. stats: see Row. k_rows, k_t, v: of a step, see Keys.
    """

    score: Pool
    moved: Pool
    product: Pool
    rows: Pool
    p_t: Pool
    p: Pool
    out: Pool
    scores: Pool
    stats: Pool
    k_rows: Tensor
    k_t: Tensor
    v: Tensor


@nki.jit
def attention_continuation(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, slots: Tensor, bucket: int
) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V of a chunk per row, over cached keys and the new ones up to each query.

    Pseudocode, per core with its rows (a row is 128 queries of one head):

        m = -inf, l = 0, O = 0 for each row
        for the new keys, then on the device for each 2,048 cached keys up to lengths[b]:
            K^T = transpose(K)                                  # once for all rows
            for each row:
                for each block of 512 keys:
                    s[block] = Q K[block]^T                     # two matmuls of contraction 128 where E is 256
                    hide keys beyond the length, or future ones; m[block] = max(s[block])   # one instruction
                m' = max(m, max(m[blocks])); a = exp((m - m') / sqrt(E)); m = m'
                p = exp((s - m) / sqrt(E)), l = a l + sum(p)
                O = a O + sum of transpose(p[block])^T V[block] # summed over the blocks in PSUM
        out = O / l

    Dimensions:
        B rows, S new tokens, M key-value heads, N = M G query heads, P positions of the cache, E head dim.

    Args:
        q: [B, N, S, E] float32 or bfloat16, after its norm and rotary embedding, not scaled.
        k, v: [B, M, S, E], the same type: the new tokens, which are not in the cache yet.
        k_cache, v_cache: [all slots, M, P, E], the same type; they have less than 2^24 rows of E.
        lengths: [B] int32: row b sees positions below lengths[b] of its slot.
        slots: [B] int32, the slot of each row. Values of the device, so that the cache is read where it is.
        bucket: positions that are ever read, a multiple of 128 up to P; every length is at most that.

    Returns:
        out: [B, N, S, E] in the type of q.

    Notes:
        Launch grid: none, 1, or 2 for LNC=2, which deals the rows to the cores in turn; each core transposes all keys,
        both make the same steps, and they exchange nothing.
        E is 64, 128 or 256; S is a multiple of 128, at most 2048 (1024 in float32). Pad on the right.
        S G queries are dealt to the cores, at most 12288 to one (6144 in float32).
        Cached values that are hidden must be finite: a probability of zero times an infinite value is not zero.
        Scores, maximum, sum and accumulation are float32; with bfloat16 inputs p is rounded once.
        Time, modelled by nki_emulator and not measured on a device: benchmarks/bench_kernels.py. The emulator lets a
        step begin while the one before ends, as the engines' own queues allow.
        The loop is nl.dynamic_range, the one form of NKI 0.3.0 to 0.5.0; 0.6.0 deprecates it for nl.fori_loop, which
        these lack. In 0.3.0 its index cannot be an offset, so that a tensor counts, and accesses in the loop may race
        with those before it, which 0.4.0 mends (release-notes/components/nki.rst): do not use the kernel there.
        Code grows with S^2 for the new keys and with S for the loop, never with the cache.
    """
    B, N, S, E = q.shape
    M, G = k.shape[1], N // k.shape[1]
    _check(q, k, v, k_cache, v_cache, lengths, slots, bucket)
    P = k_cache.shape[2]
    k_cache_rows = k_cache.reshape((k_cache.shape[0] * M * P, E))
    v_cache_rows = v_cache.reshape((v_cache.shape[0] * M * P, E))
    out = nl.ndarray(q.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    core, cores = nl.program_id(0), nl.num_programs(0)

    step = min(STEP_TILES, bucket // TILE)
    count = (S // TILE * G + cores - 1) // cores
    pools = _make_pools(max(step, S // TILE), E, q.dtype)
    state = _make_state(count, E, q.dtype)
    place = _make_place(step * TILE, bucket)
    for b in range(B):
        length = _load_length(lengths, b, place)
        slot = _load_column(slots, b)
        for m in range(M):
            rows: list[Row] = []
            for i in range(S // TILE * G):
                if i % cores == core:
                    rows.append(Row(head=m * G + i % G, tile=i // G, index=len(rows)))
            # With 128 queries of one head, the second core has no row.
            if len(rows) > 0:
                _begin(rows, b, q, state, pools)
                _load_new_keys(k, v, b, m, pools)
                _rewind(place, slot, M * P, m * P)
                _load_cached(k_cache_rows, place.k_offset, step, pools.k_rows)
                _attend(rows, Keys(k_t=pools.k_t, v=pools.v, tiles=S // TILE), state, pools)
                for _ in nl.dynamic_range(0, length, step * TILE):
                    # K came while the step before was at work, and V has time until the first scores are through.
                    _transpose_keys(step, E, pools)
                    _move_on(place)
                    _load_cached(v_cache_rows, place.v_offset, step, pools.v)
                    _load_cached(k_cache_rows, place.k_offset, step, pools.k_rows)
                    cached = Keys(k_t=pools.k_t, v=pools.v, tiles=step, low=place.low, high=place.high)
                    _attend(rows, cached, state, pools)
                _store(rows, b, out, state, pools)
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, slots: Tensor, bucket: int
) -> None:
    """Shapes and types that the kernel takes."""
    B, N, S, E = q.shape
    all_slots, M, P, _ = k_cache.shape
    check_heads(N, k.shape[1], E)
    check_dtypes(q.dtype, k.dtype, v.dtype)
    check_cache(q, k, v, k_cache, v_cache, lengths, bucket)
    assert slots.shape == (B,), f"slots has shape {slots.shape}, expected {(B,)} from q"
    assert all_slots * M * P < MAX_ROWS, f"the cache has {all_slots * M * P} rows: less than {MAX_ROWS} are possible"
    halving = 1 if q.dtype == nl.bfloat16 else 2
    limit = MAX_TOKENS // halving
    assert S % TILE == 0 and S <= limit, f"S={S}: a multiple of {TILE} up to {limit} is needed"
    cores = nl.num_programs(0)
    queries, limit = (S // TILE * (N // M) + cores - 1) // cores * TILE, MAX_QUERIES // halving
    assert queries <= limit, f"{queries} queries of a key-value head on a core: at most {limit} are possible"


# --- Buffers ----------------------------------------------------------------------------------------------------------
def _make_pools(tiles: int, E: int, dtype: Any) -> Pools:
    """Buffers for steps of up to `tiles` key tiles."""
    blocks = (tiles + GROUP - 1) // GROUP
    keys = tiles * TILE
    return Pools(
        score=make_pool(3, (TILE, GROUP * TILE), nl.float32, nl.psum),
        moved=make_pool(3, (TILE, GROUP, TILE), dtype, nl.psum),
        product=make_pool(2, (TILE, E), nl.float32, nl.psum),
        rows=make_pool(2, (TILE, E), dtype, nl.sbuf),
        p_t=make_pool(3, (TILE, GROUP, TILE), dtype, nl.sbuf),
        p=make_pool(LOOKAHEAD + 1, (TILE, keys), dtype, nl.sbuf),
        out=make_pool(2, (TILE, E), dtype, nl.sbuf),
        scores=make_pool(2, (TILE, keys), nl.float32, nl.sbuf),
        stats=make_pool(LOOKAHEAD + 2, (TILE, blocks + 4), nl.float32, nl.sbuf),
        k_rows=nl.ndarray((TILE, tiles, E), dtype=dtype, buffer=nl.sbuf),
        k_t=nl.ndarray((width(E), parts(E), keys), dtype=dtype, buffer=nl.sbuf),
        v=nl.ndarray((TILE, tiles, E), dtype=dtype, buffer=nl.sbuf),
    )


def _make_state(rows: int, E: int, dtype: Any) -> State:
    """Buffers for the rows of a core."""
    bounds = nl.ndarray((TILE, GROUP + 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=bounds[:, 0:1], value=0.0, engine=nisa.engine.vector)
    nisa.iota(dst=bounds[:, 1 : GROUP + 1], pattern=[[TILE, GROUP]], offset=1, channel_multiplier=1)
    nisa.memset(dst=bounds[:, GROUP + 1 : GROUP + 2], value=UNBOUNDED, engine=nisa.engine.vector)
    return State(
        q_t=nl.ndarray((width(E), parts(E), rows, TILE), dtype=dtype, buffer=nl.sbuf),
        negative=nl.ndarray((TILE, rows), dtype=nl.float32, buffer=nl.sbuf),
        total=nl.ndarray((TILE, rows), dtype=nl.float32, buffer=nl.sbuf),
        o=nl.ndarray((TILE, rows, E), dtype=nl.float32, buffer=nl.sbuf),
        bounds=bounds,
    )


def _make_place(keys: int, bucket: int) -> Place:
    """Columns that count through the cache in steps of `keys`."""
    columns = []
    for _ in range(8):
        columns.append(nl.ndarray((TILE, 1), dtype=nl.float32, buffer=nl.sbuf))
    nisa.memset(dst=columns[6], value=float(keys), engine=nisa.engine.gpsimd)
    nisa.memset(dst=columns[7], value=float(bucket - keys), engine=nisa.engine.gpsimd)
    return Place(
        position=columns[0],
        start=columns[1],
        k_offset=nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf),
        v_offset=nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf),
        low=columns[2],
        high=columns[3],
        length=columns[4],
        base=columns[5],
        stride=columns[6],
        last=columns[7],
    )


# --- The loop over the cache ------------------------------------------------------------------------------------------
def _load_column(values: Tensor, b: int) -> Tensor:
    """values[b] of [B] int32 on every partition: [128, 1]."""
    column = nl.ndarray((TILE, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=column, src=values.ap(pattern=[[0, TILE], [1, 1]], offset=b))
    return column


def _load_length(lengths: Tensor, b: int, place: Place) -> Any:
    """lengths[b] as a column, and in a register, which is returned."""
    column = _load_column(lengths, b)
    nisa.tensor_copy(dst=place.length, src=column, engine=nisa.engine.vector)
    length = nisa.register_alloc()
    nisa.register_load(length, column[0:1, 0:1])
    return length


def _rewind(place: Place, slot: Tensor, stride: int, first: int) -> None:
    """To the first cached key of a head, which begins `first` rows after its slot; slots are `stride` rows apart."""
    nisa.memset(dst=place.position, value=0.0, engine=nisa.engine.gpsimd)
    nisa.memset(dst=place.start, value=0.0, engine=nisa.engine.gpsimd)
    nisa.tensor_scalar(
        dst=place.base, data=slot, op0=nl.multiply, operand0=float(stride), op1=nl.add, operand1=float(first)
    )
    nisa.tensor_copy(dst=place.k_offset, src=place.base[0:1, :], engine=nisa.engine.gpsimd)


def _move_on(place: Place) -> None:
    """What this step sees, and where the next one reads; all on GpSimd, which has little else to do."""
    gpsimd = nisa.engine.gpsimd
    start, base = place.start[0:1, :], place.base[0:1, :]
    nisa.tensor_tensor(dst=place.low, data1=place.position, data2=place.start, op=nl.subtract, engine=gpsimd)
    nisa.tensor_tensor(dst=place.high, data1=place.length, data2=place.start, op=nl.subtract, engine=gpsimd)
    nisa.tensor_tensor(dst=place.v_offset, data1=start, data2=base, op=nl.add, engine=gpsimd)
    nisa.tensor_tensor(dst=place.position, data1=place.position, data2=place.stride, op=nl.add, engine=gpsimd)
    nisa.tensor_tensor(dst=place.start, data1=place.position, data2=place.last, op=nl.minimum, engine=gpsimd)
    nisa.tensor_tensor(dst=place.k_offset, data1=start, data2=base, op=nl.add, engine=gpsimd)


def _load_cached(rows: Tensor, offset: Tensor, tiles: int, dst: Tensor) -> None:
    """dst [128(token), tiles, E] from a row on of the cache [slots M P, E]."""
    E = rows.shape[1]
    pattern = [[E, TILE], [TILE * E, tiles], [1, E]]
    tokens = rows.ap(pattern=pattern, offset=0, scalar_offset=offset, indirect_dim=0)
    nisa.dma_copy(dst=dst[:, 0:tiles, :], src=tokens)


def _load_new_keys(k: Tensor, v: Tensor, b: int, m: int, pools: Pools) -> None:
    """K^T and V of the new tokens."""
    _, M, S, E = k.shape
    pattern = [[E, TILE], [TILE * E, S // TILE], [1, E]]
    first = (b * M + m) * S * E
    nisa.dma_copy(dst=pools.k_rows[:, 0 : S // TILE, :], src=k.ap(pattern=pattern, offset=first))
    nisa.dma_copy(dst=pools.v[:, 0 : S // TILE, :], src=v.ap(pattern=pattern, offset=first))
    _transpose_keys(S // TILE, E, pools)


def _transpose_keys(tiles: int, E: int, pools: Pools) -> None:
    """pools.k_t from pools.k_rows."""
    restart(pools.moved)
    for first in range(0, tiles, GROUP):
        count = min(GROUP, tiles - first)
        for part in range(parts(E)):
            moved = take(pools.moved)
            for c in range(count):
                columns = pools.k_rows[:, first + c, part * TILE : part * TILE + width(E)]
                nisa.nc_transpose(dst=moved[0 : width(E), c, :], data=columns, engine=nisa.engine.tensor)
            place = pools.k_t[:, part, first * TILE : (first + count) * TILE]
            engine = nisa.engine.vector if part == 0 else nisa.engine.scalar
            nisa.tensor_copy(dst=place, src=moved[0 : width(E), 0:count, :], engine=engine)


# --- A step -----------------------------------------------------------------------------------------------------------
def _begin(rows: list[Row], b: int, q: Tensor, state: State, pools: Pools) -> None:
    """Q^T of all rows, and nothing summed."""
    E = q.shape[3]
    nisa.memset(dst=state.negative, value=-LOWEST, engine=nisa.engine.gpsimd)
    nisa.memset(dst=state.total, value=0.0, engine=nisa.engine.gpsimd)
    nisa.memset(dst=state.o, value=0.0, engine=nisa.engine.gpsimd)
    for row in rows:
        q_rows, moved = take(pools.rows), take(pools.moved)
        nisa.dma_copy(dst=q_rows, src=q[b, row.head, row.tile * TILE : (row.tile + 1) * TILE, :])
        for part in range(parts(E)):
            columns = q_rows[:, part * TILE : part * TILE + width(E)]
            nisa.nc_transpose(dst=moved[0 : width(E), part, :], data=columns, engine=nisa.engine.tensor)
        place = state.q_t[:, :, row.index, :]
        nisa.tensor_copy(dst=place, src=moved[0 : width(E), 0 : parts(E), :], engine=nisa.engine.scalar)


def _attend(rows: list[Row], keys: Keys, state: State, pools: Pools) -> None:
    """One step of all rows. It takes the same buffers each time, as the body of a loop must."""
    for pool in (pools.score, pools.moved, pools.product, pools.p_t, pools.p, pools.scores, pools.stats):
        restart(pool)
    transposed = []  # blocks of p; the last one has yet to be multiplied
    for step in range(len(rows) + LOOKAHEAD):
        known, used = step - 1, step - LOOKAHEAD
        if known >= 0 and known < len(rows):
            _find_maximum(rows[known], keys, state, pools)
        for j in range((keys.tiles + GROUP - 1) // GROUP):
            if step < len(rows) and j < _blocks(rows[step], keys):
                _score_block(rows[step], j, keys, state, pools)
            if known >= 0 and known < len(rows) and j < _blocks(rows[known], keys):
                _exponentiate_block(rows[known], j, keys)
            if used >= 0 and j < _blocks(rows[used], keys):
                transposed.append((rows[used], j, _transpose_block(rows[used], j, keys, pools)))
                if len(transposed) > 1:
                    row, block, p_t = transposed[len(transposed) - 2]
                    _multiply_block(row, block, p_t, keys, state, pools)
        if known >= 0 and known < len(rows):
            _add_sum(rows[known], keys, state)
    row, block, p_t = transposed[len(transposed) - 1]
    _multiply_block(row, block, p_t, keys, state, pools)


def _visible(row: Row, keys: Keys) -> int:
    """Key tiles that a row reads."""
    return row.tile + 1 if keys.low == None else keys.tiles  # noqa: E711 # NKI has no 'is'


def _blocks(row: Row, keys: Keys) -> int:
    """Key blocks that a row reads."""
    return (_visible(row, keys) + GROUP - 1) // GROUP


def _tiles(row: Row, j: int, keys: Keys) -> int:
    """Key tiles of its block j."""
    return min(GROUP, _visible(row, keys) - j * GROUP)


def _score_block(row: Row, j: int, keys: Keys, state: State, pools: Pools) -> None:
    """Scores of one block, without E^-0.5, hidden ones replaced, and their maximum."""
    if j == 0:
        row.scores, row.stats = take(pools.scores), take(pools.stats)
    first, count = j * GROUP * TILE, _tiles(row, j, keys) * TILE
    E = keys.v.shape[2]
    score = take(pools.score)
    for part in range(parts(E)):
        nisa.nc_matmul(
            dst=score[:, 0:count],
            stationary=state.q_t[:, part, row.index, :],
            moving=keys.k_t[:, part, first : first + count],
            accumulate=part > 0,
        )
    if keys.low == None:  # noqa: E711 # NKI has no 'is'
        # The last block of a row ends with its own tile.
        own = row.tile % GROUP + 1 if j + 1 == _blocks(row, keys) else GROUP + 1
        low, high, start = state.bounds[:, 0:1], state.bounds[:, own : own + 1], 0
    else:
        low, high, start = keys.low, keys.high, first
    nisa.range_select(
        dst=row.scores[:, first : first + count],
        on_true_tile=score[:, 0:count],
        comp_op0=nl.greater_equal,
        comp_op1=nl.less,
        bound0=low,
        bound1=high,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
        reduce_res=row.stats[:, j : j + 1],
        reduce_op=nl.maximum,
        range_start=start,
    )


def _find_maximum(row: Row, keys: Keys, state: State, pools: Pools) -> None:
    """The new maximum, times -E^-0.5, and the weight of what was summed before."""
    n, scale = _blocks(row, keys), keys.v.shape[2] ** -0.5
    largest, negative, weight = row.stats[:, n : n + 1], row.stats[:, n + 1 : n + 2], row.stats[:, n + 2 : n + 3]
    old = state.negative[:, row.index : row.index + 1]
    row.p = take(pools.p)
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=row.stats[:, 0:n], axis=1)
    nisa.tensor_scalar(dst=negative, data=largest, op0=nl.multiply, operand0=-scale, op1=nl.minimum, operand1=old)
    nisa.activation(dst=weight, op=nl.exp, data=old, scale=-1.0, bias=negative)
    nisa.tensor_copy(dst=old, src=negative, engine=nisa.engine.gpsimd)


def _exponentiate_block(row: Row, j: int, keys: Keys) -> None:
    """p of one block; the sum goes on from the blocks before."""
    n, scale = _blocks(row, keys), keys.v.shape[2] ** -0.5
    first, count = j * GROUP * TILE, _tiles(row, j, keys) * TILE
    nisa.activation(
        dst=row.p[:, first : first + count],
        op=nl.exp,
        data=row.scores[:, first : first + count],
        bias=row.stats[:, n + 1 : n + 2],
        scale=scale,
        reduce_op=nl.add,
        reduce_res=row.stats[:, n + 3 : n + 4],
        reduce_cmd=nisa.reduce_cmd.reset_reduce if j == 0 else nisa.reduce_cmd.reduce,
    )


def _add_sum(row: Row, keys: Keys, state: State) -> None:
    """The sum of p, to what was summed before."""
    n, gpsimd = _blocks(row, keys), nisa.engine.gpsimd
    total = state.total[:, row.index : row.index + 1]
    nisa.tensor_tensor(dst=total, data1=total, data2=row.stats[:, n + 2 : n + 3], op=nl.multiply, engine=gpsimd)
    nisa.tensor_tensor(dst=total, data1=total, data2=row.stats[:, n + 3 : n + 4], op=nl.add, engine=gpsimd)


def _transpose_block(row: Row, j: int, keys: Keys, pools: Pools) -> Tensor:
    """P^T of one block: [128(key), tiles, 128(q)] operand type."""
    first, count = j * GROUP * TILE, _tiles(row, j, keys)
    moved, p_t = take(pools.moved), take(pools.p_t)
    for c in range(count):
        columns = row.p[:, first + c * TILE : first + (c + 1) * TILE]
        nisa.nc_transpose(dst=moved[:, c, :], data=columns, engine=nisa.engine.tensor)
    nisa.tensor_copy(dst=p_t[:, 0:count, :], src=moved[:, 0:count, :], engine=nisa.engine.scalar)
    return p_t


def _multiply_block(row: Row, j: int, p_t: Tensor, keys: Keys, state: State, pools: Pools) -> None:
    """O of the step += P V of one block; after the last one it is added to what was summed."""
    n = _blocks(row, keys)
    if j == 0:
        row.o = take(pools.product)
    for c in range(_tiles(row, j, keys)):
        nisa.nc_matmul(dst=row.o, stationary=p_t[:, c, :], moving=keys.v[:, j * GROUP + c, :], accumulate=j + c > 0)
    if j + 1 == n:
        o = state.o[:, row.index, :]
        nisa.scalar_tensor_tensor(
            dst=o, data=o, op0=nl.multiply, operand0=row.stats[:, n + 2 : n + 3], op1=nl.add, operand1=row.o
        )


def _store(rows: list[Row], b: int, out: Tensor, state: State, pools: Pools) -> None:
    """out = O / l."""
    nisa.reciprocal(dst=state.total[:, 0 : len(rows)], data=state.total[:, 0 : len(rows)])
    for row in rows:
        o = take(pools.out)
        nisa.activation(
            dst=o, op=nl.copy, data=state.o[:, row.index, :], scale=state.total[:, row.index : row.index + 1]
        )
        nisa.dma_copy(dst=out[b, row.head, row.tile * TILE : (row.tile + 1) * TILE, :], src=o)
