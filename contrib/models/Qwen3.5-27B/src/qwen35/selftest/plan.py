# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which checks there are, in order, and which follow a failure: a safe variant is tried before settings name it.

What comes next depends on what was found, on nothing else, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from ..kernel_selection import AttentionKernel, DeltaNetInverse, DeltaNetKernel
from ..phase import Phase
from .cases import Feature, ModelCase
from .outcome import Result, Status

ENVIRONMENT = "environment"
TIERS = {1: "environment, default kernels, the mini", 2: "all kernels and features", 3: "server, real checkpoint"}

DEFAULT_KERNELS = (
    "fused", "fused-after-state", "decode", "verify", "commit", "attention-prompt", "attention-continuation",
    "attention-decode",
)  # fmt: skip
"""Of `kernel_checks.KERNELS`, what a model of the default configuration launches; the two of drafts included."""

OTHER_KERNELS = ("fused-plain", "fused-plain-after-state", "looped", "chunked", "chunked-plain", "recurrent", "mlp")

_NKI, _TORCH = AttentionKernel.NKI.value, AttentionKernel.TORCH.value
_TILED, _PLAIN = DeltaNetInverse.TILED.value, DeltaNetInverse.PLAIN.value

ATTENTION = {
    Phase.CONTEXT_ENCODING: "attention-prompt",
    Phase.CONTINUATION: "attention-continuation",
    Phase.TOKEN_GENERATION: "attention-decode",
}
"""The check of each phase's kernel."""

DELTANET = (
    (DeltaNetKernel.FUSED, DeltaNetInverse.TILED, ("fused", "fused-after-state")),
    (DeltaNetKernel.FUSED, DeltaNetInverse.PLAIN, ("fused-plain", "fused-plain-after-state")),
    (DeltaNetKernel.CHUNKED, DeltaNetInverse.TILED, ("chunked",)),
    (DeltaNetKernel.CHUNKED, DeltaNetInverse.PLAIN, ("chunked-plain",)),
)
"""What may encode prompts, the best first, and the checks that it has to pass; TORCH is left when none does."""

OTHER_MODELS = (
    (DeltaNetKernel.FUSED, DeltaNetInverse.PLAIN),
    (DeltaNetKernel.LOOPED, DeltaNetInverse.TILED),
    (DeltaNetKernel.CHUNKED, DeltaNetInverse.TILED),
    (DeltaNetKernel.CHUNKED, DeltaNetInverse.PLAIN),
    (DeltaNetKernel.RECURRENT, DeltaNetInverse.TILED),
    (DeltaNetKernel.TORCH, DeltaNetInverse.TILED),
)
"""Kernels of the mini beside the default ones."""

SECONDS_OF_27B = 13 * 60
"""To compile a program of 27B with a context of 128 tokens: the one published time (NxDI pull request 128)."""

SECONDS_A_PROGRAM = 120
"""To compile and run one of the mini, or a kernel, on a device: assumed, an eighth of the layers of 27B and more."""

SECONDS_TO_START = 15
EMULATED_SECONDS = {"environment": 5, "kernel": 10, "model": 15, "server": 120, "checkpoint": 120}
"""On two shared cores, without a device; a model's once more for each rank."""


class Kind(str, Enum):
    """What runs a check."""

    ENVIRONMENT = "environment"
    KERNEL = "kernel"  # a kernel alone
    MODEL = "model"  # the mini
    SERVER = "server"  # vLLM, on the mini
    CHECKPOINT = "checkpoint"  # a real one


@dataclass(frozen=True)
class Check:
    """One process.

    Attributes:
        name: of its directory.
        what: for people, in a few words.
        programs: how many are compiled.
        arguments: for what runs it, in values that JSON has.
    """

    name: str
    kind: Kind
    what: str
    programs: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self, on_device: bool) -> float:
        """A rough estimate, which rests on `SECONDS_A_PROGRAM`, `SECONDS_OF_27B` or `EMULATED_SECONDS`."""
        if on_device:
            of_a_program = SECONDS_OF_27B if self.kind is Kind.CHECKPOINT else SECONDS_A_PROGRAM
            return SECONDS_TO_START + self.programs * of_a_program
        return EMULATED_SECONDS[self.kind.value] * (1 + self.arguments.get("tp_degree", 0))


