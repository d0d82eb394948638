# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of the mini under mixed traffic for minutes: nothing may leak, and no answer may change.

Clients that each ask one thing after another, drawn by a seed: text, greedy or drawn; chats; prompts with a shared
beginning; two answers to a prompt; JSON of a schema; pictures where the server takes them; streams that are dropped,
requests that are given up before their first token, requests that are bad. Beside them a fixed set of probes, asked
again and again, whose answers must be those that an idle server gave.

It fails (status 1) if a request or a probe got what it should not, if a row is in use or a request is known when all
clients have left, or if memory grows for certain: the slope of what all processes have resident, without the bytes in
the prefix cache, over the time after the warm-up, is above --most-growth with 97.5% confidence.

Runs in vLLM's environment, see tools/vllm_env.sh. `--from FILE` shows and draws what `--json` gave, without a server,
where matplotlib is.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qwen35.serving.loading import MINI_CHECKPOINT
from serving_process import ServingProcess, serving

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MODEL = str(MINI_CHECKPOINT)
SAMPLE_SECONDS = 2.0
PROBE_SECONDS = 10.0
BLOCKS = 12
"""Means of memory that the slope is fitted to: neighbouring samples are too alike to count as so many."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SHARED = (
    "A list of towns, rivers and numbers that every question here begins with, so that they have much in common. " * 3
)
SAMPLED = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "qwen35_rows_in_use",
    "qwen35_prefix_cache_bytes",
    "num_preemptions_total",
    "generation_tokens_total",
)
"""Of vLLM's metrics, those that are sampled where the server has them."""
IDLE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "qwen35_rows_in_use")
"""What must be zero once nobody asks."""


@dataclass
class Soak:
    """What was seen; times in seconds from the start of the traffic, memory in MB.

    Args:
        kinds: answers by kind of request.
        latencies: of whole answers, [when it came, how long it took, kind].
        first_tokens: of streams, [when it came, how long it took].
        samples: each with "at", "resident_mb", and `SAMPLED` by name.
        probes: [when, how many probes, how many of them answered as at first].
        wrong: what should not have happened, a line each.
        left: what of `IDLE` was not zero at the end.
    """

    kinds: dict[str, int] = field(default_factory=Counter)
    latencies: list[tuple[float, float, str]] = field(default_factory=list)
    first_tokens: list[tuple[float, float]] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    probes: list[tuple[float, int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)


class Traffic:
    """The kinds of requests; each method is one request of a kind, and raises if it gets what it should not.

    Args:
        client: of the server.
        soak: gets times.
        start: on the clock of `time.monotonic`.
    """

    def __init__(self, client: AsyncOpenAI, soak: Soak, start: float) -> None:
        self._client, self._soak, self._start = client, soak, start
        self._facts = json.loads((MINI_CHECKPOINT / "facts.json").read_text())

    async def text(self, draw: random.Random) -> None:
        await self._stream(draw.choice(self._facts)["prompt"], draw.randint(4, 64), **_sampling(draw))

    async def shared(self, draw: random.Random) -> None:
        await self._stream(SHARED + draw.choice(self._facts)["prompt"], draw.randint(4, 24), temperature=0)

    async def chat(self, draw: random.Random) -> None:
        messages: Any = [{"role": "user", "content": draw.choice(self._facts)["question"]}]
        answer = await self._client.chat.completions.create(model=MODEL, messages=messages, max_tokens=32)
        _require(bool(answer.choices[0].message.content), "an answer without text")

    async def two(self, draw: random.Random) -> None:
        prompt = draw.choice(self._facts)["prompt"]
        answer = await self._client.completions.create(
            model=MODEL, prompt=prompt, n=2, max_tokens=24, temperature=1, seed=draw.randint(0, 1000), logprobs=2
        )
        _require(len(answer.choices) == 2, f"{len(answer.choices)} answers for n=2")

    async def schema(self, draw: random.Random) -> None:
        found = json.loads(await structured(self._client, draw.choice(self._facts)["question"]))
        _require(found.get("city") in ("Paris", "Rome"), f"{found} is not of the schema")

    async def picture(self, draw: random.Random) -> None:
        colour, size = tuple(draw.randint(0, 255) for _ in range(3)), 32 * draw.randint(2, 5)
        await ask_of_picture(self._client, Image.new("RGB", (size, size), colour))

    async def dropped(self, draw: random.Random) -> None:
        stream = await self._client.completions.create(
            model=MODEL, prompt="Once", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        left = draw.randint(1, 20)
        async for _ in stream:
            if not (left := left - 1):
                break
        await stream.close()

    async def given_up(self, draw: random.Random) -> None:
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._whole("Once " * draw.randint(1, 80), 400), draw.uniform(0.01, 0.3))

    async def bad(self, draw: random.Random) -> None:
        from openai import BadRequestError

        options: Any = draw.choice([{"max_tokens": 5000}, {"temperature": -1}, {"prompt": "Once " * 600}, {"n": 0}])
        try:
            await self._client.completions.create(**{"model": MODEL, "prompt": "Once", "max_tokens": 4, **options})
        except BadRequestError:
            return
        raise RuntimeError(f"{str(options)[:40]} was not refused")

    async def _whole(self, prompt: str, tokens: int) -> None:
        await self._client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=tokens, extra_body={"ignore_eos": True}
        )

    async def _stream(self, prompt: str, tokens: int, **options: Any) -> None:
        begun = time.monotonic()
        reason, first = None, None
        stream = await self._client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=tokens, stream=True, **options
        )
        async for chunk in stream:
            if first is None:
                first = time.monotonic()
                self._soak.first_tokens.append((first - self._start, first - begun))
            reason = chunk.choices[0].finish_reason or reason
        _require(reason in ("stop", "length"), f"finish_reason is {reason}")


