# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The recorder against transformers' whole models; errors of logits by hand; recordings on disk; memory."""

from __future__ import annotations

import errno
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", minversion="5.0")

import bench_convert  # noqa: E402
import record_logits  # noqa: E402
from qwen35.fp8_form import is_fp8_matrix  # noqa: E402
from qwen35.serving.loading import MINI_CHECKPOINT  # noqa: E402
from record_logits import HEAD_ROWS, MINI_RECORDING, LayerwiseModel, Recorder  # noqa: E402
from support.compare import assert_close  # noqa: E402
from support.models import random_prompts, save_checkpoint  # noqa: E402
from support.recorded_logits import (  # noqa: E402
    BFLOAT16,
    FLOAT32,
    FP8,
    EncodedPrompt,
    Errors,
    Recording,
    Reference,
    checkpoint_digest,
    encode_prompts,
    problems_of,
)

PROMPTS = [EncodedPrompt(str(i), tuple(ids), 2) for i, ids in enumerate(random_prompts([5, 40, 3]))]


@torch.no_grad()
def whole_model_logits(path: Path, prompt: EncodedPrompt, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [P, V] of transformers' model, loaded by transformers."""
    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path, dtype=dtype).eval()
    ids = torch.tensor([prompt.ids])
    media = dict(prompt.media)
    if media:
        media["mm_token_type_ids"] = (ids == config.image_token_id).int()
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **media).logits[0]
    return logits[[*prompt.scored]]


