# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Train the mini checkpoint's multi-token prediction head, so that speculative decoding has something to accept.

The head learns what the mini itself says: its greedy answers to facts in raw and chat form, to beginnings of sentences
and to questions about pictures and clips. It drafts as it will be used: each further step is fed with the head's own
output, and sees keys and values of its own drafts after those that the main model's hidden states gave.

Only `mtp.*` tensors are trained and written, in bf16; every other tensor stays as it is, bit for bit:

    python tools/train_mini_mtp.py  # after train_mini.py and train_mini_vision.py

The packaged head is of one such run, of a minute and a half on eight CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm, apply_rotary_pos_emb

from mini_facts import PLAIN_ENGLISH, Fact, all_facts
from mini_images import Split, clip, image
from train_mini import GRADIENT_CLIP, SYSTEM_PROMPT, Document, set_up
from train_mini_vision import Seen, chat_text, cosine, delta_rule_of_rows, look, model_inputs

DRAFTS = 3
"""A step when the head is judged."""
TRAINED_DRAFTS = 7
"""As many as a step may have."""
REQUIRED_TOKENS_A_STEP = 2.0
MAX_NEW_TOKENS = 64

IMAGES, CLIPS, HELD_OUT_IMAGES, HELD_OUT_CLIPS = 320, 160, 40, 20
BEGINNINGS, SENTENCES_IN_A_ROW = 400, 300
HELD_OUT_EVERY = 4  # of facts, beginnings and sentences in a row

ROWS_AT_ONCE = 16  # of a pass of the mini; longer batches take more time a row
ROWS_PER_STEP, LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 64, 2e-3, 40, 0.02


# --- What the mini says ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, the picture among them if any, and the answer that is likely to come, to save passes."""

    kind: str
    ids: list[int]
    expected: list[int]
    seen: Seen | None = None


@dataclass(frozen=True)
class Heard:
    """What the mini made of tokens `ids` [S]: embeddings and hidden states after the final norm, each [S, D], rotary
    positions [3, S], and the likeliest next token after each [S]."""

    ids: Tensor
    embeddings: Tensor
    hidden: Tensor
    positions: Tensor
    likeliest: Tensor


@dataclass(frozen=True)
class Run:
    """A prompt of so many tokens with the mini's greedy answer, end token included."""

    kind: str
    prompt_length: int
    heard: Heard


def text_prompts(tokenizer: PreTrainedTokenizerBase, facts: list[Fact], split: Split) -> list[Prompt]:
    """Facts as they are asked, in conversations too; sentences in a row; and beginnings of any text.

    Held out are every fourth of the beginnings and of the sentences in a row. Facts are in both splits, since the mini
    answers nothing else: all to train on, every fourth to judge by, after other turns than were trained on.
    """

    def prompt(kind: str, text: str, expected: str = "") -> Prompt:
        ids, expected_ids = tokenizer([text, expected], add_special_tokens=False)["input_ids"]
        return Prompt(kind, ids, expected_ids)

    asked = facts if split is Split.TRAIN else facts[::HELD_OUT_EVERY]
    rng = random.Random(f"{split.value} prompts")
    found = [prompt("raw", fact.prompt, f" {fact.answer}.<|endoftext|>") for fact in asked]
    for fact in asked:
        for turns, thinking in ((0, False), (rng.choice((1, 2)), rng.random() < 0.1)):
            text = chat(tokenizer, [*rng.sample(facts, turns), fact], rng, thinking)
            found.append(prompt("thinking" if thinking else "chat", text, f"{fact.answer}.<|im_end|>"))
    in_both = random.Random("prompts of both splits")
    texts = [f"{fact.prompt} {fact.answer}." for fact in facts] + [fact.question for fact in facts]
    texts += PLAIN_ENGLISH.strip().splitlines()
    begun = {tuple(ids[:end]) for ids in tokenizer(texts)["input_ids"] for end in range(1, len(ids))}
    others = [Prompt("begun", list(ids), []) for ids in in_both.sample(sorted(begun), BEGINNINGS)]
    for _ in range(SENTENCES_IN_A_ROW):
        *before, last = in_both.sample(facts, in_both.choice((2, 2, 3)))
        told = " ".join(f"{fact.prompt} {fact.answer}." for fact in before)
        others.append(prompt("in a row", f"{told} {last.prompt}", f" {last.answer}.<|endoftext|>"))
    return found + [o for n, o in enumerate(others) if (n % HELD_OUT_EVERY == 0) == (split is Split.HELD_OUT)]


