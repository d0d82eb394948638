# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""transformers' `generate` over the model: any number of rows, padded on either side; what cannot be right is refused.

Letters: B rows, S tokens of the longest prompt.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerationMode

from ..modeling_qwen35 import NeuronQwen35ForCausalLM
from ..modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from ..nxdi import HuggingFaceGenerationAdapter as NxDIGenerationAdapter
from ..vision.positions import checked_grids
from ..vision.rope_index import media_of_rows
from .drafting import DraftedForward
from .sampling import require_finite
from .speculation import Acceptance

_RUNNABLE = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}
_MEDIA = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


class HuggingFaceGenerationAdapter(NxDIGenerationAdapter):
    """NxDI's adapter for `NeuronQwen35ForCausalLM` and `NeuronQwen35VLForCausalLM`, under its name.

    More rows than the cache has slots run one group after the other. A model that drafts tokens does so here too, and
    gives the tokens that it gives without (`drafting`).
    """

    neuron_model: NeuronQwen35ForCausalLM
    _prompts: Sequence[int]  # of the rows in progress: transformers makes the processors, and has no argument for it

    def __init__(self, model: NeuronQwen35ForCausalLM, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self._drafted = DraftedForward(model) if model.config.num_speculative_tokens > 0 else None
        if self._drafted is not None:
            self.forward = self._drafted

    @property
    def acceptance(self) -> Acceptance | None:
        """How often drafts were accepted in the last `generate`; None for a model that drafts none."""
        return None if self._drafted is None else self._drafted.acceptance

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate`: greedy or sampled, with its logits processors and stopping criteria.

        Args:
            inputs: or input_ids, [B, S], padded on either side as attention_mask [B, S] tells; not padded without it.
            generation_config: the model's own by default; options among kwargs win over it.
            kwargs: as for transformers, with pixels and grids of images and videos as the processor gives them.

        Raises:
            ValueError: input_ids, attention_mask or media are not of their form, an option that the model has no form
                of (beams, assistants, guidance, hidden states), or prompts that do not fit with their answers; each
                with its remedy, before anything has run. Or the model gave logits that are nan or infinite; the prompt
                is named, and nothing of its group is left in the cache.
        """
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("inputs and input_ids are both given: they are the same argument, pass one of them")
        ids: Any = kwargs.get("input_ids") if inputs is None else inputs
        kwargs["input_ids"] = ids
        _require_ids(ids)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(ids)
        _require_mask(kwargs["attention_mask"], ids)
        config = self._merged_config(generation_config, kwargs)
        problems = [*self._problems(config, kwargs)]
        if problems:
            raise ValueError("generate cannot run this: " + "; ".join(problems))
        if self._drafted is not None:
            self._drafted.begin()
        if (streamer := kwargs.pop("streamer", None)) is not None:
            streamer.put(ids.cpu())
            criteria = [*(kwargs.get("stopping_criteria") or []), _Streaming(streamer)]
            kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
        with _without_padding_warning():
            output = self._generate_in_groups(config, generation_config, kwargs)
        if streamer is not None:
            streamer.end()
        return output

    def _merged_config(self, given: GenerationConfig | None, kwargs: Mapping[str, Any]) -> GenerationConfig:
        """What transformers makes of a generation_config and of the options among `kwargs`."""
        options = {name: value for name, value in kwargs.items() if name in GenerationConfig().to_dict()}
        config: GenerationConfig = self._prepare_generation_config(given, **options)[0]
        unset = GenerationConfig().max_length
        lengths = [chosen.max_length for chosen in (given, self.generation_config) if chosen is not None]
        if config.max_new_tokens is None and kwargs.get("max_length") is None and {*lengths} == {unset}:
            # transformers' default max_length is a number of new tokens (GenerationMixin._prepare_generated_length).
            limit = getattr(self.config, "max_position_embeddings", None) or math.inf
            config.max_length = min(config.max_length + kwargs["input_ids"].shape[1], limit)
        return config

    def _problems(self, config: GenerationConfig, kwargs: Mapping[str, Any]) -> Iterator[str]:
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in _RUNNABLE:
            yield f"{mode.value} needs to reorder or rewind the DeltaNet states: set num_beams=1 and no assistant"
        if config.guidance_scale not in (None, 1, 1.0):
            yield f"guidance_scale={config.guidance_scale} needs a second pass without the prompt: leave it out"
        for name in ("output_hidden_states", "output_attentions"):
            if config.return_dict_in_generate and getattr(config, name):
                yield f"{name}=True: a compiled model returns logits only, set it to False"
        for name in ("inputs_embeds", "past_key_values"):
            if kwargs.get(name) is not None:
                yield f"{name} is given: the model has its own embedding and cache, pass input_ids"
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        rows = ids.shape[0] * (config.num_return_sequences or 1)
        slots = self.neuron_config.kv_cache_batch_size
        if rows > slots and config.return_dict_in_generate and (config.output_scores or config.output_logits):
            yield (
                f"output_scores or output_logits of {rows} sequences, in groups of kv_cache_batch_size={slots} which "
                "may end at different steps: pass fewer rows, or raise kv_cache_batch_size"
            )
        if rows > slots and kwargs.get("streamer") is not None:
            yield f"streamer of {rows} sequences, with kv_cache_batch_size={slots}: stream one prompt at a time"
        for name in ("logits_processor", "stopping_criteria"):
            if rows > slots and kwargs.get(name):
                yield (
                    f"{name} of {rows} sequences, in groups of kv_cache_batch_size={slots} whose rows it would count "
                    "from 0: pass fewer rows, or raise kv_cache_batch_size"
                )
        longest, seq_len = int(mask.sum(dim=1).max()), self.neuron_config.seq_len
        new = config.max_length - ids.shape[1] if config.max_new_tokens is None else config.max_new_tokens
        if new > 0 and longest + new - 1 > seq_len:  # the last new token is not taken in
            yield (
                f"a prompt of {longest} tokens with {new} new ones exceeds seq_len={seq_len}: shorten the prompt, "
                "lower max_new_tokens, or compile for a longer seq_len"
            )

    def groups(self, inputs: dict[str, Any], copies: int = 1) -> list[dict[str, Any]]:
        """Inputs of `generate` as groups of at most as many rows as there are slots, `copies` of each row in order.

        Images and videos go with their rows; they are copied whole, where transformers would copy single patches.

        Raises:
            ValueError: pixels and grids do not belong together, or are for a model of text.
        """
        self._require_media(inputs)
        rows = torch.arange(inputs["input_ids"].shape[0])
        groups = rows.repeat_interleave(copies).split(self.neuron_config.kv_cache_batch_size)
        if len(groups) == 1 and torch.equal(groups[0], rows):
            return [inputs]
        return [{**inputs, **self._rows_of(group, inputs)} for group in groups]

    def _generate_in_groups(
        self, config: GenerationConfig, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> Any:
        """NxDI's generate for a group at a time; a group that ends earlier is padded like a row that does."""
        copies = config.num_return_sequences or 1
        groups = self.groups(kwargs, copies)
        if len(groups) == 1 and groups[0] is kwargs:
            return self._generate_group(range(len(kwargs["input_ids"])), generation_config, kwargs)
        outputs, first = [], 0
        allowed = kwargs.get("prefix_allowed_tokens_fn")
        for group in groups:
            rows = range(first, first + len(group["input_ids"]))
            prompts = [row // copies for row in rows]
            if allowed is not None:
                group["prefix_allowed_tokens_fn"] = partial(_allowed_in_group, allowed, first)
            outputs.append(self._generate_group(prompts, generation_config, {**group, "num_return_sequences": 1}))
            first = rows.stop
        if len(groups) == 1:
            return outputs[0]
        sequences = [output.sequences if config.return_dict_in_generate else output for output in outputs]
        length = max(group.shape[1] for group in sequences)
        padded = [F.pad(group, (0, length - group.shape[1]), value=_pad_token(config)) for group in sequences]
        if not config.return_dict_in_generate:
            return torch.cat(padded)
        outputs[-1].sequences = torch.cat(padded)
        return outputs[-1]

    def _generate_group(
        self, prompts: Sequence[int], generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> Any:
        """NxDI's generate for a row of each of these prompts; a failure leaves nothing of them in the cache."""
        self._prompts = prompts
        try:
            output = super().generate(generation_config=generation_config, **kwargs)
        except BaseException:  # an interrupt too may leave a step half done
            for slot in range(kwargs["input_ids"].shape[0]):
                self.neuron_model.clear_slot(slot)
            raise
        if self._drafted is not None:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            self._drafted.finish(sequences[:, -1].tolist())
        return output

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """transformers' processors, after a check of what the model gave: they make logits infinite on purpose."""
        processors = super()._get_logits_processor(*args, **kwargs)
        if self._drafted is not None:
            config: GenerationConfig = args[0] if args else kwargs["generation_config"]
            shown = config.return_dict_in_generate and (config.output_logits or config.output_scores)
            self._drafted.expect(takes_largest=not (processors or config.do_sample or shown))
        return LogitsProcessorList([_RequireFinite(self._prompts), *processors])

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """transformers' criteria; without an end token, its loop goes on with rows that have ended."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        if self._drafted is None or not any(hasattr(each, "eos_token_id") for each in criteria):
            return criteria
        return _TellingCriteria(criteria, self._drafted)

    def _require_media(self, inputs: Mapping[str, Any]) -> None:
        for names in _MEDIA:
            given = [name for name in names if inputs.get(name) is not None]
            if given and not isinstance(self.neuron_model, NeuronQwen35VLForCausalLM):
                raise ValueError(f"{given[0]} is given to a model of text: load NeuronQwen35VLForCausalLM for images")
            if len(given) == 1:
                raise ValueError(f"only {given[0]} of {' and '.join(names)} is given: pass both as the processor did")
            for name in given:
                if not isinstance(inputs[name], torch.Tensor):
                    raise ValueError(f"{name} is a {type(inputs[name]).__name__}: pass the tensor of the processor")
            if given and not (_is_integer(grids := inputs[names[1]]) and grids.dim() == 2 and grids.shape[1] == 3):
                raise ValueError(
                    f"{names[1]} is {_form(grids)}: pass integers [N, 3], frames, rows and columns of each"
                )

    def _rows_of(self, group: torch.Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of the inputs belongs to some rows, with the images and videos that are theirs."""
        total = inputs["input_ids"].shape[0]
        chosen: dict[str, Any] = {
            name: value[group]
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and value.shape[:1] == (total,) and name not in sum(_MEDIA, ())
        }
        if any(inputs.get(grids) is not None for _, grids in _MEDIA):
            assert isinstance(self.neuron_model, NeuronQwen35VLForCausalLM), "the model takes media"
            grids = {name: inputs.get(name) for _, name in _MEDIA}
            of_rows = media_of_rows(self.neuron_model.config, inputs["input_ids"], inputs["attention_mask"], **grids)
            for pixels_name, grids_name in _MEDIA:
                if inputs.get(grids_name) is None:
                    continue
                index = [i for row in group.tolist() for i in of_rows[row][grids_name]]
                sizes = checked_grids(inputs[pixels_name], inputs[grids_name], self.neuron_model.config.vision)
                media = inputs[pixels_name].split([math.prod(size) for size in sizes])
                chosen[pixels_name] = torch.cat([media[i] for i in index]) if index else None
                chosen[grids_name] = inputs[grids_name][index] if index else None
        return chosen


class _TellingCriteria(StoppingCriteriaList):
    """Criteria that tell what drafts tokens which rows they end."""

    def __init__(self, criteria: StoppingCriteriaList, drafted: DraftedForward) -> None:
        super().__init__(criteria)
        self._drafted = drafted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        ended: Any = super().__call__(input_ids, scores, **kwargs)
        self._drafted.end(ended.tolist())
        return ended


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _form(value: Any) -> str:
    """What a value is, for an error."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__}"


def _require_ids(ids: Any) -> None:
    if ids is None:
        raise ValueError("input_ids is None: give token ids [B, S], inputs_embeds alone are not enough")
    if not (isinstance(ids, torch.Tensor) and _is_integer(ids) and ids.dim() == 2 and ids.numel() > 0):
        raise ValueError(
            f"input_ids is {_form(ids)}: pass a tensor of integers [B, S], with at least one row and token"
        )


def _require_mask(mask: Any, ids: torch.Tensor) -> None:
    if not (isinstance(mask, torch.Tensor) and mask.shape == ids.shape):
        raise ValueError(f"attention_mask is {_form(mask)}: pass a tensor {list(ids.shape)}, the shape of input_ids")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask has values other than 0 and 1: set 1 at tokens and 0 at padding")


def _allowed_in_group(allowed: Callable[[int, Any], Any], first: int, row: int, input_ids: torch.Tensor) -> Any:
    """A prefix_allowed_tokens_fn, called with the number of the row in the batch."""
    return allowed(first + row, input_ids)


def _pad_token(config: GenerationConfig) -> int:
    eos = config.eos_token_id
    first = eos[0] if isinstance(eos, (list, tuple)) else eos
    return next((token for token in (config.pad_token_id, first) if token is not None), 0)


class _RequireFinite(LogitsProcessor):
    """Changes nothing: it refuses logits that are no numbers, and names which of `prompts`, one per row, has them."""

    def __init__(self, prompts: Sequence[int]) -> None:
        self.prompts = prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for prompt, logits in zip(self.prompts, scores, strict=True):
            try:
                require_finite(logits)
            except ValueError as error:
                raise ValueError(f"prompt {prompt}: {error}") from error
        return scores


class _Streaming(StoppingCriteria):
    """Never stops anything: it hands the token of each step to a streamer, which NxDI's loop does not know."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.streamer.put(input_ids[:, -1].cpu())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@contextmanager
def _without_padding_warning() -> Iterator[None]:
    """Without transformers' advice to pad on the left, which is for models that cannot do else."""
    logger = logging.getLogger("transformers.generation.utils")

    def relevant(record: logging.LogRecord) -> bool:
        return "right-padding was detected" not in record.getMessage()

    logger.addFilter(relevant)
    try:
        yield
    finally:
        logger.removeFilter(relevant)
