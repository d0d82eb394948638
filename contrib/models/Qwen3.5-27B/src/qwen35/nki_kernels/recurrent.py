# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule token by token on a NeuronCore-v3: one head, for comparison, and a layer's whole decode step.

Letters: B batch, T tokens of a step, S tokens, H value heads, Hk key heads, R = H / Hk, K key dim and V value dim, both
128, W conv kernel, Ch = 2 Hk K + H V conv channels. The specification is `qwen35.ops` and
`qwen35.layers.gated_deltanet`.

With S the state before a token, k and q raw (after the convolution), rk = 1 / sqrt(k.k + eps) and eg = exp(g):

    U = rk beta v - eg beta rk^2 (S^T k)        rk times the paper's u
    S <- eg S + k U^T
    o = (eg S^T q + (k.q) U) / (sqrt(q.q + eps) sqrt(K))

so a token needs one pass over S for both products, k and q enter unnormalised while their norms are still computed,
and the scale of o only changes the epsilon of the RMS norm that follows: with p the bracket,
o / sqrt(mean(o^2) + e) = p / sqrt(mean(p^2) + e K (q.q + eps)).
"""

from dataclasses import dataclass
from typing import Any

from .nki_seam import nisa, nki, nl

Tensor = Any  # an NKI tensor; the SDK and the emulator have different classes for it

PARTITIONS = 128  # also K and V: a head's state is one 128 x 128 tile
L2NORM_EPS = 1e-6  # of the l2-norm of q and k, as in transformers
MAX_HEADS = 64  # value heads x tokens done together: as n * 2 * 64 float32 columns they fill a PSUM bank of 512


@dataclass
class Box(nl.NKIObject):
    """The part of a launch that is computed together: sequences x key heads x value heads of each key head.

    b0, nb: first sequence and number of sequences. k0, nk: key heads. r0, nr: of the R value heads of every key head.
    """

    b0: int
    nb: int
    k0: int
    nk: int
    r0: int
    nr: int
    R: int


@nki.jit
def deltanet_recurrent_fwd(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """One head from a zero state; see `deltanet_recurrent_fwd_state`. Returns output [S, 128] only."""
    output, _ = _recurrent_head(query=query, key=key, value=value, g=g, beta=beta, initial_state=0, load_state=False)
    return output


@nki.jit
def deltanet_recurrent_fwd_state(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule of one (batch, head) pair, token by token, with the state in SBUF.

    Dimensions:
        S: tokens, any number; K = V = 128.

    Args:
        query: [S, 128] any float dtype, l2-normalised and scaled by K^-0.5.
        key: [S, 128], l2-normalised.
        value: [S, 128].
        g: [S, 128] (the value repeated) or [S, 1], log-decay <= 0.
        beta: [S, 128] (the value repeated) or [S, 1], in [0, 1].
        initial_state: [128, 128] float32, [K, V].

    Returns:
        output: [S, 128] in query.dtype.
        final_state: [128, 128] float32.

    Notes:
        Operands are converted to float32 on chip and all products are float32. exp(g) of any g <= 0 is finite; there is
        no division. Dependent instructions dominate: use it to check other kernels, not for speed.

    Pseudocode:
        for t in tokens:
            u = beta_t (v_t - exp(g_t) S^T k_t)
            o_t = exp(g_t) S^T q_t + (k_t . q_t) u
            S = exp(g_t) S + k_t u^T
    """
    output, final_state = _recurrent_head(
        query=query, key=key, value=value, g=g, beta=beta, initial_state=initial_state, load_state=True
    )
    return output, final_state


