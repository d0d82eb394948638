# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Launching kernels: ``jit``, ``simulate`` and the typed entry :func:`emulate`."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dtypes
from .context import Core, EmulatorOptions, Exchange, Shared, activate, active
from .enums import MemoryRegion
from .errors import NkiValidationError, NkiWarning, fail
from .lint import check_kernel
from .memory import NkiTensor, wrap_hbm
from .report import Report

LNC_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"
"""The runtime's variable for the physical cores of a logical one."""

_LNC = "nki/get-started/about/lnc.rst; about-neuron/arch/neuron-features/logical-neuroncore-config.rst"
_UPDATE = "nki/deep-dives/nki-0-3-0-update-guide.rst"


@dataclass(frozen=True)
class EmulationResult:
    """What a launch gave.

    Attributes:
        outputs: what the kernel returned, tensors as NumPy arrays (torch tensors if any input was one).
        report: modelled time, memory peaks and traffic.
    """

    outputs: Any
    report: Report


def emulate(
    kernel: Callable[..., Any],
    *args: Any,
    grid: int | Sequence[int] | None = None,
    strict: bool = True,
    capacity: bool = True,
    timed: bool = True,
    lint: bool = False,
    lnc: int | None = None,
    **kwargs: Any,
) -> EmulationResult:
    """Run a kernel once and report on it.

    Args:
        kernel: a plain function, or one decorated by ``nki.jit`` (with or without a grid).
        args, kwargs: arguments of the kernel; NumPy arrays and CPU torch tensors become HBM tensors that share their
            memory, so that a kernel that writes an input writes the caller's array.
        grid: launch grid; ``2`` is one logical core of two physical cores (LNC=2).
        strict: check the documented constraints.
        capacity: raise when SBUF or PSUM overflows.
        timed: build the modelled timeline.
        lint: reject Python that the NKI compiler does not take.
        lnc: cores that the launch is configured for, 1 or 2; the grid must be as large. By default what
            NEURON_LOGICAL_NC_CONFIG says, and any grid of 1 or 2 where that is not set.

    Raises:
        NkiValidationError: a constraint is violated.

    Warns:
        NkiWarning: the kernel relies on something that nothing promises.
    """
    function, bound_grid = (kernel.function, kernel.grid) if isinstance(kernel, Kernel) else (kernel, ())
    shape = bound_grid if grid is None else _grid(grid)
    options = EmulatorOptions(strict=strict, capacity=capacity, timed=timed, lint=lint, lnc=lnc)
    return _launch(function, shape, options, args, kwargs)


