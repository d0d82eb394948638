# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Memory of one core: storage in HBM, SBUF and PSUM, and the tensors that view it.

A :class:`Storage` owns bytes; a :class:`NkiTensor` is a typed, strided view of a storage. Slicing, reshaping and access
patterns make views, never copies, as on the device. The first axis of an SBUF or PSUM tensor runs over partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import numpy as np

from . import costs, dtypes
from .access_times import AccessTimes, Entries, contiguous_runs
from .allocation import Allocation
from .enums import MemoryRegion
from .errors import fail
from .registers import NKIObject, VirtualRegister
from .strictness import is_strict

_AP_DOC = "nki/deep-dives/nki-aps.rst"
_GUIDE = "nki/get-started/nki-language-guide.rst"
ON_CHIP = (MemoryRegion.sbuf, MemoryRegion.psum)
HBM = (MemoryRegion.private_hbm, MemoryRegion.shared_hbm)


class Storage:
    """Bytes in one memory.

    Attributes:
        raw: uint8, contiguous, ``[partitions, row_bytes]`` on chip, ``[1, nbytes]`` in HBM.
        granule: bytes that share one entry of the dependency tracker.
        times: dependency tracker, once an instruction touched it.
        allocation: its share of SBUF or PSUM, for tensors without an explicit address.
        banks: accumulation groups by bank, in PSUM.
        serial: number of this storage in the order of creation.
        made: storages that were ever made.
    """

    __slots__ = ("allocation", "banks", "base", "granule", "name", "raw", "region", "serial", "times")
    made: ClassVar[int] = 0

    def __init__(self, region: MemoryRegion, raw: np.ndarray, granule: int, name: str) -> None:
        self.region = region
        self.raw = raw
        self.base: int = raw.__array_interface__["data"][0]
        self.granule = granule
        self.name = name
        self.times: AccessTimes | None = None
        self.allocation: Allocation | None = None
        self.banks: dict[int, BankGroups] = {}
        self.serial = Storage.made
        Storage.made += 1

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return self.name or f"an unnamed {self.region.name} tensor of {self.raw.size} bytes"

    def __del__(self) -> None:
        allocation = getattr(self, "allocation", None)
        if allocation is not None:
            allocation.pool.release(allocation)


@dataclass
class BankGroups:
    """Accumulation groups of the Tensor engine in one PSUM bank, each known by its largest destination.

    Attributes:
        current: the group of the last matmul.
        followed: earlier groups, each of which another one has followed.
    """

    current: np.ndarray | None = None
    followed: list[np.ndarray] = field(default_factory=list)

    def matmul(self, array: np.ndarray, *, adds: bool) -> bool:
        """Note a matmul into ``array``; whether it adds to a group after a matmul of another group in this bank."""
        if self.current is not None and np.shares_memory(self.current, array):
            if array.size > self.current.size:
                self.current = array
            return False
        again = [group for group in self.followed if np.shares_memory(group, array)]
        self.followed = [group for group in self.followed if not any(group is other for other in again)]
        if self.current is not None:
            self.followed.append(self.current)
        self.current = max([array, *again], key=lambda group: group.size) if adds else array
        return adds and bool(again)