@nki.jit
def deltanet_decode_layer(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    norm_eps: float = 1e-6,
    token_states: bool = False,
) -> tuple[Tensor, ...]:
    """A DeltaNet layer between its projections, for the next T tokens of every sequence, in one launch.

    Convolution with its state, SiLU, l2-norm, gates, delta rule and gated RMS norm. Launch with grid 2 on a logical
    core of two physical cores (LNC=2), or without a grid. The cores share the sequences if B is even, else the key
    heads, else the value heads of the only key head; any B, H and Hk will do.

    Dimensions:
        B: sequences; T: tokens, 1 to 8; H, Hk: value and key heads of this rank, H a multiple of Hk; K = V = 128;
        W = 4; Ch = 2 Hk K + H V.

    Args:
        qkv: [B, T, Ch] bfloat16 or float32, output of the projection, channels [q | k | v].
        z: [B, T, H V], output gate before its SiLU.
        a, b: [B, T, H], decay and write gates before their activation.
        conv_weight: [Ch, W].
        conv_state: [B, Ch, W - 1] in qkv.dtype, the inputs before this step, oldest first.
        A_log, dt_bias: [H] float32.
        norm_weight: [V] float32.
        state: [B, H, K, V] float32.
        norm_eps: epsilon of the gated RMS norm; compile-time.
        token_states: also return the state after every token; compile-time.

    Returns:
        output: [B, T, H V] in z.dtype, the normed and gated output.
        new_state: [B, H, K, V] float32.
        new_conv_state: [B, Ch, W - 1] in conv_state.dtype.
        states: [B, T, H, K, V] float32, only with token_states.

    Notes:
        Numerics: everything after the loads is float32, also the convolution, which transformers rounds to the dtype
        of the weights. exp(g) of any g <= 0 is finite, nothing divides by a decay, and an epsilon guards each norm.
        Limits: 2 Hk + H <= 128 and H <= 64 per core and sequence. Sequences beyond 128 rows of channels or 64 heads
        are taken in slabs, one after another; so are tokens beyond 64 heads x tokens, but for the state, which stays.
        Layouts: all inputs and outputs as the model holds them. On chip the state is packed: a group of n = 4, 2 or 1
        heads, each on 128 / n partitions, with n rows of K on each partition, because such a partition is n V floats
        in a row of [B, H, K, V]. With n = 4 that is 2 KiB, which by the modelled costs reaches 85% of the DMA peak;
        K on partitions would be 512 B and 58%. The convolution runs with the channels of a head on partitions, which
        the Tensor engine transposes to: all lanes work, where rows of heads would use one lane per head.
        Scheduling: tokens are taken one by one, for each reads the state that the last one left. Half of the state's
        rank-1 updates run on Scalar and GpSimd beside Vector. The tables of the Scalar engine's seven functions (exp,
        softplus, sigmoid, silu, square, rsqrt, copy) change during a token, which the model does not charge for.

    Pseudocode:
        x = [conv_state | qkv];  y_t = silu(sum_w conv_weight[:, w] x[t + w]);  q, k, v = split(y_t)
        eg = exp(-exp(A_log) softplus(a + dt_bias));  beta = sigmoid(b)
        for t in tokens, for each group of heads:
            sk, sq = S^T k, S^T q                               one pass over the state
            U = rk beta v - eg beta rk^2 sk
            S = eg S + k U^T
            o = eg sq + (k.q) U
            output = o / sqrt(mean(o^2) + norm_eps K (q.q + eps)) * norm_weight * silu(z)
    """
    B, T, Ch = qkv.shape
    H = a.shape[2]
    Hk = (Ch - H * PARTITIONS) // (2 * PARTITIONS)
    R = H // Hk
    assert state.shape[2] == PARTITIONS and state.shape[3] == PARTITIONS, "K and V must be 128"
    assert Ch == (2 * Hk + H) * PARTITIONS and H == Hk * R, "qkv must hold [q | k | v] of whole key heads"
    assert conv_weight.shape[1] == 4, "the convolution must have 4 taps"
    assert conv_state.dtype == qkv.dtype, "conv_state must have the dtype of qkv"

    output = nl.ndarray((B, T, H * PARTITIONS), dtype=z.dtype, buffer=nl.shared_hbm)
    new_state = nl.ndarray((B, H, PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)
    new_conv = nl.ndarray((B, Ch, 3), dtype=conv_state.dtype, buffer=nl.shared_hbm)
    states = new_state
    if token_states:
        states = nl.ndarray((B, T, H, PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)

    core, cores = 0, 1
    if nl.program_ndim() != 0:
        core, cores = nl.program_id(axis=0), nl.num_programs(axes=0)
    mine = _share(B=B, Hk=Hk, R=R, core=core, cores=cores)
    assert _slots(mine) <= PARTITIONS and _heads(mine) <= MAX_HEADS, "too many heads on one core"
    at_once = 1 if mine.nb == 0 else min(PARTITIONS // _slots(mine), MAX_HEADS // _heads(mine))
    constants = _constants()
    for first in nl.static_range(0, mine.nb, at_once):
        _decode_slab(
            box=Box(
                b0=mine.b0 + first,
                nb=min(at_once, mine.nb - first),
                k0=mine.k0,
                nk=mine.nk,
                r0=mine.r0,
                nr=mine.nr,
                R=R,
            ),
            inputs=(qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, state),
            outputs=(output, new_state, new_conv, states),
            constants=constants,
            norm_eps=norm_eps,
            token_states=token_states,
        )
    if token_states:
        return output, new_state, new_conv, states
    return output, new_state, new_conv


# --- Work of a core --------------------------------------------------------------------------------------------------
def _share(B: int, Hk: int, R: int, core: int, cores: int) -> Box:
    """The box of a core: half of the sequences if B is even, else of the key heads, else of the value heads."""
    assert cores == 1 or cores == 2, "launch with grid 2 or without a grid"
    b0, nb, k0, nk, r0, nr = 0, B, 0, Hk, 0, R
    if cores == 2 and B % 2 == 0:
        b0, nb = core * (B // 2), B // 2
    elif cores == 2 and Hk > 1:
        k0, nk = _half(Hk, core)
    elif cores == 2:
        r0, nr = _half(R, core)
        nb = B if nr > 0 else 0
    return Box(b0=b0, nb=nb, k0=k0, nk=nk, r0=r0, nr=nr, R=R)


def _half(count: int, core: int) -> tuple[int, int]:
    """First and number of the items of a core; core 0 takes the odd one."""
    half = (count + 1) // 2
    return core * half, half if core == 0 else count - half


def _heads(box: Box) -> int:
    """Value heads per sequence."""
    return box.nk * box.nr


def _slots(box: Box) -> int:
    """Rows of 128 channels per sequence: q and k of the key heads, v of the value heads, in this order."""
    return box.nk * (2 + box.nr)


def _first_head(box: Box) -> int:
    """First value head within a sequence; the others follow, for a box has all of R or one key head."""
    return box.k0 * box.R + box.r0


def _pack(run: int) -> int:
    """Heads per group, n: the largest of 4, 2 and 1 that divides the heads that follow each other in HBM."""
    return 4 if run % 4 == 0 else 2 if run % 2 == 0 else 1


def _constants() -> tuple[Tensor, Tensor]:
    """ones [128, 128] and the identity [128, 128], float32."""
    ones = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    identity = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0, engine=nisa.engine.vector)
    nisa.affine_select(
        dst=identity,
        pattern=[[-1, PARTITIONS]],
        channel_multiplier=1,
        on_true_tile=ones,
        on_false_value=0.0,
        cmp_op=nl.equal,
    )
    return ones, identity


def _block_masks(ones: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """1 where a partition belongs to head i of a group of n: mask [128, n] and its transpose, blocks [1, n, 128]."""
    block = PARTITIONS // n
    mask = nl.ndarray((PARTITIONS, n), dtype=nl.float32, buffer=nl.sbuf)
    nisa.affine_select(
        dst=mask,
        pattern=[[-block, n]],
        channel_multiplier=1,
        on_true_tile=ones[:, 0:n],
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    nisa.affine_select(
        dst=mask,
        pattern=[[block, n]],
        channel_multiplier=-1,
        offset=block - 1,
        on_true_tile=mask,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    blocks = nl.ndarray((1, n, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=blocks, value=0.0, engine=nisa.engine.vector)
    for i in nl.affine_range(n):
        nisa.memset(dst=blocks[:, i, i * block : (i + 1) * block], value=1.0, engine=nisa.engine.vector)
    return mask, blocks


def _decode_slab(
    box: Box,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    constants: tuple[Tensor, Tensor],
    norm_eps: float,
    token_states: bool,
) -> None:
    """The step for one box. Columns of [128, .] tiles are value heads (token, sequence, head)."""
    qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, state = inputs
    output, new_state, new_conv, states = outputs
    T, H = a.shape[1], a.shape[2]
    count = box.nb * _heads(box)
    ones, identity = constants
    # Sequences follow each other in HBM if all heads are here.
    n = _pack(run=count if _heads(box) == H else _heads(box))
    groups = count // n
    tokens = min(T, MAX_HEADS // count)  # whose convolution, gates and output norm are done together

    # Small inputs first: the chain that leads to k and q runs while the state arrives.
    x, history, weight = _load_conv(box=box, qkv=qkv, conv_state=conv_state, conv_weight=conv_weight, H=H)
    raw_gates, per_head = _load_gates(box=box, a=a, b=b, A_log=A_log, dt_bias=dt_bias)
    z_rows, norm_rows = _load_output_gate(box=box, z=z, norm_weight=norm_weight, tokens=tokens)
    tiles = []  # the state before a token, after it, and the one before that, which may still be on its way out
    for _ in range(min(T, 2) + 1):
        tiles.append(nl.ndarray((PARTITIONS, groups, n, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf))
    for i in nl.affine_range(groups):
        _move_state(hbm=state, tile=tiles[0], box=box, group=i, store=False, token=0, tokens=0)

    mask, blocks = _block_masks(ones=ones, n=n)
    # Engines run in program order; this order keeps Vector and Scalar free for the chain weights, taps, convolution.
    rate, steps = _gate_steps(raw_gates=raw_gates, per_head=per_head)
    weights = _transpose_weights(weight=weight, nb=box.nb)
    taps = _transpose_taps(x=x, history=history)
    gate_rows = _gate_rows(raw_gates=raw_gates, rate=rate, steps=steps)

    scalars = nl.ndarray((PARTITIONS, 512), dtype=nl.float32, buffer=nl.psum)
    products = nl.ndarray((PARTITIONS, 2, tokens * count), dtype=nl.float32, buffer=nl.psum)
    o_rows = nl.ndarray((tokens * count, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    spreads = []
    for _ in range(3):
        spreads.append(nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.psum))

    for t0 in nl.sequential_range(0, T, tokens):
        some = min(tokens, T - t0)
        columns = some * count
        gate = _output_gate(z_rows=z_rows[t0 // tokens], norm_rows=norm_rows, columns=columns)
        kq, rk_v = _convolve(taps=taps, weights=weights, box=box, t0=t0, some=some)
        if t0 == 0:
            _store_conv_state(new_conv=new_conv, x=x, history=history, box=box, H=H)
        decay = _gate_columns(
            gate_rows=gate_rows, blocks=blocks, ones=ones, scalars=scalars, first=t0 * count, columns=columns
        )
        packed, k_columns, squares = _pack_columns(kq=kq, mask=mask, ones=ones, identity=identity, scalars=scalars)
        write, read = _head_scalars(rk_v=rk_v, scalars=scalars)

        # Engines run in program order. With one token a group is read one step before its U is made and two before it
        # is updated, so that none waits for another; with more, the next token waits for the update, which comes first.
        total = some * groups
        late = 2 if some == 1 else min(1, groups - 1)
        read_first = some == 1 or late == 0
        for step in nl.sequential_range(total + 2):
            token = t0 + step // groups
            if step < total and read_first:
                _read_state(tiles=tiles, token=token, packed=packed, products=products, decay=decay, step=step)
            ready = step - min(late, 1)
            if ready >= 0 and ready < total:
                _spread(
                    spread=spreads[ready % 3],
                    write=write,
                    products=products,
                    column=ready * n,
                    n=n,
                    identity=identity,
                )
                if ready == total - 1:
                    _read_output(o_rows=o_rows, products=products, read=read, identity=identity)
            if step < total and not read_first:
                _read_state(tiles=tiles, token=token, packed=packed, products=products, decay=decay, step=step)
            done = step - late
            if done >= 0 and done < total:
                t, i = t0 + done // groups, done % groups
                _, after = _around(tiles=tiles, token=t)
                _update_state(S=after, spread=spreads[done % 3], k_columns=k_columns, group=i, column=done)
                if token_states:
                    _move_state(hbm=states, tile=after, box=box, group=i, store=True, token=t, tokens=T)
                if t == T - 1:
                    _move_state(hbm=new_state, tile=after, box=box, group=i, store=True, token=0, tokens=0)
        norm_bias = _norm_bias(squares=squares, ones=ones, scalars=scalars, norm_eps=norm_eps)
        _store_output(output=output, o_rows=o_rows[0:columns, :], gate=gate, norm_bias=norm_bias, box=box, t0=t0)


def _around(tiles: list[Tensor], token: int) -> tuple[Tensor, Tensor]:
    """The state before and after a token."""
    return tiles[token % len(tiles)], tiles[(token + 1) % len(tiles)]


# --- One group of heads ----------------------------------------------------------------------------------------------
def _read_state(tiles: list[Tensor], token: int, packed: Tensor, products: Tensor, decay: Tensor, step: int) -> None:
    """S^T k and S^T q of a group, products [V, 2, columns], in one pass of the state; and the decayed state."""
    before, after = _around(tiles=tiles, token=token)
    n, group = packed.shape[1], step % before.shape[1]
    own = nl.ds(step * n, n)
    for j in nl.static_range(n):
        nisa.nc_matmul(
            dst=products[:, :, own],
            stationary=before[:, group, j, :],
            moving=packed[:, j, :, own],
            accumulate=j != 0,
        )
    # The decayed state does not wait for k: the Scalar engine makes it meanwhile.
    nisa.activation(dst=after[:, group, :, :], op=nl.copy, data=before[:, group, :, :], scale=decay[:, step : step + 1])


def _spread(spread: Tensor, write: Tensor, products: Tensor, column: int, n: int, identity: Tensor) -> None:
    """U of the n heads from a column on, as rows over V, on all partitions of each head: spread [(head, p), V].

    The Tensor engine adds the two terms of U, rk beta v and -eg beta rk^2 S^T k. Each is a column per head, repeated
    for the partitions of the head, through which the identity moves.
    """
    columns = write.shape[2]
    own = nl.ds(column, n)
    for term in nl.static_range(2):
        if term == 1:
            nisa.tensor_tensor(dst=write[:, 2, own], data1=products[:, 0, own], data2=write[:, 0, own], op=nl.multiply)
        nisa.nc_matmul(
            dst=spread,
            stationary=write.ap(
                pattern=[[3 * columns, PARTITIONS], [1, n], [0, PARTITIONS // n]], offset=(1 + term) * columns + column
            ),
            moving=identity,
            is_moving_onezero=True,
            accumulate=term != 0,
        )


def _update_state(S: Tensor, spread: Tensor, k_columns: Tensor, group: int, column: int) -> None:
    """S, which holds the decayed state, plus k U^T; every other row on Scalar and GpSimd, beside Vector."""
    n = k_columns.shape[1]
    for j in nl.static_range(n):
        k = k_columns[:, j, column : column + 1]
        mine = S[:, group, j, :]
        if (group * n + j) % 2 == 0:
            nisa.scalar_tensor_tensor(dst=mine, data=spread, op0=nl.multiply, operand0=k, op1=nl.add, operand1=mine)
        else:
            outer = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=outer, op=nl.copy, data=spread, scale=k)
            nisa.tensor_tensor(dst=mine, data1=mine, data2=outer, op=nl.add, engine=nisa.engine.gpsimd)


def _read_output(o_rows: Tensor, products: Tensor, read: Tensor, identity: Tensor) -> None:
    """o_rows [columns, V] = eg S^T q + (k.q) U, whose three terms the Tensor engine turns to rows and adds."""
    columns = read.shape[2]
    terms = nl.ndarray((PARTITIONS, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(
        dst=terms,
        data1=products[:, :, 0:columns],
        data2=read.ap(pattern=[[3 * columns, PARTITIONS], [2 * columns, 2], [1, columns]], offset=0),
        op=nl.multiply,
    )
    for term in nl.static_range(3):
        nisa.nc_matmul(
            dst=o_rows[0:columns, :],
            stationary=read[:, 1, :] if term == 0 else terms[:, term - 1, :],
            moving=identity,
            is_moving_onezero=True,
            accumulate=term != 0,
        )


# --- Loads and stores ------------------------------------------------------------------------------------------------
def _segments(box: Box, H: int) -> list[tuple[int, int, int]]:
    """Heads of 128 channels of a sequence as (slot, first head in [q | k | v], heads); one segment if all are here."""
    Hk = H // box.R
    if _heads(box) == H:
        return [(0, 0, _slots(box))]
    return [
        (0, box.k0, box.nk),
        (box.nk, Hk + box.k0, box.nk),
        (2 * box.nk, 2 * Hk + _first_head(box), _heads(box)),
    ]


def _transfers(box: Box, H: int) -> list[tuple[int, int, int, int, int]]:
    """_segments of all sequences as (row, sequence, sequences, first head, heads), one transfer each."""
    slots = _slots(box)
    transfers = []
    for slot, head, heads in _segments(box=box, H=H):
        if heads == slots:
            transfers.append((0, box.b0, box.nb, head, heads))
        else:
            for i in range(box.nb):
                transfers.append((i * slots + slot, box.b0 + i, 1, head, heads))
    return transfers


def _load_conv(box: Box, qkv: Tensor, conv_state: Tensor, conv_weight: Tensor, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 128 channels on partitions: x [rows, T, 128], history [rows, 128, 3]; weight [slots, 128, 4]."""
    T, Ch = qkv.shape[1], qkv.shape[2]
    slots = _slots(box)
    x = nl.ndarray((box.nb * slots, T, PARTITIONS), dtype=qkv.dtype, buffer=nl.sbuf)
    history = nl.ndarray((box.nb * slots, PARTITIONS, 3), dtype=conv_state.dtype, buffer=nl.sbuf)
    weight = nl.ndarray((slots, PARTITIONS, 4), dtype=conv_weight.dtype, buffer=nl.sbuf)
    for slot, head, heads in _segments(box=box, H=H):
        nisa.dma_copy(
            dst=weight[slot : slot + heads, :, :],
            src=conv_weight.ap(pattern=[[4 * PARTITIONS, heads], [1, 4 * PARTITIONS]], offset=4 * head * PARTITIONS),
        )
    for row, sequence, sequences, head, heads in _transfers(box=box, H=H):
        nisa.dma_copy(
            dst=x[row : row + sequences * heads, :, :],
            src=qkv.ap(
                pattern=[[T * Ch, sequences], [PARTITIONS, heads], [Ch, T], [1, PARTITIONS]],
                offset=sequence * T * Ch + head * PARTITIONS,
            ),
        )
        nisa.dma_copy(
            dst=history[row : row + sequences * heads, :, :],
            src=conv_state.ap(
                pattern=[[3 * Ch, sequences], [3 * PARTITIONS, heads], [1, 3 * PARTITIONS]],
                offset=3 * (sequence * Ch + head * PARTITIONS),
            ),
        )
    return x, history, weight


def _store_conv_state(new_conv: Tensor, x: Tensor, history: Tensor, box: Box, H: int) -> None:
    """The last 3 of [history | x], put together on GpSimd, which has time."""
    T, Ch = x.shape[1], new_conv.shape[1]
    new = nl.ndarray(history.shape, dtype=new_conv.dtype, buffer=nl.sbuf)
    for w in nl.affine_range(3):
        source = history[:, :, T + w] if T + w < 3 else x[:, T + w - 3, :]
        nisa.tensor_copy(dst=new[:, :, w], src=source, engine=nisa.engine.gpsimd)
    for row, sequence, sequences, head, heads in _transfers(box=box, H=H):
        # Cores that share the only key head both compute its convolution; core 0 stores it.
        if box.r0 == 0 or head >= 2 * (H // box.R):
            nisa.dma_copy(
                dst=new_conv.ap(
                    pattern=[[3 * Ch, sequences], [3 * PARTITIONS, heads], [1, 3 * PARTITIONS]],
                    offset=3 * (sequence * Ch + head * PARTITIONS),
                ),
                src=new[row : row + sequences * heads, :, :],
            )


def _load_gates(box: Box, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """a and b [1, 2, T, heads of the box]; A_log and dt_bias [1, 2, heads of a sequence]."""
    T, H = a.shape[1], a.shape[2]
    heads, first, count = _heads(box), _first_head(box), box.nb * _heads(box)
    raw = nl.ndarray((1, 2, T, count), dtype=a.dtype, buffer=nl.sbuf)
    per_head = nl.ndarray((1, 2, heads), dtype=nl.float32, buffer=nl.sbuf)
    for which, source in ((0, a), (1, b)):
        nisa.dma_copy(
            dst=raw.ap(pattern=[[2 * T * count, 1], [heads, box.nb], [count, T], [1, heads]], offset=which * T * count),
            src=source.ap(pattern=[[H, 1], [T * H, box.nb], [H, T], [1, heads]], offset=box.b0 * T * H + first),
        )
    for which, source in ((0, A_log), (1, dt_bias)):
        nisa.dma_copy(dst=per_head[:, which, :], src=source.ap(pattern=[[H, 1], [1, heads]], offset=first))
    return raw, per_head


def _load_output_gate(box: Box, z: Tensor, norm_weight: Tensor, tokens: int) -> tuple[list[Tensor], Tensor]:
    """z of every so many tokens, [columns, 128] each, and the norm weight repeated on as many partitions."""
    T, width = z.shape[1], z.shape[2]
    heads = _heads(box)
    blocks = []
    for t0 in range(0, T, tokens):
        some = min(tokens, T - t0)
        rows = nl.ndarray((some * box.nb * heads, PARTITIONS), dtype=z.dtype, buffer=nl.sbuf)
        nisa.dma_copy(
            dst=rows,
            src=z.ap(
                pattern=[[width, some], [T * width, box.nb], [PARTITIONS, heads], [1, PARTITIONS]],
                offset=(box.b0 * T + t0) * width + _first_head(box) * PARTITIONS,
            ),
        )
        blocks.append(rows)
    columns = tokens * box.nb * heads
    weight = nl.ndarray((columns, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=weight, src=norm_weight.ap(pattern=[[0, columns], [1, PARTITIONS]], offset=0))
    return blocks, weight


def _move_state(hbm: Tensor, tile: Tensor, box: Box, group: int, store: bool, token: int, tokens: int) -> None:
    """Load or store the heads of a group: hbm [B, H, K, V], or token of [B, tokens, H, K, V] where tokens > 0."""
    H = hbm.shape[1] if tokens == 0 else hbm.shape[2]
    n, heads, steps = tile.shape[2], _heads(box), max(tokens, 1)
    block = PARTITIONS // n
    # Heads of a group lie side by side in HBM, but for tokens between two sequences.
    pieces = [(0, n)]
    if steps > 1 and group * n // heads != (group * n + n - 1) // heads:
        pieces = [(i, 1) for i in range(n)]
    for start, length in pieces:
        column = group * n + start
        sequence, head = box.b0 + column // heads, _first_head(box) + column % heads
        far = hbm.ap(
            pattern=[[n * PARTITIONS, length * block], [1, n * PARTITIONS]],
            offset=((sequence * steps + token) * H + head) * PARTITIONS * PARTITIONS,
        )
        near = tile[start * block : (start + length) * block, group, :, :]
        nisa.dma_copy(dst=far if store else near, src=near if store else far)


def _store_output(output: Tensor, o_rows: Tensor, gate: Tensor, norm_bias: Tensor, box: Box, t0: int) -> None:
    """Gated RMS norm of o_rows [columns, V], and out."""
    T, width = output.shape[1], output.shape[2]
    count, per_token = o_rows.shape[0], box.nb * _heads(box)
    squares = nl.ndarray((count, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    scale = nl.ndarray((count, 1), dtype=nl.float32, buffer=nl.sbuf)
    gated = nl.ndarray((count, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    rows = nl.ndarray((count, PARTITIONS), dtype=output.dtype, buffer=nl.sbuf)
    nisa.activation_reduce(dst=squares, op=nl.square, data=o_rows, reduce_op=nl.add, reduce_res=scale)
    nisa.activation(dst=scale, op=nl.rsqrt, data=scale, scale=1.0 / PARTITIONS, bias=norm_bias)
    # On Vector beside the two above; the scale then takes the Scalar engine half the time it would take Vector.
    nisa.tensor_tensor(dst=gated, data1=o_rows, data2=gate, op=nl.multiply)
    nisa.activation(dst=rows, op=nl.copy, data=gated, scale=scale)
    nisa.dma_copy(
        dst=output.ap(
            pattern=[
                [width, count // per_token],
                [T * width, box.nb],
                [PARTITIONS, _heads(box)],
                [1, PARTITIONS],
            ],
            offset=(box.b0 * T + t0) * width + _first_head(box) * PARTITIONS,
        ),
        src=rows,
    )


# --- Per-channel work: channels of a head on partitions --------------------------------------------------------------
def _transpose_taps(x: Tensor, history: Tensor) -> Tensor:
    """[channel, 3 + T, rows] of the inputs in time order; in PSUM for one token, else float32 in SBUF."""
    rows, T = x.shape[0], x.shape[1]
    taps = 3 + T
    columns = nl.ndarray((PARTITIONS, taps if T > 1 else 1, rows), dtype=nl.float32, buffer=nl.sbuf)
    for first in nl.static_range(0, taps, 4):
        # Slots of 128 columns, so that no transpose crosses a PSUM bank.
        turned = nl.ndarray((PARTITIONS, 4, PARTITIONS), dtype=x.dtype, buffer=nl.psum)
        some = min(4, taps - first)
        for w in nl.static_range(first, first + some):
            source = history[:, :, w] if w < 3 else x[:, w - 3, :]
            nisa.nc_transpose(dst=turned[:, w - first, 0:rows], data=source, engine=nisa.engine.tensor)
        if T == 1:
            return turned
        nisa.tensor_copy(dst=columns[:, first : first + some, :], src=turned[:, 0:some, 0:rows])
    return columns


def _transpose_weights(weight: Tensor, nb: int) -> Tensor:
    """[channel, 4, rows] float32 in SBUF, repeated for every sequence."""
    slots = weight.shape[0]
    turned = nl.ndarray((PARTITIONS, 4, PARTITIONS), dtype=weight.dtype, buffer=nl.psum)
    columns = nl.ndarray((PARTITIONS, 4, nb, slots), dtype=nl.float32, buffer=nl.sbuf)
    for w in nl.static_range(4):
        nisa.nc_transpose(dst=turned[:, w, 0:slots], data=weight[:, :, w], engine=nisa.engine.tensor)
    nisa.activation(
        dst=columns,
        op=nl.copy,
        data=turned.ap(pattern=[[4 * PARTITIONS, PARTITIONS], [PARTITIONS, 4], [0, nb], [1, slots]], offset=0),
    )
    return columns


def _convolve(taps: Tensor, weights: Tensor, box: Box, t0: int, some: int) -> tuple[Tensor, Tensor]:
    """Convolution and SiLU of some tokens from t0 on, key heads repeated for their value heads.

    Returns:
        kq: [channel, 2, columns], k and q.
        rk_v: [channel, 2, columns], room for rk, and v.
    """
    nk, nr = box.nk, box.nr
    slots, heads, rows = _slots(box), _heads(box), box.nb * _slots(box)
    sequences, columns = some * box.nb, some * box.nb * heads  # a token and a sequence are one axis from here on
    slot_rows = taps.shape[2]
    products = nl.ndarray((PARTITIONS, some * rows, 4), dtype=nl.float32, buffer=nl.sbuf)
    sums = nl.ndarray((PARTITIONS, some * rows), dtype=nl.float32, buffer=nl.sbuf)
    kq = nl.ndarray((PARTITIONS, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    rk_v = nl.ndarray((PARTITIONS, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(
        dst=products.ap(pattern=[[4 * some * rows, PARTITIONS], [4 * rows, some], [1, 4], [4, rows]], offset=0),
        data1=taps.ap(
            pattern=[[taps.shape[1] * slot_rows, PARTITIONS], [slot_rows, some], [slot_rows, 4], [1, rows]],
            offset=t0 * slot_rows,
        ),
        data2=weights.ap(pattern=[[4 * rows, PARTITIONS], [0, some], [rows, 4], [1, rows]], offset=0),
        op=nl.multiply,
    )
    nisa.tensor_reduce(dst=sums, op=nl.add, data=products, axis=2)
    for which, slot in ((0, nk), (1, 0)):
        nisa.activation(
            dst=kq.ap(
                pattern=[[2 * columns, PARTITIONS], [heads, sequences], [nr, nk], [1, nr]], offset=which * columns
            ),
            op=nl.silu,
            data=sums.ap(pattern=[[some * rows, PARTITIONS], [slots, sequences], [1, nk], [0, nr]], offset=slot),
        )
    nisa.activation(
        dst=rk_v.ap(pattern=[[2 * columns, PARTITIONS], [heads, sequences], [1, heads]], offset=columns),
        op=nl.silu,
        data=sums.ap(pattern=[[some * rows, PARTITIONS], [slots, sequences], [1, heads]], offset=2 * nk),
    )
    return kq, rk_v


def _pack_columns(
    kq: Tensor, mask: Tensor, ones: Tensor, identity: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """k and q in the layout of the packed state, each head on its own block of partitions, zero elsewhere.

    Writes the sums over channels of k k, q q and k q to scalars[:, 192:], the same on all partitions.

    Returns:
        packed: [128, n, 2, columns], at partition (i, p), row j, column c: channel n p + j of head c if c is head i of
            its group.
        k_columns: [128, n, groups], the same of k without the zeros.
        squares: [128, 3, columns], k k, q q and k q per channel.
    """
    columns, n = kq.shape[2], mask.shape[1]
    block = PARTITIONS // n
    groups = columns // n
    turned = nl.ndarray((PARTITIONS, n, 2 * columns), dtype=nl.float32, buffer=nl.psum)
    packed = nl.ndarray((PARTITIONS, n, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    k_columns = nl.ndarray((PARTITIONS, n, groups), dtype=nl.float32, buffer=nl.sbuf)
    squares = nl.ndarray((PARTITIONS, 3, columns), dtype=nl.float32, buffer=nl.sbuf)
    for j in nl.static_range(n):
        # Channels j, n + j, 2 n + j, ... for every block: columns of the identity, repeated.
        nisa.nc_matmul(
            dst=turned[:, j, :],
            stationary=identity.ap(pattern=[[PARTITIONS, PARTITIONS], [0, n], [n, block]], offset=j),
            moving=kq,
            is_stationary_onezero=True,
            accumulate=False,
        )
    nisa.activation(dst=squares[:, 0:2, :], op=nl.square, data=kq)
    nisa.tensor_tensor(dst=squares[:, 2, :], data1=kq[:, 0, :], data2=kq[:, 1, :], op=nl.multiply)
    nisa.nc_matmul(
        dst=scalars[:, 192 : 192 + 3 * columns],
        stationary=ones,
        moving=squares,
        is_stationary_onezero=True,
        accumulate=False,
    )
    nisa.tensor_tensor(
        dst=packed.ap(pattern=[[2 * n * columns, PARTITIONS], [n, 2 * columns], [1, n]], offset=0),
        data1=turned.ap(pattern=[[2 * n * columns, PARTITIONS], [n, 2 * columns], [1, n]], offset=0),
        data2=mask.ap(pattern=[[n, PARTITIONS], [0, 2 * columns], [1, n]], offset=0),
        op=nl.multiply,
    )
    nisa.tensor_reduce(
        dst=k_columns,
        op=nl.add,
        data=packed.ap(pattern=[[2 * n * columns, PARTITIONS], [2 * columns, n], [n, groups], [1, n]], offset=0),
        axis=3,
    )
    return packed, k_columns, squares


# --- Per-head scalars ------------------------------------------------------------------------------------------------
def _gate_steps(raw_gates: Tensor, per_head: Tensor) -> tuple[Tensor, Tensor]:
    """exp(A_log) [1, heads of a sequence] and softplus(a + dt_bias) [1, T * heads of the box]."""
    size, heads = raw_gates.shape[2] * raw_gates.shape[3], per_head.shape[2]
    rate = nl.ndarray((1, heads), dtype=nl.float32, buffer=nl.sbuf)
    steps = nl.ndarray((1, size // heads, heads), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(
        dst=steps,
        data1=raw_gates.ap(pattern=[[2 * size, 1], [heads, size // heads], [1, heads]], offset=0),
        data2=per_head.ap(pattern=[[2 * heads, 1], [0, size // heads], [1, heads]], offset=heads),
        op=nl.add,
    )
    nisa.activation(dst=rate, op=nl.exp, data=per_head[:, 0, :])
    nisa.activation(dst=steps, op=nl.softplus, data=steps)
    return rate, steps


def _gate_rows(raw_gates: Tensor, rate: Tensor, steps: Tensor) -> Tensor:
    """[1, 3, T * heads of the box]: exp(g), room for -exp(g) beta, and beta; on one partition."""
    repeats, heads = steps.shape[1], steps.shape[2]
    rows = nl.ndarray((1, 3, repeats * heads), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=rows[:, 2, :], op=nl.sigmoid, data=raw_gates[:, 1, :, :])
    nisa.tensor_tensor(
        dst=steps,
        data1=steps,
        data2=rate.ap(pattern=[[heads, 1], [0, repeats], [1, heads]], offset=0),
        op=nl.multiply,
    )
    nisa.activation(dst=rows[:, 0, :], op=nl.exp, data=steps, scale=-1.0)
    return rows


def _gate_columns(gate_rows: Tensor, blocks: Tensor, ones: Tensor, scalars: Tensor, first: int, columns: int) -> Tensor:
    """Columns of the gate rows from first on, the same on all partitions: scalars[:, 0 : 3 columns].

    Returns:
        decay: [128, columns / n] float32 in PSUM, exp(g) of the head that the state has on this partition.
    """
    n, width = blocks.shape[1], gate_rows.shape[2]
    decay = scalars[:, 384 : 384 + columns // n]
    own = nl.ds(first, columns)
    for i in nl.static_range(n):
        nisa.nc_matmul(
            dst=decay,
            stationary=blocks[:, i, :],
            moving=gate_rows.ap(pattern=[[3 * width, 1], [n, columns // n]], offset=first + i),
            is_stationary_onezero=True,
            accumulate=i != 0,
        )
    nisa.scalar_tensor_tensor(
        dst=gate_rows[:, 1, own],
        data=gate_rows[:, 0, own],
        op0=nl.multiply,
        operand0=-1.0,
        op1=nl.multiply,
        operand1=gate_rows[:, 2, own],
    )
    nisa.nc_matmul(
        dst=scalars[:, 0 : 3 * columns],
        stationary=ones[0:1, :],
        moving=gate_rows[:, :, own],
        is_stationary_onezero=True,
        accumulate=False,
    )
    return decay


def _head_scalars(rk_v: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor]:
    """What multiplies S^T k, 1 and S^T q in U and in o, the same on all partitions.

    Returns:
        write: [128, 3, columns], -eg beta rk^2, then rk beta v, and room for the first times S^T k.
        read: [128, 3, columns], k.q times the first two, and eg.
    """
    columns = rk_v.shape[2]
    write = nl.ndarray((PARTITIONS, 3, columns), dtype=nl.float32, buffer=nl.sbuf)
    read = nl.ndarray((PARTITIONS, 3, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=rk_v[:, 0, :], op=nl.rsqrt, data=scalars[:, 192 : 192 + columns], bias=L2NORM_EPS)
    nisa.tensor_tensor(
        dst=write[:, 0:2, :],
        data1=scalars.ap(pattern=[[512, PARTITIONS], [columns, 2], [1, columns]], offset=columns),
        data2=rk_v.ap(pattern=[[2 * columns, PARTITIONS], [0, 2], [1, columns]], offset=0),
        op=nl.multiply,
    )
    nisa.tensor_copy(dst=read[:, 2, :], src=scalars[:, 0:columns], engine=nisa.engine.scalar)
    nisa.tensor_tensor(dst=write[:, 0:2, :], data1=write[:, 0:2, :], data2=rk_v, op=nl.multiply)
    nisa.tensor_tensor(
        dst=read[:, 0:2, :],
        data1=write[:, 0:2, :],
        data2=scalars.ap(pattern=[[512, PARTITIONS], [0, 2], [1, columns]], offset=192 + 2 * columns),
        op=nl.multiply,
    )
    return write, read


def _norm_bias(squares: Tensor, ones: Tensor, scalars: Tensor, norm_eps: float) -> Tensor:
    """[columns, 1]: norm_eps K (q.q + eps), the epsilon of the output norm for o without the norm and scale of q."""
    columns = squares.shape[2]
    norm_bias = nl.ndarray((columns, 1), dtype=nl.float32, buffer=nl.sbuf)
    factor = norm_eps * PARTITIONS
    nisa.nc_matmul(
        dst=scalars[0:columns, 511:512],
        stationary=squares[:, 1, :],
        moving=ones[:, 0:1],
        is_moving_onezero=True,
        accumulate=False,
    )
    nisa.activation(dst=norm_bias, op=nl.copy, data=scalars[0:columns, 511:512], scale=factor, bias=factor * L2NORM_EPS)
    return norm_bias


def _output_gate(z_rows: Tensor, norm_rows: Tensor, columns: int) -> Tensor:
    """norm_weight silu(z): [columns, V]."""
    gate = nl.ndarray((columns, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=gate, op=nl.silu, data=z_rows)
    nisa.tensor_tensor(dst=gate, data1=gate, data2=norm_rows[0:columns, :], op=nl.multiply, engine=nisa.engine.gpsimd)
    return gate


# --- One head --------------------------------------------------------------------------------------------------------
def _recurrent_head(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Any, load_state: bool
) -> tuple[Tensor, Tensor]:
    """The body of the single-head kernels: up to 128 tokens are turned to columns at once, then taken one by one."""
    tokens = query.shape[0]
    assert query.shape[1] == PARTITIONS and value.shape[1] == PARTITIONS, "K and V must be 128"
    output = nl.ndarray((tokens, PARTITIONS), dtype=query.dtype, buffer=nl.shared_hbm)
    final_state = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)
    ones, identity = _constants()
    S = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    if load_state:
        nisa.dma_copy(dst=S, src=initial_state)
    else:
        nisa.memset(dst=S, value=0.0)

    for first in nl.sequential_range(0, tokens, PARTITIONS):
        some = min(PARTITIONS, tokens - first)
        # Columns of q, k, v and, the same on all partitions, of exp(g) and beta.
        columns = nl.ndarray((PARTITIONS, 5, some), dtype=nl.float32, buffer=nl.sbuf)
        for which, source in ((0, key), (1, query), (2, value), (3, g), (4, beta)):
            width = source.shape[1]
            loaded = nl.ndarray((some, PARTITIONS), dtype=source.dtype, buffer=nl.sbuf)
            rows = nl.ndarray((some, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
            turned = nl.ndarray((PARTITIONS, some), dtype=nl.float32, buffer=nl.psum)
            nisa.dma_copy(
                dst=loaded,
                src=source.ap(pattern=[[width, some], [1 if width > 1 else 0, PARTITIONS]], offset=first * width),
            )
            nisa.tensor_copy(dst=rows, src=loaded)
            nisa.nc_transpose(dst=turned, data=rows, engine=nisa.engine.tensor)
            nisa.activation(dst=columns[:, which, :], op=nl.exp if which == 3 else nl.copy, data=turned)
        products = nl.ndarray((PARTITIONS, some), dtype=nl.float32, buffer=nl.sbuf)
        k_dot_q = nl.ndarray((PARTITIONS, some), dtype=nl.float32, buffer=nl.psum)
        outputs = nl.ndarray((PARTITIONS, some), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=products, data1=columns[:, 0, :], data2=columns[:, 1, :], op=nl.multiply)
        nisa.nc_matmul(dst=k_dot_q, stationary=ones, moving=products, is_stationary_onezero=True)
        for t in nl.sequential_range(some):
            S = _recurrent_token(S=S, columns=columns, k_dot_q=k_dot_q, outputs=outputs, identity=identity, t=t)
        turned = nl.ndarray((some, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
        rows = nl.ndarray((some, PARTITIONS), dtype=query.dtype, buffer=nl.sbuf)
        nisa.nc_transpose(dst=turned, data=outputs, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=rows, src=turned)
        nisa.dma_copy(dst=output[first : first + some, :], src=rows)
    nisa.dma_copy(dst=final_state, src=S)
    return output, final_state


def _recurrent_token(S: Tensor, columns: Tensor, k_dot_q: Tensor, outputs: Tensor, identity: Tensor, t: int) -> Tensor:
    """One token with columns k, q, v, exp(g), beta [128, 5, S]; writes outputs[:, t] and returns the new state."""
    read = nl.ndarray((PARTITIONS, 2), dtype=nl.float32, buffer=nl.psum)
    decayed = nl.ndarray((PARTITIONS, 2), dtype=nl.float32, buffer=nl.sbuf)
    u = nl.ndarray((PARTITIONS, 1), dtype=nl.float32, buffer=nl.sbuf)
    spread = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    S_next = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    eg, beta = columns[:, 3, t : t + 1], columns[:, 4, t : t + 1]
    nisa.nc_matmul(dst=read, stationary=S, moving=columns[:, 0:2, t])
    nisa.tensor_scalar(dst=decayed, data=read, op0=nl.multiply, operand0=eg)
    nisa.tensor_scalar(
        dst=u,
        data=decayed[:, 0:1],
        op0=nl.subtract,
        operand0=columns[:, 2, t : t + 1],
        reverse0=True,
        op1=nl.multiply,
        operand1=beta,
    )
    nisa.nc_matmul(
        dst=spread,
        stationary=u.ap(pattern=[[1, PARTITIONS], [0, PARTITIONS]], offset=0),
        moving=identity,
        is_moving_onezero=True,
    )
    nisa.activation(dst=S_next, op=nl.copy, data=S, scale=eg)
    nisa.scalar_tensor_tensor(
        dst=S_next,
        data=spread,
        op0=nl.multiply,
        operand0=columns[:, 0, t : t + 1],
        op1=nl.add,
        operand1=S_next,
    )
    nisa.scalar_tensor_tensor(
        dst=outputs[:, t : t + 1],
        data=u,
        op0=nl.multiply,
        operand0=k_dot_q[:, t : t + 1],
        op1=nl.add,
        operand1=decayed[:, 1:2],
    )
    return S_next
