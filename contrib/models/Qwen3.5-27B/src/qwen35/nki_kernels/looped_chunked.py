# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Context encoding with a loop on the device over the chunks of a prompt: code that does not grow with it.

The specification is `qwen35.ops.chunk_gated_delta_rule`; formulas, letters and stages are those of `chunk_pieces` and
`chunked`.
"""

from typing import Any

from .chunk_pieces import (
    TILED,
    Segment,
    Shape,
    Work,
    check_inputs,
    compute_gates,
    load_segment,
    load_state,
    make_constants,
    make_units,
    store_state,
)
from .chunked import PHASES, advance, clear_halves, enter_chunk, make_slots, shape_of_core
from .common import Tensor
from .fused_chunked import CHUNK
from .nki_seam import nisa, nki, nl

SEGMENTS, SEGMENT_CHUNKS = 2, 2
"""Segments of an iteration, and chunks of a segment: one is loaded for the next iteration while another is computed."""

LOOP_TOKENS = SEGMENTS * SEGMENT_CHUNKS * CHUNK
"""Tokens of an iteration, which divide those of a sequence."""


@nki.jit
def deltanet_looped_chunked_layer_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, inverse: str = TILED
) -> tuple[Tensor, Tensor]:
    """`fused_chunked.deltanet_fused_chunked_layer_state` for S tokens that LOOP_TOKENS divides, with a loop over them.

    Args:
        q, k, v, g, beta, initial_state, inverse: as there.

    Returns:
        o: [B, S, H, V] in the type of v.
        final_state: [B, H, K, V] float32.

    Notes:
        Launch grid and numerics as there. The loop is nl.dynamic_range
        (nki/deep-dives/nki-dynamic-loops.rst), the one form of NKI 0.3.0 to 0.5.0; 0.6.0 still takes it and deprecates
        it for nl.fori_loop. Its body is one iteration of LOOP_TOKENS, for each sequence.
        What an iteration reads lies in tiles that are made before the loop: the body is compiled once, so that tiles
        made in it are the same in every iteration, and their transfers would wait for the one before. No page says
        whether engines may run ahead of each other from one iteration to the next; the modelled time has them do so.
        Time, modelled and not measured on a device, bfloat16, 12 value and 4 key heads, two cores: 1.22 times the
        unrolled kernel's for 1,024 tokens and 1.18 times for 2,048, since the chunks in flight drain at the end of each
        iteration. A core's code has 2,100 instructions for any prompt; unrolled 4,100 and 8,100.
        Transfers for the iteration after the last one lie beyond the tensor, and are skipped, or read the next
        sequence, which nothing uses.
    """
    B, S, H, V = v.shape
    check_inputs(q, k, v, g, beta, initial_state, None, inverse)
    assert S % LOOP_TOKENS == 0, f"{S} tokens: a multiple of {LOOP_TOKENS} is needed"
    o = nl.ndarray(v.shape, dtype=v.dtype, buffer=nl.shared_hbm)
    final_state = nl.ndarray((B, H, k.shape[3], V), dtype=nl.float32, buffer=nl.shared_hbm)
    shape = shape_of_core(k, v, CHUNK, inverse)
    if shape.heads > 0:
        units = make_units(shape, H // k.shape[2])
        consts = make_constants(shape)
        inverses, halves = make_slots(shape, units)
        for i in range(PHASES + 1):
            clear_halves(shape, units, halves, i)
        for b in range(B):
            state = load_state(shape, initial_state, b)
            segments = []
            for segment in range(SEGMENTS):
                segments.append(load_segment(shape, q, k, v, g, beta, b, segment * SEGMENT_CHUNKS, SEGMENT_CHUNKS))
            for start in nl.dynamic_range(0, S, LOOP_TOKENS):
                pipeline: list[list[Work]] = []
                for _ in range(PHASES + 1):
                    pipeline.append([])
                for i in range(SEGMENTS * SEGMENT_CHUNKS + PHASES):
                    segment, c = i // SEGMENT_CHUNKS, i % SEGMENT_CHUNKS
                    entering: list[Work] = []
                    if segment < SEGMENTS:
                        if c == 0:
                            compute_gates(shape, consts, units, segments[segment], SEGMENT_CHUNKS)
                        entering = enter_chunk(units, inverses, halves, segments[segment], c, i)
                    pipeline = [entering, *pipeline[0:PHASES]]
                    leaving = i - PHASES
                    out = nl.ndarray((CHUNK, shape.heads, V), dtype=v.dtype, buffer=nl.sbuf)
                    advance(shape, consts, pipeline, state, out)
                    if leaving >= 0:
                        nisa.dma_copy(dst=_tokens(o, shape.h0, shape.heads, b, leaving, start), src=out)
                    if leaving >= 0 and leaving % SEGMENT_CHUNKS == SEGMENT_CHUNKS - 1:
                        done = leaving // SEGMENT_CHUNKS
                        _reload(shape, segments[done], (q, k, v, g, beta), b, done, start)
            store_state(shape, state, final_state, b)
    return o, final_state


def _tokens(x: Tensor, h0: int, heads: int, b: int, chunk: int, start: Any) -> Tensor:
    """Heads [h0, h0 + heads) of the tokens of sequence b of x [B, S, H, ...] in HBM, from chunk `chunk` after `start`
    on, which a register holds: [C, heads, ...]."""
    S, H = x.shape[1], x.shape[2]
    width = x.shape[3] if len(x.shape) == 4 else 1
    return x.ap(
        pattern=[[H * width, CHUNK], [width, heads], [1, width]],
        offset=((b * S + chunk * CHUNK) * H + h0) * width,
        scalar_offset=start,
        indirect_dim=1,
    )


def _reload(shape: Shape, s: Segment, inputs: tuple[Tensor, ...], b: int, segment: int, start: Any) -> None:
    """Start the transfers of a segment for the iteration after the one from token `start` on."""
    q, k, v, g, beta = inputs
    for c in range(SEGMENT_CHUNKS):
        chunk = (SEGMENTS + segment) * SEGMENT_CHUNKS + c
        for which in range(5):
            tile = (s.k, s.q, s.g, s.beta, s.v)[which]
            first, heads = (shape.k0, shape.key_heads) if which < 2 else (shape.h0, shape.heads)
            nisa.dma_copy(
                dst=tile[:, c],
                src=_tokens((k, q, g, beta, v)[which], first, heads, b, chunk, start),
                oob_mode=nisa.oob_mode.skip,
            )
