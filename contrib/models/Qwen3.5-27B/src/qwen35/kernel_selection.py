# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs: the choices there are, what overrides the configured one, and what `auto` means."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch

from .nki_kernels.library_mlp import MOST_COLUMNS, library_problem
from .phase import Phase


class DeltaNetKernel(str, Enum):
    """What computes the gated delta rule of a prompt; decoding has one kernel, used by all but TORCH."""

    AUTO = "auto"  # FUSED on a Neuron device, TORCH on a CPU
    FUSED = "fused"  # all heads and chunks in one launch per layer
    LOOPED = "looped"  # the same with a loop on the device over every 512 tokens, for prompts of whole loops
    CHUNKED = "chunked"  # one launch per chunk of 128 tokens
    RECURRENT = "recurrent"  # token by token, one launch per head: to check the others
    TORCH = "torch"  # `qwen35.ops`


class DeltaNetInverse(str, Enum):
    """How FUSED, LOOPED and CHUNKED invert the triangular system of a chunk; `auto` is TILED."""

    TILED = "tiled"  # on sub-arrays of the Tensor engine, side by side
    PLAIN = "plain"  # by matmuls that take all of it: slower, and nothing in it goes beyond NKI's documents


class AttentionKernel(str, Enum):
    """What computes the softmax attention of a phase."""

    AUTO = "auto"  # NKI on a Neuron device where the emulator's model says that it wins, else TORCH
    NKI = "nki"  # `nki_kernels.attention_prefill`, `attention_continuation`, `attention_decode`
    TORCH = "torch"  # NxDI's plain path, and blocks with a running softmax for continued prompts


class MLPKernel(str, Enum):
    """What computes the MLP of a call with few tokens, decoding above all; longer calls are left to the compiler.

    `auto` is TORCH.
    """

    TORCH = "torch"  # linear layers
    NKI = "nki"  # nki-library's kernel for token generation, `nki_kernels.library_mlp`


AUTO = "auto"
"""Of any kernel field: what device settings say, else the documented default."""

KERNEL_CHOICES: Mapping[str, tuple[str, ...]] = {
    "deltanet_kernel": tuple(kernel.value for kernel in DeltaNetKernel),
    "deltanet_inverse": (AUTO, *(inverse.value for inverse in DeltaNetInverse)),
    "attention_kernel": tuple(kernel.value for kernel in AttentionKernel),
    "mlp_kernel": (AUTO, *(kernel.value for kernel in MLPKernel)),
}
"""Fields of a `Qwen35NeuronConfig` that name a kernel, and the names; attention_kernel may be one for each phase."""

_FIXED_DEFAULTS = {"deltanet_inverse": DeltaNetInverse.TILED.value, "mlp_kernel": MLPKernel.TORCH.value}
"""What `auto` is wherever the model runs; of the other fields it depends on the device."""

KERNEL_ENVIRONMENT = {
    "USE_NKI_FUSED": DeltaNetKernel.FUSED,
    "USE_NKI_CHUNKED": DeltaNetKernel.CHUNKED,
    "USE_NKI": DeltaNetKernel.RECURRENT,
    "DELTANET_SEQUENTIAL": DeltaNetKernel.TORCH,
}
"""Environment variables that override `deltanet_kernel` when they are "1"; those of the published port."""

KERNEL_HEAD_DIM = 128
"""K and V of every published checkpoint, and of the decoding kernel."""


ATTENTION_HEAD_DIMS = (64, 128, 256)
"""Head dims of the attention kernels."""

ATTENTION_TILE = 128
"""The attention kernels read a cache in multiples of this, and new tokens are padded to one."""

ATTENTION_TOKENS = {Phase.CONTEXT_ENCODING: 4096, Phase.CONTINUATION: 2048}
"""New tokens of a row that the kernels of these phases take at most in bfloat16; half as many in float32."""

ATTENTION_CHUNK_QUERIES = 12288
"""Queries of a chunk that share a KV head which a core takes at most in bfloat16; half as many in float32."""

ATTENTION_QUERIES = 512
"""Queries of a decoding step, rows times heads of a rank times tokens, that its kernel takes at most."""

ATTENTION_GROUP_QUERIES = 48
"""Of them, those of one row that share a key-value head."""

ATTENTION_NEW_KEYS = 128
"""New keys of a decoding step, rows times key-value heads of a rank times tokens, that its kernel takes at most."""

