# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Token generation: a DeltaNet layer between its projections, for the next tokens of every sequence, in one launch.

Letters: B batch, T tokens of a step, H value heads, Hk key heads, R = H / Hk, K key dim and V value dim, both 128,
W conv kernel, Ch = 2 Hk K + H V conv channels, n heads of a group.

The specification is `causal_conv`, `decay_and_beta` and `recurrent_gated_delta_rule` of `qwen35.ops`, followed by
`qwen35.layers.norms.Qwen35GatedRMSNorm`.

With S the state before a token, k and q raw (after the convolution), rk = 1 / sqrt(k.k + eps) and eg = exp(g):

    U = rk beta v - eg beta rk^2 (S^T k)        rk times the paper's u
    S <- eg S + k U^T
    o = (eg S^T q + (k.q) U) / (sqrt(q.q + eps) sqrt(K))

so one pass over S gives a token both products, and neither waits for the norms of k and q. Nor is o divided by the norm
of q and by sqrt(K): that only changes the epsilon e of the RMS norm that follows. With p = eg S^T q + (k.q) U,
o / sqrt(mean(o^2) + e) = p / sqrt(mean(p^2) + e K (q.q + eps)).
"""

from .common import PARTITIONS, Tensor, make_ones_and_identity
from .decode_io import (
    Box,
    heads_per_group,
    heads_per_sequence,
    load_conv,
    load_gates,
    load_output_gate,
    load_state,
    rows_per_sequence,
    store_conv_state,
    store_output,
    store_state,
)
from .decode_operands import (
    MAX_HEADS,
    block_masks,
    broadcast_gates,
    convolve,
    gate_steps,
    head_scalars,
    make_gate_rows,
    make_norm_bias,
    make_output_gate,
    pack_columns,
    transpose_taps,
    transpose_weights,
)
from .nki_seam import nisa, nki, nl


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
        Limits: 2 Hk + H <= 128 and H <= 64 per core and sequence. A core computes as many sequences together as fit
        into 128 rows of 128 channels and 64 heads, then the next ones. It computes convolution, gates and output norm
        for as many tokens together as fit into 64 heads; the state is loaded and stored once.
        Layouts: inputs and outputs are those of the model. On chip the state is packed in groups of n = 4, 2 or 1
        heads. Each head takes 128 / n partitions and each of these n rows of its [K, V] matrix, which are contiguous in
        HBM. With n = 4 that is 2 KiB per partition, 85% of the DMA peak by the modelled costs; one row would be 512 B
        and 58%. The convolution has the 128 channels of a head on partitions, after a transpose by the Tensor engine,
        so that all lanes work; with heads on partitions, only as many would work as there are heads.
        Scheduling: tokens are taken one by one, since each reads the state that the one before it wrote. Half of the
        rank-1 updates of the state run on Scalar and GpSimd beside Vector. A token uses seven functions of the Scalar
        engine (exp, softplus, sigmoid, silu, square, rsqrt, copy), and so reloads its tables, whose time the emulator
        does not model.

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
    for tensor in (A_log, dt_bias, norm_weight, state):
        # DMA copies of the default dge_mode move bytes; only software descriptors cast (nki/migration/index.rst).
        assert tensor.dtype == nl.float32, "A_log, dt_bias, norm_weight and state must be float32"

    output = nl.ndarray((B, T, H * PARTITIONS), dtype=z.dtype, buffer=nl.shared_hbm)
    new_state = nl.ndarray((B, H, PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)
    new_conv = nl.ndarray((B, Ch, 3), dtype=conv_state.dtype, buffer=nl.shared_hbm)
    states = new_state
    # The state has a token axis too, of size one, so that it and the states of every token are addressed alike.
    state_in, state_out = (
        state.reshape((B, 1, H, PARTITIONS, PARTITIONS)),
        new_state.reshape((B, 1, H, PARTITIONS, PARTITIONS)),
    )
    if token_states:
        states = nl.ndarray((B, T, H, PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)

    core, cores = 0, 1
    if nl.program_ndim() != 0:
        core, cores = nl.program_id(axis=0), nl.num_programs(axes=0)
    mine = _share(B=B, Hk=Hk, R=R, core=core, cores=cores)
    assert rows_per_sequence(mine) <= PARTITIONS and heads_per_sequence(mine) <= MAX_HEADS, "too many heads on one core"
    at_once = 1 if mine.nb == 0 else min(PARTITIONS // rows_per_sequence(mine), MAX_HEADS // heads_per_sequence(mine))
    constants = make_ones_and_identity()
    for first in range(0, mine.nb, at_once):
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
            inputs=(qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, state_in),
            outputs=(output, state_out, new_conv, states),
            constants=constants,
            norm_eps=norm_eps,
            token_states=token_states,
        )
    if token_states:
        return output, new_state, new_conv, states
    return output, new_state, new_conv


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


def _decode_slab(
    box: Box,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    constants: tuple[Tensor, Tensor],
    norm_eps: float,
    token_states: bool,
) -> None:
    """The step for the heads and sequences of one box; inputs and outputs are those of `deltanet_decode_layer`.

    The last axis of [128, columns] tiles has a column for each value head, in the order (token, sequence, head).
    """
    qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, state = inputs
    output, new_state, new_conv, states = outputs
    T, H = a.shape[1], a.shape[2]
    count = box.nb * heads_per_sequence(box)
    ones, identity = constants
    # With all heads in the box, those of one sequence follow those of another in HBM.
    n = heads_per_group(run=count if heads_per_sequence(box) == H else heads_per_sequence(box))
    groups = count // n
    tokens = min(T, MAX_HEADS // count)  # for which convolution, gates and output norm are computed together

    # Small inputs first: the chain that leads to k and q runs while the state arrives.
    x, history, weight = load_conv(box=box, qkv=qkv, conv_state=conv_state, conv_weight=conv_weight, H=H)
    raw_gates, per_head = load_gates(box=box, a=a, b=b, A_log=A_log, dt_bias=dt_bias)
    z_rows, norm_rows = load_output_gate(box=box, z=z, norm_weight=norm_weight, tokens=tokens)
    tiles = []  # the state before a token, the one after it, and an older one, whose store may not have ended
    for _ in range(min(T, 2) + 1):
        tiles.append(nl.ndarray((PARTITIONS, groups, n, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf))
    for i in range(groups):
        load_state(state=state, tile=tiles[0], box=box, group=i)

    mask, blocks = block_masks(ones=ones, n=n)
    # Engines run in program order. In this one Vector and Scalar are free when the weights, the taps and then the
    # convolution need them.
    rate, steps = gate_steps(raw_gates=raw_gates, per_head=per_head)
    weights = transpose_weights(weight=weight, nb=box.nb)
    taps = transpose_taps(x=x, history=history)
    gate_rows = make_gate_rows(raw_gates=raw_gates, rate=rate, steps=steps)

    scalars = nl.ndarray((PARTITIONS, 512), dtype=nl.float32, buffer=nl.psum)
    products = nl.ndarray((PARTITIONS, 2, tokens * count), dtype=nl.float32, buffer=nl.psum)
    o_rows = nl.ndarray((tokens * count, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    u_tiles = []
    for _ in range(3):
        u_tiles.append(nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.psum))

    for t0 in range(0, T, tokens):
        some = min(tokens, T - t0)
        columns = some * count
        gate = make_output_gate(z_rows=z_rows[t0 // tokens], norm_rows=norm_rows, columns=columns)
        kq, rk_v = convolve(taps=taps, weights=weights, box=box, t0=t0, some=some)
        if t0 == 0:
            store_conv_state(new_conv=new_conv, x=x, history=history, box=box, H=H)
        decay = broadcast_gates(
            gate_rows=gate_rows, blocks=blocks, ones=ones, scalars=scalars, first=t0 * count, columns=columns
        )
        packed, k_columns, squares = pack_columns(kq=kq, mask=mask, ones=ones, identity=identity, scalars=scalars)
        write, read = head_scalars(rk_v=rk_v, scalars=scalars)

        # Engines run in program order. With one token, a group is read one step before its U is computed and two steps
        # before it is updated, so that no engine waits for another. With more tokens, the update comes as early as it
        # can, because the next token waits for it.
        total = some * groups
        late = 2 if some == 1 else min(1, groups - 1)
        read_first = some == 1 or late == 0
        for step in range(total + 2):
            token = t0 + step // groups
            if step < total and read_first:
                _read_state(tiles=tiles, token=token, packed=packed, products=products, decay=decay, step=step)
            ready = step - min(late, 1)
            if ready >= 0 and ready < total:
                _broadcast_u(
                    u_rows=u_tiles[ready % 3],
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
                _update_state(S=after, u_rows=u_tiles[done % 3], k_columns=k_columns, group=i, column=done)
                if token_states:
                    store_state(states=states, tile=after, box=box, group=i, token=t)
                if t == T - 1:
                    store_state(states=new_state, tile=after, box=box, group=i, token=0)
        norm_bias = make_norm_bias(squares=squares, ones=ones, scalars=scalars, norm_eps=norm_eps)
        store_output(output=output, o_rows=o_rows[0:columns, :], gate=gate, norm_bias=norm_bias, box=box, t0=t0)


def _around(tiles: list[Tensor], token: int) -> tuple[Tensor, Tensor]:
    """The tiles of the state before and after a token."""
    return tiles[token % len(tiles)], tiles[(token + 1) % len(tiles)]


# --- One group of heads ----------------------------------------------------------------------------------------------
def _read_state(tiles: list[Tensor], token: int, packed: Tensor, products: Tensor, decay: Tensor, step: int) -> None:
    """S^T k and S^T q of a group in one pass over its state, to products [V, 2, columns]; and the decayed state."""
    before, after = _around(tiles=tiles, token=token)
    n, group = packed.shape[1], step % before.shape[1]
    own = nl.ds(step * n, n)
    for j in range(n):
        nisa.nc_matmul(
            dst=products[:, :, own],
            stationary=before[:, group, j, :],
            moving=packed[:, j, :, own],
            accumulate=j != 0,
        )
    # The decayed state does not wait for k: the Scalar engine makes it meanwhile.
    nisa.activation(dst=after[:, group, :, :], op=nl.copy, data=before[:, group, :, :], scale=decay[:, step : step + 1])


def _broadcast_u(u_rows: Tensor, write: Tensor, products: Tensor, column: int, n: int, identity: Tensor) -> None:
    """U of the n heads from a column on, to u_rows [128, V] in PSUM: every partition of a head holds its U as a row.

    The Tensor engine adds the two terms of U, rk beta v and -eg beta rk^2 S^T k. Its stationary operand is the column
    of a head, repeated for each of the head's partitions; its moving operand, the identity, transposes that.
    """
    columns = write.shape[2]
    own = nl.ds(column, n)
    for term in range(2):
        if term == 1:
            nisa.tensor_tensor(dst=write[:, 2, own], data1=products[:, 0, own], data2=write[:, 0, own], op=nl.multiply)
        nisa.nc_matmul(
            dst=u_rows,
            stationary=write.ap(
                pattern=[[3 * columns, PARTITIONS], [1, n], [0, PARTITIONS // n]], offset=(1 + term) * columns + column
            ),
            moving=identity,
            is_moving_onezero=True,
            accumulate=term != 0,
        )


def _update_state(S: Tensor, u_rows: Tensor, k_columns: Tensor, group: int, column: int) -> None:
    """S += k U^T for a group, where S is the decayed state: even rows on Vector, odd ones on Scalar and GpSimd."""
    n = k_columns.shape[1]
    for j in range(n):
        k = k_columns[:, j, column : column + 1]
        mine = S[:, group, j, :]
        if (group * n + j) % 2 == 0:
            nisa.scalar_tensor_tensor(dst=mine, data=u_rows, op0=nl.multiply, operand0=k, op1=nl.add, operand1=mine)
        else:
            outer = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=outer, op=nl.copy, data=u_rows, scale=k)
            nisa.tensor_tensor(dst=mine, data1=mine, data2=outer, op=nl.add, engine=nisa.engine.gpsimd)


def _read_output(o_rows: Tensor, products: Tensor, read: Tensor, identity: Tensor) -> None:
    """o_rows [columns, V] = eg S^T q + (k.q) U: the Tensor engine transposes the three terms and adds them."""
    columns = read.shape[2]
    terms = nl.ndarray((PARTITIONS, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(
        dst=terms,
        data1=products[:, :, 0:columns],
        data2=read.ap(pattern=[[3 * columns, PARTITIONS], [2 * columns, 2], [1, columns]], offset=0),
        op=nl.multiply,
    )
    for term in range(3):
        nisa.nc_matmul(
            dst=o_rows[0:columns, :],
            stationary=read[:, 1, :] if term == 0 else terms[:, term - 1, :],
            moving=identity,
            is_moving_onezero=True,
            accumulate=term != 0,
        )
