# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5's text decoder on NxDI: [3 gated DeltaNet + 1 gated attention] blocks with dense SwiGLU MLPs.

Read this file first. The parts it puts together, from the ground up:

- `phase`: whether a call encodes prompts, continues them or decodes;
- `nxdi`: the seam to NxDI, or to the CPU stand-ins where it is not installed;
- `configuration_qwen35`: the checkpoint's config.json and NxDI's options, validated at once;
- `weights`: Hugging Face weights to this module tree, and to a file per rank;
- `layers`: DeltaNet, attention, MLP, norms and rotary embedding, and the cache of what is kept between calls;
- `memory`: the bytes it needs on a device, and whether they fit;
- `submodels`: how a call is padded to the shapes that were compiled;
- `modeling_qwen35_mtp`: the head that drafts tokens, and the programs of a step with drafts.

Letters: B rows, S tokens per row, D hidden.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from .configuration_qwen35 import LINEAR_ATTENTION, Qwen35InferenceConfig
from .fp8_form import FP8
from .layers.attention import NeuronQwen35Attention
from .layers.cache import CacheLayout, DeltaNetState, DeltaNetTokens, KeyValue, LayerState, Qwen35CacheManager
from .layers.gated_deltanet import NeuronGatedDeltaNet
from .layers.linear import output_head, token_embedding, use_fp8
from .layers.mlp import make_mlp
from .layers.norms import Qwen35RMSNorm
from .memory.counting import RankBytes, count_bytes
from .memory.fit import require_fits
from .modeling_qwen35_mtp import MTPPrograms, NeuronQwen35MTP
from .nxdi import ModelWrapper, NeuronBaseForCausalLM, as_rank
from .phase import Phase, Submodel, phase_of, real_tokens
from .submodels import (
    ModelInputs,
    Qwen35ModelWrapper,
    align_tokens,
    cache_entries,
    require_float32,
    select_rows,
)
from .weights.checkpoint import CheckpointReader
from .weights.sharding import StreamedSharding
from .weights.text_rules import convert_checkpoint


