# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Memory: views, access patterns, unwritten memory, capacity, addresses, two cores, arguments and results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nki_emulator import NkiValidationError, dtypes, emulate, jit, simulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, store, tile


def grid_data(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# --- Views -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "key",
    [
        (slice(None), 1),
        (Ellipsis, slice(0, 2)),
        (slice(32, 64), slice(None), slice(None, None, 2)),
        (slice(None), slice(1, 3), -1),
        (slice(-32, None), slice(0, 1)),
    ],
)
def test_slices_are_views_with_numpy_shapes(key: Any) -> None:
    x = grid_data(64, 3, 4)

    def kernel(a: Any) -> Any:
        t = tile(a)
        part = t[key]
        assert part.shape == x[key].shape
        nisa.memset(part, -1.0)
        return store(t)

    expected = x.copy()
    expected[key] = -1
    np.testing.assert_array_equal(emulate(kernel, x).outputs, expected)


def test_offset_and_pattern_describe_a_view() -> None:
    def kernel() -> None:
        t = nl.ndarray((16, 4, 8), nl.bfloat16)
        part = t[:, 1, 2::2]
        assert part.offset == 10
        assert part.get_pattern() == [[32, 16], [2, 3]]
        assert t[3, 2].shape == (8,)
        assert (t.dtype, t.buffer, part.ndim, part.size) == ("bfloat16", nl.sbuf, 2, 48)

    emulate(kernel)


def test_access_patterns_stride_repeat_and_reinterpret() -> None:
    x = grid_data(4, 12)

    def kernel(a: Any) -> Any:
        t = tile(a)
        strided = nl.ndarray((4, 3, 2), nl.float32)
        nisa.tensor_copy(dst=strided, src=t.ap(pattern=[[12, 4], [4, 3], [0, 2]], offset=1))
        halves = t.ap(pattern=[[24, 4], [1, 24]], dtype=nl.bfloat16)
        assert halves.shape == (4, 24)
        assert t.view(nl.bfloat16).shape == (4, 24)
        return store(strided), store(halves)

    strided, halves = emulate(kernel, x).outputs
    np.testing.assert_array_equal(strided, np.repeat(x[:, 1::4, None], 2, axis=2))
    assert halves.tobytes() == x.tobytes()


def test_reshape_keeps_memory_and_partitions() -> None:
    x = grid_data(8, 12)

    def kernel(a: Any) -> Any:
        t = tile(a)
        nisa.memset(t.reshape((8, 3, 4))[:, 2, :], 0.0)
        return store(t)

    expected = x.copy()
    expected[:, 8:] = 0
    np.testing.assert_array_equal(emulate(kernel, x).outputs, expected)


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda t: t[:, 0:99], "slice 0:99 on axis 1"),
        (lambda t: t[8], "size is 8"),
        (lambda t: t[::2], "partition step 2"),
        (lambda t: t[:, np.array([0, 2])], "an integer, a register, a slice"),
        (lambda t: t.reshape((4, 24)), "partition axis cannot change"),
        (lambda t: t.reshape((8, 13)), "element counts"),
        (lambda t: t[:, 0:8].reshape((8, 2, 4)).ap([[12, 8], [1, 4]]), "already indexed"),
        (lambda t: t.ap([[24, 4], [1, 12]]), "partition step 24"),
        (lambda t: t.ap([[12, 8], [1, 13]]), "reaches element 96"),
        (lambda t: t.ap([[12, 7], [1, 13]]), "leaves the 12 elements of a partition"),
        (lambda t: t.broadcast_to((16, 12)), "partitions cannot be broadcast"),
        (lambda t: t.__setitem__((0, 0), 1.0), "assignment does not"),
        (lambda t: bool(t), "not on tensor contents"),
    ],
)
def test_illegal_views_name_the_rule(misuse: Any, words: str) -> None:
    def kernel() -> None:
        misuse(nl.ndarray((8, 12), nl.float32))

    with pytest.raises(NkiValidationError, match=words):
        emulate(kernel)


# --- Unwritten memory ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("buffer", [nl.sbuf, nl.psum])
def test_unwritten_floats_are_nan(dtype: str, buffer: Any) -> None:
    out = emulate(lambda: store(nl.ndarray((4, 5), dtype, buffer=buffer))).outputs
    assert np.isnan(out.astype(np.float32)).all()


