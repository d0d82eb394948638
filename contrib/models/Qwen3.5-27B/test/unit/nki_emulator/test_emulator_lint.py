# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The linter accepts the NKI language and names what lies outside it."""

# Each kernel below is a specimen of what the linter must flag or accept, so the usual style rules do not apply.
# ruff: noqa: B006, B007, B018, E711, E731, F841

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nki_emulator import NkiValidationError, emulate, jit, lint_kernel
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from nki_emulator.lint import nki_versions

STATE = 0
TABLE = {"rows": 128}


@dataclass
class Sizes(nl.NKIObject):
    rows: int
    columns: int = 4


def helper(t: Any, scale: float) -> None:
    nisa.tensor_scalar(t, t, nl.multiply, scale)


def bad_helper(t: Any) -> None:
    try:
        nisa.memset(t, 0.0)
    finally:
        pass


@jit
def decorated(t: Any) -> None:
    nisa.memset(t, 0.0)


def accepted(a: Any, bias: Any = None, scale: float = 1.0, flags: Any = (True, False)) -> Any:
    """Everything that the language guide shows."""
    assert a.shape[0] <= nl.tile_size.pmax, f"too many rows: {a.shape}"
    sizes = Sizes(a.shape[0])
    out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
    tiles = []
    for _ in range(2):
        tiles.append(nl.ndarray((sizes.rows, a.shape[1]), a.dtype))
    for i in nl.affine_range(2):
        nisa.dma_copy(dst=tiles[i], src=a)
        if i % 2 == 0 and flags[0]:
            helper(tiles[i], scale)
        elif bias == None:
            nisa.memset(tiles[i], 0.0)
    x = 0
    while x < 2:
        x += 1
    names = {"a": 1}
    names["b"] = min(x, 3) if x > 1 else 2
    names.pop("a")
    with nl.no_reorder():
        nisa.tensor_tensor(tiles[0], tiles[0], tiles[1], nl.add)
    t = tiles[0]
    assert t.shape == tiles[1].shape and t != None
    count = nisa.register_alloc(1)
    for _ in nl.dynamic_range(count):
        nisa.memset(tiles[1], 1.0)
    print("shape", t.shape)
    nisa.dma_copy(dst=out, src=t)
    return out


def uses_try(a: Any) -> None:
    try:
        nl.load(a)
    except ValueError:
        pass


def uses_with(a: Any) -> None:
    with open("x") as f:
        f.read()


def uses_yield(a: Any) -> Any:
    yield a


def uses_generator(a: Any) -> Any:
    return sum(i for i in range(3))


def uses_lambda(a: Any) -> None:
    f = lambda x: x
    f(a)


def uses_nested(a: Any) -> None:
    def inner() -> None:
        nisa.memset(a, 0.0)

    inner()


def uses_global(a: Any) -> None:
    global STATE
    STATE = 1


def uses_varargs(*tiles: Any) -> None:
    nisa.memset(tiles[0], 0.0)


def uses_kwargs(a: Any, **options: Any) -> None:
    nisa.memset(a, 0.0)


def uses_star_call(a: Any) -> None:
    arguments = (a, 0.0)
    nisa.memset(*arguments)


def uses_keyword_only(a: Any, *, scale: float = 1.0) -> None:
    nisa.memset(a, scale)


def uses_list_argument(a: Any, strides: Any = [1, 1]) -> None:
    nisa.memset(a, 0.0)


def uses_is(a: Any, bias: Any = None) -> None:
    if bias is None:
        nisa.memset(a, 0.0)


def uses_numpy(a: Any) -> None:
    np.exp(a)


def uses_data_dependent_if(a: Any) -> None:
    t = nl.load(a)
    if t[0, 0] > 0:
        nisa.memset(t, 0.0)


def uses_data_dependent_while(a: Any) -> None:
    t = nl.load(a)
    while t:
        nisa.memset(t, 0.0)


def uses_tile_arithmetic(a: Any) -> None:
    t = nl.load(a)
    u = t + 1.0


def uses_tile_assignment(a: Any) -> None:
    t = nl.load(a)
    t[0:1] = 0.0


def uses_tile_comprehension(a: Any) -> None:
    t = nl.load(a)
    rows = [row for row in t]


def uses_list_comprehension(a: Any) -> None:
    columns = [2 * i for i in range(3)]


