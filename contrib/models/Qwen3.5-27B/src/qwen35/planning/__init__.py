# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a configuration takes of an instance, in memory and in time, and the configurations that are recommended."""
