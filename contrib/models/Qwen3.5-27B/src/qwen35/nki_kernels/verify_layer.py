# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Verification of drafted tokens: a DeltaNet layer between its projections, for T tokens of every sequence at once.

Letters: B batch, T tokens, H value heads, Hk key heads, R = H / Hk, K key dim and V value dim, both 128, W conv kernel,
Ch = 2 Hk K + H V conv channels, n heads of a group, c columns: tokens of value heads, in the order (head, token).

The specification is `causal_conv`, `decay_and_beta` and `verify_delta_rule` of `qwen35.ops`, followed by
`qwen35.layers.norms.Qwen35GatedRMSNorm`. The state is read, not written: `commit_layer` moves it on by as many of the
tokens as are accepted.

All tokens of a head are one chunk (see `chunk_pieces`). With S the state before them, k and q raw (after the
convolution), D_ij the decay from token j to token i >= j, d_i that from the state on, w_j = beta_j / (k_j.k_j + eps):

    A = -tril(K K^T, -1) * D  diag(w)
    U = diag(w) (I - A)^-1 (diag(|k|) V - diag(d) K S)
    O = (Q K^T * D) U + diag(d) Q S

and token t adds k_t U_t^T to the state. The columns of one box of heads fill one [c, c] matrix, whose blocks of one
head are all that is kept of it: so K K^T of all heads is one matmul. O is not divided by the norm of q, as in
`decode_layer`.
"""

from dataclasses import dataclass
from typing import Any

from .common import L2_EPS, PARTITIONS, Tensor, make_ones_and_identity
from .decode_io import (
    Box,
    check_layer,
    first_head,
    heads_per_group,
    heads_per_sequence,
    load_conv,
    load_output_gate,
    load_states,
    rows_of_heads,
    share_of_core,
    store_output,
)
from .decode_operands import (
    convolve,
    head_mask,
    make_output_gate,
    mask_channels,
    select_channels,
    transpose_taps,
    transpose_weights,
)
from .nki_seam import nisa, nki, nl

MOST_TOKENS = 8
"""T at most: the powers of A that `_invert` forms lose no precision up to there, even if all keys are equal."""

MOST_COLUMNS = PARTITIONS
"""c at most: a box has a partition for each."""

GROUP_HEADS = 4
"""n at most: k and q of more heads would not fit two PSUM banks."""


@dataclass
class Constants(nl.NKIObject):
    """Made on chip; masks are [c, c] float32 for the largest box, 1 where column s and column i are of one head and:

    upto: s is not after i.
    after: s is after i.
    minus_before: s is before i; -1 instead of 1.
    ones, identity: [128, 128] float32.
    """

    upto: Tensor
    after: Tensor
    minus_before: Tensor
    ones: Tensor
    identity: Tensor


@dataclass
class Work(nl.NKIObject):
    """A box on its way; the stages set the fields in this order. [c, 1] float32 is a number for each column.

    x, history, weight: see `load_conv`.
    raw, per_head: see `_load_gates`.
    z, norm_weight: see `load_output_gate`.
    state: [128, groups, n, V] float32.
    mask: [128, n] float32, see `head_mask`.
    taps, weights: see `transpose_taps` and `transpose_weights`.
    rate, steps, beta: [c, 1] float32, see `_activate_gates`.
    gate: [c, V] float32, norm_weight silu(z).
    kq, v: see `convolve`.
    g, g_upto: [c, 1] and [c, c] float32, the log-decay, and that of row s where s is not after column i.
    squares: [128, 2, c] float32, of kq.
    gram: [c, 2, c] float32 in PSUM, K K^T and the transpose of Q K^T.
    packed: [128, n, 2, c] float32, k and q as the packed state needs them.
    k_norm, w: [c, 1] float32, |k| and beta / |k|^2.
    norm_bias: [c, 1] float32, the epsilon of the output norm, see `make_norm_bias`.
    upto_decay, minus_before_decay, d: see `_make_decays`.
    v_rows: [c, V] float32, |k| v.
    products: [V, 2, c] float32 in PSUM, S^T k and S^T q.
    A, A_plain: [c, c] float32, the transpose of A, and A.
    scores: [c, c] float32, the transpose of Q K^T * D.
    inverse: [c, c] float32, the transpose of (I - A)^-1 in the end.
    square: [c, c] float32, A^2.
    columns: [V, 2, c] float32, the same in SBUF.
    wrong, read: [c, V] float32, |k| v - d S^T k and d S^T q.
    o_rows: [c, V] float32 in PSUM, the output before its norm.
    """

    box: Box
    x: Any = None
    history: Any = None
    weight: Any = None
    raw: Any = None
    per_head: Any = None
    z: Any = None
    norm_weight: Any = None
    state: Any = None
    mask: Any = None
    taps: Any = None
    weights: Any = None
    rate: Any = None
    steps: Any = None
    beta: Any = None
    gate: Any = None
    kq: Any = None
    v: Any = None
    g: Any = None
    g_upto: Any = None
    squares: Any = None
    gram: Any = None
    packed: Any = None
    k_norm: Any = None
    w: Any = None
    norm_bias: Any = None
    upto_decay: Any = None
    minus_before_decay: Any = None
    d: Any = None
    v_rows: Any = None
    products: Any = None
    A: Any = None
    A_plain: Any = None
    scores: Any = None
    inverse: Any = None
    square: Any = None
    columns: Any = None
    wrong: Any = None
    read: Any = None
    o_rows: Any = None


@nki.jit
def deltanet_verify_layer(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A DeltaNet layer between its projections, for T tokens of every sequence, of which a prefix will be kept.

    Convolution, SiLU, l2-norm, gates, delta rule and gated RMS norm. Launch with grid 2 on a logical core of two
    physical cores (LNC=2), or without a grid. The cores share the sequences if B is even, else the key heads, else the
    value heads of the only key head; any B, H and Hk will do.

    Dimensions:
        B: sequences; T: tokens, 1 to 8; H, Hk: value and key heads of this rank, H a multiple of Hk; K = V = 128;
        W = 4; Ch = 2 Hk K + H V.

    Args:
        qkv: [B, T, Ch] bfloat16 or float32, output of the projection, channels [q | k | v].
        z: [B, T, H V], output gate before its SiLU.
        a, b: [B, T, H], decay and write gates before their activation.
        conv_weight: [Ch, W].
        conv_state: [B, Ch, W - 1] in qkv.dtype, the inputs before these, oldest first.
        A_log, dt_bias: [H] float32.
        norm_weight: [V] float32.
        state: [B, H, K, V] float32, before the first token.
        norm_eps: epsilon of the gated RMS norm; compile-time.

    Returns:
        output: [B, T, H V] in z.dtype, the normed and gated output; that of a token depends on those up to it alone.
        keys: [B, T, Hk, K] float32, and
        u: [B, T, H, V] float32: token t adds keys_t u_t^T to the state, once it has decayed by
        g: [B, T, H] float32, the log-decay.

    Notes:
        Numerics: everything after the loads is float32. No exponent is positive, so no decay overflows; sums of g run
        over the tokens between two, so that a small decay after a large one is exact. Errors are those of
        `decode_layer`.
        Limits: R T <= 128 on a core. A core computes as many key heads of a sequence together as have 128 columns; of
        several such boxes, the stages alternate. Sequences never share a matmul's contraction, so that one with what is
        not a number leaves the others alone.
        Layouts: those of `decode_layer`. Products with the state have a column for each token, of which the Tensor
        engine takes up to 64 in the time of one; the chunk's matrices have a partition for each column.

    Pseudocode:
        x = [conv_state | qkv];  y_t = silu(sum_w conv_weight[:, w] x[t + w]);  q, k, v = split(y)
        g = -exp(A_log) softplus(a + dt_bias);  beta = sigmoid(b);  w = beta / (k.k + eps)
        A = -(k_i.k_j) D_ij w_j for j < i
        U = w (I - A)^-1 (|k| v - d S^T k)                          one pass over the state for k and q of all tokens
        o = d S^T q + (q_i.k_j) D_ij U_j
        output = o / sqrt(mean(o^2) + norm_eps K (q.q + eps)) * norm_weight * silu(z)
    """
    B, T, Ch = qkv.shape
    H = a.shape[2]
    Hk = (Ch - H * PARTITIONS) // (2 * PARTITIONS)
    R = H // Hk
    assert 1 <= T and T <= MOST_TOKENS, f"qkv has {T} tokens of each sequence: 1 to {MOST_TOKENS} are possible"
    check_layer(H=H, Hk=Hk, qkv=qkv, conv_weight=conv_weight, conv_state=conv_state, state=state)
    for tensor in (A_log, dt_bias, norm_weight):
        # DMA copies of the default dge_mode move bytes; only software descriptors cast (nki/migration/index.rst).
        assert tensor.dtype == nl.float32, "A_log, dt_bias and norm_weight must be float32"

    output = nl.ndarray((B, T, H * PARTITIONS), dtype=z.dtype, buffer=nl.shared_hbm)
    keys = nl.ndarray((B, T, Hk, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)
    u = nl.ndarray((B, T, H, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)
    g = nl.ndarray((B, T, H), dtype=nl.float32, buffer=nl.shared_hbm)

    core, cores = 0, 1
    if nl.program_ndim() != 0:
        core, cores = nl.program_id(axis=0), nl.num_programs(axes=0)
    boxes = _boxes(share_of_core(B=B, Hk=Hk, R=R, core=core, cores=cores), T)
    if len(boxes) > 0:
        inputs = (qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, state)
        outputs = (output, keys, u, g)
        constants = _make_constants(box=boxes[0], T=T)
        works: list[Any] = []
        for box in boxes:
            works.append(Work(box=box))
        _load(works[0], inputs, constants.ones)
        # Engines run in program order: stages of several boxes alternate, so that what one waits for is covered by
        # the others.
        for step in range(PITCH * (len(boxes) - 1) + STAGES):
            for i in range(len(boxes)):
                stage = step - PITCH * i
                if stage == 0 and i + 1 < len(boxes):
                    _load(works[i + 1], inputs, constants.ones)
                if stage >= 0 and stage < STAGES:
                    _run_stage(stage, works[i], T, constants, outputs, norm_eps)
                if stage == STAGES:
                    works[i] = None  # what it holds on chip is free
    return output, keys, u, g


def _boxes(mine: Box, T: int) -> list[Box]:
    """The part of a core, cut into single sequences and as many key heads as have MOST_COLUMNS columns.

    Sequences do not share a box, because its matmuls multiply what columns of other heads have by zero, which leaves
    what is not a number as it is: a broken sequence would break its neighbours.
    """
    boxes: list[Box] = []
    if mine.nb == 0:
        return boxes
    assert mine.nr * T <= MOST_COLUMNS, (
        f"{mine.nr} value heads of a key head, {T} tokens: {MOST_COLUMNS} columns at most"
    )
    keys = min(mine.nk, MOST_COLUMNS // (mine.nr * T))
    for i in range(mine.nb):
        for first in range(0, mine.nk, keys):
            boxes.append(
                Box(
                    b0=mine.b0 + i,
                    nb=1,
                    k0=mine.k0 + first,
                    nk=min(keys, mine.nk - first),
                    r0=mine.r0,
                    nr=mine.nr,
                    R=mine.R,
                )
            )
    return boxes


def _make_constants(box: Box, T: int) -> Constants:
    """Masks for the columns of the largest box, made on chip."""
    ones, identity = make_ones_and_identity()
    heads = box.nb * heads_per_sequence(box)
    c = heads * T
    same = nl.ndarray((c, heads, T), dtype=nl.float32, buffer=nl.sbuf)
    upto = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    after = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    minus_before = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    # Column p is of head h if 0 <= p - h T < T, and then p - h T is its token.
    nisa.affine_select(
        dst=same,
        pattern=[[-T, heads], [0, T]],
        channel_multiplier=1,
        on_true_tile=ones[0:c, 0:c],
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    nisa.affine_select(
        dst=same,
        pattern=[[T, heads], [0, T]],
        channel_multiplier=-1,
        offset=T - 1,
        on_true_tile=same,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    for which in range(3):
        sign = 1 if which == 1 else -1
        nisa.affine_select(
            dst=(upto, after, minus_before)[which],
            pattern=[[-sign * T, heads], [-sign, T]],
            channel_multiplier=sign,
            offset=0 if which == 0 else -1,
            on_true_tile=same,
            on_false_value=0.0,
            cmp_op=nl.greater_equal,
        )
    nisa.tensor_scalar(dst=minus_before, data=minus_before, op0=nl.multiply, operand0=-1.0)
    return Constants(upto=upto, after=after, minus_before=minus_before, ones=ones, identity=identity)


# --- Stages ----------------------------------------------------------------------------------------------------------
STAGES = 10

PITCH = 2
"""Stages between two boxes. Modelled time of 4 tokens of 8 rows with 1, 2, 3, 4: 44, 31, 38, 34 us."""


def _run_stage(stage: int, w: Work, T: int, constants: Constants, outputs: tuple[Tensor, ...], norm_eps: float) -> None:
    """One stage of a box. Within it, what another engine or a later stage waits for is issued first."""
    output, keys, u, g = outputs
    if stage == 0:
        w.weights = transpose_weights(weight=w.weight, nb=w.box.nb)
        w.taps = transpose_taps(x=w.x, history=w.history)
        _activate_gates(w)
    elif stage == 1:
        w.kq, w.v = convolve(taps=w.taps, weights=w.weights, box=w.box, T=T)
        _make_log_decays(w, constants, g)
    elif stage == 2:
        w.squares = nl.ndarray(w.kq.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=w.squares, op=nl.square, data=w.kq)
        channels = select_channels(kq=w.kq, identity=constants.identity, n=w.state.shape[2])
        _make_decays(w, constants)
        w.packed = mask_channels(channels=channels, mask=w.mask, columns=w.kq.shape[2], T=T)
        _multiply_keys(w, constants, norm_eps)
    elif stage == 3:
        _read_state(w, 0)
        _transpose_values(w)
    elif stage == 4:
        _weigh_products(w, T, constants)
        _read_state(w, 1)
    elif stage == 5:
        _square_system(w, T)
        _find_wrong(w)
    elif stage == 6:
        _add_square(w, T)
        _read_queries(w)
    elif stage == 7:
        _add_fourth(w, T)
    elif stage == 8:
        _solve(w, constants, u)
    else:
        store_output(output=output, o_rows=w.o_rows, gate=w.gate, norm_bias=w.norm_bias, box=w.box)
        _store_keys(w, T, keys)


def _load(w: Work, inputs: tuple[Tensor, ...], ones: Tensor) -> None:
    """Start the transfers of a box; its `head_mask`."""
    qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, state = inputs
    w.x, w.history, w.weight = load_conv(
        box=w.box, qkv=qkv, conv_state=conv_state, conv_weight=conv_weight, H=a.shape[2]
    )
    w.raw, w.per_head = _load_gates(box=w.box, a=a, b=b, A_log=A_log, dt_bias=dt_bias)
    w.z, w.norm_weight = load_output_gate(box=w.box, z=z, norm_weight=norm_weight)
    n = heads_per_group(box=w.box, H=a.shape[2], most=GROUP_HEADS, halves=False)
    w.state = load_states(state=state, box=w.box, n=n)
    w.mask = head_mask(ones=ones, n=n)


def _load_gates(box: Box, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of each column, [c, 2] in their dtype, and A_log and dt_bias, [c, 2] float32."""
    T, heads = a.shape[1], heads_per_sequence(box)
    c = box.nb * heads * T
    raw = nl.ndarray((c, 2), dtype=a.dtype, buffer=nl.sbuf)
    per_head = nl.ndarray((c, 2), dtype=nl.float32, buffer=nl.sbuf)
    gates, parameters = (a, b), (A_log, dt_bias)
    for which in range(2):
        nisa.dma_copy(dst=raw[:, which : which + 1], src=_per_column(gates[which], box))
        nisa.dma_copy(
            dst=per_head[:, which : which + 1],
            src=parameters[which].ap(pattern=[[0, box.nb], [1, heads], [0, T], [1, 1]], offset=first_head(box)),
        )
    return raw, per_head


def _per_column(hbm: Tensor, box: Box) -> Tensor:
    """The box's part of [B, T, H] in HBM, a number for each column."""
    T, H = hbm.shape[1], hbm.shape[2]
    return hbm.ap(
        pattern=[[T * H, box.nb], [1, heads_per_sequence(box)], [H, T], [1, 1]],
        offset=box.b0 * T * H + first_head(box),
    )


def _activate_gates(w: Work) -> None:
    """exp(A_log), softplus(a + dt_bias) and beta = sigmoid(b), [c, 1] each; the output gate."""
    c = w.raw.shape[0]
    w.rate = nl.ndarray((c, 1), dtype=nl.float32, buffer=nl.sbuf)
    w.steps = nl.ndarray((c, 1), dtype=nl.float32, buffer=nl.sbuf)
    w.beta = nl.ndarray((c, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=w.rate, op=nl.exp, data=w.per_head[:, 0:1])
    nisa.activation(dst=w.steps, op=nl.softplus, data=w.raw[:, 0:1], bias=w.per_head[:, 1:2])
    nisa.activation(dst=w.beta, op=nl.sigmoid, data=w.raw[:, 1:2])
    w.gate = make_output_gate(z_rows=w.z, norm_rows=w.norm_weight)


def _make_log_decays(w: Work, constants: Constants, g_out: Tensor) -> None:
    """g = -exp(A_log) softplus(a + dt_bias), stored, and where it lies between the state and a token."""
    c = w.raw.shape[0]
    w.g = nl.ndarray((c, 1), dtype=nl.float32, buffer=nl.sbuf)
    w.g_upto = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=w.g, data=w.steps, op0=nl.multiply, operand0=w.rate, op1=nl.multiply, operand1=-1.0)
    nisa.tensor_scalar(dst=w.g_upto, data=constants.upto[0:c, 0:c], op0=nl.multiply, operand0=w.g)
    nisa.dma_copy(dst=_per_column(g_out, w.box), src=w.g)


def _make_decays(w: Work, constants: Constants) -> None:
    """D^T where the first token is not after the second, and -D^T where it is before it, [c, c]; and d, [c, 1].

    Sums of g are products with masks, which add only what lies between two tokens: differences of one running sum would
    lose small decays after large ones (g reaches -80).
    """
    c = w.raw.shape[0]
    sums = nl.ndarray((c, c + 1), dtype=nl.float32, buffer=nl.psum)
    D = nl.ndarray((c, c + 1), dtype=nl.float32, buffer=nl.sbuf)
    w.upto_decay = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    w.minus_before_decay = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    w.d = D[:, c : c + 1]
    upto = constants.upto[0:c, 0:c]
    nisa.nc_matmul(
        dst=sums[:, 0:c],
        stationary=constants.after[0:c, 0:c],
        moving=w.g_upto,
        is_stationary_onezero=True,
        accumulate=False,
    )
    nisa.nc_matmul(dst=sums[:, c : c + 1], stationary=upto, moving=w.g, is_stationary_onezero=True, accumulate=False)
    nisa.activation(dst=D, op=nl.exp, data=sums)
    nisa.tensor_tensor(
        dst=w.minus_before_decay,
        data1=D[:, 0:c],
        data2=constants.minus_before[0:c, 0:c],
        op=nl.multiply,
        engine=nisa.engine.gpsimd,
    )
    nisa.tensor_tensor(dst=w.upto_decay, data1=D[:, 0:c], data2=upto, op=nl.multiply, engine=nisa.engine.gpsimd)


def _multiply_keys(w: Work, constants: Constants, norm_eps: float) -> None:
    """Norms and all products of keys with keys and queries."""
    c = w.kq.shape[2]
    rk = nl.ndarray((c, 1), dtype=nl.float32, buffer=nl.sbuf)
    w.norm_bias = nl.ndarray((c, 1), dtype=nl.float32, buffer=nl.sbuf)
    norms = nl.ndarray((c, 2), dtype=nl.float32, buffer=nl.psum)
    w.gram = nl.ndarray((c, 2, c), dtype=nl.float32, buffer=nl.psum)
    w.w = nl.ndarray((c, 1), dtype=nl.float32, buffer=nl.sbuf)
    w.k_norm = nl.ndarray((c, 1), dtype=nl.float32, buffer=nl.sbuf)
    for which in range(2):
        nisa.nc_matmul(
            dst=norms[:, which : which + 1],
            stationary=w.squares[:, which, :],
            moving=constants.ones[:, 0:1],
            is_moving_onezero=True,
            accumulate=False,
        )
    nisa.nc_matmul(dst=w.gram, stationary=w.kq[:, 0, :], moving=w.kq, accumulate=False)
    nisa.activation(dst=rk, op=nl.rsqrt, data=norms[:, 0:1], bias=L2_EPS)
    nisa.tensor_scalar(dst=w.w, data=rk, op0=nl.multiply, operand0=rk, op1=nl.multiply, operand1=w.beta)
    nisa.tensor_scalar(dst=w.k_norm, data=norms[:, 0:1], op0=nl.add, operand0=L2_EPS, op1=nl.multiply, operand1=rk)
    factor = norm_eps * PARTITIONS
    nisa.activation(dst=w.norm_bias, op=nl.copy, data=norms[:, 1:2], scale=factor, bias=factor * L2_EPS)


def _weigh_products(w: Work, T: int, constants: Constants) -> None:
    """The transposes of A, of I + A, which is all of the inverse if T <= 2, and of Q K^T * D; A itself."""
    c = w.kq.shape[2]
    w.A = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    w.scores = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    w.inverse = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=w.A, data=w.gram[:, 0, :], op0=nl.multiply, operand0=w.w, op1=nl.multiply, operand1=w.minus_before_decay
    )
    nisa.tensor_tensor(dst=w.inverse, data1=w.A, data2=constants.identity[0:c, 0:c], op=nl.add)
    nisa.tensor_tensor(dst=w.scores, data1=w.gram[:, 1, :], data2=w.upto_decay, op=nl.multiply)
    if T > 2:
        transposed = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.psum)
        w.A_plain = nl.ndarray((c, c), dtype=nl.float32, buffer=nl.sbuf)
        nisa.nc_transpose(dst=transposed, data=w.A, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=w.A_plain, src=transposed, engine=nisa.engine.scalar)


def _read_state(w: Work, half: int) -> None:
    """S^T k and S^T q of the first or second half of the groups, in one pass over their state."""
    c, groups, n = w.kq.shape[2], w.state.shape[1], w.state.shape[2]
    if half == 0:
        w.products = nl.ndarray((PARTITIONS, 2, c), dtype=nl.float32, buffer=nl.psum)
    middle = (groups + 1) // 2
    for group in range(0 if half == 0 else middle, middle if half == 0 else groups):
        own = nl.ds(group * (c // groups), c // groups)
        for j in range(n):
            nisa.nc_matmul(
                dst=w.products[:, :, own],
                stationary=w.state[:, group, j, :],
                moving=w.packed[:, j, :, own],
                accumulate=j != 0,
            )


def _square_system(w: Work, T: int) -> None:
    """A^2. A power that is plain multiplies by its transpose as the stationary operand."""
    if T > 2:
        w.square = _multiply(w.A, w.A_plain)


def _add_square(w: Work, T: int) -> None:
    """(I + A^2) (I + A), transposed."""
    if T > 2:
        w.inverse = _add_product(w.inverse, w.square)


def _add_fourth(w: Work, T: int) -> None:
    """(I + A^4) (I + A^2) (I + A), transposed."""
    if T > 4:
        fourth = _multiply(_multiply(w.A_plain, w.A), w.square)
        w.inverse = _add_product(w.inverse, fourth)


def _multiply(stationary: Tensor, moving: Tensor) -> Tensor:
    """stationary^T moving, [c, c] float32 in SBUF."""
    product = nl.ndarray(moving.shape, dtype=nl.float32, buffer=nl.psum)
    result = nl.ndarray(moving.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.nc_matmul(dst=product, stationary=stationary, moving=moving, accumulate=False)
    nisa.tensor_copy(dst=result, src=product, engine=nisa.engine.scalar)
    return result


def _add_product(x: Tensor, power: Tensor) -> Tensor:
    """x + power^T x, [c, c] float32 in SBUF."""
    product = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.psum)
    result = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.nc_matmul(dst=product, stationary=power, moving=x, accumulate=False)
    nisa.tensor_tensor(dst=result, data1=product, data2=x, op=nl.add)
    return result


def _transpose_values(w: Work) -> None:
    """|k| v in rows."""
    c = w.kq.shape[2]
    values = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    w.v_rows = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.nc_transpose(dst=values, data=w.v[:, 1, :], engine=nisa.engine.tensor)
    nisa.activation(dst=w.v_rows, op=nl.copy, data=values, scale=w.k_norm)


def _store_keys(w: Work, T: int, keys: Tensor) -> None:
    """k of every key head in rows, to keys [B, T, Hk, K]."""
    box, Hk, c = w.box, keys.shape[2], w.kq.shape[2]
    if box.r0 == 0:  # of cores that split the value heads of one key head, the first one stores its keys
        rows = nl.ndarray((box.nb * box.nk * T, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
        result = nl.ndarray((box.nb * box.nk * T, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
        own = w.kq.ap(pattern=[[2 * c, PARTITIONS], [box.nr * T, box.nb * box.nk], [1, T]], offset=0)
        nisa.nc_transpose(dst=rows, data=own, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=result, src=rows, engine=nisa.engine.scalar)
        nisa.dma_copy(
            dst=keys.ap(
                pattern=[
                    [T * Hk * PARTITIONS, box.nb],
                    [PARTITIONS, box.nk],
                    [Hk * PARTITIONS, T],
                    [1, PARTITIONS],
                ],
                offset=(box.b0 * T * Hk + box.k0) * PARTITIONS,
            ),
            src=result,
        )


def _find_wrong(w: Work) -> None:
    """|k| v - d S^T k in rows."""
    c = w.kq.shape[2]
    w.columns = nl.ndarray((PARTITIONS, 2, c), dtype=nl.float32, buffer=nl.sbuf)
    w.wrong = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    rows = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    nisa.tensor_copy(dst=w.columns, src=w.products, engine=nisa.engine.vector)
    nisa.nc_transpose(dst=rows, data=w.columns[:, 0, :], engine=nisa.engine.tensor)
    nisa.scalar_tensor_tensor(
        dst=w.wrong, data=rows, op0=nl.multiply, operand0=w.d, op1=nl.subtract, operand1=w.v_rows, reverse1=True
    )


def _read_queries(w: Work) -> None:
    """d S^T q in rows, the first term of the outputs."""
    c = w.kq.shape[2]
    rows = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    w.read = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.nc_transpose(dst=rows, data=w.columns[:, 1, :], engine=nisa.engine.tensor)
    nisa.activation(dst=w.read, op=nl.copy, data=rows, scale=w.d)


def _solve(w: Work, constants: Constants, u_out: Tensor) -> None:
    """U, stored, and the outputs."""
    c = w.kq.shape[2]
    solved = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    u = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    w.o_rows = nl.ndarray((c, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=solved, stationary=w.inverse, moving=w.wrong, accumulate=False)
    nisa.tensor_scalar(dst=u, data=solved, op0=nl.multiply, operand0=w.w, engine=nisa.engine.vector)
    nisa.nc_matmul(
        dst=w.o_rows,
        stationary=constants.identity[0:c, 0:c],
        moving=w.read,
        is_stationary_onezero=True,
        accumulate=False,
    )
    nisa.nc_matmul(dst=w.o_rows, stationary=w.scores, moving=u, accumulate=True)
    nisa.dma_copy(dst=rows_of_heads(u_out, w.box, u_out.shape[1]), src=u)
