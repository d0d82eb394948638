# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Where the sources of NxDI are on the path, the tests run on them instead of on the stand-ins."""

from support import neuron_shells

neuron_shells.install()
