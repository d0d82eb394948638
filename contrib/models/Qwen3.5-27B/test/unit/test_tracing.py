# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What NxDI does with the model when it traces it: modules, buckets, sample inputs, aliases, operations.

Runs on the real NxDI's instances and modules, and on the stand-ins. Nothing is computed: all is on the meta device,
where a shape or a branch that depends on data is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nxdi_cpu.model_builder import TraceError, alias_problems, input_problems, shapes_of
from nxdi_cpu.parallel_state import as_rank
from qwen35 import NeuronQwen35ForCausalLM, OnDeviceSamplingConfig, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.submodels import Qwen35ModelWrapper, require_float32
from qwen35.weights.conversion import ConversionError
from support.models import TINY, load_neuron, save_checkpoint

# The operations of a stock model, NxDI's Qwen3 at commit 4bcdc54, as its CPU mode dispatches them: the compiler takes
# these. One is left out: aten.scatter.src, by which NxDI writes a decoding step's keys element by element.
STOCK = """
    _softmax _to_copy _unsafe_view add.Tensor arange arange.start_step bmm cat clone copy_ cos div.Tensor embedding exp
    expand full gather index_put max.dim maximum mean.dim mul.Tensor neg permute pow.Scalar pow.Tensor_Scalar reciprocal
    rsqrt scalar_tensor silu sin slice.Tensor sub.Tensor sum.dim_IntList t transpose.int tril unsqueeze view
    where.self
"""
# What ours adds: elementwise operations, comparisons and reductions, views, constants. Each is one HLO instruction or a
# few, of static shape; those that end in _ are made functional before they are lowered.
OURS = """
    addcmul_ alias amax any.dim bitwise_or.Tensor clamp eq.Scalar eq.Tensor exp_ ge.Scalar ge.Tensor gt.Scalar lt.Scalar
    mul_.Tensor sigmoid silu_ softplus sub_.Tensor index_select select.int split.Tensor split_with_sizes new_zeros
    empty_like new_empty
"""
# The gated delta rule in plain PyTorch, for head sizes that the kernels do not have.
PLAIN_DELTA_RULE = """
    addcmul baddbmm baddbmm_ constant_pad_nd cumsum eye ones stack unbind.int zeros
"""
# The sampler on a CPU; on a device a kernel takes its place.
CPU_SAMPLER = "argmax"
# The attention of the stand-ins, in the place of NxDI's own.
STAND_IN_ATTENTION = "mm _safe_softmax bitwise_not masked_fill.Scalar mul.Scalar ones"
OPTIONS = {
    "one line": dict(batch_size=1),
    "plain delta rule": dict(batch_size=1, deltanet_kernel="torch"),
    "buckets": dict(batch_size=2, enable_bucketing=True),
    "continuous": dict(batch_size=4, ctx_batch_size=1, is_continuous_batching=True, enable_bucketing=True),
    "two rows of four lines": dict(
        batch_size=2, ctx_batch_size=1, kv_cache_batch_size=4, max_batch_size=4, is_continuous_batching=True
    ),
    "prompts in chunks": dict(batch_size=2, prefill_chunk_size=128, enable_bucketing=True),
    "sampled tokens and logits": dict(
        batch_size=2, on_device_sampling_config=OnDeviceSamplingConfig(), output_logits=True, on_cpu=True
    ),
}


UNKNOWN_TO_NEURON = ("scatter", "aten.item", "_local_scalar_dense", "nonzero", "unique", "masked_select")


def names(*tables: str) -> set[str]:
    found = {name if "." in name else f"{name}.default" for table in tables for name in table.split()}
    return {f"aten.{name}" for name in found}


class Operations(TorchDispatchMode):
    """Names of the operations that reach a backend, such as XLA's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, (torch.Tensor, list, tuple)):  # and not a question about dtypes
            self.names.add(str(func))
        return output


def application(**options: Any) -> NeuronQwen35ForCausalLM:
    settings = {"torch_dtype": torch.bfloat16, "seq_len": 512, "max_context_length": 512, **options}
    # Heads of 128 dims, so that the kernels take them.
    fields = {**TINY, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    return NeuronQwen35ForCausalLM(
        "no-such-checkpoint", Qwen35InferenceConfig(Qwen35NeuronConfig(**settings), **fields)
    )


@pytest.fixture
def lone_rank(backend: str) -> None:
    """NxD's layers ask for their group; loading a model on a CPU makes one of this process alone."""
    if NXDI_AVAILABLE:
        load_neuron(MINI_CHECKPOINT)


