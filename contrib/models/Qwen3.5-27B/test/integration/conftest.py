# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the integration suite shares: the settings, the loaded model, and the report at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.serving.generation import TextGenerator
from support.integration import ON_DEVICE, Report, Settings
from support.recorded_logits import Recording, encode_prompts, problems_of

HERE = Path(__file__).parent
_REPORT = "integration report"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the CPU mode of the real NxDI the suite is one of that lane's; on a device it needs no marker."""
    if NXDI_AVAILABLE and not ON_DEVICE:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.nxdi)


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings.from_environment()


@pytest.fixture(scope="session")
def generator(settings: Settings) -> TextGenerator:
    """The model with its tokenizer; loaded once."""
    return settings.load()


@pytest.fixture(scope="session")
def recording(settings: Settings) -> Recording:
    """What transformers says of the checkpoint."""
    if settings.recording is None:
        command = f"python contrib/models/Qwen3.5-27B/tools/record_logits.py --model {settings.model} --output FILE"
        pytest.skip(f"set QWEN35_RECORDED_LOGITS to what this writes on any machine: {command}")
    recording = Recording.load(settings.recording)
    problems = problems_of(recording, settings.model, encode_prompts(settings.model))
    assert not problems, f"{settings.recording}: {'; '.join(problems)}; record {settings.model} anew"
    return recording


@pytest.fixture
def report(record_property: Callable[[str, Any], None]) -> Report:
    return lambda heading, text: record_property(_REPORT, [heading, text])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the report, where the suite was asked for by its path, and write it where QWEN35_REPORT says."""
    texts: dict[str, list[str]] = {}
    for outcome in ("passed", "failed"):
        for result in terminalreporter.stats.get(outcome, []):
            for name, value in result.user_properties if result.when == "call" else ():
                if name == _REPORT:
                    texts.setdefault(value[0], []).append(value[1])
    if not texts:
        return
    report = "\n\n".join(f"### {heading}\n\n" + "\n".join(parts) for heading, parts in texts.items())
    terminalreporter.section("report")
    terminalreporter.write_line(report)
    if (path := Settings.from_environment().report) is not None:
        unfinished = path.with_name(f"{path.name}.tmp")
        unfinished.write_text(report + "\n", encoding="utf-8")
        unfinished.replace(path)
