#!/usr/bin/env python3
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Modelled times of nki-library's kernels beside the device times that the library's own tests publish.

The library is not part of this repository: fetch it at the tag of the data file and give the path of the checkout.

    git clone --branch 2.29 https://github.com/aws-neuron/nki-library
    bench_library_kernels.py nki-library
    bench_library_kernels.py nki-library --mlp-of-27b   # the MLP of a rank of 27B at TP=4: error and time beside bounds

A row of ``nki_library_times.json`` is a label and microseconds. The label names the family, the cores (``lnc2``) and
the shape, in letters: B batch, S tokens, H hidden size, I intermediate (or projected) size. The device time of a launch
by itself is modelled as the time of the kernel and that of the launch (`nki_emulator.costs`). The launch is what such
rows can fit, so the error is also given with the launch fitted to the rows of the other families. A row that fails or
exceeds its time limit counts as an error of 100%.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import ml_dtypes
import numpy as np

import nki_emulator
from nki_emulator import costs

TIMES = Path(__file__).with_name("nki_library_times.json")
FP8 = ml_dtypes.float8_e4m3
FAILED = 1.0
"""Error of a row without a modelled time."""

LAUNCH_STEP_US = 1.0
"""Resolution of the fitted launch times."""


@dataclass(frozen=True)
class Case:
    """One published row.

    Attributes:
        label: as in the data file, with the family.
        us: published device time.
        options: what the label leaves out, e.g. ``d_head``.
    """

    label: str
    us: float
    options: dict[str, Any]

    @property
    def family(self) -> str:
        return self.label.split(":")[0]

    @property
    def words(self) -> list[str]:
        return self.label.split(":")[1].split()

    @property
    def cores(self) -> int:
        return self.number("lnc")

    def number(self, name: str) -> int:
        """The number after ``name``, e.g. 448 in ``I448``."""
        return int(next(word[len(name) :] for word in self.words if re.fullmatch(rf"{name}\d+", word)))

    def flag(self, name: str) -> bool:
        """Whether the number after ``name`` is not 0."""
        return self.number(name) != 0


@dataclass(frozen=True)
class Result:
    """A row with its modelled time.

    Attributes:
        case: the row.
        kernel_us: modelled time of the kernel, None if it failed.
        failure: why.
        seconds: of emulation.
    """

    case: Case
    kernel_us: float | None
    failure: str
    seconds: float

    def ratio(self, launch_us: dict[int, float]) -> float | None:
        """Modelled over published device time, with the launch times given by number of cores."""
        if self.kernel_us is None:
            return None
        return (self.kernel_us + launch_us[self.case.cores]) / self.case.us

    def error(self, launch_us: dict[int, float]) -> float:
        """Absolute relative error; 1 without a modelled time."""
        ratio = self.ratio(launch_us)
        return FAILED if ratio is None else abs(ratio - 1)


