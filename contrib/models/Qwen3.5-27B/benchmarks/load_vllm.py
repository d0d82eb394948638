# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of the mini under load: `vllm bench serve` over requests at a time, and over requests a second.

Workloads: random text; prompts of which most is one of four prefixes; a picture a request. Every answer is greedy and
of a fixed length. Prompts are new in each measurement; what an earlier one left in a cache is of no use to it.

Runs in vLLM's environment, see tools/vllm_env.sh. `--from FILE` shows and draws what `--json` gave, without a server,
where matplotlib is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from serving_process import ServingProcess, serving

PREFIXES = 4
WORKLOADS = {
    "random": (
        "--backend", "vllm", "--dataset-name", "random",
        "--random-input-len", "64", "--random-output-len", "48",
    ),
    "prefixes": (
        "--backend", "vllm", "--dataset-name", "prefix_repetition",
        "--prefix-repetition-num-prefixes", str(PREFIXES), "--prefix-repetition-prefix-len", "192",
        "--prefix-repetition-suffix-len", "32", "--prefix-repetition-output-len", "48",
    ),
    "pictures": (
        "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--dataset-name", "random-mm",
        "--random-input-len", "32", "--random-output-len", "48",
        "--random-mm-base-items-per-request", "1", "--random-mm-limit-mm-per-prompt", '{"image": 1}',
        "--random-mm-bucket-config", "{(96, 96, 1): 1.0}",
    ),
}  # fmt: skip
"""Arguments of `vllm bench serve`. Random text may be read as more tokens than it was made of, and 512 are all."""

TIMES = {"ttft": "time to first token", "tpot": "time per output token", "itl": "inter-token latency"}
SWEEPS = {"concurrency": "requests at a time", "rate": "requests a second"}
REQUESTS_PER_UNIT = {"concurrency": 12, "rate": 20}
"""Requests of a measurement, for each that is there at a time, or that comes in a second: light loads take long."""
LEAST_REQUESTS = 16
Row = dict[str, Any]


def measure(server: ServingProcess, workload: str, sweep: str, value: float, requests: int, seed: int) -> Row:
    """Rates in tokens and requests a second, times in milliseconds, and which share of prompts was not encoded."""
    limit = "--max-concurrency" if sweep == "concurrency" else "--request-rate"
    before = server.counts()
    result = server.bench(
        *WORKLOADS[workload], limit, f"{value:g}", "--num-prompts", str(requests), "--num-warmups", "2",
        "--temperature", "0", "--ignore-eos", "--seed", str(seed), "--percentile-metrics", ",".join(TIMES),
        "--metric-percentiles", "50,99",
    )  # fmt: skip
    asked, restored = (
        server.counts().get(name, 0.0) - before.get(name, 0.0)
        for name in ("external_prefix_cache_queries_total", "external_prefix_cache_hits_total")
    )
    return {
        "workload": workload,
        "sweep": sweep,
        "value": value,
        "requests": result["completed"],
        "requests_per_second": result["request_throughput"],
        "tokens_per_second": result["output_throughput"],
        **{f"{time}_{p}_ms": result[f"{p}_{time}_ms"] for time in TIMES for p in ("p50", "p99")},
        "restored": restored / asked if asked else 0.0,
    }


def run(args: argparse.Namespace) -> list[Row]:
    options = (
        "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", str(args.rows), *args.serve,
    )  # fmt: skip
    rows = []
    with serving(*options, verbose=args.verbose) as server:
        if "pictures" in args.workloads and (why := server.why_no_pictures()) is not None:
            sys.exit(f"--workloads pictures: this server refuses them ({why}); leave the workload out")
        for workload in args.workloads:
            # What is slow only once falls on no measurement.
            measure(server, workload, "concurrency", args.rows, 2 * args.rows, seed=0)
            for sweep, values in (("concurrency", args.concurrency), ("rate", args.rates)):
                for value in values:
                    requests = min(args.requests, max(LEAST_REQUESTS, int(REQUESTS_PER_UNIT[sweep] * value)))
                    rows.append(measure(server, workload, sweep, value, requests, seed=len(rows) + 1))
                    print(line(rows[-1]), file=sys.stderr if args.json else sys.stdout, flush=True)
    return rows


HEADER = (
    f"{'workload':>9} {'load':>17} {'requests':>8} {'tokens/s':>8} "
    f"{'TTFT p50':>9} {'p99 ms':>7} {'TPOT p50':>9} {'p99 ms':>7} {'ITL p50':>9} {'p99 ms':>7} {'restored':>8}"
)


def line(row: Row) -> str:
    load = f"{row['value']:g} at a time" if row["sweep"] == "concurrency" else f"{row['value']:g} a second"
    times = " ".join(f"{row[f'{time}_p50_ms']:9.1f} {row[f'{time}_p99_ms']:7.1f}" for time in TIMES)
    return (
        f"{row['workload']:>9} {load:>17} {row['requests']:8d} {row['tokens_per_second']:8.0f} {times} "
        f"{100 * row['restored']:7.0f}%"
    )


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(SWEEPS), 3, figsize=(12, 6.5), squeeze=False)
    for line_of_axes, (sweep, label) in zip(axes, SWEEPS.items(), strict=True):
        for i, workload in enumerate(dict.fromkeys(row["workload"] for row in rows)):
            own = [row for row in rows if (row["workload"], row["sweep"]) == (workload, sweep)]
            values, colour = [row["value"] for row in own], f"C{i}"
            rate, *times = line_of_axes
            rate.plot(values, [row["tokens_per_second"] for row in own], "o-", color=colour, label=workload)
            for axis, time in zip(times, ("ttft", "itl"), strict=True):
                axis.plot(values, [row[f"{time}_p50_ms"] for row in own], "o-", color=colour, label=f"{workload}, p50")
                axis.plot(values, [row[f"{time}_p99_ms"] for row in own], "x--", color=colour, label="p99")
        for axis, title in zip(line_of_axes, ("tokens a second", TIMES["ttft"], TIMES["itl"]), strict=True):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set(title=title, xlabel=label, ylabel="tokens/s" if axis is line_of_axes[0] else "ms", ylim=(0, None))
            axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["random", "prefixes"])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="requests at a time")
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 2, 4, 8, 16], help="requests a second")
    parser.add_argument("--requests", type=int, default=96, help="of a measurement, at most")
    parser.add_argument("--rows", type=int, default=8, help="--max-num-seqs of the server")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="what follows goes to `vllm serve`")
    parser.add_argument("--verbose", action="store_true", help="show what the server prints")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="what --json gave; nothing is measured"
    )
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not args.json:
        print(f"the mini, float32, on a CPU\n{HEADER}")
    if args.source:
        rows = json.loads(args.source.read_text())
        if not args.json:
            print("\n".join(map(line, rows)))
    else:
        rows = run(args)
    if args.png:
        plot(rows, args.png)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
