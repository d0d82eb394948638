# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A fault, on PYTHONPATH with the sources of NxDI: the closed packages seem to be installed, but there is no device."""

from support import neuron_shells

neuron_shells.install()
