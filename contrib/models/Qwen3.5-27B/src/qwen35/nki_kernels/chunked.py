# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule chunk by chunk: the stages of one chunk, their schedule over sequences, and a one-chunk kernel.

The specification is `qwen35.ops.chunk_gated_delta_rule`; formulas and letters are those of `chunk_pieces`. A chunk goes
through fourteen stages of preparation, which need no state, and four that update the state. The table gives the work
of a stage for one chunk and unit of R value heads; PE is the Tensor engine, V Vector, A Scalar, G GpSimd. Operands of
products are bf16, all else is float32:

    prepare  0  PE K^T, Q^T                             V evict               G g_t [t <= i]
             1  PE K K^T | Q K^T, sums of g             A evict, exp -> D     G masks
             2                                          V A = -kk w D, v |k|  G P = qk D
             3  PE A, from A^T                          V mask -> I + M
           4-8  PE N (I + M), (I + M)^T [X^T | N^T]     V mask, A evict
         9, 10  PE 32 -> 64: N = A X; X N, N^T X^T      A evict
            11                                                                G assemble T^T
        12, 13  PE 64 -> 128: N = A X; N^T X^T          A evict
    with the plain inverse instead
             3  PE A, from A^T                          V mask -> I + M
          4-10  PE N (I + M), (I + M)^T N^T             V mask, A evict
    scan     0  PE K S, Q S                             A evict, times -d, d
             1  PE T (v |k|) + T (-d K S)               A, V evict, times w and w e
             2  PE K^T U'                               V S <- d_C S + .., A to bf16
             3  PE d Q S + P U'                         A evict, times 1/|q|
