# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What `qwen35 plan` prints and draws: the plan of a configuration as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import hardware
from ..configuration_qwen35 import dtype_name
from ..hardware import Figure
from ..memory.fit import MOST_SLOTS, RESERVE, Layout, count_resident, layout_of, resized
from ..memory.programs import MATMUL_TILE, PROGRAM_INSTRUCTIONS, Program
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..planning.plan import Plan, preset_application, recommended_layout
from ..planning.recommended import RECOMMENDED, Recommended, doubled, prompt_bucket_for
from ..planning.work import Work, tokens_per_step, work_of
from .step_report import step_json, step_lines

SHORTEST_DRAWN = 1024
"""Tokens of the shortest context of a picture."""
_MARGIN, _WIDTH = 34, 16


def figures(of: Plan) -> list[Figure]:
    """Every constant that a plan rests on."""
    peak = hardware.CHIP_BF16_FLOPS if of.dtype == torch.bfloat16 else hardware.CHIP_FP32_FLOPS
    chip = [hardware.CHIP_CORES, hardware.CHIP_HBM, hardware.CHIP_HBM_BANDWIDTH, peak]
    return [of.instance.chips, *chip, hardware.DEFAULT_LNC, RESERVE, MATMUL_TILE, PROGRAM_INSTRUCTIONS]


# --- Text and JSON ---------------------------------------------------------------------------------------------------
def as_table(of: Plan, acceptance: Sequence[float] = ()) -> str:
    """Text for people: a column for the plan, and one for the same in the layout of published ports.

    `acceptance` has the share of each draft that is accepted once those before it are, where tokens are drafted.
    """
    return "\n".join(_lines(of, acceptance))


def _lines(of: Plan, acceptance: Sequence[float]) -> Iterator[str]:
    columns = (of.sharded, of.replicated)
    layouts = [column.layout for column in columns]
    yield (
        f"{of.instance.name}, tp_degree={of.tp_degree}, LNC={of.lnc}, {_dtypes(of)}: "
        f"{of.slots} x {of.seq_len:,} tokens, prompts in chunks of {of.prompt_bucket:,}, {of.prompt_rows} at a time"
    )
    yield f"{'GB per rank':{_MARGIN}}{'this model':>{_WIDTH}}{'published ports':>{_WIDTH}}"
    yield f"  {'DeltaNet':{_MARGIN - 2}}{'sharded':>{_WIDTH}}{'whole, with KV':>{_WIDTH}}"
    for label, values in _rows(layouts):
        yield f"  {label:{_MARGIN - 2}}" + "".join(f"{value / 1e9:{_WIDTH}.3f}" for value in values)

    def row(label: str, *values: str) -> str:
        return f"  {label:{_MARGIN - 2}}" + "".join(f"{value:>{_WIDTH}}" for value in values)

    yield row("fits", *("yes" if layout.fits else "NO" for layout in layouts))
    yield row(f"longest context at batch {of.slots}", *(f"{column.limits.context:,}" for column in columns))
    yield row(f"largest batch at {of.seq_len:,}", *(_batch(column.limits.batch) for column in columns))
    yield "least time (modelled)"
    for tokens in sorted({of.prompt_bucket, of.seq_len}):
        times = (column.work.ttft(tokens, of.prompt_bucket, of.prompt_rows) for column in columns)
        yield row(f"TTFT, prompt of {tokens:,}", *map(_time, times))
    for context in (0, of.seq_len):
        yield row(f"TPOT, {context:,} in the cache", *(_time(column.work.tpot(context, of.rows)) for column in columns))
    if acceptance:
        yield from _speculation_lines(of, acceptance, row)
    yield from step_lines(of, acceptance)
    yield "activations by bucket, GB (modelled: most bytes live at once, as PyTorch would run the module)"
    yield from _by_bucket(of, lambda program: f"{program.bytes / 1e9:.3f}")
    limit = f"neuronx-cc gives up above {PROGRAM_INSTRUCTIONS.value / 1e6:.0f} in all"
    yield f"instructions for matrix products, at least, in millions (modelled); {limit}"
    yield from _by_bucket(of, lambda program: f"{program.matmuls / 1e6:.2f}")
    if of.vision is not None:
        split = of.vision.rank
        rank = "cannot be split evenly" if split is None else f"would be {split / 1e9:.3f} GB per rank"
        yield f"vision encoder: {of.vision.host / 1e9:.3f} GB of the host's memory, no HBM; on the ranks it {rank}"
    yield f"tensor-parallel degrees of this checkpoint here: {', '.join(map(str, of.valid_tp_degrees))}"
    yield "from"
    for figure in figures(of):
        yield f"  {figure.value:,} {figure.unit} ({figure.source})"