def traced(app: NeuronQwen35ForCausalLM) -> Iterator[tuple[str, Any, Any, Any]]:
    """(submodel and bucket, module, aliases, sample inputs) in the order that NxD's ModelBuilder makes them."""
    for wrapper in app.models:
        instance = wrapper.get_model_instance()
        with torch.device("meta"):
            instance.load_module()
        for i, inputs in enumerate(wrapper.input_generator()):
            module, aliases = instance.get(i)
            yield f"{wrapper.tag}, bucket {module.n_positions}", module, aliases, inputs


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_bucket_runs_with_every_state_aliased_and_known_operations(
    options: dict[str, Any], lone_rank: None
) -> None:
    allowed = names(STOCK, OURS)
    if options.get("deltanet_kernel") == "torch":
        allowed |= names(PLAIN_DELTA_RULE)
    if options.get("on_cpu"):
        allowed |= names(PLAIN_DELTA_RULE, CPU_SAMPLER)
    if not NXDI_AVAILABLE:
        allowed |= names(STAND_IN_ATTENTION)
    app = application(**options)
    seen, programs = [], {}
    for bucket, module, aliases, inputs in traced(app):
        with Operations() as operations, torch.device("meta"):
            outputs = module(*(tensor.to("meta") for tensor in inputs))
        assert input_problems(inputs) + alias_problems(module, aliases, outputs) == [], bucket
        assert len(aliases) == 2 * app.config.num_hidden_layers
        assert operations.names - allowed == set(), bucket
        seen.append(bucket)
        programs.setdefault(shapes_of(inputs), []).append(bucket)
    assert [same for same in programs.values() if len(same) > 1] == [], (
        "NxD finds a program by the shapes of its inputs"
    )
    assert len(seen) == len({*seen}) == sum(len(wrapper.neuron_config.buckets) for wrapper in app.models)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's attention makes constants that torch.export does not take")
def test_every_bucket_exports_as_one_graph(options: dict[str, Any]) -> None:
    for _, module, _, inputs in traced(application(**options)):
        program = torch.export.export(module, tuple(tensor.to("meta") for tensor in inputs), strict=False)
        assert len(program.graph_signature.user_outputs) == len(module(*(tensor.to("meta") for tensor in inputs)))
        assert not any(name in str(node.target) for node in program.graph.nodes for name in UNKNOWN_TO_NEURON)


def test_the_compiler_gets_the_arguments_of_each_submodel(lone_rank: None) -> None:
    context_encoding, token_generation = (wrapper.compiler_args for wrapper in application().models)
    if not NXDI_AVAILABLE:
        assert context_encoding is token_generation is None, "NxDI composes them"
        return
    for arguments in (context_encoding, token_generation):
        assert "--auto-cast=none" in arguments and "--lnc=2" in arguments
        assert "--enable-ccop-compute-overlap" in arguments
    assert " -O1 " in context_encoding and "--modular-flow-mac-threshold=10" in context_encoding
    assert " -O2 " in token_generation and "--cc-pipeline-tiling-factor=1" in token_generation


@pytest.mark.parametrize("spoil", ["a_log", "state"])
def test_a_cast_of_what_must_be_float32_is_found(spoil: str, lone_rank: None) -> None:
    _, module, _, _ = next(traced(application()))
    if spoil == "a_log":
        decay = module.layers[0].linear_attn.A_log
        decay.weight = torch.nn.Parameter(decay.weight.bfloat16(), requires_grad=False)
        name = r"layers\.0\.linear_attn\.A_log\.weight"
    else:
        module.kv_mgr.past_key_values[2] = torch.nn.Parameter(module.kv_mgr.past_key_values[2].bfloat16(), False)
        name = "recurrent state of layer 1"
    with pytest.raises(TypeError, match=rf"{name} is torch\.bfloat16.*cast_type='as-declared'"):
        require_float32(module)


