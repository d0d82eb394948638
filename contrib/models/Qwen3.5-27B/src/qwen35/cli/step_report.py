# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What `qwen35 plan` prints of where time goes: a step and a prompt by part, and beside them what ports measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..planning.plan import Plan
from ..planning.ports import Comparison, compare
from ..planning.step import ASSUMPTIONS, NOT_COUNTED, PROMPT, STEP_CONTEXT, Breakdown

_MARGIN, _WIDTH = 32, 11


def step_lines(of: Plan, acceptance: Sequence[float] = ()) -> Iterator[str]:
    """Text for people; `acceptance` has the share of each draft, where tokens are drafted."""
    if of.not_modelled is None:
        yield from lines_of(_breakdowns(of, acceptance), _compared(of))
    else:
        yield f"where the time goes, by part: not modelled, since {of.not_modelled}"


def lines_of(columns: Sequence[Breakdown], compared: Sequence[Comparison]) -> Iterator[str]:
    """Passes as columns of one table, what it rests on, and ports beside it."""
    letters = "ABC"[: len(columns)]
    yield "where the time goes, ms: least (roofline) and modelled; nothing of it was measured"
    yield from (f"  {letter}: {column.what}" for letter, column in zip(letters, columns, strict=True))
    heads = [f"{letter} {kind}" for letter in letters for kind in ("least", "modelled")]
    yield f"  {'':{_MARGIN - 2}}" + "".join(f"{head:>{_WIDTH}}" for head in heads)
    for name in dict.fromkeys(part.name for column in columns for part in column.parts):
        yield _row(name, [_of_part(column, name) for column in columns])
    yield _row("in all", [(column.roofline, column.modelled) for column in columns])
    yield _row("a token", [_of_token(column) for column in columns])
    ratios = "".join(f"{'':{_WIDTH}}{column.ratio:{_WIDTH}.2f}" for column in columns)
    yield f"  {'modelled over least':{_MARGIN - 2}}{ratios}"
    yield "modelled with the kernel times of planning/kernel_times.json, from the emulator, and"
    for assumed in ASSUMPTIONS:
        yield f"  {assumed.value:g} {assumed.unit}"
        yield f"    ({assumed.source})"
    yield f"  parts one after the other; not counted: {NOT_COUNTED}"
    if compared:
        yield "measured on devices by ports of 27B, none by this one; ms; a token is modelled with a short context"
        for found in compared:
            yield from _comparison(found)


def step_json(of: Plan, acceptance: Sequence[float] = ()) -> dict[str, Any]:
    """The same for `--json`; seconds."""
    if of.not_modelled is not None:
        return {"not_modelled": of.not_modelled}
    return {
        "modelled": [
            {
                **asdict(column),
                "roofline": column.roofline,
                "modelled": column.modelled,
                "modelled_over_roofline": column.ratio,
            }
            for column in _breakdowns(of, acceptance)
        ],
        "assumptions": [asdict(assumed) for assumed in ASSUMPTIONS],
        "not_counted": NOT_COUNTED,
        "measured_by_ports": [
            asdict(found) | {"token_unexplained": found.token_unexplained} for found in _compared(of)
        ],
    }


def _breakdowns(of: Plan, acceptance: Sequence[float]) -> list[Breakdown]:
    step = of.sharded.step
    assert step is not None, "not_modelled is None"
    context = min(STEP_CONTEXT, of.seq_len)
    found = [step.decode(context, of.rows), step.prompt(min(PROMPT, of.prompt_bucket), of.prompt_rows)]
    return [*found, step.with_drafts(acceptance, context, of.rows)] if acceptance else found


def _compared(of: Plan) -> list[Comparison]:
    ours, whole = of.sharded.step, of.replicated.step
    assert ours is not None and whole is not None, "not_modelled is None"
    return compare(ours, whole) if of.weights_dtype is None and of.kv_cache_dtype is None else []


def _of_part(column: Breakdown, name: str) -> tuple[float, float] | None:
    """Least and modelled seconds of a part, None where the pass has none of that name."""
    return next(((part.roofline, part.modelled) for part in column.parts if part.name == name), None)


def _of_token(column: Breakdown) -> tuple[float, float] | None:
    """Least and modelled seconds of a token, None of a prompt."""
    return None if column.tokens is None else (column.roofline / column.tokens, column.modelled / column.tokens)


def _row(label: str, pairs: Sequence[tuple[float, float] | None]) -> str:
    cells = (
        f"{'-':>{_WIDTH}}" * 2 if pair is None else "".join(f"{1e3 * s:{_WIDTH}.3f}" for s in pair) for pair in pairs
    )
    return f"  {label:{_MARGIN - 2}}" + "".join(cells)


def _comparison(found: Comparison) -> Iterator[str]:
    port = found.port
    yield f"  {port.name} ({port.machine}; {port.note})"
    whole = f", {1e3 * found.whole_deltanet:.1f} more for all of DeltaNet on every rank" if found.whole_deltanet else ""
    rest = f"{1e3 * found.token_unexplained:.1f} ({1e6 * found.layer_unexplained:.0f} us a layer)"
    yield f"    a token: measured {1e3 * port.token:.1f}; modelled {1e3 * found.token:.1f}{whole}; unexplained {rest}"
    if port.prompt is not None:
        times = f"measured {1e3 * port.prompt:.0f}; modelled {1e3 * found.prompt:.0f}"
        yield f"    a prompt of 1,024 tokens: {times}; unexplained {1e3 * (port.prompt - found.prompt):.0f}"