def uses_dict_comprehension(a: Any) -> None:
    columns = {f"column {i}": i for i in range(3)}


def uses_pop(a: Any) -> None:
    columns = [1, 2]
    columns.pop(0)


def uses_insert(a: Any) -> None:
    columns = [1, 2]
    columns.insert(0, 3)


def uses_xor(a: Any) -> None:
    x = a.shape[0] ^ 1


def uses_shift(a: Any) -> None:
    x = 1
    x <<= 2


def uses_invert(a: Any) -> None:
    x = ~a.shape[0]


def uses_loop_over_pairs(a: Any) -> None:
    for i, j in ((0, 1), (2, 3)):
        nl.load(a)


def uses_return_in_loop(a: Any) -> Any:
    for i in range(3):
        if i == 1:
            return i
    return 0


def uses_integer_keys(a: Any) -> None:
    d = {1: a}


def uses_set(a: Any) -> None:
    s = {1, 2}


def uses_class(a: Any) -> None:
    class Local:
        pass


def uses_import(a: Any) -> None:
    import math

    math.sqrt(2.0)


def uses_del(a: Any) -> None:
    t = nl.load(a)
    del t


def uses_match(a: Any) -> None:
    match a.shape[0]:
        case 1:
            pass


def uses_loop_else(a: Any) -> None:
    for i in range(2):
        nl.load(a)
    else:
        nl.load(a)


def uses_dynamic_in_no_reorder(a: Any) -> None:
    with nl.no_reorder():
        for i in nl.dynamic_range(3):
            nl.load(a)


def uses_sub_kernel(a: Any) -> None:
    decorated(nl.load(a))


def uses_bad_helper(a: Any) -> None:
    bad_helper(nl.load(a))


async def uses_async(a: Any) -> None:
    pass


REJECTED = {
    uses_try: ("try", "try/except is no NKI statement"),
    uses_with: ("with", "no_reorder"),
    uses_yield: ("generator", "generators are not part of NKI"),
    uses_generator: ("generator", "generator expressions"),
    uses_lambda: ("lambda", "module level"),
    uses_nested: ("nested-function", "inner: define functions at module level"),
    uses_global: ("global", "cannot change module state"),
    uses_varargs: ("varargs", r"\*tiles"),
    uses_kwargs: ("varargs", r"\*\*options"),
    uses_star_call: ("varargs", "not by"),
    uses_keyword_only: ("keyword-only", "separator is not supported"),
    uses_list_argument: ("list-argument", "a tuple, not a list"),
    uses_is: ("is", "use == and !="),
    uses_numpy: ("host-library", r"np.exp\(...\) runs on the host"),
    uses_data_dependent_if: ("data-dependent", "if depends on the content of tensor t"),
    uses_data_dependent_while: ("data-dependent", "while depends on the content of tensor t"),
    uses_tile_arithmetic: ("tile-operator", "arithmetic on tensor t"),
    uses_tile_assignment: ("tile-assignment", "only an instruction with dst="),
    uses_tile_comprehension: ("comprehension", "not shown; append in a loop over a range"),
    uses_list_comprehension: ("comprehension", "not shown; append in a loop over a range"),
    uses_dict_comprehension: ("comprehension", "not shown; assign in a loop over a range"),
    uses_pop: ("list-method", r"\.pop\(\) of a list is not shown"),
    uses_insert: ("list-method", r"\.insert\(\) of a list is not shown"),
    uses_xor: ("bit-operator", "use arithmetic or a table"),
    uses_shift: ("bit-operator", "use arithmetic or a table"),
    uses_invert: ("bit-operator", "use arithmetic or a table"),
    uses_loop_over_pairs: ("loop-target", "unpack in an assignment of its own"),
    uses_return_in_loop: ("return-in-loop", "return it after the loop"),
    uses_integer_keys: ("dict-key", "keys are strings"),
    uses_set: ("set", "containers are tuples, lists"),
    uses_class: ("class", "derived from NKIObject"),
    uses_import: ("import", "import at module level"),
    uses_del: ("del", "no NKI statement"),
    uses_match: ("match", "no NKI statement"),
    uses_loop_else: ("loop-else", "no NKI statement"),
    uses_dynamic_in_no_reorder: ("dynamic-no-reorder", "does not work inside"),
    uses_sub_kernel: ("sub-kernel", "decorated is decorated by nki.jit"),
    uses_bad_helper: ("try", "assert on compile-time values"),
    uses_async: ("async", "async functions"),
}


