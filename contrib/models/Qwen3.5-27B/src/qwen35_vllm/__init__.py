# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5 on NxDI behind vLLM's server: an out-of-tree platform and worker; nothing of vLLM is changed.

- `plugin`: the entry points that vLLM calls in each of its processes;
- `platform`: what vLLM asks of the device, and which of its options are taken or refused;
- `options`: `--additional-config '{"qwen35": {...}}'`, and the configuration of the model from that and vLLM's;
- `artifacts`: the compiled model, found again or made, and loaded;
- `worker`: rows and tokens of each step;
- `model`: what vLLM is told of the model; `media_processor`: images and videos of requests, for `row_media` to encode;
- `prefixes`: which beginnings of prompts are kept, and restored into rows;
- `quantization`: what `qwen35 quantize` names in a checkpoint, which vLLM must know;
- `versions`: what vLLM 0.23 and 0.33 differ in.

This module imports nothing: vLLM loads it wherever the package is installed.
"""
