# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Every kernel of this package, in every version of NKI whose documentation is public."""

from __future__ import annotations

import pytest

import nki_emulator
from nki_emulator.lint import Finding, nki_versions
from support.own_kernels import all_kernels


@pytest.mark.parametrize("version", nki_versions())
@pytest.mark.parametrize("name", all_kernels())
def test_a_kernel_calls_nki_as_the_version_documents_it(name: str, version: str) -> None:
    findings = nki_emulator.lint_kernel(all_kernels()[name], version=version)
    assert [str(finding) for finding in findings if not is_the_loop_of_all_versions(finding)] == []


def is_the_loop_of_all_versions(finding: Finding) -> bool:
    """Whether it is nl.dynamic_range, which 0.6.0 still takes and deprecates for nl.fori_loop.

    0.3.0 to 0.5.0 have no other loop that runs on the device (nki/migration/index.rst, from 0.5.0 to 0.6.0).
    """
    return finding.rule == "deprecated" and "nki.language.dynamic_range" in finding.message


def test_two_kernels_have_a_loop_that_the_last_version_deprecates() -> None:
    deprecated = [
        name
        for name, kernel in all_kernels().items()
        if any(is_the_loop_of_all_versions(finding) for finding in nki_emulator.lint_kernel(kernel, "0.6.0"))
    ]
    assert sorted(deprecated) == ["attention_continuation", "deltanet_looped_chunked_layer_state"]


def test_the_versions_are_those_of_sdk_2_29_to_2_32() -> None:
    assert nki_versions() == ["0.3.0", "0.4.0", "0.5.0", "0.6.0"]


def test_every_kernel_is_found() -> None:
    assert len(all_kernels()) == 14 and {name.split("_")[0] for name in all_kernels()} == {"attention", "deltanet"}
