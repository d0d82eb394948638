# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which platform vLLM takes: ours where it has none or Neuron devices are; never on another accelerator."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm import platforms

from qwen35_vllm import plugin

pytestmark = pytest.mark.vllm

CUDA_MACHINE = "platforms.builtin_platform_plugins['cuda'] = lambda: 'vllm.platforms.interface.UnspecifiedPlatform'"
"""vLLM's own detection finds a GPU; the class of its platform would look for the driver."""


def install_other_platform(
    path: Path, name: str = "other", answer: str | None = "other_platform.OtherPlatform"
) -> None:
    """An installed distribution with a platform of its own, for Neuron: `answer` is what its entry point returns."""
    metadata = path / "other_neuron-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-neuron\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.platform_plugins]\n{name} = other_platform:detect\n")
    (path / "other_platform.py").write_text(
        f"def detect():\n    return {answer!r}\n\n"
        "def __getattr__(name):\n"
        "    from vllm.platforms.interface import UnspecifiedPlatform\n"
        "    if name != 'OtherPlatform':\n        raise AttributeError(name)\n"
        "    return type(name, (UnspecifiedPlatform,), {})\n"
    )


@dataclass(frozen=True)
class Machine:
    """Where vLLM chooses a platform: what runs before, what else is installed, variables; and what it must say."""

    selected: str
    told: str = ""
    before: str = ""
    other: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


MACHINES = {
    "as it is": Machine("Qwen35Platform"),
    "GPU": Machine(
        "UnspecifiedPlatform",
        "qwen35 steps aside: vLLM runs on cuda here",
        before=CUDA_MACHINE,
        environment={"VLLM_PLUGINS": plugin.NAME},
    ),
    "another platform": Machine(
        "OtherPlatform", "qwen35 steps aside for the platform other; VLLM_PLUGINS=qwen35 chooses", other=True
    ),
    "another platform, ours named": Machine("Qwen35Platform", other=True, environment={"VLLM_PLUGINS": plugin.NAME}),
    "another platform, that one named": Machine("OtherPlatform", other=True, environment={"VLLM_PLUGINS": "other"}),
}

SELECT = """
import json, os, sys
from vllm import platforms
for before, paths, environment, log in json.loads(sys.stdin.read()):
    if (child := os.fork()) == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        sys.path[:0] = paths
        exec(before)
        from vllm.platforms import current_platform
        print("selected", type(current_platform).__name__, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
"""A process for each machine, of one that has imported vLLM and not yet looked for its platform."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What vLLM says on each of the machines, its choice last."""
    root = tmp_path_factory.mktemp("selection")
    install_other_platform(root / "other")
    asked = [
        (machine.before, [str(root / "other")] * machine.other, dict(machine.environment), str(root / str(i)))
        for i, machine in enumerate(MACHINES.values())
    ]
    subprocess.run(
        [sys.executable, "-c", SELECT],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "PYTHONPATH": os.pathsep.join(sys.path)},
        input=json.dumps(asked),
        text=True,
        check=True,
    )
    return {name: (root / str(i)).read_text() for i, name in enumerate(MACHINES)}


@pytest.mark.parametrize("name", MACHINES)
def test_vllm_takes_ours_unless_an_accelerator_or_another_platform_goes_first(said: dict[str, str], name: str) -> None:
    assert said[name].splitlines()[-1] == f"selected {MACHINES[name].selected}"
    assert MACHINES[name].told in said[name]


@pytest.mark.parametrize("broken", ["None", "1 / 0"])
def test_another_platform_that_is_not_active_is_no_obstacle(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_other_platform(tmp_path, answer=None)
    module = tmp_path / "other_platform.py"
    module.write_text(module.read_text().replace("return None", f"return {broken}"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_platform", raising=False)
    assert plugin.platform() == plugin.PLATFORM


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This machine, without a platform of vLLM's own and without VLLM_PLUGINS, until a test says otherwise."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    for name in platforms.builtin_platform_plugins:
        monkeypatch.setitem(platforms.builtin_platform_plugins, name, lambda: None)
    return monkeypatch


@pytest.mark.parametrize("accelerator", [name for name in platforms.builtin_platform_plugins if name != "cpu"])
@pytest.mark.parametrize("devices", [[], ["/dev/neuron0"]], ids=["", "Neuron"])
def test_no_accelerator_of_another_maker_is_taken_over(
    machine: pytest.MonkeyPatch, accelerator: str, devices: list[str]
) -> None:
    machine.setitem(platforms.builtin_platform_plugins, accelerator, lambda: "vllm.platforms.Some")
    machine.setattr(plugin, "neuron_devices", lambda: devices)
    assert plugin.platform() is None


@pytest.mark.parametrize(
    ("devices", "named", "active"),
    [([], None, False), (["/dev/neuron0"], None, True), ([], "qwen35", True), ([], "other, qwen35", True)],
)
def test_where_vllm_runs_on_the_cpu_itself_ours_is_for_neuron_or_named(
    machine: pytest.MonkeyPatch, devices: list[str], named: str | None, active: bool, caplog: pytest.LogCaptureFixture
) -> None:
    machine.setitem(platforms.builtin_platform_plugins, "cpu", lambda: "vllm.platforms.cpu.CpuPlatform")
    machine.setattr(plugin, "neuron_devices", lambda: devices)
    if named is not None:
        machine.setenv("VLLM_PLUGINS", named)
    machine.setattr(plugin.logger, "propagate", True)
    with caplog.at_level(logging.INFO, plugin.logger.name):
        assert (plugin.platform() is not None) == active
    assert ("steps aside" in caplog.text) != active


def test_a_detection_that_fails_counts_as_not_there(machine: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise OSError("no driver")

    machine.setitem(platforms.builtin_platform_plugins, "cuda", fail)
    assert plugin.platform() == plugin.PLATFORM


def test_what_vllm_is_told_of_the_model_needs_no_torchvision() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        f"pictures, one, other = [ModelRegistry.models[name] for name in {[*plugin.ARCHITECTURES]!r}]\n"
        "assert one == other\n"
        "for model in (pictures, one):\n"
        "    info = model.inspect_model_cls()\n"
        "    print(info.architecture, info.is_text_generation_model, info.supports_multimodal, info.is_hybrid)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    # vLLM's versions log to standard output, too.
    assert [line for line in process.stdout.splitlines() if line.startswith("Qwen35")] == [
        "Qwen35VLForVLLM True True False",
        "Qwen35ForVLLM True False False",
    ]


@pytest.mark.parametrize(("before", "ours"), [("", True), (CUDA_MACHINE, False)], ids=["pure Python", "CUDA"])
def test_vllm_keeps_its_own_model_where_another_platform_serves_it(before: str, ours: bool) -> None:
    """On a machine with GPUs the never-built class would take the place of the one that runs."""
    code = (
        f"from vllm import platforms\n{before}\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        f"known = [ModelRegistry.models.get(name) for name in {[*plugin.ARCHITECTURES]!r}]\n"
        "print([model and model.module_name for model in known])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1].count("qwen35_vllm") == (len(plugin.ARCHITECTURES) if ours else 0)
