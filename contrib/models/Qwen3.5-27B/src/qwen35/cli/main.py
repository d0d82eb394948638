# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The `qwen35` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..configuration_qwen35 import DTYPES, Qwen35InferenceConfig, Qwen35NeuronConfig
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..hardware import INSTANCES
from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from ..nxdi import NXDI_AVAILABLE, NeuronConfig
from ..planning.recommended import RECOMMENDED, device_neuron_config
from ..serving.chat import CHUNK_SIZE, Conversation
from ..serving.generation import Generation, TextGenerator
from ..serving.loading import MINI_CHECKPOINT, checkpoint_of, default_neuron_config, load_compiled_config
from ..serving.prompts import TextStream, as_chat, encode, encode_chat, load_tokenizer
from ..serving.sampling import SamplingOptions
from ..vision.processing import VisionProcessor
from .kernels import add_kernels_command
from .plan import add_plan_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after an error that the message explains."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        message = str(error)
    except torch.multiprocessing.ProcessRaisedException as error:
        message = str(error).strip().splitlines()[-1]  # of the rank's traceback: what it raised
    else:
        return 0
    print(f"qwen35: error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qwen35", description="Qwen3.5 on AWS Trainium, or on this CPU.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; '-' reads standard input")
    generate.add_argument(
        "--batch", nargs="+", default=[], metavar="PROMPT", help="further prompts, all run as one padded batch"
    )
    generate.add_argument(
        "--image", nargs="+", default=[], metavar="FILE", help="images to ask about; the prompt becomes a chat turn"
    )
    generate.add_argument(
        "--video", nargs="+", default=[], metavar="FILE", help="GIF, WebP or APNG animations, or directories of frames"
    )
    generate.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    _add_model_options(generate)
    _add_sampling_options(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    generate.add_argument(
        "--compiled", type=Path, metavar="DIR", help="what 'qwen35 compile' wrote; on Neuron there must be one"
    )

    chat = commands.add_parser(
        "chat",
        help="talk, turn by turn",
        description="Answer each line of standard input as the next turn of a conversation, until its end.",
    )
    chat.set_defaults(run=_chat)
    _add_model_options(chat)
    chat.add_argument("--seq-len", type=_positive, default=4096, metavar="N", help="the whole conversation (4096)")
    chat.add_argument(
        "--cache-gb", type=float, default=8.0, metavar="GB", help="host memory for what turns take up again (8)"
    )
    _add_sampling_options(chat)
    chat.add_argument("--compiled", type=Path, metavar="DIR", help="what 'qwen35 compile' wrote; on Neuron needed")

    compile_ = commands.add_parser(
        "compile",
        help="compile a model for Neuron",
        description="Compile the model and write it with the weights of every rank; on a CPU, check what would be.",
    )
    compile_.set_defaults(run=_compile)
    compile_.add_argument("output", type=Path, metavar="OUTPUT", help="the directory to make")
    _add_model_options(compile_)
    compile_.add_argument(
        "--seq-len", type=_positive, default=4096, metavar="N", help="prompt and answer, 4096 if unset"
    )
    compile_.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences at a time (1)")
    compile_.add_argument("--vision", action="store_true", help="also take images and videos")
    compile_.add_argument(
        "--instance", choices=INSTANCES, help="where it will run; on Neuron, check that it fits there"
    )
    compile_.add_argument(
        "--recommended",
        choices=RECOMMENDED,
        help="of 'qwen35 plan --recommended', in place of --tp, --dtype, --seq-len, --batch, --instance; for a device",
    )
    compile_.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    convert = commands.add_parser(
        "convert",
        help="pre-shard a checkpoint",
        description="Write the checkpoint in the Neuron layout, a safetensors file a rank, for fast loading.",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="the directory to make")
    _add_model_options(convert)
    convert.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_plan_command(commands)
    add_kernels_command(commands)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face checkpoint (default: the mini, or what was compiled)"
    )
    parser.add_argument("--tp", type=_positive, default=1, metavar="N", help="tensor-parallel degree")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on Neuron")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")


