# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The model that is loaded is the one that vLLM's configuration names: compiled and found again, or refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import EngineArgs
from vllm.config import VllmConfig

from qwen35 import NeuronQwen35ForCausalLM
from qwen35.cli import main
from qwen35.device_settings import DeviceSettings, write_settings
from qwen35.serving.compiled import is_compiled
from qwen35_vllm import artifacts
from qwen35_vllm.artifacts import check_model, load_model
from qwen35_vllm.options import ConfigurationRefused, options_in, serve_options
from support.models import load_neuron, neuron_greedy, random_prompts

pytestmark = pytest.mark.vllm


def configured(path: Path, qwen35: dict[str, Any] | None = None, **arguments: Any) -> VllmConfig:
    chosen = {"max_model_len": 64, "max_num_seqs": 2, "dtype": "float32", "skip_tokenizer_init": True, **arguments}
    return EngineArgs(model=str(path), additional_config={"qwen35": qwen35 or {}}, **chosen).create_engine_config()


def loaded(config: VllmConfig) -> tuple[NeuronQwen35ForCausalLM, list[str]]:
    """The model, and the progress that was told."""
    lines: list[str] = []
    return load_model(config, serve_options(config), lines.append), lines


def run_compile(path: Path, output: Path, *arguments: str) -> None:
    command = ["compile", str(output), "--model", str(path), "--seq-len", "64", "--batch", "2", "--dtype", "float32"]
    assert main([*command, *arguments]) == 0


def require_same_tokens(model: NeuronQwen35ForCausalLM, path: Path) -> None:
    prompts = random_prompts([3, 9])
    expected, _ = neuron_greedy(load_neuron(path, batch_size=2, seq_len=64), prompts, 6)
    found, _ = neuron_greedy(model, prompts, 6)
    assert torch.equal(found, expected)


