# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 generate`: continue prompts, or answer a question about images and videos."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..nxdi import NXDI_AVAILABLE
from .options import (
    AnswerOptions,
    ChatTemplateOptions,
    ModelOptions,
    SpeculationOptions,
    add_answer_options,
    add_chat_template_options,
    add_model_options,
    add_speculate_option,
    existing,
    options_from,
    positive,
    print_any_text,
)

if TYPE_CHECKING:
    from ..serving.generation import Generation, TextGenerator
    from ..serving.sampling import SamplingOptions
    from ..serving.speculation import Acceptance
    from .options import Commands


@dataclass(frozen=True)
class GenerateOptions(ChatTemplateOptions, AnswerOptions, ModelOptions, SpeculationOptions):
    """The options of `qwen35 generate`."""

    prompt: str | None
    batch: list[str]
    image: list[str]
    video: list[str]
    video_fps: float | None
    chat: bool
    json: bool
    n: int
    logprobs: int | None
    compiled: Path | None

    @property
    def with_media(self) -> bool:
        return bool(self.image or self.video)

    @property
    def in_chat(self) -> bool:
        """Whether the prompt becomes a turn of the chat template, as whatever only a template takes makes it."""
        asked = self.system is not None or self.think is not None or self.tools is not None
        return self.chat or asked or self.with_media


def add_parser(commands: Commands) -> None:
    """Add `generate` to the commands of `qwen35`."""
    parser = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    parser.set_defaults(run=_run)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; '-' reads standard input")
    parser.add_argument(
        "--batch", nargs="+", default=[], metavar="PROMPT", help="further prompts, all run as one padded batch"
    )
    parser.add_argument(
        "--image", nargs="+", default=[], metavar="FILE", help="images to ask about; the prompt becomes a chat turn"
    )
    parser.add_argument(
        "--video",
        nargs="+",
        default=[],
        metavar="FILE",
        help="animations (GIF, WebP, APNG), video files (with PyAV: MP4, ...) or directories of frames",
    )
    parser.add_argument(
        "--video-fps",
        type=float,
        metavar="FPS",
        help="frames a second: of a directory, those it has (2); of a file, those to take (as the model's processor)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put each prompt into the model's chat template, as --system, --think, --no-think and --tools do",
    )
    add_model_options(parser)
    add_answer_options(parser)
    add_chat_template_options(parser)
    add_speculate_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("-n", type=positive, default=1, metavar="N", help="continuations of each prompt (1)")
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="with --json: log-probabilities of each token and the K likeliest"
    )
    parser.add_argument(
        "--compiled", type=Path, metavar="DIR", help="what 'qwen35 compile' wrote; on Neuron there must be one"
    )


def _run(args: argparse.Namespace) -> None:
    from ..serving.loading import checkpoint_of
    from ..serving.ranks import run_on_every_rank
    from ..serving.sampling import continuation_problems

    options = options_from(GenerateOptions, args)
    prompts = _prompts(options)
    if options.model is None and options.compiled is not None:
        model_path = existing(checkpoint_of(options.compiled))
    else:
        model_path = options.checkpoint
    # Everything a configuration can have wrong is said here, before processes start and weights are read; first for
    # the shortest prompt, since transformers reads config.json too when it makes the tokenizer.
    _config(options, model_path, 1 + options.max_new_tokens, len(prompts))
    inputs = _encode(options, model_path, prompts)
    sampling = options.sampling_of(model_path)
    if problems := [*continuation_problems(options.n, options.logprobs, sampling)]:
        raise ValueError("; ".join(problems))
    if options.logprobs is not None and not options.json:
        raise ValueError(f"--logprobs {options.logprobs} without --json: text has no place for them; add --json")
    config = _config(options, model_path, inputs["input_ids"].shape[1] + options.max_new_tokens, len(prompts))
    run_on_every_rank(config.neuron_config, _generate_rank, options, model_path, config, prompts, inputs, sampling)


def _prompts(options: GenerateOptions) -> list[str]:
    prompts = [*([] if options.prompt is None else [options.prompt]), *options.batch]
    if not prompts or options.prompt == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 are named with their prompt
        prompts = [sys.stdin.read().rstrip("\n"), *options.batch]
    if options.with_media and len(prompts) > 1:
        raise ValueError("--batch with --image or --video: ask one question at a time")
    if options.video_fps is not None and not options.video:
        raise ValueError(f"--video-fps {options.video_fps} without --video: name a video, or leave it out")
    return prompts


def _encode(options: GenerateOptions, model_path: Path, prompts: list[str]) -> dict[str, torch.Tensor]:
    from ..serving.prompts import as_chat, encode, encode_chat, load_tokenizer, system_turn
    from ..vision.processing import VisionProcessor

    tokenizer = load_tokenizer(model_path)
    tools, think = options.tool_schemas, options.think
    if not options.with_media:
        if options.in_chat:
            prompts = [
                as_chat(tokenizer, prompt, system=options.system, tools=tools, enable_thinking=think)
                for prompt in prompts
            ]
        return encode(tokenizer, prompts)
    content: list[dict[str, Any]] = [{"type": "image", "image": file} for file in options.image]
    content += [{"type": "video", "video": file, "fps": options.video_fps} for file in options.video]
    messages = [
        *system_turn(options.system),
        {"role": "user", "content": [*content, {"type": "text", "text": prompts[0]}]},
    ]
    processor = VisionProcessor.from_pretrained(model_path)
    return encode_chat(tokenizer, processor, [messages], tools=tools, enable_thinking=think)


