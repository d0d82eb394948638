# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Find Python in a kernel that the NKI compiler does not take, and calls that a version of NKI does not have.

The NKI language is a subset of Python that is compiled from source, while this emulator, like the official simulator,
executes any Python. The linter reads the source of a kernel and of the plain helper functions it calls, and reports
what lies outside the subset. Rules stated by a page cite it; the rest follows from the closed list of values,
containers and statements of the language guide, and says so. `nki_versions.json` has the names and parameters of each
version, as `tools/record_nki_signatures.py` finds them in the documentation.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from .errors import NkiValidationError

_GUIDE = "nki/get-started/nki-language-guide.rst"
_VALUES = f"{_GUIDE}, NKI Values"
_FLOW = f"{_GUIDE}, Control Flow"
_SUBSET = f"inferred: not among the constructs of {_GUIDE}"
_UPDATE = "nki/migration/index.rst, Language restrictions"
_UNSHOWN = f"no example in {_GUIDE}"
_MIGRATION = "nki/deep-dives/nki-beta2-migration-guide.rst"
_LOOPS = "nki/deep-dives/nki-dynamic-loops.rst"
_API = "nki/api/nki/__init__.py and the stubs beside it"
_PACKAGES = ("nki", "nki_emulator")

#: Statements and expressions that are never part of the language: node type -> (rule, what to say, source).
_FORBIDDEN: dict[type[ast.AST], tuple[str, str, str]] = {
    ast.Try: ("try", "try/except is no NKI statement; assert on compile-time values instead", _SUBSET),
    ast.Yield: ("generator", "generators are not part of NKI; build a list", _SUBSET),
    ast.YieldFrom: ("generator", "generators are not part of NKI; build a list", _SUBSET),
    ast.GeneratorExp: ("generator", "generator expressions are not part of NKI; use a loop or a list", _SUBSET),
    ast.Await: ("async", "await is no NKI expression", _SUBSET),
    ast.AsyncFor: ("async", "async for is no NKI statement", _SUBSET),
    ast.AsyncWith: ("async", "async with is no NKI statement", _SUBSET),
    ast.Lambda: ("lambda", "lambda is not part of NKI; write a function at module level", _SUBSET),
    ast.Global: ("global", "a kernel cannot change module state; pass and return values", _SUBSET),
    ast.Nonlocal: ("global", "a kernel cannot change the variables of another function", _SUBSET),
    ast.ClassDef: ("class", "define classes at module level, derived from NKIObject", f"{_GUIDE}, Class Support"),
    ast.Import: ("import", "import at module level", _SUBSET),
    ast.ImportFrom: ("import", "import at module level", _SUBSET),
    ast.Delete: ("del", "del is no NKI statement", _SUBSET),
    ast.Set: ("set", "containers are tuples, lists, dictionaries with string keys, and NKIObject classes", _VALUES),
    ast.SetComp: ("set", "containers are tuples, lists, dictionaries with string keys, and NKIObject classes", _VALUES),
    ast.Match: ("match", "match is no NKI statement; use if", _FLOW),
    ast.ListComp: ("comprehension", "comprehensions are not shown; append in a loop over a range", _UNSHOWN),
    ast.DictComp: ("comprehension", "comprehensions are not shown; assign in a loop over a range", _UNSHOWN),
    ast.BitAnd: ("bit-operator", "operators on bits are not shown; use arithmetic or a table", _UNSHOWN),
    ast.BitOr: ("bit-operator", "operators on bits are not shown; use arithmetic or a table", _UNSHOWN),
    ast.BitXor: ("bit-operator", "operators on bits are not shown; use arithmetic or a table", _UNSHOWN),
    ast.LShift: ("bit-operator", "operators on bits are not shown; use arithmetic or a table", _UNSHOWN),
    ast.RShift: ("bit-operator", "operators on bits are not shown; use arithmetic or a table", _UNSHOWN),
    ast.Invert: ("bit-operator", "operators on bits are not shown; use arithmetic or a table", _UNSHOWN),
}

