#!/usr/bin/env python3
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What fp8 costs in accuracy, on a CPU in float32: the mini, and a random model with heavy-tailed rows.

- Rounding: each way of putting the matrices of the layers in fp8, against the unrounded model: relative error of the
  matrices, of their worst row, KL divergence (nats) and changes of the likeliest token over the last tokens of prompts.
- Long contexts, the mini with its own weights: how far the recurrent states with fp8 weights are from those with
  float32 ones, after more and more tokens; and the divergences of keys and values in fp8 at 4,096 cached tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from safetensors.torch import load_file, save_file

from qwen35.configuration_qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.fp8_form import FP8, FP8_MAX, Fp8Form, is_fp8_matrix
from qwen35.modeling_qwen35 import NeuronQwen35ForCausalLM
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.weights.fp8 import ScaledMatrix, quantise_per_channel
from qwen35.weights.text_rules import conversion_plan

Weights = Mapping[str, torch.Tensor]

HEAVY_TAILED = {
    "model_type": "qwen3_5_text", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "max_position_embeddings": 8192, "rope_theta": 10000.0,
}  # fmt: skip
SPREAD, GROUP = 2.5, 32
"""Rows come in groups of 32, half a head or a whole one, whose norms have logarithms of this standard deviation: from
1/150 to 150 for most. Queries, keys and what DeltaNet reads are normed by head, so that a small head counts as any."""
PROMPTS, PROMPT_TOKENS, BATCH = 256, 24, 32
LONG, LONG_ROWS, CHUNK, STEPS = 4096, 2, 512, 32


@dataclass(frozen=True)
class Divergence:
    """Of one model's next-token distributions from another's."""

    kl: float
    """Mean over positions, in nats."""
    changed: float
    """Share of positions whose likeliest token is another."""


@dataclass(frozen=True)
class Rounding:
    """What a way of rounding costs."""

    error: float
    """Norm of the difference over norm, all matrices together."""
    worst_row: float
    """The same of the row that suffers most."""
    divergence: Divergence


def write_heavy_tailed(path: Path, seed: int = 0) -> None:
    """A random bfloat16 checkpoint in whose matrices some rows are thousands of times as large as others."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(HEAVY_TAILED))
    config = Qwen35InferenceConfig.from_pretrained(path, Qwen35NeuronConfig())
    weights = {}
    for rule in conversion_plan(config):
        for name, shape in rule.sources.items():
            weight = torch.randn(shape, generator=generator)
            if is_fp8_matrix(name):
                groups = (SPREAD * torch.randn(shape[0] // GROUP, 1, generator=generator)).exp()
                weight *= groups.repeat_interleave(GROUP, 0)
                weight *= 0.5 * shape[0] ** 0.5 / weight.norm()
            elif "norm" in name:
                weight = 0.3 * weight + (1.0 if "linear_attn.norm" in name else 0.0)
            elif name.endswith(("A_log", "dt_bias")):
                weight = weight - (3.0 if "dt" in name else 0.0)
            else:
                weight *= 0.02 if "embed" in name else shape[-1] ** -0.5
            weights[name] = weight.bfloat16()
    save_file(weights, path / "model.safetensors")


def load(path: Path, **options: Any) -> NeuronQwen35ForCausalLM:
    """The model of a checkpoint in float32, on this CPU."""
    options = {"torch_dtype": torch.float32, "on_cpu": True, **options}
    config = Qwen35InferenceConfig.from_pretrained(path, neuron_config=Qwen35NeuronConfig(**options))
    model = NeuronQwen35ForCausalLM(str(path), config)
    model.to_cpu()
    return model


def last_logits(path: Path, prompts: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [prompts, V] after each of prompts [prompts, tokens]."""
    model = load(path, batch_size=BATCH, seq_len=prompts.shape[1], **options)
    found = []
    for ids in prompts.split(BATCH):
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[:, -1])
        model.reset()
    return torch.cat(found)


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> Divergence:
    """Of logits [..., V] from those of the reference."""
    found, expected = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    return Divergence(kl, (logits.argmax(-1) != reference.argmax(-1)).double().mean().item())


