# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The MTP head against vLLM's own, recorded: first pass, drafts, logits, keys and values, for text and with images.

`test/data/mtp_reference.safetensors` has random weights of a decoder of one layer and of its head, and what vLLM 0.33's
`Qwen3_5MTP` and `EagleProposer` compute of them in float32; for images with keys at the index of the sequence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen35.layers.attention import RecentTokens
from qwen35.layers.cache import KeyValue
from qwen35.modeling_qwen35_vl import PlacedMedia
from qwen35.serving.runner import ModelRunner, Row
from support import vl_cases
from support.compare import assert_close
from support.models import TINY, load_neuron, random_prompts, save_checkpoint

REFERENCE = Path(__file__).parents[1] / "data" / "mtp_reference.safetensors"
TOLERANCE = 1e-5
"""Both compute in float32, in another order; vLLM's own agrees with the formula within 3e-6."""


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE)


def sizes() -> dict[str, Any]:
    with safe_open(REFERENCE, "pt") as file:
        given = json.loads(file.metadata()["cfg"])
    assert TINY["hidden_size"] == given["hidden"]
    return dict(
        vocab_size=given["vocab"],
        intermediate_size=given["intermediate"],
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=given["heads"],
        num_key_value_heads=given["kv_heads"],
        head_dim=given["head_dim"],
        rms_norm_eps=given["eps"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": given["theta"],
            "partial_rotary_factor": given["partial"],
            "mrope_section": given["section"],
            "mrope_interleaved": given["mrope_interleaved"],
        },
    )


def weights(reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("w."): tensor for name, tensor in reference.items() if name.startswith("w.")}


def save_text(path: Path, reference: dict[str, torch.Tensor]) -> Path:
    fields = {"model_type": "qwen3_5_text", "dtype": "float32", **TINY, **sizes()}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    save_file(weights(reference), path / "model.safetensors")
    return path


def save_with_vision(path: Path, reference: dict[str, torch.Tensor]) -> Path:
    """The same beside a random vision encoder, which the recorded embeddings take the place of."""
    vl_cases.save_vl_checkpoint(path)
    fields = json.loads((path / "config.json").read_text())
    fields["text_config"] |= sizes()
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    fields |= {name: fields["text_config"]["vocab_size"] - 1 - i for i, name in enumerate(names)}
    (path / "config.json").write_text(json.dumps(fields))
    vision = {name: t for name, t in load_file(path / "model.safetensors").items() if "visual" in name}
    save_file({**weights(reference), **vision}, path / "model.safetensors")
    return path


def model_and_row(kind: str, path: Path, reference: dict[str, torch.Tensor], **options: Any) -> tuple[Any, Row]:
    given = {name.removeprefix(f"io.{kind}."): tensor for name, tensor in reference.items()}
    row = Row(0, given["input_ids"].tolist())
    options = {"num_speculative_tokens": 3, "batch_size": 1, "seq_len": 128, **options}
    if kind == "text":
        return load_neuron(save_text(path, reference), **options), row
    positions, is_image = given["position_ids"].unsqueeze(0), given["is_image"].bool().unsqueeze(0)
    embeddings = torch.zeros(1, len(row.tokens), TINY["hidden_size"])
    embeddings[is_image] = given["vision_embeds"]
    delta = positions.amax(dim=(1, 2)) + 1 - len(row.tokens)
    placed = PlacedMedia(positions, embeddings, is_image, delta)
    row = Row(0, row.tokens, placed=placed)
    return vl_cases.load(str(save_with_vision(path, reference)), **options), row


