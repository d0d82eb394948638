# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Every CPU stand-in has the names, parameters, defaults, bases and hook order of the NxDI or NxD original.

The originals are described by `nxdi_signatures.json`, and where they are importable by themselves too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import record_nxdi_signatures as recorder
from nxdi_cpu.attention import GroupQueryAttention_O, GroupQueryAttention_QKV
from nxdi_cpu.config import NeuronConfig
from nxdi_cpu.sampling import Sampler
from qwen35.nxdi import NXDI_AVAILABLE

COMMITTED: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "nxdi_signatures.json").read_text(encoding="utf-8")
)
SOURCES = COMMITTED.pop("sources")
REMEDY = f"describe it in a table of this test, or record anew with {Path(recorder.__file__).name}"

# Parameters of an original that its stand-in must not take, since it could not do what they ask for.
OMITTED_PARAMETERS = {
    "parallel_state.get_tensor_model_parallel_group": {"as_list=False"},  # replica groups of XLA's collectives
}

# Hooks that an original calls and its stand-in does not.
OMITTED_CALLS = {
    # The base class goes through a transformers model; every model here reads its checkpoint itself.
    "application_base.NeuronApplicationBase.get_state_dict": {
        "load_hf_model",
        "convert_hf_to_neuron_state_dict",
        "update_state_dict_for_tied_weights",
    },
    "attention.NeuronAttentionBase.forward": {"get_qkv_proj", "perform_prefill"},  # context parallelism
    "model_base.NeuronBaseForCausalLM.__init__": {"get_compiler_args"},  # submodels of speculation
    "model_base.NeuronBaseForCausalLM.forward": {"_is_prefill"},  # async mode
    "model_wrapper.ModelWrapper.forward": {"get_target_bucket"},  # buckets of batch sizes
    # There, to lay weights out for a device, and to shard for every rank at once.
    "application_base.NeuronApplicationBase.compile": {"checkpoint_loader_fn"},
    "application_base.NeuronApplicationBase.load": {"get_builder"},
    "application_base.NeuronApplicationBase.shard_weights": {"get_builder", "checkpoint_loader_fn"},
    # Ours reads and writes its own caches.
    "kv_cache.KVCacheManager.get_kv_by_layer_id": {"_fetch_cache"},
    "kv_cache.KVCacheManager.update_kv_by_layer_id": {"_fetch_cache"},
}
# Neither changes nor depends on anything, so that the order does not matter.
QUERIES = {"is_neuron", "set_none_if_empty"}

# Fields whose defaults follow the platform: on trn2 NxDI pairs cores and has a top-k kernel, a CPU has neither.
PLATFORM_FIELDS = {"logical_nc_config", "lm_head_pad", "top_k_kernel_enabled"}

# What the stand-ins need and the originals do not have.
OURS_ALONE = {
    "application_base.NeuronApplicationBase._load_modules",
    "attention.BaseGroupQueryAttention._pad_query_heads",
    "config.NeuronConfig._check",
    "hf_adapter.HuggingFaceGenerationAdapter._prepare_cache_for_generation",  # overrides transformers
    "layers.ColumnParallelLinear.lay_out_for_decoding",
    "layers.require_inert",
    "model_builder.TraceError",
    "model_builder.alias_problems",
    "model_builder.input_problems",
    "model_builder.shapes_of",
    "parallel_state.TensorParallelGroup",
    "parallel_state.as_rank",
}


def real_facts() -> dict[str, Any]:
    """As JSON gives them back, so that the committed and the fresh record compare equal."""
    facts: dict[str, Any] = json.loads(json.dumps(recorder.record_real()))
    return facts


STAND_INS = recorder.stand_ins()
REAL = real_facts() if NXDI_AVAILABLE else COMMITTED
NAMES: dict[str, Any] = REAL["names"]
OURS = recorder.record(
    {name: STAND_INS[name] for name in NAMES if name in STAND_INS},
    {name: list(facts.get("members", ())) for name, facts in NAMES.items()},
)
CLASSES = [name for name, facts in NAMES.items() if "bases" in facts]


@pytest.mark.skipif(not NXDI_AVAILABLE, reason="the real NxDI is not importable")
def test_the_committed_record_is_that_of_the_importable_nxdi() -> None:
    if REAL["platform"] != COMMITTED["platform"]:
        pytest.skip(f"recorded on {COMMITTED['platform']}, defaults differ on this {REAL['platform']}")
    assert REAL == COMMITTED, f"NxDI differs from {SOURCES}; if the new one is right, record it"


