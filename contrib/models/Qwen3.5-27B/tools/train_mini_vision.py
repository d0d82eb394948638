# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Teach the mini checkpoint to see, so that a question about a picture or a clip has a right answer.

Two steps, from a checkpoint that knows its facts and a vision tower that knows nothing:

1. the tower alone: the merged patch at the centre of a shape must tell which shape it is, its colour, its place and how
   many there are, to linear heads that are then thrown away. The whole model would see a fiftieth of these pictures;
2. the whole model answers questions in the chat form, while the facts are repeated so that none is lost.

The model is transformers' own. To make the packaged checkpoint anew, train the facts first, and last an MTP head that
fits the new weights (`train_mini_mtp.py`):

    python tools/train_mini.py && python tools/train_mini_vision.py  # the second: 33 minutes on one CPU core

One such run of this script gave 97.5 % of the pictures, 93 % of the clips and 99.9 % of the facts. The packaged one,
with 98.5, 94 and 100 %, was also asked which shape has a colour, a question that it did not learn and that is gone.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5 import modeling_qwen3_5

from mini_facts import Fact, all_facts
from mini_images import (
    COLOURS,
    CORNERS,
    DIRECTIONS,
    SHAPES,
    Picture,
    Question,
    Split,
    Thing,
    clip,
    crowd,
    held_out_clips,
    held_out_images,
    image,
)
from train_mini import (
    DEFAULT_OUT,
    GRADIENT_CLIP,
    REQUIRED_ACCURACY,
    Document,
    batches,
    documents,
    encode,
    evaluate,
    put_in_place,
    save_checkpoint,
    set_up,
    unfinished,
    write_json,
)

PATCH, MERGE, FRAMES_PER_PATCH = 16, 2, 2
CELL = PATCH * MERGE  # pixels a side that become one token
MEAN = STD = 0.5
REQUIRED_PICTURE_ACCURACY = 0.9
HELD_OUT_IMAGES, HELD_OUT_CLIPS = 200, 100

# Step 1
NOTHING = "nothing"
HEADS = ([NOTHING, *SHAPES], list(COLOURS), [*CORNERS, *DIRECTIONS], ["1", "2", "3", "4"])
IGNORED = -100  # of F.cross_entropy
TOWER_BATCH, TOWER_LEARNING_RATE, TOWER_WARMUP_STEPS, TOWER_WEIGHT_DECAY = 32, 2e-3, 100, 0.02

# Step 2
ROW_LENGTH, QUESTIONS_PER_PICTURE = 96, 3
IMAGES_PER_STEP, CLIPS_PER_STEP, FACT_ROWS_PER_STEP = 9, 5, 2
ROUNDS = ((300, 1e-3), (200, 7e-4))  # steps and learning rate; the second settles what the first found
VISION_LEARNING_RATE, WARMUP_STEPS = 5e-4, 30
FRESH_PICTURES = 1_000_000  # numbers kept for each round, after those of step 1
EMBEDDING_SCALE = 3.0  # of a picture's tokens over a word's, at the start


@dataclass(frozen=True)
class Seen:
    """A picture as the model takes it: pixels [patches, 3 * 2 * 16 * 16] in [-1, 1] and the patch grid (t, h, w)."""

    picture: Picture
    pixels: Tensor
    grid: tuple[int, int, int]

    @property
    def is_clip(self) -> bool:
        return self.picture.fps is not None


@dataclass(frozen=True)
class Inputs:
    """Keyword arguments of the model for right-padded rows, and the loss weight of each token as a target [B, S]."""

    model: dict[str, Tensor]
    weights: Tensor


