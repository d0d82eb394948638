# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Where the kernels take `nki` from: the Neuron SDK where it is installed, else `nki_emulator`.

Kernel files say `from .nki_seam import nisa, nki, nl` and know nothing else about the machine they run on. The
`nki` of PyPI is an empty placeholder, which imports but has no `isa`: it counts as absent. `EMULATED` says which it is.
"""

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

__all__ = ["EMULATED", "nisa", "nki", "nl"]
