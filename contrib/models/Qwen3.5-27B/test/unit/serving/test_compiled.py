# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled models on disk: whole or not there, one maker at a time, found again only by what they are made of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

import qwen35
from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig
from qwen35.device_settings import DeviceSettings, write_settings
from qwen35.planning.recommended import device_neuron_config
from qwen35.serving.compiled import (
    compile_once,
    compile_whole,
    depends_on,
    is_compiled,
    place_of,
    record_of,
    write_whole,
)
from support.applications import needs_stand_ins
from support.models import save_checkpoint

pytestmark = needs_stand_ins


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "checkpoint"
    save_checkpoint(path)
    return path


def application(path: Path, **options: Any) -> NeuronQwen35ForCausalLM:
    neuron_config = device_neuron_config(None, 1, options.pop("seq_len", 64), 1, on_cpu=True, **options)
    return NeuronQwen35ForCausalLM(str(path), Qwen35InferenceConfig.from_pretrained(path, neuron_config))


def nothing(_: str) -> None:
    """No progress is looked at."""


def test_a_directory_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "file").write_text("whole")

    def fail(path: Path) -> None:
        write(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []
    write_whole(tmp_path / "out", write)
    assert (tmp_path / "out" / "file").read_text() == "whole"
    with pytest.raises(FileExistsError, match="exists already"):
        write_whole(tmp_path / "out", write)


def test_a_compiled_model_records_what_it_is_made_of(checkpoint: Path, tmp_path: Path) -> None:
    model = application(checkpoint)
    compile_whole(model, tmp_path / "out", nothing)
    assert record_of(tmp_path / "out") == depends_on(application(checkpoint, save_sharded_checkpoint=True))
    assert (tmp_path / "out" / "weights" / "tp0_sharded_checkpoint.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"
    with pytest.raises(FileExistsError, match="out exists already"):
        compile_whole(model, tmp_path / "out", nothing)
    assert record_of(tmp_path) == {}


def test_a_failed_compilation_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    model = application(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        compile_once(model, tmp_path / "cache" / "out", nothing)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_name_does_not_depend_on_where_the_checkpoint_lies(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)  # with the times of its files
    there = place_of(application(tmp_path / checkpoint.name), tmp_path)
    assert there == place_of(application(checkpoint), tmp_path)
    assert there.name.startswith("checkpoint-")


def test_the_name_depends_on_the_kernels_and_not_on_the_file_that_chose_them(checkpoint: Path, tmp_path: Path) -> None:
    places = []
    for name, kernels in (("a", {"deltanet_inverse": "plain"}), ("b", {"deltanet_inverse": "plain"}), ("c", {})):
        write_settings(tmp_path / name, DeviceSettings(kernels, {"batch": name}, {"by": name}))
        places.append(place_of(application(checkpoint, settings=tmp_path / name), tmp_path))
    plain = place_of(application(checkpoint, deltanet_inverse="plain"), tmp_path)
    assert places == [plain, plain, place_of(application(checkpoint), tmp_path)] and places[2] != plain


@pytest.mark.parametrize(
    "options",
    [{"seq_len": 96}, {"context_encoding_buckets": [32, 64]}, {"deltanet_inverse": "plain"}, {"output_logits": True}],
    ids=str,
)
def test_options_change_the_name(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    assert place_of(application(checkpoint, **options), tmp_path) != place_of(application(checkpoint), tmp_path)


def _touch(path: Path) -> None:
    """Other weights in as many bytes."""
    os.utime(path / "model.safetensors", (1, 1))


def _add_weights(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path / "more.safetensors")


def _change_config(path: Path) -> None:
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-5}))


@pytest.mark.parametrize("change", [_touch, _add_weights, _change_config])
def test_a_changed_checkpoint_changes_the_name(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    before = place_of(application(tmp_path / "copy"), tmp_path)
    change(tmp_path / "copy")
    assert place_of(application(tmp_path / "copy"), tmp_path) != before


@pytest.mark.parametrize("name", ["NEURON_CC_FLAGS", "XLA_HANDLE_SPECIAL_SCALAR", "UNSAFE_FP8FNCAST"])
def test_what_the_compiler_reads_of_the_environment_changes_the_name(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = place_of(application(checkpoint), tmp_path)
    monkeypatch.setenv(name, "1")
    assert place_of(application(checkpoint), tmp_path) != before


def test_a_kernel_of_the_environment_changes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "checkpoint", linear_key_head_dim=128, linear_value_head_dim=128)
    before = place_of(application(tmp_path / "checkpoint"), tmp_path)
    monkeypatch.setenv("USE_NKI_CHUNKED", "1")
    assert place_of(application(tmp_path / "checkpoint"), tmp_path) != before


def test_versions_and_sources_are_recorded(checkpoint: Path) -> None:
    software = depends_on(application(checkpoint))["software"]
    assert software["torch"] == torch.__version__.split("+")[0] or software["torch"] == torch.__version__
    assert software["neuronx-cc"] is None, "there is no compiler here"
    package = Path(qwen35.__file__).parent
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py")):
        digest.update(name.encode() + b"\0" + (package / name).read_bytes() + b"\0")
    assert software["qwen35"] == digest.hexdigest()


STARTER = """
import sys
from pathlib import Path
from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig
from qwen35.planning.recommended import device_neuron_config
from qwen35.serving.compiled import compile_once

checkpoint, directory = sys.argv[1:]
config = Qwen35InferenceConfig.from_pretrained(checkpoint, device_neuron_config(None, 1, 64, 1, on_cpu=True))
model = NeuronQwen35ForCausalLM(checkpoint, config)
print("ready", flush=True)
sys.stdin.readline()
compile_once(model, Path(directory), lambda line: print(line, flush=True))
print("made" if model.is_compiled else "found")
"""


def start(checkpoint: Path, directory: Path) -> subprocess.Popen[str]:
    """A process that is ready to compile, when it is sent a line."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", STARTER, str(checkpoint), str(directory)], **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_of_two_starters_one_compiles(checkpoint: Path, tmp_path: Path) -> None:
    starters = [start(checkpoint, tmp_path / "out") for _ in range(2)]
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("\n")
        starter.stdin.flush()
    outputs = [starter.communicate(timeout=60)[0].splitlines() for starter in starters]
    assert sorted(output[-1] for output in outputs) == ["found", "made"], outputs
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


HOLDER = """
import sys, time
from pathlib import Path
from qwen35.serving.compiled import _alone

with _alone(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_starter_is_no_obstacle(checkpoint: Path, tmp_path: Path) -> None:
    lock = tmp_path / ".out.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        (tmp_path / ".out.abc123" / "partial").mkdir(parents=True)
        lines: list[str] = []
        starter = Thread(target=compile_once, args=(application(checkpoint), tmp_path / "out", lines.append))
        starter.start()
        while not lines:
            time.sleep(0.01)
        assert "waiting for another process" in lines[0] and not is_compiled(tmp_path / "out")
        holder.kill()
    starter.join(timeout=60)
    assert is_compiled(tmp_path / "out")
    assert any("was not finished" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_something_else_in_its_place_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        compile_once(application(checkpoint), tmp_path / "out", nothing)
