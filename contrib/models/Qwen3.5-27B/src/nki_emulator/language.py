# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""``nki.language``: tensors, ranges, the launch grid, operators, and convenience calls on tiles.

A function such as :func:`add` has two uses: as an operator, ``nisa.tensor_tensor(..., op=nl.add)``, and as a call on
tiles, ``nl.add(x, y)``, which allocates an SBUF tile and issues the instructions. Shapes of tiles are ``[P, F...]``.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from . import costs, dtypes, ops
from . import isa as _isa
from .allocation import QUADRANTS
from .context import Issued, canonical_body, current
from .enums import MemoryRegion
from .enums import engine as _engine
from .errors import fail
from .isa.common import finish as _finish
from .memory import HBM, ON_CHIP, NkiTensor, Storage, new_storage, place, wrap_hbm
from .registers import NKIObject, VirtualRegister

_LANGUAGE = "nki/api/nki/language/__init__.py"
_TILING = "nki/get-started/about/tiling-overview.rst"

# --- Data types and memories -----------------------------------------------------------------------------------------
uint8 = "uint8"
int8 = "int8"
uint16 = "uint16"
int16 = "int16"
uint32 = "uint32"
int32 = "int32"
float8_e4m3 = "float8_e4m3"
float8_e4m3fn = "float8_e4m3fn"
float8_e5m2 = "float8_e5m2"
float16 = "float16"
bfloat16 = "bfloat16"
tfloat32 = "tfloat32"
float32 = "float32"
bool_ = "bool"
float8_e4m3fn_x4 = "float8_e4m3fn_x4"
float8_e5m2_x4 = "float8_e5m2_x4"
float4_e2m1fn_x4 = "float4_e2m1fn_x4"

sbuf = MemoryRegion.sbuf
psum = MemoryRegion.psum
private_hbm = MemoryRegion.private_hbm
shared_hbm = MemoryRegion.shared_hbm
hbm = MemoryRegion.private_hbm


class tile_size:
    """Largest tiles of each kind."""

    pmax = costs.PARTITIONS
    psum_fmax = 512
    gemm_stationary_fmax = 128
    gemm_moving_fmax = 512
    bn_stats_fmax = 512
    psum_min_align = 4  # inferred: one float32
    sbuf_min_align = 1  # inferred: one byte
    total_available_sbuf_size = int(costs.SBUF_PARTITION_BYTES)


def is_hbm(buffer: MemoryRegion) -> bool:
    """Whether ``buffer`` is HBM of either kind."""
    return buffer in HBM


def is_on_chip(buffer: MemoryRegion) -> bool:
    """Whether ``buffer`` is SBUF or PSUM."""
    return buffer in ON_CHIP


def is_psum(buffer: MemoryRegion) -> bool:
    """Whether ``buffer`` is PSUM."""
    return buffer is MemoryRegion.psum


def is_sbuf(buffer: MemoryRegion) -> bool:
    """Whether ``buffer`` is SBUF."""
    return buffer is MemoryRegion.sbuf