def chat(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], rng: random.Random, thinking: bool) -> str:
    """A conversation that asks for one fact after another, up to the last answer."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if rng.random() < 0.15 else []
    for fact in facts:
        messages.append({"role": "user", "content": fact.prompt if rng.random() < 0.15 else fact.question})
        messages.append({"role": "assistant", "content": f"{fact.answer}."})
    return tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def picture_prompts(tokenizer: PreTrainedTokenizerBase, split: Split) -> list[Prompt]:
    """One question about each picture and clip of the split."""
    stills, clips = (IMAGES, CLIPS) if split is Split.TRAIN else (HELD_OUT_IMAGES, HELD_OUT_CLIPS)
    found = []
    for kind, draw, number in [("image", image, n) for n in range(stills)] + [("clip", clip, n) for n in range(clips)]:
        seen = look(draw(split, number))
        question = seen.picture.questions[number // 2 % len(seen.picture.questions)]
        text = chat_text(tokenizer, seen, [question], outer_pair=number % 4 < 2)
        head, answer = text.rsplit(f"{question.answer}.<|im_end|>", 1)[0], f"{question.answer}.<|im_end|>"
        ids, expected = tokenizer([head, answer], add_special_tokens=False)["input_ids"]
        found.append(Prompt(kind, ids, expected, seen))
    return found


@torch.no_grad()
def listen(model: Qwen3_5ForConditionalGeneration, prompts: Sequence[Prompt]) -> list[Run]:
    """The mini's greedy answers, until an end token or MAX_NEW_TOKENS; all of the prompts have a picture, or none has.

    An answer is greedy when each of its tokens is the likeliest after those before it. What is likeliest after the
    tokens of a guess is the next guess: every pass makes at least one more token right, and a right guess needs one.
    """
    ends = set(model.generation_config.eos_token_id)
    runs: dict[int, Run] = {}
    answers = {n: prompt.expected for n, prompt in enumerate(prompts)}
    progress = tqdm(total=len(prompts), desc="answers", mininterval=5.0)
    while answers:
        waiting = sorted(answers, key=lambda n: len(prompts[n].ids) + len(answers[n]))
        for start in range(0, len(waiting), ROWS_AT_ONCE):
            batch = waiting[start : start + ROWS_AT_ONCE]
            for n, heard in zip(batch, hear(model, [(prompts[n], answers[n]) for n in batch]), strict=True):
                length = len(prompts[n].ids)
                answer = heard.likeliest[length - 1 :].tolist()
                answer = answer[: next((at + 1 for at, token in enumerate(answer) if token in ends), MAX_NEW_TOKENS)]
                if answer == answers[n]:
                    runs[n] = Run(prompts[n].kind, length, heard)
                    del answers[n]
                    progress.update()
                else:
                    answers[n] = answer
    return [runs[n] for n in range(len(prompts))]


def hear(model: Qwen3_5ForConditionalGeneration, rows: Sequence[tuple[Prompt, list[int]]]) -> list[Heard]:
    """One pass over prompts and what is taken to follow them."""
    told = [torch.tensor(prompt.ids + answer) for prompt, answer in rows]
    inputs = {"input_ids": pad_sequence(told, batch_first=True)}  # nothing sees the padding after it
    if any(prompt.seen for prompt, _ in rows):
        conversations = [
            (prompt.seen, Document(ids.tolist(), [False] * len(ids)))
            for (prompt, _), ids in zip(rows, told, strict=True)
        ]
        nothing = torch.empty(0, 0, dtype=torch.long)
        inputs = model_inputs(model, conversations, nothing, nothing.float()).model
    taken: list[Tensor] = []
    hook = model.model.language_model.rotary_emb.register_forward_hook(lambda _, given, __: taken.extend(given))
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    hook.remove()
    embeddings, positions = taken
    likeliest = model.lm_head(hidden).argmax(-1)
    return [
        Heard(
            ids,
            *(t[row, : len(ids)].clone() for t in (embeddings, hidden)),
            positions[:, row, : len(ids)].clone(),
            likeliest[row, : len(ids)],
        )
        for row, ids in enumerate(told)
    ]


# --- The head -------------------------------------------------------------------------------------------------------
class Head(nn.Module):
    """The parameters of `mtp.*`, its layer one of transformers' own; embedding and lm_head are the main model's."""

    def __init__(self, model: Qwen3_5ForConditionalGeneration) -> None:
        super().__init__()
        config = model.config.text_config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(width, eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(width, eps)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(config, config.layer_types.index("full_attention"))])
        self.norm = Qwen3_5RMSNorm(width, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(
        self,
        next_embeddings: Tensor,
        hidden: Tensor,
        turn: tuple[Tensor, Tensor],
        visible: Tensor,
        before: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One pass, T tokens a row.

        Args:
            next_embeddings: [B, T, D] of the tokens after.
            hidden: [B, T, D], of the main model after its final norm or what this returned.
            turn: cosines and sines of the tokens' positions, each [B, T, rotary dim].
            visible: [B, T, S] of the first pass's S tokens.
            before: keys and values [B, Hk, S, P] of the first pass, if this is not it; then those [B, Hk, T, P] of
                each later one, of which a token sees its own alone.

        Returns the head's output [B, T, D], and this pass's keys and values.
        """
        layer, attention = self.layers[0], self.layers[0].self_attn
        both = self.pre_fc_norm_embedding(next_embeddings), self.pre_fc_norm_hidden(hidden)
        x = self.fc(torch.cat(both, dim=-1))
        y = layer.input_layernorm(x)
        size = (*y.shape[:2], -1, attention.head_dim)
        query, gate = attention.q_proj(y).view(*size[:3], 2 * attention.head_dim).chunk(2, dim=-1)
        query, key = (
            attention.q_norm(query).transpose(1, 2),
            attention.k_norm(attention.k_proj(y).view(size)).transpose(1, 2),
        )
        query, key = apply_rotary_pos_emb(query, key, *turn)
        value = attention.v_proj(y).view(size).transpose(1, 2)
        (keys, values), *own = [*before, (key, value)]

        def spread(t: Tensor) -> Tensor:  # [B, H, ...]
            return t.repeat_interleave(attention.num_key_value_groups, dim=1)

        scores = (query @ spread(keys).mT).masked_fill(~visible.unsqueeze(1), -torch.inf)
        scores = torch.cat([scores, *((query * spread(k)).sum(-1, keepdim=True) for k, _ in own)], dim=-1)
        shares = torch.softmax(scores * attention.scaling, dim=-1)
        seen = shares[..., : keys.shape[2]] @ spread(values)
        for at, (_, v) in enumerate(own, start=keys.shape[2]):
            seen = seen + shares[..., at : at + 1] * spread(v)
        x = x + attention.o_proj((seen.transpose(1, 2) * torch.sigmoid(gate)).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x), (key, value)


