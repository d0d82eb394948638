# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is asked of the engine, what it gives back, and what makes a request one that cannot run.

Letters: S tokens of the prompt, P patches of all images, or all videos, N images or videos.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from ..error_text import shorten
from .sampling import GREEDY, SamplingOptions, TokenLogprobs, continuation_problems, whole_number
from .text_stream import check_stop


class FinishReason(str, Enum):
    """Why a request gets no more tokens."""

    EOS = "eos"  # its last token is one of its eos_token_ids
    STOP = "stop"  # its text has come to one of its stop strings
    LENGTH = "length"  # it has max_new_tokens
    CANCELLED = "cancelled"
    ERROR = "error"  # something failed that was done for it; its output says what


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Args:
        prompt: token ids.
        max_new_tokens: tokens to give at most.
        sampling: its seed makes the tokens repeatable; without one it is drawn from PyTorch's default generator.
        eos_token_ids: tokens that end the answer; the one that did is its last.
        media: pixels [P, patch size] and grids [N, 3] of the images and videos, in the order of their placeholders,
            under the names that the checkpoint's processor gives them.
        n: continuations of the prompt, which is encoded once for those that have a slot by then.
        logprobs: of how many of the most likely tokens each output has the log-probabilities, besides the one chosen;
            None for no log-probabilities at all.
        stop: texts that end the answer where one begins, which may be before its last token; the engine needs a
            tokenizer for them.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingOptions = GREEDY
    eos_token_ids: Collection[int] = ()
    media: Mapping[str, torch.Tensor] = field(default_factory=dict)
    n: int = 1
    logprobs: int | None = None
    stop: str | Sequence[str] = ()


@dataclass(frozen=True)
class StepOutput:
    """The next token of a request, and why it was the last.

    A cancelled request, and one that failed, end without a token.

    Args:
        request_id: what `add` returned.
        token: its id.
        text: what can be shown after this token, of a request with stop strings: without these, and without text that
            may begin one.
        finish_reason: None while more tokens come.
        index: which of the request's n continuations.
        logprobs: those that the request asked for.
        error: what failed, in one line, under `FinishReason.ERROR`.
    """

    request_id: int
    token: int | None
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class ModelLimits:
    """What a loaded model takes of a request.

    Args:
        vocab_size: token ids are below it.
        seq_len: tokens of a prompt and its answer together, at most.
        max_prompt_tokens: tokens of a prompt, at most; None where prompts are encoded in chunks.
        takes_stop: whether there is a tokenizer to find stop strings with.
        media_names: names under which it takes media; empty for a model of text.
        check_media: raises ValueError when media, by name, do not match a prompt [1, S] int64.
    """

    vocab_size: int
    seq_len: int
    max_prompt_tokens: int | None = None
    media_names: Sequence[str] = ()
    check_media: Callable[..., None] | None = None
    takes_stop: bool = False


GRIDS = "_grid_thw"
"""How the names of grids end; other media are pixels."""


def checked_request(request: Request, limits: ModelLimits) -> Request:
    """Check that a request can run, before anything is computed for it.

    Returns:
        The request as it is run: every field in the type that it is declared with, and nothing shared but pixels.

    Raises:
        ValueError: it cannot; naming every field, value and remedy.
    """
    if not isinstance(request, Request):
        raise ValueError(f"a request is {_a(request)}: pass a Request")
    problems: list[str] = []
    prompt = _token_ids("prompt", request.prompt, limits, problems)
    eos_token_ids = _token_ids("eos_token_ids", request.eos_token_ids, limits, problems)
    stop = _stop(request.stop, limits, problems)
    problems += _length_problems(request, prompt, limits)
    if isinstance(request.sampling, SamplingOptions):
        problems += continuation_problems(request.n, request.logprobs, request.sampling)
    else:
        problems.append(f"sampling is {_a(request.sampling)}: pass SamplingOptions")
    media = _media(request.media, prompt, limits, problems)
    if problems:
        raise ValueError("this request cannot run: " + "; ".join(problems))
    return Request(
        prompt=(*prompt,),
        max_new_tokens=int(request.max_new_tokens),
        sampling=request.sampling,
        eos_token_ids=frozenset(eos_token_ids),
        stop=stop,
        media=media,
        n=int(request.n),
        logprobs=None if request.logprobs is None else int(request.logprobs),
    )


def out_of_vocabulary(token: int, name: str, vocab_size: int) -> str:
    """What is said of an id that the model has no embedding of."""
    return f"token {token} of {name} is not in 0..{vocab_size - 1}: use the checkpoint's tokenizer"


def _stop(given: Any, limits: ModelLimits, problems: list[str]) -> tuple[str, ...]:
    """Stop strings; none when some are wrong, which is added to `problems`."""
    try:
        stop = (*check_stop(given),)
    except (TypeError, ValueError) as error:
        problems.append(f"stop={_a(given)}: {error}" if isinstance(error, TypeError) else str(error))
        return ()
    if stop and not limits.takes_stop:
        problems.append("stop strings are texts, and the engine has no tokenizer: make it with one, or leave them out")
    return stop