ATTENTION_WINS_FROM = {Phase.CONTEXT_ENCODING: 512, Phase.CONTINUATION: 512, Phase.TOKEN_GENERATION: 8192}
"""New tokens, for decoding cached positions, from which AUTO takes the kernel.

Verification has the kernel of decoding, and its choice; programs that draft call both for their parts.

Modelled, not measured: see docs/attention_kernels.md for prompts, against a compiler's path that keeps scores on chip.
Decoding is held against four passes of the Vector engine over scores with one query on a partition, 4.2 ns for each
position: 17 us at 4,096 and 34 us at 8,192, where the kernel takes 20 and 22 us.
"""


class DecodingStep(NamedTuple):
    """Rows of a decoding step, query heads and KV heads of a rank."""

    rows: int
    heads: int
    kv_heads: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head; 1 where a malformed configuration has fewer than KV heads."""
        return max(1, self.heads // self.kv_heads)

    def sizes(self, tokens: int) -> tuple[int, int, int]:
        """Queries, those of a row that share a KV head, and new keys, with so many tokens of every row."""
        return self.rows * self.heads * tokens, self.group * tokens, self.rows * self.kv_heads * tokens

    def fits(self, tokens: int) -> bool:
        """Whether the kernel of decoding takes that many tokens of every row at once."""
        limits = (ATTENTION_QUERIES, ATTENTION_GROUP_QUERIES, ATTENTION_NEW_KEYS)
        return all(size <= limit for size, limit in zip(self.sizes(tokens), limits, strict=True))


ATTENTION_PHASES = tuple(phase.value for phase in ATTENTION_WINS_FROM)
"""The keys of an attention_kernel by phase."""


def resolve_auto(given: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel fields with `auto` replaced by what device settings say, else by what it is on every device.

    Args:
        given: each field of `KERNEL_CHOICES`, by value; what is wrong with them is left for the checks.
        settings: what device settings say of some of them.

    Returns:
        All fields, and of them what was taken from `settings`.
    """
    chosen, taken = dict(given), {}
    for field, saved in settings.items():
        if field == "attention_kernel":
            by_phase, saved_by_phase = _by_phase(given[field]), _by_phase(saved)
            from_settings = {
                phase: kernel
                for phase, kernel in saved_by_phase.items()
                if kernel != AUTO and by_phase.get(phase, AUTO) == AUTO
            }
            if from_settings:
                chosen[field], taken[field] = by_phase | from_settings, from_settings
        elif saved != AUTO and given[field] == AUTO:
            chosen[field] = taken[field] = saved
    fixed = {field: default for field, default in _FIXED_DEFAULTS.items() if chosen[field] == AUTO}
    return chosen | fixed, taken


def _by_phase(kernel: Any) -> dict[Any, Any]:
    """An attention_kernel as one for each phase."""
    return dict(kernel) if isinstance(kernel, Mapping) else dict.fromkeys(ATTENTION_PHASES, kernel)


def leave_misfits_to_auto(config: Any, taken: dict[str, Any], malformed: Collection[str]) -> Iterator[str]:
    """Set back to `auto` what device settings chose and this model cannot run: they know no model.

    Args:
        config: a `Qwen35InferenceConfig`, whose sizes of the run are positive.
        taken: what `resolve_auto` took, of which what is set back is removed.
        malformed: fields of `config` that cannot be read.

    Yields:
        A line for each such kernel: the reason.
    """
    neuron = config.neuron_config
    for field in [*taken]:
        if field == "attention_kernel":
            for phase, kernel in [*taken[field].items()]:
                if problem := _settings_problem(config, field, kernel, malformed, Phase(phase)):
                    neuron.attention_kernel = _by_phase(neuron.attention_kernel) | {phase: AUTO}
                    del taken[field][phase]
                    yield f"{field}[{phase!r}]={problem}"
        elif problem := _settings_problem(config, field, taken[field], malformed):
            setattr(neuron, field, _FIXED_DEFAULTS.get(field, AUTO))
            del taken[field]
            yield f"{field}={problem}"


def _settings_problem(
    config: Any, field: str, kernel: str, malformed: Collection[str], phase: Phase | None = None
) -> str | None:
    """The kernel and why this model cannot run it, if it cannot."""
    problems: Iterator[str] = iter(())
    if field == "deltanet_kernel":
        problems = _head_dim_problems(DeltaNetKernel(kernel), config, malformed)
    elif field == "attention_kernel" and phase is not None and kernel == AttentionKernel.NKI.value:
        problems = _nki_problems(config, [phase], malformed)
    elif field == "mlp_kernel" and kernel == MLPKernel.NKI.value:
        problems = _nki_mlp_problems(config, malformed)
    problem = next(problems, None)
    return None if problem is None else f"{kernel!r} {problem}"


