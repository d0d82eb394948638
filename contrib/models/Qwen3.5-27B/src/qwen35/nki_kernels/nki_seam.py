# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Where the kernels take `nki` from: the Neuron SDK where it is installed, else `nki_emulator`.

Kernel files say `from .nki_seam import nisa, nki, nl` and know nothing else about the machine they run on. The
`nki` of PyPI is an empty placeholder, which imports but has no `isa`: it counts as absent. `EMULATED` says which it is.
"""

from typing import Any

try:
    import nki
    import nki.isa as nisa
    import nki.language as nl

    EMULATED = bool(getattr(nki, "__emulated__", False))
except ImportError:  # no SDK, or the placeholder, which has no nki.isa
    import nki_emulator as nki
    import nki_emulator.isa as nisa
    import nki_emulator.language as nl

    EMULATED = True


def provide_nki() -> None:
    """Let `import nki` of other packages give what this one has: without the SDK, the emulator."""
    if EMULATED:
        import nki_emulator

        nki_emulator.install(force=True)


def of_others(kernel: Any) -> Any:
    """A kernel that another package decorated, to launch; in the emulator it is not held to NKI's documents.

    nki-library 2.29 names `dge_mode` by integers, which NKI's update guide says are refused; yet its tests publish
    times of devices.
    """
    if not EMULATED:
        return kernel
    from nki_emulator.context import EmulatorOptions

    return type(kernel)(kernel.function, kernel.grid, EmulatorOptions(strict=False, timed=False))


__all__ = ["EMULATED", "nisa", "nki", "nl", "of_others", "provide_nki"]
