# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Record what transformers >= 5 says of the decoder test cases, for machines where it is older.

python tools/record_decoder_reference.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parents[1] / "test"
sys.path.insert(0, str(TESTS))

from support.decoder_cases import CASES, REFERENCE_FILE, STEPS  # noqa: E402
from support.oracle import reference_greedy, transformers_model, vl_reference_greedy  # noqa: E402
from support.vl_cases import EXAMPLE, save_vl_checkpoint  # noqa: E402

SMALLEST_MARGIN = 1e-3
"""Ten times the tolerance of the comparison: a nearer tie between two tokens would prove nothing."""


def main() -> None:
    outputs = {}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for case in CASES:
            model = transformers_model(case.checkpoint(scratch))
            outputs[case.name] = reference_greedy(model, case.prompts(), STEPS)
        save_vl_checkpoint(scratch / "vision-language")
        model = transformers_model(scratch / "vision-language")
        rows = [vl_reference_greedy(model, row, STEPS) for row in EXAMPLE]
        outputs["vision-language"] = tuple(torch.stack(tensors) for tensors in zip(*rows, strict=True))
    tensors: dict[str, torch.Tensor] = {}
    for name, (tokens, logits) in outputs.items():
        best = logits.topk(2, dim=-1).values
        margin = float((best[..., 0] - best[..., 1]).min())
        print(f"{name}: {tokens.shape[0]} prompts, {STEPS} steps, smallest margin {margin:.4f}")
        if margin < SMALLEST_MARGIN:
            raise SystemExit(f"{name}: margin {margin} is below {SMALLEST_MARGIN}: choose another seed")
        tensors |= {f"{name}.tokens": tokens, f"{name}.logits": logits}
    unfinished = REFERENCE_FILE.with_suffix(".tmp")
    save_file(tensors, unfinished)
    unfinished.replace(REFERENCE_FILE)
    print(f"{REFERENCE_FILE.name}: {REFERENCE_FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