class Kernel:
    """A function decorated by :func:`jit`; index it with a grid, call it with arrays.

    Inside another kernel it is an ordinary function call.
    """

    def __init__(
        self, function: Callable[..., Any], grid: tuple[int, ...] = (), options: EmulatorOptions | None = None
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.grid = grid
        self.options = options or EmulatorOptions()

    def __getitem__(self, grid: int | Sequence[int]) -> Kernel:
        return Kernel(self.function, _grid(grid), self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if active() is not None:
            return self.function(*args, **kwargs)
        return _launch(self.function, self.grid, self.options, args, kwargs).outputs


def jit(func: Callable[..., Any] | None = None, mode: str = "auto", **kwargs: Any) -> Any:
    """Decorate a kernel. ``mode`` is ignored, as in NKI 0.3.0.

    Raises:
        NkiValidationError: ``platform_target`` is given, which NKI 0.3.0 refuses.
    """
    if "platform_target" in kwargs:
        fail("nki.jit", "platform_target=", "set NEURON_PLATFORM_TARGET_OVERRIDE instead", f"{_UPDATE}, nki.jit")
    if func is None:
        return functools.partial(jit, mode=mode, **kwargs)
    return func if isinstance(func, Kernel) else Kernel(func)


def simulate(kernel: Any) -> Kernel:
    """A callable that runs ``kernel`` on NumPy arrays; here the same as the kernel itself."""
    return kernel if isinstance(kernel, Kernel) else Kernel(kernel)


def _grid(grid: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(n) for n in grid) if isinstance(grid, (tuple, list)) else (int(grid),)  # type: ignore[arg-type]


def _launch(
    function: Callable[..., Any],
    grid: tuple[int, ...],
    options: EmulatorOptions,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> EmulationResult:
    if options.lint:
        check_kernel(function)
    programs = int(np.prod(grid)) if grid else 1
    if options.strict:
        _check_grid(grid, programs, options.lnc)
    shared = Shared(grid, Exchange(programs))
    wrapper = _Arguments()
    if options.strict:
        for value in (*args, *kwargs.values()):
            if isinstance(value, list):
                fail(
                    "launch",
                    f"argument {value!r}",
                    "a kernel takes tuples, not lists",
                    f"{_UPDATE}, List Kernel Arguments",
                )
    inputs = [wrapper.to_device(f"arg{i}", a) for i, a in enumerate(args)]
    named = {k: wrapper.to_device(k, v) for k, v in kwargs.items()}
    cores = [Core(options, shared, p) for p in range(programs)]
    results: list[Any] = [None] * programs
    errors: list[BaseException] = []

    def run(program: int) -> None:
        shared.exchange.start(program)
        failed = True
        activate(cores[program])
        try:
            if not shared.exchange.failed:
                results[program] = function(*inputs, **named)
                failed = False
        except BaseException as error:
            errors.append(error)
        finally:
            activate(None)
            shared.exchange.finish(program, failed=failed)

    if programs == 1:
        run(0)
    else:
        threads = [threading.Thread(target=run, args=(p,), name=f"nki-program-{p}") for p in range(programs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    outputs = wrapper.to_host(results[0], options.strict)
    wrapper.write_back()
    for warning in shared.warnings:
        warnings.warn(warning, NkiWarning, stacklevel=3)
    return EmulationResult(outputs, Report.of(getattr(function, "__name__", "kernel"), cores))


def _check_grid(grid: tuple[int, ...], programs: int, lnc: int | None) -> None:
    configured = os.environ.get(LNC_VARIABLE) if lnc is None else str(lnc)
    if configured not in (None, "1", "2"):
        fail("launch", f"lnc={configured} is configured", "1 or 2 physical cores make a logical one", _LNC)
    if configured is None and programs not in (1, 2):
        fail("launch", f"grid {list(grid)} has {programs} programs", "1, or 2 with LNC=2", _LNC)
    if configured is not None and programs != int(configured):
        fail(
            "launch",
            f"grid {list(grid)} has {programs} program(s), and LNC={configured} is configured",
            f"launch kernel[{configured}](...), or configure {LNC_VARIABLE}={programs}",
            _LNC,
        )


class _Arguments:
    """Conversion of arguments to HBM tensors and of results to arrays of the caller's kind."""

    def __init__(self) -> None:
        self.torch = False
        self._copies: list[tuple[np.ndarray, NkiTensor]] = []

    def to_device(self, name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self._wrap(name, value, dtypes.canonical(value.dtype))
        if type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach"):
            self.torch = True
            import torch

            kind = dtypes.canonical(value.dtype)
            data = value.detach()
            if value.dtype == torch.bfloat16 or "float8" in str(value.dtype):
                bits = torch.int16 if value.element_size() == 2 else torch.uint8
                return self._wrap(name, data.view(bits).numpy().view(dtypes.STORAGE[kind]), kind)
            return self._wrap(name, data.numpy(), kind)
        if isinstance(value, tuple):
            return tuple(self.to_device(f"{name}[{i}]", v) for i, v in enumerate(value))
        if isinstance(value, list):
            return [self.to_device(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return value

    def _wrap(self, name: str, array: np.ndarray, kind: str) -> NkiTensor:
        tensor = wrap_hbm(array, kind, name, MemoryRegion.shared_hbm)
        if not np.may_share_memory(tensor.array, array):
            self._copies.append((array, tensor))
        return tensor

    def write_back(self) -> None:
        """Copy back inputs that were not contiguous, in case the kernel wrote to them."""
        for array, tensor in self._copies:
            if array.flags.writeable:
                array[...] = tensor.array

    def to_host(self, value: Any, strict: bool) -> Any:
        if isinstance(value, NkiTensor):
            if strict and value.buffer is not MemoryRegion.shared_hbm:
                raise NkiValidationError(
                    f"return: {value!r}; a kernel returns tensors in nl.shared_hbm ({_UPDATE}, Output Tensors)"
                )
            array = value.array.copy()
            return _to_torch(array, value.dtype) if self.torch else array
        if isinstance(value, (tuple, list)):
            return type(value)(self.to_host(v, strict) for v in value)
        if isinstance(value, dict):
            return {k: self.to_host(v, strict) for k, v in value.items()}
        return value


def _to_torch(array: np.ndarray, kind: str) -> Any:
    import torch

    if kind in ("bfloat16", *dtypes.FP8):
        names = {"float8_e4m3": "float8_e4m3fn"}
        bits = array.view(np.int16 if array.itemsize == 2 else np.uint8)
        return torch.from_numpy(bits).view(getattr(torch, names.get(kind, kind)))
    return torch.from_numpy(array)
