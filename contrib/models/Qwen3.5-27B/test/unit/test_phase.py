# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The phase of a call is decided in one module; the others are read for comparisons that decide it again."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import qwen35
from qwen35.phase import Phase, Submodel, phase_of, real_tokens, submodel_of

PACKAGE = Path(qwen35.__file__).parent
KERNELS = ("ops", "nki_kernels", "cli/kernels")
"""Operators and kernels know no phases: what they compare are their own sizes."""

TOKEN_TENSORS = {"input_ids", "position_ids", "hidden_states", "inputs_embeds", "Q", "q", "qkv", "query"}
NXDI_FLAGS = {"is_prefill_stage", "is_for_context_encoding", "is_for_speculation"}
NXDI_GUESSES = {"_is_prefill", "_is_context_encoding", "_is_for_speculation"}


def decisions(source: str) -> list[str]:
    """The expressions of a module that tell a phase from shapes, positions, tags or NxDI's flags."""
    tree = ast.parse(source)
    counts = {name for node in ast.walk(tree) if isinstance(node, ast.Assign) for name in _counts_of(node)}
    return [ast.unparse(node) for node in ast.walk(tree) if _decides(node, counts)]


def _decides(node: ast.AST, counts: set[str]) -> bool:
    if isinstance(node, ast.Compare):
        if all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            return False  # whether something is given at all
        operands = [node.left, *node.comparators]
        parts = [part for operand in operands for part in ast.walk(operand)]
        numbers = any(isinstance(operand, ast.Constant) or _name(operand).isupper() for operand in operands)
        return (
            any(_name(part) == "tag" or _name(part).endswith("_TAG") for part in parts)
            or any(_reads_positions(operand) for operand in operands)
            or any(_is_token_count(part) for part in parts)
            or (numbers and any(_name(part) in counts for part in parts))
        )
    if isinstance(node, (ast.Name, ast.Attribute)):
        return isinstance(node.ctx, ast.Load) and _name(node) in NXDI_FLAGS
    return isinstance(node, ast.Call) and _name(node.func) in NXDI_GUESSES


def _counts_of(assignment: ast.Assign) -> list[str]:
    """The names that an assignment gives a number of tokens."""
    pairs = []
    for target in assignment.targets:
        if isinstance(target, ast.Tuple) and isinstance(assignment.value, ast.Tuple):
            pairs += zip(target.elts, assignment.value.elts, strict=False)
        else:
            pairs.append((target, assignment.value))
    return [_name(target) for target, value in pairs if _is_token_count(value)]


def _reads_positions(operand: ast.expr) -> bool:
    """Whether values of positions are in it; how many axes they have is no phase."""
    if isinstance(operand, ast.Call) and _name(operand.func) == "dim":
        return False
    return any(_name(part) == "position_ids" for part in ast.walk(operand))


def _is_token_count(node: ast.AST) -> bool:
    """Whether this is a size of a tensor that has tokens: `x.shape[i]`, `x.size(i)`, `len(x)`."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
        return _name(node.value.value) in TOKEN_TENSORS
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("size", "numel"):
        return _name(node.func.value) in TOKEN_TENSORS
    return isinstance(node, ast.Call) and _name(node.func) == "len" and _name(node.args[0]) in TOKEN_TENSORS


def _name(node: ast.AST) -> str:
    """The last word of what names a tensor: x, self.x, inputs["x"]."""
    if isinstance(node, ast.Subscript):
        return str(node.slice.value) if isinstance(node.slice, ast.Constant) else _name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_no_module_but_phase_decides_what_a_call_does() -> None:
    found = {
        str(file.relative_to(PACKAGE)): lines
        for file in PACKAGE.rglob("*.py")
        if not file.relative_to(PACKAGE).as_posix().startswith((*KERNELS, "phase.py"))
        and (lines := decisions(file.read_text(encoding="utf-8")))
    }
    assert not found, "pass the phase on instead"


@pytest.mark.parametrize(
    "line",
    [
        "if input_ids.shape[1] == 1: ...",
        "decodes = hidden_states.shape[-2] > 1",
        "few = 8 < Q.size(2)",
        "few = hidden_states.shape[1] <= kernels.MOST",
        "tokens = Q.shape[2]\nfew = tokens <= kernels.MOST",
        "batch, tokens = q.shape[0], q.shape[2]\nif tokens == 1: ...",
        "tokens = inputs['input_ids'].shape[1]\nif tokens == 1: ...",
        "prefill = len(self.input_ids) > 1",
        "begins = position_ids.min() == 0",
        "begins = (inputs.position_ids[:, 0] > 0).any()",
        "if self.tag == CONTEXT: ...",
        "prompt = name in (VISION_CONTEXT_ENCODING_MODEL_TAG,)",
        "if self.neuron_config.is_prefill_stage: ...",
        "def f(is_for_context_encoding):\n    return 1 if is_for_context_encoding else 2",
        "if self._is_prefill(positions): ...",
    ],
)
def test_a_planted_decision_is_found(line: str) -> None:
    assert decisions(line)


@pytest.mark.parametrize("line", ["if tokens <= chunk: ...", "if position_ids.dim() == 3: ...", "x = position_ids + 1"])
def test_sizes_that_tell_no_phase_may_be_compared(line: str) -> None:
    assert not decisions(line)


@pytest.mark.parametrize(
    ("positions", "phase"),
    [
        ([[0, 1, 2]], Phase.CONTEXT_ENCODING),
        ([[0, 1, 2], [0, 0, 0]], Phase.CONTEXT_ENCODING),
        ([[0]], Phase.CONTEXT_ENCODING),
        ([[5]], Phase.TOKEN_GENERATION),
        ([[5], [1]], Phase.TOKEN_GENERATION),
        ([[4, 5, 6], [2, 0, 0]], Phase.CONTINUATION),
    ],
    ids=["prompt", "padded prompts", "prompt of one token", "step", "steps", "continuation"],
)
def test_positions_tell_the_phase(positions: list[list[int]], phase: Phase) -> None:
    assert phase_of(torch.tensor(positions)) is phase


def test_rows_of_two_phases_in_one_call_are_refused() -> None:
    with pytest.raises(ValueError, match=r"position_ids start at \[0, 4\]: .* calls of their own"):
        phase_of(torch.tensor([[0, 1], [4, 5]]))


def test_positions_are_needed() -> None:
    with pytest.raises(ValueError, match="position_ids is None"):
        phase_of(None)


def test_padding_has_position_0_and_comes_last() -> None:
    prompts, continued = torch.tensor([[0, 1, 2], [0, 0, 0]]), torch.tensor([[4, 5, 0], [7, 0, 0]])
    real = real_tokens(prompts, Phase.CONTEXT_ENCODING)
    assert real is not None and real.tolist() == [[True, True, True], [True, False, False]]
    real = real_tokens(continued, Phase.CONTINUATION)
    assert real is not None and real.tolist() == [[True, True, False], [True, False, False]]
    assert real_tokens(torch.tensor([[5]]), Phase.TOKEN_GENERATION) is None


def test_every_submodel_is_found_by_its_tag_and_nxdi_knows_two() -> None:
    kinds = [Submodel(phase, with_media) for phase in Phase for with_media in (False, True)]
    assert [submodel_of(kind.tag) for kind in kinds] == kinds
    assert Submodel(Phase.CONTEXT_ENCODING).tag == "context_encoding_model"
    assert Submodel(Phase.TOKEN_GENERATION).tag == "token_generation_model"
