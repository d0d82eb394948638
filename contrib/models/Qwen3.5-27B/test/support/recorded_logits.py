# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What transformers says of fixed prompts over one checkpoint, in a file, and how far other logits are from it.

`tools/record_logits.py` writes such a file, and the integration suite holds a model against it. A prompt is followed by
tokens that are given, whatever a model would have said: so one forward pass has the logits of all of them, and a model
in token generation can be held against it step by step.

Letters: S tokens, prompt and given ones; P scored positions, the last token of the prompt and the given ones; V
vocabulary; K kept logits of a position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file

from qwen35.error_text import first_three
from qwen35.serving.prefix_cache import digest_of
from qwen35.serving.prompts import as_chat, encode_chat, load_tokenizer, token_ids
from qwen35.vision.processing import VisionProcessor
from qwen35.weights.checkpoint import CheckpointReader

KEPT = 100
"""K: the largest logits, of every scored position."""
GIVEN = 16
"""Tokens that follow a prompt."""
LONG_PROMPT = 1500
"""Tokens of the long one: two chunks of 1,024, the last not full."""
_DIGESTED = 4096
"""Bytes of each tensor that make up a checkpoint's digest: reading 56 GB would take minutes."""

FLOAT32, BFLOAT16, FP8 = "float32", "bfloat16", "fp8"
"""Forms of a model: everything in float32; everything in bfloat16; float32 with the matrices of the layers rounded to
fp8 per output channel, as `weights_dtype="fp8"` rounds them."""

