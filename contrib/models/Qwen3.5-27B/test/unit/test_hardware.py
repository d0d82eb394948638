# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A rank's share of a chip, and the instance that a machine is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.hardware import (
    INSTANCES,
    TRN2_3XLARGE,
    TRN2_48XLARGE,
    Instance,
    detected_instance,
    rank_bandwidth,
    rank_flops,
    rank_hbm_bytes,
)
from support.applications import install_neuron_ls


def test_a_rank_has_its_cores_share_of_a_chip() -> None:
    assert rank_hbm_bytes(2) == 24 * 2**30 == 2 * rank_hbm_bytes(1)
    assert rank_bandwidth(2) == 0.725e12 and rank_flops(2, torch.bfloat16) == 667e12 / 4
    assert rank_flops(2, torch.float32) == 181e12 / 4
    assert TRN2_3XLARGE.ranks(2) == 4 and TRN2_48XLARGE.ranks(2) == 64 and TRN2_48XLARGE.ranks(1) == 128
    assert all(instance.chips.source for instance in INSTANCES.values())


CHIP = {"neuron_device": 0, "nc_count": 4, "logical_neuroncore_config": 2, "memory_size": 103079215104}
"""Of the example in tools/neuron-sys-tools/neuron-ls.rst."""


class TestDetectedInstance:
    @pytest.fixture(autouse=True)
    def _nothing_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    @pytest.mark.parametrize(
        ("product", "devices", "expected"),
        [
            ("trn2.3xlarge\n", None, TRN2_3XLARGE),
            ("trn2.48xlarge\n", [CHIP], TRN2_48XLARGE),
            ("trn2u.48xlarge\n", [CHIP] * 16, TRN2_48XLARGE),
            (None, [CHIP], TRN2_3XLARGE),
            (None, [CHIP] * 16, TRN2_48XLARGE),
            ("Standard PC", [CHIP] * 3, None),
            ("trn1.2xlarge\n", [{**CHIP, "memory_size": 34359738368}], None),
            ("inf2.xlarge", [{"neuron_device": 0}, 1, None], None),
            (None, {"devices": [CHIP]}, None),
            (None, [], None),
            ("Standard PC", None, None),
            (None, None, None),
        ],
    )
    def test_it_is_what_the_product_name_or_the_chips_say(
        self, product: str | None, devices: Any, expected: Instance | None, tmp_path: Path
    ) -> None:
        if product is not None:
            (tmp_path / "product_name").write_text(product)
        if devices is not None:
            install_neuron_ls(tmp_path / "bin", json.dumps(devices))
        assert detected_instance(tmp_path / "product_name") is expected

    @pytest.mark.parametrize(
        ("printed", "status"), [("", 1), ("no neuron device found", 0), ("", 0), (json.dumps([CHIP]), 1)]
    )
    def test_a_tool_that_fails_or_says_something_else_detects_nothing(
        self, printed: str, status: int, tmp_path: Path
    ) -> None:
        install_neuron_ls(tmp_path / "bin", printed, status)
        assert detected_instance(tmp_path / "product_name") is None

    def test_a_tool_that_hangs_is_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qwen35.hardware._NEURON_LS_SECONDS", 0.2)
        install_neuron_ls(tmp_path / "bin", "[]", before="exec /bin/sleep 60")
        assert detected_instance(tmp_path / "product_name") is None
