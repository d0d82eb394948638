# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The page of a self-test, in Markdown: what works, what fails and how, times, and the settings that follow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..device_settings import DeviceSettings
from ..nxdi import NXDI_AVAILABLE
from .known_failures import codes_in, known
from .outcome import Result, Status
from .plan import ENVIRONMENT, Check, Conclusion, Kind, Options
from .verdict import EMULATED, ExitStatus

MODEL_KINDS = (Kind.MODEL, Kind.CHECKPOINT)

SUMMARIES = {
    ExitStatus.ALL_WORKS: "All checks passed.",
    ExitStatus.SETTINGS_NEEDED: "Some checks failed; the settings below were seen to work.",
    ExitStatus.NOTHING_WORKS: "The mini did not generate in any way that was tried: there are no settings.",
    ExitStatus.CUT_SHORT: "Checks were left out; the same command goes on with them.",
}


def one_line_of(check: Check, result: Result) -> str:
    """A check and what became of it, for the terminal."""
    line = f"{check.name}: {result.status.value}, {result.seconds:.0f} s"
    if result.status is Status.PASSED:
        return line + "".join(f", {words}" for words in _figures(result.values))
    return f"{line}: {(result.error.splitlines() or [''])[0]}"


def as_page(
    options: Options,
    done: Sequence[Check],
    results: Mapping[str, Result],
    conclusion: Conclusion,
    settings: DeviceSettings | None,
    status: ExitStatus,
    directory: Path,
) -> str:
    """The whole page."""
    machine = results[ENVIRONMENT].values
    where = machine.get("instance") or "a machine that is no known instance" if NXDI_AVAILABLE else EMULATED
    lines = [f"# qwen35 selftest, tier {options.tier}", "", f"Device: {where}.", ""]
    lines += [f"**{SUMMARIES[status]}** Exit status {int(status)}.", ""]
    if not NXDI_AVAILABLE:
        lines += [
            "Nothing here was compiled for, or measured on, a device: kernels are emulated, their times modelled.",
            "",
        ]
    lines += _failures(done, results, directory)
    lines += _not_run(done, results)
    lines += _notes(done, results)
    lines += _settings(conclusion, settings, directory)
    lines += _kernels(done, results)
    lines += _models(done, results)
    lines += _machine(machine)
    return "\n".join(lines).rstrip() + "\n"


def _failures(done: Sequence[Check], results: Mapping[str, Result], directory: Path) -> Iterator[str]:
    failed = [check for check in done if results[check.name].status.is_failure]
    if not failed:
        return
    yield from ("## What fails", "")
    for check in failed:
        result, folder = results[check.name], directory / "checks" / check.name
        yield from (f"**{check.name}** ({check.what}): {result.status.value} after {result.seconds:.0f} s", "")
        if result.note:
            yield from (result.note, "")
        yield from ("```text", *result.error.splitlines()[:14], "```", "")
        for code in codes_in(folder, result.error):
            yield from (f"{code}: {known(code) or 'not in docs/compiler_failures.md'}", "")
        yield from (f"Log: checks/{check.name}/log.txt", "")


def _not_run(done: Sequence[Check], results: Mapping[str, Result]) -> Iterator[str]:
    left = [check for check in done if results[check.name].status in (Status.NOT_RUN, Status.ABSENT)]
    if left:
        yield from ("## What was not checked", "")
        yield from (f"- {check.name} ({check.what}): {results[check.name].error}" for check in left)
        yield ""


def _notes(done: Sequence[Check], results: Mapping[str, Result]) -> Iterator[str]:
    noted = [check for check in done if results[check.name].note and not results[check.name].status.is_failure]
    if noted:
        yield from ("## Notes", "")
        yield from (f"- {check.name}: {results[check.name].note}" for check in noted)
        yield ""


