# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Record what `qwen35 selftest` compares with: the mini's tokens by transformers 5, kernel times by the emulator.

    python tools/record_selftest.py

Written only if every recorded token leads by `MARGIN`, so that the roundings of bfloat16 cannot change one.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
import transformers

import nki_emulator
from nki_emulator.jit import Kernel
from qwen35.selftest.kernel_checks import KERNELS
from qwen35.selftest.recorded import FILE, Rectangle, draw
from qwen35.serving.loading import MINI_CHECKPOINT

MARGIN = 2.0
"""Of logits; bfloat16 moves the mini's by some tenths."""

STEPS = 12
FACTS = json.loads((MINI_CHECKPOINT / "facts.json").read_text(encoding="utf-8"))
SHORT = (0, 60, 120, 240)
"""Facts that are asked, half of them as chat turns; of those that lead by `MARGIN`, the next ones."""

PAPER = (236, 236, 236)
PICTURES = (
    ("What colour is the square?", Rectangle(96, 96, PAPER, (16, 16, 44, 44), (220, 40, 40))),
    ("What colour is the square?", Rectangle(96, 96, PAPER, (48, 40, 80, 72), (40, 90, 220))),
)


class Oracle:
    """transformers' own model over the mini, in float32."""

    def __init__(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_CHECKPOINT)
        self.processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(MINI_CHECKPOINT)
        config = transformers.AutoConfig.from_pretrained(MINI_CHECKPOINT)
        kind = getattr(transformers, config.architectures[0])
        self.model = kind.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32).eval()
        self.image_token = config.image_token_id
        self.ends = json.loads((MINI_CHECKPOINT / "generation_config.json").read_text())["eos_token_id"]
        self.model.generation_config.eos_token_id = None

    @torch.no_grad()
    def answer(self, ids: list[int], **media: torch.Tensor) -> tuple[list[int], float]:
        """Greedy tokens up to an end token, and the least lead of one over the next likely."""
        prompt = torch.tensor([ids])
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=transformers.GenerationConfig(
                do_sample=False, max_new_tokens=STEPS, pad_token_id=0, return_dict_in_generate=True, output_logits=True
            ),
            **media,
        )
        tokens = output.sequences[0, len(ids) :].tolist()
        ends = [i for i, token in enumerate(tokens) if token in self.ends]
        kept = ends[0] + 1 if ends else len(tokens)
        best = torch.stack(output.logits, dim=1)[0, :kept].topk(2, dim=-1).values
        return tokens[:kept], float((best[:, 0] - best[:, 1]).min())

    def of_text(self, text: str) -> tuple[dict[str, Any], float]:
        ids = self.tokenizer(text)["input_ids"]
        tokens, margin = self.answer(ids)
        return {"text": text, "prompt": ids, "answer": tokens}, margin

    def of_picture(self, question: str, picture: Rectangle) -> tuple[dict[str, Any], float]:
        seen = self.processor(draw(picture), return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
        )
        at = ids.index(self.image_token)
        count = int(seen["image_grid_thw"].prod()) // 4
        ids = [*ids[:at], *[self.image_token] * count, *ids[at + 1 :]]
        types = torch.tensor([[int(token == self.image_token) for token in ids]])
        media = {name: seen[name] for name in ("pixel_values", "image_grid_thw")}
        tokens, margin = self.answer(ids, mm_token_type_ids=types, **media)
        return {"text": question, "prompt": ids, "answer": tokens, "picture": asdict(picture)}, margin

    def chat(self, question: str) -> str:
        message = [{"role": "user", "content": question}]
        text: str = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return text


def leading(oracle: Oracle, start: int, chat: bool) -> tuple[dict[str, Any], float]:
    """The first fact from `start` on whose tokens lead by `MARGIN`."""
    for fact in FACTS[start:]:
        entry, margin = oracle.of_text(oracle.chat(fact["question"]) if chat else fact["prompt"])
        if margin >= MARGIN and len(entry["answer"]) < STEPS:
            return entry, margin
    raise SystemExit(f"no fact from {start} on leads by {MARGIN}")


def sentences(first: int, count: int) -> str:
    return " ".join(f"{fact['prompt']} {fact['answer'].rstrip('.')}." for fact in FACTS[first : first + count])


def modelled_times() -> dict[str, float]:
    """Microseconds of each check's launches in the emulator."""
    times: dict[str, float] = {}
    call = Kernel.__call__
    for name, check in KERNELS.items():
        if name == "mlp":  # not of this package; see docs/library_kernels.md
            continue
        total = [0.0]

        def counted(kernel: Kernel, *args: Any, total: list[float] = total, **kwargs: Any) -> Any:
            result = nki_emulator.emulate(kernel, *args, **kwargs)
            total[0] += result.report.makespan_ns / 1e3
            return result.outputs

        Kernel.__call__ = counted  # type: ignore[method-assign]
        try:
            check.launch(*check.inputs())
        finally:
            Kernel.__call__ = call  # type: ignore[method-assign]
        times[name] = round(total[0], 1)
    return times


def main() -> None:
    oracle = Oracle()
    short = [leading(oracle, start, chat=i % 2 == 1) for i, start in enumerate(SHORT)]
    common = sentences(0, 16)
    long = [oracle.of_text(f"{common} {FACTS[i]['prompt']}") for i in (30, 41)]
    pictures = [oracle.of_picture(*picture) for picture in PICTURES]
    margins = [margin for _, margin in (*short, *long, *pictures)]
    for entry, margin in (*short, *long, *pictures):
        answer = oracle.tokenizer.decode(entry["answer"])
        print(f"{len(entry['prompt'])} tokens, margin {margin:.2f}: {entry['text'][-50:]!r} -> {answer!r}")
    if min(margins) < MARGIN:
        raise SystemExit(f"a token leads by {min(margins):.2f} only, less than {MARGIN}: choose other prompts")
    content = {
        "what": "the mini's greedy tokens by transformers in float32; modelled times of nki_emulator, not measured",
        "command": "tools/record_selftest.py",
        "transformers": transformers.__version__,
        "least_margin": round(min(margins), 3),
        **{
            name: [entry for entry, _ in entries]
            for name, entries in (("short", short), ("long", long), ("pictures", pictures))
        },
        "modelled_us": modelled_times(),
    }
    FILE.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
