# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Token generation: a DeltaNet layer between its projections, for the next token of every sequence, in one launch.

Letters: B batch, H value heads, Hk key heads, R = H / Hk, K key dim and V value dim, both 128,
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
    check_layer,
    heads_per_group,
    heads_per_sequence,
    load_conv,
    load_gates,
    load_output_gate,
    load_states,
    packed_rows,
    rows_per_sequence,
    share_of_core,
    shift_conv_state,
    store_conv,
    store_output,
)
from .decode_operands import (
    MAX_COLUMNS,
    broadcast_gates,
    convolve,
    gate_steps,
    head_blocks,
    head_mask,
    head_scalars,
    keys_of_partitions,
    make_gate_rows,
    make_norm_bias,
    make_output_gate,
    mask_channels,
    multiply_channels,
    select_channels,
    transpose_taps,
    transpose_weights,
)
from .nki_seam import nisa, nki, nl

BANK = 512
"""float32 in a PSUM bank."""


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
) -> tuple[Tensor, Tensor, Tensor]:
    """A DeltaNet layer between its projections, for the next token of every sequence, in one launch.

    Convolution with its state, SiLU, l2-norm, gates, delta rule and gated RMS norm. Launch with grid 2 on a logical
    core of two physical cores (LNC=2), or without a grid. The cores share the sequences if B is even, else the key
    heads, else the value heads of the only key head; any B, H and Hk will do.

    Dimensions:
        B: sequences; H, Hk: value and key heads of this rank, H a multiple of Hk; K = V = 128; W = 4;
        Ch = 2 Hk K + H V.

    Args:
        qkv: [B, 1, Ch] bfloat16 or float32, output of the projection, channels [q | k | v].
        z: [B, 1, H V], output gate before its SiLU.
        a, b: [B, 1, H], decay and write gates before their activation.
        conv_weight: [Ch, W].
        conv_state: [B, Ch, W - 1] in qkv.dtype, the inputs before this step, oldest first.
        A_log, dt_bias: [H] float32.
        norm_weight: [V] float32.
        state: [B, H, K, V] float32.
        norm_eps: epsilon of the gated RMS norm; compile-time.

    Returns:
        output: [B, 1, H V] in z.dtype, the normed and gated output.
        new_state: [B, H, K, V] float32.
        new_conv_state: [B, Ch, W - 1] in conv_state.dtype.

    Notes:
        Numerics: everything after the loads is float32, also the convolution, which transformers rounds to the dtype
        of the weights. exp(g) of any g <= 0 is finite, nothing divides by a decay, and an epsilon guards each norm.
        Limits: 2 Hk + H <= 128 and H <= 64 per core and sequence. A core computes as many sequences together as fit
        into 128 rows of 128 channels and 64 heads, then the next ones. The state is loaded and stored once.
        Layouts: inputs and outputs are those of the model. On chip the state is packed in groups of n = 8, 4, 2 or 1
        heads. Each head takes 128 / n partitions and each of these n rows of its [K, V] matrix, which are contiguous in
        HBM. With n = 8 that is 4 KiB per partition, 92% of the DMA peak by the modelled costs; one row would be 512 B
        and 58%. The halves of a group may be of two sequences, which then share no matmul: one with what is not a
        number leaves the others alone. The convolution has the 128 channels of a head on partitions, after a transpose
        by the Tensor engine, so that all lanes work; with heads on partitions, only as many would work as there are
        heads.
        Scheduling: half of the rank-1 updates of the state run on Scalar and GpSimd beside Vector. A step uses seven
        functions of the Scalar engine (exp, softplus, sigmoid, silu, square, rsqrt, copy), and so reloads its tables,
        whose time the emulator does not model.

    Pseudocode:
        x = [conv_state | qkv];  q, k, v = split(silu(sum_w conv_weight[:, w] x[w]))
        eg = exp(-exp(A_log) softplus(a + dt_bias));  beta = sigmoid(b)
        for each group of heads:
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
    assert T == 1, f"qkv has {T} tokens of each sequence: one is needed, verify_layer takes more"
    check_layer(H=H, Hk=Hk, qkv=qkv, conv_weight=conv_weight, conv_state=conv_state, state=state)
    for tensor in (A_log, dt_bias, norm_weight):
        # DMA copies of the default dge_mode move bytes; only software descriptors cast (nki/migration/index.rst).
        assert tensor.dtype == nl.float32, "A_log, dt_bias and norm_weight must be float32"

    output = nl.ndarray((B, 1, H * PARTITIONS), dtype=z.dtype, buffer=nl.shared_hbm)
    new_state = nl.ndarray((B, H, PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)
    new_conv = nl.ndarray((B, Ch, 3), dtype=conv_state.dtype, buffer=nl.shared_hbm)

    core, cores = 0, 1
    if nl.program_ndim() != 0:
        core, cores = nl.program_id(axis=0), nl.num_programs(axes=0)
    mine = share_of_core(B=B, Hk=Hk, R=R, core=core, cores=cores)
    rows, heads = rows_per_sequence(mine), heads_per_sequence(mine)
    assert rows <= PARTITIONS and heads <= MAX_COLUMNS, "too many heads on one core"
    at_once = 1 if mine.nb == 0 else min(PARTITIONS // rows, MAX_COLUMNS // heads)
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
            inputs=(qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, state),
            outputs=(output, new_state, new_conv),
            constants=constants,
            norm_eps=norm_eps,
        )
    return output, new_state, new_conv


def _decode_slab(
    box: Box,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    constants: tuple[Tensor, Tensor],
    norm_eps: float,
) -> None:
    """The step for the heads and sequences of one box; inputs and outputs are those of `deltanet_decode_layer`.

    The last axis of [128, columns] tiles has a column for each value head, in the order (sequence, head).
    """
    qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, state = inputs
    output, new_state, new_conv = outputs
    H = a.shape[2]
    columns = box.nb * heads_per_sequence(box)
    ones, identity = constants

    # Small inputs first: the chain that leads to k and q runs while the state arrives.
    x, history, weight = load_conv(box=box, qkv=qkv, conv_state=conv_state, conv_weight=conv_weight, H=H)
    raw_gates, per_head = load_gates(box=box, a=a, b=b, A_log=A_log, dt_bias=dt_bias)
    z_rows, norm_rows = load_output_gate(box=box, z=z, norm_weight=norm_weight)
    n = heads_per_group(box=box, H=H, most=8, halves=True)
    before = load_states(state=state, box=box, n=n)
    groups = before.shape[1]
    # Halves of a group that may be of two sequences are multiplied side by side, each into a PSUM bank of its own.
    parts = 2 if heads_per_sequence(box) % n != 0 else 1
    after = nl.ndarray(before.shape, dtype=nl.float32, buffer=nl.sbuf)

    mask, blocks = head_mask(ones=ones, n=n), head_blocks(n=n)
    # Engines run in program order. In this one Vector and Scalar are free when the weights, the taps and then the
    # convolution need them.
    rate, steps = gate_steps(raw_gates=raw_gates, per_head=per_head)
    weights = transpose_weights(weight=weight, nb=box.nb)
    taps = transpose_taps(x=x, history=history)
    gate_rows = make_gate_rows(raw_gates=raw_gates, rate=rate, steps=steps)

    scalars = nl.ndarray((PARTITIONS, 512), dtype=nl.float32, buffer=nl.psum)
    products = nl.ndarray((PARTITIONS, parts, BANK), dtype=nl.float32, buffer=nl.psum)
    o_rows = nl.ndarray((columns, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    u_tiles = []
    for _ in range(3):
        u_tiles.append(nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.psum))

    gate = make_output_gate(z_rows=z_rows, norm_rows=norm_rows)
    kq, rk_v = convolve(taps=taps, weights=weights, box=box, T=1)
    store_conv(new_conv=new_conv, new=shift_conv_state(x=x, history=history), box=box, H=H)
    decay = broadcast_gates(gate_rows=gate_rows, blocks=blocks, ones=ones, scalars=scalars, parts=parts)
    channels = select_channels(kq=kq, identity=identity, n=n)
    squares = multiply_channels(kq=kq, ones=ones, scalars=scalars)
    packed = mask_channels(channels=channels, mask=mask, columns=columns, T=1)
    write, read = head_scalars(rk_v=rk_v, scalars=scalars)

    # Engines run in program order. A group is read one step before its U is computed and two steps before it is
    # updated, so that none waits for another. Of large groups the first does not wait until the second is read: the
    # earlier its store, the less the transfers idle.
    early = n == 8
    keys = packed
    for step in range(groups + 2):
        if step < groups:
            _read_state(before=before, after=after, packed=packed, products=products, decay=decay, group=step)
        for group in range(groups):
            if step == group + (0 if early and group == 0 else 1):
                _broadcast_u(
                    u_rows=u_tiles[group % 3],
                    write=write,
                    products=products,
                    column=group * n,
                    n=n,
                    identity=identity,
                )
        if step == 0:
            keys = keys_of_partitions(packed=packed, parts=parts)  # for the updates
        if step == groups:
            _read_output(o_rows=o_rows, products=products, read=read, n=n, identity=identity)
        for group in range(groups):
            if step == group + (1 if early and group == 0 else 2):
                _update_state(S=after, u_rows=u_tiles[group % 3], keys=keys, group=group)
                nisa.dma_copy(dst=packed_rows(hbm=new_state, box=box, n=n, group=group), src=after[:, group, :, :])
    norm_bias = make_norm_bias(squares=squares, ones=ones, scalars=scalars, norm_eps=norm_eps)
    store_output(output=output, o_rows=o_rows, gate=gate, norm_bias=norm_bias, box=box)


# --- One group of heads ----------------------------------------------------------------------------------------------
def _read_state(before: Tensor, after: Tensor, packed: Tensor, products: Tensor, decay: Tensor, group: int) -> None:
    """S^T k and S^T q of a group in one pass over its state, to products; and the decayed state.

    Args:
        products: [V, parts, BANK] float32 in PSUM: a part has S^T k, then S^T q of its share of each group's heads.
    """
    n, parts = packed.shape[1], products.shape[1]
    rows, width, columns = PARTITIONS // parts, n // parts, packed.shape[3]
    for j in range(n):
        for part in range(parts):
            mine = nl.ds(part * rows, rows)
            nisa.nc_matmul(
                dst=products.ap(
                    pattern=[[parts * BANK, PARTITIONS], [columns // parts, 2], [1, width]],
                    offset=part * BANK + group * width,
                ),
                stationary=before[mine, group, j, :],
                moving=packed[mine, j, :, nl.ds(group * n + part * width, width)],
                tile_position=(part * rows, 0),
                tile_size=(rows, PARTITIONS),
                accumulate=j != 0,
            )
    # The decayed state does not wait for k: the Scalar engine makes it meanwhile.
    nisa.activation(
        dst=after[:, group, :, :], op=nl.copy, data=before[:, group, :, :], scale=decay[:, group : group + 1]
    )


def _broadcast_u(u_rows: Tensor, write: Tensor, products: Tensor, column: int, n: int, identity: Tensor) -> None:
    """U of the n heads from a column on, to u_rows [128, V] in PSUM: every partition of a head holds its U as a row.

    The Tensor engine adds the two terms of U, rk beta v and -eg beta rk^2 S^T k. Its stationary operand is the column
    of a head, repeated for each of the head's partitions; its moving operand, the identity, transposes that.
    """
    columns = write.shape[2]
    own = nl.ds(column, n)
    for term in range(2):
        if term == 1:
            parts = products.shape[1]
            sk = products.ap(
                pattern=[[parts * BANK, PARTITIONS], [BANK, parts], [1, n // parts]], offset=column // parts
            )
            nisa.tensor_tensor(dst=write[:, 2, own], data1=sk, data2=write[:, 0, own], op=nl.multiply)
        nisa.nc_matmul(
            dst=u_rows,
            stationary=write.ap(
                pattern=[[3 * columns, PARTITIONS], [1, n], [0, PARTITIONS // n]], offset=(1 + term) * columns + column
            ),
            moving=identity,
            is_moving_onezero=True,
            accumulate=term != 0,
        )


def _update_state(S: Tensor, u_rows: Tensor, keys: Tensor, group: int) -> None:
    """S += k U^T for a group, where S is the decayed state: even rows on Vector, odd ones on Scalar and GpSimd."""
    n = keys.shape[1]
    for j in range(n):
        k = keys[:, j, group : group + 1]
        mine = S[:, group, j, :]
        if (group * n + j) % 2 == 0:
            nisa.scalar_tensor_tensor(dst=mine, data=u_rows, op0=nl.multiply, operand0=k, op1=nl.add, operand1=mine)
        else:
            outer = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=outer, op=nl.copy, data=u_rows, scale=k)
            nisa.tensor_tensor(dst=mine, data1=mine, data2=outer, op=nl.add, engine=nisa.engine.gpsimd)


def _read_output(o_rows: Tensor, products: Tensor, read: Tensor, n: int, identity: Tensor) -> None:
    """o_rows [columns, V] = eg S^T q + (k.q) U: the Tensor engine transposes the three terms and adds them."""
    columns, parts = read.shape[2], products.shape[1]
    width = n // parts
    terms = nl.ndarray((PARTITIONS, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    for which in range(2):
        nisa.tensor_tensor(
            dst=terms[:, which, :],
            data1=products.ap(
                pattern=[[parts * BANK, PARTITIONS], [width, columns // n], [BANK, parts], [1, width]],
                offset=which * (columns // parts),
            ),
            data2=read[:, 2 * which, :],
            op=nl.multiply,
        )
    for term in range(3):
        nisa.nc_matmul(
            dst=o_rows,
            stationary=read[:, 1, :] if term == 0 else terms[:, term - 1, :],
            moving=identity,
            is_moving_onezero=True,
            accumulate=term != 0,
        )