def test_a_missing_a_shifted_and_a_mistyped_alias_are_told_apart() -> None:
    _, module, aliases, inputs = next(traced(application()))
    with torch.device("meta"):
        outputs = module(*(tensor.to("meta") for tensor in inputs))
    first = module.kv_mgr.past_key_values[0]
    assert alias_problems(module, aliases, outputs) == []
    assert "kv_mgr.past_key_values.0 has no alias" in alias_problems(
        module, {p: i for p, i in aliases.items() if p is not first}, outputs
    )
    assert any("they must be the last" in line for line in alias_problems(module, aliases, [*outputs, outputs[0]]))
    cast = [outputs[0], outputs[1].bfloat16(), *outputs[2:]]
    (line,) = alias_problems(module, aliases, cast)
    assert "past_key_values.0 is torch.float32" in line and "output 1 is torch.bfloat16" in line
    (line,) = alias_problems(module, aliases, [outputs[0], first, *outputs[2:]])
    assert "the step would not change it" in line


class TestCompile:
    """The application's own compile; on a CPU it walks what NxDI would trace."""

    pytestmark = pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's own compile needs the compiler")

    @pytest.mark.parametrize("tp_degree", [1, 2, 4])
    def test_a_dry_run_walks_every_bucket_of_a_rank_and_writes_the_configuration(
        self, tp_degree: int, tmp_path: Path
    ) -> None:
        save_checkpoint(tmp_path / "checkpoint")
        neuron_config = Qwen35NeuronConfig(tp_degree=tp_degree, batch_size=2, seq_len=512, enable_bucketing=True)
        config = Qwen35InferenceConfig.from_pretrained(tmp_path / "checkpoint", neuron_config=neuron_config)
        app = NeuronQwen35ForCausalLM(str(tmp_path / "checkpoint"), config)
        app.compile(str(tmp_path / "compiled"), dry_run=True)
        assert [file.name for file in (tmp_path / "compiled").iterdir()] == ["neuron_config.json"]
        walked = app.get_builder().model_collection
        assert {key: len(container.example_inputs) for key, container in walked.items()} == {
            "context_encoding_model": 3,
            "token_generation_model": 3,
        }
        assert walked["token_generation_model"].priority_model_idx == 0

    def test_a_checkpoint_that_would_not_load_is_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "checkpoint")
        config = Qwen35InferenceConfig.from_pretrained(tmp_path / "checkpoint", intermediate_size=64)
        with pytest.raises(ConversionError, match=r"mlp\.gate_proj\.weight has shape \[96, 64\], expected \[64, 64\]"):
            NeuronQwen35ForCausalLM(str(tmp_path / "checkpoint"), config).compile(str(tmp_path / "compiled"))
        assert not (tmp_path / "compiled").exists()

    def test_a_state_that_comes_back_in_another_dtype_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        app = application()
        module_cls = app._model_cls
        forward = module_cls.forward
        monkeypatch.setattr(module_cls, "forward", lambda *args: [t.bfloat16() for t in forward(*args)])
        with pytest.raises(TraceError, match=r"context_encoding_model, bucket 0: kv_mgr\.past_key_values\.0 is"):
            app.get_builder().trace()

    def test_two_programs_that_a_loaded_model_could_not_tell_apart_are_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Qwen35ModelWrapper, "_mark", lambda _, inputs: inputs)
        app = application(**OPTIONS["prompts in chunks"])
        message = r"continuation_model, bucket 0: inputs of the shapes of context_encoding_model, bucket 0: only"
        with pytest.raises(TraceError, match=message):
            app.get_builder().trace()


@pytest.mark.parametrize("tp_degree", [1, 2, 4, 8, 16])
def test_the_checkpoint_of_27b_becomes_the_parameters_of_every_rank(tp_degree: int) -> None:
    """Names, shapes and dtypes only, from the plan through NxDI's hooks and the split to the modules."""
    from nxdi_cpu.sharding import get_sharded_checkpoint
    from qwen35.configuration_qwen35 import QWEN35_PRESETS
    from qwen35.weights.text_rules import conversion_plan, convert_checkpoint

    config = Qwen35InferenceConfig(Qwen35NeuronConfig(tp_degree=tp_degree), **QWEN35_PRESETS["27B"])
    sources = {name: shape for rule in conversion_plan(config) for name, shape in rule.sources.items()}
    for rank in {0, tp_degree - 1}:
        with as_rank(rank, tp_degree), torch.device("meta"):
            module = NeuronQwen35ForCausalLM._model_cls(config)
            tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in sources.items()}
            checkpoint = convert_checkpoint(tensors, config).materialise()
            get_sharded_checkpoint(checkpoint, module, rank, tp_degree)
        expected = {n: (p.shape, p.dtype) for n, p in module.named_parameters() if "past_key_values" not in n}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.items()} == expected