_TEXTS = {
    "fact": (
        "The capital of France is",
        " Paris. It lies on the Seine, in the north, and more than two million people",
    ),
    "code": (
        "def fibonacci(n: int) -> int:\n    ",
        '"""The n-th number."""\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n',
    ),
    "chinese": ("中国的首都是", "北京，位于华北平原的北部。它有三千多年的历史，人口超过两千万。"),
    "short": ("The", " next day the two of them went down to the river and sat under the old bridge, as they"),
}
"""Prompts by name, and what follows them."""
_QUESTION, _ANSWER = "What is 17 times 23?", "17 times 23 is 391, because 17 times 20 is 340 and 17 times 3 is 51."
_ABOUT_PICTURE, _SEEN = (
    "What colour is the square?",
    "The square is red. It stands on a light grey background, near the top left.",
)
_LONG_LINE = "{number}. The train number {number} leaves from platform {platform} at {hour}:{minute:02} for {city}.\n"
_LONG_END = "The train to Vienna leaves from platform 4, the one to Prague from platform 7. All others"
_CITIES = ("Vienna", "Prague", "Lyon", "Turin", "Basel", "Ghent", "Porto")


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with the tokens given after it.

    ids: S token ids. prompt_tokens: those of the prompt. media: pixels and grids, as `encode_chat` names them.
    """

    name: str
    ids: tuple[int, ...]
    prompt_tokens: int
    media: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scored(self) -> range:
        """The P positions whose logits are compared."""
        return range(self.prompt_tokens - 1, len(self.ids))

    @property
    def digest(self) -> str:
        """Of tokens, pixels and grids."""
        content = hashlib.sha256(repr(self.ids).encode())
        if self.media:
            content.update(digest_of(self.media["pixel_values"], self.media["image_grid_thw"]))
        return content.hexdigest()


def example_picture() -> Image.Image:
    """A red square on light grey, 96 x 96."""
    picture = Image.new("RGB", (96, 96), (236, 236, 236))
    ImageDraw.Draw(picture).rectangle((16, 16, 44, 44), fill=(220, 40, 40))
    return picture


def encode_prompts(checkpoint: Path) -> list[EncodedPrompt]:
    """The fixed prompts in the tokens of a checkpoint; with a picture where its config.json has a vision encoder.

    Raises:
        ValueError, FileNotFoundError: its tokenizer, or its chat template, cannot be used.
    """
    tokenizer = load_tokenizer(checkpoint)
    pairs = {name: (token_ids(tokenizer, prompt), given) for name, (prompt, given) in _TEXTS.items()}
    pairs["chat"] = (token_ids(tokenizer, as_chat(tokenizer, _QUESTION)), _ANSWER)
    pairs["long"] = (token_ids(tokenizer, _long_text())[:LONG_PROMPT], _LONG_END)
    prompts = [_followed(tokenizer, name, *pair) for name, pair in pairs.items()]
    if json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("vision_config"):
        content = [{"type": "image", "image": example_picture()}, {"type": "text", "text": _ABOUT_PICTURE}]
        processor = VisionProcessor.from_pretrained(checkpoint)
        inputs = encode_chat(tokenizer, processor, [[{"role": "user", "content": content}]])
        media = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        prompts.append(_followed(tokenizer, "picture", inputs["input_ids"][0].tolist(), _SEEN, media))
    return prompts


def _followed(
    tokenizer: Any, name: str, prompt: Sequence[int], given: str, media: Mapping[str, torch.Tensor] | None = None
) -> EncodedPrompt:
    following = token_ids(tokenizer, given)[:GIVEN]
    return EncodedPrompt(name, (*prompt, *following), len(prompt), media or {})


def _long_text() -> str:
    lines = (
        _LONG_LINE.format(number=i, platform=i * 5 % 9 + 1, hour=i % 24, minute=i * 7 % 60, city=_CITIES[i * 3 % 7])
        for i in range(1, LONG_PROMPT // 8)  # more tokens than that a line
    )
    return "".join(lines)


def checkpoint_digest(checkpoint: Path) -> str:
    """What tells one checkpoint's weights from another's, however they are sharded: of names, shapes, dtypes and the
    first bytes of every tensor.

    Raises:
        CheckpointError: it cannot be read.
    """
    of_tensors: dict[str, bytes] = {}
    with CheckpointReader(checkpoint) as reader:
        for name in sorted(reader, key=lambda name: (reader.file_of(name), name)):  # a file after the other
            spec, tensor = reader.spec(name), reader[name].flatten()
            start = tensor[: _DIGESTED // spec.dtype.itemsize].contiguous().view(torch.uint8)
            of_tensors[name] = hashlib.sha256(f"{name} {spec}".encode() + start.numpy().tobytes()).digest()
    return hashlib.sha256(b"".join(digest for _, digest in sorted(of_tensors.items()))).hexdigest()


@dataclass(frozen=True)
class Reference:
    """Logits of a prompt's P scored positions, of which most are left out.

    top_ids, top_logits [P, K] int64, float32: the largest, in order. lse [P] float64: the logsumexp of all. whole: all
    V logits [V] float32 of some positions, by their index among the scored.
    """

    top_ids: torch.Tensor
    top_logits: torch.Tensor
    lse: torch.Tensor
    whole: Mapping[int, torch.Tensor]

    @classmethod
    def of(cls, logits: torch.Tensor) -> Reference:
        """From logits [P, V]: of the first and the last position all are kept."""
        logits = logits.float()
        top = logits.topk(min(KEPT, logits.shape[1]))
        lse = logits.double().logsumexp(1)
        return cls(top.indices, top.values, lse, {i: logits[i].clone() for i in {0, len(logits) - 1}})


@dataclass(frozen=True)
class Errors:
    """How far logits are from a reference, by position, [P] each.

    largest, mean: |difference| over the logits that are kept of the position. kl: nats of KL(reference || other) over
    the K largest tokens and all others as one, which is at most that over all tokens. same: whether the likeliest token
    is the reference's. margin: of the reference's two largest logits, the difference.
    """

    largest: torch.Tensor
    mean: torch.Tensor
    kl: torch.Tensor
    same: torch.Tensor
    margin: torch.Tensor

    @classmethod
    def of(cls, reference: Reference, logits: torch.Tensor) -> Errors:
        """Of logits [P, V] of any floating dtype."""
        logits = logits.double()
        other, kept = logits.gather(1, reference.top_ids), reference.top_logits.double()
        difference = [(a - b).abs() for a, b in zip(other, kept, strict=True)]
        for i, whole in reference.whole.items():
            difference[i] = (logits[i] - whole.double()).abs()
        log_p, log_q = kept - reference.lse.unsqueeze(1), other - logits.logsumexp(1, keepdim=True)
        rest_p, rest_q = ((1 - log.exp().sum(1)).clamp(min=0) for log in (log_p, log_q))
        rest = torch.where(rest_p > 0, rest_p * (rest_p / rest_q.clamp(min=1e-30)).clamp(min=1e-30).log(), 0.0)
        return cls(
            largest=torch.stack([own.max() for own in difference]),
            mean=torch.stack([own.mean() for own in difference]),
            kl=((log_p.exp() * (log_p - log_q)).sum(1) + rest).clamp(min=0),
            same=logits.argmax(1) == reference.top_ids[:, 0],
            margin=kept[:, 0] - kept[:, 1],
        )

    @classmethod
    def together(cls, of_prompts: Sequence[Errors]) -> Errors:
        """Those of several prompts as one."""
        return cls(*(torch.cat([getattr(each, name) for each in of_prompts]) for name in cls.__annotations__))

    def __str__(self) -> str:
        return (
            f"logits off by {self.mean.mean():.2g} in the mean and {self.largest.max():.2g} at most, KL "
            f"{self.kl.mean():.2g} nats, likeliest token the same at {int(self.same.sum())} of {len(self.same)}"
        )


@dataclass(frozen=True)
class RecordedPrompt:
    """A prompt as it was encoded, and what transformers says of it.

    references: of the forms that compute in float32, FLOAT32 and FP8. errors: of BFLOAT16 and FP8 against FLOAT32.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    digest: str
    references: Mapping[str, Reference]
    errors: Mapping[str, Errors]

    @classmethod
    def of(cls, prompt: EncodedPrompt, logits: Mapping[str, torch.Tensor]) -> RecordedPrompt:
        """From the logits [P, V] of every form."""
        references = {form: Reference.of(logits[form]) for form in (FLOAT32, FP8)}
        errors = {form: Errors.of(references[FLOAT32], logits[form]) for form in (BFLOAT16, FP8)}
        return cls(prompt.ids, prompt.prompt_tokens, prompt.digest, references, errors)


