# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts in, text out: one batch at a time, or many requests over one loaded model."""