class Library:
    """Kernels of a checkout of nki-library and inputs for them; the same case gives the same numbers."""

    def __init__(self, checkout: Path) -> None:
        sources = checkout / "src" / "nkilib_src"
        if not (sources / "nkilib").is_dir():
            raise SystemExit(f"{checkout}: no checkout of nki-library, for src/nkilib_src/nkilib is missing")
        sys.path.insert(0, str(sources))
        nki_emulator.install(force=True)
        logging.disable(logging.CRITICAL)  # the library logs every tiling decision
        warnings.simplefilter("ignore", nki_emulator.NkiWarning)
        from nkilib.core.utils import common_types

        self.types = common_types
        self.rng = np.random.default_rng(0)
        self.builders: dict[str, Callable[[Case], Launch]] = {
            "mlp_tkg": self.mlp_token,
            "mlp_tkg8": self.mlp_token,
            "mlp_cte": self.mlp_context,
            "att_cte": self.attention,
            "qkv_tkg": self.qkv,
            "rms_quant": self.rmsnorm_quant,
        }

    def normal(self, *shape: int, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    def norm(self, case: Case) -> Any:
        """The normalisation that the label names, e.g. ``RMS_NORM``."""
        return next(self.types.NormType[word] for word in case.words if word in self.types.NormType.__members__)

    def mlp(self, case: Case, dtype: Any = ml_dtypes.bfloat16) -> Launch:
        from nkilib.core.mlp.mlp import mlp

        B, S, H, I = (case.number(name) for name in "BSHI")  # noqa: E741, the letters of the label
        weights = (self.normal(H, I, dtype=dtype), self.normal(H, I, dtype=dtype), self.normal(I, H, dtype=dtype))
        options: dict[str, Any] = {}
        norm = self.norm(case)
        if norm is not self.types.NormType.NO_NORM:
            options |= {"normalization_weights_tensor": self.normal(1, H), "normalization_type": norm}
        return Launch(mlp, (self.normal(B, S, H), *weights), options)

    def mlp_token(self, case: Case) -> Launch:
        H, I = case.number("H"), case.number("I")  # noqa: E741
        launch = self.mlp(case, FP8 if case.family == "mlp_tkg8" else ml_dtypes.bfloat16)
        if case.family == "mlp_tkg8":
            scales = {f"{name}_w_scale": np.ones((128, I), np.float32) for name in ("gate", "up")}
            launch.options.update(scales, down_w_scale=np.ones((128, H), np.float32))
            launch.options["quantization_type"] = self.types.QuantizationType.ROW
            return launch
        gate_up, down = (digit == "1" for digit in next(w for w in case.words if w.startswith("ct"))[2:])
        launch.options.update(
            use_tkg_gate_up_proj_column_tiling=gate_up,
            use_tkg_down_proj_column_tiling=down,
            use_tkg_down_proj_optimized_layout=bool(case.options.get("optimized_layout", False)),
        )
        if case.flag("fa"):
            hidden = launch.arguments[0].shape
            launch.options.update(fused_add_tensor=self.normal(*hidden), store_fused_add_result=True)
        return launch

    def mlp_context(self, case: Case) -> Launch:
        launch = self.mlp(case)
        if case.flag("fa"):
            launch.options["fused_add_tensor"] = self.normal(*launch.arguments[0].shape)
        if case.flag("skipgate"):
            launch.options["skip_gate_proj"] = True
        return launch

    def attention(self, case: Case) -> Launch:
        from nkilib.core.attention.attention_cte import attention_cte

        batch, keys, queries, dim = (case.number(name) for name in ("bs", "kv", "q", "d"))
        kind = np.dtype(ml_dtypes.bfloat16) if case.words[-1] == "bfloat16" else np.dtype(case.words[-1])
        q = self.normal(*((batch, queries, dim) if case.flag("tq") else (batch, dim, queries)), dtype=kind)
        k, v = self.normal(batch, dim, keys, dtype=kind), self.normal(batch, keys, dim, dtype=kind)
        options: dict[str, Any] = {"tp_q": case.flag("tq"), "tp_k": False, "tp_out": case.flag("to")}
        if case.flag("sink"):
            options["sink"] = self.normal(batch, 1, dtype=kind)
        if case.flag("sw"):
            options["sliding_window"] = case.number("sw")
        return Launch(attention_cte, (q, k, v, 1.0, case.flag("causal")), options)

    def qkv(self, case: Case) -> Launch:
        from nkilib.core.qkv.qkv_tkg import qkv_tkg

        B, S, H, I = (case.number(name) for name in "BSHI")  # noqa: E741
        options: dict[str, Any] = {
            "d_head": case.options.get("d_head", 128 if I % 128 == 0 else I),
            "norm_type": self.norm(case),
            "output_layout": self.types.QKVOutputLayout.BSD,
        }
        if options["norm_type"] is not self.types.NormType.NO_NORM:
            options["norm_w"] = self.normal(1, H)
        if case.flag("fa"):
            options |= {"fused_add": True, "mlp_prev": self.normal(B, S, H), "attn_prev": self.normal(B, S, H)}
        if case.options.get("bias", False):
            options["qkv_bias"] = self.normal(1, I)
        return Launch(qkv_tkg, (self.normal(B, S, H), self.normal(H, I)), options)

    def rmsnorm_quant(self, case: Case) -> Launch:
        from nkilib.core.rmsnorm.rmsnorm_quant import RmsNormQuantKernelArgs, rmsnorm_quant_kernel

        norms, H = self.types.NormType, case.number("H")
        settings = RmsNormQuantKernelArgs(
            lower_bound=float(case.words[-1].removeprefix("lb")),
            norm_type=norms.NO_NORM if case.flag("quant_only") else norms.RMS_NORM,
        )
        return Launch(rmsnorm_quant_kernel, (self.normal(1, case.number("S"), H), self.normal(1, H), settings), {})


# --- The MLP of a rank of 27B ----------------------------------------------------------------------------------------
HIDDEN, COLUMNS = 5120, 17408 // 4
CORES = 2
MLPS = [(1, False), (8, False), (1, True), (8, True), (128, False), (1024, False)]
"""Tokens, of which the library takes up to 96 for decoding, and whether the weights are in fp8, with a scale a row."""

TENSOR_TILE = 128 * 128
"""Multiply-adds that one column of the Tensor engine makes a cycle."""


@dataclass(frozen=True)
class MlpRow:
    """One size of the MLP.

    Attributes:
        modelled_us: of the kernel, without its launch.
        hbm_bound_us: weights, scales, input and output, each once, over both cores.
        tensor_bound_us: the products in tiles of 128 x 128, without transposes, over both cores.
        error: largest error against a product in float64 of the same numbers, of the largest output.
    """

    tokens: int
    weights: str
    modelled_us: float
    hbm_bound_us: float
    tensor_bound_us: float
    error: float

    @property
    def ratio(self) -> float:
        """Modelled time over the larger bound."""
        return self.modelled_us / max(self.hbm_bound_us, self.tensor_bound_us)


def measure_mlp(tokens: int, fp8: bool) -> MlpRow:
    """The library's MLP for `tokens` tokens with random weights, in the emulator; the library must be importable."""
    from nkilib.core.mlp.mlp import mlp
    from nkilib.core.utils.common_types import QuantizationType

    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, 1, HIDDEN) if tokens <= 96 else (1, tokens, HIDDEN)).astype(ml_dtypes.bfloat16)
    shapes = ((HIDDEN, COLUMNS), (HIDDEN, COLUMNS), (COLUMNS, HIDDEN))
    values = [rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[0], dtype=np.float32) for shape in shapes]
    options: dict[str, Any] = {}
    nbytes = 2 * x.nbytes
    if fp8:
        scales = [np.abs(value).max(axis=0) / np.float32(240) for value in values]
        weights = [(value / scale).astype(FP8) for value, scale in zip(values, scales, strict=True)]
        exact = [weight.astype(np.float64) * scale for weight, scale in zip(weights, scales, strict=True)]
        names = ("gate_w_scale", "up_w_scale", "down_w_scale")
        options = {name: np.tile(scale, (128, 1)) for name, scale in zip(names, scales, strict=True)}
        options["quantization_type"] = QuantizationType.ROW
        nbytes += sum(scale.nbytes for scale in scales)
    else:
        weights = [value.astype(ml_dtypes.bfloat16) for value in values]
        exact = [weight.astype(np.float64) for weight in weights]
    nbytes += sum(weight.nbytes for weight in weights)
    with contextlib.redirect_stdout(io.StringIO()):
        result = nki_emulator.emulate(mlp, x, *weights, grid=CORES, strict=False, **options)
    gate, up = x.astype(np.float64) @ exact[0], x.astype(np.float64) @ exact[1]
    truth = gate / (1 + np.exp(-gate)) * up @ exact[2]
    columns = 3 * HIDDEN * COLUMNS // TENSOR_TILE * tokens
    return MlpRow(
        tokens=tokens,
        weights="fp8 rows" if fp8 else "bfloat16",
        modelled_us=result.report.makespan_ns / 1e3,
        hbm_bound_us=nbytes / (CORES * costs.HBM_BYTES_PER_NS) / 1e3,
        tensor_bound_us=columns / (CORES * costs.TENSOR_GHZ) / 1e3,
        error=float(np.abs(result.outputs[0].astype(np.float64) - truth).max() / np.abs(truth).max()),
    )


