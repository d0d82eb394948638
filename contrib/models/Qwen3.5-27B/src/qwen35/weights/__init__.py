# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face checkpoint to one file per rank."""