"""

from typing import Any

from .chunk_pieces import (
    BLOCK,
    PLAIN,
    SMALL_LEVELS,
    TILED,
    UNIT_HEADS,
    Constants,
    Shape,
    State,
    Work,
    check_inputs,
    compute_gates,
    inverse_levels,
    load_segment,
    load_state,
    make_constants,
    make_units,
    mask_gates,
    slice_heads,
    split_heads,
    store_state,
)
from .common import Tensor
from .nki_seam import nisa, nki, nl
from .plain_inverse import merge_plain, start_plain
from .triangular_inverse import (
    assemble_blocks,
    lay_out_diagonals,
    merge_halves,
    merge_pairs,
    merge_small,
    start_halves,
    start_inverse,
    start_pairs,
)


# --- Preparation of a chunk: everything that does not need the state -------------------------------------------------
def transpose_keys(shape: Shape, w: Work) -> None:
    """K^T and Q^T, and g_t where t <= i, of which the decay between tokens is a sum."""
    C, K, R, s = shape.C, shape.K, w.unit.R, w.segment
    n, heads = s.g.shape[1], s.g.shape[2]
    transposed = nl.ndarray((K, 2, C), dtype=shape.dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=transposed[:, 0], data=s.k[:, w.chunk, w.unit.key], engine=nisa.engine.tensor)
    nisa.nc_transpose(dst=transposed[:, 1], data=s.q[:, w.chunk, w.unit.key], engine=nisa.engine.tensor)
    w.kq_t = nl.ndarray((K, 2, C), dtype=shape.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=w.kq_t, src=transposed, engine=nisa.engine.vector)
    w.row_decay = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.sbuf)
    nisa.affine_select(
        dst=w.row_decay,
        pattern=[[0, R], [1, C]],
        channel_multiplier=-1,
        on_true_tile=s.g.ap(pattern=[[n * heads, C], [1, R], [0, C]], offset=w.chunk * heads + w.unit.first),
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )


def multiply_keys(shape: Shape, consts: Constants, w: Work) -> None:
    """K K^T and Q K^T of the key head, transposed and masked, and D^T of each value head.

    sum_t [t > j] (g_t [t <= i]) is the sum of g over j < t <= i: terms outside are multiplied by 0, not cancelled, so a
    small decay after a large one is exact. It is 0 where i <= j, and exp gives 1 there, which the masks of K K^T and
    Q K^T remove.
    """
    C, R = shape.C, w.unit.R
    k_t = w.kq_t[:, 0]
    products = nl.ndarray((C, 2, C), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=products, stationary=k_t, moving=w.kq_t, accumulate=False)
    between = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(
        dst=between, stationary=consts.after, moving=w.row_decay, is_stationary_onezero=True, accumulate=False
    )
    w.products = nl.ndarray((C, 2, C), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=w.products, src=products, engine=nisa.engine.scalar)
    nisa.affine_select(  # keeps i > j of K K^T and i >= j of Q K^T
        dst=w.products,
        pattern=[[1, 2], [1, C]],
        channel_multiplier=-1,
        offset=-1,
        on_true_tile=w.products,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    w.D = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=w.D, op=nl.exp, data=between)


def decay_products(shape: Shape, w: Work) -> None:
    """A^T in float32, (Q K^T * D)^T and diag|k| V."""
    C, V, R, s, c, key = shape.C, shape.V, w.unit.R, w.segment, w.chunk, w.unit.key
    w.A = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.sbuf)
    w.P = nl.ndarray((C, R, C), dtype=shape.dtype, buffer=nl.sbuf)
    w.v_scaled = nl.ndarray((C, R, V), dtype=shape.dtype, buffer=nl.sbuf)
    for r in range(R):
        h = w.unit.first + r
        nisa.scalar_tensor_tensor(
            dst=w.A[:, r],
            data=w.products[:, 0],
            op0=nl.multiply,
            operand0=s.neg_w[:, c, h : h + 1],
            op1=nl.multiply,
            operand1=w.D[:, r],
        )
    qk = w.products.ap(pattern=[[2 * C, C], [0, R], [1, C]], offset=C)
    nisa.tensor_tensor(dst=w.P, data1=qk, data2=w.D, op=nl.multiply, engine=nisa.engine.gpsimd)
    nisa.tensor_scalar(
        dst=w.v_scaled,
        data=s.v[:, c, slice_heads(w.unit)],
        op0=nl.multiply,
        operand0=s.k_norm[:, c, key : key + 1],
    )


FIRST_INVERSE_STAGE = 3
"""The stage of the preparation that begins to invert I - A; all that follow go on with it."""

PREPARE_STAGES = FIRST_INVERSE_STAGE + 1 + SMALL_LEVELS + 5


def prepare(shape: Shape, consts: Constants, w: Work, stage: int) -> None:
    """One stage of a chunk's preparation; callers interleave the stages of independent units to fill all engines."""
    if stage == 0:
        transpose_keys(shape, w)
    elif stage == 1:
        multiply_keys(shape, consts, w)
    elif stage == 2:
        decay_products(shape, w)
    elif shape.inverse == PLAIN:
        if stage == FIRST_INVERSE_STAGE:
            start_plain(shape, consts, w)
        elif stage < 4 + inverse_levels(shape):
            merge_plain(shape, consts, w, stage - 4)
    elif stage == FIRST_INVERSE_STAGE:
        start_inverse(shape, consts, w)
    elif stage < 4 + SMALL_LEVELS:
        merge_small(shape, consts, w, stage - 4)
    elif stage == 4 + SMALL_LEVELS:
        if shape.C > 2 * BLOCK:
            lay_out_diagonals(shape, w)
        if shape.C > BLOCK:
            start_pairs(shape, w)
    elif stage == 5 + SMALL_LEVELS:
        if shape.C > BLOCK:
            merge_pairs(shape, w)
    elif stage == 6 + SMALL_LEVELS:
        assemble_blocks(shape, w)
    elif stage == 7 + SMALL_LEVELS:
        if shape.C > 2 * BLOCK:
            start_halves(shape, w)
    elif stage == 8 + SMALL_LEVELS:
        if shape.C > 2 * BLOCK:
            merge_halves(shape, w)


# --- The scan: what needs the state ----------------------------------------------------------------------------------
SCAN_STAGES = 4


