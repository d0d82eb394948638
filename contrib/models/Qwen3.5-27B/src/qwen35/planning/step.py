# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decoding step and of a prompt goes, part by part: the roofline, and what is modelled on top.

The roofline of a part is as in `work`. The modelled time rests on `ASSUMPTIONS`, and on kernel times of the emulator
(`kernel_times`); **nothing here was measured**, except what `ports` did. Parts follow each other: none hides another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..hardware import DEFAULT_LNC
from ..kernel_selection import (
    ATTENTION_TILE,
    AttentionChoice,
    DeltaNetInverse,
    DeltaNetKernel,
    select_attention,
    select_deltanet_inverse,
    select_deltanet_kernel,
)
from ..memory.counting import count_weights, count_whole_deltanet, rank_module
from ..nxdi import NeuronBaseForCausalLM
from ..phase import Phase
from .kernel_times import TimedKernel, kernel_seconds
from .work import Work, tokens_per_step, work_of


@dataclass(frozen=True)
class Assumption:
    """A constant of the modelled times, and what speaks for it."""

    value: float
    unit: str
    source: str


_PUBLISHED = "device times in benchmarks/nki_library_times.json"
STREAMED = Assumption(
    0.95,
    "of the HBM bandwidth where matrices are read for few tokens, the compiler's too",
    f"the slope of 9 times over bytes, mlp_tkg in bfloat16 at LNC=2: {_PUBLISHED}",
)
FILL = Assumption(
    8.0,
    "us until what a mixer or an MLP reads is streaming, norm and activation included; attention takes no less",
    "what the same times have at 0 bytes, 37 us, less a launch of 29 us as nki_emulator models it",
)
MULTIPLIED = Assumption(
    0.61,
    "of the peak arithmetic in products for many tokens, the compiler's too",
    f"4,096 tokens take 663 us more than 1,024, mlp_cte H8192 I448 at LNC=2: {_PUBLISHED}",
)
LATENCY = Assumption(
    10.0,
    "us of latency of a collective, the most that is said",
    "neuron-runtime/explore/intranode-collective-comm.rst: 10^0 to 10^1 us",
)
EXCHANGED = Assumption(
    100.0,
    "GB/s into a rank in a collective: assumed",
    "the example in neuron-runtime/explore/intranode-collective-comm.rst",
)
POSITION = Assumption(
    4.2,
    "ns for a cached position of a KV head where decoding has no attention kernel: assumed",
    "four passes of the Vector engine, as in docs/attention_kernels.md",
)
SCORE_BYTES = Assumption(
    12.0,
    "bytes through HBM for a score where a prompt has no attention kernel: assumed",
    "float32 scores and bfloat16 weights, written and read, as in docs/attention_kernels.md",
)
ASSUMPTIONS = (STREAMED, FILL, MULTIPLIED, LATENCY, EXCHANGED, POSITION, SCORE_BYTES)
NOT_COUNTED = "rotary embedding, gates, residuals; spills; copies; launches; sampling; the host"

STEP_CONTEXT = 4096
"""Cached tokens of the step that is explained, where a sequence has room for them."""
PROMPT = 1024
"""Tokens of the prompt that is explained, where the largest bucket has room for them."""


@dataclass(frozen=True)
class Part:
    """One part of a pass, in seconds."""

    name: str
    roofline: float
    modelled: float


@dataclass(frozen=True)
class Breakdown:
    """A pass by part."""

    what: str
    parts: tuple[Part, ...]
    tokens: float | None
    """Expected tokens that it gives each sequence; None of a prompt."""

    @property
    def roofline(self) -> float:
        """Least seconds: those of the parts."""
        return sum(part.roofline for part in self.parts)

    @property
    def modelled(self) -> float:
        """Modelled seconds."""
        return sum(part.modelled for part in self.parts)

    @property
    def ratio(self) -> float:
        """Modelled over least time."""
        return self.modelled / self.roofline


@dataclass(frozen=True)
class Matrices:
    """Weights of a rank that a pass reads once."""

    name: str
    nbytes: int
    products: int
    """Products of a weight and an activation, per token."""
    streams: int
    """How often a pass begins to read some of them with nothing to do meanwhile."""