# --- Creation --------------------------------------------------------------------------------------------------------
def ndarray(
    shape: Sequence[int],
    dtype: Any,
    buffer: MemoryRegion = MemoryRegion.sbuf,
    name: str = "",
    address: tuple[int, int] | None = None,
) -> NkiTensor:
    """A new tensor whose content is undefined: NaN for floats, 4 for integers.

    Args:
        shape: sizes; on chip the first is the partition count, at most 128.
        dtype: element type.
        buffer: memory.
        name: for reports.
        address: physical (partition, byte within the partition); in PSUM the byte is a multiple of a bank.

    Raises:
        NkiValidationError: the shape or the address is illegal, or the memory is full.
    """
    sizes = tuple(int(n) for n in (shape if isinstance(shape, (tuple, list)) else (shape,)))
    kind = dtypes.canonical(dtype)
    core = current()
    if not isinstance(buffer, MemoryRegion):
        fail(
            "nl.ndarray",
            f"buffer={buffer!r}",
            "it must be nl.sbuf, nl.psum, nl.private_hbm or nl.shared_hbm",
            "nki/deep-dives/nki-0-3-0-update-guide.rst, String Buffer Names",
        )
    if any(n < 1 for n in sizes) or not sizes:
        fail("nl.ndarray", f"shape {list(sizes)}", "sizes are positive", f"{_LANGUAGE}, ndarray")
    if buffer is MemoryRegion.shared_hbm:
        return _shared(sizes, kind, name)
    if buffer in HBM:
        return new_storage(sizes, kind, buffer, name)
    if sizes[0] > costs.PARTITIONS and core.options.strict:
        fail("nl.ndarray", f"shape {list(sizes)} in {buffer.name}", f"at most {costs.PARTITIONS} partitions", _TILING)
    row = int(np.prod(sizes[1:], dtype=np.int64)) * dtypes.itemsize(kind)
    if address is not None:
        return _placed(sizes, kind, buffer, row, address)
    what = f"{name or 'a tensor'} {list(sizes)} {kind}"
    tensor = new_storage(sizes, kind, buffer, name)
    if buffer is MemoryRegion.sbuf:
        quadrants = 1 if sizes[0] <= 32 else 2 if sizes[0] <= 64 else QUADRANTS
        tensor.storage.allocation = core.sbuf.allocate(
            row, what, tensor.storage.raw.size, tensor.storage.granule, quadrants
        )
    else:
        # PSUM tensors start at the beginning of a bank (nki/deep-dives/nki-beta2-migration-guide.rst, Allocation API).
        banks = -(-row // int(costs.PSUM_BANK_BYTES))
        tensor.storage.allocation = core.psum.allocate(banks, what, tensor.storage.raw.size, tensor.storage.granule)
    return tensor


def _shared(sizes: tuple[int, ...], kind: str, name: str) -> NkiTensor:
    """The n-th shared_hbm tensor of every program of a launch is the same tensor."""
    core = current()
    tensors, index = core.shared.hbm, core.hbm_allocations
    core.hbm_allocations += 1
    if index == len(tensors):
        tensors.append(new_storage(sizes, kind, MemoryRegion.shared_hbm, name))
    tensor = tensors[index]
    if tensor.shape != sizes or tensor.dtype != kind:
        fail(
            "nl.ndarray",
            f"shared_hbm tensor {index} is {list(sizes)} {kind} here and {tensor!r} in another program",
            "programs of a launch allocate the same shared tensors in the same order",
            "nki/get-started/about/lnc.rst",
        )
    return tensor


def _placed(sizes: tuple[int, ...], kind: str, buffer: MemoryRegion, row: int, address: Sequence[int]) -> NkiTensor:
    core = current()
    partition, byte = int(address[0]), int(address[1])
    storage, pool = core.physical(buffer), core.sbuf if buffer is MemoryRegion.sbuf else core.psum
    capacity = storage.raw.shape[1]
    if partition + sizes[0] > costs.PARTITIONS or byte < 0 or byte + row > capacity:
        fail(
            "nl.ndarray",
            f"address {(partition, byte)} with shape {list(sizes)} {kind} in {buffer.name}",
            f"{costs.PARTITIONS} partitions of {capacity} bytes",
            pool.source,
        )
    if buffer is MemoryRegion.psum and byte % int(costs.PSUM_BANK_BYTES):
        fail(
            "nl.ndarray",
            f"psum address {byte}",
            f"it must be a multiple of the bank size {int(costs.PSUM_BANK_BYTES)}",
            "nki/deep-dives/nki-beta2-migration-guide.rst, Improved Allocation API",
        )
    end = byte + row
    units = end if buffer is MemoryRegion.sbuf else -(-end // int(costs.PSUM_BANK_BYTES))
    pool.placed = builtins.max(pool.placed, units)
    return place(storage, sizes, kind, partition, byte)


def _filled(shape: Sequence[int], value: float, dtype: Any, buffer: MemoryRegion, name: str) -> NkiTensor:
    tensor = ndarray(shape, dtype, buffer, name)
    if tensor.dtype in dtypes.INTEGERS:
        value = int(value)
    if buffer in ON_CHIP:
        _isa.memset(tensor, value)
        return tensor
    rows = tensor.reshape((-1, tensor.shape[-1])) if tensor.ndim > 1 else tensor.reshape((1, tensor.size))
    for start in builtins.range(0, rows.shape[0], costs.PARTITIONS):
        part = rows[start : builtins.min(start + costs.PARTITIONS, rows.shape[0])]
        tile = ndarray(part.shape, tensor.dtype)
        _isa.memset(tile, value)
        _isa.dma_copy(dst=part, src=tile)
    return tensor


def zeros(shape: Sequence[int], dtype: Any, buffer: MemoryRegion = MemoryRegion.sbuf, name: str = "") -> NkiTensor:
    """A new tensor of zeros."""
    return _filled(shape, 0.0, dtype, buffer, name)


def ones(shape: Sequence[int], dtype: Any, buffer: MemoryRegion = MemoryRegion.sbuf, name: str = "") -> NkiTensor:
    """A new tensor of ones."""
    return _filled(shape, 1.0, dtype, buffer, name)


def full(
    shape: Sequence[int], fill_value: float, dtype: Any, buffer: MemoryRegion = MemoryRegion.sbuf, name: str = ""
) -> NkiTensor:
    """A new tensor filled with ``fill_value``."""
    return _filled(shape, fill_value, dtype, buffer, name)


def empty_like(x: NkiTensor, dtype: Any = None, buffer: MemoryRegion | None = None, name: str = "") -> NkiTensor:
    """A new tensor with the shape of ``x``; type and memory of ``x`` unless given."""
    return ndarray(x.shape, x.dtype if dtype is None else dtype, x.buffer if buffer is None else buffer, name)


def zeros_like(x: NkiTensor, dtype: Any = None, buffer: MemoryRegion | None = None, name: str = "") -> NkiTensor:
    """A new tensor of zeros with the shape of ``x``."""
    return zeros(x.shape, x.dtype if dtype is None else dtype, x.buffer if buffer is None else buffer, name)


def shared_constant(constant: Any) -> NkiTensor:
    """A shared_hbm tensor with constant content.

    Args:
        constant: array, or path of a ``.npy`` file.
    """
    array = np.load(constant) if isinstance(constant, (str, Path)) else np.asarray(constant)
    return wrap_hbm(array.copy(), dtypes.canonical(array.dtype), "constant", MemoryRegion.shared_hbm)


def shared_identity_matrix(n: int, dtype: Any = "uint8", dst: Any = None) -> NkiTensor:
    """The ``[n, n]`` identity in SBUF, one per core and type, or loaded into ``dst``.

    The constant itself is in HBM; library kernels use the result as an SBUF operand.
    """
    kind, core = dtypes.canonical(dtype), current()
    key = (int(n), kind)
    if dst is None and key in core.identities:
        return core.identities[key]
    identity = np.eye(int(n), dtype=np.float32).astype(dtypes.STORAGE[kind])
    constant = wrap_hbm(identity, kind, "identity", MemoryRegion.shared_hbm)
    tile = ndarray((int(n), int(n)), kind, name="identity") if dst is None else dst
    _isa.dma_copy(dst=tile, src=constant)
    if dst is None:
        core.identities[key] = tile
    return tile


def rand(shape: Sequence[int], dtype: Any, buffer: MemoryRegion = MemoryRegion.sbuf, name: str = "") -> NkiTensor:
    """Not emulated."""
    raise NotImplementedError("nki.language.rand is not emulated: the device generator is not documented to the bit")


def random_seed(seed: Any) -> None:
    """Not emulated."""
    raise NotImplementedError("nki.language.random_seed is not emulated: see nki.language.rand")


def dropout(x: Any, rate: Any, dtype: Any = None) -> NkiTensor:
    """Not emulated."""
    raise NotImplementedError("nki.language.dropout is not emulated: see nki.language.rand")


# --- Loops, grid, indices --------------------------------------------------------------------------------------------
def _bounds(call: str, start: Any, stop: Any, step: Any) -> builtins.range:
    first, last = (0, start) if stop is None else (start, stop)
    for operand, value in (("start", first), ("stop", last), ("step", step)):
        if isinstance(value, VirtualRegister) or not hasattr(value, "__index__"):
            fail(
                call, f"{operand}={value!r}", "bounds are compile-time integers", "nki/deep-dives/nki-dynamic-loops.rst"
            )
    return builtins.range(int(first), int(last), int(step))


def affine_range(start: int, stop: int | None = None, step: int = 1) -> builtins.range:
    """Unrolled loop whose iterations are independent."""
    return _bounds("nl.affine_range", start, stop, step)


def sequential_range(start: int, stop: int | None = None, step: int = 1) -> builtins.range:
    """Unrolled loop that carries values."""
    return _bounds("nl.sequential_range", start, stop, step)


def static_range(start: int, stop: int | None = None, step: int = 1) -> builtins.range:
    """Unrolled loop."""
    return _bounds("nl.static_range", start, stop, step)


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[VirtualRegister]:
    """Loop on the device; bounds may be registers and the index is one."""
    first, last = (0, start) if stop is None else (start, stop)
    if isinstance(step, VirtualRegister) or int(step) < 1:
        fail("nl.dynamic_range", f"step={step!r}", "it is a positive integer", "nki/deep-dives/nki-dynamic-loops.rst")
    return _iterations(builtins.range(int(first), int(last), int(step)))


def _iterations(indices: builtins.range) -> Iterator[VirtualRegister]:
    """The indices, with a check that each iteration issues what the first one does: the body is compiled once."""
    core, first = current(), None
    for i in indices:
        body: list[Issued] = []
        started = Storage.made
        core.loop_bodies.append(body)
        yield VirtualRegister(i)
        core.loop_bodies.pop()
        issued = canonical_body(body, started)
        first = issued if first is None else first
        if core.options.strict and issued != first:
            at = next((n for n, pair in enumerate(zip(first, issued, strict=False)) if pair[0] != pair[1]), None)
            what = (
                f"{len(issued)} instructions after {len(first)}" if at is None else f"instruction {at}, {issued[at][0]}"
            )
            fail(
                "nl.dynamic_range",
                f"iteration {i} issues another body than the first: {what}",
                "the body is compiled once: what changes with the iteration is in registers and in tensors",
                "nki/deep-dives/nki-dynamic-loops.rst, Hardware Lowering",
            )


def program_id(axis: int = 0) -> int:
    """Index of this program along ``axis`` of the launch grid; 0 without a grid."""
    coordinates = current().coordinates
    return coordinates[int(axis)] if coordinates else 0


def num_programs(axes: Any = 0) -> int:
    """Number of programs along ``axes``; None means all; 1 without a grid."""
    grid = current().shared.grid
    if not grid:
        return 1
    chosen = builtins.range(len(grid)) if axes is None else axes if isinstance(axes, (tuple, list)) else (axes,)
    return int(np.prod([grid[int(a)] for a in chosen]))


def program_ndim() -> int:
    """Axes of the launch grid; 0 without one."""
    return len(current().shared.grid)


def ds(start: Any, size: Any) -> slice:
    """The slice ``[start, start + size)``; ``start`` may be a register."""
    return slice(int(start), int(start) + int(size))


def no_reorder() -> AbstractContextManager[None]:
    """Region in program order; the modelled timeline keeps program order per engine anyway."""
    return nullcontext()


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    """Print a tensor."""
    print(print_prefix, np.asarray(tensor.array, dtype=np.float32))


# --- Data movement ---------------------------------------------------------------------------------------------------
def load(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """HBM to a new SBUF tile."""
    out = ndarray(src.shape, src.dtype if dtype is None else dtype)
    _isa.dma_copy(dst=out, src=src)
    return out


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """SBUF tile to HBM."""
    _isa.dma_copy(dst=dst, src=value)


def load_transpose2d(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """HBM ``[A, B]`` to a new SBUF tile ``[B, A]``."""
    out = ndarray((src.shape[1], src.shape[0]), src.dtype)
    _isa.dma_transpose(dst=out, src=src)
    return out if dtype is None else copy(out, dtype)


def copy(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A new tile with the content of ``x``, on the Scalar engine."""
    out = ndarray(x.shape, x.dtype if dtype is None else dtype, x.buffer)
    _isa.activation(dst=out, op=copy, data=x)
    return out


def expand_dims(x: NkiTensor, axis: int) -> NkiTensor:
    """View with an axis of size one."""
    return x.expand_dims(axis)


def broadcast_to(x: NkiTensor, shape: Sequence[int], dtype: Any = None) -> NkiTensor:
    """View of ``x`` broadcast along free axes of size one."""
    view = x if tuple(x.shape) == tuple(shape) else x.broadcast_to(shape)
    return view if dtype is None or dtypes.canonical(dtype) == x.dtype else copy(view, dtype)


def transpose(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """``[P, F]`` to a new ``[F, P]`` tile, in PSUM when the Tensor engine does it."""
    small = x.partitions <= 32 and x.free_size <= 32
    out = ndarray((x.free_size, x.partitions), x.dtype, sbuf if small else psum)
    _isa.nc_transpose(dst=out, data=x)
    return out if dtype is None else copy(out, dtype)


def matmul(x: NkiTensor, y: NkiTensor, transpose_x: bool = False) -> NkiTensor:
    """``x @ y`` (``x.T @ y`` with ``transpose_x``) into a new float32 PSUM tile."""
    stationary = x
    if not transpose_x:
        turned = transpose(x)
        stationary = ndarray(turned.shape, turned.dtype)
        _isa.tensor_copy(dst=stationary, src=turned)
    out = ndarray((stationary.free_size, y.free_size), float32, psum)
    _isa.nc_matmul(dst=out, stationary=stationary, moving=y)
    return out


def gather_flattened(data: NkiTensor, indices: NkiTensor, axis: int = 0, dtype: Any = None) -> NkiTensor:
    """Per partition, elements of the flattened ``data`` at ``indices``."""
    out = ndarray(indices.shape, data.dtype)
    _isa.nc_n_gather(dst=out, data=data, indices=indices)
    return out if dtype is None else copy(out, dtype)


# --- Operators and element-wise calls --------------------------------------------------------------------------------
def _operator(name: str, call: Callable[..., NkiTensor], doc: str) -> Callable[..., NkiTensor]:
    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    call.nki_operator = name  # type: ignore[attr-defined]
    return call


def _binary(name: str, meaning: str) -> Callable[..., NkiTensor]:
    def apply(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
        return _apply_binary(name, x, y, dtype)

    return _operator(name, apply, f"Operator, and element by element on tiles or constants: {meaning}.")


def _unary(name: str, meaning: str) -> Callable[..., NkiTensor]:
    def apply(x: NkiTensor, dtype: Any = None) -> NkiTensor:
        out = ndarray(x.shape, x.dtype if dtype is None else dtype)
        if name in ops.ACTIVATIONS:
            _isa.activation(dst=out, op=globals()[name], data=x)
        else:
            out.write(_COMPOSED_UNARY[name](x.read_float()))
            _record_composed(name, out, [x])
        return out

    return _operator(name, apply, f"Operator, and element by element on a tile: {meaning}.")


def _reduction(name: str, operator: str, meaning: str) -> Callable[..., NkiTensor]:
    def apply(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
        out = ndarray(_reduced(x, axis, keepdims), x.dtype if dtype is None else dtype)
        _isa.tensor_reduce(dst=out, op=globals()[operator], data=x, axis=axis, keepdims=keepdims)
        return out

    return _operator(name, apply, f"{meaning} over the last free axes of a tile.")


def _axes(x: NkiTensor, axis: Any) -> list[int]:
    return sorted(int(a) % x.ndim for a in ((axis,) if isinstance(axis, int) else axis))


def _reduced(x: NkiTensor, axis: Any, keepdims: bool) -> tuple[int, ...]:
    gone = _axes(x, axis)
    if keepdims:
        return tuple(1 if i in gone else n for i, n in enumerate(x.shape))
    return tuple(n for i, n in enumerate(x.shape) if i not in gone)


def _apply_binary(name: str, x: Any, y: Any, dtype: Any) -> NkiTensor:
    tiles = [t for t in (x, y) if isinstance(t, NkiTensor)]
    if not tiles:
        fail(f"nl.{name}", f"{x!r} and {y!r}", "at least one operand is a tile", f"{_LANGUAGE}, {name}")
    if dtype is not None:
        kind = dtypes.canonical(dtype)
    else:
        kind = dtypes.promote(tiles[0].dtype, tiles[-1].dtype)
    shape = np.broadcast_shapes(*(t.shape for t in tiles))
    out = ndarray(shape, kind)
    operator = globals()[name]
    if name in ops.COMPOSED:
        # No single instruction divides: the cost is that of two on the Vector engine.
        with np.errstate(all="ignore"):
            left, right = (_as_array(t, shape) for t in (x, y))
            out.write(np.asarray(ops.COMPOSED[name](left, right), dtype=np.float32))
        _record_composed(name, out, tiles)
    elif len(tiles) == 2:
        _isa.tensor_tensor(dst=out, data1=_spread(x, shape), data2=_spread(y, shape), op=operator)
    elif name == "power":
        with np.errstate(all="ignore"):
            out.write(np.power(_as_array(x, shape), _as_array(y, shape), dtype=np.float32))
        _record_composed(name, out, tiles)
    else:
        constant = x if tiles[0] is y else y
        _isa.tensor_scalar(dst=out, data=tiles[0], op0=operator, operand0=constant, reverse0=tiles[0] is y)
    return out


def _spread(t: NkiTensor, shape: tuple[int, ...]) -> NkiTensor:
    return t if t.shape == shape else t.broadcast_to(shape)


def _as_array(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(value, NkiTensor):
        return np.broadcast_to(dtypes.to_float32(value.array), shape)
    return np.full(shape, value, dtype=np.float32)


def _record_composed(name: str, out: NkiTensor, reads: Sequence[NkiTensor]) -> None:
    cycles = out.free_size * costs.VECTOR_TWO_INPUTS * 2
    _finish(f"nl.{name}", _engine.vector, costs.elementwise(_engine.vector, cycles), list(reads), [out], None)


_COMPOSED_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cos": np.cos,
    "tan": np.tan,
    "ceil": np.ceil,
    "floor": np.floor,
    "trunc": np.trunc,
    "negative": np.negative,
    "logical_not": lambda x: (x == 0).astype(np.float32),
}

add = _binary("add", "x + y")
subtract = _binary("subtract", "x - y")
multiply = _binary("multiply", "x * y")
divide = _binary("divide", "x / y")
maximum = _binary("maximum", "the larger of x and y")
minimum = _binary("minimum", "the smaller of x and y")
power = _binary("power", "x to the power of y")
mod = _binary("mod", "remainder with the sign of y")
fmod = _binary("fmod", "remainder with the sign of x")
equal = _binary("equal", "1 where x == y")
not_equal = _binary("not_equal", "1 where x != y")
greater = _binary("greater", "1 where x > y")
greater_equal = _binary("greater_equal", "1 where x >= y")
less = _binary("less", "1 where x < y")
less_equal = _binary("less_equal", "1 where x <= y")
logical_and = _binary("logical_and", "1 where both are non-zero")
logical_or = _binary("logical_or", "1 where either is non-zero")
logical_xor = _binary("logical_xor", "1 where exactly one is non-zero")
bitwise_and = _binary("bitwise_and", "x & y on integers")
bitwise_or = _binary("bitwise_or", "x | y on integers")
bitwise_xor = _binary("bitwise_xor", "x ^ y on integers")
left_shift = _binary("left_shift", "x << y on integers")
right_shift = _binary("right_shift", "x >> y on integers")

abs = _unary("abs", "absolute value")
arctan = _unary("arctan", "inverse tangent")
ceil = _unary("ceil", "smallest integer not below x")
cos = _unary("cos", "cosine")
erf = _unary("erf", "error function")
erf_dx = _unary("erf_dx", "derivative of erf")
exp = _unary("exp", "exponential")
floor = _unary("floor", "largest integer not above x")
gelu = _unary("gelu", "GELU")
gelu_apprx_sigmoid = _unary("gelu_apprx_sigmoid", "GELU by a sigmoid")
gelu_apprx_sigmoid_dx = _unary("gelu_apprx_sigmoid_dx", "derivative of gelu_apprx_sigmoid")
gelu_apprx_tanh = _unary("gelu_apprx_tanh", "GELU by a tanh")
gelu_dx = _unary("gelu_dx", "derivative of GELU")
log = _unary("log", "natural logarithm")
logical_not = _unary("logical_not", "1 where x is zero")
mish = _unary("mish", "x tanh(softplus(x))")
negative = _unary("negative", "-x")
reciprocal = _unary("reciprocal", "1 / x")
relu = _unary("relu", "max(x, 0)")
rsqrt = _unary("rsqrt", "1 / sqrt(x)")
sigmoid = _unary("sigmoid", "1 / (1 + exp(-x))")
sign = _unary("sign", "-1, 0 or 1")
silu = _unary("silu", "x sigmoid(x)")
silu_dx = _unary("silu_dx", "derivative of SiLU")
sin = _unary("sin", "sine")
softplus = _unary("softplus", "log(1 + exp(x))")
sqrt = _unary("sqrt", "square root")
square = _unary("square", "x * x")
tan = _unary("tan", "tangent")
tanh = _unary("tanh", "hyperbolic tangent")
trunc = _unary("trunc", "x without its fraction")
_operator("copy", copy, copy.__doc__ or "")

max = _reduction("max", "maximum", "Maximum")
min = _reduction("min", "minimum", "Minimum")
prod = _reduction("prod", "multiply", "Product")
sum = _reduction("sum", "add", "Sum")


def invert(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Bitwise not on an integer tile; also an operator."""
    out = ndarray(x.shape, x.dtype if dtype is None else dtype)
    _isa.tensor_scalar(dst=out, data=x, op0=bitwise_xor, operand0=-1)
    return out


_operator("invert", invert, invert.__doc__ or "")


def all(x: NkiTensor, axis: Any, dtype: Any = None) -> NkiTensor:
    """1 where every element along ``axis`` is non-zero."""
    out = ndarray(_reduced(x, axis, False), x.dtype if dtype is None else dtype)
    _isa.tensor_reduce(dst=out, op=logical_and, data=x, axis=axis)
    return out


def mean(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Mean over the last free axes."""
    total = sum(x, axis, float32, keepdims)
    count = int(np.prod([x.shape[a] for a in _axes(x, axis)]))
    return multiply(total, 1.0 / count, x.dtype if dtype is None else dtype)


def var(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Population variance over the last free axes."""
    centred = subtract(x, mean(x, axis, float32, True), float32)
    return mean(square(centred), axis, x.dtype if dtype is None else dtype, keepdims)


def where(condition: NkiTensor, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """``x`` where ``condition`` is non-zero, else ``y``."""
    tiles = [t for t in (x, y) if isinstance(t, NkiTensor)]
    kind = dtype if dtype is not None else dtypes.promote(tiles[0].dtype, tiles[-1].dtype) if tiles else float32
    out = ndarray(condition.shape, kind)
    left, right = _as_array(x, condition.shape), _as_array(y, condition.shape)
    out.write(np.where(np.asarray(condition.array != 0), left, right))
    _record_composed("where", out, [condition, *tiles])
    return out


def softmax(x: NkiTensor, axis: Any = -1, dtype: Any = None) -> NkiTensor:
    """``exp(x - max)`` normalised over the last free axes."""
    shifted = subtract(x, max(x, axis, float32, True), float32)
    exponent = exp(shifted)
    return divide(exponent, sum(exponent, axis, float32, True), x.dtype if dtype is None else dtype)


def rms_norm(
    x: NkiTensor,
    w: NkiTensor,
    axis: Any,
    n: int,
    epsilon: float = 1e-06,
    dtype: Any = None,
    compute_dtype: Any = None,
) -> NkiTensor:
    """``x / sqrt(sum(x^2) / n + epsilon) * w`` along ``axis``."""
    inner = float32 if compute_dtype is None else compute_dtype
    squares = multiply(sum(square(x, inner), axis, inner, True), 1.0 / n)
    scale = rsqrt(add(squares, epsilon))
    return multiply(multiply(x, scale, inner), w, x.dtype if dtype is None else dtype)


__all__ = [name for name in dir() if not name.startswith("_") and name not in ("annotations", "builtins")]
__all__ += ["NKIObject"]
