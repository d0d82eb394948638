# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5's text decoder on NxDI: [3 gated DeltaNet + 1 gated attention] blocks with dense SwiGLU MLPs.

Read this file first. The parts it puts together:

- `configuration_qwen35`: the checkpoint's config.json and NxDI's options, validated at once;
- `gated_deltanet`, `attention`, `norms`, `rope`: the layers; `ops`: DeltaNet's operators in plain PyTorch;
- `cache`: what is kept between steps;
- `planning`: what it takes of a device;
- `checkpoint`, `conversion`, `presharding`: Hugging Face weights to this module tree, and to a file a rank;
- `nxdi`: the seam to NxDI, or to the CPU stand-ins where it is not installed.

Letters: B batch, S tokens, D hidden.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_qwen35 import Qwen35InferenceConfig
from .layers.attention import NeuronQwen35Attention
from .layers.cache import Qwen35CacheManager
from .layers.gated_deltanet import NeuronGatedDeltaNet
from .layers.norms import Qwen35RMSNorm
from .memory.counting import RankBytes, count_bytes
from .memory.fit import require_fits
from .nxdi import (
    ColumnParallelLinear,
    DecoderModelInstance,
    ModelWrapper,
    NeuronBaseForCausalLM,
    NeuronBaseModel,
    ParallelEmbedding,
    RowParallelLinear,
    as_rank,
)
from .weights.checkpoint import CheckpointReader
from .weights.conversion import convert_checkpoint
from .weights.sharding import StreamedSharding

FLOAT32_SUFFIXES = ("A_log.weight", "dt_bias.weight", "norm.weight")
"""Endings of the names of parameters that are float32 whatever `torch_dtype` is."""


CONTINUATION_MODEL_TAG = "prompt_continuation_model"
"""The submodel that encodes the next tokens of a prompt whose beginning is in the cache and the states."""