def test_every_public_name_and_method_has_an_original() -> None:
    members = {
        f"{name}.{member}" for name in CLASSES if name in STAND_INS for member in recorder.own_members(STAND_INS[name])
    }
    recorded = {f"{name}.{member}" for name, facts in NAMES.items() for member in facts.get("members", ())}
    assert (STAND_INS.keys() | members) - (NAMES.keys() | recorded) == OURS_ALONE, REMEDY
    assert sorted(NAMES.keys() - STAND_INS.keys()) == [], "stand-ins that are gone or renamed"


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_values_are_those_of_the_original(name: str) -> None:
    omitted = OMITTED_PARAMETERS.get(name, set())
    expected = {**NAMES[name]}
    if "parameters" in expected:
        expected["parameters"] = [p for p in expected["parameters"] if p not in omitted]
    found = OURS["names"][name]
    for aspect in ("value", "parameters", "members", "bases"):
        assert found.get(aspect) == expected.get(aspect), f"{aspect} of {name} differ from {NAMES[name]['real']}"


@pytest.mark.parametrize("name", CLASSES)
def test_hooks_are_called_in_the_order_of_the_original(name: str) -> None:
    real_calls, our_calls = NAMES[name]["calls"], OURS["names"][name]["calls"]
    for method in real_calls.keys() | our_calls.keys():
        theirs = [call for call in real_calls.get(method, ()) if call not in QUERIES]
        if "get_builder" in theirs:  # NxD's builder calls the loader that it is given
            theirs.insert(theirs.index("get_builder") + 1, "checkpoint_loader_fn")
        ours = [call for call in our_calls.get(method, ()) if call not in QUERIES]
        assert set(theirs) - set(ours) == OMITTED_CALLS.get(f"{name}.{method}", set()), f"{name}.{method}: {REMEDY}"
        # The original has more branches, each with calls of its own: ours must be a way through them.
        rest = iter(theirs)
        assert all(call in rest for call in ours), f"{name}.{method} calls {ours}, the original {theirs}"


def test_the_traced_forward_takes_25_tensors_by_position() -> None:
    """No keyword survives tracing, so that both count and order are part of the contract."""
    tensors = OURS["names"]["model_base.NeuronBaseModel"]["members"]["forward"]
    assert len(tensors) == 1 + 25
    assert tensors[:6] == ["self", "input_ids", "attention_mask", "position_ids", "seq_ids", "sampling_params"]
    assert all(tensor.endswith("=None") for tensor in tensors[6:])


def test_the_decoder_loop_passes_the_keywords_of_the_original_to_each_layer() -> None:
    assert OURS["layer_keywords"] == REAL["layer_keywords"]


@pytest.mark.parametrize("index", range(len(recorder.NEURON_CONFIGS)), ids=map(str, recorder.NEURON_CONFIGS))
def test_neuron_config_fields_have_the_values_of_the_original(index: int) -> None:
    ours, real = OURS["neuron_config"][index], REAL["neuron_config"][index]
    assert ours["arguments"] == real["arguments"], "other arguments than recorded: record anew"
    # lm_head_pad follows logical_nc_config, and where that was asked for, nothing follows the platform but the kernel.
    ignored = {"top_k_kernel_enabled"} if "logical_nc_config" in ours["arguments"] else PLATFORM_FIELDS

    def comparable(fields: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in fields.items() if name not in ignored}
        return {name: comparable(value) if isinstance(value, dict) else value for name, value in kept.items()}

    assert comparable(ours["fields"]) == comparable(real["fields"])


@pytest.mark.parametrize(
    "call",
    [
        lambda: GroupQueryAttention_QKV(8, 4, 2, 1, fused_qkv=True),
        lambda: GroupQueryAttention_O(8, 4, 2, 1, out_proj_kernel_enabled=True),
        lambda: Sampler(NeuronConfig())(torch.zeros(1, 4), torch.ones(1, 3), return_values=True),
    ],
    ids=["fused_qkv", "out_proj_kernel_enabled", "return_values"],
)
def test_a_parameter_that_is_there_for_the_signature_only_is_refused(
    call: Callable[[], Any], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(NotImplementedError, match=f"{request.node.callspec.id}=True"):
        call()


def test_parameters_are_written_as_python_writes_them() -> None:
    def every_kind(a: int, /, b: int, c: float = 1.5, *d: int, e: str = "x", **f: int) -> None: ...

    def keyword_only(*, a: object = dict) -> None: ...

    assert recorder.parameters(every_kind) == ["a", "/", "b", "c=1.5", "*d", "e='x'", "**f"]
    assert recorder.parameters(keyword_only)[0] == "*"
