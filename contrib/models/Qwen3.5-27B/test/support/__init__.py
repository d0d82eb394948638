# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What several test files share: oracles, random checkpoints, ranks and a simulated device."""
