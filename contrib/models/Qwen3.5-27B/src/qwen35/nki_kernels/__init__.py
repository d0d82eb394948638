# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""NKI 0.3.0 kernels of the gated delta rule; their specification is `qwen35.ops.gated_delta_rule`."""
