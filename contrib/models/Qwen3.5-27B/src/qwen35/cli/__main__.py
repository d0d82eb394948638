# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m qwen35.cli`."""

import sys

from . import main

sys.exit(main())
