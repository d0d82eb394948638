# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Synthetic launches of the DeltaNet kernels; the kernels themselves run on them in cli/test_kernels.py."""

from __future__ import annotations

import numpy as np
import torch

from qwen35.selftest.deltanet_cases import KernelCase, KernelName, layer_step, make_inputs, relative_error


def test_the_same_case_has_the_same_inputs() -> None:
    case = KernelCase(KernelName.FUSED, tokens=3, heads=2, key_heads=1)
    first, again = make_inputs(case), make_inputs(case)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_layer_s_step_is_the_recurrence_written_out_in_numpy() -> None:
    case = KernelCase(KernelName.DECODE, heads=2, key_heads=1, dtype=torch.float32)
    inputs = [x.double() for x in make_inputs(case)]
    output, state = layer_step(*inputs)
    qkv, z, a, b, weight, history, A_log, dt_bias, norm, before = (x.numpy() for x in inputs)
    window = np.concatenate((history[0], qkv[0].T), axis=1)  # [channels, taps]
    mixed = (window * weight).sum(1)
    q, k, *v = (mixed / (1 + np.exp(-mixed))).reshape(4, 128)
    q, k = (x / np.sqrt(x @ x + 1e-6) for x in (q, k))
    for h in range(2):
        g = -np.exp(A_log[h]) * np.log1p(np.exp(a[0, 0, h] + dt_bias[h]))
        kept = before[0, h] * np.exp(g)
        new = kept + np.outer(k, (v[h] - kept.T @ k) / (1 + np.exp(-b[0, 0, h])))
        o = new.T @ q / np.sqrt(128)
        gate = z[0, 0, 128 * h : 128 * (h + 1)]
        expected = o / np.sqrt((o @ o) / 128 + 1e-6) * norm * gate / (1 + np.exp(-gate))
        # float64 on both sides, in another order of summing.
        assert np.abs(state[0, h].numpy() - new).max() < 1e-12
        assert np.abs(output[0, 0, 128 * h : 128 * (h + 1)].numpy() - expected).max() < 1e-11


def test_what_is_no_number_is_infinitely_wrong() -> None:
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]).double()) == torch.inf
