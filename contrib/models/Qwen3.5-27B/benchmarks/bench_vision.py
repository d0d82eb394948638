# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Speed of the vision encoder on this CPU, ours against transformers' with sdpa, on the same weights and threads.

The sizes are 27B's. The two sides run in turn, so that a busy machine slows both; the ratio is the median of the pairs.
On a machine shared with others, `--threads 1 --clock cpu` counts this process's seconds alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen3_5VisionConfig, Qwen3_5VisionModel

from qwen35.configuration_qwen35_vl import QWEN35_VISION_PRESETS, Qwen35VisionConfig
from qwen35.vision.encoder import NeuronQwen35VisionModel

SIZES_27B = QWEN35_VISION_PRESETS["27B"]
# (frames, rows, columns) of patches of each image or video
CASES = {
    "1,024 patches, 1 image": [[1, 32, 32]],
    "1,024 patches, 4 images": [[1, 16, 16]] * 4,
    "1,024 patches, 3 images and a video": [[1, 16, 20], [1, 16, 12], [4, 8, 8], [1, 16, 16]],
    "4,096 patches, 1 image": [[1, 64, 64]],
    "4,096 patches, 4 images": [[1, 32, 32]] * 4,
}


def random_reference(depth: int) -> Qwen3_5VisionModel:
    """A transformers encoder with activations of order one, as a trained one has."""
    config = Qwen3_5VisionConfig(**{**SIZES_27B, "depth": depth})
    model = Qwen3_5VisionModel._from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "pos_embed" not in name:
            parameter.data.normal_(0.0, parameter[0].numel() ** -0.5)
    return model


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(encode: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    encode()
    return clock() - start


@torch.inference_mode()
def compare(
    ours: NeuronQwen35VisionModel, theirs: Qwen3_5VisionModel, case: str, args: argparse.Namespace
) -> dict[str, Any]:
    clock = CLOCKS[args.clock]
    grid_thw = torch.tensor(CASES[case])
    pixels = torch.randn(int(grid_thw.prod(1).sum()), ours.config.patch_dim)
    sides = (lambda: ours(pixels, grid_thw), lambda: theirs(pixels, grid_thw).pooler_output)
    difference = (sides[0]().float() - sides[1]().float()).abs().max().item()  # warms both sides up
    runs = tqdm(range(args.repeats), desc=f"{ours.dtype}, {case}", leave=False)
    pairs = [[seconds(side, clock) for side in sides] for _ in runs]
    return {
        "dtype": str(ours.dtype).removeprefix("torch."),
        "case": case,
        "ours_s": statistics.median(mine for mine, _ in pairs),
        "transformers_s": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(other / mine for mine, other in pairs),
        "max_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=SIZES_27B["depth"], help="layers")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    rows = []
    line = "{:<9} {:<36} {:>9} {:>13} {:>7}  {}"
    if not args.json:
        print(line.format("dtype", "case", "ours", "transformers", "ratio", "largest difference"), flush=True)
    theirs = random_reference(args.depth)
    config = Qwen35VisionConfig.from_dict(theirs.config)
    for name in args.dtypes:
        dtype = getattr(torch, name)
        theirs = theirs.to(dtype)
        weights = {f"visual.{key}": tensor for key, tensor in theirs.state_dict().items()}
        ours = NeuronQwen35VisionModel.from_checkpoint(weights, config, dtype)
        for case in args.cases:
            row = compare(ours, theirs, case, args)
            rows.append(row)
            if not args.json:
                mine, other = f"{row['ours_s']:.2f} s", f"{row['transformers_s']:.2f} s"
                ratio, difference = f"{row['ratio']:.2f}x", f"{row['max_difference']:.1e}"
                print(line.format(row["dtype"], case, mine, other, ratio, difference), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
