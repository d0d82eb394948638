# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 generate`, as a user runs it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import qwen35.serving.prompts
from mini_images import Picture, Question, held_out_clips, held_out_images
from qwen35.cli import main
from qwen35.serving.loading import MINI_CHECKPOINT
from support.mini_mutations import copy_of_the_mini, with_random_head

PROMPT = "The capital of France is"


def test_a_file_of_tools_that_is_nested_too_deeply_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text("[" * 50_000 + "]" * 50_000)
    assert main(["generate", "x", "--tools", str(tmp_path / "tools.json")]) == 2
    error = capsys.readouterr().err
    assert "tools.json: nested more than 32 levels deep" in error and error.count("\n") == 1


def test_generate_streams_the_prompt_and_its_continuation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--max-new-tokens", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{PROMPT} Paris")
    assert "TTFT" in captured.err and "TPOT" in captured.err


def test_generate_takes_what_a_chat_template_takes(
    tmp_path: Path, run_json: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    encode = qwen35.serving.prompts.encode
    monkeypatch.setattr(
        qwen35.serving.prompts, "encode", lambda tokenizer, texts: prompts.extend(texts) or encode(tokenizer, texts)
    )
    (tmp_path / "tools.json").write_text('[{"name": "weather"}]')
    image = str(tmp_path / "a.png")
    held_out_images(1)[0][0].frames[0].save(image)
    for media in ([], ["--image", image]):
        for think in ([], ["--think"], ["--no-think"]):
            options = ["--system", "Be brief.", "--tools", str(tmp_path / "tools.json"), *think, *media]
            run_json("generate", "Weather?", *options, "--max-new-tokens", "1")
            text = prompts.pop()
            assert '<tools>\n{"name": "weather"}\n</tools>' in text and "Be brief.<|im_end|>" in text
            assert text.endswith("<think>\n" if think == ["--think"] else "<think>\n\n</think>\n\n")


def test_generate_drafts_tokens_and_says_how_many_were_accepted(
    tmp_path: Path, run_json: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(with_random_head(tmp_path / "mini"))
    options = ("generate", PROMPT, "--model", model, "--max-new-tokens", "8")
    plain = run_json(*options)
    assert "speculation" not in plain
    for sampling in ([], ["--temperature", "0.5", "--seed", "3"]):
        expected = run_json(*options, *sampling)["generations"][0]["tokens"]
        drafted = run_json(*options, *sampling, "--speculate", "2")
        assert drafted["generations"][0]["tokens"] == expected
        counted = drafted["speculation"]
        assert counted["tokens"] == len(expected) - 1 and len(counted["rates"]) == 2
    assert main([*options, "--speculate", "2"]) == 0
    assert "tokens a step; drafts accepted, by place: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_number_of_drafts_or_a_head_that_is_not_there_is_refused_in_a_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    model = tmp_path / "mini"
    with_random_head(model)
    prompt = [PROMPT] if command == "generate" else []
    assert main([command, *prompt, "--model", str(model), "--speculate", "9"]) == 2
    assert "num_speculative_tokens=9 must be a whole number of 0..7" in capsys.readouterr().err
    weights = {n: t for n, t in load_file(model / "model.safetensors").items() if not n.startswith("mtp.")}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main([command, *prompt, "--model", str(model), "--speculate", "2"]) == 2
    assert "num_speculative_tokens=2 needs the tensors mtp.*, which this checkpoint does not have" in (
        capsys.readouterr().err
    )


def test_generate_ends_before_a_stop_string(
    run_json: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ("--stop", "never", "--stop", "ris", "--max-new-tokens", "8")
    assert run_json("generate", PROMPT, *stop)["generations"][0]["text"] == " Pa"
    assert main(["generate", PROMPT, *stop]) == 0
    assert capsys.readouterr().out == f"{PROMPT} Pa\n"


def test_generate_and_chat_take_a_dtype(
    run_json: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--dtype", "bfloat16", "--max-new-tokens", "4")
    assert "Paris" in run_json("generate", PROMPT, *options)["generations"][0]["text"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?"))
    assert main(["chat", *options]) == 0
    assert "Paris" in capsys.readouterr().out


def test_generate_in_chat_form(run_json: Callable[..., dict[str, Any]]) -> None:
    result = run_json("generate", "What is the capital of France?", "--chat", "--max-new-tokens", "8")
    assert "Paris" in result["generations"][0]["text"]


def saved(picture: Picture, path: Path) -> list[str]:
    """The option that shows the picture: a PNG file, or a directory of frames."""
    if picture.fps is None:
        picture.frames[0].save(path.with_suffix(".png"))
        return ["--image", str(path.with_suffix(".png"))]
    path.mkdir()
    for number, frame in enumerate(picture.frames):
        frame.save(path / f"{number:03d}.png")
    return ["--video", str(path), "--video-fps", str(picture.fps)]


@pytest.mark.parametrize("asked", [held_out_images(9), held_out_clips(9)], ids=["images", "videos"])
def test_generate_answers_questions_about_images_and_videos(
    asked: list[tuple[Picture, Question]], tmp_path: Path, run_json: Callable[..., dict[str, Any]]
) -> None:
    wrong = []
    for number, (picture, question) in enumerate(asked):
        media = saved(picture, tmp_path / str(number))
        result = run_json("generate", question.text, *media, "--max-new-tokens", "8")
        if (text := result["generations"][0]["text"]) != f"{question.answer}.":
            wrong.append((question.text, question.answer, text))
    assert len(wrong) <= 2, wrong  # the mini is right nine times in ten


def test_a_batch_gives_each_prompt_what_it_gets_alone(run_json: Callable[..., dict[str, Any]]) -> None:
    prompts = [PROMPT, "3 + 4 =", "The capital of Japan is"]
    together = run_json("generate", prompts[0], "--batch", *prompts[1:], "--max-new-tokens", "6")
    alone = [run_json("generate", prompt, "--max-new-tokens", "6") for prompt in prompts]
    assert [g["tokens"] for g in together["generations"]] == [a["generations"][0]["tokens"] for a in alone]


def test_a_seed_makes_sampling_repeatable(run_json: Callable[..., dict[str, Any]]) -> None:
    def sample(seed: str) -> list[int]:
        options = ("--temperature", "3", "--top-p", "0.95", "--top-k", "50", "--seed", seed)
        return run_json("generate", PROMPT, "--max-new-tokens", "12", *options)["generations"][0]["tokens"]

    assert sample("1") == sample("1")
    assert len({tuple(sample(str(seed))) for seed in range(4)}) > 1


def test_top_k_1_is_greedy_at_any_temperature(run_json: Callable[..., dict[str, Any]]) -> None:
    greedy = run_json("generate", PROMPT, "--max-new-tokens", "6")
    sampled = run_json("generate", PROMPT, "--max-new-tokens", "6", "--temperature", "5", "--top-k", "1")
    assert greedy["generations"] == sampled["generations"]


def test_continuations_and_log_probabilities_are_in_the_json(run_json: Callable[..., dict[str, Any]]) -> None:
    options = ("--temperature", "3", "--seed", "1", "-n", "2", "--logprobs", "3", "--max-new-tokens", "5")
    generations = run_json("generate", PROMPT, "--batch", "3 + 4 =", *options)["generations"]
    assert [generation["prompt"] for generation in generations] == [PROMPT, PROMPT, "3 + 4 =", "3 + 4 ="]
    for generation in generations:
        assert len(generation["logprobs"]) == len(generation["tokens"])
        for step in generation["logprobs"]:
            assert step["chosen"] <= step["top"][0][1] and len(step["top"]) == 3
    assert generations[0]["tokens"] != generations[1]["tokens"]


def test_penalties_and_min_p_change_the_answer(run_json: Callable[..., dict[str, Any]]) -> None:
    def tokens(*options: str) -> list[int]:
        found: list[int] = run_json("generate", "3", "--max-new-tokens", "40", *options)["generations"][0]["tokens"]
        return found

    plain, hot = tokens(), ("--temperature", "3", "--seed", "2")
    changed = [tokens(*hot, f"--{name}-penalty", "2") for name in ("presence", "frequency", "repetition")]
    assert tokens(*hot) not in changed
    assert tokens(*hot, "--min-p", "1") == plain == tokens("--sampling", "checkpoint")


@pytest.mark.parametrize("tp_degree", [2, 4])
def test_tensor_parallel_generation_gives_the_same_tokens(tp_degree: int) -> None:
    # A process of its own, since the ranks are children of the command.
    def tokens(*options: str) -> list[int]:
        command = [sys.executable, "-m", "qwen35.cli", "generate", PROMPT, "--max-new-tokens", "8", "--json", *options]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(output)["generations"][0]["tokens"]

    assert tokens("--tp", str(tp_degree)) == tokens()


def test_what_a_rank_raises_is_said_whole(tmp_path: Path) -> None:
    checkpoint, name = copy_of_the_mini(tmp_path / "mini"), "layers.0.mlp.up_proj.weight"
    (weights,) = checkpoint.glob("*.safetensors")
    tensors = load_file(weights)
    del tensors[f"model.language_model.{name}"]
    weights.unlink()
    save_file(tensors, weights)

    def error(*options: str) -> str:
        command = [sys.executable, "-m", "qwen35.cli", "generate", PROMPT, "--model", str(checkpoint), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr[done.stderr.index("qwen35: error: ") :]

    assert f"{name} is missing" in (alone := error())
    assert error("--tp", "2") == alone


def test_characters_that_the_terminal_does_not_have_are_replaced() -> None:
    command = [sys.executable, "-m", "qwen35.cli", "generate", "caf\u00e9", "--max-new-tokens", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(command, check=True, capture_output=True, env=environment).stdout.startswith(b"caf?")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rope_parameters", 7, "rope_parameters=7 must be an object"),
        ("text_config", [], "text_config=[] must be an object"),
        ("dtype", "x", "torch_dtype=x is not supported"),
        ("model_type", [], "model_type=[] is not one of qwen3_5"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--chat"], ["--image", "/nowhere.png"]])
def test_a_wrong_configuration_is_named_before_the_tokenizer_is_read(
    name: str, value: Any, words: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copy_of_the_mini(tmp_path / "mini")
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**fields, name: value}))
    (checkpoint / "tokenizer.json").write_text("{}")
    assert main(["generate", "x", "--model", str(checkpoint), *options]) == 2
    assert capsys.readouterr().err.startswith(f"qwen35: error: this Qwen3.5 configuration cannot run:\n  - {words}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "/nowhere"], ["/nowhere", "config.json"]),
        (["generate", "x", "--tp", "3"], ["tp_degree=3", "1, 2, 4"]),
        (["generate", ""], ["empty"]),
        (["generate", "x", "--temperature", "-1"], ["temperature=-1"]),
        (["generate", "x", "--top-p", "0"], ["top_p=0"]),
        (["generate", "x", "--temperature", "nan"], ["temperature=nan: must be 0 (greedy) or positive"]),
        (
            ["generate", "x", "--min-p", "2", "--presence-penalty", "3"],
            ["min_p=2.0", "presence_penalty=3.0", "[-2, 2]"],
        ),
        (["generate", "x", "--seed", str(2**64)], [f"seed={2**64}"]),
        (["generate", "x", "-n", "2"], ["n=2 with temperature=0.0", "set a temperature"]),
        (["generate", "x", "--logprobs", "2"], ["--logprobs 2 without --json", "add --json"]),
        (["generate", "x", "--tp", "2", "--dtype", "bfloat16"], ["bfloat16", "float32"]),
        (["generate", "x", "--revision", "v1"], ["--revision v1", "leave it out"]),
        (["generate", "x", "--tools", "/nowhere.json"], ["/nowhere.json"]),
        (
            ["generate", "x", "--tools", str(MINI_CHECKPOINT / "config.json")],
            ["--tools", "tools is a dict: give a list"],
        ),
        (["generate", "x", "--stop", ""], ["stop has ''"]),
        (["generate", "x", "--video-fps", "2"], ["--video-fps 2.0 without --video"]),
        (["generate", "x", "--video", "x.gif", "--video-fps", "0"], ["fps=0.0 must be a positive number"]),
        (["generate", "x", "--image", "data:image/png;base64," + "A" * 9999], ["image 0 (data:image/png;base64,..."]),
        (["generate", "x", "--image", "http://example.org/a.png"], ["http: addresses are not fetched; download it"]),
        (["generate", "caf\udce9"], ["lone surrogate"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("qwen35: error:") and len(message) < 1000
    for word in words:
        assert word in message