@pytest.mark.parametrize("chunk", [None, 8], ids=["one piece", "chunks of 8"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_drafts_and_keys_are_those_of_vllm(
    kind: str, chunk: int | None, tmp_path: Path, reference: dict[str, torch.Tensor], backend: str
) -> None:
    model, row = model_and_row(kind, tmp_path / "checkpoint", reference, prefill_chunk_size=chunk)
    runner, prompt = ModelRunner(model), len(row.tokens)
    while row.cached < prompt:
        runner.encode([row])
    module = model.context_encoding_model.model
    assert_close(module.kv_mgr.speculation.hidden[0], reference[f"io.{kind}.hidden"][-1], atol=TOLERANCE, rtol=0)
    row.tokens.append(int(reference[f"io.{kind}.next_token"]))
    row.placed = None
    passes: list[Any] = []
    handle = module.mtp.register_forward_hook(lambda head, inputs, outputs: passes.append(outputs))
    runner.draft([row])
    handle.remove()
    assert row.drafts == reference[f"io.{kind}.drafts"].tolist()
    outputs = torch.stack([output[0, 0] for output, _ in passes])  # of the prompt's last pair, then of two drafts
    assert_close(outputs, reference[f"io.{kind}.mtp_draft_out"], atol=TOLERANCE, rtol=0)
    assert_close(module.lm_head(outputs), reference[f"io.{kind}.draft_logits"], atol=TOLERANCE, rtol=0)
    cached = model.cache_layout.layer_state(module.kv_mgr.past_key_values, 1)
    for name, entry, index in (("k", cached.key, 0), ("v", cached.value, 1)):
        expected = reference[f"io.{kind}.mtp_{name}_cache"]
        ours = entry[0, :, 1 : prompt + 1].transpose(0, 1)  # a pair's key is at its token, one after vLLM's place
        assert_close(ours, expected[:prompt], atol=TOLERANCE, rtol=0, label=f"{name} of the prompt")
        own = torch.cat([key_value[index][0] for _, key_value in passes[1:]], dim=1).transpose(0, 1)
        assert_close(own, expected[prompt:], atol=TOLERANCE, rtol=0, label=f"{name} of drafts")


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_first_pass_is_that_of_vllm(
    kind: str, tmp_path: Path, reference: dict[str, torch.Tensor], backend: str
) -> None:
    model, row = model_and_row(kind, tmp_path / "checkpoint", reference)
    module, given = model.context_encoding_model.model, {}
    for name in ("input_ids", "next_token", "position_ids", "hidden", "mtp_first_pass"):
        given[name] = reference[f"io.{kind}.{name}"]
    following = torch.cat((given["input_ids"][1:], given["next_token"])).unsqueeze(0)
    embeds = module.embed_tokens(following)
    if row.placed is not None:
        shifted = row.placed.columns(1, following.shape[1])
        embeds = torch.where(shifted.mask.unsqueeze(-1), shifted.embeddings, embeds)
    nothing = KeyValue(*(torch.zeros(1, 2, 1, 32) for _ in range(2)))
    cached = RecentTokens(nothing, torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    output, _ = module.mtp(embeds, given["hidden"].unsqueeze(0), given["position_ids"].unsqueeze(0), cached)
    assert_close(output[0], given["mtp_first_pass"], atol=TOLERANCE, rtol=0)


def test_logits_that_are_no_numbers_end_their_row_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, mtp=True)
    model = load_neuron(tmp_path, num_speculative_tokens=2, batch_size=2)
    runner, rows = ModelRunner(model), [Row(i, prompt) for i, prompt in enumerate(random_prompts([5, 7]))]
    runner.encode(rows)
    for row in rows:
        row.tokens.append(3)
    module = model.context_encoding_model.model
    healthy = [Row(row.slot, [*row.tokens], row.cached) for row in rows]
    hook = module.norm.register_forward_hook(
        lambda norm, inputs, output: output.index_fill(0, torch.tensor([0]), torch.nan)
    )
    broken, fine = runner.speculate(rows)
    hook.remove()
    assert broken is None
    runner.encode(again := [Row(1, rows[1].tokens[:7])])
    again[0].tokens.append(3)
    assert runner.speculate([again[0]])[0] == fine
    assert healthy[0].cached == rows[0].cached, "nothing is counted as taken in"


def test_a_model_without_a_head_has_no_programs_for_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1)
    model = load_neuron(tmp_path)
    with pytest.raises(ValueError, match="there is no draft_model: set num_speculative_tokens"):
        ModelRunner(model).draft([Row(0, [1, 2], cached=1)])