def test_unwritten_integers_are_four_and_unwritten_parts_show_in_a_matmul() -> None:
    def kernel() -> Any:
        w = nl.ndarray((2, 3), nl.float32)
        nisa.memset(w[0:1], 1.0)
        p = nl.ndarray((3, 3), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=p, stationary=w, moving=w)
        return store(p), store(nl.ndarray((2, 2), nl.int32))

    product, integers = emulate(kernel).outputs
    assert np.isnan(product).all()
    assert (integers == 4).all()


# --- Data types ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "name"),
    [
        (np.float32, "float32"),
        (np.dtype("int8"), "int8"),
        (BF16, "bfloat16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float8_e5m2, "float8_e5m2"),
        (np.bool_, "bool"),
        ("tfloat32", "tfloat32"),
    ],
)
def test_types_of_numpy_torch_and_nki_have_one_name(given: Any, name: str) -> None:
    assert dtypes.canonical(given) == name


def test_a_type_without_equivalent_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"float64.* is no NKI data type; valid names: uint8, int8"):
        dtypes.canonical(np.float64)


@pytest.mark.parametrize(("value", "rounded"), [(1 + 2**-11, 1.0), (1 + 3 * 2**-11, 1 + 2**-9), (-np.inf, -np.inf)])
def test_tfloat32_rounds_ties_to_even(value: float, rounded: float) -> None:
    assert float(dtypes.round_tf32(np.float32([value]))[0]) == rounded


# --- Capacity --------------------------------------------------------------------------------------------------------
def hold(count: int, shape: tuple[int, ...], buffer: Any) -> None:
    """Write ``count`` tensors, then read all of them."""
    tensors = [nl.ndarray(shape, nl.float32, buffer=buffer) for _ in range(count)]
    for _ in range(2):
        for t in tensors:
            nisa.tensor_scalar(t, t, nl.multiply, 1.0)


def test_sbuf_overflow_names_what_is_live() -> None:
    shape = (128, 1024)  # 4 KiB per partition, so that 48 fit into 192 KiB
    assert emulate(hold, 48, shape, nl.sbuf).report.cores[0].peak_sbuf_bytes == 192 * 1024
    words = r"at instruction 48 of this core 49 tensors with 200704 bytes are live in sbuf.*sbuf has 196608 bytes"
    with pytest.raises(NkiValidationError, match=words):
        emulate(hold, 49, shape, nl.sbuf)
    assert emulate(hold, 49, shape, nl.sbuf, capacity=False).report.cores[0].peak_sbuf_bytes == 49 * 4096


def test_a_ninth_psum_bank_does_not_exist() -> None:
    assert emulate(hold, 8, (1, 1), nl.psum).report.cores[0].peak_psum_banks == 8
    with pytest.raises(NkiValidationError, match=r"9 tensors with 9 banks are live in psum.*psum has 8 banks"):
        emulate(hold, 9, (1, 1), nl.psum)


def test_a_tensor_is_live_from_its_first_to_its_last_access() -> None:
    def kernel() -> None:
        names = [nl.ndarray((1, 1), nl.float32, buffer=nl.psum) for _ in range(100)]  # all referenced to the end
        for t in names:
            nisa.memset(t, 0.0)
            nisa.tensor_scalar(t, t, nl.add, 1.0)

    assert emulate(kernel).report.cores[0].peak_psum_banks == 1