def mlp_text(rows: Iterable[MlpRow]) -> str:
    """A table of MLPs."""
    lines = [
        f"{'tokens':>6} {'weights':>8} {'modelled us':>12} {'HBM us':>8} {'Tensor us':>10} {'ratio':>6} {'error':>8}"
    ]
    lines += [
        f"{r.tokens:6d} {r.weights:>8} {r.modelled_us:12.1f} {r.hbm_bound_us:8.1f} {r.tensor_bound_us:10.1f} "
        f"{r.ratio:6.2f} {r.error:8.1e}"
        for r in rows
    ]
    return "\n".join([*lines, f"hidden size {HIDDEN}, {COLUMNS} columns, {CORES} cores; times are modelled, no launch"])


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments."""

    kernel: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Modelled and published times of nki-library's kernels.")
    parser.add_argument("checkout", type=Path, help="checkout of github:aws-neuron/nki-library")
    parser.add_argument("--times", type=Path, default=TIMES, help=f"published times (default: {TIMES.name})")
    parser.add_argument("--family", action="append", help="only this family; may be repeated")
    parser.add_argument("--limit", type=int, default=300, metavar="S", help="seconds per row (default: 300)")
    parser.add_argument("--mlp-of-27b", action="store_true", help="the MLP of a rank of 27B instead of published rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    library = Library(args.checkout)
    if args.mlp_of_27b:
        rows = [measure_mlp(tokens, fp8) for tokens, fp8 in MLPS]
        print(json.dumps([asdict(row) for row in rows]) if args.json else mlp_text(rows))
        return
    cases = [case for case in read_cases(args.times) if not args.family or case.family in args.family]
    results = []
    for case in cases:
        results.append(measure(library, case, args.limit))
        if not args.json:
            print(row_text(results[-1]), flush=True)
    print(json.dumps(as_json(results)) if args.json else summary_text(results))


def read_cases(path: Path) -> list[Case]:
    """Rows of a data file: ``us`` maps labels to microseconds, ``options`` labels to what they leave out."""
    data = json.loads(path.read_text())
    return [Case(label, us, data.get("options", {}).get(label, {})) for label, us in data["us"].items()]


def measure(library: Library, case: Case, limit: int) -> Result:
    """Run one row in the emulator, in a process of its own that ends after ``limit`` seconds."""
    start = time.monotonic()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(library, case, sender))
    process.start()
    sender.close()
    kernel_us: float | None = None
    failure = f"more than {limit} s"
    if receiver.poll(limit):
        try:
            kernel_us, failure = receiver.recv()
        except EOFError:
            failure = "the process ended without a result"
    process.kill()
    process.join()
    return Result(case, kernel_us, failure, time.monotonic() - start)


def _run(library: Library, case: Case, sender: Connection) -> None:
    """Send the modelled microseconds of a row, or None and why it failed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            launch = library.builders[case.family](case)
            grid = case.cores if case.cores > 1 else None
            result = nki_emulator.emulate(launch.kernel, *launch.arguments, grid=grid, strict=False, **launch.options)
        sender.send((result.report.makespan_ns / 1e3, ""))
    except Exception as error:  # any failure is a row of the table
        sender.send((None, f"{type(error).__name__}: {error}"))