class NeuronQwen35DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is DeltaNet or attention by `cached_layer_types`."""

    def __init__(self, config: Qwen35InferenceConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_linear = config.cached_layer_types[layer_idx] == LINEAR_ATTENTION
        # The checkpoint's own names, so that a tensor is found where its name says.
        if self.is_linear:
            self.linear_attn = NeuronGatedDeltaNet(config)
        else:
            self.self_attn = NeuronQwen35Attention(config)
        self.mlp = make_mlp(config, layer_idx)
        self.input_layernorm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        phase: Phase,
        past_key_value: LayerState | None = None,
        padding_mask: torch.Tensor | None = None,
        cos_cache: torch.Tensor | None = None,
        sin_cache: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, LayerState | DeltaNetTokens, torch.Tensor | None, torch.Tensor | None, None]:
        """hidden_states [B, S, D]; the keywords are those NxDI's decoder loop passes to every layer.

        `past_key_value` is what the cache keeps of this layer: of a DeltaNet layer its state, which NxDI names so too.
        Returns (hidden_states, what to keep now, cos, sin, None), the tuple that loop unpacks.
        """
        normed = self.input_layernorm(hidden_states)
        kept: LayerState | DeltaNetTokens
        if self.is_linear:
            state = None if past_key_value is None else DeltaNetState(*past_key_value)
            mixed, kept = self.linear_attn(normed, phase, state, padding_mask)
        else:
            attended = self.self_attn(
                normed, phase=phase, past_key_value=past_key_value, cos_cache=cos_cache, sin_cache=sin_cache, **kwargs
            )
            mixed, kept = attended.hidden_states, KeyValue(*attended.present_key_value)
            cos_cache, sin_cache = attended.cos_cache, attended.sin_cache
        hidden_states = hidden_states + mixed
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, kept, cos_cache, sin_cache, None


class NeuronQwen35Model(MTPPrograms):
    """The traced module: embedding, layers, norm, head, cache; and the MTP head where tokens are drafted."""

    phase: Phase
    """Of the next call or trace; the submodel that runs this module sets it."""

    def setup_attr_for_model(self, config: Qwen35InferenceConfig) -> None:
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.max_batch_size = config.neuron_config.max_batch_size
        self.buckets = config.neuron_config.buckets

    def init_model(self, config: Qwen35InferenceConfig) -> None:
        self.embed_tokens = token_embedding(config)
        self.layers = nn.ModuleList(NeuronQwen35DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = output_head(config)
        self.mtp = None
        if config.num_speculative_tokens > 0:
            self.mtp = NeuronQwen35MTP(config, NeuronQwen35DecoderLayer(config, config.num_hidden_layers))
        if config.matrix_dtype == FP8:
            use_fp8(self)
        # The layers work in place, which autograd refuses, and NxDI leaves it on when it traces and when it runs.
        self.requires_grad_(False)

    def init_inference_optimization(self, config: Qwen35InferenceConfig) -> None:
        super().init_inference_optimization(config)
        self.kv_mgr = Qwen35CacheManager(config, num_kv_head=self.num_key_value_heads, global_rank=self.rank_util)

    def create_padding_mask(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Real tokens [B, S] bool of a prompt whose padding has position 0 (see Qwen35ModelWrapper.pad_inputs)."""
        return real_tokens(position_ids, self.phase)

    def _is_context_encoding(self, input_ids: torch.Tensor) -> bool:
        return self.phase is Phase.CONTEXT_ENCODING

    def forward(self, *args: torch.Tensor) -> Any:  # type: ignore[override] # by position, as it is traced
        """NxDI's, of `ModelInputs` by position; the programs that draft are `MTPPrograms.run_program`."""
        if self.phase.drafts:
            inputs = ModelInputs(*args)
            rotary = self.set_none_if_empty(inputs.rotary_position_id)
            return self.run_program(self.phase, inputs._replace(rotary_position_id=rotary))
        return super().forward(*args)

    def embed(
        self, input_ids: torch.Tensor, vision_embeddings: torch.Tensor | None, vision_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """What enters the first layer [B, S, D], for ids [B, S]; of media see the class that takes them."""
        embeds: torch.Tensor = self.embed_tokens(input_ids)
        return embeds

    def get_model_output(self, *args: Any, **kwargs: Any) -> Any:
        """NxDI's decoder loop over tokens that are taken in."""
        self.sliced_hidden = self.config.output_prompt_logits  # NxDI's word for: the head gets all that this returns
        media = (kwargs.pop("vision_embeddings", None), kwargs.pop("vision_mask", None))
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.embed(kwargs["input_ids"], *media)
        hidden, updated = self._decode(self.phase, *args, **kwargs)
        if self.mtp is None:
            return hidden, updated
        embeds, seq_ids, position_ids = (kwargs[name] for name in ("inputs_embeds", "seq_ids", "position_ids"))
        rotary = kwargs.get("rotary_position_ids")
        return hidden, self.with_head(updated, self.phase, embeds, hidden, seq_ids, position_ids.long(), rotary)

    def _decode(self, phase: Phase, *args: Any, **kwargs: Any) -> Any:
        """NxDI's decoder loop; several tokens that follow those cached see these, and each other from left to right."""
        if phase.continues:
            tokens = kwargs["input_ids"].shape[1]
            index = torch.arange(tokens, device=kwargs["input_ids"].device)
            kwargs["active_mask"] = (index.unsqueeze(1) >= index).view(1, 1, tokens, tokens)
        return super().get_model_output(*args, phase=phase, **kwargs)

    def decode_tokens(self, inputs: ModelInputs, phase: Phase) -> tuple[torch.Tensor, list[Any]]:
        hidden, kept = self._decode(
            phase,
            input_ids=inputs.input_ids,
            seq_ids=inputs.seq_ids,
            attention_mask=self.create_attn_mask(inputs.attention_mask, False, False, position_ids=inputs.position_ids),
            position_ids=inputs.position_ids,
            rotary_position_ids=inputs.rotary_position_id,
            padding_mask=real_tokens(inputs.position_ids, phase),
            update_cache=False,
        )
        return hidden, [*kept]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NeuronQwen35Model:
        # Every parameter is declared with the dtype it needs. A cast of the whole module, as NxDI makes under
        # cast_type="config" and on a CPU, would take A_log, the norms and the recurrent state down to bfloat16.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self


class NeuronQwen35ForCausalLM(StreamedSharding, NeuronBaseForCausalLM):
    """Qwen3.5 as an NxDI application: `compile`, `load` (or `to_cpu`), and `generate` through the HF adapter."""

    _model_cls = NeuronQwen35Model
    config: Qwen35InferenceConfig
    _phase: Phase  # of the call in progress: NxDI's forward has no argument that would pass it on
    _tokens_only: bool = False  # of the call in progress, too

    @classmethod
    def get_config_cls(cls) -> type[Qwen35InferenceConfig]:
        return Qwen35InferenceConfig

    def get_model_wrapper_cls(self) -> type[ModelWrapper]:
        return Qwen35ModelWrapper

    def get_compiler_args(self) -> None:
        """None: NxDI composes the arguments for each submodel, and what it chooses is what this model needs.

        From NxDI's `models/model_wrapper.py`, read at commit 4bcdc54 (July 2026):

        - both: `--auto-cast=none`, without which the compiler may take float32 matrix products of the state and the
          decays down to bfloat16; `--lnc` as configured; `--enable-ccop-compute-overlap`, which hides the all-reduce
          after each output and down projection behind the next product.
        - context encoding: `-O1` with `--modular-flow-mac-threshold=10`. The 64 layers are compiled as a few repeated
          modules, even though most of their arithmetic is inside NKI kernels, where the partitioner cannot count it.
          NxDI appends its hlo2tensorizer options to any string given here but not this threshold, so that a string of
          our own would lose it.
        - token generation: `-O2`, one graph, because the calls between modules cost more than they save on one token;
          `--cc-pipeline-tiling-factor=1`, since a single row of activations is too small to pipeline.
        - 32K tokens and more: `--disable-mixed-precision-accumulation` and no FMA on inputs and outputs, both of which
          save copies of the long activations. The norms, gates and states here ask for float32 explicitly.
        """

    def enable_token_generation(self, *args: Any, **kwargs: Any) -> None:
        """Adds the submodel that continues prompts, when they come in chunks."""
        super().enable_token_generation(*args, **kwargs)
        chunk = self.config.prefill_chunk_size
        if chunk is not None:
            config = copy.deepcopy(self.context_encoding_model.config)
            config.neuron_config.bucket_n_active_tokens, config.neuron_config.n_active_tokens = False, chunk
            # These buckets are numbers of cached tokens, at least a chunk; a smaller one would be compiled for nothing.
            buckets = self.token_generation_model.neuron_config.buckets
            config.neuron_config.buckets = [bucket for bucket in buckets if bucket >= chunk]
            self.add_submodel(Submodel(Phase.CONTINUATION), config)
        if self.config.num_speculative_tokens > 0:
            verified = self.config.num_speculative_tokens + 1
            for phase, tokens in (
                (Phase.SPECULATION, verified),
                (Phase.VERIFICATION, verified),
                (Phase.DRAFT, verified + 1),
            ):
                config = copy.deepcopy(self.token_generation_model.config)
                config.neuron_config.n_active_tokens = tokens
                self.add_submodel(Submodel(phase), config)

    def add_submodel(self, kind: Submodel, config: Any, **model_init_kwargs: Any) -> None:
        """Another submodel over the same weights and state, compiled like context encoding or like token generation."""
        like = self.context_encoding_model if kind.phase.encodes_prompts else self.token_generation_model
        submodel = self.model_wrapper(
            config=config,
            model_cls=self._model_cls,
            tag=like.tag,  # NxDI chooses the compiler's arguments by the tag
            model_init_kwargs=model_init_kwargs,
        )
        submodel.tag = kind.tag
        self.models.append(submodel)

    def submodel(self, kind: Submodel) -> Any:
        """The wrapper of a submodel.

        Raises:
            ValueError: there is none: prompts are continued only where they come in chunks, and tokens drafted only
                where that is asked for.
        """
        for submodel in self.models:
            if (submodel.phase, submodel.takes_media) == kind:
                return submodel
        if kind.phase.drafts:
            raise ValueError(
                f"there is no {kind.tag}: set num_speculative_tokens in Qwen35NeuronConfig to draft tokens"
            )
        raise ValueError(
            f"there is no {kind.tag}: position_ids that do not start at 0 continue a prompt, which needs "
            "prefill_chunk_size in Qwen35NeuronConfig"
        )

    def compile(self, compiled_model_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Check that the model fits `neuron_config.instance` and that the checkpoint has its tensors, then compile.

        Raises:
            ValueError: the memory of the instance is too small; the message says what to change.
            CheckpointError, ConversionError: the weights would not load; raised before minutes of compilation.
        """
        require_fits(self)
        self.checkpoint_loader_fn()
        super().compile(compiled_model_path, *args, **kwargs)

    def load(self, compiled_model_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        super().load(compiled_model_path, *args, **kwargs)
        self._check_modules()

    def to_cpu(self) -> None:
        super().to_cpu()
        for submodel in self.models:
            # Under continuous batching NxDI makes one module per submodel; all but token generation share one.
            if submodel is not self.token_generation_model:
                submodel.model = self.context_encoding_model.model
        self._check_modules()

    def bytes_per_rank(self) -> RankBytes:
        """What each rank will hold, from the shapes of the modules; nothing is allocated or read."""
        with as_rank(0, self.neuron_config.tp_degree), torch.device("meta"):
            return count_bytes(self._model_cls(self.config))

    @property
    def cache_layout(self) -> CacheLayout:
        """Where `cache_entries` have the state of each layer."""
        return CacheLayout(self.config)

    def cache_entries(self) -> list[list[torch.Tensor]]:
        """What every rank of this process keeps between calls; see `submodels.cache_entries`."""
        return cache_entries(self.context_encoding_model, self.cache_layout.parameter_names())

    def clear_slot(self, slot: int) -> None:
        """Let a slot hold zeros: keys and values that are no numbers would reach what it holds next.

        Those beyond a prompt are masked, that is multiplied by zero, which leaves nan as it is.
        """
        for entries in self.cache_entries():
            for views in self.cache_layout.slot(entries, slot):
                for view in views:
                    view.zero_()

    def _check_modules(self) -> None:
        for submodel in self.models:
            if not submodel.is_neuron():  # the modules of a device were checked when they were traced
                require_float32(submodel.model)

    def forward(  # type: ignore[override] # the rest of NxDI's arguments goes by keyword
        self,
        input_ids: torch.Tensor,
        seq_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        phase: Phase | None = None,
        tokens_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """NxDI's forward, for rows in any order: they run in ascending order of `seq_ids` [B], outputs are as given.

        input_ids [B, S] are prompts, when `position_ids` [B, S] start at 0; or the next token of each row; or, with
        `prefill_chunk_size`, the next tokens of prompts: position_ids then count from the number of cached tokens, and
        are 0 at padding; attention_mask [B, cached tokens] tells what is cached. Prompts may be padded on either side,
        as attention_mask [B, S] tells; those longer than a chunk are cut here.

        Args:
            phase: what the call does, by default what `phase_of` derives from position_ids: one next token per row is
                then a decoding step, although it may be the last token of a prompt.
            tokens_only: with on-device sampling, read the chosen tokens alone; the logits [B, V], which are much more,
                stay on the device, and are None in the outputs.

        Raises:
            ValueError: an id names no slot, or is given twice; there are more rows than slots; a prompt is
                continued by more tokens than a chunk, or without prefill_chunk_size; some rows begin a prompt and
                others do not; the padding is not on one side of each prompt; or a token is beyond the vocabulary.
        """
        self._tokens_only = tokens_only and self.on_device_sampling
        phase = phase_of(position_ids, attention_mask) if phase is None else phase
        assert position_ids is not None, "phase_of requires them, and so must a caller that gives the phase"
        input_ids, attention_mask, position_ids = align_tokens(phase, input_ids, attention_mask, position_ids)
        if phase.encodes_prompts:  # what a step decodes comes from the head, and may still be on the device
            self._require_in_vocabulary(input_ids)
        if kwargs.get("sampling_params") is None:
            # NxDI's default has the rows of a decoding batch, a shape that other submodels were not compiled for.
            kwargs["sampling_params"] = self.default_sampling_params[:1].repeat(input_ids.shape[0], 1)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        seq_ids = torch.arange(input_ids.shape[0]) if seq_ids is None else seq_ids
        ids = self._require_slots(seq_ids)
        if ids == sorted(ids):
            return self._forward_in_order(phase, seq_ids, **inputs)
        order = torch.argsort(seq_ids)
        ordered = {name: select_rows(value, len(ids), order) for name, value in inputs.items()}
        ordered["llava_args"] = [select_rows(value, len(ids), order) for value in inputs.get("llava_args", [])]
        outputs = self._forward_in_order(phase, seq_ids[order], **ordered)
        back = torch.argsort(order)
        for name in ("logits", "tokens", "hidden_states"):
            setattr(outputs, name, select_rows(getattr(outputs, name, None), len(ids), back))
        return outputs

    def _require_slots(self, seq_ids: torch.Tensor) -> list[int]:
        """Refuse seq_ids [B] that do not name a slot each; returns them as a list."""
        slots, ids = self.neuron_config.kv_cache_batch_size, seq_ids.tolist()
        if len({*ids}) < len(ids) or min(ids) < 0 or max(ids) >= slots:
            raise ValueError(
                f"seq_ids={ids} must be distinct and in 0..{slots - 1}, the slots of the cache; "
                f"for more sequences at a time raise kv_cache_batch_size={slots}"
            )
        return [*ids]

    @torch.no_grad()
    def run_drafting(
        self,
        phase: Phase,
        input_ids: torch.Tensor,
        seq_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        rotary_position_id: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """What a program with drafts gives for each row, in the order of the rows; see `MTPPrograms.run_program`.

        Args:
            phase: SPECULATION, VERIFICATION or DRAFT.
            input_ids, position_ids: [B, S] int64, of the first token that is not cached and of those after it, at most
                k + 1 (DRAFT: k + 2) of them; 0 at padding. The verified ones are below seq_len.
            seq_ids: [B] int64, the slots, in any order.
            attention_mask: [B, cached tokens].
            rotary_position_id: [B, S] int64, where the model takes media.

        Raises:
            ValueError: the model does not draft; or an id names no slot, or is given twice.
        """
        submodel = self.submodel(Submodel(phase))
        self._require_slots(seq_ids)
        order = torch.argsort(seq_ids)
        rows = seq_ids.shape[0]
        inputs = ModelInputs(
            input_ids,
            attention_mask,
            position_ids,
            seq_ids,
            self.default_sampling_params[:1].repeat(rows, 1),
            rotary_position_id=rotary_position_id,
        )
        outputs = submodel(*inputs.rows(order).args())
        if not submodel.is_neuron():
            names = self.cache_layout.parameter_names()
            outputs, entries = outputs[: -len(names)], outputs[-len(names) :]
            for each in self.models:
                for entry, new in zip(each.model.kv_mgr.past_key_values, entries, strict=True):
                    entry.data = new.data
        results = [outputs] if isinstance(outputs, torch.Tensor) else [*outputs]
        back = torch.argsort(order)
        return [output[back] for output in results]

    def _require_in_vocabulary(self, input_ids: torch.Tensor) -> None:
        """Refuse ids that have no embedding: a CPU raises IndexError for them, a device reads what it finds."""
        vocab_size = self.config.vocab_size
        outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
        if len(outside):
            raise ValueError(
                f"input_ids has token {int(outside[0])}, which is not in 0..{vocab_size - 1}, the model's vocabulary: "
                "use the checkpoint's own tokenizer, without tokens added to it"
            )

    def _is_prefill(self, position_ids: torch.Tensor) -> bool:
        return self._phase is Phase.CONTEXT_ENCODING

    def _call(self, phase: Phase, **inputs: Any) -> Any:
        """NxDI's forward for one call of one submodel."""
        self._phase = phase
        return super().forward(**inputs)

    def _forward_in_order(self, phase: Phase, seq_ids: torch.Tensor, **inputs: Any) -> Any:
        chunk, tokens = self.config.prefill_chunk_size, inputs["input_ids"].shape[1]
        if chunk is None or tokens <= chunk:
            return self._call(phase, seq_ids=seq_ids, **inputs)
        if phase is not Phase.CONTEXT_ENCODING:
            raise ValueError(
                f"input_ids of {tokens} tokens continue prompts and exceed prefill_chunk_size={chunk}: pass at most "
                "a chunk at a time"
            )
        return self._encode_in_chunks(chunk, seq_ids, **inputs)

    def _encode_in_chunks(
        self,
        chunk: int,
        seq_ids: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        llava_args: Sequence[torch.Tensor] = (),
        **kwargs: Any,
    ) -> Any:
        """Context-encode the first `chunk` tokens of each prompt, then `chunk` more at a time; outputs of last tokens.

        A row takes part until its prompt ends. State, conv inputs and keys pass from one call to the next in the cache.
        """
        rows, lengths = input_ids.shape[0], attention_mask.sum(dim=1)
        if int(lengths.max()) > self.neuron_config.seq_len:
            raise ValueError(
                f"a prompt of {int(lengths.max())} tokens exceeds seq_len={self.neuron_config.seq_len}: raise seq_len, "
                "or shorten the prompt"
            )
        ended: dict[str, list[torch.Tensor]] = {"logits": [], "tokens": []}
        order: list[torch.Tensor] = []
        for start in range(0, int(lengths.max()), chunk):
            active = torch.nonzero(lengths > start).flatten()
            columns = slice(start, start + chunk)
            real = attention_mask[active, columns]
            index = start + torch.arange(real.shape[1])
            outputs = self._call(
                Phase.CONTEXT_ENCODING if start == 0 else Phase.CONTINUATION,
                seq_ids=seq_ids[active],
                input_ids=input_ids[active, columns],
                attention_mask=real if start == 0 else attention_mask.new_ones(len(active), start),
                position_ids=torch.where(real > 0, index, 0),
                llava_args=[select_rows(arg, rows, active) for arg in self._columns_of(llava_args, columns)],
                **{name: select_rows(value, rows, active) for name, value in kwargs.items()},
            )
            at_end = torch.nonzero(lengths[active] <= start + chunk).flatten()
            order.append(active[at_end])
            for name, tensors in ended.items():
                if isinstance(tensor := getattr(outputs, name, None), torch.Tensor):
                    tensors.append(tensor[at_end])
        back = torch.argsort(torch.cat(order))
        for name, tensors in ended.items():
            if tensors:
                setattr(outputs, name, torch.cat(tensors)[back])
        return outputs

    def _columns_of(self, llava_args: Sequence[torch.Tensor], columns: slice) -> Sequence[torch.Tensor]:
        """The part of `llava_args` that belongs to some columns of input_ids."""
        return llava_args

    def _get_model_outputs(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        seq_ids: torch.Tensor,
        sampling_params: torch.Tensor,
        prev_hidden: Any,
        adapter_ids: Any,
        medusa_args: Any,
        llava_args: Sequence[torch.Tensor],
        **kwargs: Any,
    ) -> Any:
        """Run the submodel of this phase; NxDI would choose between two, context encoding and token generation."""
        plain = (input_ids, attention_mask, position_ids, seq_ids, sampling_params, prev_hidden, adapter_ids)
        inputs = ModelInputs(*plain, *llava_args)
        submodel = self.submodel(Submodel(self._phase, with_media=inputs.vision_embeddings is not None))
        outputs = submodel(*inputs.args(), tokens_only=self._tokens_only)
        self.kv_cache_populated = self.kv_cache_populated or self._phase.encodes_prompts
        return outputs, submodel.is_neuron()

    def _get_constructed_outputs(self, *args: Any) -> Any:
        outputs = super()._get_constructed_outputs(*args)
        if self._tokens_only:
            outputs.logits = None
        if outputs.logits is not None:
            outputs.logits = outputs.logits[..., : self.vocab_size]  # the rest pads the head to whole ranks
        return outputs

    def checkpoint_loader_fn(self, mmap: bool = False) -> MutableMapping[str, torch.Tensor]:
        """The checkpoint of `config._name_or_path` if that exists, else of `model_path`, in the Neuron layout.

        NxDI's would look for another one where weights are in fp8.
        """
        path = getattr(self.config, "_name_or_path", None)
        return self.get_state_dict(path if path and os.path.exists(path) else self.model_path, self.config)

    @classmethod
    def get_state_dict(
        cls, model_name_or_path: str | os.PathLike[str], config: Qwen35InferenceConfig
    ) -> MutableMapping[str, torch.Tensor]:
        """The checkpoint in the Neuron layout, each tensor read and converted when it is asked for.

        Raises:
            CheckpointError: a file is missing, truncated or no checkpoint.
            ConversionError: tensors are missing, unexpected or mis-shaped.
        """
        return convert_checkpoint(CheckpointReader(model_name_or_path), config)

    @staticmethod
    def convert_hf_to_neuron_state_dict(
        state_dict: MutableMapping[str, torch.Tensor], config: Qwen35InferenceConfig
    ) -> MutableMapping[str, torch.Tensor]:
        return convert_checkpoint(state_dict, config)

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict: MutableMapping[str, torch.Tensor]) -> None:
        """Does nothing: the conversion has made lm_head from the embedding of a tied checkpoint."""

    @classmethod
    def save_quantized_state_dict(cls, model_path: str, config: Qwen35InferenceConfig) -> None:
        """Does nothing: `weights_dtype` rounds each weight as it is read, and no second checkpoint is written.

        AWS's vLLM plugin calls it before it compiles a model in fp8.
        """

    @staticmethod
    def load_hf_model(model_path: str, **kwargs: Any) -> nn.Module:
        """The transformers model of a checkpoint; needs transformers >= 5."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model_path, **kwargs)
