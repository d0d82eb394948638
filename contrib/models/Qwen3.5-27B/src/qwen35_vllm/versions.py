# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What vLLM versions 0.23 and 0.33 differ in, in one place."""

from __future__ import annotations
