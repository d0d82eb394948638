# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A rank's share of a chip."""

from __future__ import annotations

import torch

from qwen35.hardware import INSTANCES, TRN2_3XLARGE, TRN2_48XLARGE, rank_bandwidth, rank_flops, rank_hbm_bytes


def test_a_rank_has_its_cores_share_of_a_chip() -> None:
    assert rank_hbm_bytes(2) == 24 * 2**30 == 2 * rank_hbm_bytes(1)
    assert rank_bandwidth(2) == 0.725e12 and rank_flops(2, torch.bfloat16) == 667e12 / 4
    assert rank_flops(2, torch.float32) == 181e12 / 4
    assert TRN2_3XLARGE.ranks(2) == 4 and TRN2_48XLARGE.ranks(2) == 64 and TRN2_48XLARGE.ranks(1) == 128
    assert all(instance.chips.source for instance in INSTANCES.values())
