# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Options of `--additional-config`: what is given is typed, what is wrong is named in one line. Needs no vLLM."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwen35_vllm
from qwen35_vllm.options import ConfigurationRefused, ServeOptions, options_in

NAMES = [field.name for field in fields(ServeOptions)]


@pytest.mark.parametrize("config", [{}, {"qwen35": {}}, {"other": {"qwen35": 1}}, 1], ids=str)
def test_nothing_given_is_the_defaults(config: Any) -> None:
    assert options_in(config) == ServeOptions()


def test_an_option_beside_the_section_is_refused() -> None:
    told = """--additional-config: cache_dir, compile must be inside "qwen35": write '{"qwen35": {"cache_dir": ...}}'"""
    with pytest.raises(ConfigurationRefused, match=re.escape(told)):
        options_in({"cache_dir": "cache", "compile": "never", "other": 1})


def test_what_is_given_is_taken() -> None:
    given = {
        "prefill_chunk_size": 16,
        "ctx_batch_size": 2,
        "context_encoding_buckets": [8, 16],
        "token_generation_buckets": [64],
        "deltanet_kernel": "torch",
        "deltanet_inverse": "plain",
        "attention_kernel": "auto",
        "mlp_kernel": "torch",
        "settings": "~/trn2.json",
        "weights_dtype": "fp8",
        "kv_cache_dtype": "fp8",
        "instance": "trn2.3xlarge",
        "on_device_sampling": True,
        "prompt_logprobs": False,
        "compiled_path": "~/compiled",
        "cache_dir": "cache",
        "compile": "never",
    }
    assert [*given] == NAMES
    options = options_in({"qwen35": given, "other": 1})
    assert options == ServeOptions(
        16, 2, (8, 16), (64,), "torch", "plain", "auto", "torch", Path.home() / "trn2.json", "fp8", "fp8",
        "trn2.3xlarge", True, False, Path.home() / "compiled", Path.cwd() / "cache", "never",
    )  # fmt: skip


def test_options_that_are_given_are_fields_of_the_model_s_configuration() -> None:
    assert ServeOptions().neuron_fields() == {}
    chosen = options_in({"qwen35": {"context_encoding_buckets": [8], "on_device_sampling": True}}).neuron_fields()
    assert (chosen["context_encoding_buckets"], chosen["output_logits"]) == ([8], True)
    assert chosen["on_device_sampling_config"].do_sample is False
    off = options_in({"qwen35": {"on_device_sampling": False, "prompt_logprobs": True}}).neuron_fields()
    assert off == {"on_device_sampling_config": None, "output_logits": False, "output_prompt_logits": True}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"chunk": 16}, "'chunk' is unknown"),
        ({"prefill_chunk_size": "16"}, "prefill_chunk_size='16' must be a positive whole number"),
        ({"prefill_chunk_size": True}, "prefill_chunk_size=True must be"),
        ({"context_encoding_buckets": [16, 8]}, "context_encoding_buckets=[16, 8] must be a list of positive whole"),
        ({"token_generation_buckets": []}, "token_generation_buckets=[] must be a list"),
        ({"deltanet_kernel": "fast"}, "deltanet_kernel='fast' must be one of auto, fused, looped, chunked, recurrent,"),
        ({"instance": "trn1.2xlarge"}, "instance='trn1.2xlarge' must be one of trn2.3xlarge, trn2.48xlarge"),
        ({"compile": "always"}, "compile='always' must be one of auto, never"),
        ({"on_device_sampling": "yes"}, "on_device_sampling='yes' must be true or false"),
        ({"compiled_path": ""}, "compiled_path='' must be a path"),
        ([1], "[1] must be an object"),
        (None, "None must be an object"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(section: Any, told: str) -> None:
    with pytest.raises(ConfigurationRefused) as refused:
        options_in({"qwen35": section})
    assert told in str(refused.value)
    assert "its options are prefill_chunk_size, " in str(refused.value), "the remedy"


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigurationRefused, match=r"'a' is unknown; 'b' is unknown; compile=1 must be"):
        options_in({"qwen35": {"a": 1, "b": 2, "compile": 1}})


def test_the_document_names_every_option() -> None:
    document = (Path(qwen35_vllm.__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \|", document, re.MULTILINE)
    assert {*NAMES} <= {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON, max_size=4) | JSON)
def test_whatever_is_given_is_taken_or_refused_in_one_line(section: Any) -> None:
    try:
        options = options_in({"qwen35": section})
    except ConfigurationRefused as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) <= 1000
    else:
        assert all(getattr(options, name) is not None for name, value in section.items() if value is not None)
