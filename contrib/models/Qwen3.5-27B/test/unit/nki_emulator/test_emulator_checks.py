# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""One test per documented constraint: the error names the call, the operand or value, and the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nki_emulator import NkiValidationError, costs, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl


def sb(*shape: int, dtype: str = "float32") -> Any:
    t = nl.ndarray(shape, dtype)
    nisa.memset(t, 0)
    return t


def ps(*shape: int, dtype: str = "float32") -> Any:
    return nl.ndarray(shape, dtype, buffer=nl.psum)


def hbm(*shape: int, dtype: str = "float32") -> Any:
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def double_read() -> None:
    p, t = ps(4, 4), sb(4, 4)
    nisa.nc_matmul(p, t, t)
    nisa.tensor_copy(t, p)
    nisa.nc_matmul(p, t, t)


def filled(value: float) -> Any:
    t = nl.ndarray((4, 4), nl.float32)
    nisa.memset(t, value)
    return t


def accumulate_onto_a_part() -> None:
    p, t = ps(4, 4), sb(4, 4)
    nisa.nc_matmul(p[:, 0:2], t, t[:, 0:2])
    nisa.nc_matmul(p, t, t, accumulate=True)


def accumulate_onto_zeros() -> None:
    p, t = ps(4, 4), sb(4, 4)
    nisa.memset(p, 0.0)
    nisa.nc_matmul(p, t, t, accumulate=True)


def spread(*counts: int) -> Any:
    """A tile whose free dimensions do not follow each other: every second element of each."""
    t = nl.ndarray((4, *(2 * n for n in counts)), nl.float32)
    return t[(slice(None), *(slice(None, None, 2) for _ in counts))]


FP8 = "float8_e4m3"


ROW = nisa.matmul_perf_mode.double_row


HW = nisa.dge_mode.hwdge