#: Methods of lists that the guide does not show; it has append, extend, index, remove and reverse.
_UNSHOWN_LIST_METHODS = frozenset({"clear", "copy", "count", "insert", "pop", "sort"})

#: Loops that a version's documentation deprecates: name -> (first such version, what to write instead).
_DEPRECATED = {
    "nki.language.affine_range": ("0.3.0", "range"),
    "nki.language.sequential_range": ("0.3.0", "range"),
    "nki.language.static_range": ("0.6.0", "range"),
    "nki.language.dynamic_range": ("0.6.0", "nl.fori_loop"),
}

#: Calls of ``nki.language`` whose result is a tensor, for the rules about tensors.
_CREATORS = frozenset(
    "ndarray zeros ones full empty_like zeros_like load load_transpose2d copy matmul transpose softmax rms_norm "
    "shared_constant shared_identity_matrix where broadcast_to".split()
)
#: Libraries that compute on the host.
_HOST_LIBRARIES = frozenset({"numpy", "torch", "jax", "scipy", "ml_dtypes"})


@dataclass(frozen=True)
class Finding:
    """One construct outside the language.

    Attributes:
        rule: short name of the rule.
        file, line: where.
        message: what is wrong and what to write instead.
        source: page that states the rule.
    """

    rule: str
    file: str
    line: int
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.message} ({self.source})"


def nki_versions() -> list[str]:
    """The versions of NKI that :func:`lint_kernel` knows, oldest first."""
    return list(_recorded()["versions"])


def lint_kernel(kernel: Any, version: str | None = None) -> list[Finding]:
    """Findings in a kernel and in the helper functions that it calls, by file and line.

    Args:
        kernel: a plain function or one decorated by ``nki.jit``. Helpers are found through the module globals of the
            function; functions of libraries and of this package are not followed.
        version: one of :func:`nki_versions`: also check every name of ``nki.isa`` and ``nki.language`` and every call
            against that version. An argument given by position is refused if another version has another one there.

    Raises:
        OSError: the source of the kernel is not available.
        ValueError: the version is not recorded.
    """
    root = _function(kernel)
    names = None if version is None else _names(version)
    findings: list[Finding] = []
    queue, seen = [(root, True)], {root}
    while queue:
        function, is_kernel = queue.pop(0)
        visitor = _Visitor(function, is_kernel, version, names)
        findings += visitor.run()
        for callee in visitor.callees:
            if callee not in seen:
                seen.add(callee)
                queue.append((callee, False))
    return sorted(findings, key=lambda f: (f.file, f.line))


def check_kernel(kernel: Any) -> None:
    """Raise if :func:`lint_kernel` finds anything.

    Raises:
        NkiValidationError: with every finding on its own line.
    """
    findings = lint_kernel(kernel)
    if findings:
        name = getattr(kernel, "__name__", "kernel")
        raise NkiValidationError(f"{name}: {len(findings)} construct(s) outside NKI\n" + "\n".join(map(str, findings)))


@functools.cache
def _recorded() -> Any:
    return json.loads(Path(__file__).with_name("nki_versions.json").read_text(encoding="utf-8"))


@functools.cache
def _names(version: str) -> dict[str, str]:
    """{full name: parameters in parentheses, or nothing} of a version."""
    if version not in nki_versions():
        raise ValueError(f"version={version!r} is not recorded; use one of {', '.join(nki_versions())}")
    older = nki_versions()[: nki_versions().index(version) + 1]
    names = {}
    for name, changes in _recorded()["names"].items():
        current = [changes[v] for v in older if v in changes]
        if current and current[-1] is not None:
            names[name] = current[-1]
    return names


