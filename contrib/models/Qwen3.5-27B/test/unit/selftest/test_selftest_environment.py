# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What machine this is: with neuron-ls as AWS documents its output, and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen35.selftest import environment
from qwen35.selftest.environment import neuron_devices, run_environment_check
from qwen35.selftest.outcome import CheckFailed

# An entry as in tools/neuron-sys-tools/neuron-ls.rst.
DEVICE = {
    "neuron_device": 0, "bdf": "cc:00.0", "cpu_affinity": "48-95,144-191", "numa_node": "1", "connected_to": None,
    "nc_count": 4, "logical_neuroncore_config": 2, "memory_size": 103079215104, "neuroncore_ids": [0, 1, 2, 3],
    "neuron_processes": [{"pid": 113985, "command": "neuron-bench exec", "neuron_runtime_version": "2.0.0"}],
}  # fmt: skip


def neuron_ls(
    folder: Path, monkeypatch: pytest.MonkeyPatch, output: str | bytes, status: int = 0, errors: str | bytes = ""
) -> None:
    """A program of that name that prints so."""
    for name, text in (("output", output), ("errors", errors)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    program = folder / "neuron-ls"
    program.write_text(f"#!/bin/sh\ncat {folder}/output\ncat {folder}/errors >&2\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_devices_are_described_with_the_hbm_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neuron_ls(tmp_path, monkeypatch, json.dumps([DEVICE]))
    for core, used in enumerate((10 << 30, 6 << 30)):
        counter = tmp_path / "sys" / "neuron0" / f"neuron_core{core}" / "stats/memory_usage/device_mem/total"
        counter.parent.mkdir(parents=True)
        counter.write_text(f"{used}\n")
    monkeypatch.setattr(environment, "DEVICES", tmp_path / "sys")
    values = run_environment_check(tmp_path)
    assert values["devices"] == [
        {"number": 0, "cores": 4, "lnc": 2, "hbm_bytes": 96 << 30, "free_hbm_bytes": 80 << 30, "processes": 1}
    ]
    assert values["instance"] == "trn2.3xlarge" and values["neuron_ls"] is None


def test_free_hbm_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neuron_ls(tmp_path, monkeypatch, json.dumps([DEVICE]))
    monkeypatch.setattr(environment, "DEVICES", tmp_path / "none")
    assert run_environment_check(tmp_path)["devices"][0]["free_hbm_bytes"] is None


@pytest.mark.parametrize(
    ("output", "status", "errors", "words"),
    [
        ("", 1, "error: no driver\n", "neuron-ls ended with 1 and said: error: no driver"),
        ("not JSON", 0, "", "neuron-ls gave no JSON: not JSON"),
        ("[]", 0, "", "neuron-ls lists no devices"),
        ("[null]", 0, "", "neuron-ls lists no devices"),
        (b"\xff[", 0, "", "neuron-ls gave no JSON: \ufffd["),
        ("", 1, b"k\xe4putt\n", "neuron-ls ended with 1 and said: k\ufffdputt"),
        ("[" * 5000, 0, "", f"neuron-ls gave no JSON: {'[' * 200}"),
    ],
)
def test_nxdi_without_a_device_fails_and_says_why(
    output: str | bytes, status: int, errors: str | bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neuron_ls(tmp_path, monkeypatch, output, status, errors)
    assert neuron_devices() == ([], words)
    monkeypatch.setattr(environment, "NXDI_AVAILABLE", True)
    with pytest.raises(CheckFailed, match="no Neuron device") as error:
        run_environment_check(tmp_path)
    assert error.value.values["packages"]["torch"] and error.value.values["neuron_ls"] == words


def test_other_logical_cores_than_those_compiled_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neuron_ls(tmp_path, monkeypatch, json.dumps([DEVICE]))
    monkeypatch.setattr(environment, "NXDI_AVAILABLE", True)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "2")
    run_environment_check(tmp_path)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    with pytest.raises(CheckFailed, match=r"NEURON_LOGICAL_NC_CONFIG=1: .*; unset it"):
        run_environment_check(tmp_path)


def test_without_nxdi_there_need_be_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "NXDI_AVAILABLE", False)
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O2")
    monkeypatch.setenv("A_SECRET", "kept")
    values = run_environment_check(tmp_path)
    assert values["devices"] == [] and values["neuron_ls"] == "neuron-ls is not installed"
    assert values["variables"]["NEURON_CC_FLAGS"] == "-O2" and "A_SECRET" not in values["variables"]
    assert values["packages"]["torch"] and values["free_disk_gb"] > 0 and values["host_memory_gb"] > 0
    assert json.loads(json.dumps(values)) == values