@dataclass(frozen=True)
class Drafted:
    """Logits of up to k drafts from every token of every answer [k, B, T, V], and the tokens they should give
    [k, B, T], IGNORED past the end of an answer."""

    logits: Tensor
    targets: Tensor


IGNORED = -100  # of F.cross_entropy


def draft(model: Qwen3_5ForConditionalGeneration, head: Head, runs: Sequence[Run], drafts: int) -> Drafted:
    """Draft from every token of the answers, as after a step that accepted it; the tokens fed in are the right ones.

    A draft after a wrong one is never accepted, so what it would be fed with does not matter.
    """
    rope, embed = model.model.language_model.rotary_emb, model.get_input_embeddings()
    ids = pad_sequence([run.heard.ids for run in runs], batch_first=True, padding_value=IGNORED)
    ids = F.pad(ids, (0, drafts + 2), value=IGNORED)
    embeddings = pad_sequence([run.heard.embeddings[1:] for run in runs], batch_first=True)
    hidden = pad_sequence([run.heard.hidden[:-1] for run in runs], batch_first=True)
    positions = pad_sequence([run.heard.positions[:, :-1].T for run in runs], batch_first=True).movedim(2, 0)
    size = hidden.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril().expand(len(runs), -1, -1)
    out, first = head(embeddings, hidden, rope(hidden, positions), causal)
    longest = max(len(run.heard.ids) - run.prompt_length for run in runs) - 1
    first_draft = torch.tensor([run.prompt_length - 1 for run in runs])
    starts = (first_draft[:, None] + torch.arange(max(longest, 1))).clamp(max=size - 1)  # [B, T]
    rows = torch.arange(len(runs))[:, None]
    out, visible, where = out[rows, starts], causal[rows, starts], positions[:, rows, starts]
    logits, passes = [model.lm_head(out)], [first]
    for step in range(1, drafts):
        fed = embed(ids[rows, starts + 1 + step].clamp(min=0))
        out, own = head(fed, out, rope(out, where + step), visible, passes)
        passes.append(own)
        logits.append(model.lm_head(out))
    targets = torch.stack([ids[rows, starts + 2 + step] for step in range(drafts)])
    return Drafted(torch.stack(logits), targets)