def _dtypes(of: Plan | Recommended) -> str:
    """What is in which dtype."""
    fp8 = {"weights": of.weights_dtype, "KV": of.kv_cache_dtype}
    named = [dtype_name(of.dtype) if isinstance(of, Plan) else "bfloat16"]
    return ", ".join(named + [f"{what} {dtype}" for what, dtype in fp8.items() if dtype is not None])


def _speculation_lines(of: Plan, acceptance: Sequence[float], row: Callable[..., str]) -> Iterator[str]:
    """What drafting costs and gives."""
    works = [column.work for column in (of.sharded, of.replicated)]
    tokens = tokens_per_step(acceptance)
    shares = ", ".join(f"{share:g}" for share in acceptance)
    yield f"drafts: {len(acceptance)} a step, accepted with {shares} once those before are: {tokens:.2f} tokens a step"
    heads = (work.drafting for work in works)
    yield row("of KV cache, the MTP head's", *(f"{head.kv_cache / 1e9:.3f} GB" for head in heads if head is not None))
    for context in (0, of.seq_len):
        cached = f"{context:,} in the cache"
        yield row(f"verify, {cached}", *(_time(work.verification(context, of.rows)) for work in works))
        yield row(f"draft, {cached}", *(_time(work.draft(context, of.rows)) for work in works))
        yield row(f"a token, {cached}", *(_time(work.step(context, of.rows) / tokens) for work in works))
        yield row(
            "  pays up to a batch of", *(_batch(work.break_even(acceptance, context, MOST_SLOTS)) for work in works)
        )


def _by_bucket(of: Plan, value: Callable[[Program], str]) -> Iterator[str]:
    for submodel in dict.fromkeys(program.submodel for program in of.programs):
        values = (f"{p.bucket:,}: {value(p)}" for p in of.programs if p.submodel == submodel)
        yield f"  {submodel}  {'  '.join(values)}"


def _rows(layouts: list[Layout]) -> Iterator[tuple[str, list[int]]]:
    drafts = layouts[0].weights.mtp > 0
    for group, label in (
        ("embedding", "weights: embedding"),
        ("lm_head", "weights: head"),
        ("deltanet", "weights: DeltaNet"),
        ("attention", "weights: attention"),
        ("mlp", "weights: MLP"),
        *[("mtp", "weights: MTP head")] * drafts,
        ("norms", "weights: norms"),
    ):
        yield label, [getattr(layout.weights, group) for layout in layouts]
    for field, label in (
        ("kv_cache", "KV cache"),
        ("recurrent_state", "recurrent state"),
        ("conv_state", "conv state"),
        *[("speculation", "verified tokens")] * drafts,
        ("activations", "activations (modelled)"),
        ("reserve", "reserve (inferred)"),
        ("total", "total"),
        ("hbm", "HBM"),
        ("headroom", "headroom"),
    ):
        yield label, [getattr(layout, field) for layout in layouts]


def _batch(most: int) -> str:
    return f"{most:,}" + (" or more" if most == MOST_SLOTS else "")


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1e3 * seconds:.1f} ms"


def as_json(of: Plan, acceptance: Sequence[float] = ()) -> dict[str, Any]:
    """One JSON object; what is modelled is under that name. Bytes and seconds. `acceptance` as for `as_table`."""
    columns = {}
    for name, column in (("this_model", of.sharded), ("layout_of_published_ports", of.replicated)):
        layout, work = column.layout, column.work
        columns[name] = {
            **asdict(layout),
            **{field: getattr(layout, field) for field in ("total", "headroom", "fits")},
            "longest_context": column.limits.context,
            "largest_batch": column.limits.batch,
            "modelled": {
                "ttft_s": {n: work.ttft(n, of.prompt_bucket, of.prompt_rows) for n in (of.prompt_bucket, of.seq_len)},
                "tpot_s": {n: work.tpot(n, of.rows) for n in (0, of.seq_len)},
                "speculation": _speculation_json(of, work, acceptance) if acceptance else None,
                "work": asdict(work),
            },
        }
    settings = ("tp_degree", "lnc", "seq_len", "slots", "rows", "prompt_rows", "prompt_bucket", "valid_tp_degrees")
    return {
        "instance": of.instance.name,
        "dtype": dtype_name(of.dtype),
        "weights_dtype": of.weights_dtype,
        "kv_cache_dtype": of.kv_cache_dtype,
        **{name: getattr(of, name) for name in settings},
        **columns,
        "step_by_part": step_json(of, acceptance),
        "programs_modelled": [asdict(program) for program in of.programs],
        "vision": None if of.vision is None else asdict(of.vision),
        "figures": [asdict(figure) for figure in figures(of)],
    }


