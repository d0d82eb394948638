# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own sampling over the logits of a step: its batch, its logits processors, its sampler, its grammars.

Letters: B rows of a step that get a token, V vocabulary, S tokens of a prompt, L log-probabilities asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from . import versions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


def takes_most_likely(params: SamplingParams) -> bool:
    """Whether the most likely token is taken, whatever came before, and nothing but its id is asked for."""
    return (
        params.sampling_type == SamplingType.GREEDY
        and params.logprobs is None
        and params.prompt_logprobs is None
        and not params.logit_bias
        and not params.bad_words
        and not params.allowed_token_ids
        and not params.min_tokens
        and params.structured_outputs is None
        and params.frequency_penalty == params.presence_penalty == 0
        and params.repetition_penalty == 1
        and not versions.other_constraints(params)
    )


class BatchSampler:
    """Chooses the next token of the requests of a step, each as its `SamplingParams` say.

    A request keeps its generator and its answer in its state: it may leave the batch and come back.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        model_config, device = vllm_config.model_config, torch.device("cpu")
        self.vocab_size = model_config.get_vocab_size()
        processors = model_config.logits_processors or ()
        self._logprobs_mode = model_config.logprobs_mode
        self._sampler = versions.native_sampler(self._logprobs_mode)
        self._batch = versions.input_batch(
            vllm_config,
            device,
            self.vocab_size,
            build_logitsprocs(vllm_config, device, False, False, processors),
            logitsprocs_need_output_token_ids=bool(processors),
        )
        self._may_constrain = bool(processors)

    def on_device(self, states: Sequence[CachedRequestState]) -> bool:
        """Whether the device's most likely tokens are what these requests want."""
        return not self._may_constrain and all(
            state.sampling_params is not None and takes_most_likely(state.sampling_params) for state in states
        )

    def hold(self, states: Sequence[CachedRequestState]) -> list[str]:
        """Let the batch hold these requests and no other; returns their ids in its order."""
        batch, wanted = self._batch, {state.req_id: state.output_token_ids for state in states}
        for request_id, index in [*batch.req_id_to_index.items()]:
            # Told apart by its answer: one that begins anew keeps its id, and may have other options.
            if wanted.get(request_id) is not batch.req_output_token_ids[index]:
                batch.remove_request(request_id)
        for state in states:
            if state.req_id not in batch.req_id_to_index:
                batch.add_request(state)
        batch.condense()
        batch.refresh_metadata()
        return [*batch.req_ids]

    def constrain(self, logits: torch.Tensor, scheduled: SchedulerOutput, grammar: GrammarOutput) -> None:
        """Let the tokens that grammars do not allow have no chance.

        Args:
            logits: [sum of T, V] float32, of each request in the batch's order T rows: one, and one for each draft that
                the step scheduled for it.
        """
        apply_grammar_bitmask(scheduled, grammar, self._batch, logits)

    def sample(self, logits: torch.Tensor) -> SamplerOutput:
        """Tokens [B, 1] from logits [B, V] float32 in the batch's order, which are overwritten."""
        return self._sampler(logits, self._batch.sampling_metadata)

    def prompt_logprobs(self, logits: torch.Tensor, following: Sequence[int], count: int) -> LogprobsTensors:
        """Of the tokens that follow those of a piece, and of the `count` most likely ones.

        Args:
            logits: [S, V] after each token, of any floating dtype.
            following: S ids, the token after each.
            count: -1 for the whole vocabulary.
        """
        scores = logits.float() if "logits" in self._logprobs_mode else self._sampler.compute_logprobs(logits)
        tensors: LogprobsTensors = self._sampler.gather_logprobs(
            scores, self.vocab_size if count == -1 else count, torch.tensor(following, dtype=torch.int64)
        )
        return tensors
