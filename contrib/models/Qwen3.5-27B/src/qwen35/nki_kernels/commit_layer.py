# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""After verification: the states of a DeltaNet layer moved on by the tokens that were accepted, in one launch.

Letters: B batch, T tokens, H value heads, Hk key heads, R = H / Hk, K key dim and V value dim, both 128, W conv kernel,
Ch = 2 Hk K + H V conv channels, n heads of a group.

The specification is `commit_delta_rule` and `commit_conv` of `qwen35.ops`. With m accepted tokens, the rank-m update

    S <- exp(g_1 + ... + g_m) S + sum over t <= m of exp(g_{t+1} + ... + g_m) k_t u_t^T

is one matmul for each row of the packed state: tokens that were not accepted have g = 0 and a factor of 0.

The state is packed as in `decode_layer`. A *row* is one token of one head: those of a group lie on n T partitions from
a multiple of `pitch` on, in the order (head, token), and several groups share a tile; see `Layout`.
"""

from dataclasses import dataclass

from .common import PARTITIONS, Tensor
from .decode_io import (
    Box,
    first_head,
    heads_per_group,
    heads_per_sequence,
    load_inputs_of_conv,
    load_states,
    packed_rows,
    rows_per_sequence,
    share_of_core,
    store_conv,
)
from .nki_seam import nisa, nki, nl
from .verify_layer import MOST_TOKENS


@dataclass
class Layout(nl.NKIObject):
    """Where the rows of a group lie: group i of a sequence on partitions from (i % slots) pitch on.

    A column has groups of one sequence, because a matmul over its rows multiplies what it does not need by zero, which
    leaves what is not a number as it is: a broken sequence would break its neighbours.

    n, T: heads of a group and tokens of a head.
    groups: of one sequence.
    columns: of all sequences; those of a sequence follow each other.
    pitch: partitions between two groups; a sub-array of the Tensor engine has as many rows, so that the products of
        `slots` groups run side by side.
    """

    n: int
    T: int
    pitch: int
    slots: int
    groups: int
    columns: int


@dataclass
class Masks(nl.NKIObject):
    """Made on chip, float32: 1 where

    after: [row s, row i]: s and i are of one head, and s is after i.
    of_head: [row, n]: the row is of head h of its group.
    blocks: [row, 128]: a partition of the packed state is of the row's head.
    ones: [128, 128].
    """

    after: Tensor
    of_head: Tensor
    blocks: Tensor
    ones: Tensor


@nki.jit
def deltanet_commit_layer(
    keys: Tensor, u: Tensor, g: Tensor, state: Tensor, qkv: Tensor, conv_state: Tensor, accepted: Tensor
) -> tuple[Tensor, Tensor]:
    """Recurrent and conv state of a DeltaNet layer after the first accepted[b] of T verified tokens of each sequence.

    Launch with grid 2 on a logical core of two physical cores (LNC=2), or without a grid; the cores share the work as
    in `verify_layer`.

    Dimensions:
        B: sequences; T: tokens, 1 to 8; H, Hk: value and key heads of this rank, H a multiple of Hk; K = V = 128;
        W = 4; Ch = 2 Hk K + H V.

    Args:
        keys: [B, T, Hk, K],
        u: [B, T, H, V] and
        g: [B, T, H], float32, from `deltanet_verify_layer`.
        state: [B, H, K, V] float32, what that was given.
        qkv: [B, T, Ch] bfloat16 or float32, likewise.
        conv_state: [B, Ch, W - 1] in qkv.dtype, likewise.
        accepted: [B] int32, 0 to T; with 0 both states stay as they are.

    Returns:
        new_state: [B, H, K, V] float32.
        new_conv_state: [B, Ch, W - 1] in conv_state.dtype.

    Notes:
        Numerics: all float32. No exponent is positive, and sums of g run over the tokens after each, so that a small
        decay after a large one is exact. The conv state is moved, not computed. What is not accepted is multiplied by
        zero, so it must be numbers; sequences share no matmul's contraction.
        Limits: 2 Hk + H <= 128 per core and sequence.

    Pseudocode:
        real = t < accepted;  g = real g
        e_t = real exp(sum of g after t);  d = exp(sum of g)
        for each group of heads: S = d S + K^T diag(e) U
        new_conv_state = [conv_state | qkv][accepted : accepted + W - 1]
    """
    B, T, Hk, K = keys.shape
    H, Ch = u.shape[2], qkv.shape[2]
    assert 1 <= T and T <= MOST_TOKENS, f"keys has {T} tokens of each sequence: 1 to {MOST_TOKENS} are possible"
    assert state.shape == (B, H, PARTITIONS, PARTITIONS), (
        f"state has shape {state.shape}: [{B}, {H}, 128, 128] is needed"
    )
    assert K == PARTITIONS and u.shape[3] == PARTITIONS, "K and V must be 128"
    assert Ch == (2 * Hk + H) * PARTITIONS and H % Hk == 0, "qkv must hold [q | k | v] of whole key heads"
    assert conv_state.shape == (B, Ch, 3), "the convolution must have 4 taps"
    assert conv_state.dtype == qkv.dtype, "conv_state must have the dtype of qkv"
    assert accepted.shape == (B,) and accepted.dtype == nl.int32, f"accepted must be [{B}] int32"
    for tensor in (keys, u, g, state):
        assert tensor.dtype == nl.float32, "keys, u, g and state must be float32"

    new_state = nl.ndarray(state.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    new_conv = nl.ndarray(conv_state.shape, dtype=conv_state.dtype, buffer=nl.shared_hbm)
    core, cores = 0, 1
    if nl.program_ndim() != 0:
        core, cores = nl.program_id(axis=0), nl.num_programs(axes=0)
    mine = share_of_core(B=B, Hk=Hk, R=H // Hk, core=core, cores=cores)
    rows = rows_per_sequence(mine)
    assert rows <= PARTITIONS, "too many heads on one core"
    at_once = 1 if mine.nb == 0 else PARTITIONS // rows
    for first in range(0, mine.nb, at_once):
        _commit_slab(
            box=Box(
                b0=mine.b0 + first,
                nb=min(at_once, mine.nb - first),
                k0=mine.k0,
                nk=mine.nk,
                r0=mine.r0,
                nr=mine.nr,
                R=mine.R,
            ),
            inputs=(keys, u, g, state, qkv, conv_state, accepted),
            outputs=(new_state, new_conv),
        )
    return new_state, new_conv


def _commit_slab(box: Box, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
    """Both states of the heads and sequences of one box; inputs and outputs are those of `deltanet_commit_layer`."""
    keys, u, g, state, qkv, conv_state, accepted = inputs
    new_state, new_conv = outputs
    H = u.shape[2]
    at = _lay_out(box=box, H=H, T=u.shape[1])
    # Small inputs first: the chain that leads to the update runs while the state arrives.
    log_decays, counts = _load_gates(box=box, at=at, g=g, accepted=accepted)
    key_rows, u_rows = _load_rows(box=box, at=at, keys=keys, u=u, H=H)
    width = _width(box)
    x, history = load_inputs_of_conv(box=box, qkv=qkv, conv_state=conv_state, H=H, width=width)
    conv_counts = _load_conv_counts(box=box, accepted=accepted, width=width)
    before = load_states(state=state, box=box, n=at.n)
    masks = _make_masks(at)
    factors, decay = _make_factors(at=at, masks=masks, log_decays=log_decays, counts=counts)
    new = _select_window(x=x, history=history, counts=conv_counts)
    store_conv(new_conv=new_conv, new=new, box=box, H=H)

    spread: Tensor = key_rows
    for group in range(box.nb * at.groups):
        slot, column = _place(at, group)
        if slot == 0:
            spread = _spread_keys(at=at, key_rows=key_rows, factors=factors, column=column)
        own = nl.ds(slot * at.pitch, at.n * at.T)
        written = nl.ndarray((PARTITIONS, at.n, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
        for j in range(at.n):
            nisa.nc_matmul(
                dst=written[:, j, :],
                stationary=spread[own, j : at.n * PARTITIONS : at.n],
                moving=u_rows[own, column, :],
                tile_position=(slot * at.pitch, 0),
                tile_size=(at.pitch, PARTITIONS),
                accumulate=False,
            )
        after = nl.ndarray((PARTITIONS, at.n, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(
            dst=after,
            data=before[:, group, :, :],
            op0=nl.multiply,
            operand0=decay[:, slot, column : column + 1],
            op1=nl.add,
            operand1=written,
        )
        nisa.dma_copy(dst=packed_rows(hbm=new_state, box=box, n=at.n, group=group), src=after)


def _lay_out(box: Box, H: int, T: int) -> Layout:
    """The layout of a box."""
    n = heads_per_group(box=box, H=H, most=8, halves=False)
    pitch = 32 if n * T <= 32 else 64
    slots, groups = PARTITIONS // pitch, heads_per_sequence(box) // n
    columns = box.nb * ((groups + slots - 1) // slots)
    return Layout(n=n, T=T, pitch=pitch, slots=slots, groups=groups, columns=columns)


def _place(at: Layout, group: int) -> tuple[int, int]:
    """Slot and column of a group, counted through all sequences."""
    sequence, i = group // at.groups, group % at.groups
    return i % at.slots, sequence * ((at.groups + at.slots - 1) // at.slots) + i // at.slots


# --- Rows ------------------------------------------------------------------------------------------------------------
def _runs(box: Box, at: Layout, group: int, step: int) -> list[tuple[int, int, int, int]]:
    """Heads of a group that follow each other within `step` heads of a sequence, as (first in the group, number of
    heads, sequence, head)."""
    heads, runs = heads_per_sequence(box), []
    i = 0
    while i < at.n:
        column = group * at.n + i
        head = first_head(box) + column % heads
        count = min(at.n - i, heads - column % heads, step - head % step)
        runs.append((i, count, box.b0 + column // heads, head))
        i = i + count
    return runs


def _rows_of(at: Layout, group: int, first: int, count: int) -> slice:
    """Partitions of `count` heads of a group from head `first` on."""
    slot, _ = _place(at, group)
    return nl.ds(slot * at.pitch + first * at.T, count * at.T)


def _load_gates(box: Box, at: Layout, g: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """g [128, columns] float32 and the counts of accepted tokens, int32, of every row; zero where there is none."""
    T, H = g.shape[1], g.shape[2]
    log_decays = nl.ndarray((PARTITIONS, at.columns), dtype=nl.float32, buffer=nl.sbuf)
    counts = nl.ndarray((PARTITIONS, at.columns), dtype=nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=log_decays, value=0.0, engine=nisa.engine.vector)
    nisa.memset(dst=counts, value=0, engine=nisa.engine.gpsimd)
    for group in range(box.nb * at.groups):
        _, column = _place(at, group)
        for run in _runs(box=box, at=at, group=group, step=H):
            first, count, sequence, head = run
            rows = _rows_of(at, group, first, count)
            nisa.dma_copy(
                dst=log_decays[rows, column : column + 1],
                src=g.ap(pattern=[[1, count], [H, T], [1, 1]], offset=sequence * T * H + head),
            )
            nisa.dma_copy(
                dst=counts[rows, column : column + 1],
                src=accepted.ap(pattern=[[0, count * T], [1, 1]], offset=sequence),
            )
    return log_decays, counts


def _load_rows(box: Box, at: Layout, keys: Tensor, u: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """Keys and u of every row, [128, columns, 128] float32; undefined where there is none."""
    T, Hk = keys.shape[1], keys.shape[2]
    key_rows = nl.ndarray((PARTITIONS, at.columns, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    u_rows = nl.ndarray((PARTITIONS, at.columns, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    for group in range(box.nb * at.groups):
        _, column = _place(at, group)
        for run in _runs(box=box, at=at, group=group, step=box.R):
            first, count, sequence, head = run
            nisa.dma_copy(
                dst=key_rows[_rows_of(at, group, first, count), column, :],
                src=keys.ap(
                    pattern=[[0, count], [Hk * PARTITIONS, T], [1, PARTITIONS]],
                    offset=(sequence * T * Hk + head // box.R) * PARTITIONS,
                ),
            )
        for run in _runs(box=box, at=at, group=group, step=H):
            first, count, sequence, head = run
            nisa.dma_copy(
                dst=u_rows[_rows_of(at, group, first, count), column, :],
                src=u.ap(
                    pattern=[[PARTITIONS, count], [H * PARTITIONS, T], [1, PARTITIONS]],
                    offset=(sequence * T * H + head) * PARTITIONS,
                ),
            )
    return key_rows, u_rows


def _make_masks(at: Layout) -> Masks:
    """`Masks`, from the distance of a partition to the first row of each head."""
    n, T, slots, pitch = at.n, at.T, at.slots, at.pitch
    ones = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    after = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    in_slot = nl.ndarray((PARTITIONS, slots, n), dtype=nl.float32, buffer=nl.sbuf)
    of_head = nl.ndarray((PARTITIONS, n), dtype=nl.float32, buffer=nl.sbuf)
    blocks = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0, engine=nisa.engine.vector)
    nisa.memset(dst=after, value=0.0, engine=nisa.engine.gpsimd)
    rows = after.ap(pattern=[[PARTITIONS, PARTITIONS], [pitch, slots], [T, n], [1, T]], offset=0)
    true = ones.ap(pattern=[[PARTITIONS, PARTITIONS], [n * T, slots], [T, n], [1, T]], offset=0)
    for which in range(2):
        nisa.affine_select(
            dst=rows,
            pattern=[[-pitch, slots], [-T, n], [-1, T]] if which == 0 else [[pitch, slots], [T, n], [0, T]],
            channel_multiplier=1 if which == 0 else -1,
            offset=-1 if which == 0 else T - 1,
            on_true_tile=true if which == 0 else rows,
            on_false_value=0.0,
            cmp_op=nl.greater_equal,
        )
    for which in range(2):
        sign = 1 if which == 0 else -1
        nisa.affine_select(
            dst=in_slot,
            pattern=[[-sign * pitch, slots], [-sign * T, n]],
            channel_multiplier=sign,
            offset=0 if which == 0 else T - 1,
            on_true_tile=ones[:, 0 : slots * n] if which == 0 else in_slot,
            on_false_value=0.0,
            cmp_op=nl.greater_equal,
        )
    nisa.tensor_reduce(
        dst=of_head,
        op=nl.add,
        data=in_slot.ap(pattern=[[slots * n, PARTITIONS], [1, n], [n, slots]], offset=0),
        axis=2,
    )
    nisa.tensor_copy(
        dst=blocks,
        src=of_head.ap(pattern=[[n, PARTITIONS], [1, n], [0, PARTITIONS // n]], offset=0),
        engine=nisa.engine.gpsimd,
    )
    return Masks(after=after, of_head=of_head, blocks=blocks, ones=ones)


def _make_factors(at: Layout, masks: Masks, log_decays: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of keys, [128, columns, n] float32: e_t in the column of the row's own head, zero in others; and d.

    Returns:
        factors: as above.
        decay: [128, slots, columns] float32, d of the head whose state a partition holds.
    """
    wanted = nl.ndarray((PARTITIONS, at.columns), dtype=nl.float32, buffer=nl.sbuf)
    real = nl.ndarray((PARTITIONS, at.columns), dtype=nl.float32, buffer=nl.sbuf)
    g = nl.ndarray((PARTITIONS, at.columns), dtype=nl.float32, buffer=nl.sbuf)
    e = nl.ndarray((PARTITIONS, at.columns), dtype=nl.float32, buffer=nl.sbuf)
    factors = nl.ndarray((PARTITIONS, at.columns, at.n), dtype=nl.float32, buffer=nl.sbuf)
    decay = nl.ndarray((PARTITIONS, at.slots, at.columns), dtype=nl.float32, buffer=nl.sbuf)
    later = nl.ndarray((PARTITIONS, 1), dtype=nl.float32, buffer=nl.psum)
    sums = nl.ndarray((PARTITIONS, at.columns), dtype=nl.float32, buffer=nl.psum)
    totals = nl.ndarray((PARTITIONS, at.slots, at.columns), dtype=nl.float32, buffer=nl.psum)
    # Token t is accepted if it is less than their count, that is, if the count and the tokens after it make T.
    nisa.nc_matmul(
        dst=later, stationary=masks.after, moving=masks.ones[:, 0:1], is_stationary_onezero=True, accumulate=False
    )
    nisa.tensor_copy(dst=wanted, src=counts, engine=nisa.engine.gpsimd)
    nisa.tensor_scalar(dst=real, data=wanted, op0=nl.add, operand0=later, op1=nl.greater_equal, operand1=float(at.T))
    nisa.tensor_tensor(dst=g, data1=log_decays, data2=real, op=nl.multiply)
    nisa.nc_matmul(dst=sums, stationary=masks.after, moving=g, is_stationary_onezero=True, accumulate=False)
    for slot in range(at.slots):
        rows = nl.ds(slot * at.pitch, at.pitch)
        nisa.nc_matmul(
            dst=totals[:, slot, :],
            stationary=masks.blocks[rows, :],
            moving=g[rows, :],
            is_stationary_onezero=True,
            tile_position=(slot * at.pitch, 0),
            tile_size=(at.pitch, PARTITIONS),
            accumulate=False,
        )
    nisa.activation(dst=e, op=nl.exp, data=sums)
    nisa.activation(dst=decay, op=nl.exp, data=totals)
    nisa.tensor_tensor(dst=e, data1=e, data2=real, op=nl.multiply)
    nisa.tensor_tensor(
        dst=factors,
        data1=e.ap(pattern=[[at.columns, PARTITIONS], [1, at.columns], [0, at.n]], offset=0),
        data2=masks.of_head.ap(pattern=[[at.n, PARTITIONS], [0, at.columns], [1, at.n]], offset=0),
        op=nl.multiply,
    )
    return factors, decay