class Accumulation:
    """What decides between overwriting and adding, for one tensor allocated in PSUM.

    It belongs to the allocated tensor, not to the address: a tensor placed where another one was starts anew.

    Attributes:
        written: ``[P, F]``, elements that hold a value.
        product: ``[P, F]``, elements that the Tensor engine wrote.
        stale: ``[P, F]``, elements that were read since a matmul last wrote them.
        base: byte offset of the tensor in its storage.
    """

    __slots__ = ("base", "itemsize", "pitch", "product", "stale", "written")

    def __init__(self, shape: tuple[int, ...], itemsize: int, base: int, pitch: int) -> None:
        self.written = np.zeros((shape[0], prod(shape[1:])), dtype=np.bool_)
        self.product = np.zeros_like(self.written)
        self.stale = np.zeros_like(self.written)
        self.itemsize, self.base, self.pitch = itemsize, base, pitch

    def of(self, mask: np.ndarray, tensor: NkiTensor) -> np.ndarray:
        """The part of ``written``, ``product`` or ``stale`` that ``tensor`` covers, in the shape of the tensor."""
        array, row = tensor._array, mask.shape[1]
        partition, byte = divmod(tensor.byte_offset - self.base, self.pitch)
        if array.itemsize % self.itemsize:  # A view of smaller elements: whole partitions.
            return mask[partition : partition + tensor.partitions]
        strides = [s // self.itemsize for s in array.strides]
        if tensor.has_partition_axis:
            strides[0] = array.strides[0] // self.pitch * row
        offset = partition * row + byte // self.itemsize
        return np.ndarray(array.shape, np.bool_, buffer=mask, offset=offset, strides=tuple(strides))


class NkiTensor(NKIObject):
    """A view of a storage: what kernels pass to instructions.

    Attributes:
        shape: sizes; the first axis of an on-chip tensor is the partition axis.
        dtype: NKI name of the element type.
        buffer: memory that holds it.
        offset: first element, counted in elements from the start of the allocated tensor.
        address: the tensor on chip that holds its dynamic offset, None for a static one or that of a register.
    """

    __slots__ = (
        "_array",
        "_byte_offset",
        "_indexed",
        "_indirect",
        "accumulation",
        "address",
        "dtype",
        "entries",
        "has_partition_axis",
        "storage",
    )

    def __init__(
        self,
        storage: Storage,
        array: np.ndarray,
        dtype: str,
        *,
        accumulation: Accumulation | None = None,
        has_partition_axis: bool = True,
        indexed: bool = False,
        indirect: Indirect | None = None,
        address: NkiTensor | None = None,
    ) -> None:
        self.storage = storage
        self.address = address
        self.accumulation = accumulation
        self._array = array
        self.dtype = dtype
        self.has_partition_axis = has_partition_axis
        self._indexed = indexed
        self._indirect = indirect
        # Views are immutable, so what the timeline derives from one is computed once.
        self._byte_offset = -1
        self.entries: tuple[int, Entries] | None = None

    # --- What a kernel may ask at compile time --------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape if self._indirect is None else self._indirect.index.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self._array.itemsize

    @property
    def buffer(self) -> MemoryRegion:
        return self.storage.region

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def offset(self) -> int:
        return self.byte_offset // self._array.itemsize

    def get_pattern(self) -> list[list[int]]:
        """Access pattern as ``[[step, num], ...]`` in elements."""
        return [[s // self._array.itemsize, n] for s, n in zip(self._array.strides, self._array.shape, strict=True)]

    def __repr__(self) -> str:
        return f"NkiTensor({self.storage.name or 'unnamed'} {list(self.shape)} {self.dtype} {self.buffer.name})"

    def __bool__(self) -> bool:
        """True, for a tensor that was given; with strict checks the question is refused, for it reads like another.

        Raises:
            NkiValidationError: strict checks are on.
        """
        if is_strict():
            fail(
                "if",
                f"the truth of {self!r} was asked",
                "control flow may depend on compile-time values or on registers, not on tensor contents; whether a "
                "tensor was given is asked by == None",
                f"{_GUIDE}, Dynamic Control Flow",
            )
        return True

    def __iter__(self) -> Any:
        for i in range(self.shape[0]):
            yield self[i]

    def __len__(self) -> int:
        return self.shape[0]

    def _like(
        self,
        array: np.ndarray,
        dtype: str | None = None,
        *,
        has_partition_axis: bool | None = None,
        indexed: bool | None = None,
        indirect: Indirect | None = None,
        address: NkiTensor | None = None,
    ) -> NkiTensor:
        """Another view of the same memory."""
        return NkiTensor(
            self.storage,
            array,
            self.dtype if dtype is None else dtype,
            accumulation=self.accumulation,
            has_partition_axis=self.has_partition_axis if has_partition_axis is None else has_partition_axis,
            indexed=self._indexed if indexed is None else indexed,
            indirect=indirect,
            address=self.address if address is None else address,
        )

    # --- Views ----------------------------------------------------------------------------------------------------
    def __getitem__(self, key: Any) -> NkiTensor:
        """Basic indexing with integers, registers, slices and an ellipsis; always a view.

        An integer removes its axis, but a tensor on chip keeps a free axis: ``t[:, 2]`` of ``[P, F]`` is ``[P, 1]``.

        Raises:
            NkiValidationError: an index is out of bounds, a partition step is not 1, or the key is no basic index.
        """
        if self._indirect is not None:
            fail("index", f"{self!r} has an indirect access pattern", "it cannot be indexed again", _AP_DOC)
        if key is Ellipsis or (isinstance(key, slice) and key == slice(None)):
            return self._like(self._array)
        keys = list(key) if isinstance(key, tuple) else [key]
        at = next((i for i, k in enumerate(keys) if k is Ellipsis), None)
        if at is not None:
            keys[at : at + 1] = [slice(None)] * (len(self._array.shape) - len(keys) + 1)
        if len(keys) > len(self._array.shape):
            fail("index", f"{len(keys)} indices on {self!r}", "one index per dimension at most", f"{_GUIDE}, Indexing")
        keys = [self._one_index(axis, k) for axis, k in enumerate(keys)]
        keeps_partition = self.has_partition_axis and not isinstance(keys[0], int)
        free = keys[1:] if self.has_partition_axis else keys
        if self.buffer in ON_CHIP and free and len(keys) == self._array.ndim and all(isinstance(k, int) for k in free):
            # One element of each partition still has a free axis, as nki-library 2.29 relies on.
            keys[-1] = slice(keys[-1], keys[-1] + 1)
        # A full slice keeps the right to call .ap(), so that ``t[:, :].ap`` means the same as ``t.ap``. The ellipsis
        # makes a view of a single element, too.
        array = self._array[(*keys, Ellipsis)]
        indexed = self._indexed or array.size != self._array.size
        return self._like(array, has_partition_axis=keeps_partition, indexed=indexed)

    def _one_index(self, axis: int, key: Any) -> int | slice:
        size = self._array.shape[axis]
        if isinstance(key, slice):
            start, stop, step = (None if v is None else int(v) for v in (key.start, key.stop, key.step))
            step = 1 if step is None else step
            if step < 1:
                fail("index", f"step {step} on axis {axis}", "steps are positive", f"{_GUIDE}, Tensor Indexing")
            first = 0 if start is None else start + size if start < 0 else start
            last = size if stop is None else stop + size if stop < 0 else stop
            if not 0 <= first <= last <= size:
                fail(
                    "index",
                    f"slice {first}:{last} on axis {axis} of {self!r}",
                    f"0 <= start <= stop <= {size}",
                    f"{_GUIDE}, Tensor Indexing",
                )
            if axis == 0 and step != 1 and self.has_partition_axis and self.buffer in ON_CHIP:
                fail("index", f"partition step {step} on {self!r}", "partitions are consecutive", _AP_DOC)
            return slice(first, last, step)
        try:
            index = int(key.__index__())
        except (AttributeError, TypeError):
            fail(
                "index",
                f"{type(key).__name__} on axis {axis} of {self!r}",
                "an index is an integer, a register, a slice or an ellipsis; use .ap(vector_offset=...) to gather",
                f"{_GUIDE}, Tensor Indexing",
            )
        if not -size <= index < size:
            fail("index", f"index {index} on axis {axis} of {self!r}", f"size is {size}", f"{_GUIDE}, Tensor Indexing")
        return index % size

    def __setitem__(self, key: Any, value: Any) -> None:
        fail(
            "assignment",
            f"t[...] = {type(value).__name__}",
            "an instruction with dst= writes a tensor, assignment does not",
            "nki/deep-dives/nki-beta2-migration-guide.rst",
        )

    def reshape(self, *shape: Any) -> NkiTensor:
        """The same memory with another shape; the partition axis of an on-chip tensor is kept.

        Raises:
            NkiValidationError: sizes differ, the layout does not allow a view, or partitions would move.
        """
        new = tuple(int(n) for n in (shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape))
        if -1 in new:
            new = tuple(self.size // max(-prod(new), 1) if n == -1 else n for n in new)
        if prod(new) != self.size:
            fail("reshape", f"{list(self.shape)} to {list(new)}", "element counts must be equal", _GUIDE)
        if self.buffer in ON_CHIP and self.has_partition_axis and new[0] != self.shape[0]:
            fail("reshape", f"{list(self.shape)} to {list(new)}", "the partition axis cannot change", _GUIDE)
        array = self._array.reshape(new)
        if array.size and not np.may_share_memory(array, self._array):
            fail("reshape", f"{self!r} to {list(new)}", "the layout of this slice has no such view", _GUIDE)
        return self._like(array)

    def view(self, dtype: Any) -> NkiTensor:
        """Reinterpret the bytes as ``dtype``; the last axis is rescaled by the ratio of sizes."""
        name = dtypes.canonical(dtype)
        try:
            array = self._array.view(dtypes.STORAGE[name])
        except ValueError as error:
            fail("view", f"{self!r} as {name}", f"the last axis must be contiguous and divisible ({error})", _GUIDE)
        return self._like(array, name)

    reinterpret_cast = view

    def broadcast_to(self, shape: Sequence[int]) -> NkiTensor:
        """View with stride 0 along axes of size one; the partition axis cannot be broadcast on chip."""
        new = tuple(int(n) for n in shape)
        if self.buffer in ON_CHIP and self.has_partition_axis and new[0] != self.shape[0]:
            fail("broadcast_to", f"{self!r} to {list(new)}", "partitions cannot be broadcast by a view", _AP_DOC)
        try:
            array = np.broadcast_to(self._array, new)
        except ValueError:
            fail("broadcast_to", f"{self!r} to {list(new)}", "axes match or have size 1", _GUIDE)
        return self._like(array, indexed=True)

    def expand_dims(self, axis: int) -> NkiTensor:
        """View with an axis of size one inserted; never before the partition axis."""
        if axis == 0 and self.buffer in ON_CHIP and self.has_partition_axis:
            fail("expand_dims", f"axis 0 of {self!r}", "the partition axis stays first", _GUIDE)
        array = np.expand_dims(self._array, axis)
        return self._like(array)

    def ap(
        self,
        pattern: Sequence[Sequence[int]],
        offset: int | None = 0,
        scalar_offset: NkiTensor | VirtualRegister | None = None,
        vector_offset: NkiTensor | None = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> NkiTensor:
        """Hardware access pattern ``[[step, num], ...]`` in elements of the tensor flattened to one dimension.

        Args:
            pattern: one ``[step, num]`` per axis of the result, partition first.
            offset: first element.
            scalar_offset: register or ``[1, 1]`` tensor added on axis ``indirect_dim`` of this tensor.
            vector_offset: ``[P, 1]`` integer tensor, one row index of this tensor per partition of the result.
            indirect_dim: axis of this tensor that the dynamic offset counts.
            dtype: reinterpret the elements.

        Raises:
            NkiValidationError: the tensor is already indexed, a partition is skipped, or the pattern leaves the tensor.
                Without strict checks a pattern may start from a view whose elements follow each other, as kernels of
                nki-library do; it counts the elements of that view.
        """
        if self._indirect is not None or (self._indexed and (is_strict() or not self._is_dense)):
            fail("ap", f"{self!r} is already indexed", "access patterns start from an allocated tensor", _AP_DOC)
        if scalar_offset is not None and vector_offset is not None:
            fail("ap", "scalar_offset and vector_offset both given", "they exclude each other", _AP_DOC)
        name = self.dtype if dtype is None else dtypes.canonical(dtype)
        size = dtypes.itemsize(name)
        total = self.size * self._array.itemsize // size
        steps = [int(step) for step, _ in pattern]
        nums = [int(num) for _, num in pattern]
        start = int(offset or 0)
        stride = prod(self.shape[indirect_dim + 1 :]) * self._array.itemsize // size
        if vector_offset is not None:
            return self._gather(name, steps, nums, start, stride, vector_offset)
        if scalar_offset is not None:
            start += scalar_value(scalar_offset) * stride
        last = start + sum(s * (n - 1) for s, n in zip(steps, nums, strict=True))
        inside = 0 <= start and last < total and min(steps, default=0) >= 0
        if not inside and scalar_offset is None:
            fail(
                "ap",
                f"pattern {[list(p) for p in pattern]} at {start} reaches element {last}",
                f"{self!r} has {total}",
                _AP_DOC,
            )
        if not inside:
            # Only the instruction knows whether a dynamic address out of bounds is an error or skipped.
            nowhere = Indirect(self._flat(name), np.zeros(nums, dtype=np.int64), np.zeros(nums, dtype=np.bool_))
            return self._like(self._array[:0], name, indexed=True, indirect=nowhere, address=_tensor(scalar_offset))
        return self._strided(name, steps, nums, start, total, _tensor(scalar_offset))

    def _strided(
        self, name: str, steps: list[int], nums: list[int], start: int, total: int, address: NkiTensor | None
    ) -> NkiTensor:
        """The view of an access pattern of even steps, which lies within the ``total`` elements of this tensor."""
        size = dtypes.itemsize(name)
        if self.buffer in ON_CHIP and self.has_partition_axis:
            row = total // self.shape[0]
            if nums[0] > 1 and steps[0] != row:
                fail("ap", f"partition step {steps[0]} on {self!r}", f"it must be the free size {row}", _AP_DOC)
            if start % row + sum(s * (n - 1) for s, n in zip(steps[1:], nums[1:], strict=True)) >= row:
                pattern = [list(p) for p in zip(steps, nums, strict=True)]
                fail("ap", f"pattern {pattern} at {start}", f"it leaves the {row} elements of a partition", _AP_DOC)
            pitch = self._array.strides[0]
            where = self.byte_offset + start // row * pitch + start % row * size
            strides = (pitch, *(s * size for s in steps[1:]))
        else:
            where = self.byte_offset + start * size
            strides = tuple(s * size for s in steps)
        array = np.ndarray(tuple(nums), dtypes.STORAGE[name], buffer=self.storage.raw, offset=where, strides=strides)
        return self._like(array, name, indexed=True, address=address)

    def _flat(self, dtype: str) -> np.ndarray:
        return self.storage.raw.reshape(-1).view(dtypes.STORAGE[dtype])

    def _gather(
        self, name: str, steps: list[int], nums: list[int], start: int, stride: int, rows: NkiTensor
    ) -> NkiTensor:
        if self.buffer not in HBM:
            fail(
                "ap",
                f"vector_offset on {self!r}",
                "the indexed tensor is in HBM",
                "nki/api/nki/isa/__init__.py, dma_copy",
            )
        flat = self._flat(name)
        start += self.byte_offset // flat.itemsize
        index = rows.read().reshape(-1).astype(np.int64)
        if index.size < nums[0]:
            fail("ap", f"vector_offset of {index.size} rows for {nums[0]} partitions", "one row each", _AP_DOC)
        # The partition step of the pattern is ignored: the row length of the base tensor is used instead
        # (nki/deep-dives/nki-beta2-migration-guide.rst, Vector Dynamic Access).
        address = (start + index[: nums[0]] * stride).reshape([-1] + [1] * (len(nums) - 1))
        for axis in range(1, len(nums)):
            shape = [1] * len(nums)
            shape[axis] = -1
            address = address + (np.arange(nums[axis]) * steps[axis]).reshape(shape)
        address = np.ascontiguousarray(np.broadcast_to(address, nums))
        valid = (address >= 0) & (address < flat.size)
        gather = Indirect(flat, np.where(valid, address, 0), valid)
        return self._like(self._array[:0], name, indexed=True, indirect=gather, address=rows)

    # --- What instructions use ------------------------------------------------------------------------------------
    @property
    def is_indirect(self) -> bool:
        return self._indirect is not None

    @property
    def out_of_bounds(self) -> int:
        """Elements that an indirect access pattern places outside the tensor."""
        return 0 if self._indirect is None else int(self._indirect.valid.size - self._indirect.valid.sum())

    @property
    def valid(self) -> np.ndarray | None:
        """Mask of the elements in bounds, for an indirect access pattern."""
        return None if self._indirect is None else self._indirect.valid

    @property
    def partitions(self) -> int:
        """Partitions that this tensor occupies; an integer index on the partition axis leaves one."""
        return self.shape[0] if self.has_partition_axis and self.shape else 1

    @property
    def free_size(self) -> int:
        """Elements per partition."""
        return self.size // max(self.partitions, 1)

    @property
    def free_dimensions(self) -> int:
        """Dimensions of the hardware access pattern within a partition, contiguous ones merged."""
        first = 1 if self.has_partition_axis else 0
        dims = [(n, s) for n, s in zip(self._array.shape[first:], self._array.strides[first:], strict=True) if n > 1]
        merged = sum(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(dims))
        return merged + 1 if dims else 0

    @property
    def start_partition(self) -> int:
        """First physical partition."""
        if self.buffer not in ON_CHIP:
            return 0
        return self.byte_offset // self.storage.raw.strides[0]

    @property
    def _is_dense(self) -> bool:
        """Whether the elements follow each other in memory, on chip within each partition."""
        first_axis = 1 if self.has_partition_axis and self.buffer in ON_CHIP else 0
        run = self._array.itemsize
        for axis in range(self._array.ndim - 1, first_axis - 1, -1):
            if self._array.shape[axis] > 1 and self._array.strides[axis] != run:
                return False
            run *= self._array.shape[axis]
        return True

    def byte_runs(self) -> tuple[np.ndarray, int]:
        """Contiguous runs of bytes: where each starts, from the start of the storage, and the length of each."""
        if self._indirect is not None:
            size = self._indirect.flat.itemsize
            return self._indirect.index[self._indirect.valid] * size, size
        offsets, length = contiguous_runs(self._array.shape, self._array.strides, self._array.itemsize)
        return offsets + self.byte_offset, length

    @property
    def byte_offset(self) -> int:
        """Bytes from the start of the storage to the first element."""
        if self._byte_offset < 0:
            start = self._array.__array_interface__["data"][0] if self._array.size else self.storage.base
            self._byte_offset = start - self.storage.base
        return self._byte_offset

    @property
    def array(self) -> np.ndarray:
        """The elements as stored, as a view (a copy for an indirect access pattern)."""
        if self._indirect is None:
            return self._array
        return self._indirect.flat[self._indirect.index]

    def read(self) -> np.ndarray:
        """The elements as stored, ``[partitions, free]``."""
        return self.array.reshape(self.partitions, -1)

    def read_float(self) -> np.ndarray:
        """The elements as an engine computes with them: float32, ``[partitions, free]``."""
        return dtypes.to_float32(self.read())

    def write(self, values: np.ndarray) -> None:
        """Store ``values`` (any shape with as many elements), rounded to this tensor's type."""
        stored = dtypes.cast(values, self.dtype)
        if self._indirect is not None:
            mask = self._indirect.valid
            self._indirect.flat[self._indirect.index[mask]] = stored.reshape(mask.shape)[mask]
            return
        self._array[...] = stored.reshape(self._array.shape)

    def tile(self) -> costs.Tile:
        """Summary for the cost model."""
        strides, shape, size = self._array.strides, self._array.shape, self._array.itemsize
        inner = next((s for s, n in zip(reversed(strides), reversed(shape), strict=True) if n > 1), size)
        if self.has_partition_axis and len(shape) > 1 and all(n == 1 for n in shape[1:]):
            inner = size
        return costs.Tile(
            elements=self.free_size,
            dtype=self.dtype,
            in_psum=self.buffer is MemoryRegion.psum,
            contiguous=inner == size,
            stride_bytes=abs(inner),
        )


class Indirect:
    """Element addresses of a gather or scatter: ``flat[index]`` where ``valid``."""

    __slots__ = ("flat", "index", "valid")

    def __init__(self, flat: np.ndarray, index: np.ndarray, valid: np.ndarray) -> None:
        self.flat, self.index, self.valid = flat, index, valid


def _tensor(offset: NkiTensor | VirtualRegister | None) -> NkiTensor | None:
    return offset if isinstance(offset, NkiTensor) else None


def addresses_of(tensors: Sequence[NkiTensor]) -> list[NkiTensor]:
    """The tensors on chip that hold dynamic offsets of ``tensors``: an instruction reads them, too."""
    return [t.address for t in tensors if t.address is not None]


def scalar_value(offset: NkiTensor | VirtualRegister) -> int:
    """Integer in a register or in a one-element tensor."""
    if isinstance(offset, NkiTensor):
        if offset.size != 1:
            fail("ap", f"scalar_offset {offset!r}", "it has exactly one element", _AP_DOC)
        return int(offset.read().reshape(-1)[0])
    return int(offset)


def wrap_hbm(array: np.ndarray, dtype: str, name: str, region: MemoryRegion) -> NkiTensor:
    """A caller's array as an HBM tensor; a contiguous array is shared, so that the kernel's writes reach the caller."""
    data = np.ascontiguousarray(array)
    if data.dtype != dtypes.STORAGE[dtype]:
        data = data.view(dtypes.STORAGE[dtype])
    raw = data.reshape(-1).view(np.uint8).reshape(1, -1)
    return NkiTensor(Storage(region, raw, data.itemsize, name), data, dtype)


def new_storage(shape: tuple[int, ...], dtype: str, region: MemoryRegion, name: str) -> NkiTensor:
    """A fresh tensor that holds the sentinel of its type; capacity is not accounted here."""
    data = np.full(shape, dtypes.sentinel(dtype), dtype=dtypes.STORAGE[dtype])
    rows = shape[0] if region in ON_CHIP else 1
    raw = data.reshape(-1).view(np.uint8).reshape(rows, -1)
    storage = Storage(region, raw, data.itemsize, name)
    started = Accumulation(shape, data.itemsize, 0, raw.strides[0]) if region is MemoryRegion.psum else None
    return NkiTensor(storage, data, dtype, accumulation=started)


def physical_storage(region: MemoryRegion, row_bytes: int) -> Storage:
    """All of SBUF or PSUM of one core, for tensors with an explicit ``address``; every float in it reads as NaN."""
    raw = np.full((costs.PARTITIONS, row_bytes), 0xFF, dtype=np.uint8)
    return Storage(region, raw, 2, f"physical_{region.name}")


def place(storage: Storage, shape: tuple[int, ...], dtype: str, partition: int, free_bytes: int) -> NkiTensor:
    """A tensor at a physical address; it shares bytes with whatever else is placed there."""
    size = dtypes.itemsize(dtype)
    strides = [size] * len(shape)
    for axis in range(len(shape) - 2, 0, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    pitch = storage.raw.strides[0]
    strides[0] = pitch
    where = partition * pitch + free_bytes
    array = np.ndarray(shape, dtypes.STORAGE[dtype], buffer=storage.raw, offset=where, strides=tuple(strides))
    started = Accumulation(shape, size, where, pitch) if storage.region is MemoryRegion.psum else None
    return NkiTensor(storage, array, dtype, accumulation=started)