@dataclass(frozen=True)
class Recording:
    """What a file has: prompts by name, and what they were recorded of and with."""

    checkpoint: str
    """`checkpoint_digest`."""
    versions: Mapping[str, str]
    prompts: Mapping[str, RecordedPrompt]

    def errors(self, form: str, names: Sequence[str]) -> Errors:
        """How far a form of transformers' model is from that in float32, over these prompts."""
        return Errors.together([self.prompts[name].errors[form] for name in names])

    def save(self, path: Path) -> None:
        """Write it to `path`, whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        described: dict[str, Any] = {}
        for name, prompt in self.prompts.items():
            described[name] = {"prompt_tokens": prompt.prompt_tokens, "digest": prompt.digest}
            tensors[f"{name}.ids"] = torch.tensor(prompt.ids, dtype=torch.int32)
            for form, reference in prompt.references.items():
                own = {"top_ids": reference.top_ids.int(), "top_logits": reference.top_logits, "lse": reference.lse}
                own |= {f"whole.{i}": logits for i, logits in reference.whole.items()}
                tensors |= {f"{name}.{form}.{part}": tensor for part, tensor in own.items()}
            for form, errors in prompt.errors.items():
                own = {part: tensor.contiguous() for part, tensor in vars(errors).items()}
                tensors |= {f"{name}.{form}.off.{part}": tensor for part, tensor in own.items()}
        metadata = {"checkpoint": self.checkpoint, "versions": self.versions, "prompts": described}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.tmp")
        try:
            save_file(tensors, unfinished, metadata={"recording": json.dumps(metadata)})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what `save` wrote.

        Raises:
            ValueError: it is another file, or not whole.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads(file.metadata()["recording"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
            prompts = {name: _read(name, tensors, each) for name, each in metadata["prompts"].items()}
            return cls(metadata["checkpoint"], metadata["versions"], prompts)
        except Exception as error:  # of safetensors, JSON or a missing name
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: no recording ({problem}); write it with tools/record_logits.py") from error


def _read(name: str, tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> RecordedPrompt:
    def of(form: str) -> Reference:
        start = f"{name}.{form}."
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        whole = {int(key.removeprefix("whole.")): tensor for key, tensor in own.items() if key.startswith("whole.")}
        return Reference(own["top_ids"].long(), own["top_logits"], own["lse"], whole)

    def off(form: str) -> Errors:
        return Errors(**{part: tensors[f"{name}.{form}.off.{part}"] for part in Errors.__annotations__})

    return RecordedPrompt(
        ids=tuple(tensors[f"{name}.ids"].tolist()),
        prompt_tokens=described["prompt_tokens"],
        digest=described["digest"],
        references={form: of(form) for form in (FLOAT32, FP8)},
        errors={form: off(form) for form in (BFLOAT16, FP8)},
    )


def problems_of(recording: Recording, checkpoint: Path, prompts: Sequence[EncodedPrompt]) -> list[str]:
    """Why a recording does not say anything of a checkpoint; empty where it does."""
    problems = []
    if (digest := checkpoint_digest(checkpoint)) != recording.checkpoint:
        problems.append(f"it is of a checkpoint with digest {recording.checkpoint[:12]}, not {digest[:12]}")
    given = {prompt.name: prompt.digest for prompt in prompts}
    other = [name for name, prompt in recording.prompts.items() if given.get(name) != prompt.digest]
    if other or len(given) != len(recording.prompts):
        problems.append(
            f"its prompts are others: {first_three(other or sorted(given.keys() - recording.prompts.keys()))}"
        )
    return problems