KINDS = {
    "text": 30, "shared": 15, "chat": 10, "two": 8, "schema": 8, "picture": 8, "dropped": 10, "given_up": 6, "bad": 5,
}  # fmt: skip
"""How often a client asks what, by the names of `Traffic`'s methods."""


def _sampling(draw: random.Random) -> dict[str, Any]:
    drawn = {"temperature": draw.choice([0.5, 1.0]), "top_p": 0.9, "seed": draw.randint(0, 1000)}
    return draw.choice(
        [{"temperature": 0}, drawn, {**drawn, "presence_penalty": 0.5}, {"temperature": 0, "stop": ["."]}]
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


async def structured(client: AsyncOpenAI, question: str) -> str:
    messages: Any = [{"role": "user", "content": question}]
    form: Any = {"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA}}
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, response_format=form, max_tokens=40, temperature=0
    )
    return answer.choices[0].message.content or ""


async def ask_of_picture(client: AsyncOpenAI, picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What colour is it?"}]
    messages: Any = [{"role": "user", "content": content}]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0)
    return answer.choices[0].message.content or ""


async def probe(client: AsyncOpenAI, pictures: bool) -> list[str]:
    """The answers to the probes, one after the other."""
    facts = json.loads((MINI_CHECKPOINT / "facts.json").read_text())
    answers = []
    for i in range(0, 200, 40):
        for options in ({"temperature": 0}, {"temperature": 1, "seed": i}):
            found = await client.completions.create(
                model=MODEL, prompt=SHARED * (i % 80 == 0) + facts[i]["prompt"], max_tokens=24, **options
            )
            answers.append(found.choices[0].text)
    answers.append(await structured(client, facts[0]["question"]))
    if pictures:
        answers.append(await ask_of_picture(client, Image.new("RGB", (96, 96), (220, 40, 40))))
    return answers


async def soak(server: ServingProcess, args: argparse.Namespace, pictures: bool) -> Soak:
    from openai import AsyncOpenAI

    found = Soak()
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        expected = await probe(client, pictures)
        start = time.monotonic()
        end = start + 60 * args.minutes
        traffic = Traffic(client, found, start)
        kinds = {kind: weight for kind, weight in KINDS.items() if pictures or kind != "picture"}

        async def until_end(every: float, work: Callable[[], Awaitable[None]]) -> None:
            while time.monotonic() < end:
                await work()
                await asyncio.sleep(every)

        async def ask_on(seed: int) -> None:
            draw = random.Random(seed)
            while time.monotonic() < end:
                (kind,) = draw.choices([*kinds], [*kinds.values()])
                begun = time.monotonic()
                try:
                    await getattr(traffic, kind)(draw)
                except Exception as error:
                    found.wrong.append(f"{begun - start:.0f} s, {kind}: {type(error).__name__}: {str(error)[:200]}")
                found.kinds[kind] += 1
                found.latencies.append((time.monotonic() - start, time.monotonic() - begun, kind))

        async def sample() -> None:
            counts = await asyncio.to_thread(server.counts)
            resident = await asyncio.to_thread(server.resident_megabytes)
            known = {name: counts[name] for name in SAMPLED if name in counts}
            found.samples.append({"at": time.monotonic() - start, "resident_mb": resident, **known})

        async def ask_probes() -> None:
            answers = await probe(client, pictures)
            same = sum(a == b for a, b in zip(answers, expected, strict=True))
            found.probes.append((time.monotonic() - start, len(answers), same))

        tasks = [until_end(SAMPLE_SECONDS, sample), until_end(PROBE_SECONDS, ask_probes)]
        await asyncio.gather(*tasks, *map(ask_on, range(args.clients)))
        await ask_probes()
    found.left = await asyncio.to_thread(left_in_use, server)
    return found


def left_in_use(server: ServingProcess, seconds: float = 60) -> dict[str, float]:
    """What is not zero although nobody asks any more, once so much time has passed."""
    end = time.monotonic() + seconds
    while True:
        counts = server.counts()
        left = {name: counts[name] for name in IDLE if counts.get(name)}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.5)