@dataclass(frozen=True)
class StepModel:
    """What the times of a rank's passes are made of; `step_model_of` counts it on the modules."""

    work: Work
    layers: tuple[Matrices, ...]
    """Of the decoder's layers."""
    head: Matrices
    embedding_row: int
    """Bytes that a rank reads of the embedding for a token."""
    state_flops: int
    """Per token, of the products with the DeltaNet states."""
    deltanet_layers: int
    value_heads: int
    attention_layers: int
    query_heads: int
    kv_heads: int
    attention: AttentionChoice
    prompt_kernel: TimedKernel
    ranks: int
    hidden_bytes: int
    """Of a token's activations between layers."""
    logits_bytes: int
    """That the ranks gather for each chosen token: all its logits, or the best of each rank."""

    def decode(self, context: int, rows: int = 1) -> Breakdown:
        """A token of each of `rows` sequences that have `context` tokens in the cache."""
        kernel = kernel_seconds(TimedKernel.DECODE, 1, rows * self.value_heads)
        attention = self._cached_attention(Phase.TOKEN_GENERATION, context, rows, 1)
        parts = self._pass(rows, 1, 1, context, rows * context, kernel, attention)
        return Breakdown(f"decoding step, {_rows(rows)}{context:,} cached", parts, 1.0)

    def prompt(self, tokens: int, rows: int = 1) -> Breakdown:
        """Prompts of `tokens` tokens, `rows` of them, in one chunk after nothing."""
        kernel = kernel_seconds(self.prompt_kernel, tokens, rows * self.value_heads)
        if self.attention.encodes(tokens):
            attention = kernel_seconds(TimedKernel.ATTENTION_PROMPT, tokens, rows * self.query_heads)
        else:
            scores = rows * self.query_heads * tokens**2
            attention = scores * SCORE_BYTES.value / self.work.bytes_per_second
        pairs = rows * tokens * (tokens + 1) // 2
        parts = self._pass(rows, tokens, 1, tokens, pairs, kernel, attention)
        return Breakdown(f"prompt, {_rows(rows)}{tokens:,} tokens", parts, None)

    def with_drafts(self, acceptance: Sequence[float], context: int, rows: int = 1) -> Breakdown:
        """A step that verifies `len(acceptance)` drafts and drafts again; acceptance as in `tokens_per_step`.

        Raises:
            ValueError: no tokens are drafted.
        """
        drafts, heads = len(acceptance), rows * self.value_heads
        tokens = drafts + 1
        kernel = sum(kernel_seconds(name, tokens, heads) for name in (TimedKernel.VERIFY, TimedKernel.COMMIT))
        attention = self._cached_attention(Phase.VERIFICATION, context, rows, tokens)
        pairs = rows * (tokens * context + drafts * tokens // 2)
        parts = self._pass(rows, tokens, tokens, context + drafts, pairs, kernel, attention)
        drafting = Part(f"MTP head: {drafts} drafts", self.work.draft(context, rows), self._draft(context, rows))
        what = f"step with {drafts} drafts, {_rows(rows)}{context:,} cached"
        return Breakdown(what, (*parts, drafting), tokens_per_step(acceptance))

    def _pass(
        self, rows: int, tokens: int, chosen: int, cached: int, pairs: int, kernel: float, attention: float
    ) -> tuple[Part, ...]:
        """The parts of a pass over `tokens` of each row, of which `chosen` have logits.

        pairs: of tokens and those they attend to, all rows. kernel, attention: modelled seconds of a layer.
        """
        bandwidth, peak = self.work.bytes_per_second, self.work.flops_per_second
        embedding = rows * tokens * self.embedding_row / bandwidth
        state = 2 * rows * self.work.state_bytes / bandwidth
        keys = rows * cached * self.work.token_bytes / bandwidth
        rule_flops, attention_flops = rows * tokens * self.state_flops, pairs * self.work.pair_flops
        reductions = 2 * (self.deltanet_layers + self.attention_layers)
        activations = rows * tokens * self.hidden_bytes
        return (
            Part("weights: embedding", embedding, embedding),
            *(self._stream(matrices, rows * tokens) for matrices in self.layers),
            self._stream(self.head, rows * chosen),
            Part("recurrent and conv state", state, state),
            Part(
                "DeltaNet kernels beyond it",
                max(0.0, rule_flops / peak - state),
                max(0.0, self.deltanet_layers * kernel - state),
            ),
            Part("KV cache", keys, keys),
            Part(
                "attention beyond it",
                max(0.0, attention_flops / peak - keys),
                max(0.0, self.attention_layers * attention - keys),
            ),
            Part("collectives", 0.0, reductions * self._all_reduce(activations) + self._all_gather(activations)),
            Part("logits of all ranks", 0.0, self._all_gather(rows * chosen * self.logits_bytes)),
        )

    def _stream(self, matrices: Matrices, tokens: int) -> Part:
        moved = matrices.nbytes / self.work.bytes_per_second
        multiplied = 2 * matrices.products * tokens / self.work.flops_per_second
        modelled = max(moved / STREAMED.value, multiplied / MULTIPLIED.value) + 1e-6 * matrices.streams * FILL.value
        return Part(matrices.name, max(moved, multiplied), modelled)

    def _cached_attention(self, phase: Phase, context: int, rows: int, tokens: int) -> float:
        """Modelled seconds of a layer's attention to the cache, by the kernel or without."""
        bucket = -(-context // ATTENTION_TILE) * ATTENTION_TILE
        positions = rows * self.kv_heads * bucket
        if context and self.attention.reads_cache(phase, bucket):
            return kernel_seconds(TimedKernel.ATTENTION_CACHED, tokens, positions)
        return max(1e-6 * FILL.value, 1e-9 * positions * POSITION.value)

    def _draft(self, context: int, rows: int) -> float:
        """Modelled seconds of all drafts: a pass over the verified tokens, then one over each draft but the last."""
        head = self.work.drafting
        assert head is not None, "work.draft() has said so"
        keys = rows * context * head.token_bytes / self.work.bytes_per_second
        attention = max(keys, self._cached_attention(Phase.VERIFICATION, context, rows, 1))
        products, seconds = head.token_flops // 2, 0.0
        for tokens in (head.drafts + 1, *[1] * (head.drafts - 1)):
            # fc, the mixer, the MLP and the output head, each after the one before; the head of the last token alone.
            layer = Matrices("", head.weight_bytes - self.head.nbytes, products, 3)
            activations = rows * tokens * self.hidden_bytes
            seconds += self._stream(layer, rows * tokens).modelled + self._stream(self.head, rows).modelled + attention
            seconds += 2 * self._all_reduce(activations) + 2 * self._all_gather(activations)  # embedding and fc
            seconds += self._all_gather(rows * self.logits_bytes)
        return seconds

    def _all_reduce(self, nbytes: int) -> float:
        """A reduction of `nbytes` on every rank: each sends its share away and gets the others' sums."""
        return 0.0 if self.ranks == 1 else 1e-6 * LATENCY.value + 2 * self._exchanged(nbytes)

    def _all_gather(self, nbytes: int) -> float:
        """`nbytes` on every rank, of which it had its share."""
        return 0.0 if self.ranks == 1 else 1e-6 * LATENCY.value + self._exchanged(nbytes)

    def _exchanged(self, nbytes: int) -> float:
        return nbytes * (self.ranks - 1) / self.ranks / (1e9 * EXCHANGED.value)


def _rows(rows: int) -> str:
    return "" if rows == 1 else f"{rows} sequences, each "


def not_modelled(model: NeuronBaseForCausalLM) -> str | None:
    """Why there are no kernel times for a configuration, in one line; None where there are."""
    neuron, kernel = model.neuron_config, select_deltanet_kernel(model.config)
    if kernel not in (DeltaNetKernel.FUSED, DeltaNetKernel.LOOPED):
        return f"deltanet_kernel={kernel.value!r} has no recorded times; 'fused' and 'looped' have"
    if select_deltanet_inverse(model.config) is not DeltaNetInverse.TILED:
        return "deltanet_inverse='plain' has no recorded times; 'tiled' has"
    if neuron.torch_dtype != torch.bfloat16 or neuron.logical_nc_config != DEFAULT_LNC.value:
        return "kernel times are recorded in bfloat16 at LNC=2"
    if not (model.config.linear_attention_layers and model.config.full_attention_layers):
        return "a model without layers of both kinds has no recorded times"
    if model.config.head_dim != 256:
        return f"kernel times are recorded with attention heads of 256 dims, not {model.config.head_dim}"
    return None


def step_model_of(model: NeuronBaseForCausalLM, copies: int = 1) -> StepModel:
    """What the times of a rank are made of, with `copies` of DeltaNet's heads over all ranks: 1 or `tp_degree`.

    Raises:
        ValueError: there are no kernel times for the configuration (`not_modelled`).
    """
    reason = not_modelled(model)
    if reason is not None:
        raise ValueError(reason)
    module: Any = rank_module(model)
    config: Any = model.config
    neuron, weights = config.neuron_config, count_weights(module)
    deltanet, attention = config.linear_attention_layers, config.full_attention_layers
    whole = weights.deltanet if copies == 1 else count_whole_deltanet(module)

    def matrices(name: str, part: str, nbytes: int, streams: int, copies: int = 1) -> Matrices:
        products = sum(
            parameter.numel()
            for key, parameter in module.layers.named_parameters()
            if f".{part}." in key and parameter.dim() == 2 and not key.endswith(".scale")
        )
        return Matrices(name, nbytes, copies * products, streams)

    states = [module.kv_mgr.layer_state(i) for i in deltanet]
    size = neuron.torch_dtype.itemsize
    gathered = config.vocab_size if neuron.on_device_sampling_config is None else neuron.tp_degree
    return StepModel(
        work=work_of(model, copies),
        layers=(
            matrices("weights: DeltaNet projections", "linear_attn", whole, len(deltanet), copies),
            matrices("weights: attention projections", "self_attn", weights.attention, len(attention)),
            matrices("weights: MLP", "mlp", weights.mlp, len(deltanet) + len(attention)),
            Matrices("weights: norms", weights.norms, 0, 0),
        ),
        head=Matrices("weights: head", weights.lm_head, module.lm_head.weight.numel(), 1),
        embedding_row=module.embed_tokens.weight[0].nbytes,
        state_flops=6 * copies * sum(recurrent[0].numel() for recurrent, _ in states),
        deltanet_layers=len(deltanet),
        value_heads=copies * states[0][0].shape[1],
        attention_layers=len(attention),
        query_heads=-(-config.num_attention_heads // neuron.tp_degree),
        kv_heads=module.kv_mgr.layer_state(attention[0])[0].shape[1],
        attention=select_attention(config),
        prompt_kernel=TimedKernel(select_deltanet_kernel(config).value),
        ranks=neuron.tp_degree,
        hidden_bytes=config.hidden_size * size,
        logits_bytes=gathered * size,
    )
