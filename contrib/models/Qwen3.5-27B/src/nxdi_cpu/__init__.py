# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""CPU stand-ins for the classes of neuronx-distributed(-inference) that a dense decoder is built from.

Same names, signatures, weight layouts and call order as the originals, as far as `qwen35` uses them, so that the very
same model code runs where the Neuron SDK is not installed. Tensor parallelism runs over torch.distributed (gloo)
processes.
"""