# --- Errors ----------------------------------------------------------------------------------------------------------
def modelled_launch_us() -> dict[int, float]:
    """Launch times of the emulator by number of cores."""
    return {cores: costs.launch_ns(cores) / 1e3 for cores in (1, 2)}


def fit_launch_us(results: Iterable[Result]) -> dict[int, float]:
    """Launch times that leave the least mean square of log(modelled / published), by number of cores."""
    ran = [r for r in results if r.kernel_us is not None]
    fitted = modelled_launch_us()
    candidates = np.arange(0.0, 100.0, LAUNCH_STEP_US)
    for cores in fitted:
        kernel = np.array([r.kernel_us for r in ran if r.case.cores == cores], dtype=np.float64)
        published = np.array([r.case.us for r in ran if r.case.cores == cores])
        if kernel.size:
            squares = np.log((kernel + candidates[:, None]) / published) ** 2
            fitted[cores] = float(candidates[int(squares.mean(axis=1).argmin())])
    return fitted


def mean_error(results: Sequence[Result], launch_us: dict[int, float]) -> float:
    """Mean absolute relative error."""
    return float(np.mean([r.error(launch_us) for r in results]))


def geometric_mean(results: Sequence[Result], launch_us: dict[int, float]) -> float:
    """Of modelled over published time, over the rows that ran."""
    ratios = [ratio for r in results if (ratio := r.ratio(launch_us)) is not None]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else float("nan")