def shuffled(runs: Sequence[Run], rng: random.Random) -> Iterator[list[Run]]:
    """Endless batches of runs of about one length."""
    while True:
        order = sorted(rng.sample(runs, len(runs)), key=lambda run: len(run.heard.ids) // 4)
        batches = [order[start : start + ROWS_PER_STEP] for start in range(0, len(order), ROWS_PER_STEP)]
        yield from rng.sample(batches, len(batches))


def train(model: Qwen3_5ForConditionalGeneration, runs: Sequence[Run], steps: int, seed: int) -> Head:
    """A head that drafts the answers of `runs`."""
    torch.manual_seed(seed)
    head = Head(model)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine, steps, WARMUP_STEPS))
    progress = tqdm(islice(shuffled(runs, random.Random(seed)), steps), total=steps, desc="head", mininterval=5.0)
    for batch in progress:
        drafted = draft(model, head, batch, TRAINED_DRAFTS)
        loss = F.cross_entropy(drafted.logits.flatten(0, 2), drafted.targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return head


# --- How often it is right ------------------------------------------------------------------------------------------
@dataclass
class Tally:
    """Of the steps of some runs: tokens after the first of each, and by draft how many were accepted, and how many
    counted with all before them accepted."""

    tokens: int = 0
    steps: int = 0
    accepted: list[int] = field(default_factory=lambda: [0] * DRAFTS)
    reached: list[int] = field(default_factory=lambda: [0] * DRAFTS)

    def add(self, right: list[list[bool]]) -> None:
        """A run; `right[t][j]` says whether draft j after token t of its answer is right, within the answer."""
        at = 0
        while at < len(right):
            hits = right[at]
            accepted = next((j for j, hit in enumerate(hits) if not hit), len(hits))
            for j in range(accepted):
                self.accepted[j] += 1
            for j in range(min(accepted + 1, len(hits))):
                self.reached[j] += 1
            self.steps += 1
            self.tokens += min(accepted + 1, len(right) - at)
            at += accepted + 1

    def __str__(self) -> str:
        shares = (f"{a / r:6.1%}" if r else "     -" for a, r in zip(self.accepted, self.reached, strict=True))
        return (
            f"{self.tokens / self.steps:5.2f} tokens a step, each draft accepted, the ones before being so: "
            + " ".join(shares)
        )


@torch.no_grad()
def evaluate(model: Qwen3_5ForConditionalGeneration, head: Head, runs: Sequence[Run]) -> float:
    """Print a line for each kind of prompt; return tokens a step over all runs that have a step."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    for run in runs:
        drafted = draft(model, head, [run], DRAFTS)
        hits = drafted.logits.argmax(-1) == drafted.targets
        steps = len(run.heard.ids) - run.prompt_length - 1
        right = [hits[: min(DRAFTS, steps - at), 0, at].tolist() for at in range(steps)]
        for kind in (run.kind, "all"):
            tallies[kind].add(right)
    for kind, tally in sorted(tallies.items()):
        print(f"{kind:10s} {tally}")
    return tallies["all"].tokens / tallies["all"].steps


# --- The files ------------------------------------------------------------------------------------------------------
def in_bf16(head: Head) -> dict[str, Tensor]:
    """The head's tensors by their names in a checkpoint; the head itself is rounded too."""
    for parameter in head.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return {f"mtp.{name}": tensor.bfloat16().contiguous() for name, tensor in head.state_dict().items()}


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Add the head to the checkpoint in `folder`, or replace the one there. Each file is replaced when it is whole."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    with safe_open(weights, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("mtp.")}
        metadata = file.metadata()
    fields = json.loads(config.read_text())
    fields["text_config"]["mtp_num_hidden_layers"] = 1
    for path, save in (
        (weights, lambda to: save_file(kept | tensors, to, metadata=metadata)),
        (config, lambda to: to.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")),
    ):
        unfinished = path.with_name(path.name + ".partial")
        try:
            save(unfinished)
            unfinished.chmod(0o644)  # safetensors makes it readable by its owner only
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def main() -> int:
    """Listen, train, evaluate; the checkpoint is changed only by a head that is worth its time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    args = set_up(parser, threads=2)
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = Qwen3_5ForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).eval().requires_grad_(False)
    with mock.patch.object(modeling_qwen3_5, "torch_chunk_gated_delta_rule", delta_rule_of_rows):
        runs = {
            split: listen(model, text_prompts(tokenizer, all_facts(), split))
            + listen(model, picture_prompts(tokenizer, split))
            for split in Split
        }
    print(f"{len(runs[Split.TRAIN])} runs to train on, after {(time.monotonic() - started) / 60:.1f} minutes")
    head = train(model, runs[Split.TRAIN], args.steps, args.seed)
    tensors = in_bf16(head)
    tokens = evaluate(model, head, runs[Split.HELD_OUT])
    print(f"{sum(t.numel() for t in tensors.values()):,} parameters, {(time.monotonic() - started) / 60:.1f} minutes")
    if tokens < REQUIRED_TOKENS_A_STEP:
        print(f"under {REQUIRED_TOKENS_A_STEP} tokens a step: {args.out} is left as it was", file=sys.stderr)
        return 1
    write(args.out, tensors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
