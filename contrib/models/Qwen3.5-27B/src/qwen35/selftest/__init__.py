# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 selftest`: what of this package works on this machine, kernel by kernel and feature by feature.

`plan` says which checks there are and which follow a failure; `run` runs them, each by `child` as a process of its own,
and keeps what they found in `journal`; `verdict` turns that into settings, `report` into a page. The checks
themselves are `environment`, `kernel_checks`, `model_checks` and `server_check`; they know nothing of each other.

No part of it has run on a Neuron device yet.
"""