@dataclass(frozen=True)
class AttentionChoice:
    """Which attention kernels a model runs.

    Attributes:
        kernels: NKI, TORCH or AUTO on a device, for each phase that has a kernel.
        prompt_tokens: most tokens that the kernel of prompts takes, 0 for none.
        chunk_tokens: of a continued prompt; 0 where the kernel does not take them.
        step: a decoding step of one token a row.
        verified_tokens: of a row in verification; 0 without drafts.
        head_dim: of the attention layers.
    """

    kernels: Mapping[Phase, AttentionKernel]
    prompt_tokens: int
    chunk_tokens: int
    step: DecodingStep
    verified_tokens: int
    head_dim: int

    @property
    def any_kernel(self) -> bool:
        """Whether any call may run a kernel."""
        return any(kernel is not AttentionKernel.TORCH for kernel in self.kernels.values())

    def encodes(self, tokens: int) -> bool:
        """Whether a kernel encodes prompts of `tokens` tokens, padding included."""
        return tokens <= self.prompt_tokens and self._takes(Phase.CONTEXT_ENCODING, tokens)

    def reads_cache(self, phase: Phase, bucket: int) -> bool:
        """Whether a kernel attends to the first `bucket` positions of the cache in calls of a phase that reads it."""
        if bucket % ATTENTION_TILE:
            return False
        if phase is Phase.CONTINUATION:
            return self.chunk_tokens > 0 and self._takes(phase, self.chunk_tokens)
        tokens = self.verified_tokens if phase is Phase.VERIFICATION else 1
        return self.step.fits(tokens) and self._takes(Phase.TOKEN_GENERATION, bucket)

    def _takes(self, phase: Phase, size: int) -> bool:
        kernel = self.kernels[phase]
        if kernel is AttentionKernel.AUTO:
            return self.head_dim in ATTENTION_HEAD_DIMS and size >= ATTENTION_WINS_FROM[phase]
        return kernel is AttentionKernel.NKI


def select_attention(config: Any) -> AttentionChoice:
    """The attention kernels that a `Qwen35InferenceConfig` runs."""
    neuron = config.neuron_config
    kernels = {phase: AttentionKernel(name) for phase, name in _configured_attention(config).items()}
    for phase, kernel in kernels.items():
        if kernel is AttentionKernel.AUTO and (neuron.on_cpu or (phase.reads_cache and _fp8_cache(config))):
            kernels[phase] = AttentionKernel.TORCH
    chunk = getattr(neuron, "prefill_chunk_size", None) or 0
    return AttentionChoice(
        kernels=kernels,
        prompt_tokens=_most_tokens(config, Phase.CONTEXT_ENCODING),
        chunk_tokens=chunk if chunk <= _most_tokens(config, Phase.CONTINUATION) else 0,
        step=_decoding_step(config),
        verified_tokens=config.num_speculative_tokens + 1 if config.num_speculative_tokens else 0,
        head_dim=config.head_dim,
    )


def attention_problems(config: Any, malformed: Collection[str]) -> Iterator[str]:
    """What is wrong with `attention_kernel`, one line each; `malformed` are fields of `config` that cannot be read."""
    names, phases = KERNEL_CHOICES["attention_kernel"], ATTENTION_PHASES
    given = getattr(config.neuron_config, "attention_kernel", AttentionKernel.AUTO.value)
    for key, name in given.items() if isinstance(given, Mapping) else [(None, given)]:
        field = "attention_kernel" if key is None else f"attention_kernel[{key!r}]"
        if key is not None and key not in phases:
            yield f"{field} is no phase that has a kernel; set one of {', '.join(phases)}"
        elif name not in names:
            yield f"{field}={name!r} is unknown; set it to {', '.join(names)}"
        elif name == AttentionKernel.NKI.value:
            asked = [phase for phase in ATTENTION_WINS_FROM if key in (None, phase.value)]
            yield from (f"{field}='nki' {problem}" for problem in _nki_problems(config, asked, malformed))


_HEADS = ("num_attention_heads", "num_key_value_heads")