def _sampling(args: argparse.Namespace) -> SamplingOptions:
    return SamplingOptions(args.temperature, args.top_p, args.top_k, args.seed)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _chat(args: argparse.Namespace) -> None:
    sampling = _sampling(args)
    if args.compiled is not None:
        config = load_compiled_config(args.compiled)
    else:
        if args.tp != 1:
            raise ValueError(f"--tp {args.tp}: a chat on a CPU has one rank, which reads the questions; leave it out")
        neuron_config = default_neuron_config(args.seq_len, 1, 1, DTYPES.get(args.dtype), CHUNK_SIZE)
        config = Qwen35InferenceConfig.from_pretrained(
            _existing(args.model or MINI_CHECKPOINT), neuron_config=neuron_config
        )
    model_path = args.model or Path(config._name_or_path)
    generator = TextGenerator.load(model_path, config, args.compiled)
    conversation = Conversation(generator, args.max_new_tokens, sampling, int(args.cache_gb * 1e9))
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        print(prompt, end="", flush=True)
        if not (question := sys.stdin.readline()):
            return
        if question.strip():
            for piece in conversation.ask(question.strip()):
                print(piece, end="", flush=True)
            print(flush=True)


def _compile(args: argparse.Namespace) -> None:
    if args.recommended is not None:
        neuron_config = RECOMMENDED[args.recommended].neuron_config()
    else:
        instance = INSTANCES.get(args.instance)
        neuron_config = device_neuron_config(
            instance, args.tp, args.seq_len, args.batch, DTYPES.get(args.dtype), on_cpu=not NXDI_AVAILABLE
        )
    neuron_config.save_sharded_checkpoint = True
    model = _model(args, neuron_config, NeuronQwen35VLForCausalLM if args.vision else NeuronQwen35ForCausalLM)
    _write_whole(args.output, lambda path: model.compile(str(path)))
    counted, compiled = model.bytes_per_rank(), (args.output / "model.pt").exists()
    if args.json:
        print(json.dumps({"output": str(args.output), "compiled": compiled, "bytes_per_rank": asdict(counted)}))
    else:
        print(f"{args.output}: {'compiled' if compiled else 'checked, not compiled: no Neuron SDK here'}; {counted}")


def _generate(args: argparse.Namespace) -> None:
    prompts = ([args.prompt] if args.prompt is not None else []) + args.batch
    if not prompts or args.prompt == "-":
        prompts = [sys.stdin.read().rstrip("\n"), *args.batch]
    if args.model is None:
        args.model = MINI_CHECKPOINT if args.compiled is None else checkpoint_of(args.compiled)
    with_media = bool(args.image or args.video)
    if with_media and len(prompts) > 1:
        raise ValueError("--batch with --image or --video: ask one question at a time")
    inputs = _encode(args, prompts)
    sampling = _sampling(args)
    # Everything a configuration can have wrong is said here, before processes start and weights are read.
    length = inputs["input_ids"].shape[1] + args.max_new_tokens
    if args.compiled is None:
        neuron_config = default_neuron_config(length, len(prompts), args.tp, DTYPES.get(args.dtype))
        if not neuron_config.on_cpu:
            raise ValueError("--compiled is missing: on Neuron run 'qwen35 compile DIR', then pass --compiled DIR")
        config_cls = Qwen35VLInferenceConfig if with_media else Qwen35InferenceConfig
        config = config_cls.from_pretrained(args.model, neuron_config=neuron_config)
    else:
        config = load_compiled_config(args.compiled)
        if with_media and not isinstance(config, Qwen35VLInferenceConfig):
            raise ValueError(f"--image with --compiled {args.compiled}: it takes text only; compile it with --vision")
        _check_fits(config.neuron_config, length, len(prompts))
    _run_on_every_rank(config.neuron_config, _generate_rank, args, config, prompts, inputs, sampling)


