# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The application from compiling to calling, its layers and rows against transformers, and its dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_cpu.parallel_state import as_rank
from nxdi_cpu.sharding import get_sharded_checkpoint
from qwen35 import NeuronQwen35ForCausalLM, OnDeviceSamplingConfig, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.weights.conversion import ConversionError
from qwen35.weights.text_rules import conversion_plan, convert_checkpoint
from support.compare import assert_close
from support.models import load_neuron, neuron_greedy, random_prompts, right_padded, save_checkpoint
from support.oracle import reference_greedy, save_reference


def options(**more: Any) -> Qwen35NeuronConfig:
    return Qwen35NeuronConfig(torch_dtype=torch.float32, on_cpu=True, seq_len=128, **more)


@pytest.mark.parametrize("save_sharded_checkpoint", [False, True])
def test_a_compiled_model_is_found_by_its_path_alone(save_sharded_checkpoint: bool, tmp_path: Path) -> None:
    checkpoint, compiled = tmp_path / "checkpoint", tmp_path / "compiled"
    save_reference(checkpoint)
    neuron_config = options(save_sharded_checkpoint=save_sharded_checkpoint)
    config = Qwen35InferenceConfig.from_pretrained(checkpoint, neuron_config=neuron_config)
    NeuronQwen35ForCausalLM(str(checkpoint), config).compile(str(compiled))
    if save_sharded_checkpoint:
        (checkpoint / "model.safetensors").unlink()
    model = NeuronQwen35ForCausalLM(str(compiled))
    model.load(str(compiled))
    tokens, _ = neuron_greedy(model, random_prompts([5]), 4)
    assert tokens.shape == (1, 4)
    if not save_sharded_checkpoint:
        assert torch.equal(tokens, neuron_greedy(load_neuron(checkpoint), random_prompts([5]), 4)[0])


def greedy_of_shards(compiled: str, prompts: list[list[int]]) -> torch.Tensor:
    model = NeuronQwen35ForCausalLM(compiled)
    model.load(compiled)
    return neuron_greedy(model, prompts, 8)[0]


def test_shards_written_by_one_process_are_what_each_rank_loads(rank_pool: Any, tmp_path: Path) -> None:
    checkpoint, compiled = tmp_path / "checkpoint", tmp_path / "compiled"
    # 159 words and 2 ranks: the vocabulary is padded by one.
    save_reference(checkpoint, vocab_size=159)
    prompts = random_prompts([9], vocab_size=159)
    expected = neuron_greedy(load_neuron(checkpoint), prompts, 8)[0]
    config = Qwen35InferenceConfig.from_pretrained(
        checkpoint, neuron_config=options(tp_degree=2, save_sharded_checkpoint=True)
    )
    NeuronQwen35ForCausalLM(str(checkpoint), config).compile(str(compiled))
    for tokens in rank_pool(2).call(greedy_of_shards, str(compiled), prompts):
        assert torch.equal(tokens, expected)


def test_every_layer_gives_what_transformers_layer_gives(tmp_path: Path) -> None:
    reference = save_reference(tmp_path, num_hidden_layers=8)
    model = load_neuron(tmp_path)
    outputs: list[torch.Tensor] = []
    module = model.models[0].model
    for layer in module.layers:
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
    prompt = random_prompts([70])
    ids, mask = right_padded(prompt)
    model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(70).unsqueeze(0))
    with torch.no_grad():
        # hidden_states: the embedding, each layer's input, and last the normalised output of the last layer.
        expected = reference.model(ids, output_hidden_states=True).hidden_states
    for i, output in enumerate(outputs[:-1]):
        # Of order one to five, and rounding grows with depth.
        assert_close(output[:, :70], expected[i + 1], atol=1e-5 * (i + 1), rtol=2e-5, label=f"output of layer {i}")
    assert_close(module.norm(outputs[-1])[:, :70], expected[-1], atol=1e-4, rtol=0, label="final norm")