def scan(shape: Shape, consts: Constants, w: Work, state: State, o: Tensor, stage: int) -> None:
    """One stage of moving a unit's state over a chunk.

    Args:
        o: [C, heads, V] in SBUF, receives the outputs of this unit.
    """
    if stage == 0:
        read_state(shape, w, state)
    elif stage == 1:
        solve_chunk(shape, w)
    elif stage == 2:
        update_state(shape, w, state)
    else:
        write_outputs(shape, consts, w, o)


def read_state(shape: Shape, w: Work, state: State) -> None:
    """-diag(d) K S and diag(d) Q S."""
    C, V, R, s, c = shape.C, shape.V, w.unit.R, w.segment, w.chunk
    operand = state.operand[:, slice_heads(w.unit)]
    ks = nl.ndarray((C, R, V), dtype=nl.float32, buffer=nl.psum)
    qs = nl.ndarray((C, R, V), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=ks, stationary=w.kq_t[:, 0], moving=operand, accumulate=False)
    nisa.nc_matmul(dst=qs, stationary=w.kq_t[:, 1], moving=operand, accumulate=False)
    w.k_state = nl.ndarray((C, R, V), dtype=shape.dtype, buffer=nl.sbuf)
    w.q_state = nl.ndarray((C, R, V), dtype=shape.dtype, buffer=nl.sbuf)
    for r in range(R):
        h = w.unit.first + r
        nisa.activation(dst=w.k_state[:, r], op=nl.copy, data=ks[:, r], scale=s.neg_d[:, c, h : h + 1])
    for r in range(R):
        h = w.unit.first + r
        nisa.activation(dst=w.q_state[:, r], op=nl.copy, data=qs[:, r], scale=s.d[:, c, h : h + 1])


def solve_chunk(shape: Shape, w: Work) -> None:
    """U' = diag(w) T (diag|k| V - diag(d) K S), and diag(e) U': K stays as it came, so only U' is rounded."""
    C, V, R, s, c = shape.C, shape.V, w.unit.R, w.segment, w.chunk
    u = nl.ndarray((C, R, V), dtype=nl.float32, buffer=nl.psum)
    for r in range(R):
        nisa.nc_matmul(dst=u[:, r], stationary=w.T[:, r], moving=w.v_scaled[:, r], accumulate=False)
        nisa.nc_matmul(dst=u[:, r], stationary=w.T[:, r], moving=w.k_state[:, r], accumulate=True)
    w.u_end = nl.ndarray((C, R, V), dtype=shape.dtype, buffer=nl.sbuf)
    w.u = nl.ndarray((C, R, V), dtype=shape.dtype, buffer=nl.sbuf)
    for r in range(R):
        h = w.unit.first + r
        nisa.activation(dst=w.u_end[:, r], op=nl.copy, data=u[:, r], scale=s.w_end[:, c, h : h + 1])
        nisa.tensor_scalar(
            dst=w.u[:, r], data=u[:, r], op0=nl.multiply, operand0=s.w[:, c, h : h + 1], engine=nisa.engine.vector
        )


def update_state(shape: Shape, w: Work, state: State) -> None:
    """S <- d_C S + K^T diag(e) U', in float32."""
    K, V, R, s, c = shape.K, shape.V, w.unit.R, w.segment, w.chunk
    written = nl.ndarray((K, R, V), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=written, stationary=s.k[:, c, w.unit.key], moving=w.u_end, accumulate=False)
    for r in range(R):
        h = w.unit.first + r
        nisa.scalar_tensor_tensor(
            dst=state.exact[:, h],
            data=state.exact[:, h],
            op0=nl.multiply,
            operand0=s.chunk_decay[:, c, h : h + 1],
            op1=nl.add,
            operand1=written[:, r],
        )
    if shape.dtype != nl.float32:
        mine = slice_heads(w.unit)
        nisa.tensor_copy(dst=state.operand[:, mine], src=state.exact[:, mine], engine=nisa.engine.gpsimd)