@functools.cache
def _parameters(signature: str) -> ast.arguments:
    """The parameters of a recorded "(a, b=1)"."""
    definition = ast.parse(f"def f{signature}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition.args


def _places(name: str) -> dict[str, list[str]]:
    """Parameters of a function by position, by the versions that have it."""
    found = {}
    for version in nki_versions():
        signature = _names(version).get(name)
        if signature:
            arguments = _parameters(signature)
            found[version] = [p.arg for p in (*arguments.posonlyargs, *arguments.args)]
    return found


def _function(kernel: Any) -> FunctionType:
    function = inspect.unwrap(getattr(kernel, "function", kernel))
    if not isinstance(function, FunctionType):
        raise TypeError(f"{kernel!r} is no Python function")
    return function


class _Visitor(ast.NodeVisitor):
    """Rules over the source of one function."""

    def __init__(
        self, function: FunctionType, is_kernel: bool, version: str | None, names: dict[str, str] | None
    ) -> None:
        self.function = function
        self.is_kernel = is_kernel
        self.version = version
        self.names = names
        self.file = inspect.getsourcefile(function) or "<unknown>"
        lines, self.first_line = inspect.getsourcelines(function)
        self.tree = ast.parse(textwrap.dedent("".join(lines)))
        self.findings: list[Finding] = []
        self.callees: list[FunctionType] = []
        self.tensors: set[str] = set()
        self.no_reorder = 0
        self.loops = 0

    def run(self) -> list[Finding]:
        definition = self.tree.body[0]
        assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(definition, ast.AsyncFunctionDef):
            self._report(definition, "async", "async functions are not part of NKI", _SUBSET)
        self._closure(definition)
        self._signature(definition)
        self.tensors = {name for node in ast.walk(definition) for name in self._created(node)}
        for statement in definition.body:
            self.visit(statement)
        return self.findings

    def _report(self, node: ast.AST, rule: str, message: str, source: str) -> None:
        line = self.first_line + getattr(node, "lineno", 1) - 1
        self.findings.append(Finding(rule, self.file, line, message, source))

    def generic_visit(self, node: ast.AST) -> None:
        for kind, (rule, message, source) in _FORBIDDEN.items():
            if isinstance(node, kind):
                self._report(node, rule, message, source)
        super().generic_visit(node)

    # --- The function itself --------------------------------------------------------------------------------------
    def _closure(self, definition: ast.AST) -> None:
        for name, cell in zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=False):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            if isinstance(value, (list, dict, set)):
                self._report(definition, "closure", f"it captures the mutable {name}; pass it as an argument", _SUBSET)

    def _signature(self, definition: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        args = definition.args
        if args.vararg is not None:
            self._report(args.vararg, "varargs", f"*{args.vararg.arg}: parameters are named one by one", _SUBSET)
        if args.kwarg is not None:
            self._report(args.kwarg, "varargs", f"**{args.kwarg.arg}: parameters are named one by one", _SUBSET)
        if args.kwonlyargs and args.vararg is None:
            self._report(args.kwonlyargs[0], "keyword-only", "the * separator is not supported", _UPDATE)
        if self.is_kernel:
            for default in [*args.defaults, *(d for d in args.kw_defaults if d is not None)]:
                if isinstance(default, (ast.List, ast.Dict, ast.Set)):
                    self._report(default, "list-argument", "a kernel argument is a tuple, not a list", _UPDATE)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._report(node, "nested-function", f"{node.name}: define functions at module level", _SUBSET)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._report(node, "async", f"{node.name}: async functions are not part of NKI", _SUBSET)

    # --- Statements -----------------------------------------------------------------------------------------------
    def visit_With(self, node: ast.With) -> None:
        regions = [self._called(item.context_expr) for item in node.items]
        if regions != ["no_reorder"]:
            self._report(
                node, "with", "the only context manager is nl.no_reorder()", "nki/api/nki/language/__init__.py"
            )
            self.generic_visit(node)
            return
        self.no_reorder += 1
        self.generic_visit(node)
        self.no_reorder -= 1

    def visit_For(self, node: ast.For) -> None:
        if node.orelse:
            self._report(node, "loop-else", "for ... else is no NKI statement", _SUBSET)
        if self.no_reorder and self._called(node.iter) == "dynamic_range":
            self._report(node, "dynamic-no-reorder", "dynamic_range does not work inside nl.no_reorder()", _LOOPS)
        if not isinstance(node.target, ast.Name):
            self._report(node, "loop-target", "a loop has one name; unpack in an assignment of its own", _UNSHOWN)
        self._visit_loop(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node, node.test, "while")
        if node.orelse:
            self._report(node, "loop-else", "while ... else is no NKI statement", _SUBSET)
        self._visit_loop(node)

    def _visit_loop(self, node: ast.For | ast.While) -> None:
        self.loops += 1
        self.generic_visit(node)
        self.loops -= 1

    def visit_Return(self, node: ast.Return) -> None:
        if self.loops:
            self._report(node, "return-in-loop", "set a variable and return it after the loop", _UNSHOWN)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._condition(node, node.test, "if")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node, node.test, "if")
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self._condition(node, node.test, "assert")
        self.generic_visit(node)

    def _condition(self, node: ast.AST, test: ast.expr, word: str) -> None:
        for name in self._tensor_values(test):
            self._report(
                node,
                "data-dependent",
                f"{word} depends on the content of tensor {name}; load it into a register (nisa.register_load)",
                f"{_GUIDE}, Dynamic Control Flow",
            )

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._store(target)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._store(node.target)
        if isinstance(node.target, ast.Name) and node.target.id in self.tensors:
            self._report(
                node, "tile-operator", f"{node.target.id} is a tensor; use an instruction with dst=", _MIGRATION
            )
        self.generic_visit(node)

    def _store(self, target: ast.expr) -> None:
        if isinstance(target, ast.Subscript) and self._base(target) in self.tensors:
            message = f"{self._base(target)}[...] = ...: only an instruction with dst= writes a tensor"
            self._report(target, "tile-assignment", message, f"{_MIGRATION}, All ISA functions")

    # --- Expressions ----------------------------------------------------------------------------------------------
    def visit_Compare(self, node: ast.Compare) -> None:
        if any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self._report(node, "is", "'is' and 'is not' are not supported; use == and !=", _UPDATE)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        for side in (node.left, node.right):
            if isinstance(side, (ast.Name, ast.Subscript)) and self._base(side) in self.tensors:
                name = self._base(side)
                self._report(node, "tile-operator", f"arithmetic on tensor {name}; use an instruction", _MIGRATION)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key in node.keys:
            if isinstance(key, ast.Constant) and not isinstance(key.value, str):
                self._report(node, "dict-key", f"key {key.value!r}: keys are strings", _VALUES)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._nki_name(node)
        if path is None or self.names is None:
            self.generic_visit(node)
        elif path not in self.names:
            self._report(node, "version", f"{path} is not in NKI {self.version}", _API)
        elif path in _DEPRECATED and _at_least(self.version, _DEPRECATED[path][0]):
            since, instead = _DEPRECATED[path]
            self._report(node, "deprecated", f"{path}: use {instead}, as NKI says from {since} on", _API)

    def _check_call(self, node: ast.Call) -> None:
        """Hold a call of NKI against the parameters of the version."""
        path = self._nki_name(node.func)
        signature = "" if path is None or self.names is None else self.names.get(path, "")
        if path is None or not signature:
            return
        parameters = _parameters(signature)
        places = [p.arg for p in (*parameters.posonlyargs, *parameters.args)]
        known = {*places, *(p.arg for p in parameters.kwonlyargs)}
        given = [k.arg for k in node.keywords if k.arg is not None]
        for keyword in given:
            if keyword not in known and parameters.kwarg is None:
                self._report(node, "version", f"{path} of NKI {self.version} has no parameter {keyword}", _API)
        if len(node.args) > len(places) and parameters.vararg is None:
            self._report(node, "version", f"{path} of NKI {self.version} takes {len(places)} arguments", _API)
        by_place = places[: len(node.args)]
        required = places[: len(places) - len(parameters.defaults)]
        missing = [name for name in required if name not in {*by_place, *given}]
        if missing:
            self._report(node, "version", f"{path} of NKI {self.version} needs {', '.join(missing)}", _API)
        for place, name in enumerate(by_place):
            names = {version: other[place] for version, other in _places(path).items() if place < len(other)}
            if len({*names.values()}) > 1:
                others = ", ".join(f"{other} in {version}" for version, other in names.items() if other != name)
                message = f"{path}: argument {place + 1} is {name} in NKI {self.version}, {others}; give it by name"
                self._report(node, "by-name", message, _API)

    def visit_Call(self, node: ast.Call) -> None:
        self._check_call(node)
        if isinstance(node.func, ast.Attribute) and not isinstance(self._resolve_root(node.func), ModuleType):
            first = node.args[0] if node.args else None
            by_key = node.func.attr == "pop" and isinstance(first, ast.Constant) and isinstance(first.value, str)
            if node.func.attr in _UNSHOWN_LIST_METHODS and not by_key:
                message = f".{node.func.attr}() of a list is not shown; build another list by append"
                self._report(node, "list-method", message, _UNSHOWN)
        target = self._resolve(node.func)
        module = getattr(target, "__module__", "") or ""
        root = self._resolve_root(node.func)
        library = root.__name__.split(".")[0] if isinstance(root, ModuleType) else module.split(".")[0]
        if library in _HOST_LIBRARIES:
            text = ast.unparse(node.func)
            self._report(node, "host-library", f"{text}(...) runs on the host; use nki.isa or nki.language", _GUIDE)
        elif type(target).__name__ == "Kernel" and hasattr(target, "function"):
            message = f"{ast.unparse(node.func)} is decorated by nki.jit; call the undecorated function"
            self._report(node, "sub-kernel", message, f"{_MIGRATION}, Remove nki.jit decorator")
        elif isinstance(target, FunctionType) and not module.startswith(("nki", "builtins")):
            if module and inspect.getsourcefile(target) is not None and not _is_standard(target):
                self.callees.append(inspect.unwrap(target))
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            self._report(node, "varargs", "arguments are passed one by one, not by * or **", _SUBSET)
        self.generic_visit(node)

    # --- Helpers --------------------------------------------------------------------------------------------------
    def _resolve_root(self, node: ast.expr) -> Any:
        while isinstance(node, ast.Attribute):
            node = node.value
        return self.function.__globals__.get(node.id) if isinstance(node, ast.Name) else None

    def _resolve(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self.function.__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        return None

    def _nki_name(self, node: ast.expr) -> str | None:
        """ "nki.isa.engine.vector" of an expression that names it through a module of NKI or of the emulator."""
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        module = self._resolve_root(node)
        if not attributes or not isinstance(module, ModuleType) or module.__name__.rpartition(".")[0] not in _PACKAGES:
            return None
        return ".".join(["nki", module.__name__.rpartition(".")[2], *attributes])

    def _called(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Call):
            return ""
        return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")

    def _created(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Assign) and self._called(node.value) in _CREATORS:
            owner = self._resolve_root(node.value.func)  # type: ignore[attr-defined]
            if isinstance(owner, ModuleType) and owner.__name__.endswith("language"):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        yield target.id

    @staticmethod
    def _base(node: ast.expr) -> str:
        while isinstance(node, ast.Subscript):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    def _tensor_values(self, node: ast.expr) -> Iterator[str]:
        """Tensors whose content the expression reads; ``t.shape`` and ``t == None`` read none."""
        if isinstance(node, (ast.Name, ast.Subscript)):
            if self._base(node) in self.tensors:
                yield self._base(node)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from self._tensor_values(value)
        elif isinstance(node, ast.UnaryOp):
            yield from self._tensor_values(node.operand)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if not any(isinstance(side, ast.Constant) and side.value is None for side in sides):
                for side in sides:
                    yield from self._tensor_values(side)


def _at_least(version: str | None, since: str) -> bool:
    versions = nki_versions()
    return version is not None and versions.index(version) >= versions.index(since)


def _is_standard(function: Callable[..., Any]) -> bool:
    """Whether a function belongs to the standard library or an installed package other than kernel libraries."""
    path = inspect.getsourcefile(function) or ""
    return "site-packages" in path or path.startswith(inspect.getsourcefile(ast).rsplit("/", 1)[0])  # type: ignore[union-attr]


__all__ = ["Finding", "check_kernel", "lint_kernel", "nki_versions"]
