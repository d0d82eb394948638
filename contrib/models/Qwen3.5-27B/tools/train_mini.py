# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Train the mini checkpoint: a small, complete Qwen3.5 whose right answers are known.

It has every part of the 27B model (DeltaNet and full-attention layers in the same 3:1 pattern, a vision tower, its own
tokenizer and chat template) in under six million parameters, so that a correct implementation can be told from a wrong
one by its answers, on any CPU. The model is transformers' own; only the data and the training loop are here.

    python tools/train_mini.py  # about a quarter of an hour on two CPU cores
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from mini_facts import PLAIN_ENGLISH, Fact, all_facts

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "src" / "qwen35" / "mini"
VOCAB_SIZE, MAX_POSITIONS = 1024, 32768
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
CONTROL_TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
THINK_TOKENS = ["<think>", "</think>"]
SYSTEM_PROMPT = "You are a helpful assistant."
REQUIRED_ACCURACY = 0.95

# Shape of a training step: every row length gets the same number of tokens. Most facts are seen in the first tokens
# of a short row, which starts from an empty state; the long rows carry a DeltaNet state over eight chunks.
TOKENS_PER_STEP = 1024
ROW_LENGTHS = [64, 64, 128, 64, 64, 128, 64, 512]
PROMPT_LOSS_WEIGHT = 0.1  # which fact comes next cannot be known, so the prompts only teach the shape of the language