def _config(options: GenerateOptions, model_path: Path, length: int, rows: int) -> Qwen35InferenceConfig:
    """A configuration for `rows` prompts and answers of `length` tokens together, or the compiled one if it does."""
    from ..serving.loading import default_neuron_config, load_compiled_config

    if options.compiled is None:
        neuron_config = default_neuron_config(length, rows, options.tp, options.dtype, **options.neuron_fields)
        neuron_config.num_speculative_tokens = options.speculate or 0
        if not neuron_config.on_cpu:
            raise ValueError("--compiled is missing: on Neuron run 'qwen35 compile DIR', then pass --compiled DIR")
        config_cls = Qwen35VLInferenceConfig if options.with_media else Qwen35InferenceConfig
        return config_cls.from_pretrained(model_path, neuron_config=neuron_config)
    config = load_compiled_config(options.compiled)
    options.require_compiled(options.compiled, config.num_speculative_tokens)
    options.require_no_settings(options.compiled)
    if options.with_media and not isinstance(config, Qwen35VLInferenceConfig):
        raise ValueError(f"--image with --compiled {options.compiled}: it takes text only; compile it with --vision")
    for name, needed, what in (("seq_len", length, "tokens of prompt and answer"), ("batch_size", rows, "prompts")):
        if needed > (most := getattr(config.neuron_config, name)):
            raise ValueError(f"{needed} {what} exceed {name}={most} of the compiled model: compile one for more")
    return config


def _generate_rank(
    options: GenerateOptions,
    model_path: Path,
    config: Qwen35InferenceConfig,
    prompts: list[str],
    inputs: dict[str, torch.Tensor],
    sampling: SamplingOptions,
) -> None:
    """What every rank does; the first one prints."""
    from ..serving.generation import TextGenerator

    print_any_text()
    prints = int(os.environ.get("RANK", "0")) == 0
    generator = TextGenerator.load(model_path, config, options.compiled)
    streams = prints and len(prompts) == options.n == 1 and not options.json
    streamer = _Streamer(generator, "" if options.in_chat else prompts[0], options.stop) if streams else None
    result = generator.complete(
        inputs, options.max_new_tokens, sampling, streamer, options.stop, n=options.n, logprobs=options.logprobs
    )
    if not prints:
        return
    rows = [prompt for prompt in prompts for _ in range(options.n)]
    if options.json:
        print(json.dumps(_as_json(model_path, config, rows, result), ensure_ascii=False))
        return
    if streamer is not None:
        print(streamer.text.flush())
    else:
        for prompt, text in zip(rows, result.texts, strict=True):
            print(f"{prompt}\n  -> {text.strip()}" if options.in_chat else f"{prompt}{text}")
    print(_timing(result), file=sys.stderr)
    if result.acceptance is not None:
        print(f"[{result.acceptance}]", file=sys.stderr)


class _Streamer:
    """Prints the prompt, and text as soon as its characters are whole."""

    def __init__(self, generator: TextGenerator, prompt: str, stop: list[str]) -> None:
        from ..serving.text_stream import StopStrings

        self.text = StopStrings(generator.tokenizer, stop)
        print(prompt, end="", flush=True)

    def __call__(self, tokens: torch.Tensor) -> None:
        print(self.text.push(int(tokens[0])), end="", flush=True)


def _timing(result: Generation) -> str:
    count = max(map(len, result.tokens))
    line = f"[{count} tokens; TTFT {1e3 * result.time_to_first_token:.1f} ms"
    if result.time_per_output_token is not None:
        rate = len(result.tokens) / result.time_per_output_token
        line += f"; TPOT {1e3 * result.time_per_output_token:.2f} ms ({rate:.0f} tokens/s)"
    return line + "]"


def _as_json(model_path: Path, config: Qwen35InferenceConfig, prompts: list[str], result: Generation) -> dict[str, Any]:
    return {
        "model": str(model_path),
        "device": "neuron" if NXDI_AVAILABLE else "cpu",
        "tp_degree": config.neuron_config.tp_degree,
        "ttft_s": result.time_to_first_token,
        "tpot_s": result.time_per_output_token,
        **({} if result.acceptance is None else {"speculation": _acceptance(result.acceptance)}),
        "generations": [
            {"prompt": prompt, "text": text, "tokens": tokens, **_logprobs_of_row(result, row)}
            for row, (prompt, text, tokens) in enumerate(zip(prompts, result.texts, result.tokens, strict=True))
        ],
    }


def _acceptance(acceptance: Acceptance) -> dict[str, Any]:
    names = ("steps", "tokens", "tokens_per_step", "rates", "conditional_rates")
    return {name: getattr(acceptance, name) for name in names}


def _logprobs_of_row(result: Generation, row: int) -> dict[str, Any]:
    """A field for the JSON of a row, when log-probabilities were asked for."""
    return {} if result.logprobs is None else {"logprobs": [asdict(step) for step in result.logprobs[row]]}
