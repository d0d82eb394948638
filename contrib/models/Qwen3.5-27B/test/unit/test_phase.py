# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The phase of a call is decided in one module; the others are read for conditions that decide it again.

A condition may read neither a size nor a value of a tensor that has tokens, nor a tag, nor a flag of NxDI: whatever
reads one is refused, and what is harmless is listed in ALLOWED with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qwen35
from qwen35.phase import Phase, Submodel, cached_before, mask_of_prompts, phase_of, real_tokens, submodel_of

PACKAGE = Path(qwen35.__file__).parent
KERNELS = ("ops", "nki_kernels", "cli/kernels", "selftest/deltanet_cases")
"""Operators and kernels know no phases: what they compare are their own sizes."""

ALLOWED = {
    ("configuration_qwen35.py", "len(v) == 3"): "a value of config.json",
    ("layers/kernel_launch.py", "q.shape[1] % LOOP_TOKENS == 0"): "whether tokens, of any phase, are whole iterations",
    ("layers/mlp.py", "x.shape[0] * x.shape[1] > FEW_TOKENS"): "whether a kernel takes as many tokens, of any phase",
    ("modeling_qwen35.py", "len(outside)"): "tokens that the vocabulary does not have",
    ("modeling_qwen35.py", "tokens <= chunk"): "whether tokens, of any phase, exceed a configured size",
    ("serving/hf_adapter.py", "rows > slots"): "whether rows, of any phase, exceed a configured size",
    ("serving/hf_adapter.py", "value.shape[:1] == (total,)"): "which arguments have a row per prompt",
    (
        "serving/drafting.py",
        "phase_of(position_ids, attention_mask).encodes_prompts",
    ): "a call enters here: for the adapter it stands where the application does",
    ("submodels.py", "attention_mask.shape != input_ids.shape"): "a check of arguments, for prompts",
    ("submodels.py", "length in self.neuron_config.buckets"): "which size of a submodel, whose phase is known",
}
"""(file, condition) -> why it decides no phase."""

TOKEN_TENSORS = {"input_ids", "position_ids", "hidden_states", "inputs_embeds", "attention_mask"}
"""No condition reads a size or a value of these."""

ACTIVATIONS = {"hidden", "Q", "K", "V", "q", "k", "v", "x", "qkv", "query"}
"""No condition reads a size of these; their values tell no phase, and short names have other uses."""

POSITIONS = "position_ids"
NXDI_FLAGS = {"is_prefill_stage", "is_for_context_encoding", "is_for_speculation"}
NXDI_GUESSES = {"_is_prefill", "_is_context_encoding", "_is_for_speculation"}
COMPARISONS = {"any", "all", "bool", "eq", "ne", "lt", "le", "gt", "ge", "equal", "__eq__", "__ne__"}
"""Functions and methods whose arguments are conditions, as the operands of `==` are."""


def decisions(source: str) -> list[str]:
    """The conditions of a module that may tell a phase from sizes, values, tags or NxDI's flags."""
    finder = _DecisionFinder()
    finder.visit(ast.parse(source))
    return [*finder.found.values()]