def save_processors(folder: Path) -> None:
    """Write the image and video processor settings with the published checkpoints' fields; large pictures are shrunk
    to the sizes that were trained."""
    common = {"patch_size": PATCH, "temporal_patch_size": FRAMES_PER_PATCH, "merge_size": MERGE}
    common |= {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, "processor_class": "Qwen3VLProcessor"}
    sizes = {"longest_edge": 128 * 128, "shortest_edge": 64 * 64}
    stills = {"size": sizes, **common, "image_processor_type": "Qwen2VLImageProcessorFast"}
    write_json(folder / "preprocessor_config.json", stills)
    sizes = {"longest_edge": 16 * 96 * 96, "shortest_edge": 64 * 64}  # of all frames together
    clips = {"size": sizes, **common, "video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(folder / "video_preprocessor_config.json", clips)


def look(picture: Picture) -> Seen:
    """Resize to whole tokens and cut into patches, as Qwen2VLImageProcessor and Qwen3VLVideoProcessor do.

    Patches come in groups of 2 x 2 that become one token; a still is a clip of one frame twice.
    """
    width, height = (CELL * round(side / CELL) for side in picture.frames[0].size)
    frames = [np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in picture.frames]
    video = torch.from_numpy(np.stack(frames if picture.fps else frames * FRAMES_PER_PATCH))
    t, h, w = len(video) // FRAMES_PER_PATCH, height // PATCH, width // PATCH
    cut = video.view(t, FRAMES_PER_PATCH, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    pixels = cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
    return Seen(picture, (pixels / 255 - MEAN) / STD, (t, h, w))


def chat_text(tokenizer: PreTrainedTokenizerBase, seen: Seen, questions: Sequence[Question], outer_pair: bool) -> str:
    """A conversation about one picture, its placeholders spelled out as Qwen3VLProcessor does.

    Each temporal patch of a clip has its time and its own vision_start and vision_end. The pair of the chat template
    is left around them by transformers 5 (`outer_pair`) and taken away by 4.57.
    """
    medium = "video" if seen.is_clip else "image"
    messages: list[dict] = []
    for question in questions:
        content = [{"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": content if messages else [{"type": medium}, *content]})
        messages.append({"role": "assistant", "content": f"{question.answer}."})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    t, h, w = seen.grid
    pads = f"<|{medium}_pad|>" * (h * w // MERGE**2)
    if not seen.is_clip:
        return text.replace("<|image_pad|>", pads)
    middles = [(2 * at + 0.5) / seen.picture.fps for at in range(t)]
    blocks = "".join(f"<{seconds:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for seconds in middles)
    return text.replace("<|video_pad|>" if outer_pair else "<|vision_start|><|video_pad|><|vision_end|>", blocks)


def conversation(
    tokenizer: PreTrainedTokenizerBase, seen: Seen, questions: Sequence[Question], outer_pair: bool
) -> Document:
    """`chat_text` as tokens, the answers marked, each with its end token."""
    text = chat_text(tokenizer, seen, questions, outer_pair)
    answers = re.finditer(r"<\|im_start\|>assistant\n(?:<think>\n\n</think>\n\n)?(.*?<\|im_end\|>)", text)
    return encode(tokenizer, text, [match.span(1) for match in answers])


def training_conversation(tokenizer: PreTrainedTokenizerBase, seen: Seen, rng: random.Random) -> Document:
    """As many questions as fit a row, in any order."""
    asked = rng.sample(seen.picture.questions, min(QUESTIONS_PER_PICTURE, len(seen.picture.questions)))
    outer_pair = rng.random() < 0.5
    while len((document := conversation(tokenizer, seen, asked, outer_pair)).ids) > ROW_LENGTH:
        asked.pop()
    return document


def reset_tower(model: Qwen3_5ForConditionalGeneration) -> None:
    """Draw the vision tower anew: at transformers' 0.02, blocks this narrow add next to nothing and learn slowly."""
    tower = model.model.visual
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(tower.pos_embed.weight, std=0.3)
    nn.init.normal_(tower.patch_embed.proj.weight, std=0.03)
    nn.init.zeros_(tower.patch_embed.proj.bias)


def tower_examples() -> Iterator[tuple[Tensor, tuple[int, int, int], Tensor]]:
    """Endless pixels of one temporal patch, its grid, and what each token [tokens, heads] must tell."""
    for number in count():
        seen = look(crowd(number))
        yield seen.pixels, seen.grid, token_labels(seen, seen.picture.things[0], seen.picture.things[0])
        if number % 4 == 0:
            seen = look(clip(Split.TRAIN, number))
            t, h, w = seen.grid
            at = number // 4 % t
            first, second = seen.picture.things[FRAMES_PER_PATCH * at : FRAMES_PER_PATCH * (at + 1)]
            yield seen.pixels.view(t, h * w, -1)[at], (1, h, w), token_labels(seen, first, second)


def token_labels(seen: Seen, first: Sequence[Thing], second: Sequence[Thing]) -> Tensor:
    """Class per token and head [tokens, heads]: of the thing whose centre, between two frames, lies in the token."""
    (width, height), (_, h, w) = seen.picture.frames[0].size, seen.grid
    rows, columns = h // MERGE, w // MERGE
    labels = torch.full((rows * columns, len(HEADS)), IGNORED)
    labels[:, 0] = HEADS[0].index(NOTHING)
    for one, other in zip(first, second, strict=True):
        row = min(int((one.y + other.y) / 2 / height * rows), rows - 1)
        column = min(int((one.x + other.x) / 2 / width * columns), columns - 1)
        told = (one.shape, one.colour, one.place, str(sum(thing.shape == one.shape for thing in first)))
        labels[row * columns + column] = torch.tensor([h.index(word) for h, word in zip(HEADS, told, strict=True)])
    return labels


def cosine(steps: int, warmup: int, step: int) -> float:
    """Share of the learning rate at `step`: a linear rise, then half a cosine down to a hundredth."""
    return min((step + 1) / warmup, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def train_tower(model: Qwen3_5ForConditionalGeneration, steps: int) -> None:
    """Train a new tower on what each token shows, and scale its output towards that of the word embeddings."""
    reset_tower(model)
    tower, words = model.model.visual.train(), model.get_input_embeddings().weight
    sizes = [len(head) for head in HEADS]
    heads = nn.Linear(words.shape[1], sum(sizes))
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=TOWER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=TOWER_WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine, steps, TOWER_WARMUP_STEPS))
    examples = tower_examples()
    progress = tqdm(range(steps), desc="tower", mininterval=5.0)
    for _ in progress:
        pixels, grids, labels = zip(*(next(examples) for _ in range(TOWER_BATCH)), strict=True)
        told, target = tower(torch.cat(pixels), grid_thw=torch.tensor(grids)).pooler_output, torch.cat(labels)
        logits = heads(told).split(sizes, dim=1)
        loss = sum(F.cross_entropy(logits[head], target[:, head], ignore_index=IGNORED) for head in range(len(HEADS)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        right = logits[0].argmax(1) == target[:, 0]
        shapes = right[target[:, 0] != HEADS[0].index(NOTHING)].float().mean().item()
        progress.set_postfix(loss=f"{loss.item():.3f}", shapes=f"{shapes:.0%}", refresh=False)
    with torch.no_grad():
        scale = EMBEDDING_SCALE * words.square().mean().sqrt() / told.square().mean().sqrt()
        tower.merger.linear_fc2.weight.mul_(scale)
        tower.merger.linear_fc2.bias.mul_(scale)


def model_inputs(
    model: Qwen3_5ForConditionalGeneration,
    conversations: Sequence[tuple[Seen, Document]],
    rows: Tensor,
    weights: Tensor,
) -> Inputs:
    """Conversations as right-padded rows, above further text rows [B, S] with their loss weights [B, S].

    No mask is needed: nothing is read after the padding, and no token sees what comes after it.
    """
    length = max([rows.shape[1], *(len(document.ids) for _, document in conversations)])
    ids = F.pad(rows, (0, length - rows.shape[1], len(conversations), 0))
    weights = F.pad(weights, (0, length - weights.shape[1], len(conversations), 0))
    for row, (_, document) in enumerate(conversations):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        weights[row, : len(document.ids)] = torch.tensor(document.is_answer, dtype=weights.dtype)
    kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    inputs = {"input_ids": ids, "mm_token_type_ids": kinds}
    for is_clip, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        if found := [seen for seen, _ in conversations if seen.is_clip == is_clip]:
            inputs[pixels] = torch.cat([seen.pixels for seen in found])
            inputs[grid] = torch.tensor([seen.grid for seen in found])
    return Inputs(inputs, weights)


def delta_rule_of_rows(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: object
) -> tuple[Tensor, None]:
    """transformers' torch_chunk_gated_delta_rule for one chunk that starts from an empty state and leaves none.

    Rows of 96 tokens need no state of 128 x 128 a head, whose updates would take half of a training step.
    """

    def unit(x: Tensor) -> Tensor:  # [B, Hk, 1, S, K]
        return (x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)).transpose(1, 2).unsqueeze(2)

    q, k = unit(query) * key.shape[3] ** -0.5, unit(key)
    v, g, beta = (x.unflatten(2, (key.shape[2], -1)).movedim(1, 3) for x in (value, g, beta))  # [B, Hk, R, S, ...]
    since = g.cumsum(dim=-1)
    above = torch.ones(2 * since.shape[-1:], dtype=torch.bool).triu(1)
    decay = (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()
    a = (k @ k.mT) * decay * beta.unsqueeze(-1)
    u = torch.linalg.solve_triangular(a, v * beta.unsqueeze(-1), upper=False, unitriangular=True)
    return (((q @ k.mT) * decay) @ u).movedim(3, 1).flatten(2, 3), None


def train_answers(
    model: Qwen3_5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    facts: list[Fact],
    number: int,
    seed: int,
) -> None:
    """Round `number` of training the whole model on questions about pictures, the facts repeated in every step."""
    steps, learning_rate = ROUNDS[number]
    first_picture = FRESH_PICTURES * (number + 1)
    rng = random.Random(seed + number)
    vision = list(model.model.visual.parameters())
    seen_by = {id(parameter) for parameter in vision}
    text = [parameter for parameter in model.parameters() if id(parameter) not in seen_by]
    groups = [{"params": vision, "lr": VISION_LEARNING_RATE}, {"params": text, "lr": learning_rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine, steps, WARMUP_STEPS))
    padding_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    replay = batches(
        documents(tokenizer, facts, rng), padding_id, [ROW_LENGTH], tokens_per_step=FACT_ROWS_PER_STEP * ROW_LENGTH
    )
    images = (image(Split.TRAIN, drawn) for drawn in count(first_picture))
    clips = (clip(Split.TRAIN, drawn) for drawn in count(first_picture))
    model.train()
    progress = tqdm(range(steps), desc="answers", mininterval=5.0)
    losses = {"images": 0.0, "clips": 0.0, "facts": 0.0}
    for step in progress:
        pictures = [next(images) for _ in range(IMAGES_PER_STEP)] + [next(clips) for _ in range(CLIPS_PER_STEP)]
        seen = [look(picture) for picture in pictures]
        conversations = [(one, training_conversation(tokenizer, one, rng)) for one in seen]
        inputs = model_inputs(model, conversations, *next(replay))
        logits = model(**inputs.model, use_cache=False).logits[:, :-1]
        targets, weights = inputs.model["input_ids"][:, 1:], inputs.weights[:, 1:]
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        answers = weights == 1.0
        optimizer.zero_grad()
        ((loss * weights).sum() / answers.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        parts = (IMAGES_PER_STEP, CLIPS_PER_STEP, FACT_ROWS_PER_STEP)
        for name, own, own_loss in zip(losses, answers.split(parts), loss.detach().split(parts), strict=True):
            share = 1 / min(step + 1, 20)  # a running mean over some twenty steps
            losses[name] += share * (own_loss[own].mean().item() - losses[name])
        progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
    model.eval()


@torch.no_grad()
def answered(
    model: Qwen3_5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[Picture, Question]],
    outer_pair: bool = False,
) -> list[bool]:
    """Whether greedy decoding gives the answer and the end token: each token is the likeliest after those before it."""
    right: list[bool] = []
    nothing = torch.empty(0, 0, dtype=torch.long)
    for at in range(0, len(asked), 20):
        seen = [(look(picture), question) for picture, question in asked[at : at + 20]]
        conversations = [(one, conversation(tokenizer, one, [question], outer_pair)) for one, question in seen]
        inputs = model_inputs(model, conversations, nothing, nothing.float())
        likeliest = model(**inputs.model, use_cache=False).logits[:, :-1].argmax(dim=2)
        hits = (likeliest == inputs.model["input_ids"][:, 1:]) | (inputs.weights[:, 1:] == 0)
        right += hits.all(dim=1).tolist()
    return right


def report(asked: Sequence[tuple[Picture, Question]], right: Sequence[bool], name: str) -> float:
    """Print right answers by kind of question and return their share."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    for (_, question), is_right in zip(asked, right, strict=True):
        kinds[question.kind].append(is_right)
    for kind, outcomes in kinds.items():
        print(f"{name}: {kind:12s} {sum(outcomes):4d} of {len(outcomes):4d}  {sum(outcomes) / len(outcomes):7.1%}")
    return sum(right) / len(right)


def main() -> int:
    """Train, save, evaluate; the folder is replaced only by a checkpoint that passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, default=DEFAULT_OUT, help="checkpoint to start from, of train_mini.py")
    parser.add_argument("--tower-steps", type=int, default=2500)
    args = set_up(parser, threads=1)
    started = time.monotonic()
    facts = all_facts()
    with unfinished(args.out) as partial_out:
        shutil.copytree(args.facts, partial_out)
        tokenizer = AutoTokenizer.from_pretrained(args.facts)
        model = Qwen3_5ForConditionalGeneration.from_pretrained(args.facts, dtype=torch.float32)
        train_tower(model, args.tower_steps)
        with mock.patch.object(modeling_qwen3_5, "torch_chunk_gated_delta_rule", delta_rule_of_rows):
            for number in range(len(ROUNDS)):
                train_answers(model, tokenizer, facts, number, args.seed)
        save_checkpoint(model, tokenizer, facts, partial_out)
        save_processors(partial_out)
        print(f"trained in {(time.monotonic() - started) / 60:.1f} minutes")
        accuracy = evaluate(partial_out, facts)
        model = Qwen3_5ForConditionalGeneration.from_pretrained(partial_out, dtype=torch.float32).eval()
        images, clips = held_out_images(HELD_OUT_IMAGES), held_out_clips(HELD_OUT_CLIPS)
        seen = [report(images, answered(model, tokenizer, images), "images")]
        seen += [report(clips, answered(model, tokenizer, clips, outer), "clips") for outer in (False, True)]
        print(f"facts {accuracy:.2%}, images {seen[0]:.1%}, clips {seen[1]:.1%}, within an outer pair {seen[2]:.1%}")
        if accuracy < REQUIRED_ACCURACY or min(seen) < REQUIRED_PICTURE_ACCURACY:
            required = f"{REQUIRED_ACCURACY:.0%} of the facts and {REQUIRED_PICTURE_ACCURACY:.0%} of the pictures"
            print(f"under {required}: {args.out} is left as it was", file=sys.stderr)
            return 1
        put_in_place(partial_out, args.out)
        return 0


if __name__ == "__main__":
    sys.exit(main())