def write_outputs(shape: Shape, consts: Constants, w: Work, o: Tensor) -> None:
    """O = diag(1/|q| K^-0.5) ((Q K^T * D) U' + diag(d) Q S)."""
    C, V, R, s, c, key = shape.C, shape.V, w.unit.R, w.segment, w.chunk, w.unit.key
    out = nl.ndarray((C, R, V), dtype=nl.float32, buffer=nl.psum)
    for r in range(R):
        nisa.nc_matmul(dst=out[:, r], stationary=consts.identity, moving=w.q_state[:, r], accumulate=False)
        nisa.nc_matmul(dst=out[:, r], stationary=w.P[:, r], moving=w.u[:, r], accumulate=True)
    nisa.activation(dst=o[:, slice_heads(w.unit)], op=nl.copy, data=out, scale=s.q_scale[:, c, key : key + 1])


# --- Whole sequences -------------------------------------------------------------------------------------------------
PHASES = 2
"""Chunks in preparation at a time, each in its own half of the stages, while one more is scanned. Modelled time of
2048 tokens, 6 heads a core, with 1, 2, 3, 4: 256, 188, 197, 221 us."""

PHASE_STAGES = (PREPARE_STAGES + PHASES - 1) // PHASES

SEGMENT_CHUNKS = 4
"""Chunks whose inputs are loaded and whose gates are computed together, while those of the next segment are loaded."""


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Any,
    valid_lens: Any,
    o: Tensor,
    final_state: Tensor,
    C: int,
    inverse: str,
) -> None:
    """This core's heads of whole sequences, from and to HBM; the contract is `deltanet_fused_chunked_layer_ragged`'s,
    where a state or lengths that are None mean zeros and S.

    Three chunks are in flight. Each engine executes in the order of emission, so stages of all of them and of all units
    alternate: what one unit waits for is covered by work of the others.

        for each sequence, for each chunk i:
            for step in 0 .. 6:
                for each unit: prepare(chunk i + 2, stage step)
                for each unit: prepare(chunk i + 1, stage 7 + step)
                some of: scan(chunk i, stage 0 .. 3) of each unit

    The loops are unrolled: per chunk and unit of three heads 197 instructions of the Tensor engine (174 of them on
    sub-arrays), 52 of Vector, Scalar and GpSimd, and 6 transfers.
    """
    B, S, Hk, K = k.shape
    H, V = v.shape[2], v.shape[3]
    R = H // Hk
    h0, heads = split_heads(H, Hk)
    if heads == 0:
        return
    k0 = h0 // R
    shape = Shape(
        C=C,
        K=K,
        V=V,
        heads=heads,
        key_heads=(h0 + heads - 1) // R + 1 - k0,
        h0=h0,
        k0=k0,
        dtype=k.dtype,
        inverse=inverse,
    )
    units = make_units(shape, R)
    consts = make_constants(shape)
    inverses, halves = [], []
    for _ in range((PHASES + 1) * len(units)):
        t = nl.ndarray((C, UNIT_HEADS, C), dtype=shape.dtype, buffer=nl.sbuf)
        nisa.memset(dst=t, value=0.0, engine=nisa.engine.gpsimd)
        inverses.append(t)
        halves.append(nl.ndarray((C, UNIT_HEADS, 2, BLOCK), dtype=nl.float32, buffer=nl.sbuf))

    # Segments as (sequence, first chunk, chunks); chunks of all sequences as (sequence, segment, chunk within the
    # segment, chunk within the sequence).
    segments: list[tuple[int, int, int]] = []
    items = []
    chunks = (S + C - 1) // C
    for b in range(B):
        first = 0
        while first < chunks:
            # The very first segment is one chunk, because no engine can start before it is loaded.
            n = 1 if len(segments) == 0 else min(SEGMENT_CHUNKS, chunks - first)
            for c in range(n):
                items.append((b, len(segments), c, first + c))
            segments.append((b, first, n))
            first = first + n

    inputs = load_segment(shape, q, k, v, g, beta, 0, 0, segments[0][2])
    next_inputs = inputs
    states = []
    # Units of the chunks in flight, the youngest first.
    pipeline: list[list[Work]] = []
    for _ in range(PHASES + 1):
        pipeline.append([])
    for i in range(len(items) + PHASES):
        entering = []
        if i < len(items):
            b, segment, c, chunk = items[i]
            if chunk == 0:
                states.append(load_state(shape, initial_state, b))
            if c == 0:
                _, first, n = segments[segment]
                inputs = next_inputs
                if valid_lens != None:  # noqa: E711
                    mask_gates(shape, inputs, valid_lens, b, first, n)
                compute_gates(shape, consts, units, inputs, n)
                if segment + 1 < len(segments):
                    b1, first1, n1 = segments[segment + 1]
                    next_inputs = load_segment(shape, q, k, v, g, beta, b1, first1, n1)
            for u in range(len(units)):
                slot, R = (PHASES + 1) * u + i % (PHASES + 1), units[u].R
                if i <= PHASES and inverse == TILED:  # after the gates, for which Vector is wanted first
                    nisa.memset(dst=halves[slot], value=0.0, engine=nisa.engine.vector)
                t, x = inverses[slot][:, 0:R], halves[slot][:, 0:R]
                entering.append(Work(unit=units[u], segment=inputs, chunk=c, T=t, halves=x))
        older = pipeline
        pipeline = [entering]
        for phase in range(PHASES):
            pipeline.append(older[phase])
        leaving = i - PHASES
        out: Any = None
        if leaving >= 0:
            out = nl.ndarray((C, heads, V), dtype=v.dtype, buffer=nl.sbuf)
        scans = []
        for stage in range(SCAN_STAGES):
            for w in pipeline[PHASES]:
                scans.append((w, stage))
        done = 0
        for step in range(PHASE_STAGES):
            for phase in range(PHASES):
                stage = phase * PHASE_STAGES + step
                for w in pipeline[phase]:
                    prepare(shape, consts, w, stage)
            while done < (step + 1) * len(scans) // PHASE_STAGES:
                scan(shape, consts, scans[done][0], states[items[leaving][0]], out, scans[done][1])
                done = done + 1
        if leaving >= 0:
            b, _, _, chunk = items[leaving]
            start = chunk * C
            rows = min(C, S - start)
            nisa.dma_copy(dst=o[b, start : start + rows, h0 : h0 + heads], src=out[0:rows])
            if chunk == chunks - 1:
                store_state(shape, states[b], final_state, b)