RULES: dict[str, tuple[Callable[[], Any], str]] = {
    # Partitions
    "partitions": (lambda: nl.ndarray((129, 4), nl.float32), r"shape \[129, 4\].*at most 128"),
    "start of a small tile": (
        lambda: nisa.memset(sb(128, 4)[16:32], 0.0),
        r"memset: dst occupies 16 partitions from 16; 16 partitions start at 0 or 32 or 64 or 96",
    ),
    "start of a half tile": (lambda: nisa.memset(sb(128, 4)[32:96], 0.0), r"64 partitions from 32; .*0 or 64"),
    "start of a large tile": (lambda: nisa.memset(sb(128, 4)[32:128], 0.0), r"96 partitions from 32; .*start at 0"),
    "equal partitions": (lambda: nisa.tensor_copy(sb(4, 4), sb(8, 4)), r"tensor_copy: partitions .*equally many"),
    "equal free size": (lambda: nisa.tensor_copy(sb(4, 4), sb(4, 5)), r"'dst': 4, 'src': 5"),
    # Memories
    "matmul reads sbuf": (lambda: nisa.nc_matmul(ps(4, 4), ps(4, 4), sb(4, 4)), r"stationary .*must be in sbuf"),
    "matmul writes psum": (lambda: nisa.nc_matmul(sb(4, 4), sb(4, 4), sb(4, 4)), r"dst .*must be in psum"),
    "compute engines do not read hbm": (lambda: nisa.tensor_copy(sb(4, 4), hbm(4, 4)), r"src .*sbuf or psum"),
    "gpsimd does not reach psum": (
        lambda: nisa.tensor_copy(sb(4, 4), ps(4, 4), engine=nisa.engine.gpsimd),
        r"src .* on engine gpsimd; gpsimd accesses sbuf only",
    ),
    "affine_select is in sbuf": (
        lambda: nisa.affine_select(sb(4, 4), [[1, 4]], 0, ps(4, 4), 0.0),
        r"on_true_tile .*must be in sbuf",
    ),
    "dma does not reach psum": (lambda: nisa.dma_copy(hbm(4, 4), ps(4, 4)), r"dma_copy: src .*tensor_copy first"),
    "two inputs not both in psum": (
        lambda: nisa.tensor_tensor(sb(4, 4), ps(4, 4), ps(4, 4), nl.add),
        r"data1 and data2 are both in psum",
    ),
    "power avoids psum": (
        lambda: nisa.tensor_tensor(ps(4, 4), sb(4, 4), sb(4, 4), nl.power),
        r"dst .* on engine gpsimd",
    ),
    "transpose on tensor writes psum": (
        lambda: nisa.nc_transpose(sb(64, 64), sb(64, 64)),
        r"nc_transpose: dst .*must be in psum",
    ),
    # Matmul
    "contraction sizes": (lambda: nisa.nc_matmul(ps(4, 4), sb(8, 4), sb(4, 4)), r"8 partitions and moving 4"),
    "moving width": (lambda: nisa.nc_matmul(ps(4, 512), sb(4, 4), sb(4, 513)), r"moving has 513 columns; at most 512"),
    "stationary width": (lambda: nisa.nc_matmul(ps(128, 4), sb(4, 129), sb(4, 4)), r"129 columns; at most 128"),
    "output shape": (lambda: nisa.nc_matmul(ps(4, 5), sb(4, 4), sb(4, 4)), r"dst is \[4, 5\].*give \[4, 4\]"),
    "output type": (lambda: nisa.nc_matmul(ps(4, 4, dtype="bfloat16"), sb(4, 4), sb(4, 4)), r"must be float32"),
    "mixed precision": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 4), sb(4, 4, dtype="bfloat16")),
        r"stationary is float32 and moving is bfloat16; if one is float32",
    ),
    "integer matmul": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 4, dtype="int8"), sb(4, 4)),
        r"stationary has dtype int8",
    ),
    "one bank": (
        lambda: nisa.nc_matmul(ps(4, 1024)[:, 256:768], sb(4, 4), sb(4, 512)),
        r"dst spans bytes 1024 to 3071 .*one PSUM bank of 2048",
    ),
    "tile needs both": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 4), sb(4, 4), tile_size=(32, 128)),
        r"give both",
    ),
    "tile size": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 4), sb(4, 4), tile_size=(16, 128), tile_position=(0, 0)),
        r"row size 16; sub-arrays have 32, 64 or 128",
    ),
    "tile position": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 4), sb(4, 4), tile_size=(64, 128), tile_position=(32, 0)),
        r"row 32; it is a multiple of 64",
    ),
    "tile rows": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(64, 4), sb(64, 4), tile_size=(32, 128), tile_position=(0, 0)),
        r"contraction size 64; at most 32",
    ),
    "double row types": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 2, 4), sb(4, 2, 4), perf_mode=ROW),
        r"with double_row; it must be float8",
    ),
    "double row shape": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 8, dtype=FP8), sb(4, 8, dtype=FP8), perf_mode=ROW),
        r"first free dimension is 2",
    ),
    "transpose selects": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 4), sb(4, 4), is_transpose=True),
        r"each column selects one row",
    ),
    "stationary is ones and zeros": (
        lambda: nisa.nc_matmul(ps(4, 4), filled(2.0), filled(1.0), is_stationary_onezero=True),
        r"is_stationary_onezero=True, and stationary holds 2 at \(0, 0\); such a tile holds ones and zeros only",
    ),
    "moving is ones and zeros": (
        lambda: nisa.nc_matmul(ps(4, 4), filled(1.0), filled(float("nan")), is_moving_onezero=True),
        r"is_moving_onezero=True, and moving holds nan at \(0, 0\)",
    ),
    "accumulate onto nothing": (
        lambda: nisa.nc_matmul(ps(4, 4), sb(4, 4), sb(4, 4), accumulate=True),
        r"accumulate=True on dst .* of which no matmul wrote 16 elements; start the group with accumulate=False",
    ),
    "accumulate onto a part": (accumulate_onto_a_part, r"of which no matmul wrote 8 elements"),
    "accumulate onto what an engine wrote": (accumulate_onto_zeros, r"of which no matmul wrote 16 elements"),
    "accumulate after a read": (double_read, r"already read; say accumulate=True .* or accumulate=False"),
    "transpose size": (lambda: nisa.nc_transpose(ps(4, 129), sb(128, 4)), r"nc_transpose: dst is \[4, 129\]"),
    "vector transpose size": (
        lambda: nisa.nc_transpose(sb(33, 4), sb(4, 33), engine=nisa.engine.vector),
        r"engine vector transposes up to \[32, 32\]",
    ),
    "transpose type": (lambda: nisa.nc_transpose(ps(4, 4, dtype="bfloat16"), sb(4, 4)), r"dtypes .*must be equal"),
    # Operators and scalars
    "operator is nl": (lambda: nisa.tensor_tensor(sb(4, 4), sb(4, 4), sb(4, 4), np.add), r"a nki.language function"),
    "no divide": (
        lambda: nisa.tensor_scalar(sb(4, 4), sb(4, 4), nl.divide, 2.0),
        r"op0=nl.divide; arithmetic operators are .*use nl.reciprocal and nl.multiply",
    ),
    "activation function": (lambda: nisa.activation(sb(4, 4), nl.add, sb(4, 4)), r"op=nl.add; activation functions"),
    "activation range": (
        lambda: nisa.activation(sb(4, 4), nl.log, sb(4, 4)),
        r"nl.log of 0 at \(0, 0\); valid inputs are 5.42101e-20",
    ),
    "activation reduces by add": (
        lambda: nisa.activation(sb(4, 4), nl.exp, sb(4, 4), reduce_op=nl.maximum, reduce_res=sb(4, 1)),
        r"reduce_op=nl.maximum; it must be nl.add",
    ),
    "scale is float32": (
        lambda: nisa.activation(sb(4, 4), nl.exp, sb(4, 4), scale=sb(4, 1, dtype="bfloat16")),
        r"scale has dtype bfloat16; it must be float32",
    ),
    "vector operand shape": (
        lambda: nisa.tensor_scalar(sb(4, 4), sb(4, 4), nl.add, sb(4, 2)),
        r"operand0 has shape \[4, 2\]; a vector operand has shape \[4, 1\]",
    ),
    "vector operand type": (
        lambda: nisa.tensor_scalar(sb(4, 4), sb(4, 4), nl.add, sb(4, 1, dtype="bfloat16")),
        r"operand0 has dtype bfloat16; it must be float32",
    ),
    "bitvec takes integers": (
        lambda: nisa.tensor_tensor(sb(4, 4), sb(4, 4), sb(4, 4), nl.bitwise_and),
        r"data1 has dtype float32 with nl.bitwise_and",
    ),
    "bitvec does not mix": (
        lambda: nisa.tensor_scalar(
            sb(4, 4, dtype="int32"), sb(4, 4, dtype="int32"), nl.bitwise_and, 1, op1=nl.add, operand1=1
        ),
        r"both are bitvec or both arithmetic",
    ),
    "scalar engine operators": (
        lambda: nisa.tensor_scalar(sb(4, 4), sb(4, 4), nl.subtract, 1.0, engine=nisa.engine.scalar),
        r"nl.subtract on the Scalar engine; it takes multiply\+add",
    ),
    "gpsimd operators": (
        lambda: nisa.tensor_scalar(sb(4, 4), sb(4, 4), nl.add, 1.0, engine=nisa.engine.gpsimd),
        r"nl.add on the GpSimd engine; it takes rsqrt only",
    ),
    "rsqrt engine": (
        lambda: nisa.tensor_scalar(sb(4, 4), sb(4, 4), nl.rsqrt, 0.0, engine=nisa.engine.vector),
        r"nl.rsqrt on engine vector; it runs on GpSimd here",
    ),
    "pattern dimensions": (
        lambda: nisa.memset(sb(1, 2, 4, 4, 4, 4, 4)[:, :, ::2, ::2, ::2, ::2, ::2], 0.0),
        r"dst has 5 free dimensions that are not contiguous; an access pattern has up to four",
    ),
    "four dimensions of a copy": (
        lambda: nisa.tensor_copy(spread(2, 2, 2, 2), sb(4, 2, 2, 2, 2)),
        r"tensor_copy: dst has 4 free dimensions .*up to four, of which most instructions take 3",
    ),
    "four dimensions of an operand": (
        lambda: nisa.tensor_tensor(sb(4, 16), sb(4, 16), spread(2, 2, 2, 2), nl.add),
        r"tensor_tensor: data2 has 4 free dimensions",
    ),
    "four dimensions of a moving tile": (
        lambda: nisa.nc_matmul(ps(4, 16), sb(4, 4), spread(2, 2, 2, 2)),
        r"nc_matmul: moving has 4 free dimensions",
    ),
    "five dimensions of a pattern": (
        lambda: nisa.iota(spread(2, 2, 2, 2, 2), [[1, 32]]),
        r"iota: dst has 5 free dimensions .*up to four",
    ),
    "engine of a call": (
        lambda: nisa.tensor_tensor(sb(4, 4), sb(4, 4), sb(4, 4), nl.add, engine=nisa.engine.scalar),
        r"engine=scalar; it runs on vector or gpsimd",
    ),
    "enum members": (lambda: nisa.dma_copy(sb(4, 4), hbm(4, 4), dge_mode=2), r"dge_mode=2; .*member of nisa.dge_mode"),
    "both operands": (lambda: nisa.tensor_scalar(sb(4, 4), sb(4, 4), nl.add, 1.0, op1=nl.add), r"give both or neither"),
    # Reductions, selections, searches
    "reduce the last axes": (
        lambda: nisa.tensor_reduce(sb(4, 4), nl.add, sb(4, 2, 4), axis=1),
        r"axis=1 of a tile of rank 3; the reduced axes are the last",
    ),
    "partition axis is not reduced": (
        lambda: nisa.tensor_reduce(sb(4, 1), nl.add, sb(4, 4), axis=(0, 1)),
        r"last free",
    ),
    "reduced size": (lambda: nisa.tensor_reduce(sb(4, 2), nl.add, sb(4, 4), axis=1), r"dst has 2 .*leaves 1"),
    "reduction operator": (lambda: nisa.tensor_reduce(sb(4, 1), nl.equal, sb(4, 4), axis=1), r"reductions are add"),
    "predicate type": (
        lambda: nisa.select_reduce(sb(4, 4), sb(4, 4), sb(4, 4), 0.0),
        r"predicate has dtype float32; it must be int16 or int8",
    ),
    "copy predicate type": (
        lambda: nisa.tensor_copy_predicated(sb(4, 4), sb(4, 4), sb(4, 4, dtype="int8")),
        r"predicate has dtype int8; it must be uint16 or uint32 or uint8",
    ),
    "range_select fill": (
        lambda: nisa.range_select(sb(4, 4), sb(4, 4), nl.less, nl.less, sb(4, 1), sb(4, 1), on_false_value=0.0),
        r"on_false_value=0.0; it must be -3.40",
    ),
    "search size": (lambda: nisa.max8(sb(4, 8), sb(4, 7)), r"max8: src has 7 elements per partition; 8 to 16384"),
    "eight results": (lambda: nisa.max8(sb(4, 7), sb(4, 8)), r"dst has 7 elements per partition; it has 8"),
    "bn_stats size": (lambda: nisa.bn_stats(sb(4, 6), sb(4, 513)), r"513 elements per partition; at most 512"),
    "shuffle mask": (
        lambda: nisa.nc_stream_shuffle(sb(32, 4), sb(32, 4), [0] * 31),
        r"32 entries, each 0 to 31 or 255",
    ),
    "shuffle type": (
        lambda: nisa.nc_stream_shuffle(sb(32, 4), sb(32, 4, dtype="bfloat16"), [0] * 32),
        r"nc_stream_shuffle: dtypes",
    ),
    "pattern size": (lambda: nisa.iota(sb(4, 4), [[1, 5]]), r"iota: pattern \[\[1, 5\]\] has 5 elements; dst has 4"),
    "pattern rank": (lambda: nisa.iota(sb(4, 4), [[1, 1]] * 5), r"pattern has 5 dimensions; 1 to 4"),
    "comparison": (lambda: nisa.affine_select(sb(4, 4), [[1, 4]], 0, sb(4, 4), 0.0, nl.add), r"cmp_op=nl.add"),
    "memset type": (lambda: nisa.memset(sb(4, 4, dtype="int32"), 2.0), r"value=2.0 .*dtype int32; integer tiles take"),
    "reverse0 unsupported": (
        lambda: nisa.tensor_scalar_reduce(sb(4, 4), sb(4, 4), nl.add, 1.0, nl.add, sb(4, 1), reverse0=True),
        r"reverse0=True; it is not supported yet",
    ),
    # DMA and cores
    "dma size": (lambda: nisa.dma_copy(sb(4, 4), hbm(4, 5)), r"dma_copy: src .*equally many elements"),
    "hwdge type": (
        lambda: nisa.dma_copy(sb(4, 4, dtype="bfloat16"), hbm(4, 4), dge_mode=HW),
        r"src float32 and dst bfloat16 with hwdge; types must match",
    ),
    "hwdge engine": (
        lambda: nisa.dma_copy(sb(4, 4), hbm(4, 4), engine=nisa.engine.sync),
        r"engine=sync with dge_mode=unknown; only with hwdge",
    ),
    "gather out of bounds": (
        lambda: nisa.dma_copy(sb(1, 4), hbm(2, 4).ap([[4, 1], [1, 4]], scalar_offset=nisa.register_alloc(2))),
        r"src has 4 elements out of bounds",
    ),
    "dma_transpose axes": (
        lambda: nisa.dma_transpose(sb(4, 16, dtype="bfloat16"), hbm(16, 4, dtype="bfloat16"), axes=(0, 1)),
        r"axes=\(0, 1\); rank 2 transposes by \(1, 0\)",
    ),
    "dma_transpose hwdge": (
        lambda: nisa.dma_transpose(sb(64, 32, dtype="bfloat16"), hbm(32, 64, dtype="bfloat16"), dge_mode=HW),
        r"src.shape\[0\] == 16",
    ),
    "dma_transpose bytes": (
        lambda: nisa.dma_transpose(sb(4, 16, dtype="uint8"), hbm(16, 4, dtype="uint8")),
        r"2 or 4 bytes",
    ),
    "dma_compute adds": (lambda: nisa.dma_compute(hbm(4, 4), [hbm(4, 4)], nl.multiply), r"it must be nl.add"),
    "barrier needs two cores": (lambda: nisa.core_barrier(hbm(4, 4), (0, 1)), r"launch of 1; \(0, 1\) with LNC=2"),
    "register operand": (
        lambda: nisa.register_load(3, sb(1, 1)),
        r"dst is a int; it must come from nisa.register_alloc",
    ),
    "register size": (lambda: nisa.register_load(nisa.register_alloc(), sb(1, 2)), r"exactly one element"),
    "empty register": (lambda: int(nisa.register_alloc()), r"read before it was loaded"),
    # Language
    "buffer objects": (lambda: nl.ndarray((4, 4), nl.float32, buffer="sbuf"), r"buffer='sbuf'; it must be nl.sbuf"),
    "psum address": (
        lambda: nl.ndarray((4, 4), nl.float32, buffer=nl.psum, address=(0, 100)),
        r"multiple of the bank size 2048",
    ),
    "sbuf address": (
        lambda: nl.ndarray((4, 4), nl.float32, address=(0, int(costs.SBUF_PARTITION_BYTES) - 8)),
        rf"128 partitions of {int(costs.SBUF_PARTITION_BYTES)} bytes",
    ),
    "static bounds": (lambda: nl.affine_range(nisa.register_alloc(3)), r"bounds are compile-time integers"),
    "operand is a tensor": (lambda: nisa.tensor_copy(sb(4, 4), np.zeros((4, 4))), r"src is a ndarray; .*NKI tensor"),
    "output memory": (
        lambda: nl.ndarray((4, 4), nl.float32, buffer=nl.private_hbm),
        r"returns tensors in nl.shared_hbm",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_breaking_a_rule_raises(rule: str) -> None:
    call, words = RULES[rule]
    with pytest.raises(NkiValidationError, match=words):
        emulate(lambda: call())


def test_every_error_names_its_source() -> None:
    for call, _ in RULES.values():
        with pytest.raises(NkiValidationError) as caught:
            emulate(call)
        message = str(caught.value)
        assert "nki/" in message or "inferred" in message, message


def test_unchecked_runs_go_on() -> None:
    def kernel() -> None:
        nisa.memset(sb(128, 4)[16:32], 0.0)
        nisa.dma_copy(sb(4, 4), hbm(4, 4), dge_mode=3)

    emulate(kernel, strict=False)


def test_dimensions_that_follow_each_other_count_as_one() -> None:
    nested = (4, 2, 2, 2, 2, 2)

    def kernel() -> None:
        nisa.tensor_copy(sb(*nested), sb(*nested))
        nisa.tensor_copy(spread(2, 2, 2), sb(4, 8))
        nisa.iota(spread(2, 2, 2, 2), [[1, 16]])  # a pattern of iota and affine_select has four dimensions
        nisa.affine_select(spread(2, 2, 2, 2), [[1, 16]], 0, sb(4, 16), 0.0)

    emulate(kernel)


def test_a_rescaled_product_may_be_added_to() -> None:
    def kernel() -> Any:
        p, t = ps(1, 1), filled(1.0)[0:1, 0:1]
        nisa.nc_matmul(p, t, t)
        nisa.tensor_scalar(p, p, nl.multiply, 4.0)
        nisa.nc_matmul(p, t, t, accumulate=True)
        out = hbm(1, 1)
        nisa.tensor_copy(t, p)
        nisa.dma_copy(dst=out, src=t)
        return out

    assert float(emulate(kernel).outputs[0, 0]) == 5.0


def test_a_tile_of_ones_and_zeros_may_say_so() -> None:
    def kernel() -> None:
        nisa.nc_matmul(ps(4, 4), filled(1.0), sb(4, 4), is_stationary_onezero=True, is_moving_onezero=True)

    emulate(kernel)