def test_placed_tensors_share_bytes() -> None:
    def kernel() -> Any:
        a = nl.ndarray((4, 8), nl.float32, address=(0, 1024))
        b = nl.ndarray((4, 4), nl.float32, address=(0, 1040))
        nisa.memset(a, 1.0)
        nisa.memset(b, 2.0)
        return store(a)

    result = emulate(kernel)
    assert result.outputs[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert result.report.cores[0].peak_sbuf_bytes == 1056


def test_each_placed_psum_tensor_starts_a_new_accumulation() -> None:
    def kernel(a: Any) -> Any:
        t = tile(a)
        tensors = [nl.ndarray((1, 1), nl.float32, buffer=nl.psum, address=(0, 2048)) for _ in range(2)]
        for p in tensors:
            nisa.nc_matmul(p, t, t)
        return store(tensors[1])

    assert float(emulate(kernel, np.ones((1, 1), np.float32)).outputs[0, 0]) == 1.0


# --- Two cores -------------------------------------------------------------------------------------------------------
def test_programs_share_hbm_and_split_work() -> None:
    @jit
    def kernel(a: Any) -> Any:
        half = a.shape[0] // nl.num_programs(0)
        start = nl.program_id(0) * half
        out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
        t = tile(a[start : start + half])
        nisa.tensor_scalar(t, t, nl.multiply, 2.0)
        nisa.dma_copy(dst=out[start : start + half], src=t)
        assert (nl.program_ndim(), nl.num_programs(None)) == (1, 2)
        return out

    x = grid_data(64, 8)
    np.testing.assert_array_equal(kernel[2](x), 2 * x)
    np.testing.assert_array_equal(simulate(kernel[2])(x), 2 * x)
    assert len(emulate(kernel, x, grid=2).report.cores) == 2


def test_sendrecv_swaps_tiles() -> None:
    def kernel() -> Any:
        me = nl.program_id(0)
        mine, other = nl.ndarray((4, 4), nl.float32), nl.ndarray((4, 4), nl.float32)
        nisa.memset(mine, float(me + 1))
        nisa.sendrecv(src=mine, dst=other, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
        out = nl.ndarray((2, 4, 4), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out[me], src=other)
        return out

    out = emulate(kernel, grid=2).outputs
    assert out[:, 0, 0].tolist() == [2.0, 1.0]


def test_barrier_makes_the_other_core_s_writes_visible() -> None:
    def kernel() -> Any:
        me = nl.program_id(0)
        shared = nl.ndarray((2, 1, 4), nl.float32, buffer=nl.shared_hbm)
        out = nl.ndarray((2, 1, 4), nl.float32, buffer=nl.shared_hbm)
        t = nl.ndarray((1, 4), nl.float32)
        nisa.memset(t, float(me + 1))
        nisa.dma_copy(dst=shared[me], src=t)
        nisa.core_barrier(shared, (0, 1))
        nisa.dma_copy(dst=out[me], src=shared[1 - me])
        return out

    assert emulate(kernel, grid=2).outputs[:, 0, 0].tolist() == [2.0, 1.0]


def test_a_core_that_waits_for_nobody_is_reported() -> None:
    def kernel() -> None:
        shared = nl.ndarray((1, 4), nl.float32, buffer=nl.shared_hbm)
        if nl.program_id(0) == 0:
            nisa.core_barrier(shared, (0, 1))

    with pytest.raises(RuntimeError, match="program 0 waits at core_barrier, which another program never reaches"):
        emulate(kernel, grid=2)


def test_cores_at_different_meeting_points_are_reported() -> None:
    def kernel() -> None:
        me = nl.program_id(0)
        a, b = nl.zeros((4, 4), nl.float32), nl.ndarray((4, 4), nl.float32)
        nisa.sendrecv(src=a, dst=b, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=me)

    with pytest.raises(RuntimeError, match="waits at sendrecv"):
        emulate(kernel, grid=2)


# --- Arguments and results -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_torch_tensors_go_in_and_come_out(dtype: torch.dtype) -> None:
    x = (10 * torch.randn(8, 6)).to(dtype)
    y = jit(lambda a: store(tile(a)))(x)
    assert y.dtype == dtype
    assert torch.equal(y, x)


def test_writes_to_an_input_reach_the_caller() -> None:
    def kernel(a: Any) -> None:
        t = nl.zeros((4, 4), a.dtype)
        nisa.dma_copy(dst=a, src=t)

    contiguous, strided, other = np.ones((4, 4), BF16), np.ones((4, 8), np.float32)[:, ::2], torch.ones(4, 4)
    for array in (contiguous, strided, other):
        emulate(kernel, array)
        assert not np.asarray(array, dtype=np.float32).any()


def test_results_keep_their_structure() -> None:
    def kernel(a: Any, flag: bool) -> Any:
        assert flag
        return {"copy": store(tile(a)), "pair": (a, None, 3)}

    x = grid_data(2, 2)
    out = emulate(kernel, x, flag=True).outputs
    np.testing.assert_array_equal(out["copy"], x)
    assert out["pair"][1:] == (None, 3)


def test_a_jitted_kernel_is_a_plain_call_inside_another() -> None:
    @jit
    def inner(t: Any) -> None:
        nisa.tensor_scalar(t, t, nl.add, 1.0)

    def outer(a: Any) -> Any:
        t = tile(a)
        inner(t)
        return store(t)

    np.testing.assert_array_equal(emulate(outer, grid_data(2, 2)).outputs, grid_data(2, 2) + 1)


def test_instructions_outside_a_kernel_say_so() -> None:
    with pytest.raises(RuntimeError, match="no kernel is running"):
        nl.ndarray((1, 1), nl.float32)
