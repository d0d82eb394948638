# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The command line, as a user runs it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mini_images import Picture, Question, held_out_clips, held_out_images
from qwen35 import Qwen35InferenceConfig
from qwen35.cli.main import main
from qwen35.serving.generation import MINI_CHECKPOINT
from qwen35.serving.prefix_cache import PrefixCache
from support.applications import needs_stand_ins
from support.models import save_checkpoint

PROMPT = "The capital of France is"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_streams_the_prompt_and_its_continuation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--max-new-tokens", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{PROMPT} Paris")
    assert "TTFT" in captured.err and "TPOT" in captured.err


def test_generate_in_chat_form(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "generate", "What is the capital of France?", "--chat", "--max-new-tokens", "8")
    assert "Paris" in result["generations"][0]["text"]


def saved(picture: Picture, path: Path) -> list[str]:
    """The option that shows the picture: a PNG file, or a directory of frames."""
    if picture.fps is None:
        picture.frames[0].save(path.with_suffix(".png"))
        return ["--image", str(path.with_suffix(".png"))]
    path.mkdir()
    for number, frame in enumerate(picture.frames):
        frame.save(path / f"{number:03d}.png")
    return ["--video", str(path)]


@pytest.mark.parametrize("asked", [held_out_images(9), held_out_clips(9)], ids=["images", "videos"])
def test_generate_answers_questions_about_images_and_videos(
    asked: list[tuple[Picture, Question]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for number, (picture, question) in enumerate(asked):
        media = saved(picture, tmp_path / str(number))
        result = run_json(capsys, "generate", question.text, *media, "--max-new-tokens", "8")
        if (text := result["generations"][0]["text"]) != f"{question.answer}.":
            wrong.append((question.text, question.answer, text))
    assert len(wrong) <= 2, wrong  # the mini is right nine times in ten


def test_a_batch_gives_each_prompt_what_it_gets_alone(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [PROMPT, "3 + 4 =", "The capital of Japan is"]
    together = run_json(capsys, "generate", prompts[0], "--batch", *prompts[1:], "--max-new-tokens", "6")
    alone = [run_json(capsys, "generate", prompt, "--max-new-tokens", "6") for prompt in prompts]
    assert [g["tokens"] for g in together["generations"]] == [a["generations"][0]["tokens"] for a in alone]


def test_a_seed_makes_sampling_repeatable(capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: str) -> list[int]:
        options = ("--temperature", "3", "--top-p", "0.95", "--top-k", "50", "--seed", seed)
        return run_json(capsys, "generate", PROMPT, "--max-new-tokens", "12", *options)["generations"][0]["tokens"]

    assert sample("1") == sample("1")
    assert len({tuple(sample(str(seed))) for seed in range(4)}) > 1


def test_top_k_1_is_greedy_at_any_temperature(capsys: pytest.CaptureFixture[str]) -> None:
    greedy = run_json(capsys, "generate", PROMPT, "--max-new-tokens", "6")
    sampled = run_json(capsys, "generate", PROMPT, "--max-new-tokens", "6", "--temperature", "5", "--top-k", "1")
    assert greedy["generations"] == sampled["generations"]


@pytest.mark.parametrize("tp_degree", [2, 4])
def test_tensor_parallel_generation_gives_the_same_tokens(tp_degree: int) -> None:
    # A process of its own, since the ranks are children of the command.
    def tokens(*options: str) -> list[int]:
        command = [
            sys.executable,
            "-m",
            "qwen35.cli.main",
            "generate",
            PROMPT,
            "--max-new-tokens",
            "8",
            "--json",
            *options,
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(output)["generations"][0]["tokens"]

    assert tokens("--tp", str(tp_degree)) == tokens()


def test_convert_writes_a_shard_a_rank_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "convert", str(tmp_path / "out"), "--tp", "2")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        "neuron_config.json",
        "weights/tp0_sharded_checkpoint.safetensors",
        "weights/tp1_sharded_checkpoint.safetensors",
    ]
    assert len(result["bytes_per_rank"]) == 2
    shard = load_file(tmp_path / "out" / "weights" / "tp1_sharded_checkpoint.safetensors")
    # 4 key and 8 value heads of 128: half of 2 * 512 + 2 * 1024 rows.
    assert shard["layers.0.linear_attn.in_proj_qkvz.weight"].shape == (1536, 128)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_chat_answers_line_by_line_and_takes_up_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []
    take_up = PrefixCache.take_up
    monkeypatch.setattr(
        PrefixCache,
        "take_up",
        lambda *args: taken.append(take_up(*args)) or taken[-1],  # type: ignore[func-returns-value]
    )
    questions = ["What is the capital of Italy?", "What is the capital of France?"] * 4
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    assert main(["chat", "--seq-len", "512"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 8 and answers[0] == "Rome." and "Paris" in answers[1]
    assert taken[0] == 0 and taken[-1] >= 128


def test_a_compiled_model_generates_by_its_path_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = str(tmp_path / "compiled")
    result = run_json(capsys, "compile", compiled, "--seq-len", "64")
    assert result["compiled"] is False  # there is no compiler here
    assert result["bytes_per_rank"]["weights"] == pytest.approx(4 * 4.9e6, rel=0.02)  # float32 on a CPU
    tokens = run_json(capsys, "generate", PROMPT, "--max-new-tokens", "8", "--compiled", compiled)["generations"]
    assert tokens == run_json(capsys, "generate", PROMPT, "--max-new-tokens", "8")["generations"]
    assert main(["generate", PROMPT, "--max-new-tokens", "80", "--compiled", compiled]) == 2
    assert "seq_len=64 of the compiled model" in capsys.readouterr().err
    assert main(["generate", "a", "--batch", "b", "--max-new-tokens", "1", "--compiled", compiled]) == 2
    assert "2 prompts exceed batch_size=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "/nowhere"], ["/nowhere", "config.json"]),
        (["generate", "x", "--tp", "3"], ["tp_degree=3", "1, 2, 4"]),
        (["generate", ""], ["empty"]),
        (["generate", "x", "--temperature", "-1"], ["temperature=-1"]),
        (["generate", "x", "--top-p", "0"], ["top_p=0"]),
        (["generate", "x", "--tp", "2", "--dtype", "bfloat16"], ["bfloat16", "float32"]),
        (["convert", str(MINI_CHECKPOINT)], ["exists already"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("qwen35: error:")
    for word in words:
        assert word in message


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((MINI_CHECKPOINT / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((MINI_CHECKPOINT / "model.safetensors").read_bytes()[:100_000])
    assert main(["convert", str(tmp_path / "out"), "--model", str(broken)]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


@needs_stand_ins
def test_a_recommended_configuration_is_compiled_by_its_name(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "checkpoint", max_position_embeddings=262144, linear_key_head_dim=128, linear_value_head_dim=128
    )
    arguments = ("--model", str(tmp_path / "checkpoint"), "--recommended", "trn2.3xlarge-batch", "--json")
    assert main(["compile", str(tmp_path / "out"), *arguments]) == 0
    neuron = Qwen35InferenceConfig.load(str(tmp_path / "out")).neuron_config
    assert neuron.context_encoding_buckets == [256, 512, 1024]
    assert neuron.token_generation_buckets == [4096, 8192, 16384, 32768]
    assert (neuron.tp_degree, neuron.seq_len, neuron.prefill_chunk_size) == (4, 32768, 1024)
    assert (neuron.instance, neuron.on_cpu, neuron.torch_dtype) == ("trn2.3xlarge", False, torch.bfloat16)
