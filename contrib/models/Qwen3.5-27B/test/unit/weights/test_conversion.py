# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Names matched with a small set of rules, and the lazy state dict; the real sets have tests of their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwen35.weights.checkpoint import CheckpointReader
from qwen35.weights.conversion import (
    ConversionError,
    LazyStateDict,
    Rule,
    RuleSet,
    Skipped,
    convert,
    rank_major,
)
from support.compare import assert_close

RULES = RuleSet(
    [
        Rule.of_one("table", (5, 2), torch.float32),
        Rule({"rows": (4, 2), "more_rows": (2, 2)}, {"fused": lambda a, b: torch.cat([a, b])}, torch.bfloat16),
        Rule.of_one("norm", (2,), torch.float32, lambda weight: 1 + weight, target="layernorm"),
        Rule({}, {"constant": lambda: torch.arange(3)}, torch.int32),
    ],
    prefixes=("model.part.", "part."),
    skipped={"mtp.": Skipped.MTP},
)


def source() -> dict[str, torch.Tensor]:
    """A checkpoint of the rules, with a tensor of another part."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for rule in RULES.rules for name, shape in rule.sources.items()}
    tensors = {f"part.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"model.other.weight": torch.ones(1)}


def refuse(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    with pytest.raises(ConversionError) as caught:
        convert(tensors, RULES)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


# Matching


def test_targets_are_built_from_the_sources_of_their_rule_in_the_rules_order_and_dtype() -> None:
    tensors = source()
    converted = convert(tensors, RULES)
    assert list(converted) == ["table", "fused", "layernorm", "constant"]
    assert_close(converted["table"], tensors["part.table"])
    assert_close(converted["fused"], torch.cat([tensors["part.rows"], tensors["part.more_rows"]]).bfloat16())
    assert_close(converted["layernorm"], 1 + tensors["part.norm"])
    assert converted["constant"].tolist() == [0, 1, 2] and converted["constant"].dtype == torch.int32


@pytest.mark.parametrize("prefix", RULES.prefixes)
def test_each_prefix_is_cut_off(prefix: str) -> None:
    renamed = {name.replace("part.", prefix): tensor for name, tensor in source().items()}
    names, _ = RULES.match(renamed)
    assert names == {name: prefix + name for name in ("table", "rows", "more_rows", "norm")}


def test_the_first_prefix_that_fits_is_cut_off_and_other_names_belong_to_another_part() -> None:
    rules = RuleSet([], ("model.part.", "model.", ""))
    assert [rules.plain_name(name) for name in ("model.part.x", "model.x", "part.x")] == ["x", "x", "part.x"]
    assert RULES.plain_name("model.other.weight") is None


def test_the_report_accounts_for_every_tensor_of_the_part() -> None:
    tensors = source()
    read = len(tensors) - 1, sum(tensor.nbytes for name, tensor in tensors.items() if "part" in name)
    tensors |= {"part.mtp.fc": torch.ones(3), "part.mtp.norm": torch.ones(2).bfloat16()}
    report = convert(tensors, RULES).report
    assert (report.consumed.count, report.consumed.nbytes) == read
    counted = {reason: (tally.count, tally.nbytes) for reason, tally in report.skipped.items()}
    assert counted == {reason: (2, 16) if reason is Skipped.MTP else (0, 0) for reason in Skipped}
    assert str(report) == "converted 4 tensors (0.000 GB); skipped: MTP 2 tensors (0.000 GB)"


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("part.table", None, "part.table is missing, shape [5, 2]"),
        ("part.strange", torch.ones(3, 2), "part.strange is unexpected, shape [3, 2]"),
        ("model.part.norm", torch.ones(2), "model.part.norm and part.norm are the same tensor, keep one"),
        ("part.rows", torch.ones(2, 4), "part.rows has shape [2, 4], expected [4, 2]"),
        (
            "part.norm",
            torch.ones(2, dtype=torch.int8),
            "part.norm is torch.int8, not bfloat16, float16 or float32; use the unquantised checkpoint",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name: str, tensor: torch.Tensor | None, problem: str) -> None:
    tensors = source()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    assert refuse(tensors) == [problem]


def test_two_rules_for_one_source_or_one_target_are_a_mistake_of_ours() -> None:
    once = Rule.of_one("x", (2,), torch.float32)
    with pytest.raises(AssertionError, match="two rules read"):
        convert({"x": torch.ones(2)}, RuleSet([once, Rule.of_one("x", (2,), torch.float32, target="y")], ("",)))
    with pytest.raises(AssertionError, match="two rules fill x"):
        convert({"x": torch.ones(2)}, RuleSet([once, Rule({}, {"x": lambda: torch.ones(2)}, torch.float32)], ("",)))


@given(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99))
def test_rank_major_gives_each_rank_its_share_of_every_block(ranks: int, shares: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(ranks * share, 2, generator=generator) for share in shares]
    for rank, rows in enumerate(rank_major(blocks, ranks).chunk(ranks)):
        expected = [block[rank * share : (rank + 1) * share] for block, share in zip(blocks, shares, strict=True)]
        assert_close(rows, torch.cat(expected), label=f"rank {rank} of {ranks}")


# Laziness


def test_conversion_reads_nothing_until_a_tensor_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(source(), tmp_path / "model.safetensors")
    read: list[str] = []
    real = CheckpointReader.__getitem__
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda self, name: read.append(name) or real(self, name))
    converted = convert(CheckpointReader(tmp_path), RULES)
    names = list(converted)
    assert "layernorm" in converted and "absent" not in converted and len(converted) == len(names)
    converted.copy()
    del converted["layernorm"]
    assert read == []
    converted["fused"]
    assert read == ["part.rows", "part.more_rows"]


def test_a_lazy_state_dict_is_a_mutable_mapping() -> None:
    lazy = LazyStateDict({"a": lambda: torch.ones(2), "b": torch.zeros(1)})
    assert lazy["a"] is lazy["a"]  # built once
    lazy["c"] = torch.full((1,), 3.0)
    assert lazy.pop("a").tolist() == [1, 1] and "a" not in lazy and list(lazy) == ["b", "c"]
    copied = lazy.copy()
    del copied["b"]
    assert list(lazy) == ["b", "c"] and list(copied) == ["c"]
    with pytest.raises(KeyError):
        lazy["a"]


def test_a_copy_shares_what_is_built_and_keeps_what_it_builds_to_itself() -> None:
    built: list[str] = []
    lazy = LazyStateDict({name: lambda name=name: built.append(name) or torch.ones(1) for name in "ab"})
    first = lazy["a"]
    copied = lazy.copy()
    assert copied["a"] is first and copied["b"] is copied["b"]
    assert copied["b"] is not lazy["b"]
    assert built == ["a", "b", "b"]


def test_materialise_empties_the_lazy_dict_and_frees_the_source_on_the_way() -> None:
    tensors = source()
    watched = weakref.ref(tensors["part.rows"])
    kept = tensors["part.table"]
    lazy = convert(tensors, RULES)
    tensors.clear()
    gc.collect()
    assert watched() is not None
    plain = lazy.materialise()
    assert len(lazy) == 0 and type(plain) is dict and plain["table"] is kept
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize(("at_conversion", "at_call", "shown"), [(True, None, True), (True, False, False),
                                                                (False, None, False), (False, True, True)])  # fmt: skip
def test_materialise_shows_a_bar_when_asked(
    capsys: pytest.CaptureFixture[str], at_conversion: bool, at_call: bool | None, shown: bool
) -> None:
    convert(source(), RULES, progress=at_conversion).materialise(at_call)
    assert ("converting" in capsys.readouterr().err) == shown