@nki.jit
def deltanet_chunk_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, inverse: str = TILED
) -> tuple[Tensor, Tensor]:
    """One chunk of the gated delta rule for a batch of heads, state in and state out.

    Dimensions:
        B batch, C tokens: 32, 64 or 128, Hk key heads, H = Hk R value heads, K and V up to 128.

    Args:
        q, k: [B, C, Hk, K] float32 or bfloat16, raw: l2norm of both and the K^-0.5 scale of q are applied here.
        v: [B, C, H, V], the same type.
        g: [B, C, H] float32, log-decay <= 0; 0 at padded tokens.
        beta: [B, C, H] float32, in [0, 1]; 0 at padded tokens.
        state: [B, H, K, V] float32.
        inverse: "tiled" or "plain", see `fused_chunked`; compile-time.

    Returns:
        o: [B, C, H, V] in the type of v.
        new_state: [B, H, K, V] float32.

    Notes:
        Launch grid: none, 1, or 2 for LNC=2, which splits the value heads. Numerics as for
        `fused_chunked.deltanet_fused_chunked_layer`.
    """
    C = k.shape[1]
    assert C == 32 or C == 64 or C == 128, f"a chunk of {C} tokens: 32, 64 or 128 are possible"
    check_inputs(q, k, v, g, beta, state, None, inverse)
    o = nl.ndarray(v.shape, dtype=v.dtype, buffer=nl.shared_hbm)
    new_state = nl.ndarray(state.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    delta_rule(q, k, v, g, beta, state, None, o, new_state, C, inverse)
    return o, new_state
