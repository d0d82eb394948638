# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the documented constraints are checked in this thread."""

from __future__ import annotations

import threading

_local = threading.local()


def set_strict(strict: bool) -> None:
    """Check, or do not, what the running kernel does."""
    _local.strict = strict


def is_strict() -> bool:
    """Whether the running kernel is checked; outside a kernel, yes."""
    return getattr(_local, "strict", True)
