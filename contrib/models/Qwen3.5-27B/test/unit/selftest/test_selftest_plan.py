# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which checks follow which findings; that what settings say was seen to work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35.selftest.outcome import Result, Status
from qwen35.selftest.plan import (
    ALL_TORCH,
    DEFAULT_KERNELS,
    Check,
    Conclusion,
    Findings,
    Kernels,
    Kind,
    Options,
    announced,
    checks,
    conclude,
)

NKI = {"context_encoding": "nki", "continuation": "nki", "token_generation": "nki"}
ALL_KERNELS = Kernels("fused", "tiled", NKI)


def simulate(options: Options, outcome: Callable[[Check], Status]) -> tuple[dict[str, Check], Conclusion]:
    """What runs, and what follows, where `outcome` says how each check ends."""
    results: dict[str, Result] = {}
    ran: dict[str, Check] = {}
    for check in checks(options, Findings(results)):
        assert ran.setdefault(check.name, check) == check, "one name, one check"
        if check.name not in results:
            status = outcome(check)
            results[check.name] = Result(status, error="it said so\nand more" if status.is_failure else "")
    return ran, conclude(options, results)


def failing(*names: str) -> Callable[[Check], Status]:
    return lambda check: Status.FAILED if check.name in names else Status.PASSED


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tier_1_compiles_at_most_12_programs(tp: int) -> None:
    planned = announced(Options(tp, 1))
    assert sum(check.programs for check in planned) <= 12
    minis = ["mini-tp1", *([f"mini-tp{tp}"] if tp > 1 else [])]
    assert [check.name for check in planned] == ["environment", *DEFAULT_KERNELS, *minis]
    assert len({check.name for check in planned}) == len(planned)


def test_the_tiers_compile_as_many_programs_as_the_document_says() -> None:
    """docs/selftest.md: 8 and 4; 7, 14 and 20; 2 and 2."""
    programs = [sum(check.programs for check in announced(Options(4, tier, Path("model")))) for tier in (1, 2, 3)]
    assert programs == [12, 12 + 41, 12 + 41 + 4]


def test_where_all_passes_all_default_kernels_are_taken() -> None:
    ran, conclusion = simulate(Options(4, 1), failing())
    assert [*ran] == [check.name for check in announced(Options(4, 1))]
    assert conclusion == Conclusion(ALL_KERNELS, 4, {})
    auto = dict.fromkeys(NKI, "auto")
    assert ALL_KERNELS.settings == {
        "deltanet_kernel": "fused", "deltanet_inverse": "tiled", "attention_kernel": auto,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("failed", "tried", "kernels"),
    [
        (["fused"], ["fused-plain", "fused-plain-after-state"], Kernels("fused", "plain", NKI)),
        (["fused-after-state", "fused-plain"], ["chunked"], Kernels("chunked", "tiled", NKI)),
        (["fused", "fused-plain", "chunked"], ["chunked-plain"], Kernels("chunked", "plain", NKI)),
        (["fused", "fused-plain", "chunked", "chunked-plain"], ["chunked-plain"], Kernels(attention=NKI)),
        (["decode"], [], Kernels(attention=NKI)),
        (["attention-prompt"], [], Kernels("fused", "tiled", NKI | {"context_encoding": "torch"})),
        (["attention-decode"], [], Kernels("fused", "tiled", NKI | {"token_generation": "torch"})),
    ],
)
def test_what_takes_the_place_of_a_failing_kernel_is_tried(
    failed: list[str], tried: list[str], kernels: Kernels
) -> None:
    ran, conclusion = simulate(Options(2, 1), failing(*failed))
    assert {*tried} <= {*ran}
    assert conclusion.kernels == kernels and conclusion.tp == 2
    assert not any("plain" in name or "chunked" in name for name in ran) or tried


def test_drafts_fail_with_a_kernel_of_theirs_unless_deltanet_is_in_torch() -> None:
    assert simulate(Options(1, 1), failing("commit"))[1].failing == {"speculation": "commit: it said so"}
    assert simulate(Options(1, 1), failing("commit", "decode"))[1].failing == {}


@pytest.mark.parametrize(
    ("failed", "kernels"),
    [
        (["mini-tp1"], Kernels("fused", "tiled")),
        (["mini-tp1", "mini-tp1-deltanet-kernels-only"], Kernels(attention=NKI)),
        (["mini-tp1", "mini-tp1-deltanet-kernels-only", "mini-tp1-attention-kernels-only"], ALL_TORCH),
        (["mini-tp1", "mini-tp1-torch"], None),
    ],
)
def test_a_mini_that_fails_is_tried_with_fewer_kernels(failed: list[str], kernels: Kernels | None) -> None:
    assert simulate(Options(1, 1), failing(*failed))[1].kernels == kernels


def test_a_degree_at_which_nothing_works_is_a_feature_that_fails() -> None:
    ran, conclusion = simulate(Options(4, 2), failing("mini-tp4", "mini-tp4-torch"))
    assert conclusion.kernels == ALL_KERNELS and conclusion.tp == 1
    assert conclusion.failing == {"tensor_parallel": "mini-tp4: it said so"}
    assert ran["mini-batch"].arguments["tp_degree"] == 1


def test_a_failing_feature_is_tried_without_kernels_and_the_settings_say_both() -> None:
    ran, conclusion = simulate(Options(1, 2), failing("mini-vision"))
    assert "mini-vision-torch" in ran and "mini-batch-torch" not in ran
    assert conclusion.failing["vision"] == (
        "mini-vision: it said so; it works with deltanet_kernel='torch' and attention_kernel='torch'"
    )
    assert simulate(Options(1, 2), failing("mini-vision", "mini-vision-torch"))[1].failing == {
        "vision": "mini-vision: it said so"
    }


def test_nothing_else_runs_where_the_environment_fails() -> None:
    ran, conclusion = simulate(Options(4, 3), failing("environment"))
    assert [*ran] == ["environment"] and conclusion.kernels is None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_kernels_are_those_of_a_mini_that_passed_whatever_else_happens(data: st.DataObject) -> None:
    options = Options(data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2, 3])))
    outcomes = st.sampled_from([Status.PASSED, *Status])
    seen: dict[str, Status] = {}

    def outcome(check: Check) -> Status:
        return seen.setdefault(check.name, data.draw(outcomes))

    ran, conclusion = simulate(options, outcome)
    passed = [check for check in ran.values() if check.kind is Kind.MODEL and seen[check.name] is Status.PASSED]
    generated = [check for check in passed if check.arguments["feature"] == "generation"]
    if conclusion.kernels is None:
        assert not [check for check in generated if check.name.startswith("mini-tp")]
    else:
        kernels = [(check.arguments["tp_degree"], check.arguments["kernels"]) for check in generated]
        assert (conclusion.tp, conclusion.kernels.fields) in kernels
