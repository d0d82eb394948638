# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's entry points: which platform is active, and what vLLM must know of the model.

vLLM calls both in each of its processes, on every machine where this package is installed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path

NAME = "qwen35"
"""Of both entry points: what `VLLM_PLUGINS` lists."""

PLATFORM = "qwen35_vllm.platform.Qwen35Platform"
ARCHITECTURES = ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", "Qwen3_5MTP")
"""Of checkpoints with and without a vision encoder, and what vLLM looks up for --speculative-config."""

MODEL = "qwen35_vllm.model:Qwen35ForVLLM"
"""The class that vLLM takes them for."""

TEXT_MODEL_TYPE = "qwen3_5_text"

AWS_PLUGIN = "vllm_neuron"
"""The package of AWS's plugin; its platform is in it."""

DEVICES = Path("/dev")
"""Where the driver makes a file for each chip."""

logger = logging.getLogger("vllm.qwen35")  # below "vllm", which vLLM configures


def platform() -> str | None:
    """The dotted name of the platform class where it is to be active, else None.

    It is active where Neuron devices are, where VLLM_PLUGINS names it, and where vLLM has no platform of its own, as in
    its pure-Python build on a CPU; never where vLLM finds an accelerator of another maker, nor where another
    out-of-tree platform is active, unless VLLM_PLUGINS leaves that one out.
    """
    from vllm.platforms import builtin_platform_plugins

    own = {name for name, detect in builtin_platform_plugins.items() if _detects(detect)}
    if accelerators := sorted(own - {"cpu"}):
        # Who named it is told; on any other machine with an accelerator nobody waits for it.
        level = logging.WARNING if NAME in _named() else logging.DEBUG
        logger.log(level, "qwen35 steps aside: vLLM runs on %s here", ", ".join(accelerators))
        return None
    for name, detect in _other_platforms():
        if _detects(detect):
            logger.warning("qwen35 steps aside for the platform %s; VLLM_PLUGINS=%s chooses this one", name, NAME)
            return None
    if own and not neuron_devices() and NAME not in _named():
        logger.info("qwen35 steps aside: vLLM runs on the CPU itself here; VLLM_PLUGINS=%s chooses this one", NAME)
        return None
    return PLATFORM


def register() -> None:
    """Tell vLLM what kind of model it serves, and transformers of the configuration class where it has none.

    Where AWS's plugin is the platform, it is told too; where any other is, vLLM keeps what it knows of the model.

    Raises:
        RuntimeError: this package's platform is active in a vLLM that is too old for it.
    """
    from vllm.platforms import current_platform

    active = type(current_platform).__module__.partition(".")[0]
    if active == AWS_PLUGIN:
        from . import aws_plugin

        aws_plugin.register(MODEL)
    if active != __package__:
        return
    from transformers import CONFIG_MAPPING, AutoConfig
    from vllm import ModelRegistry

    if TEXT_MODEL_TYPE not in CONFIG_MAPPING:
        if find_spec("vllm.transformers_utils.configs.qwen3_5") is None:
            raise RuntimeError(
                f"vLLM {version('vllm')} does not know Qwen3.5: install 0.23.0 or 0.33.0, or, on Neuron devices, let "
                "AWS's plugin serve it (VLLM_PLUGINS=qwen35,neuron)"
            )
        # With transformers 4, vLLM knows the configuration of checkpoints with a vision encoder alone by its name.
        from vllm.transformers_utils.configs.qwen3_5 import Qwen3_5TextConfig

        AutoConfig.register(TEXT_MODEL_TYPE, Qwen3_5TextConfig)
    from . import quantization  # noqa: F401 -- importing it registers what it has

    for architecture in ARCHITECTURES:
        # By name, so that nothing is imported here. vLLM's own classes of these names need torchvision.
        ModelRegistry.register_model(architecture, MODEL)


def neuron_devices() -> list[str]:
    """The Neuron devices of this machine, one a chip."""
    return sorted(map(str, DEVICES.glob("neuron[0-9]*")))


def _named() -> list[str]:
    """What the user chose in VLLM_PLUGINS."""
    return [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]


def _other_platforms() -> Iterator[tuple[str, Callable[[], object]]]:
    """The out-of-tree platforms beside this one that vLLM will ask too."""
    given = os.environ.get("VLLM_PLUGINS")
    for entry in entry_points(group="vllm.platform_plugins"):
        if entry.name != NAME and (given is None or entry.name in _named()):
            yield entry.name, partial(_call, entry)


def _call(entry: EntryPoint) -> object:
    return entry.load()()


def _detects(detect: Callable[[], object]) -> bool:
    """Whether a platform says that it is here; one that fails is not, as vLLM has it."""
    try:
        return detect() is not None
    except Exception:
        return False