def layerwise_logits(path: Path, prompts: list[EncodedPrompt], form: str = FLOAT32) -> list[torch.Tensor]:
    return Recorder(path, prompts).logits(form)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_one_at_a_time_give_what_the_whole_model_gives(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    save_checkpoint(tmp_path, tie_word_embeddings=tied)
    logits = layerwise_logits(tmp_path, PROMPTS, BFLOAT16 if dtype is torch.bfloat16 else FLOAT32)
    for prompt, own in zip(PROMPTS, logits, strict=True):
        expected = whole_model_logits(tmp_path, prompt, dtype)
        # The same operations on the same numbers, but that the output head has only scored positions here: another
        # order of its sums, and of a logit a few of the last bits.
        assert_close(own, expected, atol=1e-5, rtol=2.0**-21 if dtype is torch.float32 else 2.0**-8)


def test_a_picture_is_encoded_as_by_the_whole_model() -> None:
    prompts = [prompt for prompt in encode_prompts(MINI_CHECKPOINT) if prompt.name in ("picture", "fact")]
    for prompt, own in zip(prompts, layerwise_logits(MINI_CHECKPOINT, prompts), strict=True):
        assert_close(own, whole_model_logits(MINI_CHECKPOINT, prompt), atol=1e-4)


def test_fp8_is_the_model_with_its_matrices_rounded_to_fp8(tmp_path: Path) -> None:
    """Rounded by NumPy and ml_dtypes, and run by transformers."""
    save_checkpoint(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    for name, weight in weights.items():
        if is_fp8_matrix(name):
            values = weight.numpy()
            scale = np.abs(values).max(1, keepdims=True) / np.float32(240)
            rounded = np.clip(values / scale, -240, 240).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
            weights[name] = torch.from_numpy(rounded)
    shutil.copytree(tmp_path / "whole", tmp_path / "rounded")
    save_file(weights, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    for prompt, own in zip(PROMPTS, layerwise_logits(tmp_path / "whole", PROMPTS, FP8), strict=True):
        assert_close(own, whole_model_logits(tmp_path / "rounded", prompt), atol=1e-5, rtol=2.0**-21)


def test_the_head_is_multiplied_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path)
    assert HEAD_ROWS > 160, "otherwise every other test here does so"
    monkeypatch.setattr(record_logits, "HEAD_ROWS", 37)
    (own,) = layerwise_logits(tmp_path, PROMPTS[:1])
    assert_close(own, whole_model_logits(tmp_path, PROMPTS[0]), atol=1e-5)


def test_no_weight_is_kept_when_its_module_has_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    model = LayerwiseModel(tmp_path)
    model.begin(PROMPTS)
    model.run_layer(0)
    assert all(parameter.is_meta for parameter in model.model.parameters())


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field, value, problem in (
        ("architectures", ["Qwen3ForCausalLM"], "architectures='Qwen3ForCausalLM'"),
        ("quantization_config", {"quant_method": "fp8"}, "quantised: record the bf16 checkpoint"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(ValueError, match=problem):
            LayerwiseModel(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"it has no lm_head\.weight"):
        layerwise_logits(tmp_path, PROMPTS[:1])


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(path: Path) -> None:
        raise AssertionError("prompts were encoded")

    monkeypatch.setattr(record_logits, "encode_prompts", runs)
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "logits"):
        monkeypatch.setattr(sys, "argv", ["record_logits", "--output", str(output)])
        with pytest.raises(SystemExit):
            record_logits.main()
        assert f"--output {output}" in capsys.readouterr().err


def test_a_recording_that_is_not_whole_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills_the_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("support.recorded_logits.save_file", fills_the_disk)
    with pytest.raises(OSError, match="No space left"):
        Recording.load(MINI_RECORDING).save(tmp_path / "logits")
    assert not [*tmp_path.iterdir()]


def test_logits_that_are_no_numbers_are_not_recorded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="logits of the prompt '0' in float32 are nan or infinite"):
        Recorder(tmp_path, PROMPTS).record()


def test_the_recording_of_the_mini_is_what_is_recorded_today() -> None:
    recording = Recording.load(MINI_RECORDING)
    prompts = encode_prompts(MINI_CHECKPOINT)
    assert problems_of(recording, MINI_CHECKPOINT, prompts) == []
    chosen = [prompt for prompt in prompts if prompt.name != "long"]
    for prompt, logits in zip(chosen, layerwise_logits(MINI_CHECKPOINT, chosen), strict=True):
        errors = Errors.of(recording.prompts[prompt.name].references[FLOAT32], logits)
        assert float(errors.largest.max()) < 1e-4 and bool(errors.same.all()), errors


def test_errors_are_those_worked_out_by_hand() -> None:
    # Of 4 tokens, likelihoods 1/2, 1/4, 1/8, 1/8; then 1/4, 1/2, 1/8, 1/8, from logits that are one larger.
    reference = Reference.of(torch.tensor([[8.0, 4.0, 2.0, 2.0]]).log())
    errors = Errors.of(reference, torch.tensor([[4.0, 8.0, 2.0, 2.0]]).log() + 1)
    two = math.log(2)
    assert float(errors.largest) == pytest.approx(1 + two, rel=1e-6)
    assert float(errors.mean) == pytest.approx((abs(1 - two) + 1 + two + 1 + 1) / 4, rel=1e-6)
    assert float(errors.kl) == pytest.approx(two / 2 - two / 4, rel=1e-5)
    assert float(errors.margin) == pytest.approx(two, rel=1e-6)
    assert errors.same.tolist() == [False]


def test_tokens_beyond_those_kept_count_as_one() -> None:
    vocabulary, tail = 1000, 900
    logits = torch.zeros(3, vocabulary)
    logits[:, :-tail] += 1
    other = logits.clone()
    other[:, -tail:] += 0.5
    kl = Errors.of(Reference.of(logits), other).kl
    p, q = logits.double().log_softmax(1), other.double().log_softmax(1)
    assert_close(kl, (p.exp() * (p - q)).sum(1), rtol=1e-6)
    assert float(Errors.of(Reference.of(logits), logits).kl.max()) < 1e-9
    # All of the vocabulary is compared where it is kept, at the first and the last position, and else the largest.
    assert Errors.of(Reference.of(logits), other).largest.tolist() == [0.5, 0.0, 0.5]


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    recording = Recording.load(MINI_RECORDING)
    recording.save(tmp_path / "again.safetensors")
    again = Recording.load(tmp_path / "again.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]
    assert (again.checkpoint, again.versions) == (recording.checkpoint, recording.versions)
    for name, prompt in recording.prompts.items():
        read = again.prompts[name]
        assert (read.ids, read.prompt_tokens, read.digest) == (prompt.ids, prompt.prompt_tokens, prompt.digest)
        assert {*read.references} == {FLOAT32, FP8} and {*read.errors} == {BFLOAT16, FP8}
        for form, reference in prompt.references.items():
            for part, tensor in vars(reference).items():
                other = getattr(read.references[form], part)
                if part == "whole":
                    assert {*other} == {*tensor} and all(torch.equal(other[i], tensor[i]) for i in tensor)
                else:
                    assert torch.equal(other, tensor)
        for form, errors in prompt.errors.items():
            assert all(torch.equal(getattr(read.errors[form], part), tensor) for part, tensor in vars(errors).items())


def test_another_file_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no safetensors")
    shutil.copy(MINI_CHECKPOINT / "model.safetensors", tmp_path / "weights")
    (tmp_path / "part").write_bytes(MINI_RECORDING.read_bytes()[:-1000])
    for name in ("text", "weights", "part", "absent"):
        with pytest.raises(ValueError, match=r"no recording \(.*record_logits.py"):
            Recording.load(tmp_path / name)


def test_a_recording_says_nothing_of_another_checkpoint_or_other_prompts(tmp_path: Path) -> None:
    shutil.copytree(MINI_CHECKPOINT, tmp_path / "mini")
    weights = load_file(tmp_path / "mini" / "model.safetensors")
    weights["model.language_model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "mini" / "model.safetensors", metadata={"format": "pt"})
    recording, prompts = Recording.load(MINI_RECORDING), encode_prompts(MINI_CHECKPOINT)
    (of_checkpoint,) = problems_of(recording, tmp_path / "mini", prompts)
    assert "of a checkpoint with digest" in of_checkpoint
    (of_prompts,) = problems_of(recording, MINI_CHECKPOINT, prompts[1:])
    assert of_prompts == "its prompts are others: fact"


def test_a_digest_is_the_same_however_a_checkpoint_is_sharded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "one")
    weights = load_file(tmp_path / "one" / "model.safetensors")
    (tmp_path / "two").mkdir()
    names = sorted(weights)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, tmp_path / "two" / f"{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"{i}.safetensors")
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert checkpoint_digest(tmp_path / "one") == checkpoint_digest(tmp_path / "two")


@pytest.mark.slow
def test_memory_is_bounded_by_a_layer_not_by_the_checkpoint(tmp_path: Path) -> None:
    """Six of 27B's layers, 5.9 GB in bfloat16; resident memory counts the pages of the mapped files too."""
    bench_convert.write_checkpoint(tmp_path, layers=6)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_type": "default"}
    rope |= {name: config.pop(name) for name in ("rope_theta", "partial_rotary_factor", "mrope_section")}
    architecture = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
    nested = {**architecture, "text_config": config | {"rope_parameters": rope}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    script = (
        "import sys, resource, record_logits as r; from pathlib import Path;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "logits = r.Recorder(Path(sys.argv[1]), [r.EncodedPrompt('a', tuple(range(20)), 10)]).logits(sys.argv[2]);"
        "print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    path = [str(Path(record_logits.__file__).parent), *sys.path]
    for form in (FLOAT32, FP8):
        command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {script}", str(tmp_path), form]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        before, peak = (1024 * int(number) for number in output.split())
        print(f"{form}: checkpoint {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, before {before / 1e9:.2f} GB")
        assert peak < size / 2