def _settings(conclusion: Conclusion, settings: DeviceSettings | None, directory: Path) -> Iterator[str]:
    if settings is None:
        return
    yield from ("## Settings", "", f"With {conclusion.kernels}, the mini generated at TP={conclusion.tp}.", "")
    shown = {"kernels": settings.kernels, "failing": settings.failing}
    yield from ("```json", *json.dumps(shown, default=dict, indent=1).splitlines(), "```", "")
    yield from (f"`qwen35 compile OUTPUT --settings {directory / 'settings.json'} ...` takes them.", "")


def _kernels(done: Sequence[Check], results: Mapping[str, Result]) -> Iterator[str]:
    rows = [check for check in done if check.kind is Kind.KERNEL]
    if not rows:
        return
    yield from (
        "## Kernels alone",
        "",
        "Shapes of a rank of 27B at TP=4, bfloat16. Errors over the largest value, against float64.",
    )
    yield "Modelled times are the emulator's, without a launch (29 us). Measured ones are medians from the host: the"
    yield from ("launch, and the moving of inputs and outputs, are in them.", "")
    yield from ("| kernel | | error (most) | modelled, us | measured, us |", "|---|---|---|---|---|")
    for check in rows:
        result = results[check.name]
        values = result.values
        error = f"{values['error']:.1e} ({values['tolerance']:.0e})" if values else ""
        modelled, measured = (_number(values.get(name)) for name in ("modelled_us", "measured_us"))
        yield f"| {check.name} | {result.status.value} | {error} | {modelled} | {measured} |"
    yield ""


def _models(done: Sequence[Check], results: Mapping[str, Result]) -> Iterator[str]:
    rows = [check for check in done if check.kind in (*MODEL_KINDS, Kind.SERVER)]
    if not rows:
        return
    measured = "TTFT, ms | TPOT, ms | compiled in, s" if NXDI_AVAILABLE else "seconds of the check"
    yield from ("## Models", "", "Tokens equal to those of transformers, recorded.", "")
    yield from (f"| check | what | | {measured} |", "|---" * (3 + measured.count("|") + 1) + "|")
    for check in rows:
        result = results[check.name]
        if NXDI_AVAILABLE:
            times = [_against(result.values, name) for name in ("ttft_s", "tpot_s")]
            figures = " | ".join([*times, _number(result.values.get("compile_s"))])
        else:
            figures = f"{result.seconds:.0f}"
        yield f"| {check.name} | {check.what} | {result.status.value} | {figures} |"
    yield ""


def _against(values: Mapping[str, Any], name: str) -> str:
    """A measured time in ms, and the modelled one where there is one."""
    if values.get(name) is None:
        return ""
    modelled = values.get(f"modelled_{name}")
    return f"{1e3 * values[name]:.1f}" + (f" (modelled {1e3 * modelled:.1f})" if modelled is not None else "")


def _machine(values: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Machine", "", "| | |", "|---|---|")
    for name, value in values.items():
        if name == "devices":
            yield f"| devices | {len(value)}: {'; '.join(map(_device, value))} |" if value else "| devices | none |"
        elif isinstance(value, Mapping) and value:
            yield f"| {name} | {', '.join(f'{key} {found}' for key, found in value.items() if found is not None)} |"
        elif value not in (None, {}):
            yield f"| {name} | {value} |"


def _device(device: Mapping[str, Any]) -> str:
    total, free = (device.get(name) for name in ("hbm_bytes", "free_hbm_bytes"))
    memory = "HBM unknown" if total is None else f"{total / 2**30:.0f} GiB"
    memory += "" if free is None else f", {free / 2**30:.1f} free"
    busy = f", {device['processes']} processes" if device.get("processes") else ""
    return f"{device.get('number')} ({device.get('cores')} cores, LNC {device.get('lnc')}, {memory}{busy})"


def _figures(values: Mapping[str, Any]) -> Iterator[str]:
    if "error" in values:
        yield f"error {values['error']:.1e}"
    if values.get("modelled_us") is not None:
        yield f"modelled {values['modelled_us']} us"
    if values.get("measured_us") is not None:
        yield f"measured {values['measured_us']:.1f} us from the host"
    if NXDI_AVAILABLE:
        yield from (
            f"{name} {_against(values, key)} ms"
            for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
            if key in values
        )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}"