def _token_ids(name: str, given: Any, limits: ModelLimits, problems: list[str]) -> list[int]:
    """Ids as ints; none when some are wrong, which is added to `problems`."""
    most = limits.seq_len if name == "prompt" else limits.vocab_size
    try:
        values = given.tolist() if hasattr(given, "tolist") else given
        if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
            problems.append(f"{name} is {_a(given)}: pass a list of token ids")
            return []
        if name == "prompt" and isinstance(values, Set):
            problems.append(f"{name} is {_a(given)}: pass a list of token ids, in order")
            return []
        given_ids = [*values] if isinstance(values, Sized) else [*itertools.islice(values, most + 1)]  # may never end
    except Exception as error:  # a tensor without data, or the caller's own code, which raises anything
        problems.append(
            f"{name} cannot be read ({type(error).__name__}: {shorten(str(error))}): pass a list of token ids"
        )
        return []
    if len(given_ids) > most and not isinstance(values, Sized):
        problems.append(f"{name} has more than {most} token ids: pass a list of at most {most}")
        return []
    ids = []
    for i, value in enumerate(given_ids):
        token = whole_number(value)
        if token is None:
            problems.append(f"{name}[{i}] is {_a(value)}: pass token ids, which are ints")
            return []
        if not 0 <= token < limits.vocab_size:
            problems.append(out_of_vocabulary(token, "prompt or eos_token_ids", limits.vocab_size))
            return []
        ids.append(token)
    if name == "prompt" and not ids:
        problems.append("prompt is empty: give at least one token to continue")
    return ids


def _length_problems(request: Request, prompt: Sequence[int], limits: ModelLimits) -> Iterator[str]:
    new = whole_number(request.max_new_tokens)
    if new is None or new < 1:
        yield f"max_new_tokens={reprlib.repr(request.max_new_tokens)}: must be at least 1, a whole number"
    elif len(prompt) + new > limits.seq_len:
        yield (
            f"a prompt of {len(prompt)} tokens and max_new_tokens={new} exceed seq_len={limits.seq_len}: shorten the "
            "prompt, lower max_new_tokens or raise seq_len"
        )
    longest = limits.max_prompt_tokens
    if longest is not None and len(prompt) > longest:
        yield (
            f"a prompt of {len(prompt)} tokens exceeds max_context_length={longest}: raise it, or set "
            "prefill_chunk_size"
        )


def _media(given: Any, prompt: Sequence[int], limits: ModelLimits, problems: list[str]) -> dict[str, torch.Tensor]:
    """Media as the model takes them; what is wrong with them is added to `problems`."""
    if not isinstance(given, Mapping):
        problems.append(f"media is {_a(given)}: pass a dict of tensors by name")
        return {}
    if unknown := sorted({*map(str, given)} - {*limits.media_names}):
        names = ", ".join(limits.media_names) or "none, or load NeuronQwen35VLForCausalLM"
        problems.append(f"media has {_few(unknown)}, which this model does not take: pass {names}")
        return {}
    before = len(problems)
    media = {name: tensor.detach() for name, tensor in given.items() if _is_medium(name, tensor, problems)}
    most = max((len(tensor) for name, tensor in media.items() if not name.endswith(GRIDS)), default=None)
    for name, tensor in media.items():
        if name.endswith(GRIDS):
            media[name] = tensor.long().clone()
            if most is not None and tensor.numel() and int(tensor.max()) > most:  # counting frames could take for ever
                problems.append(f"media: {name} has {int(tensor.max())}, more than there are patches ({most})")
    if media and prompt and len(problems) == before and limits.check_media is not None:
        try:
            limits.check_media(torch.tensor([[*prompt]]), **media)
        except ValueError as error:
            problems.append(f"media: {error}")
    return media


def _is_medium(name: str, tensor: Any, problems: list[str]) -> bool:
    """Whether this is a matrix of finite pixels, or of whole numbers; what is wrong is added to `problems`."""
    kind, shape = ("whole", "[N, 3]") if name.endswith(GRIDS) else ("floating-point", "[patches, patch size]")
    if not isinstance(tensor, torch.Tensor):
        problem = f"is {_a(tensor)}: pass a torch.Tensor, as the processor gives with return_tensors='pt'"
    elif tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        problem = f"is on {tensor.device} as {tensor.layout}: pass a dense tensor on the CPU"
    elif tensor.dim() != 2:
        problem = f"has shape {[*tensor.shape]}: pass {shape}"
    elif (
        tensor.is_floating_point() == (kind == "whole")
        or tensor.dtype is torch.bool
        or tensor.is_complex()
        or tensor.is_quantized
    ):
        problem = f"is {tensor.dtype}: pass {kind} numbers, as the processor gives"
    elif kind != "whole" and not tensor.float().isfinite().all():
        problem = "has values that are nan or infinite: check the image, and its mean and scale"
    else:
        return True
    problems.append(f"media: {name} {problem}")
    return False


def _few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:40] for name in names[:3]) + more


def _a(value: Any) -> str:
    """A value by its type, without what it holds: prompts and pictures do not belong into messages."""
    return "None" if value is None else f"a {type(value).__name__}"