def _nki_problems(config: Any, phases: Collection[Phase], malformed: Collection[str]) -> Iterator[str]:
    """Why the attention kernels that were asked for cannot run: what AUTO would leave to TORCH."""
    neuron = config.neuron_config
    if "head_dim" not in malformed and config.head_dim not in ATTENTION_HEAD_DIMS:
        yield f"has heads of 64, 128 or 256 dims, not {config.head_dim}; use 'torch'"
    most = _most_tokens(config, Phase.CONTEXT_ENCODING)
    if Phase.CONTEXT_ENCODING in phases and neuron.max_context_length > most:
        yield f"takes prompts of at most {most} tokens, not max_context_length={neuron.max_context_length}; use 'auto'"
    chunk, has_heads = getattr(neuron, "prefill_chunk_size", None), {*_HEADS}.isdisjoint(malformed)
    if Phase.CONTINUATION in phases and chunk is not None and has_heads:
        most = _most_tokens(config, Phase.CONTINUATION)
        if chunk > most:
            yield f"takes chunks of at most {most} tokens, not prefill_chunk_size={chunk}; lower it, or use 'auto'"
    drafts = config.num_speculative_tokens if isinstance(config.num_speculative_tokens, int) else 0
    if Phase.TOKEN_GENERATION in phases and has_heads:
        step = _decoding_step(config)
        if not step.fits(drafts + 1):
            queries, of_head, keys = step.sizes(drafts + 1)
            yield (
                f"takes steps of at most {ATTENTION_QUERIES} queries, {ATTENTION_GROUP_QUERIES} of a row that share a "
                f"KV head, and {ATTENTION_NEW_KEYS} new keys on a rank, not {queries}, {of_head} and {keys}; lower "
                f"tkg_batch_size={neuron.tkg_batch_size} or num_speculative_tokens={drafts}, or use 'auto'"
            )
    buckets = [neuron.max_length, *(getattr(neuron, "token_generation_buckets", None) or ())]
    if _fp8_cache(config) and any(phase.reads_cache for phase in phases):
        yield "reads keys and values of torch_dtype, not kv_cache_dtype='fp8'; use 'auto', or leave kv_cache_dtype out"
    odd = [bucket for bucket in buckets if bucket % ATTENTION_TILE]
    if odd and any(phase.reads_cache for phase in phases):
        yield (
            f"reads the cache in multiples of {ATTENTION_TILE} positions, not {odd[0]}; make seq_len and the buckets "
            "of token generation multiples of it, or use 'auto'"
        )


