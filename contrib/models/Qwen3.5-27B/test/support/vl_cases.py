# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A random vision-language checkpoint and rows of text, images and video, without transformers' own model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import GenerationConfig

from qwen35 import (
    HuggingFaceGenerationAdapter,
    NeuronQwen35VLForCausalLM,
    Qwen35NeuronConfig,
    Qwen35VLInferenceConfig,
)
from qwen35.configuration_qwen35_vl import Qwen35VisionConfig
from qwen35.weights.vision_rules import vision_plan

from .models import TINY, random_weights

START, END, IMAGE, VIDEO = 150, 151, 152, 153
VISION = dict(
    depth=2,
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    out_hidden_size=TINY["hidden_size"],
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_position_embeddings=64,
)
PATCH_DIM = 3 * 2 * 4 * 4
SEQ_LEN, ROWS = 320, 3


@dataclass
class Row:
    """Token ids, and the pixels and grids of the images and videos among them, each in order."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, int, int]] = field(default_factory=list)
    videos: list[tuple[int, int, int]] = field(default_factory=list)
    seed: int = 0

    def pixels(self, grids: list[tuple[int, int, int]], offset: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2 * self.seed + offset)
        return torch.randn(sum(t * h * w for t, h, w in grids), PATCH_DIM, generator=generator)


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    """One to three rows of text with up to four images and videos each, of mixed sizes."""
    sides = st.sampled_from([2, 4, 6])
    rows = []
    for _ in range(draw(st.integers(1, ROWS))):
        row = Row(seed=draw(st.integers(0, 2**16)))
        for kind in draw(st.lists(st.sampled_from("iv"), max_size=4)):
            row.ids += draw(st.lists(st.integers(0, 149), max_size=5))
            height, width, frames = draw(sides), draw(sides), draw(st.integers(1, 3)) if kind == "v" else 1
            (row.images if kind == "i" else row.videos).append((frames, height, width))
            for _ in range(frames):  # a timestamp before each frame of a video
                row.ids += draw(st.lists(st.integers(0, 149), min_size=kind == "v", max_size=2))
                row.ids += [START, *[IMAGE if kind == "i" else VIDEO] * (height * width // 4), END]
        row.ids += draw(st.lists(st.integers(0, 149), min_size=1, max_size=12))
        rows.append(row)
    return rows


def media(rows: list[Row]) -> dict[str, torch.Tensor]:
    """The keyword arguments of all images and videos of a batch, as the processor gives them."""
    found = {}
    if any(row.images for row in rows):
        found["pixel_values"] = torch.cat([row.pixels(row.images, 0) for row in rows])
        found["image_grid_thw"] = torch.tensor([grid for row in rows for grid in row.images])
    if any(row.videos for row in rows):
        found["pixel_values_videos"] = torch.cat([row.pixels(row.videos, 1) for row in rows])
        found["video_grid_thw"] = torch.tensor([grid for row in rows for grid in row.videos])
    return found


def save_vl_checkpoint(path: Path, mtp: bool = False) -> None:
    """A random checkpoint in which every weight matters, with its config.json, and an MTP head if asked for."""
    generator = np.random.default_rng(4)
    weights = random_weights(3, mtp=mtp)
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in weights.items()}
    for rule in vision_plan(Qwen35VisionConfig.from_dict(VISION), torch.float32, lambda t: t):
        for name, shape in rule.sources.items():
            noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
            if "norm" in name:
                noise = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif "pos_embed" not in name:
                noise = noise * noise[0].numel() ** -0.5
            tensors[f"model.visual.{name}"] = noise
    fields = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_5_text", **TINY},
        "vision_config": {"model_type": "qwen3_5_vision", **VISION},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def load(path: str, **options: Any) -> NeuronQwen35VLForCausalLM:
    options = {"torch_dtype": torch.float32, "on_cpu": True, "seq_len": SEQ_LEN, "batch_size": ROWS, **options}
    config = Qwen35VLInferenceConfig.from_pretrained(path, neuron_config=Qwen35NeuronConfig(**options))
    model = NeuronQwen35VLForCausalLM(path, config)
    model.to_cpu()
    return model


def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [IMAGE] * (length - len(row.ids)) for row in rows])  # padding that looks like more
    return ids, torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows])


def greedy(model: NeuronQwen35VLForCausalLM, rows: list[Row], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = padded(rows)
    adapter = HuggingFaceGenerationAdapter(model)
    adapter.generation_config.eos_token_id = None
    output = adapter.generate(ids, attention_mask=mask, generation_config=options(steps), **media(rows))
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def options(steps: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=steps, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )


EXAMPLE = [
    Row([7, START, *[IMAGE] * 6, END, 3, START, IMAGE, END, 9], images=[(1, 4, 6), (1, 2, 2)], seed=1),
    Row([1, 2, 3], seed=2),
    Row(
        [START, *[VIDEO] * 2, END, 5, START, *[VIDEO] * 2, END, 8, START, *[IMAGE] * 4, END, 4, 4],
        images=[(1, 4, 4)],
        videos=[(2, 4, 2)],
        seed=3,
    ),
]


def types(ids: torch.Tensor) -> torch.Tensor:
    """What transformers 5's processor calls mm_token_type_ids: 1 at images, 2 at videos."""
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