def test_the_language_of_the_guide_is_accepted() -> None:
    assert [str(f) for f in lint_kernel(accepted)] == []
    assert lint_kernel(jit(accepted)) == []
    x = np.ones((8, 4), np.float32)
    np.testing.assert_array_equal(emulate(accepted, x, lint=True).outputs, x)


@pytest.mark.parametrize("kernel", REJECTED, ids=lambda k: k.__name__)
def test_what_the_compiler_refuses_is_found(kernel: Any) -> None:
    rule, words = REJECTED[kernel]
    findings = lint_kernel(kernel)
    assert [f.rule for f in findings] == [rule]
    with pytest.raises(NkiValidationError, match=words):
        emulate(kernel, np.zeros((4, 4), np.float32), lint=True)


def test_a_captured_mutable_is_found() -> None:
    captured: list[int] = []

    def kernel(a: Any) -> None:
        captured.append(1)

    assert [f.rule for f in lint_kernel(kernel)] == ["closure"]


def test_findings_name_file_line_and_source() -> None:
    finding = lint_kernel(uses_is)[0]
    assert finding.line == uses_is.__code__.co_firstlineno + 1
    assert finding.file.endswith("test_emulator_lint.py")
    assert "nki/migration/index.rst" in str(finding)


def calls_well(a: Any) -> Any:
    t = nl.ndarray((4, 4), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=t, src=a, engine=nisa.engine.sync)
    nisa.tensor_scalar(t, t, nl.multiply, 2.0)
    u = t.reshape((4, 4))
    return u


def uses_removed_name(a: Any) -> None:
    nl.tile_size.psum_fmax_bytes


def uses_new_name(a: Any) -> None:
    nl.fori_loop(0, 4, helper)


def uses_unknown_member(a: Any) -> None:
    nisa.memset(a, 0.0, engine=nisa.engine.matrix)


def uses_new_parameter(a: Any) -> None:
    nisa.dma_copy(dst=a, src=a, priority=1)


def uses_moved_place(a: Any) -> None:
    nisa.dma_copy(a, a, nisa.oob_mode.error)


def uses_too_few(a: Any) -> None:
    nisa.tensor_scalar(a, a, op0=nl.multiply)


def uses_too_many(a: Any) -> None:
    nl.program_ndim(0)


def uses_old_loop(a: Any) -> None:
    for i in nl.static_range(2):
        nisa.memset(a, 0.0)


VERSIONS = nki_versions()
BY_VERSION = {
    calls_well: (None, VERSIONS),
    uses_removed_name: (r"tile_size\.psum_fmax_bytes is not in NKI", ["0.3.0", "0.5.0", "0.6.0"]),
    uses_new_name: (r"nki\.language\.fori_loop is not in NKI", ["0.3.0", "0.4.0", "0.5.0"]),
    uses_unknown_member: (r"nki\.isa\.engine\.matrix is not in NKI", VERSIONS),
    uses_new_parameter: ("has no parameter priority", ["0.3.0"]),
    uses_moved_place: (
        r"argument 3 is (oob_mode in NKI 0.3.0, priority|priority in NKI 0.[456].0, oob_mode) in",
        VERSIONS,
    ),
    uses_too_few: ("needs operand0", VERSIONS),
    uses_too_many: ("takes 0 arguments", VERSIONS),
    uses_old_loop: ("static_range: use range", ["0.6.0"]),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kernel", BY_VERSION, ids=lambda k: k.__name__)
def test_a_call_is_held_against_the_parameters_of_each_version(kernel: Any, version: str) -> None:
    words, versions = BY_VERSION[kernel]
    assert lint_kernel(kernel) == []  # without a version, only the language is checked
    findings = lint_kernel(kernel, version=version)
    assert [words is not None and re.search(words, f.message) is not None for f in findings] == (
        [True] if version in versions and words else []
    ), findings


def test_an_unrecorded_version_is_an_error_that_lists_the_recorded() -> None:
    with pytest.raises(ValueError, match=r"version='0\.7\.0' is not recorded; use one of 0\.3\.0, 0\.4\.0"):
        lint_kernel(calls_well, version="0.7.0")
