# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A file that imports nki runs on the emulator."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import nki_emulator


def test_a_file_that_imports_nki_runs_unmodified(tmp_path: Path) -> None:
    (tmp_path / "add.py").write_text(
        textwrap.dedent(
            """
            import nki
            import nki.dtype as dtypes
            import nki.isa as nisa
            import nki.language as nl
            import nki.typing as nt
            from nki.isa.constants import dge_mode, oob_mode

            @nki.jit
            def add(x: nt.tensor[128, 4], y):
                out = nl.ndarray(x.shape, dtype=dtypes.float32, buffer=nl.shared_hbm)
                a = nl.ndarray(x.shape, dtype=x.dtype)
                b = nl.ndarray(x.shape, dtype=x.dtype)
                nisa.dma_copy(dst=a, src=x, dge_mode=dge_mode.none, oob_mode=oob_mode.error)
                nisa.dma_copy(dst=b, src=y)
                nisa.tensor_tensor(dst=a, data1=a, data2=b, op=nl.add)
                nisa.dma_copy(dst=out, src=a)
                return out
            """
        )
    )
    program = (
        "import nki_emulator, numpy as np; assert nki_emulator.install(); assert nki_emulator.install();"
        "from add import add; x = np.ones((128, 4), np.float32); assert (add(x, x) == 2).all(); print('ran')"
    )
    source = Path(nki_emulator.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{source}:{tmp_path}"},
        check=False,
    )
    assert run.stdout.strip() == "ran", run.stderr
