# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""NKI 0.3.0 kernels of the DeltaNet and attention layers. Each module names its specification in `qwen35.ops`."""
