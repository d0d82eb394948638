#!/usr/bin/env python3
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of `qwen35 convert`, or of `qwen35 quantize`, on a synthetic checkpoint: 27B's layers and
proportions, fewer of them.

The command runs in a process of its own, on Linux, and is measured over what the process held before it:

- anonymous memory (RssAnon of /proc/self/status, read every 2 ms): what the command allocates;
- resident memory (VmHWM, kept by the kernel): also pages of the source file that is mapped, which the kernel takes back
  when it needs them.

The bound of both is the largest source shard plus one rank's tensors; for `quantize`, plus the largest file that is
written. Needs disk for the checkpoint twice.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from safetensors import safe_open

from qwen35.cli import main as qwen35_command
from qwen35.configuration_qwen35 import QWEN35_PRESETS, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.weights.checkpoint import INDEX_FILE, CheckpointReader, TensorSpec, lay_out
from qwen35.weights.fp8 import quantise_per_channel
from qwen35.weights.text_rules import conversion_plan

# A quarter of the vocabulary goes with the fewer layers.
VOCAB_SIZE = 248320 // 4
SHARD_BYTES = 1 << 30
SPLIT_ALONG = {"embed_tokens.weight": 1, "layers.0.mlp.down_proj.weight": 1, "layers.0.mlp.up_proj.weight": 0}
"""Tensors that are split as they are, and the axis: compared with the source after the conversion."""


@dataclass(frozen=True)
class Figures:
    """Sizes in bytes; memory is the peak over what the process held before."""

    source: int
    largest_shard: int
    written: int
    """The largest file that was written: of a rank, or of the checkpoint in fp8."""
    anonymous: int
    resident: int
    seconds: float
    cpu_seconds: float
    """Of all threads: what is left of the time where others use the machine."""

    @property
    def bound(self) -> int:
        return self.largest_shard + self.written


def write_checkpoint(directory: Path, layers: int) -> None:
    """A sharded bfloat16 checkpoint; each tensor repeats bit patterns, in runs whose length divides no row's."""
    fields = QWEN35_PRESETS["27B"] | {"num_hidden_layers": layers, "vocab_size": VOCAB_SIZE}
    (directory / "config.json").write_text(json.dumps(fields))
    shards: list[list[str]] = [[]]
    shapes = {name: shape for rule in conversion_plan(_config(directory)) for name, shape in rule.sources.items()}
    for name in shapes:
        if shards[-1] and sum(2 * math.prod(shapes[held]) for held in [*shards[-1], name]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    longest = max(map(math.prod, shapes.values()))
    # Up to 2 in bfloat16: infinities and NaN cannot be quantised.
    content = torch.arange(16381, dtype=torch.int16).repeat(longest // 16381 + 1).numpy()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        specs = {_published(name): TensorSpec(shapes[name], torch.bfloat16) for name in names}
        with (directory / file).open("wb") as shard:
            shard.write(lay_out(specs).header)
            for name in names:  # in the order of the layout, since all have one dtype
                shard.write(content[: math.prod(shapes[name])])
        weight_map |= dict.fromkeys(specs, file)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def _config(directory: Path) -> Qwen35InferenceConfig:
    return Qwen35InferenceConfig.from_pretrained(directory, Qwen35NeuronConfig())


def _published(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.language_model.{name}"


def measure(source: Path, output: Path, tp_degree: int) -> Figures:
    """Convert in a fresh process, and compare some of what it wrote with the source."""
    peaks = _in_fresh_process("convert", str(output), "--model", str(source), "--tp", str(tp_degree))
    files = [output / "weights" / f"tp{rank}_sharded_checkpoint.safetensors" for rank in range(tp_degree)]
    with CheckpointReader(source) as reader:
        for name, dim in SPLIT_ALONG.items():
            blocks = reader[_published(name)].view(torch.int16).chunk(tp_degree, dim)
            for file, block in zip(files, blocks, strict=True):
                with safe_open(file, framework="pt") as written:
                    if not torch.equal(written.get_tensor(name).view(torch.int16), block):
                        raise AssertionError(f"{name} of {file.name} is not its block of the source")
    return _figures(source, files, *peaks)


def measure_quantize(source: Path, output: Path) -> Figures:
    """Quantise in a fresh process, and compare a matrix with its rounding."""
    peaks = _in_fresh_process("quantize", str(output), "--model", str(source))
    with CheckpointReader(source) as reader, CheckpointReader(output) as written:
        name = _published("layers.0.mlp.down_proj.weight")
        weight, scale = quantise_per_channel(name, reader[name])
        if not torch.equal(written[name].float(), weight.float()) or not torch.equal(written[f"{name}_scale"], scale):
            raise AssertionError(f"{name} is not the rounding of the source")
    return _figures(source, list(output.glob("*.safetensors")), *peaks)


def _figures(source: Path, files: list[Path], *peaks: Any) -> Figures:
    shards = [file.stat().st_size for file in source.glob("*.safetensors")]
    return Figures(sum(shards), max(shards), max(file.stat().st_size for file in files), *peaks)


def _in_fresh_process(*arguments: str) -> tuple[int, int, float, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, *arguments).result()


def _run(*arguments: str) -> tuple[int, int, float, float]:
    """(peak of anonymous memory, peak of resident memory, seconds, CPU seconds), in this process."""
    before, peak, done = _status(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _status()["RssAnon"])

    sampler = threading.Thread(target=sample)
    sampler.start()
    start, cpu = time.perf_counter(), time.process_time()
    with redirect_stdout(sys.stderr):
        failed = qwen35_command(arguments)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    sampler.join()
    if failed:
        raise RuntimeError(f"qwen35 {arguments[0]} failed; its message is above")
    return peak - before["RssAnon"], _status()["VmHWM"] - before["VmRSS"], seconds, cpu


def _status() -> dict[str, int]:
    """The memory lines of /proc/self/status, in bytes."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[-1] == "kB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="0.77 GB each, beside 1.27 GB of vocabulary")
    parser.add_argument("--tp", type=int, default=4, help="tensor-parallel degree")
    parser.add_argument("--quantize", action="store_true", help="measure qwen35 quantize instead")
    parser.add_argument("--directory", type=Path, help="where to make, and remove, the files (default: the system's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        write_checkpoint(source, args.layers)
        output = Path(scratch, "output")
        figures = measure_quantize(source, output) if args.quantize else measure(source, output, args.tp)
    if args.json:
        print(json.dumps(asdict(figures) | {"bound": figures.bound}))
        return
    rows = {
        "source": figures.source,
        "largest source shard": figures.largest_shard,
        "largest file written": figures.written,
        "anonymous memory, peak": figures.anonymous,
        "resident memory, peak": figures.resident,
        "bound of both": figures.bound,
    }
    for name, nbytes in rows.items():
        print(f"{name:<24} {nbytes / 1e9:>7.3f} GB")
    print(f"{'time':<24} {figures.seconds:>7.1f} s   {figures.source / figures.seconds / 1e9:.2f} GB/s")
    print(f"{'CPU time':<24} {figures.cpu_seconds:>7.1f} s")


if __name__ == "__main__":
    main()