def test_rows_find_their_state_by_seq_ids(tmp_path: Path) -> None:
    reference = save_reference(tmp_path)
    prompts = random_prompts([5, 9, 3])
    expected_tokens, expected_logits = reference_greedy(reference, prompts, 4)
    model = load_neuron(tmp_path, batch_size=3)
    # The prompts enter in one order of rows and are continued in another; only the sequence ids tell which is which.
    for step, order in enumerate([[2, 0, 1], [1, 0, 2], [0, 1, 2], [1, 2, 0]]):
        seq_ids = torch.tensor(order)
        if step == 0:
            width = max(map(len, prompts))
            ids = torch.tensor([prompts[i] + [0] * (width - len(prompts[i])) for i in order])
            mask = torch.tensor([[1] * len(prompts[i]) + [0] * (width - len(prompts[i])) for i in order])
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        else:
            ids = expected_tokens[order, step - 1].unsqueeze(1)
            positions = torch.tensor([[len(prompts[i]) + step - 1] for i in order])
            mask = (torch.arange(int(positions.max())) < positions).long()
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, seq_ids=seq_ids).logits
        assert_close(logits[:, -1], expected_logits[order, step], atol=1e-4, rtol=0, label=f"logits of step {step}")


def test_on_device_sampling_returns_the_greedy_tokens(tmp_path: Path) -> None:
    save_reference(tmp_path)
    prompts = random_prompts([5, 9])
    outputs = []
    for options in ({}, {"on_device_sampling_config": OnDeviceSamplingConfig(), "output_logits": True}):
        outputs.append(neuron_greedy(load_neuron(tmp_path, batch_size=2, **options), prompts, 32))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_bfloat16_keeps_decays_norms_and_state_in_float32(tmp_path: Path) -> None:
    reference = save_reference(tmp_path)
    model = load_neuron(tmp_path, torch_dtype=torch.bfloat16)
    module = model.models[0].model
    module.bfloat16()  # what NxDI's to_cpu does to the whole module
    kept = {name for name, p in module.named_parameters() if p.dtype == torch.float32}
    assert any(name.endswith("A_log.weight") for name in kept)
    for name, parameter in module.named_parameters():
        wants_float32 = name.endswith(("A_log.weight", "dt_bias.weight")) or "norm" in name.split(".")[-2]
        if "past_key_values" in name:
            index = int(name.rsplit(".", 1)[1])
            wants_float32 = index % 2 == 0 and index // 2 in model.config.linear_attention_layers
        assert (name in kept) == (wants_float32 and parameter.is_floating_point()), name
    prompts = random_prompts([12])
    _, logits = neuron_greedy(model, prompts, 1)
    _, expected = reference_greedy(reference, prompts, 1)
    # bfloat16 keeps 8 bits: 2**-8 of each of the sums of four layers.
    assert_close(logits, expected, atol=0.15, rtol=0, label="bfloat16 logits")


@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's own compile needs the compiler")
@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_a_dry_run_walks_every_bucket_of_a_rank_and_writes_the_configuration(tp_degree: int, tmp_path: Path) -> None:
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


@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's own compile needs the compiler")
def test_a_checkpoint_that_would_not_load_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint")
    config = Qwen35InferenceConfig.from_pretrained(tmp_path / "checkpoint", intermediate_size=64)
    with pytest.raises(ConversionError, match=r"mlp\.gate_proj\.weight has shape \[96, 64\], expected \[64, 64\]"):
        NeuronQwen35ForCausalLM(str(tmp_path / "checkpoint"), config).compile(str(tmp_path / "compiled"))
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize("tp_degree", [1, 2, 4, 8, 16])
def test_the_checkpoint_of_27b_becomes_the_parameters_of_every_rank(tp_degree: int) -> None:
    """Names, shapes and dtypes only, from the plan through NxDI's hooks and the split to the modules."""
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