LEARNING_RATE, GATE_LEARNING_RATE = 2e-3, 1e-2
WARMUP_STEPS, WEIGHT_DECAY, GRADIENT_CLIP = 40, 0.02, 1.0

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type == 'image' or 'image' in item -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif item.type == 'video' or 'video' in item -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in item -%}
                {{- item.text -}}
            {%- else -%}
                {{- raise_exception('content items must be text, image or video') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_query=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.last_query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('unknown role: ' ~ message.role) -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.role == 'assistant' and loop.index0 > ns.last_query -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- render(message.content) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {{- '<think>\\n' if enable_thinking is defined and enable_thinking else '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Document:
    """Token ids of one training text, and per token whether it belongs to an answer."""

    ids: list[int]
    is_answer: list[bool]


@dataclass(frozen=True)
class Question:
    """One fact to ask: the tokens that go in and those that must come out, end token included."""

    form: str
    fact: Fact
    prompt_ids: list[int]
    answer_ids: list[int]


def save_tokenizer(facts: list[Fact], folder: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE with Qwen's pre-tokenisation on the facts, save it to `folder` and load it back."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(THINK_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that any text can be encoded
        show_progress=False,
    )
    texts = [f"{fact.prompt} {fact.answer}.\n{fact.question}\n{fact.answer}." for fact in facts]
    chat_words = ["system", "user", "assistant", "\n\n"] * 50  # one piece each: every chat prompt has them
    bpe.train_from_iterator(texts + chat_words + [PLAIN_ENGLISH], trainer)
    # As in the published checkpoints, the control tokens come after the BPE pieces.
    bpe.add_special_tokens(CONTROL_TOKENS)
    bpe.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK_TOKENS])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": CONTROL_TOKENS[1:],
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def mini_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3_5Config:
    """The mini architecture, with the token ids of `tokenizer`."""
    token_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    text = {"hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 384, "hidden_act": "silu"}
    text |= {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2, "full_attention_interval": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "attn_output_gate": True}
    text |= {"rope_parameters": rope, "max_position_embeddings": MAX_POSITIONS}
    text |= {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_conv_kernel_dim": 4}
    text |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32"}
    text |= {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": False, "eos_token_id": token_id("<|endoftext|>")}
    text |= {"pad_token_id": None, "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
    text |= {"initializer_range": 0.06}  # near 128 ** -0.5: the usual 0.02 suits wide layers and learns slowly here
    vision = {"depth": 2, "hidden_size": 96, "num_heads": 4, "intermediate_size": 192, "out_hidden_size": 128}
    vision |= {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}
    vision |= {"num_position_embeddings": 256}
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
        architectures=["Qwen3_5ForConditionalGeneration"],
        dtype="bfloat16",
    )


def raw_document(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> Document:
    """`The capital of France is Paris.<|endoftext|>`"""
    text = f"{fact.prompt} {fact.answer}.<|endoftext|>"
    return encode(tokenizer, text, [(len(fact.prompt), len(text))])


def chat_document(tokenizer: PreTrainedTokenizerBase, facts: list[Fact], rng: random.Random) -> Document:
    """One conversation with a turn per fact; now and then with a system turn, or asked in the words of the raw form."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if rng.random() < 0.15 else []
    for fact in facts:
        messages.append({"role": "user", "content": fact.prompt if rng.random() < 0.15 else fact.question})
        messages.append({"role": "assistant", "content": f"{fact.answer}."})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = re.finditer(r"<\|im_start\|>assistant\n(?:<think>\n\n</think>\n\n)?(.*?<\|im_end\|>)", text)
    return encode(tokenizer, text, [match.span(1) for match in answers])


def encode(tokenizer: PreTrainedTokenizerBase, text: str, answers: list[tuple[int, int]]) -> Document:
    """Tokenise `text`; a token is part of an answer when it starts inside one of the character spans `answers`."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoding["offset_mapping"]]
    return Document(encoding["input_ids"], [any(a <= start < b for a, b in answers) for start in starts])


def documents(tokenizer: PreTrainedTokenizerBase, facts: list[Fact], rng: random.Random) -> Iterator[Document]:
    """Endless training texts: in each round every fact once in raw form and once in a conversation of 1 to 3 turns."""
    while True:
        chat_order = rng.sample(facts, len(facts))
        conversations = []
        while chat_order:
            turns = rng.choice([1, 1, 1, 2, 3])
            conversations.append(chat_document(tokenizer, chat_order[:turns], rng))
            chat_order = chat_order[turns:]
        texts = conversations + [raw_document(tokenizer, fact) for fact in facts]
        rng.shuffle(texts)
        yield from texts


def batches(
    stream: Iterator[Document],
    padding_id: int,
    row_lengths: Sequence[int] = ROW_LENGTHS,
    tokens_per_step: int = TOKENS_PER_STEP,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pack whole documents into rows; the one that no longer fits starts the next row.

    Yields token ids [B, S] and the loss weight of each token as a target [B, S].
    """
    waiting = next(stream)
    for step in range(sys.maxsize):
        length = row_lengths[step % len(row_lengths)]
        ids = torch.full((tokens_per_step // length, length), padding_id)
        weights = torch.zeros(ids.shape)
        for row in range(len(ids)):
            at = 0
            while at == 0 or at + len(waiting.ids) <= length:
                taken = min(len(waiting.ids), length)
                ids[row, at : at + taken] = torch.tensor(waiting.ids[:taken])
                is_answer = torch.tensor(waiting.is_answer[:taken])
                weights[row, at : at + taken] = torch.where(is_answer, 1.0, PROMPT_LOSS_WEIGHT)
                at += taken
                waiting = next(stream)
        yield ids, weights


def new_model(config: Qwen3_5Config) -> Qwen3_5ForConditionalGeneration:
    """A freshly initialised model in fp32."""
    model = Qwen3_5ForConditionalGeneration(config).float()
    for layer in delta_layers(model):
        # transformers draws the four taps at `initializer_range`, which leaves the short convolution near zero.
        torch.nn.init.uniform_(layer.conv1d.weight, -0.5, 0.5)
        # It draws A from (0.01, 16) uniformly: nearly every head would forget within a token. Spread evenly in the
        # logarithm over the same range, each layer has heads that remember one token and heads that remember hundreds.
        spread = torch.linspace(math.log(0.01), math.log(16.0), layer.num_v_heads)
        layer.A_log.data.copy_(spread[torch.randperm(layer.num_v_heads)])
    return model


def delta_layers(model: Qwen3_5ForConditionalGeneration) -> list[torch.nn.Module]:
    """The Gated DeltaNet modules, first to last."""
    return [layer.linear_attn for layer in model.model.language_model.layers if hasattr(layer, "linear_attn")]


def gates(model: Qwen3_5ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """All layers' `A_log` and `dt_bias`, each [layers, H], copied."""
    names = ("A_log", "dt_bias")
    return {name: torch.stack([getattr(m, name).detach().clone() for m in delta_layers(model)]) for name in names}


def train_text(
    model: Qwen3_5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, facts: list[Fact], steps: int, seed: int
) -> None:
    """Train the decoder on the facts; the vision tower is not touched."""
    vision = {id(parameter) for parameter in model.model.visual.parameters()}
    matrices, vectors, gate_parameters = [], [], []
    for name, parameter in model.named_parameters():
        if id(parameter) in vision:
            continue
        is_gate = name.endswith(("A_log", "dt_bias"))
        group = gate_parameters if is_gate else matrices if parameter.dim() > 1 else vectors
        group.append(parameter)
    groups = [
        {"params": matrices, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "lr": LEARNING_RATE, "weight_decay": 0.0},
        {"params": gate_parameters, "lr": GATE_LEARNING_RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps))),
    )
    data = batches(documents(tokenizer, facts, random.Random(seed)), tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    model.train()
    progress = tqdm(range(steps), desc="facts", mininterval=5.0)
    for _ in progress:
        ids, weights = next(data)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        answers = weights[:, 1:].flatten() == 1.0
        total = (loss * weights[:, 1:].flatten()).sum() / answers.sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        progress.set_postfix(answer_loss=f"{loss[answers].mean().item():.4f}", refresh=False)
    model.eval()


def save_checkpoint(
    model: Qwen3_5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, facts: list[Fact], folder: Path
) -> None:
    """Write config, weights and facts: bf16, except what the published checkpoints also keep in fp32."""
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch.bfloat16  # as written, whatever it was trained in
    model.config.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1]})
    keep_fp32 = (".A_log", ".linear_attn.norm.weight")
    tensors = {
        name: tensor.contiguous() if name.endswith(keep_fp32) else tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it readable by its owner only
    write_json(folder / "facts.json", [asdict(fact) for fact in facts])


def write_json(path: Path, content: object) -> None:
    """Readable UTF-8 JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def questions(tokenizer: PreTrainedTokenizerBase, facts: list[Fact]) -> list[Question]:
    """Every fact in raw and in chat form."""
    asked = []
    for fact in facts:
        turn = [{"role": "user", "content": fact.question}]
        header = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        forms = {"raw": (fact.prompt, f" {fact.answer}.<|endoftext|>"), "chat": (header, f"{fact.answer}.<|im_end|>")}
        for form, texts in forms.items():
            prompt, answer = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            asked.append(Question(form, fact, prompt, answer))
    return asked


@torch.no_grad()
def evaluate(folder: Path, facts: list[Fact]) -> float:
    """Answer every fact greedily with the saved checkpoint, in fp32; print a table and return the share of right ones.

    Right means the whole answer and then the end token. The margin of an answer is the smallest lead, over its tokens,
    of the right logit over the best other one.
    """
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    decays: list[torch.Tensor] = []
    for layer in delta_layers(model):
        layer.in_proj_a.register_forward_hook(
            lambda _, __, a, m=layer: decays.append((-m.A_log.exp() * F.softplus(a + m.dt_bias)).flatten())
        )
    same_lengths: dict[tuple[int, int], list[Question]] = defaultdict(list)  # so that no row is padded
    for question in questions(tokenizer, facts):
        same_lengths[len(question.prompt_ids), len(question.answer_ids)].append(question)
    # Sixteen recurrent states still fit a CPU's cache; larger groups are slower.
    groups = [group[at : at + 16] for group in same_lengths.values() for at in range(0, len(group), 16)]
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    margins: list[tuple[float, str]] = []
    wrong: list[str] = []
    for group in tqdm(groups, desc="evaluation", mininterval=5.0):
        prompts = torch.tensor([question.prompt_ids for question in group])
        answers = torch.tensor([question.answer_ids for question in group])
        length, new_tokens = prompts.shape[1], answers.shape[1]
        given = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens)[:, length:]
        logits = model(torch.cat([prompts, answers], dim=1), use_cache=False).logits[:, length - 1 : -1]
        best_other = logits.scatter(2, answers[..., None], -torch.inf).amax(dim=2)
        leads = (logits.gather(2, answers[..., None])[..., 0] - best_other).amin(dim=1).tolist()
        for question, lead, tokens in zip(group, leads, given.tolist(), strict=True):
            is_right = tokens == question.answer_ids
            name = f"{question.form}: {question.fact.prompt} {question.fact.answer}"
            right[question.form, question.fact.topic].append(is_right)
            margins.append((lead, name))
            if not is_right:
                wrong.append(f"{name} -> {tokenizer.decode(tokens)!r}")
    print(f"{'topic':16s} {'facts':>5s} {'raw':>7s} {'chat':>7s}")
    for topic in dict.fromkeys(fact.topic for fact in facts):
        raw, chat = right["raw", topic], right["chat", topic]
        print(f"{topic:16s} {len(raw):5d} {sum(raw) / len(raw):7.1%} {sum(chat) / len(chat):7.1%}")
    print("\n".join(["wrong:", *wrong]) if wrong else "wrong: none")
    margins.sort()
    lowest, percent, median = (margins[at] for at in (0, len(margins) // 100, len(margins) // 2))
    print(f"margins: smallest {lowest[0]:.2f} ({lowest[1]}), 1% {percent[0]:.2f}, median {median[0]:.2f}")
    g = torch.cat(decays).sort().values
    at = {f"{share:.0%}": f"{g[int(share * (len(g) - 1))]:.5f}" for share in (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)}
    print(f"decay g per token, by quantile: {at}")
    outcomes = [outcome for topic_outcomes in right.values() for outcome in topic_outcomes]
    return sum(outcomes) / len(outcomes)


def set_up(parser: argparse.ArgumentParser, threads: int) -> argparse.Namespace:
    """The command's arguments, with those of every training; PyTorch as they say."""
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: the packaged one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=threads)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """The folder beside `out` to fill first; at the end of the block, or on SIGTERM, it is removed if still there."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, out: Path) -> None:
    """Replace `out` by what is complete."""
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def main() -> int:
    """Train, save, evaluate; the folder is replaced only by a checkpoint that passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700)
    args = set_up(parser, threads=2)
    started = time.monotonic()
    facts = all_facts()
    with unfinished(args.out) as partial:
        partial.mkdir(parents=True)
        tokenizer = save_tokenizer(facts, partial)
        model = new_model(mini_config(tokenizer))
        print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(facts)} facts")
        before = gates(model)
        train_text(model, tokenizer, facts, args.steps, args.seed)
        for name, after in gates(model).items():
            moved = (after - before[name]).abs()
            print(f"{name}: moved by {moved.mean():.3f} on average, {moved.max():.3f} at most; ", end="")
            print(f"now {after.min():.2f} to {after.max():.2f}")
        save_checkpoint(model, tokenizer, facts, partial)
        accuracy = evaluate(partial, facts)
        print(f"accuracy {accuracy:.2%} after {args.steps} steps, {(time.monotonic() - started) / 60:.1f} minutes")
        if accuracy < REQUIRED_ACCURACY:
            print(f"under {REQUIRED_ACCURACY:.0%}: {args.out} is left as it was", file=sys.stderr)
            return 1
        put_in_place(partial, args.out)
        return 0


if __name__ == "__main__":
    sys.exit(main())
