# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a model takes of a device's memory, found before anything is loaded or compiled.

`counting` sums the bytes of modules, `programs` walks what the program of each bucket takes, `fit` adds both up and
holds them against a device. Models are known here by NxDI's base classes alone.
"""
