# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The device settings file: which kernels a device was seen to run, and what was seen to fail there.

A configuration takes it by its path, `Qwen35NeuronConfig(settings="trn2.json")`: where a kernel field is `auto`, the
file says which. It knows no model, so a kernel that cannot run one is left to the default. docs/device_settings.md has
an example.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .error_text import one_line, shown
from .json_files import read_json
from .kernel_selection import ATTENTION_PHASES, KERNEL_CHOICES

FORMAT = 1
"""The number that files begin with; another layout has a higher one."""

FEATURES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "vision": ("images and video", lambda config: getattr(config, "takes_images", False)),
    "speculation": ("num_speculative_tokens", lambda config: config.num_speculative_tokens != 0),
    "fp8_weights": ("weights_dtype", lambda config: _run_setting(config, "weights_dtype") is not None),
    "fp8_cache": ("kv_cache_dtype", lambda config: _run_setting(config, "kv_cache_dtype") is not None),
    "batch": ("kv_cache_batch_size", lambda config: config.neuron_config.kv_cache_batch_size > 1),
    "tensor_parallel": ("tp_degree", lambda config: config.neuron_config.tp_degree > 1),
    "chunked_prompts": ("prefill_chunk_size", lambda config: config.prefill_chunk_size is not None),
}
"""What may be listed as failing: what asks for it, and whether a `Qwen35InferenceConfig` does."""

_REMEDY = "correct it, or let the self-test write it anew"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceSettings:
    """What was found on a device.

    Args:
        kernels: of the fields in `KERNEL_CHOICES` those that were tried, each by the name of a kernel that works;
            attention_kernel by one name, or one for each phase: {"continuation": "torch"}.
        failing: of `FEATURES` those that do not work, each with the reason: the first line of an error.
        made: by what and when the settings were made, in values that JSON has; for the reader alone.

    Raises:
        ValueError: naming all that is unknown or of a wrong kind, in one line.
    """

    kernels: Mapping[str, Any]
    failing: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := [*_kernel_problems(self.kernels), *_failing_problems(self.failing), *_made_problems(self.made)]:
            raise ValueError(one_line("; ".join(problems)))

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {"format": FORMAT, "made": self.made, "kernels": self.kernels, "failing": self.failing}

    @property
    def digest(self) -> str:
        """SHA-256 of what is said, in hex: of two files that say the same, the same."""
        return hashlib.sha256(_as_json(self.content, sort_keys=True).encode()).hexdigest()


def _as_json(content: Mapping[str, Any], **layout: Any) -> str:
    """JSON without NaN, which it has not; of mappings other than dictionaries, too."""
    return json.dumps(content, allow_nan=False, default=dict, **layout)


def read_settings(path: str | os.PathLike[str]) -> DeviceSettings:
    """The settings in a file.

    Raises:
        ValueError: it is not there or not valid; in one line that names the file, each field, its value, and what to
            do.
    """
    file = Path(path).expanduser()
    try:
        content = read_json(file, _REMEDY)
    except FileNotFoundError:
        raise ValueError(f"settings={file} does not exist; name a file that the self-test wrote") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object; {_REMEDY}")
    number = content.get("format")
    if type(number) is not int or number < 1:
        raise ValueError(f"{file}: format={shown(number)} must be {FORMAT}; {_REMEDY}")
    if number > FORMAT:
        raise ValueError(
            f"{file}: format={number} is newer than {FORMAT}, which is read here; update this package, or let its own "
            "self-test write the file anew"
        )
    names = ("made", "kernels", "failing")
    problems = [f"{shown(name)} is unknown" for name in content if name not in ("format", *names)]
    try:
        settings = DeviceSettings(**{name: content.get(name, {}) for name in names})
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(one_line(f"{file}: {'; '.join(problems)}; {_REMEDY}"))
    return settings


def write_settings(path: str | os.PathLike[str], settings: DeviceSettings) -> None:
    """Write a file that `read_settings` reads, whole or not at all, in place of one that is there.

    Raises:
        OSError: it cannot be written.
    """
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
        unfinished = Path(scratch) / file.name
        unfinished.write_text(_as_json(settings.content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(file)


def record_of_settings(path: str | os.PathLike[str], settings: DeviceSettings, taken: dict[str, Any]) -> dict[str, Any]:
    """What a configuration keeps of its settings, in values that JSON has, so that it needs the file no more.

    Args:
        taken: the kernels that the settings chose, as `kernel_selection.resolve_auto` has them.
    """
    return {"file": os.fspath(path), "digest": settings.digest, "kernels": taken, "failing": dict(settings.failing)}


def record_problem(record: Any) -> str | None:
    """What is wrong with such a record from elsewhere, if anything is."""
    if not isinstance(record, Mapping) or {*record} != {"file", "digest", "kernels", "failing"}:
        return f"{shown(record)} must be an object with file, digest, kernels and failing"
    if not isinstance(record["file"], str) or not isinstance(record["digest"], str):
        return f"file={shown(record['file'])} and digest={shown(record['digest'])} must be text"
    try:
        DeviceSettings(record["kernels"], record["failing"])
    except ValueError as error:
        return str(error)
    return None


def failing_features(config: Any, failing: Mapping[str, str]) -> Iterator[str]:
    """A line for each feature that a `Qwen35InferenceConfig` uses and which settings list as failing, and why."""
    for name, reason in failing.items():
        asked_by, uses = FEATURES[name]
        if uses(config):
            yield f"{name} ({asked_by}) failed on this device: {reason}"


@cache
def warn_once(line: str) -> None:
    """Log a warning, unless this process has: a configuration is made several times on the way to a model."""
    logger.warning("%s", one_line(line))


def _run_setting(config: Any, name: str) -> Any:
    """Of neuron_config; a plain NeuronConfig has no such field."""
    return getattr(config.neuron_config, name, None)


def _kernel_problems(kernels: Any) -> Iterator[str]:
    if not isinstance(kernels, Mapping):
        yield f"kernels={shown(kernels)} must be an object"
        return
    for name, value in kernels.items():
        if name not in KERNEL_CHOICES:
            yield f"kernels: {shown(name)} is unknown; it has {', '.join(KERNEL_CHOICES)}"
        elif name == "attention_kernel" and isinstance(value, Mapping):
            for phase, kernel in value.items():
                if phase not in ATTENTION_PHASES:
                    yield f"kernels: {name}[{shown(phase)}] is no phase; it has {', '.join(ATTENTION_PHASES)}"
                elif kernel not in KERNEL_CHOICES[name]:
                    yield f"kernels: {name}[{phase!r}]={shown(kernel)} must be one of {', '.join(KERNEL_CHOICES[name])}"
        elif not isinstance(value, str) or value not in KERNEL_CHOICES[name]:
            yield f"kernels: {name}={shown(value)} must be one of {', '.join(KERNEL_CHOICES[name])}"


def _failing_problems(failing: Any) -> Iterator[str]:
    if not isinstance(failing, Mapping):
        yield f"failing={shown(failing)} must be an object"
        return
    for name, reason in failing.items():
        if name not in FEATURES:
            yield f"failing: {shown(name)} is unknown; it has {', '.join(FEATURES)}"
        elif not isinstance(reason, str) or not reason:
            yield f"failing: {name}={shown(reason)} must be the reason, as text"


def _made_problems(made: Any) -> Iterator[str]:
    if not isinstance(made, Mapping):
        yield f"made={shown(made)} must be an object"
        return
    try:
        _as_json(made, sort_keys=True)
    except (TypeError, ValueError) as error:
        yield f"made={shown(made)} must be in values that JSON has ({error})"