def _spread_keys(at: Layout, key_rows: Tensor, factors: Tensor, column: int) -> Tensor:
    """e_t k_t of the rows of a column, [128, n K] float32: in the place of its head among the n, zero in the others."""
    spread = nl.ndarray((PARTITIONS, at.n * PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    for head in range(at.n):
        nisa.activation(
            dst=spread[:, head * PARTITIONS : (head + 1) * PARTITIONS],
            op=nl.copy,
            data=key_rows[:, column, :],
            scale=factors[:, column, head : head + 1],
        )
    return spread


# --- Convolution -----------------------------------------------------------------------------------------------------
def _width(box: Box) -> int:
    """Channels on a partition: as few as the partitions allow, since their number is what an instruction takes."""
    width = PARTITIONS
    while 2 * box.nb * rows_per_sequence(box) * (PARTITIONS // width) <= PARTITIONS and width > 16:
        width = width // 2
    return width


def _load_conv_counts(box: Box, accepted: Tensor, width: int) -> Tensor:
    """Counts of accepted tokens, [parts of all sequences, 1] int32, see `load_inputs_of_conv`."""
    parts = rows_per_sequence(box) * (PARTITIONS // width)
    counts = nl.ndarray((box.nb * parts, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=counts, src=accepted.ap(pattern=[[1, box.nb], [0, parts], [1, 1]], offset=box.b0))
    return counts


def _select_window(x: Tensor, history: Tensor, counts: Tensor) -> Tensor:
    """The 3 inputs before the first token that was not accepted, like history [parts, width, 3]."""
    parts, T, width = x.shape[0], x.shape[1], x.shape[2]
    window = nl.ndarray((parts, T + 3, width), dtype=x.dtype, buffer=nl.sbuf)
    new = nl.ndarray(history.shape, dtype=history.dtype, buffer=nl.sbuf)
    number = nl.ndarray((parts, T + 1), dtype=nl.float32, buffer=nl.sbuf)
    wanted = nl.ndarray((parts, 1), dtype=nl.float32, buffer=nl.sbuf)
    chosen = nl.ndarray((parts, T + 1), dtype=nl.uint8, buffer=nl.sbuf)
    by_time = [[3 * width, parts], [1, 3], [3, width]]
    nisa.iota(dst=number, pattern=[[1, T + 1]], channel_multiplier=0)
    nisa.tensor_copy(dst=wanted, src=counts, engine=nisa.engine.gpsimd)
    nisa.tensor_copy(dst=window[:, 0:3, :], src=history.ap(pattern=by_time, offset=0), engine=nisa.engine.gpsimd)
    nisa.tensor_copy(dst=window[:, 3 : 3 + T, :], src=x, engine=nisa.engine.gpsimd)
    nisa.tensor_copy(dst=new, src=history, engine=nisa.engine.gpsimd)
    nisa.tensor_scalar(dst=chosen, data=number, op0=nl.equal, operand0=wanted)
    for count in range(1, T + 1):
        nisa.tensor_copy_predicated(
            dst=new.ap(pattern=by_time, offset=0),
            src=window[:, count : count + 3, :],
            predicate=chosen.ap(pattern=[[T + 1, parts], [0, 3 * width]], offset=count),
        )
    return new