class Findings:
    """What was found so far, by the name of the check."""

    def __init__(self, results: Mapping[str, Result]) -> None:
        self.results = results

    def passed(self, name: str) -> bool:
        result = self.results.get(name)
        return result is not None and result.status is Status.PASSED

    def failed(self, name: str) -> bool:
        result = self.results.get(name)
        return result is not None and result.status.is_failure

    def reason(self, name: str) -> str:
        """Why a check failed, in one line."""
        result = self.results[name]
        return f"{name}: {(result.error.splitlines() or [result.status.value])[0]}"


class _Hoped(Findings):
    """As if all passed: what is announced before anything runs."""

    def passed(self, name: str) -> bool:
        return True

    def failed(self, name: str) -> bool:
        return False


@dataclass(frozen=True)
class Kernels:
    """Which kernels a model runs.

    Attributes:
        attention: NKI or TORCH for each phase that has a kernel, by value.
    """

    deltanet: str = DeltaNetKernel.TORCH.value
    inverse: str = _TILED
    attention: Mapping[str, str] = field(default_factory=lambda: {phase.value: _TORCH for phase in ATTENTION})

    @property
    def fields(self) -> dict[str, Any]:
        """Of a `Qwen35NeuronConfig`, to run just these."""
        return {
            "deltanet_kernel": self.deltanet,
            "deltanet_inverse": self.inverse,
            "attention_kernel": dict(self.attention),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Of device settings: attention that works runs where it wins, so that it is `auto` there."""
        auto = AttentionKernel.AUTO.value
        chosen = {phase: kernel if kernel == _TORCH else auto for phase, kernel in self.attention.items()}
        return self.fields | {"attention_kernel": chosen}

    @property
    def prompts(self) -> str:
        """What encodes prompts in the DeltaNet layers, for people."""
        return self.deltanet + (f" ({self.inverse} inverse)" if self.deltanet in ("fused", "looped", "chunked") else "")

    def __str__(self) -> str:
        by_phase = ", ".join(f"{phase} {kernel}" for phase, kernel in self.attention.items())
        return f"DeltaNet {self.prompts}; attention: {by_phase}"


ALL_TORCH = Kernels()


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        tp: tensor-parallel degree beside 1.
        tier: this one and those below it.
        model: a real checkpoint, for tier 3.
    """

    tp: int
    tier: int
    model: Path | None = None


@dataclass(frozen=True)
class Conclusion:
    """What follows from the findings.

    Attributes:
        kernels: of the models that generated; None where none did.
        tp: the largest degree at which one did.
        failing: features of device settings, each with why.
    """

    kernels: Kernels | None
    tp: int
    failing: Mapping[str, str]


Steps = Generator[Check, None, Conclusion]


def checks(options: Options, found: Findings) -> Steps:
    """The checks in order; what comes after one depends on what `found` says by then."""
    yield Check(ENVIRONMENT, Kind.ENVIRONMENT, "devices, driver, packages, memory")
    if found.failed(ENVIRONMENT):
        return Conclusion(None, 0, {})
    alone = yield from _kernels(found)
    conclusion = yield from _minis(options, alone, found)
    if conclusion.kernels is not None and options.tier >= 2:
        conclusion = yield from _tier_2(conclusion, found)
    if conclusion.kernels is not None and options.tier >= 3:
        yield from _tier_3(options, conclusion)
    return conclusion


def announced(options: Options) -> list[Check]:
    """The checks if all of them pass."""
    return [*{check.name: check for check in checks(options, _Hoped({}))}.values()]


def conclude(options: Options, results: Mapping[str, Result]) -> Conclusion:
    """What all results together say."""
    steps = checks(options, Findings(results))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            conclusion: Conclusion = end.value
            return conclusion


def _kernels(found: Findings) -> Generator[Check, None, Kernels]:
    """Each default kernel alone, and where one fails what may take its place: those that work alone."""
    for name in DEFAULT_KERNELS:
        yield _kernel(name)
    attention = {phase.value: _NKI if found.passed(name) else _TORCH for phase, name in ATTENTION.items()}
    if found.passed("decode"):  # decoding has one kernel, whatever encodes prompts
        for kernel, inverse, names in DELTANET:
            for name in names:
                yield _kernel(name)
            if all(map(found.passed, names)):
                return Kernels(kernel.value, inverse.value, attention)
    return Kernels(attention=attention)


def _minis(options: Options, alone: Kernels, found: Findings) -> Steps:
    """The mini at TP=1 and at the degree asked for, with the kernels that work alone, or with fewer."""
    single = yield from _mini("mini-tp1", 1, alone, found)
    if options.tp == 1:
        return Conclusion(single, 1 if single else 0, _failing_drafts(single, found))
    name = f"mini-tp{options.tp}"
    parallel = yield from _mini(name, options.tp, single or alone, found)
    kernels, failing = parallel or single, _failing_drafts(parallel or single, found)
    if parallel is None and found.failed(name):
        failing |= {"tensor_parallel": found.reason(name)}
    return Conclusion(kernels, options.tp if parallel else 1 if single else 0, failing)


def _mini(name: str, tp: int, kernels: Kernels, found: Findings) -> Generator[Check, None, Kernels | None]:
    """The most kernels of `kernels` with which the mini says what it should; None if it does not without any."""
    yield _model(name, tp, kernels)
    if found.passed(name):
        return kernels
    if not found.failed(name) or kernels == ALL_TORCH:
        return None
    yield _model(f"{name}-torch", tp, ALL_TORCH)
    if not found.passed(f"{name}-torch"):
        return None
    for suffix, fewer in (
        ("deltanet", replace(kernels, attention=ALL_TORCH.attention)),
        ("attention", replace(ALL_TORCH, attention=kernels.attention)),
    ):
        if fewer in (kernels, ALL_TORCH):
            continue
        yield _model(f"{name}-{suffix}-kernels-only", tp, fewer)
        if found.passed(f"{name}-{suffix}-kernels-only"):
            return fewer
    return ALL_TORCH


def _failing_drafts(kernels: Kernels | None, found: Findings) -> dict[str, str]:
    if kernels is None or kernels.deltanet == DeltaNetKernel.TORCH.value:
        return {}  # without kernels drafts are verified in PyTorch
    failed = [found.reason(name) for name in ("verify", "commit") if found.failed(name)]
    return {"speculation": failed[0]} if failed else {}


def _tier_2(conclusion: Conclusion, found: Findings) -> Steps:
    """Every other kernel, alone and in the mini, and every feature with the kernels that work."""
    kernels = conclusion.kernels
    assert kernels is not None
    for name in OTHER_KERNELS:
        yield _kernel(name)
    for kernel, inverse in OTHER_MODELS:
        other = replace(kernels, deltanet=kernel.value, inverse=inverse.value)
        plain = f"-{inverse.value}" if inverse is DeltaNetInverse.PLAIN else ""
        yield _model(f"mini-{kernel.value}{plain}", 1, other)
    yield _model("mini-attention-torch", 1, replace(kernels, attention=ALL_TORCH.attention))
    failing = dict(conclusion.failing)
    for feature in Feature:
        if feature is Feature.GENERATION:
            continue
        name = f"mini-{feature.value.replace('_', '-')}"
        yield _feature(name, conclusion.tp, kernels, feature)
        if not found.failed(name):
            continue
        reason = found.reason(name)
        if kernels != ALL_TORCH:
            yield _feature(f"{name}-torch", conclusion.tp, ALL_TORCH, feature)
            if found.passed(f"{name}-torch"):
                reason += "; it works with deltanet_kernel='torch' and attention_kernel='torch'"
        failing.setdefault(feature.value, reason)
    return replace(conclusion, failing=failing)


def _tier_3(options: Options, conclusion: Conclusion) -> Generator[Check, None, None]:
    kernels = conclusion.kernels
    assert kernels is not None
    arguments: dict[str, Any] = {"tp_degree": conclusion.tp, "kernels": kernels.settings}
    yield Check("server", Kind.SERVER, "vLLM's server on the mini", 2, {**arguments, "kernels": kernels.fields})
    if options.model is not None:
        yield Check(
            "checkpoint",
            Kind.CHECKPOINT,
            f"{options.model.name} compiled and generating",
            2,
            {**arguments, "model": str(options.model)},
        )


def _kernel(name: str) -> Check:
    return Check(name, Kind.KERNEL, f"kernel {name} alone", 1, {"kernel": name})


def _model(name: str, tp: int, kernels: Kernels) -> Check:
    return _feature(name, tp, kernels, Feature.GENERATION)


def _feature(name: str, tp: int, kernels: Kernels, feature: Feature) -> Check:
    if feature is Feature.FP8_CACHE:  # no kernel reads it
        cached = {phase.value: _TORCH for phase in ATTENTION if phase.reads_cache}
        kernels = replace(kernels, attention={**kernels.attention, **cached})
    case = ModelCase(tp, kernels.fields, feature)
    runs = f"DeltaNet {kernels.prompts}" if feature is Feature.GENERATION else feature.value.replace("_", " ")
    what = f"the mini at TP={tp}: {runs}"
    return Check(name, Kind.MODEL, what, case.programs, case.as_json())