def test_on_a_cpu_the_checkpoint_is_loaded_and_nothing_is_kept(
    served_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    model, lines = loaded(configured(served_checkpoint))
    require_same_tokens(model, served_checkpoint)
    assert "there is no Neuron device here" in lines[0] and not (tmp_path / "qwen35").exists()


def test_what_qwen35_compile_wrote_is_loaded(served_checkpoint: Path, tmp_path: Path) -> None:
    run_compile(served_checkpoint, tmp_path / "compiled")
    config = configured(served_checkpoint, {"compiled_path": str(tmp_path / "compiled"), "compile": "never"})
    model, lines = loaded(config)
    require_same_tokens(model, served_checkpoint)
    assert lines == [f"loading {tmp_path / 'compiled'}"]


def test_fewer_rows_and_shorter_requests_do_too(served_checkpoint: Path, tmp_path: Path) -> None:
    run_compile(served_checkpoint, tmp_path / "compiled")
    given = {"compiled_path": str(tmp_path / "compiled")}
    model, _ = loaded(configured(served_checkpoint, given, max_num_seqs=1, max_model_len=32))
    assert (model.neuron_config.kv_cache_batch_size, model.neuron_config.seq_len) == (2, 64), "as compiled"


def test_it_is_compiled_where_the_user_says_and_found_again(served_checkpoint: Path, tmp_path: Path) -> None:
    config = configured(served_checkpoint, {"compiled_path": str(tmp_path / "compiled")})
    for told in ("compiling to", "loading"):
        model, lines = loaded(config)
        assert lines[0].startswith(told)
        require_same_tokens(model, served_checkpoint)


@pytest.mark.parametrize(
    ("compiled_with", "arguments", "qwen35", "told"),
    [
        ((), {"max_num_seqs": 3}, {}, "for --max-num-seqs 2, and 3 is asked for: pass --max-num-seqs 2"),
        ((), {"max_model_len": 65}, {}, "for --max-model-len 64, and 65 is asked for: pass --max-model-len 64"),
        ((), {"dtype": "bfloat16"}, {}, "for --dtype float32, not bfloat16: pass --dtype float32"),
        ((), {}, {"prefill_chunk_size": 16}, "with prefill_chunk_size=None: leave the option out, or compile another"),
        ((), {}, {"on_device_sampling": True}, "with on_device_sampling_config=None"),
        ((), {}, {"prompt_logprobs": True}, "with output_prompt_logits=False"),
        ((), {}, {"weights_dtype": "fp8"}, "with weights_dtype=None: leave the option out, or compile another"),
        ((), {"kv_cache_dtype": "fp8"}, {}, "with kv_cache_dtype=None"),
        (
            ("--speculate", "2"),
            {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}},
            {},
            "to draft 2 tokens, not 3 as --speculative-config asks: set its num_speculative_tokens to 2",
        ),
        (
            ("--speculate", "2"),
            {},
            {},
            "to draft 2 tokens, not 0 as --speculative-config asks: set its num_speculative_t",
        ),
        (
            ("--dtype", "float32"),
            {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}},
            {},
            "to draft 0 tokens, not 3 as --speculative-config asks: leave it out",
        ),
        (("--vision",), {}, {}, "it takes images, which are not served yet: compile it without --vision"),
    ],
    ids=str,
)
def test_a_compiled_model_that_is_not_the_one_asked_for_is_refused(
    compiled_with: tuple[str, ...],
    arguments: dict[str, Any],
    qwen35: dict[str, Any],
    told: str,
    tmp_path: Path,
    served_checkpoint: Path,
) -> None:
    from qwen35.serving.loading import MINI_CHECKPOINT

    path = MINI_CHECKPOINT if compiled_with else served_checkpoint
    run_compile(path, tmp_path / "compiled", *compiled_with)
    with pytest.raises(ConfigurationRefused) as refused:
        configured(path, {"compiled_path": str(tmp_path / "compiled"), **qwen35}, **arguments)
    assert told in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_compiled_model_has_the_kernels_that_the_settings_choose(served_checkpoint: Path, tmp_path: Path) -> None:
    write_settings(tmp_path / "trn2.json", DeviceSettings({"deltanet_inverse": "plain", "attention_kernel": "torch"}))
    settings = {"settings": str(tmp_path / "trn2.json")}
    run_compile(served_checkpoint, tmp_path / "other")
    told = r"compiled with deltanet_inverse='tiled': leave .*; it was compiled with attention_kernel='auto': leave"
    with pytest.raises(ConfigurationRefused, match=told):
        configured(served_checkpoint, {"compiled_path": str(tmp_path / "other"), **settings})
    run_compile(served_checkpoint, tmp_path / "compiled", "--settings", settings["settings"])
    given = {"compiled_path": str(tmp_path / "compiled"), "mlp_kernel": "auto", **settings}
    _, lines = loaded(configured(served_checkpoint, given))
    assert lines == [f"loading {tmp_path / 'compiled'}"]
    (tmp_path / "trn2.json").unlink()
    configured(served_checkpoint, {"compiled_path": str(tmp_path / "compiled")})
    with pytest.raises(ConfigurationRefused, match=r"^settings=.*trn2\.json does not exist; name a file"):
        configured(served_checkpoint, given)


def _replace_weights(path: Path) -> None:
    os.utime(path / "model.safetensors", (1, 1))


def _change_config(path: Path) -> None:
    fields = json.loads((path / "config.json").read_text())
    fields["text_config"]["rms_norm_eps"] = 1e-5
    (path / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_replace_weights, "are others than it was compiled of: compile it of these"),
        (_change_config, "of a checkpoint that differs in rms_norm_eps: compile it of this one"),
    ],
)
def test_a_model_that_was_compiled_of_another_checkpoint_is_refused(
    change: Callable[[Path], None], told: str, served_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(served_checkpoint, tmp_path / "checkpoint")
    run_compile(tmp_path / "checkpoint", tmp_path / "compiled")
    change(tmp_path / "checkpoint")
    with pytest.raises(ConfigurationRefused, match=told):
        configured(tmp_path / "checkpoint", {"compiled_path": str(tmp_path / "compiled")})


def test_never_compiles_nothing(served_checkpoint: Path, tmp_path: Path) -> None:
    given = {"compiled_path": str(tmp_path / "compiled"), "compile": "never"}
    with pytest.raises(ConfigurationRefused, match=r"compile=never, .* no compiled model in .*compiled: start"):
        configured(served_checkpoint, given)
    assert not [*tmp_path.iterdir()]


def _something_else(path: Path) -> Path:
    path.mkdir()
    return path


def _below_a_file(path: Path) -> Path:
    path.touch()
    return path / "compiled"


def _read_only(path: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    path.mkdir(mode=0o500)
    return path / "compiled"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_something_else, r"place is there already, and is no compiled model: name a new directory, or"),
        (_below_a_file, r"compiled cannot be made: .*place cannot be written to; name another"),
        (_read_only, r"compiled cannot be made: .*place cannot be written to; name another"),
    ],
)
def test_a_place_where_nothing_can_be_compiled_is_refused_before_anything_is_started(
    make: Callable[[Path], Path], told: str, served_checkpoint: Path, tmp_path: Path
) -> None:
    path = make(tmp_path / "place")
    with pytest.raises(ConfigurationRefused, match=f"^compiled_path.*{told}"):
        configured(served_checkpoint, {"compiled_path": str(path)})
    assert [*tmp_path.iterdir()] == [tmp_path / "place"]