@dataclass(frozen=True)
class Summary:
    """Errors over some rows.

    Attributes:
        rows, failed: how many there are, and how many of them have no modelled time.
        error: mean absolute relative error with the launch times of `nki_emulator.costs`.
        ratio: geometric mean of modelled over published time.
        left_out_error, left_out_ratio: the same with the launch fitted to the other families, per row.
    """

    rows: int
    failed: int
    error: float
    ratio: float
    left_out_error: float
    left_out_ratio: float


def summarise(results: Sequence[Result]) -> dict[str, Summary]:
    """Errors by family, and over all rows as ``all``."""
    families: dict[str, list[Result]] = {}
    for r in results:
        families.setdefault(r.case.family, []).append(r)
    left_out = {family: fit_launch_us(r for r in results if r.case.family != family) for family in families}
    summaries = {}
    for name, rows in (*families.items(), ("all", list(results))):
        errors = [r.error(left_out[r.case.family]) for r in rows]
        ratios = [ratio for r in rows if (ratio := r.ratio(left_out[r.case.family])) is not None]
        summaries[name] = Summary(
            rows=len(rows),
            failed=sum(r.kernel_us is None for r in rows),
            error=mean_error(rows, modelled_launch_us()),
            ratio=geometric_mean(rows, modelled_launch_us()),
            left_out_error=float(np.mean(errors)),
            left_out_ratio=float(np.exp(np.mean(np.log(ratios)))) if ratios else float("nan"),
        )
    return summaries


# --- Presentation ----------------------------------------------------------------------------------------------------
def row_text(result: Result) -> str:
    case = result.case
    if result.kernel_us is None:
        return f"{case.label:78} {case.us:9.2f}  {result.failure[:200]}"
    launch = modelled_launch_us()[case.cores]
    return (
        f"{case.label:78} {case.us:9.2f} published {result.kernel_us + launch:9.2f} modelled "
        f"({result.kernel_us:.2f} kernel + {launch:.2f} launch) ratio {result.ratio(modelled_launch_us()):.2f}"
    )


def summary_text(results: Sequence[Result]) -> str:
    fitted = fit_launch_us(results)
    lines = [
        f"{'family':12} {'rows':>5} {'failed':>7} {'error':>7} {'ratio':>6}   the same without the family in the fit",
        *(
            f"{name:12} {s.rows:5d} {s.failed:7d} {s.error:7.1%} {s.ratio:6.3f} {s.left_out_error:9.1%} "
            f"{s.left_out_ratio:6.3f}"
            for name, s in summarise(results).items()
        ),
        "error: mean absolute relative error; ratio: geometric mean of modelled over published time",
        "launch in us, by number of cores: "
        + ", ".join(f"{n}: {us:.0f} (fitted to these rows: {fitted[n]:.0f})" for n, us in modelled_launch_us().items()),
    ]
    return "\n".join(lines)


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    launch = modelled_launch_us()
    return {
        "launch_us": launch,
        "fitted_launch_us": fit_launch_us(results),
        "rows": [
            {
                "label": r.case.label,
                "published_us": r.case.us,
                "kernel_us": r.kernel_us,
                "launch_us": launch[r.case.cores],
                "ratio": r.ratio(launch),
                "failure": r.failure,
            }
            for r in results
        ],
        "families": {name: asdict(summary) for name, summary in summarise(results).items()},
    }


if __name__ == "__main__":
    main()