def _encode(args: argparse.Namespace, prompts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer(_existing(args.model))
    if not (args.image or args.video):
        return encode(tokenizer, [as_chat(tokenizer, prompt) for prompt in prompts] if args.chat else prompts)
    args.chat = True
    content = [{"type": "image", "image": file} for file in args.image]
    content += [{"type": "video", "video": file} for file in args.video]
    message = {"role": "user", "content": [*content, {"type": "text", "text": prompts[0]}]}
    return encode_chat(tokenizer, VisionProcessor.from_pretrained(args.model), [[message]])


def _check_fits(neuron_config: NeuronConfig, length: int, rows: int) -> None:
    for name, needed, what in (("seq_len", length, "tokens of prompt and answer"), ("batch_size", rows, "prompts")):
        if needed > (most := getattr(neuron_config, name)):
            raise ValueError(f"{needed} {what} exceed {name}={most} of the compiled model: compile one for more")


def _generate_rank(
    args: argparse.Namespace,
    config: Qwen35InferenceConfig,
    prompts: list[str],
    inputs: dict[str, torch.Tensor],
    sampling: SamplingOptions,
) -> None:
    speaks = int(os.environ.get("RANK", "0")) == 0
    generator = TextGenerator.load(args.model, config, args.compiled)
    streaming = speaks and len(prompts) == 1 and not args.json
    on_token = _Streamer(generator, prompts[0] if not args.chat else "") if streaming else None
    result = generator.complete(inputs, args.max_new_tokens, sampling, on_token)
    if not speaks:
        return
    if args.json:
        print(json.dumps(_as_json(args, prompts, result), ensure_ascii=False))
        return
    if streaming:
        print()
    else:
        for prompt, text in zip(prompts, result.texts, strict=True):
            print(f"{prompt}\n  -> {text.strip()}" if args.chat else f"{prompt}{text}")
    print(_timing(result), file=sys.stderr)


class _Streamer:
    """Prints the prompt, and text as soon as its characters are whole."""

    def __init__(self, generator: TextGenerator, prompt: str) -> None:
        self.stream = TextStream(generator.tokenizer)
        print(prompt, end="", flush=True)

    def __call__(self, tokens: torch.Tensor) -> None:
        print(self.stream.push(int(tokens[0])), end="", flush=True)


def _timing(result: Generation) -> str:
    count = max(map(len, result.tokens))
    line = f"[{count} tokens; TTFT {1e3 * result.time_to_first_token:.1f} ms"
    if result.time_per_output_token is not None:
        rate = len(result.tokens) / result.time_per_output_token
        line += f"; TPOT {1e3 * result.time_per_output_token:.2f} ms ({rate:.0f} tokens/s)"
    return line + "]"


def _as_json(args: argparse.Namespace, prompts: list[str], result: Generation) -> dict[str, Any]:
    return {
        "model": str(args.model),
        "device": "neuron" if NXDI_AVAILABLE else "cpu",
        "tp_degree": args.tp,
        "ttft_s": result.time_to_first_token,
        "tpot_s": result.time_per_output_token,
        "generations": [
            {"prompt": prompt, "text": text, "tokens": tokens}
            for prompt, text, tokens in zip(prompts, result.texts, result.tokens, strict=True)
        ],
    }


def _convert(args: argparse.Namespace) -> None:
    model = _model(
        args,
        Qwen35NeuronConfig(
            tp_degree=args.tp, torch_dtype=DTYPES[args.dtype or "bfloat16"], save_sharded_checkpoint=True
        ),
    )

    def write(path: Path) -> None:
        model.config.save(str(path))
        model.shard_weights(str(path))

    _write_whole(args.output, write)
    files = sorted((args.output / "weights").glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    if args.json:
        print(json.dumps({"output": str(args.output), "tp_degree": args.tp, "bytes_per_rank": sizes}))
    else:
        print(f"{args.output}: {len(files)} ranks, {max(sizes) / 1e6:.1f} MB each at most")


def _model(
    args: argparse.Namespace,
    neuron_config: Qwen35NeuronConfig,
    model_cls: type[NeuronQwen35ForCausalLM] = NeuronQwen35ForCausalLM,
) -> NeuronQwen35ForCausalLM:
    path = str(_existing(args.model or MINI_CHECKPOINT).resolve())  # a compiled model is read from anywhere
    return model_cls(path, model_cls.get_config_cls().from_pretrained(path, neuron_config=neuron_config))


def _write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory that becomes `output` when it is complete, and is gone when it fails."""
    if output.exists():
        raise FileExistsError(f"OUTPUT={output} exists already: name a new directory")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        write(Path(scratch) / "partial")
        (Path(scratch) / "partial").rename(output)


def _existing(path: Path) -> Path:
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"--model {path}: no config.json there; name a Hugging Face checkpoint's directory")
    return path


def _run_on_every_rank(neuron_config: NeuronConfig, run: Callable[..., None], *rest: Any) -> None:
    """Call `run` once; on a CPU with tp_degree=N, in N processes that form a gloo group."""
    ranks = neuron_config.tp_degree
    if not neuron_config.on_cpu or ranks == 1:
        run(*rest)
        return
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.start_processes(
            _rank_process, args=(f"file://{scratch}/rendezvous", ranks, run, *rest), nprocs=ranks, start_method="spawn"
        )


def _rank_process(rank: int, rendezvous: str, ranks: int, run: Callable[..., None], *rest: Any) -> None:
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    try:
        run(*rest)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