def test_vllm_serve_ends_in_seconds_where_nothing_may_be_compiled(served_checkpoint: Path, tmp_path: Path) -> None:
    given = f'{{"qwen35": {{"compiled_path": "{tmp_path}/compiled", "compile": "never"}}}}'
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(served_checkpoint)]
    start = time.monotonic()
    ended = subprocess.run([*command, "--additional-config", given], capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0 and time.monotonic() - start < 100, "most of it is importing vLLM, on a busy machine"
    assert "ConfigurationRefused: compile=never, and there is no compiled model" in ended.stderr.splitlines()[-1]


@pytest.fixture
def with_neuron_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has devices, as far as artifacts go: the model itself is still one of the stand-ins'."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "4-7")  # which `load_model` narrows
    monkeypatch.setattr(artifacts, "runs_on_neuron", lambda: True)
    return tmp_path / "cache" / "qwen35"


def test_on_neuron_it_is_compiled_once_to_the_cache(served_checkpoint: Path, with_neuron_devices: Path) -> None:
    config = configured(served_checkpoint)
    _, lines = loaded(config)
    assert f"compiling to {with_neuron_devices}/served" in "\n".join(lines)
    (kept,) = with_neuron_devices.iterdir()
    assert is_compiled(kept) and not list(served_checkpoint.glob("*compiled*"))
    model, lines = loaded(config)
    assert lines[-1] == f"loading {kept}" and "compiling" not in "\n".join(lines)
    require_same_tokens(model, served_checkpoint)
    _, lines = loaded(configured(served_checkpoint, max_num_seqs=1))
    assert "compiling" in "\n".join(lines), "another batch is another model"


def test_on_neuron_never_looks_in_the_cache_alone(served_checkpoint: Path, with_neuron_devices: Path) -> None:
    with pytest.raises(ConfigurationRefused, match="compile=never, and there is no compiled model in"):
        configured(served_checkpoint, {"compile": "never"})
    loaded(configured(served_checkpoint))
    loaded(configured(served_checkpoint, {"compile": "never"}))


def test_a_replica_takes_its_cores_before_it_loads(served_checkpoint: Path, with_neuron_devices: Path) -> None:
    config = configured(served_checkpoint, data_parallel_size=2)
    config.parallel_config.data_parallel_rank_local = 1  # as vLLM tells the process of the second
    _, lines = loaded(config)
    assert os.environ["NEURON_RT_VISIBLE_CORES"] == "5-5"
    assert lines[0] == "NEURON_RT_VISIBLE_CORES=5-5 for this replica"


def test_the_plan_is_checked_before_anything_is_compiled(
    served_checkpoint: Path, with_neuron_devices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: NeuronQwen35ForCausalLM) -> None:
        raise ValueError(f"{model.neuron_config.instance} is too small")

    config = configured(served_checkpoint)
    monkeypatch.setattr(artifacts, "require_fits", refuse)
    with pytest.raises(ValueError, match=r"trn2\.3xlarge is too small"):
        check_model(config, options_in({"qwen35": {"instance": "trn2.3xlarge"}}))
    assert not with_neuron_devices.exists()


def test_a_cache_that_cannot_be_written_to_is_refused_before_anything_is_started(
    served_checkpoint: Path, with_neuron_devices: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    told = r"^cache_dir: .*/file/served.* cannot be made: .*/file cannot be written to; name another"
    with pytest.raises(ConfigurationRefused, match=told):
        configured(served_checkpoint, {"cache_dir": str(tmp_path / "file")})
