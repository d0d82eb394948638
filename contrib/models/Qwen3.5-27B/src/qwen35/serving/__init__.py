# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts in, text out: one batch at a time, or many requests over one loaded model.

`loading` and `prompts` make what goes in, `generation` completes one batch, `engine` serves many requests, `chat` holds
a conversation. The engine is put together from `request` (what is asked, and what is refused), `sampling` (which token
comes next), `runner` (the calls of the model) and `prefix_cache` (what is kept of earlier prompts).
"""
