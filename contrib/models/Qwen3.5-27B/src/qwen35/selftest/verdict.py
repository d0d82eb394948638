# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the results amount to: an exit status, and device settings that were seen to work."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from enum import IntEnum

from ..device_settings import FEATURES, DeviceSettings
from ..nxdi import NXDI_AVAILABLE
from ..serving.compiled import software
from .outcome import Result, Status
from .plan import ENVIRONMENT, Conclusion, Options

EMULATED = "none: CPU stand-ins of NxDI and the emulator of NKI"


class ExitStatus(IntEnum):
    """Of `qwen35 selftest`; 2 is that of bad arguments, as of every command."""

    ALL_WORKS = 0
    SETTINGS_NEEDED = 1  # something failed; settings.json says what works
    NOTHING_WORKS = 3  # the mini did not generate in any way that was tried: there are no settings
    CUT_SHORT = 4  # checks were left out; settings.json is there if the mini generated


def exit_status(conclusion: Conclusion, results: Mapping[str, Result]) -> ExitStatus:
    """The worst of what was found, a failure to generate first."""
    was_cut = any(result.status is Status.NOT_RUN for result in results.values())
    failed = any(result.status.is_failure for result in results.values())
    if conclusion.kernels is None and (failed or not was_cut):
        return ExitStatus.NOTHING_WORKS
    if was_cut:
        return ExitStatus.CUT_SHORT
    return ExitStatus.SETTINGS_NEEDED if failed else ExitStatus.ALL_WORKS


def settings_of(conclusion: Conclusion, options: Options, results: Mapping[str, Result]) -> DeviceSettings | None:
    """The kernels with which the mini generated, and the features that failed; None where it did not generate."""
    if conclusion.kernels is None:
        return None
    environment = results[ENVIRONMENT].values
    made = {
        "by": "qwen35 selftest",
        "tier": options.tier,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": environment.get("instance") or "unknown" if NXDI_AVAILABLE else EMULATED,
        "generated_at_tp_degree": conclusion.tp,
        "versions": {name: found for name, found in software().items() if found is not None},
    }
    failing = {name: reason for name, reason in conclusion.failing.items() if name in FEATURES}
    return DeviceSettings(conclusion.kernels.settings, failing, made)
