# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 compile`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35 import Qwen35InferenceConfig
from qwen35.cli import main
from qwen35.device_settings import DeviceSettings, write_settings
from support.applications import needs_stand_ins
from support.mini_mutations import with_random_head
from support.models import save_checkpoint

PROMPT = "The capital of France is"


def test_a_compiled_model_generates_by_its_path_alone(
    tmp_path: Path, run_json: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = str(tmp_path / "compiled")
    result = run_json("compile", compiled, "--seq-len", "64")
    assert result["compiled"] is False  # there is no compiler here
    assert result["bytes_per_rank"]["weights"] == pytest.approx(4 * 4.9e6, rel=0.02)  # float32 on a CPU
    tokens = run_json("generate", PROMPT, "--max-new-tokens", "8", "--compiled", compiled)["generations"]
    assert tokens == run_json("generate", PROMPT, "--max-new-tokens", "8")["generations"]
    assert main(["generate", PROMPT, "--max-new-tokens", "80", "--compiled", compiled]) == 2
    assert "seq_len=64 of the compiled model" in capsys.readouterr().err
    assert main(["generate", "a", "--batch", "b", "--max-new-tokens", "1", "--compiled", compiled]) == 2
    assert "2 prompts exceed batch_size=1" in capsys.readouterr().err


def test_a_model_compiled_to_draft_tokens_does_so(
    tmp_path: Path, run_json: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    model, compiled = str(with_random_head(tmp_path / "mini")), str(tmp_path / "compiled")
    counted = run_json("compile", compiled, "--model", model, "--seq-len", "64", "--speculate", "2")["bytes_per_rank"]
    assert counted["speculation"] > 0
    drafted = run_json("generate", PROMPT, "--max-new-tokens", "8", "--compiled", compiled)
    plain = run_json("generate", PROMPT, "--max-new-tokens", "8", "--model", model)
    assert drafted["generations"] == plain["generations"] and len(drafted["speculation"]["rates"]) == 2
    assert main(["generate", PROMPT, "--compiled", compiled, "--speculate", "3"]) == 2
    assert "--speculate 3 with --compiled" in capsys.readouterr().err


@needs_stand_ins
def test_a_settings_file_chooses_the_kernels_of_a_compiled_model(
    tmp_path: Path, run_json: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, compiled = tmp_path / "trn2.json", str(tmp_path / "compiled")
    attention = {"context_encoding": "torch", "continuation": "nki", "token_generation": "torch"}
    kernels = {"deltanet_kernel": "chunked", "deltanet_inverse": "plain", "attention_kernel": attention}
    write_settings(settings, DeviceSettings(kernels | {"mlp_kernel": "nki"}, {"batch": "NCC_X", "vision": "NCC_Y"}))
    arguments = ("--seq-len", "128", "--batch", "2", "--settings", str(settings))
    # In a process of its own, whose logging nobody has set up.
    command = [sys.executable, "-m", "qwen35.cli", "compile", compiled, *arguments, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if str(settings) in line]
    assert len(told) == 3 and json.loads(done.stdout)["output"] == compiled
    assert told[0].startswith(f"{settings}: mlp_kernel='nki' computes in bfloat16, not torch_dtype=torch.float32")
    assert told[1] == f"{settings}: batch (kv_cache_batch_size) failed on this device: NCC_X"
    assert told[2].startswith(f"{settings}: it chose {{'deltanet_kernel': 'chunked', 'deltanet_inverse': 'plain',")
    saved = json.loads((tmp_path / "compiled" / "neuron_config.json").read_text())["neuron_config"]
    assert {name: saved[name] for name in kernels} == kernels and saved["mlp_kernel"] == "torch"
    assert saved["device_settings"]["file"] == str(settings)

    settings.unlink()
    assert run_json("generate", PROMPT, "--max-new-tokens", "2", "--compiled", compiled)["generations"]
    for asked in (["generate", PROMPT], ["chat"]):
        assert main([*asked, "--compiled", compiled, "--settings", str(settings)]) == 2
        assert f"--settings {settings} with --compiled {compiled}: its kernels were" in capsys.readouterr().err
    assert main(["compile", str(tmp_path / "other"), "--settings", str(settings)]) == 2
    assert capsys.readouterr().err == (
        f"qwen35: error: settings={settings} does not exist; name a file that the self-test wrote\n"
    )
    assert not (tmp_path / "other").exists()


@needs_stand_ins
def test_a_recommended_configuration_is_compiled_by_its_name(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "checkpoint", max_position_embeddings=262144, linear_key_head_dim=128, linear_value_head_dim=128
    )
    write_settings(tmp_path / "trn2.json", DeviceSettings({"deltanet_kernel": "looped"}))
    settings = ("--settings", str(tmp_path / "trn2.json"))
    arguments = ("--model", str(tmp_path / "checkpoint"), "--recommended", "trn2.3xlarge-batch", *settings, "--json")
    assert main(["compile", str(tmp_path / "out"), *arguments]) == 0
    neuron = Qwen35InferenceConfig.load(str(tmp_path / "out")).neuron_config
    assert neuron.context_encoding_buckets == [256, 512, 1024]
    assert neuron.token_generation_buckets == [4096, 8192, 16384, 32768]
    assert (neuron.tp_degree, neuron.seq_len, neuron.prefill_chunk_size) == (4, 32768, 1024)
    assert neuron.deltanet_kernel == "looped"
    assert (neuron.instance, neuron.on_cpu, neuron.torch_dtype) == ("trn2.3xlarge", False, torch.bfloat16)