class _DecisionFinder(ast.NodeVisitor):
    """Keeps the names that are token tensors and counts of tokens, as they are assigned, function by function."""

    def __init__(self) -> None:
        self.found: dict[ast.AST, str] = {}
        self.positions: frozenset[str] = frozenset({POSITIONS})
        self.valued: frozenset[str] = frozenset(TOKEN_TENSORS)
        self.tensors: frozenset[str] = frozenset(TOKEN_TENSORS | ACTIVATIONS)
        self.counts: frozenset[str] = frozenset()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.positions, self.valued, self.tensors, self.counts
        self.generic_visit(node)
        self.positions, self.valued, self.tensors, self.counts = outer

    def generic_visit(self, node: ast.AST) -> None:
        super().generic_visit(node)  # first what is inside: `(n := x.shape[1]) == 1`
        for target, value in _assignments(node):
            self._assign(target, value)
        for condition in _conditions(node):
            if self._reads(condition):
                self._keep(condition)
        # A mask made of values is no decision; a comparison of sizes, or of positions, is one wherever it stands.
        if any(map(self._tells, _compared(node))) or _is_one_token(node) or _asks_nxdi(node):
            self._keep(node)

    def _keep(self, node: ast.AST) -> None:
        self.found[node] = ast.unparse(node)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value] * len(target.elts)
            for part, of in zip(target.elts, values, strict=False):
                self._assign(part.value if isinstance(part, ast.Starred) else part, of)
        elif isinstance(target, ast.Name):
            if _is_of(self.positions, value):
                self.positions |= {target.id}
            if _is_of(self.valued, value):
                self.valued |= {target.id}
            if _is_of(self.tensors, value):
                self.tensors |= {target.id}
            if self._is_count(value):
                self.counts |= {target.id}

    def _is_count(self, node: ast.AST) -> bool:
        """A shape, a size, or a number made of them alone by arithmetic."""
        match node:
            case ast.Name():
                return node.id in self.counts
            case ast.Subscript():
                return self._is_count(node.value)
            case ast.Attribute():
                return node.attr in ("shape", "ndim") and self._has_tokens(node.value)
            case ast.Call(func=ast.Attribute(attr="size" | "numel" | "nelement" | "dim") as method):
                return self._has_tokens(method.value)
            case ast.Call(func=ast.Name(id="len")):
                return any(map(self._has_tokens, node.args))
            case ast.Call(func=ast.Name(id="int" | "min" | "max" | "list" | "tuple" | "sorted")):
                return any(map(self._is_count, node.args))
            case ast.BinOp():
                return self._is_count(node.left) or self._is_count(node.right)
        return False

    def _has_tokens(self, node: ast.AST) -> bool:
        """A token tensor, or what its methods return."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self._has_tokens(node.func.value)
        return _is_of(self.tensors, node)

    def _reads(self, node: ast.AST) -> bool:
        """Whether a count, a value of a token tensor or a tag is anywhere in a condition."""
        return self._tells(node) or any(_is_of(self.valued, part) for part in self._parts(node))

    def _tells(self, node: ast.AST) -> bool:
        """The same, of values only those of positions."""
        return any(
            self._is_count(part) or _is_of(self.positions, part) or _name(part) == "tag" or _name(part).endswith("_TAG")
            for part in self._parts(node)
        )

    def _parts(self, node: ast.AST) -> Iterator[ast.AST]:
        """The parts of a condition, but not what is found already, nor what is the same for any number of tokens.

        That is whether a tensor is given at all, its dtype and device, and the number of axes of positions.
        """
        match node:
            case ast.Compare() if _is_identity(node):
                return
            case ast.Attribute(attr="dtype" | "device" | "is_meta"):
                return
            case ast.Call(func=ast.Attribute(attr="dim", value=value)) if _is_of(self.positions, value):
                return
        if node not in self.found:
            yield node
            for child in ast.iter_child_nodes(node):
                yield from self._parts(child)


def _conditions(node: ast.AST) -> Iterator[ast.AST]:
    """What is asked for its truth, or chooses a branch."""
    match node:
        case ast.If() | ast.IfExp() | ast.While() | ast.Assert():
            yield node.test
        case ast.BoolOp():
            yield from node.values
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.comprehension():
            yield from node.ifs
        case ast.Match():
            yield node.subject
        case ast.match_case(guard=ast.expr() as guard):
            yield guard
        case ast.Subscript(value=ast.Dict()):
            yield node.slice
        case ast.Call(func=ast.Attribute(attr="get", value=ast.Dict())):
            yield from node.args
        case ast.Call(func=ast.Name(id="any" | "all" | "bool")):
            yield from node.args


def _compared(node: ast.AST) -> Iterator[ast.AST]:
    """What is compared, in a condition or elsewhere."""
    match node:
        case ast.Compare() if not _is_identity(node):
            yield from (node.left, *node.comparators)
        case ast.Call() if _name(node.func) in COMPARISONS:
            yield from node.args
            if isinstance(node.func, ast.Attribute):
                yield node.func.value
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith") as method):
            yield method.value


def _asks_nxdi(node: ast.AST) -> bool:
    match node:
        case ast.Name(ctx=ast.Load()) | ast.Attribute(ctx=ast.Load()):
            return _name(node) in NXDI_FLAGS
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(flag)), *_]):
            return flag in NXDI_FLAGS | NXDI_GUESSES
        case ast.Call():
            return _name(node.func) in NXDI_GUESSES
    return False


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    match node:
        case ast.Assign():
            yield from ((target, node.value) for target in node.targets)
        case ast.AnnAssign(value=ast.expr() as value) | ast.NamedExpr(value=value):
            yield node.target, value
        case ast.comprehension():
            yield node.target, node.iter


def _is_identity(node: ast.Compare) -> bool:
    return all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)


def _is_one_token(node: ast.AST) -> bool:
    """Whether a size of whatever tensor is compared with 1."""
    if not isinstance(node, ast.Compare):
        return False
    operands = [node.left, *node.comparators]
    return any(isinstance(operand, ast.Constant) and operand.value == 1 for operand in operands) and any(
        isinstance(operand, ast.Subscript) and _name(operand.value) == "shape" for operand in operands
    )


def _is_of(names: frozenset[str], node: ast.AST) -> bool:
    """x, self.x, inputs["x"], x[0], for a name x of them."""
    return _name(node) in names or (isinstance(node, ast.Subscript) and _is_of(names, node.value))


def _name(node: ast.AST) -> str:
    """The last word of what names a tensor: x, self.x, inputs["x"], inputs.get("x")."""
    if isinstance(node, ast.Subscript):
        return str(node.slice.value) if isinstance(node.slice, ast.Constant) else _name(node.value)
    match node:
        case ast.Call(func=ast.Attribute(attr="get" | "pop"), args=[ast.Constant(value=str(key)), *_]):
            return key
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_no_module_but_phase_decides_what_a_call_does() -> None:
    found = {
        (path, condition)
        for file in PACKAGE.rglob("*.py")
        if not (path := file.relative_to(PACKAGE).as_posix()).startswith((*KERNELS, "phase.py"))
        for condition in decisions(file.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED.keys(), "pass the phase on instead"


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
        "n = input_ids.shape[1]\nif not n - 1: ...",
        "_, n = input_ids.shape\nif n == 1: ...",
        "b, n, *_ = hidden_states.shape\nif n == 1: ...",
        "x = input_ids\nif x.shape[1] == 1: ...",
        "if input_ids.shape[1:] == (1,): ...",
        "match input_ids.shape[1]:\n    case 1: ...",
        "if getattr(cfg,'is_prefill_stage'): ...",
        "if any(n == 1 for n in input_ids.shape): ...",
        "if input_ids.shape == (2, 1): ...",
        "if list(input_ids.shape)[1] == 1: ...",
        "p = position_ids\nif p[0,0] == 0: ...",
        "if not position_ids.any(): ...",
        "if position_ids.any(): ...",
        "if torch.equal(position_ids, zeros): ...",
        "if x.eq(position_ids).all(): ...",
        "if position_ids[0, 0]: ...",
        "if bool(input_ids.shape[1] - 1): ...",
        "n: int = input_ids.shape[1]\nif n == 1: ...",
        "if (n := input_ids.shape[1]) == 1: ...",
        "n = input_ids.shape[1]\nif 1 == n: ...",
        "def one(t): return t.shape[1] == 1\none(input_ids)",
        "n = input_ids.shape[1]\nif n in (1,): ...",
        "n = K.shape[2]\nif n == 1: ...",
        "tokens = x.shape[1]\nif tokens == 1: ...",
        "if input_ids.squeeze(1).dim() == 1: ...",
        "if attention_mask.shape[1] == 1: ...",
        "if hidden.shape[1] == 1: ...",
        "if self.tag.startswith('context'): ...",
        "if 'context' in self.tag: ...",
        "match self.tag:\n    case 'a': ...",
        "kind = {'a': 1}[self.tag]",
        "while input_ids.shape[1] > 1: ...",
        "if operator.eq(input_ids.shape[1],1): ...",
        "if input_ids.shape[-1].__eq__(1): ...",
        "if sorted(input_ids.shape) == [1,2]: ...",
        "if input_ids.ndim - 1: ...",
        "decode = not (input_ids.shape[1] - 1)",
        "f = {1: a}.get(input_ids.shape[1], b)",
        "if max(input_ids.shape[1], 1) == 1: ...",
        "if kwargs['input_ids'].size(dim=1) == 1:...",
        "if input_ids.nelement() == 1: ...",
        "assert inputs_embeds.size(1) == n",
        "few = K.numel() < MOST",
        "rows = [row for row in rows if hidden_states.shape[1] - 1]",
        "def f(tokens):\n    return tokens\nq = self.query\nif q.shape[2] - 1: ...",
        "if getattr(config, '_is_prefill')(x): ...",
        "if given and position_ids[0, -1]: ...",
        "first = position_ids[:, 0]\nbegins = first == 0",
        "if kwargs.get('input_ids').shape[1] - 1: ...",
    ],
)
def test_a_planted_decision_is_found(line: str) -> None:
    assert decisions(line)


@pytest.mark.parametrize(
    "line",
    [
        "if tokens <= chunk: ...",
        "if position_ids.dim() == 3: ...",
        "x = position_ids + 1",
        "if position_ids is None: ...",
        "if not q.is_meta and qkv.dtype != torch.float32: ...",
        "real = attention_mask > 0",
        "phase = phase_of(position_ids)\nif phase is Phase.CONTINUATION: ...",
        "def f():\n    tokens = input_ids.shape[1]\ndef g(tokens):\n    return tokens == chunk",
    ],
)
def test_what_tells_no_phase_may_be_asked(line: str) -> None:
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


def test_a_step_with_drafts_may_be_padded_and_is_no_prompt() -> None:
    positions = torch.tensor([[4, 5, 0], [7, 0, 0]])
    for phase in (Phase.SPECULATION, Phase.VERIFICATION, Phase.DRAFT):
        assert phase.drafts and phase.reads_cache and not phase.encodes_prompts
        real = real_tokens(positions, phase)
        assert real is not None and real.tolist() == [[True, True, False], [True, False, False]]
    assert [phase for phase in Phase if phase.continues] == [Phase.CONTINUATION, Phase.VERIFICATION]


def test_places_before_the_first_token_are_cached() -> None:
    before = cached_before(torch.tensor([[3, 4], [1, 0]]), 5)
    assert before.tolist() == [[True, True, True, False, False], [True, False, False, False, False]]


def test_every_submodel_is_found_by_its_tag_and_nxdi_knows_two() -> None:
    kinds = [Submodel(phase, with_media) for phase in Phase for with_media in (False, True)]
    assert [submodel_of(kind.tag) for kind in kinds] == kinds
    assert Submodel(Phase.CONTEXT_ENCODING).tag == "context_encoding_model"
    assert Submodel(Phase.TOKEN_GENERATION).tag == "token_generation_model"


@pytest.mark.parametrize(
    ("positions", "mask"),
    [([[0]], [[1]]), ([[0], [0]], [[1], [1]]), ([[0, 1, 2], [0, 0, 0]], [[1, 1, 1], [1, 0, 0]])],
)
def test_the_tokens_of_prompts_without_a_mask_are_told_by_their_positions(
    positions: list[list[int]], mask: list[list[int]]
) -> None:
    assert mask_of_prompts(torch.tensor(positions)).tolist() == mask