class Qwen35MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen35InferenceConfig) -> None:
        super().__init__()
        dtype = config.neuron_config.torch_dtype
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = ColumnParallelLinear(hidden, inner, bias=False, gather_output=False, dtype=dtype)
        self.up_proj = ColumnParallelLinear(hidden, inner, bias=False, gather_output=False, dtype=dtype)
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, input_is_parallel=True, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In place: on a CPU, fresh memory for a whole prompt costs as much as the arithmetic.
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class NeuronQwen35DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is DeltaNet or attention by `layer_types`."""

    def __init__(self, config: Qwen35InferenceConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_linear = config.layer_types[layer_idx] == "linear_attention"
        # The checkpoint's own names, so that a tensor is found where its name says.
        if self.is_linear:
            self.linear_attn = NeuronGatedDeltaNet(config)
        else:
            self.self_attn = NeuronQwen35Attention(config)
        self.mlp = Qwen35MLP(config)
        self.input_layernorm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """hidden_states [B, S, D]; the keywords are those NxDI's decoder loop passes to every layer.

        Returns (hidden_states, new state pair, cos, sin, None), the tuple that loop unpacks.
        """
        mixer = self.linear_attn if self.is_linear else self.self_attn
        mixed = mixer(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed.hidden_states
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, mixed.present_key_value, mixed.cos_cache, mixed.sin_cache, None


class NeuronQwen35Model(NeuronBaseModel):
    """The traced module: embedding, layers, norm, head, cache."""

    continues = False
    """Whether several tokens are the next ones of a prompt; set with the bucket, before tracing or a call."""

    def setup_attr_for_model(self, config: Qwen35InferenceConfig) -> None:
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.max_batch_size = config.neuron_config.max_batch_size
        self.buckets = config.neuron_config.buckets

    def init_model(self, config: Qwen35InferenceConfig) -> None:
        neuron_config = config.neuron_config
        self.embed_tokens = ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype=neuron_config.torch_dtype,
            shard_across_embedding=True,
            pad=True,
        )
        self.layers = nn.ModuleList(NeuronQwen35DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen35RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = ColumnParallelLinear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            pad=True,
            # On a device the sampler reduces over the ranks; on a CPU it wants whole rows.
            gather_output=not self.on_device_sampling or neuron_config.on_cpu,
            # NxDI masks as many of the last columns as there is padding; without it they would be tokens.
            keep_padded_output=True,
            dtype=neuron_config.torch_dtype,
        )
        # The layers work in place, and NxDI turns autograd off neither when it traces nor when it is called.
        self.requires_grad_(False)

    def init_inference_optimization(self, config: Qwen35InferenceConfig) -> None:
        super().init_inference_optimization(config)
        self.kv_mgr = Qwen35CacheManager(config, num_kv_head=self.num_key_value_heads, global_rank=self.rank_util)

    def create_padding_mask(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Real tokens [B, S] bool of a prompt whose padding has position 0 (see Qwen35ModelWrapper.pad_inputs)."""
        if position_ids.shape[1] == 1:
            return None
        first = torch.arange(position_ids.shape[1], device=position_ids.device) == 0
        return (position_ids > 0) | first

    def _is_context_encoding(self, input_ids: torch.Tensor) -> bool:
        return not self.continues and bool(super()._is_context_encoding(input_ids))

    def get_model_output(self, *args: Any, **kwargs: Any) -> Any:
        """NxDI's decoder loop; the tokens of a prompt that goes on see the cache, and each other from left to right."""
        if self.continues:
            tokens = kwargs["input_ids"].shape[1]
            index = torch.arange(tokens, device=kwargs["input_ids"].device)
            kwargs["active_mask"] = (index.unsqueeze(1) >= index).view(1, 1, tokens, tokens)
        return super().get_model_output(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NeuronQwen35Model:
        # Every parameter is declared with the dtype it needs. A cast of the whole module, as NxDI makes under
        # cast_type="config" and on a CPU, would take A_log, the norms and the recurrent state down to bfloat16.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self


def require_float32(module: NeuronQwen35Model) -> None:
    """Check that no cast reached what must be float32: an error in a decay is exponentiated at every token.

    Raises:
        TypeError: a decay parameter, a norm or a recurrent state has another dtype.
    """
    state = module.kv_mgr.past_key_values
    kept = {f"recurrent state of layer {i}": state[2 * i] for i in module.config.linear_attention_layers}
    kept |= {n: p for n, p in module.named_parameters() if n.endswith(FLOAT32_SUFFIXES)}
    cast = [f"{name} is {p.dtype}" for name, p in kept.items() if p.dtype != torch.float32]
    if cast:
        raise TypeError(f"float32 was lost: {', '.join(cast)}; set cast_type='as-declared'")


class Qwen35DecoderModelInstance(DecoderModelInstance):
    """Makes the traced module, and checks that what must be float32 still is."""

    continues = False

    def load_module(self) -> None:
        super().load_module()
        require_float32(self.module)
        self.module.continues = self.continues


class Qwen35ModelWrapper(ModelWrapper):
    """NxDI's wrapper, with positions that tell padding from tokens and with filling rows that write nowhere."""

    @property
    def continues(self) -> bool:
        """Whether this is the submodel of a prompt that goes on; its buckets are lengths of what is cached."""
        return self.tag == CONTINUATION_MODEL_TAG

    def get_model_instance(self) -> DecoderModelInstance:
        instance = Qwen35DecoderModelInstance(model_cls=self.model_cls, config=self.config, **self.model_init_kwargs)
        instance.continues = self.continues
        return instance

    def input_generator(self) -> list[tuple[torch.Tensor, ...]]:
        """NxDI's sample inputs, one tuple a bucket, those of prompts that go on told apart from those of others."""
        return [self._mark(inputs) for inputs in super().input_generator()]

    def _mark(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Empty hidden states, which NxDI takes for none, in the place of its filler [B], where prompts go on.

        A loaded model finds the program to run by the shapes of its inputs alone, and a chunk that follows as many
        cached tokens as it has itself would look like a prompt of this length.
        """
        return (*inputs[:5], torch.empty(0), *inputs[6:]) if self.continues else inputs

    def get_target_bucket(self, *args: torch.Tensor, strategy: str = "first_fit") -> int:
        """The bucket for an attention mask args[1] [B, length]; a prompt may fill its bucket to the last token.

        NxDI wants one token of room, which doubles the work on a prompt of exactly 512 tokens.
        """
        length = args[1].shape[1]
        if self.neuron_config.is_prefill_stage and strategy == "first_fit" and length in self.neuron_config.buckets:
            return length
        return super().get_target_bucket(*args, strategy=strategy)

    def pad_inputs(self, *args: torch.Tensor, pad_type: str = "first_fit") -> tuple[torch.Tensor, ...]:
        """Pad a prompt to the bucket of its longest row; padding gets position 0.

        NxDI gives padding position 1, which in a prompt of one token cannot be told from its second token: the state
        would take in padding, and the last token would be looked for one place too far.
        """
        if not self.neuron_config.is_prefill_stage:
            return super().pad_inputs(*args, pad_type=pad_type)
        if self.continues:
            bucket, tokens = self.get_target_bucket(*args, strategy=pad_type), self.neuron_config.n_active_tokens
            cached = F.pad(args[1], (0, bucket - args[1].shape[1]))
            input_ids, position_ids = (F.pad(arg, (0, tokens - arg.shape[1])) for arg in (args[0], args[2]))
            return self._mark((input_ids, cached, position_ids, *args[3:]))
        longest = int(args[1].sum(dim=1).max())
        cut = tuple(arg[:, :longest] for arg in args[:3])
        padding = (0, self.get_target_bucket(*cut, strategy=pad_type) - longest)
        input_ids, attention_mask, position_ids = (F.pad(arg, padding) for arg in cut)
        return (input_ids, attention_mask, torch.where(attention_mask > 0, position_ids, 0), *args[3:])

    def _forward(self, *args: torch.Tensor) -> Any:
        if not self.is_neuron():
            # Tracing sets these once in each traced copy; the one module of a CPU serves every submodel and bucket.
            self.model.n_positions, self.model.continues = args[1].shape[1], self.continues
        return super()._forward(*args)

    def forward(self, *args: Any, pad_type: str = "first_fit") -> Any:
        """Run any number of rows, in ascending order of their seq_ids args[3], in pieces of the compiled batch."""
        batch, rows = self.neuron_config.batch_size, args[3].shape[0]
        if self.model is None or rows == batch:
            return super().forward(*args, pad_type=pad_type)
        if self.async_mode:  # the outputs are still on the device; NxDI cuts the pieces and picks the rows later
            return super().forward(*self._fill_up(args)[0], pad_type=pad_type)
        pieces: list[list[torch.Tensor]] = []
        for start in range(0, rows, batch):
            filled, places = self._fill_up([_rows(arg, rows, slice(start, start + batch)) for arg in args])
            outputs = super().forward(*filled, pad_type=pad_type)
            if self.is_neuron():
                outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
                pieces.append([output.index_select(0, places) for output in outputs])
                continue
            state = self.model.kv_mgr.past_key_values
            first = len(outputs) - len(state)
            pieces.append([output.index_select(0, places) for output in outputs[:first]])
            for entry, new in zip(state, outputs[first:], strict=True):
                entry.data = new.data  # for the next piece; a device aliases them
        merged = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        if not self.is_neuron():
            return [*merged, *self.model.kv_mgr.past_key_values]
        return merged if len(merged) > 1 else merged[0]

    def _fill_up(self, args: Sequence[Any]) -> tuple[list[Any], torch.Tensor]:
        """Arguments of whole compiled batches, and where in them each of the rows given sits.

        The rows added are copies of the first under the id -1, which writes nowhere; NxDI's own would write to the
        lines that are idle. In a decoding batch of all lines row b is line b.
        """
        batch, seq_ids = self.neuron_config.batch_size, args[3].long()
        rows = seq_ids.shape[0]
        reads_state = self.continues or not self.neuron_config.is_prefill_stage
        by_line = reads_state and batch == self.neuron_config.kv_cache_batch_size
        places = seq_ids if by_line else torch.arange(rows)
        source = torch.zeros(-(-rows // batch) * batch, dtype=torch.long)
        source[places] = torch.arange(rows)
        filled = [_rows(arg, rows, source) for arg in args]
        filled[3] = torch.full_like(source, -1)
        filled[3][places] = seq_ids
        return filled, places


def _rows(value: Any, rows: int, chosen: torch.Tensor | slice) -> Any:
    """The chosen rows of a tensor that has `rows` of them; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows:
        return value[chosen]
    return value


class NeuronQwen35ForCausalLM(StreamedSharding, NeuronBaseForCausalLM):
    """Qwen3.5 as an NxDI application: `compile`, `load` (or `to_cpu`), and `generate` through the HF adapter."""

    _model_cls = NeuronQwen35Model
    config: Qwen35InferenceConfig

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
        """Also the submodel of prompts that go on, when prompts come in chunks."""
        super().enable_token_generation(*args, **kwargs)
        chunk = self.config.prefill_chunk_size
        if chunk is not None:
            config = copy.deepcopy(self.context_encoding_model.config)
            config.neuron_config.bucket_n_active_tokens, config.neuron_config.n_active_tokens = False, chunk
            # By what is cached, which is a chunk at least; each spared bucket is a program less to compile.
            buckets = self.token_generation_model.neuron_config.buckets
            config.neuron_config.buckets = [bucket for bucket in buckets if bucket >= chunk]
            self.continuation_model = self.add_submodel(CONTINUATION_MODEL_TAG, config)

    def add_submodel(self, tag: str, config: Any, **model_init_kwargs: Any) -> Any:
        """Another submodel over the same weights and state, compiled like context encoding."""
        submodel = self.model_wrapper(
            config=config,
            model_cls=self._model_cls,
            tag=self.context_encoding_model.tag,  # NxDI chooses the compiler's arguments by the tag
            model_init_kwargs=model_init_kwargs,
        )
        submodel.tag = tag
        self.models.append(submodel)
        return submodel

    def compile(self, compiled_model_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """NxDI's compile, after the plan was held against `neuron_config.instance` and the checkpoint's headers against
        the configuration.

        Raises:
            ValueError: the instance has not the memory; it says what to change.
            CheckpointError, ConversionError: the weights would not load; known before minutes of compilation.
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
            # Under continuous batching NxDI makes a module a submodel; those that encode prompts share theirs.
            if submodel.neuron_config.is_prefill_stage:
                submodel.model = self.context_encoding_model.model
        self._check_modules()

    def bytes_per_rank(self) -> RankBytes:
        """What each rank will hold, from the shapes of the modules; nothing is allocated or read."""
        with as_rank(0, self.neuron_config.tp_degree), torch.device("meta"):
            return count_bytes(self._model_cls(self.config))

    def cache_entries(self) -> list[list[torch.Tensor]]:
        """What every rank of this process keeps between steps: two tensors a layer, see `Qwen35CacheManager`.

        On a CPU those of its own rank. On a device those of all local ranks: NxD holds them in the loaded model's
        `state`, under the names of the parameters, and its programs update them in place. Indices and slices of either
        are views that `copy_` reads and writes; a call may replace the entries of a CPU, so ask again after each.
        """
        submodel = self.context_encoding_model
        if not submodel.is_neuron():
            return [[entry.data for entry in submodel.model.kv_mgr.past_key_values]]
        names = [f"kv_mgr.past_key_values.{i}" for i in range(2 * self.config.num_hidden_layers)]
        return [[buffers[name] for name in names] for buffers in submodel.model.nxd_model.state]

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
        **kwargs: Any,
    ) -> Any:
        """NxDI's forward, for rows in any order: they run in ascending order of `seq_ids` [B] and are put back.

        input_ids [B, S] are prompts, when `position_ids` [B, S] start at 0; or the next token of each row; or, with
        `prefill_chunk_size`, the next tokens of prompts: position_ids then count on, 0 at padding, and attention_mask
        [B, cached tokens] tells what is cached. Prompts longer than a chunk are cut here.

        Raises:
            ValueError: an id is not that of a cache line, or is given twice; or more tokens than a chunk go on.
        """
        if attention_mask is not None and position_ids is not None and position_ids.shape[1] == 1 <= position_ids.min():
            # A step goes to the place after the cached tokens. NxDI's adapter takes the largest position of the prompt,
            # which for a prompt of one token is that of its padding.
            position_ids = attention_mask.sum(dim=1, keepdim=True)
        if kwargs.get("sampling_params") is None:
            # NxDI's default has the rows of a decoding batch, a shape that other submodels were not compiled for.
            kwargs["sampling_params"] = self.default_sampling_params[:1].repeat(input_ids.shape[0], 1)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        if seq_ids is None:
            return self._forward_in_order(torch.arange(input_ids.shape[0]), **inputs)
        lines, ids = self.neuron_config.kv_cache_batch_size, seq_ids.tolist()
        if len({*ids}) < len(ids) or min(ids) < 0 or max(ids) >= lines:
            raise ValueError(
                f"seq_ids={ids} must be distinct and in 0..{lines - 1}, the lines of the cache; "
                f"for more sequences at a time raise kv_cache_batch_size={lines}"
            )
        if ids == sorted(ids):
            return self._forward_in_order(seq_ids, **inputs)
        order = torch.argsort(seq_ids)
        ordered = {name: _rows(value, len(ids), order) for name, value in inputs.items()}
        ordered["llava_args"] = [_rows(value, len(ids), order) for value in inputs.get("llava_args", [])]
        outputs = self._forward_in_order(seq_ids[order], **ordered)
        back = torch.argsort(order)
        for name in ("logits", "tokens", "hidden_states"):
            setattr(outputs, name, _rows(getattr(outputs, name, None), len(ids), back))
        return outputs

    def _forward_in_order(self, seq_ids: torch.Tensor, **inputs: Any) -> Any:
        chunk, tokens = self.config.prefill_chunk_size, inputs["input_ids"].shape[1]
        if chunk is None or tokens <= chunk:
            return super().forward(seq_ids=seq_ids, **inputs)
        if not self._begins(inputs["position_ids"]):
            raise ValueError(
                f"input_ids of {tokens} tokens go on with prompts and exceed prefill_chunk_size={chunk}: pass at most "
                "a chunk at a time"
            )
        return self._encode_in_chunks(chunk, seq_ids, **inputs)

    def _begins(self, position_ids: torch.Tensor) -> bool:
        """Whether prompts begin with these tokens [B, S]; further on position 0 may be padding."""
        return bool(self._is_prefill(position_ids[:, :1]))

    def _encode_in_chunks(
        self,
        chunk: int,
        seq_ids: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        llava_args: Sequence[torch.Tensor] = (),
        **kwargs: Any,
    ) -> Any:
        """Context-encode the first `chunk` tokens of each prompt, then `chunk` more at a time; outputs of last tokens.

        A row takes part until its prompt ends. State, conv inputs and keys pass from one call to the next in the cache.
        """
        mask = self._infer_attention_mask(position_ids) if attention_mask is None else attention_mask
        rows, lengths = input_ids.shape[0], mask.sum(dim=1)
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
            real = mask[active, columns]
            index = start + torch.arange(real.shape[1])
            outputs = super().forward(
                seq_ids=seq_ids[active],
                input_ids=input_ids[active, columns],
                attention_mask=real if start == 0 else mask.new_ones(len(active), start),
                position_ids=torch.where(real > 0, index, 0),
                llava_args=[_rows(arg, rows, active) for arg in self._columns_of(llava_args, columns)],
                **{name: _rows(value, rows, active) for name, value in kwargs.items()},
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
        """What belongs to some columns of input_ids."""
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
        plain = (input_ids, attention_mask, position_ids, seq_ids, sampling_params, prev_hidden, adapter_ids)
        submodel = self._submodel_for(input_ids, position_ids, llava_args)
        if submodel is None:
            return super()._get_model_outputs(*plain, medusa_args, llava_args, **kwargs)
        outputs = submodel(*plain, *llava_args)
        self.kv_cache_populated = True  # it encodes prompts
        return outputs, submodel.is_neuron()

    def _submodel_for(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, llava_args: Sequence[torch.Tensor]
    ) -> Any:
        """The submodel of a call that NxDI does not know of; None for its own two."""
        if input_ids.shape[1] == 1 or self._begins(position_ids):
            return None
        if self.config.prefill_chunk_size is None:
            raise ValueError(
                f"position_ids start at {int(position_ids[:, 0].min())}: a prompt that goes on needs "
                "prefill_chunk_size in Qwen35NeuronConfig"
            )
        return self.continuation_model

    def _get_constructed_outputs(self, *args: Any) -> Any:
        outputs = super()._get_constructed_outputs(*args)
        if outputs.logits is not None:
            outputs.logits = outputs.logits[..., : self.vocab_size]  # the rest pads the head to whole ranks
        return outputs

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
        """Nothing is left to do: the conversion fills lm_head from the embedding of a tied checkpoint."""

    @staticmethod
    def load_hf_model(model_path: str, **kwargs: Any) -> nn.Module:
        """The transformers model of a checkpoint; needs transformers >= 5."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model_path, **kwargs)