def _speculation_json(of: Plan, work: Work, acceptance: Sequence[float]) -> dict[str, Any]:
    tokens, contexts = tokens_per_step(acceptance), (0, of.seq_len)
    return {
        "acceptance_once_those_before_are": [*acceptance],
        "tokens_per_step": tokens,
        "verification_s": {context: work.verification(context, of.rows) for context in contexts},
        "draft_s": {context: work.draft(context, of.rows) for context in contexts},
        "tpot_s": {context: work.step(context, of.rows) / tokens for context in contexts},
        "break_even_batch": {context: work.break_even(acceptance, context, MOST_SLOTS) for context in contexts},
    }


def recommended_as_markdown() -> str:
    """The recommended configurations of 27B as a table, with what each takes; times modelled."""
    head = (
        "name", "for", "dtypes", "TP", "models", "sequences", "tokens each", "GB of 25.8 per rank", "TTFT of 2,048",
        "TPOT, empty to full cache",
    )  # fmt: skip
    return "\n".join(_markdown_row(cells) for cells in (head, ["---"] * len(head), *map(_cells, RECOMMENDED.values())))


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(entry: Recommended) -> list[str]:
    work = work_of(preset_application("27B", entry.neuron_config()))
    tpot = [f"{1e3 * work.tpot(context, entry.batch):.1f}" for context in (0, entry.seq_len)]
    return [
        f"`{entry.name}`",
        entry.use,
        _dtypes(entry),
        str(entry.tp_degree),
        str(entry.replicas),
        str(entry.batch),
        f"{entry.seq_len:,}",
        f"{recommended_layout(entry.name).total / 1e9:.1f}",
        f"{1e3 * work.ttft(2048, prompt_bucket_for(entry.seq_len)):.0f} ms",
        f"{' to '.join(tpot)} ms",
    ]


# --- Picture ---------------------------------------------------------------------------------------------------------
def write_png(model: NeuronQwen35ForCausalLM, of: Plan, path: str | Path) -> None:
    """Draw the memory of a rank against the context, at the plan's batch, to `path`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install 'qwen35-neuron[plot]'") from error

    longest = model.config.max_position_embeddings
    shortest = min(SHORTEST_DRAWN, longest // 2)
    contexts = doubled(shortest, longest)
    sharded, replicated = [], []
    for context in contexts:
        other = resized(model, context, of.slots)
        sharded.append(layout_of(other))
        replicated.append(count_resident(other).layout(sharded[-1].activations, of.tp_degree))
    parts: dict[str, list[float]] = {
        "weights": [layout.weights.total / 1e9 for layout in sharded],
        "recurrent and conv state": [(layout.recurrent_state + layout.conv_state) / 1e9 for layout in sharded],
        "KV cache": [layout.kv_cache / 1e9 for layout in sharded],
        "activations (modelled)": [layout.activations / 1e9 for layout in sharded],
        "reserve (inferred)": [layout.reserve / 1e9 for layout in sharded],
    }
    figure = Canvas(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stackplot(contexts, list(parts.values()), labels=list(parts), alpha=0.8)
    axes.plot(
        contexts, [each.total / 1e9 for each in replicated], "k--", label="total in the layout of published ports"
    )
    axes.axhline(of.sharded.layout.hbm / 1e9, color="C3", label="HBM per rank")
    axes.set_xscale("log", base=2)
    axes.set_xlim(contexts[0], contexts[-1])
    axes.set_ylim(0)
    axes.set_xticks(contexts, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in contexts])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("GB per rank")
    axes.set_title(
        f"{of.instance.name}, TP={of.tp_degree}, {dtype_name(of.dtype)}, batch {of.slots}: counted on modules"
    )
    axes.legend(loc="lower right")
    figure.savefig(path, format="png", dpi=120)
