# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""NKI 0.3.0 kernels on NumPy: functional, strict, and with a modelled engine timeline.

``emulate(kernel, *arrays)`` runs a kernel and reports on it; ``install()`` lets a file that says ``import nki`` run
unmodified on a machine without the Neuron SDK. See README.md beside this file.
"""

from __future__ import annotations

import importlib.util
import sys
import types

from . import dtypes, enums, isa, language
from .errors import NkiValidationError, NkiWarning
from .jit import EmulationResult, Kernel, emulate, jit, simulate
from .lint import Finding, lint_kernel
from .memory import NkiTensor
from .report import Report

__all__ = [
    "EmulationResult",
    "Finding",
    "Kernel",
    "NkiTensor",
    "NkiValidationError",
    "NkiWarning",
    "Report",
    "emulate",
    "install",
    "isa",
    "jit",
    "language",
    "lint_kernel",
    "simulate",
]


class _TensorAnnotation:
    """``nt.tensor[128, 512]`` in a kernel signature: documentation only."""

    def __getitem__(self, shape: object) -> object:
        return NkiTensor


def install(*, force: bool = False) -> bool:
    """Register this package as ``nki`` where the real one is absent.

    Args:
        force: replace an installed ``nki``.

    Returns:
        Whether ``import nki`` now gives the emulator.
    """
    present = sys.modules.get("nki")
    if present is not None and getattr(present, "__emulated__", False):
        return True
    if not force and (present is not None or importlib.util.find_spec("nki") is not None):
        return False
    nki = types.ModuleType("nki", __doc__)
    typing_module = types.ModuleType("nki.typing")
    typing_module.tensor = _TensorAnnotation()  # type: ignore[attr-defined]
    nki.__path__ = []
    # No page describes ``nki.dtype``; nki-library 2.29 names types by it and annotates with it.
    dtype_module = types.ModuleType("nki.dtype")
    for name in dtypes.STORAGE:
        setattr(dtype_module, name, name)
    members = {
        "jit": jit,
        "simulate": simulate,
        "language": language,
        "isa": isa,
        "typing": typing_module,
        "dtype": dtype_module,
    }
    for name, value in (*members.items(), ("__emulated__", True), ("__version__", "0.3.0")):
        setattr(nki, name, value)
    sys.modules["nki"] = nki
    sys.modules["nki.language"] = language
    sys.modules["nki.isa"] = isa
    sys.modules["nki.isa.constants"] = enums
    sys.modules["nki.typing"] = typing_module
    sys.modules["nki.dtype"] = dtype_module
    return True