def rounded(source: Path, directory: Path, round_matrix: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Write the checkpoint at `source` with `round_matrix` done to its matrices, in float32."""
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    changed = {n: round_matrix(w.float()).contiguous() if is_fp8_matrix(n) else w for n, w in weights.items()}
    save_file(changed, directory / "model.safetensors")
    return directory


def cost(source: Path, variant: Path, prompts: torch.Tensor, reference: torch.Tensor, **options: Any) -> Rounding:
    """What the matrices of `variant` cost against those of `source`, whose logits are `reference`."""
    exact, found = (load_file(path / "model.safetensors") for path in (source, variant))
    squares = torch.zeros(2, dtype=torch.float64)
    worst = 0.0
    for name in filter(is_fp8_matrix, exact):
        norms = exact[name].double().norm(dim=1)
        errors = (found[name].double() - exact[name].double()).norm(dim=1)
        squares += torch.stack([errors.square().sum(), norms.square().sum()])
        worst = max(worst, (errors / norms).nan_to_num().max().item())
    error = (squares[0] / squares[1]).sqrt().item()
    return Rounding(error, worst, divergence(last_logits(variant, prompts, **options), reference))


def per_channel(weight: torch.Tensor) -> torch.Tensor:
    quantised, scale = quantise_per_channel("", weight)
    return quantised.float() * scale


def published_blocks(weight: torch.Tensor) -> ScaledMatrix:
    """As the published checkpoints: blocks of 128 x 128, their largest element at 448, scales in bfloat16."""
    form = Fp8Form((128, 128), ())
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
    largest = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax((1, 3))
    scale = (largest / 448).bfloat16()
    spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    scaled = (weight / spread[: weight.shape[0], : weight.shape[1]]).clamp(-448, 448)
    return ScaledMatrix("", scaled.to(FP8), scale, form)


def halved(matrix: ScaledMatrix) -> torch.Tensor:
    """Blocks with weight / 2 and scale * 2, which Trainium can hold: only odd subnormals change."""
    half = (matrix.weight.float() / 2).to(FP8)
    return 2 * ScaledMatrix("", half, matrix.scale, matrix.form).dequantised(torch.float32)


def with_scale(weight: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype, most: float) -> torch.Tensor:
    scale = largest / most
    return (weight / scale).clamp(-most, most).to(dtype).float() * scale


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "blocks, as published": lambda w: published_blocks(w).dequantised(torch.float32),
    "blocks / 2": lambda w: halved(published_blocks(w)),
    "per channel, from bfloat16": per_channel,
    "per channel, from published blocks": lambda w: torch.mul(*_floats(quantise_per_channel("", published_blocks(w)))),
    "one scale per matrix": lambda w: with_scale(w, w.abs().max(), FP8, FP8_MAX),
    "per channel, e5m2": lambda w: with_scale(w, w.abs().amax(1, keepdim=True), torch.float8_e5m2, 57344),
}


def _floats(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].float(), pair[1]


def prompts_of(path: Path) -> torch.Tensor:
    """Prompts [PROMPTS, PROMPT_TOKENS]: of the mini its own facts, of a random model random tokens."""
    if path == MINI_CHECKPOINT:
        return mini_text(PROMPTS * PROMPT_TOKENS).view(PROMPTS, PROMPT_TOKENS)
    return torch.randint(512, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))


def mini_text(tokens: int) -> torch.Tensor:
    """Ids [tokens] of what the mini was trained on."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MINI_CHECKPOINT / "tokenizer.json"))
    facts = json.loads((MINI_CHECKPOINT / "facts.json").read_text())
    ids = tokenizer.encode("".join(f"{fact['prompt']} {fact['answer']}.<|endoftext|>" for fact in facts)).ids
    return torch.tensor(ids * (tokens // len(ids) + 1))[:tokens]


def roundings(source: Path, scratch: Path) -> dict[str, Rounding]:
    """What each of `WAYS` costs for a checkpoint, and the model that keeps its weights in fp8."""
    prompts = prompts_of(source)
    reference = last_logits(source, prompts)
    found = {}
    for i, (way, round_matrix) in enumerate(WAYS.items()):
        variant = rounded(source, scratch / str(i), round_matrix)
        found[way] = cost(source, variant, prompts, reference)
    kept = divergence(last_logits(source, prompts, weights_dtype="fp8"), reference)
    found["weights_dtype='fp8'"] = Rounding(*list(vars(found["per channel, from bfloat16"]).values())[:2], kept)
    return found


def long_context(path: Path, **options: Any) -> tuple[dict[int, list[torch.Tensor]], torch.Tensor]:
    """Recurrent states by number of tokens, and logits [rows, STEPS, V] of given tokens after LONG cached ones."""
    ids = mini_text(LONG_ROWS * (LONG + STEPS)).view(LONG_ROWS, -1)
    model = load(path, batch_size=LONG_ROWS, seq_len=LONG + STEPS, prefill_chunk_size=CHUNK, **options)
    states: dict[int, list[torch.Tensor]] = {}
    for start in range(0, LONG, CHUNK):
        positions = torch.arange(start, start + CHUNK).expand(LONG_ROWS, CHUNK)
        mask = torch.ones(LONG_ROWS, start or CHUNK, dtype=torch.long)
        model(input_ids=ids[:, start : start + CHUNK], attention_mask=mask, position_ids=positions)
        entries = model.cache_entries()[0]
        layers = model.config.linear_attention_layers
        states[start + CHUNK] = [model.cache_layout.layer_state(entries, i)[0].clone() for i in layers]
    logits = []
    for step in range(LONG, LONG + STEPS):
        mask = torch.ones(LONG_ROWS, step, dtype=torch.long)
        positions = torch.full((LONG_ROWS, 1), step)
        output = model(input_ids=ids[:, step : step + 1], attention_mask=mask, position_ids=positions)
        logits.append(output.logits[:, -1])
    return states, torch.stack(logits, 1)


def drift(found: Mapping[int, list[torch.Tensor]], expected: Mapping[int, list[torch.Tensor]]) -> dict[int, float]:
    """Relative distance of recurrent states, the mean over layers, by number of tokens."""
    return {
        tokens: sum(
            ((a - b).norm() / b.norm()).item() for a, b in zip(found[tokens], expected[tokens], strict=True)
        ) / len(expected[tokens])
        for tokens in expected
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        heavy = Path(scratch, "heavy")
        write_heavy_tailed(heavy)
        tables = {}
        for label, source in (("the mini", MINI_CHECKPOINT), ("heavy-tailed rows", heavy)):
            Path(scratch, label).mkdir()
            tables[label] = roundings(source, Path(scratch, label))
    states, logits = long_context(MINI_CHECKPOINT)
    fp8_states, fp8_logits = long_context(MINI_CHECKPOINT, weights_dtype="fp8")
    _, kv_logits = long_context(MINI_CHECKPOINT, kv_cache_dtype="fp8")
    _, both_logits = long_context(MINI_CHECKPOINT, weights_dtype="fp8", kv_cache_dtype="fp8")
    drifts = drift(fp8_states, states)
    after = {
        "weights in fp8": divergence(fp8_logits, logits),
        "keys and values in fp8": divergence(kv_logits, logits),
        "both": divergence(both_logits, logits),
    }
    if args.json:
        whole = {label: {way: asdict(r) for way, r in table.items()} for label, table in tables.items()}
        print(json.dumps({**whole, "drift": drifts, "after": {name: asdict(d) for name, d in after.items()}}))
        return
    for label, table in tables.items():
        print(f"{label}: {PROMPTS} prompts of {PROMPT_TOKENS} tokens")
        print(f"  {'':<36}{'error of W':>12}{'worst row':>12}{'KL':>12}{'argmax':>12}")
        for way, r in table.items():
            d = r.divergence
            print(f"  {way:<36}{r.error:>12.4f}{r.worst_row:>12.4f}{d.kl:>12.6f}{d.changed:>12.1%}")
    print(f"the mini, {LONG_ROWS} rows of its own text: relative distance of recurrent states, weights in fp8")
    print("  " + "  ".join(f"{tokens:,}: {value:.4f}" for tokens, value in drifts.items()))
    print(f"at {LONG:,} cached tokens, {LONG_ROWS * STEPS} next tokens")
    for name, d in after.items():
        print(f"  {name:<36}KL {d.kl:.6f}  argmax changed {d.changed:.1%}")


if __name__ == "__main__":
    main()