def _decoding_step(config: Any) -> DecodingStep:
    """Heads as NxDI deals them: query heads are padded, KV heads repeated, to fill all ranks."""
    neuron = config.neuron_config
    heads = -(-config.num_attention_heads // neuron.tp_degree)
    return DecodingStep(neuron.tkg_batch_size, heads, max(1, config.num_key_value_heads // neuron.tp_degree))


def _fp8_cache(config: Any) -> bool:
    """Whether keys and values are cached in fp8, which no kernel reads."""
    return getattr(config.neuron_config, "kv_cache_dtype", None) is not None


def _most_tokens(config: Any, phase: Phase) -> int:
    """New tokens of a row that the kernel of a phase takes at most."""
    neuron, most = config.neuron_config, ATTENTION_TOKENS[phase]
    if phase is Phase.CONTINUATION:
        tokens = ATTENTION_CHUNK_QUERIES * neuron.logical_nc_config // _decoding_step(config).group
        most = min(most, tokens // (2 * ATTENTION_TILE) * 2 * ATTENTION_TILE)  # half of it is whole tiles, too
    return most // (2 if neuron.torch_dtype == torch.float32 else 1)


def _configured_attention(config: Any) -> dict[Phase, str]:
    """The configured kernel of each phase; a plain NeuronConfig has no such field, and what is not given is auto."""
    given: Any = getattr(config.neuron_config, "attention_kernel", AttentionKernel.AUTO.value)
    if not isinstance(given, Mapping):
        return dict.fromkeys(ATTENTION_WINS_FROM, given)
    return {phase: given.get(phase.value, AttentionKernel.AUTO.value) for phase in ATTENTION_WINS_FROM}


def select_mlp_kernel(config: Any) -> MLPKernel:
    """The MLP kernel of a `Qwen35InferenceConfig`; a plain NeuronConfig has no such field, and means TORCH."""
    return MLPKernel(_fixed("mlp_kernel", config))


def mlp_problems(config: Any, malformed: Collection[str]) -> Iterator[str]:
    """What is wrong with `mlp_kernel`, one line each; `malformed` are fields of `config` that cannot be read."""
    names = KERNEL_CHOICES["mlp_kernel"]
    name = _fixed("mlp_kernel", config)
    if name not in names:
        yield f"mlp_kernel={name!r} is unknown; set it to {', '.join(names)}"
    if name == MLPKernel.NKI.value:
        yield from (f"mlp_kernel={name!r} {problem}" for problem in _nki_mlp_problems(config, malformed))


def _nki_mlp_problems(config: Any, malformed: Collection[str]) -> Iterator[str]:
    """Why nki-library's MLP cannot run."""
    neuron = config.neuron_config
    if neuron.torch_dtype != torch.bfloat16:
        yield f"computes in bfloat16, not torch_dtype={neuron.torch_dtype}; set it to that, or use 'torch'"
    step = 128 * neuron.logical_nc_config
    if "hidden_size" not in malformed and config.hidden_size % step:
        yield (
            f"takes hidden sizes in multiples of {step} with logical_nc_config={neuron.logical_nc_config}, not "
            f"hidden_size={config.hidden_size}; use 'torch'"
        )
    columns = 0 if "intermediate_size" in malformed else config.intermediate_size // neuron.tp_degree
    if columns > MOST_COLUMNS:
        yield (
            f"takes at most {MOST_COLUMNS} columns of intermediate_size on a rank, not {columns}; raise "
            f"tp_degree={neuron.tp_degree}, or use 'torch'"
        )
    if problem := library_problem():
        yield f"needs nki-library, which the Neuron SDK brings ({problem}); install it, or use 'torch'"


def select_deltanet_kernel(config: Any) -> DeltaNetKernel:
    """The kernel that a `Qwen35InferenceConfig` runs: the environment's, else the configured one, with AUTO decided."""
    override = _overrides()
    if override:
        return KERNEL_ENVIRONMENT[override[0]]
    kernel = DeltaNetKernel(_configured(config))
    if kernel is not DeltaNetKernel.AUTO:
        return kernel
    fits = config.linear_key_head_dim == config.linear_value_head_dim == KERNEL_HEAD_DIM
    return DeltaNetKernel.FUSED if fits and not config.neuron_config.on_cpu else DeltaNetKernel.TORCH


def select_deltanet_inverse(config: Any) -> DeltaNetInverse:
    """How the kernels of a `Qwen35InferenceConfig` invert the system of a chunk."""
    return DeltaNetInverse(_fixed("deltanet_inverse", config))


def kernel_problems(config: Any, malformed: Collection[str]) -> Iterator[str]:
    """What is wrong with the choice, one line each; `malformed` are fields of `config` that cannot be read."""
    override = _overrides()
    if len(override) > 1:
        yield f"{' and '.join(override)} are all set to 1; each names another kernel, set one"
    inverse, inverses = _fixed("deltanet_inverse", config), KERNEL_CHOICES["deltanet_inverse"]
    if inverse not in inverses:
        yield f"deltanet_inverse={inverse!r} is unknown; set it to {', '.join(inverses)}"
    chosen = _configured(config)
    if chosen not in KERNEL_CHOICES["deltanet_kernel"]:
        yield f"deltanet_kernel={chosen!r} is unknown; set it to {', '.join(KERNEL_CHOICES['deltanet_kernel'])}"
    elif "linear_key_head_dim" not in malformed and "linear_value_head_dim" not in malformed:
        kernel = select_deltanet_kernel(config)
        for problem in _head_dim_problems(kernel, config, malformed):
            yield f"deltanet_kernel={kernel.value!r} {problem}"


def _head_dim_problems(kernel: DeltaNetKernel, config: Any, malformed: Collection[str]) -> Iterator[str]:
    """Why a DeltaNet kernel cannot run."""
    if kernel is DeltaNetKernel.TORCH or not {"linear_key_head_dim", "linear_value_head_dim"}.isdisjoint(malformed):
        return
    dims = (config.linear_key_head_dim, config.linear_value_head_dim)
    if dims != (KERNEL_HEAD_DIM, KERNEL_HEAD_DIM):
        yield f"has heads of 128 dims, not {dims[0]} and {dims[1]}; use 'torch'"


def _overrides() -> list[str]:
    return [name for name in KERNEL_ENVIRONMENT if os.environ.get(name) == "1"]


def _configured(config: Any) -> str:
    """The configured kernel; a plain NeuronConfig, which has no such field, means auto."""
    kernel: str = getattr(config.neuron_config, "deltanet_kernel", DeltaNetKernel.AUTO.value)
    return kernel


def _fixed(field: str, config: Any) -> str:
    """A field whose `auto` is the same everywhere; a plain NeuronConfig, which has none, means that."""
    name: str = getattr(config.neuron_config, field, AUTO)
    return _FIXED_DEFAULTS[field] if name == AUTO else name