def growth(samples: Sequence[dict[str, float]], warm_up: float) -> tuple[float, float]:
    """MB an hour that memory grows after the warm-up, and half the width of its 95% confidence interval.

    A straight line, by least squares, through the means of `BLOCKS` equal spans of time. The bytes of the prefix cache,
    where there are some, are taken off: it grows to its budget and no further.
    """
    late = [sample for sample in samples if sample["at"] >= warm_up]
    begin, end = late[0]["at"], late[-1]["at"] + 1e-6
    blocks: list[list[tuple[float, float]]] = [[] for _ in range(BLOCKS)]
    for sample in late:
        megabytes = sample["resident_mb"] - sample.get("qwen35_prefix_cache_bytes", 0) / 1e6
        blocks[int(BLOCKS * (sample["at"] - begin) / (end - begin))].append((sample["at"] / 3600, megabytes))
    points = [tuple(map(statistics.fmean, zip(*block, strict=True))) for block in blocks if block]
    hours, megabytes = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(hours, megabytes)
    rest = sum((y - intercept - slope * x) ** 2 for x, y in points)
    mean = statistics.fmean(hours)
    error = math.sqrt(rest / (len(points) - 2) / sum((x - mean) ** 2 for x in hours))
    return slope, student_t(len(points) - 2) * error


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t, by the expansion of Abramowitz and Stegun 26.7.5, to 1% from 5 on."""
    x = statistics.NormalDist().inv_cdf(0.975)
    terms = (x, (x**3 + x) / 4, (5 * x**5 + 16 * x**3 + 3 * x) / 96, (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384)
    return sum(term / freedom**i for i, term in enumerate(terms))


def by_minute(found: Soak) -> list[dict[str, float]]:
    """Of each minute: requests, tokens a second, latencies of streams and first tokens in ms, and means of samples."""
    table = []
    for minute in range(math.ceil(max(sample["at"] for sample in found.samples) / 60)):
        inside = [sample for sample in found.samples if sample["at"] // 60 == minute]
        times = [1e3 * took for at, took, kind in found.latencies if at // 60 == minute and kind == "text"]
        first = [1e3 * took for at, took in found.first_tokens if at // 60 == minute]
        if len(inside) < 2 or len(times) < 2 or len(first) < 2:
            continue
        span = inside[-1]["at"] - inside[0]["at"]
        tokens = inside[-1]["generation_tokens_total"] - inside[0]["generation_tokens_total"]
        table.append(
            {
                "minute": minute,
                "requests": sum(at // 60 == minute for at, _, _ in found.latencies),
                "tokens_per_second": tokens / span,
                **{f"text_p{p}_ms": quantile(times, p) for p in (50, 99)},
                **{f"ttft_p{p}_ms": quantile(first, p) for p in (50, 99)},
                "resident_mb": statistics.fmean(sample["resident_mb"] for sample in inside),
                "rows_in_use": statistics.fmean(sample.get("qwen35_rows_in_use", 0) for sample in inside),
                "waiting": statistics.fmean(sample["num_requests_waiting"] for sample in inside),
            }
        )
    return table


def quantile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def report(found: Soak, args: argparse.Namespace) -> bool:
    """Print what was seen; whether all was as it should be."""
    print("minute requests tokens/s  text p50  p99 ms  TTFT p50  p99 ms  resident MB  rows  waiting")
    for row in by_minute(found):
        print(
            f"{row['minute']:6d} {row['requests']:8d} {row['tokens_per_second']:8.0f} {row['text_p50_ms']:9.0f} "
            f"{row['text_p99_ms']:7.0f} {row['ttft_p50_ms']:9.0f} {row['ttft_p99_ms']:7.0f} "
            f"{row['resident_mb']:12.1f} {row['rows_in_use']:5.1f} {row['waiting']:8.1f}"
        )
    print("requests:", ", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items())))
    asked, same = (sum(one[i] for one in found.probes) for i in (1, 2))
    slope, half = growth(found.samples, args.warm_up * 60)
    certain = slope - half > args.most_growth
    checks = {
        f"probes that answered as at first: {same} of {asked}": same == asked,
        f"requests that got what they should not: {len(found.wrong)}": not found.wrong,
        f"left in use: {found.left or 'nothing'}": not found.left,
        f"memory grows by {slope:.0f} +- {half:.0f} MB an hour after {args.warm_up:g} min (95%)": not certain,
    }
    for said, holds in checks.items():
        print(("" if holds else "WRONG: ") + said)
    for one in found.wrong[:20]:
        print("  " + one)
    return all(checks.values())


def plot(found: Soak, args: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((memory, rows), (text, tokens)) = pyplot.subplots(2, 2, figsize=(11, 6))
    minutes = [sample["at"] / 60 for sample in found.samples]
    memory.plot(minutes, [sample["resident_mb"] for sample in found.samples])
    slope, half = growth(found.samples, args.warm_up * 60)
    memory.axvline(args.warm_up, color="grey", linestyle=":")
    memory.set(title=f"resident, all processes: {slope:+.0f} ± {half:.0f} MB an hour", ylabel="MB")
    memory.set_ylim(0, 1.1 * max(sample["resident_mb"] for sample in found.samples))
    for name, label in (("qwen35_rows_in_use", "rows in use"), ("num_requests_waiting", "waiting")):
        rows.plot(minutes, [sample.get(name, 0) for sample in found.samples], linewidth=0.8, label=label)
    rows.set(title="requests", ylim=(0, None))
    rows.legend(fontsize="small")
    table = by_minute(found)
    for name, label in (("text", "whole answers"), ("ttft", "first token")):
        for percent, style in ((50, "o-"), (99, "x--")):
            values = [row[f"{name}_p{percent}_ms"] for row in table]
            text.plot([row["minute"] + 0.5 for row in table], values, style, label=f"{label}, p{percent}")
    text.set(title="latency of text by minute", ylabel="ms", xlabel="minutes", ylim=(0, None))
    text.legend(fontsize="small")
    tokens.plot([row["minute"] + 0.5 for row in table], [row["tokens_per_second"] for row in table], "o-")
    tokens.set(title="tokens a second by minute", xlabel="minutes", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> Soak:
    options = (
        "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", str(args.rows),
        "--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}), *args.serve,
    )  # fmt: skip
    with serving(*options, verbose=args.verbose) as server:
        why = server.why_no_pictures()
        if why is not None:
            print(f"without pictures, which this server refuses: {why}", file=sys.stderr)
        return asyncio.run(soak(server, args, pictures=why is None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--warm-up", type=float, metavar="MINUTES", help="a quarter of --minutes by default")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8, help="--max-num-seqs of the server")
    parser.add_argument("--most-growth", type=float, default=0, metavar="MB_AN_HOUR", help="that is let pass")
    parser.add_argument("--verbose", action="store_true", help="show what the server prints")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="what --json gave; nothing is run")
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print all that was seen; what it comes to, to stderr")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="what follows goes to `vllm serve`")
    args = parser.parse_args()
    if args.warm_up is None:
        args.warm_up = args.minutes / 4
    found = Soak(**json.loads(args.source.read_text())) if args.source else run(args)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        good = report(found, args)
    if args.json:
        print(json.dumps(vars(found)))
    if args.png:
        plot(found, args, args.png)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
