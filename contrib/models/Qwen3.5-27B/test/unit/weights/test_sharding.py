# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""One file per rank, written tensor by tensor: the bytes that whole ranks in memory have, or no file at all."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.nxdi import NXDI_AVAILABLE, as_rank
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.vision.application import NeuronQwen35VisionForImageEncoding, Qwen35VisionInferenceConfig
from qwen35.weights import conversion, sharding
from qwen35.weights.checkpoint import CheckpointReader
from qwen35.weights.sharding import StreamedSharding
from qwen35.weights.text_rules import conversion_plan
from support.compare import assert_close

if NXDI_AVAILABLE:
    from neuronx_distributed.trace.trace import get_sharded_checkpoint
else:
    from nxdi_cpu.sharding import get_sharded_checkpoint

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_convert.py"
# On 4 ranks: 45 words are padded to 48, 6 query heads to 8, and each of the 2 KV heads is on two ranks.
UNEVEN: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 45,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 4,
    "rope_theta": 1e4,
}


def make_model(directory: Path, tp_degree: int = 2, tied: bool = False, **options: Any) -> NeuronQwen35ForCausalLM:
    """An application over a random bfloat16 checkpoint that is written to `directory`."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(UNEVEN | {"tie_word_embeddings": tied}))
    neuron_config = Qwen35NeuronConfig(tp_degree=tp_degree, save_sharded_checkpoint=True, **options)
    config = Qwen35InferenceConfig.from_pretrained(directory, neuron_config=neuron_config)
    shapes = {name: shape for rule in conversion_plan(config) for name, shape in rule.sources.items()}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, directory / "model.safetensors")
    return NeuronQwen35ForCausalLM(str(directory), config)


def shard(model: StreamedSharding, compiled: Path) -> list[dict[str, torch.Tensor]]:
    """What the files hold, by rank."""
    model.shard_weights(str(compiled))
    files = sorted((compiled / "weights").iterdir())
    return [load_file(file) for file in files]


def fail_at(call: int, error: BaseException) -> Callable[..., None]:
    """NxD's splitting, raising `error` at the given call."""
    calls, real = 0, sharding.shard_children

    def split(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        real(*args)

    return split


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("tied", "weights_dtype"), [(False, None), (True, None), (False, "fp8")])
@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_each_file_holds_what_the_rank_gets_when_all_is_in_memory(
    tmp_path: Path, rank_pool: Any, tp_degree: int, tied: bool, weights_dtype: str | None
) -> None:
    rank_pool(1).call(compare_decoder_with_whole_ranks, tmp_path, tp_degree, tied, weights_dtype=weights_dtype)


@pytest.mark.usefixtures("backend", "outside_any_rank", "library_is_there")
@pytest.mark.parametrize("weights_dtype", [None, "fp8"])
@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_the_mlps_of_the_librarys_kernel_have_the_transposes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp_degree: int, weights_dtype: str | None
) -> None:
    monkeypatch.setitem(UNEVEN, "hidden_size", 128)
    options = dict(torch_dtype=torch.bfloat16, logical_nc_config=1, weights_dtype=weights_dtype)
    files = []
    for kernel in ("torch", "nki"):
        torch.manual_seed(0)  # both have the same checkpoint
        model = make_model(tmp_path / kernel, tp_degree, **options, mlp_kernel=kernel)
        files.append(shard(model, tmp_path / f"{kernel}-ranks"))
    for of_plain, of_kernel in zip(*files, strict=True):
        assert of_kernel.keys() == of_plain.keys()
        transposed = {name for name in of_plain if ".mlp." in name}
        assert len(transposed) == 4 * 3 * (2 if weights_dtype else 1)
        for name, tensor in of_plain.items():
            if name in transposed:
                tensor = tensor.T.expand(128, -1) if name.endswith("scale") else tensor.T
            assert of_kernel[name].dtype == tensor.dtype
            assert torch.equal(of_kernel[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("tp_degree", [1, 4])
def test_the_mtp_head_is_split_in_the_same_way(tmp_path: Path, rank_pool: Any, tp_degree: int) -> None:
    rank_pool(1).call(compare_decoder_with_whole_ranks, tmp_path, tp_degree, False, num_speculative_tokens=1)


def compare_decoder_with_whole_ranks(directory: Path, tp_degree: int, tied: bool, **options: Any) -> None:
    compare_with_whole_ranks(make_model(directory / "checkpoint", tp_degree, tied, **options), directory)


def compare_with_whole_ranks(model: StreamedSharding, directory: Path) -> None:
    tp_degree = model.neuron_config.tp_degree
    with as_rank(0, tp_degree), torch.device("meta"):
        module = model._model_cls(model.config)
    written = shard(model, directory / "compiled")
    assert len(written) == tp_degree
    for rank, tensors in enumerate(written):
        expected = model.checkpoint_loader_fn()
        get_sharded_checkpoint(expected, module, rank, tp_degree)
        assert sorted(tensors) == sorted(expected)
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype, name
            assert_close(bits(tensor), bits(expected[name]), label=f"{name} of rank {rank}")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """torch compares no fp8 tensors."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("tp_degree", [1, 2])
def test_the_vision_encoder_is_split_in_the_same_way(tmp_path: Path, rank_pool: Any, tp_degree: int) -> None:
    rank_pool(1).call(compare_vision_with_whole_ranks, tmp_path, tp_degree)


def compare_vision_with_whole_ranks(directory: Path, tp_degree: int) -> None:
    neuron_config = Qwen35NeuronConfig(tp_degree=tp_degree, save_sharded_checkpoint=True)
    config = Qwen35VisionInferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config)
    compare_with_whole_ranks(NeuronQwen35VisionForImageEncoding(str(MINI_CHECKPOINT), config), directory)


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_a_tied_embedding_is_split_by_columns_and_its_head_by_rows(tmp_path: Path, tp_degree: int) -> None:
    model = make_model(tmp_path / "checkpoint", tp_degree, tied=True)
    source = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert "lm_head.weight" not in source
    table = source["embed_tokens.weight"]
    rows = torch.cat([table, table.new_zeros(-45 % tp_degree, 16)]).chunk(tp_degree)
    for rank, tensors in enumerate(shard(model, tmp_path / "compiled")):
        assert_close(tensors["embed_tokens.weight"], table.chunk(tp_degree, dim=1)[rank], label="embedding")
        assert_close(tensors["lm_head.weight"], rows[rank], label="head")


def test_only_the_ranks_of_this_machine_are_written(tmp_path: Path) -> None:
    everywhere = shard(make_model(tmp_path / "checkpoint", 4), tmp_path / "all")
    torch.manual_seed(0)  # the same weights again
    here = make_model(tmp_path / "checkpoint", 4, start_rank_id=2, local_ranks_size=2)
    for tensors, expected in zip(shard(here, tmp_path / "here"), everywhere[2:], strict=True):
        for name in expected:
            assert_close(tensors[name], expected[name], label=name)
    names = [f"tp{rank}_sharded_checkpoint.safetensors" for rank in (2, 3)]
    assert sorted(file.name for file in (tmp_path / "here" / "weights").iterdir()) == names


def test_each_source_tensor_is_read_once_for_each_tensor_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "checkpoint", 4, tied=True)
    reads: Counter[str] = Counter()
    real = CheckpointReader.__getitem__
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda self, name: reads.update([name]) or real(self, name))
    shard(model, tmp_path / "compiled")
    twice = {"embed_tokens.weight", "layers.3.self_attn.q_proj.weight"}  # and the head, and the gate
    assert {name for name, count in reads.items() if count == 2} == twice
    assert reads.total() == len(CheckpointReader(tmp_path / "checkpoint")) + 2


def test_tensors_are_let_go_before_the_next_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = weakref.WeakSet[torch.Tensor](), 0
    real = conversion._builder

    def watched(*args: Any) -> Callable[[], torch.Tensor]:
        def build() -> torch.Tensor:
            nonlocal most
            alive.add(tensor := real(*args)())
            most = max(most, len(alive))
            return tensor

        return build

    monkeypatch.setattr(conversion, "_builder", watched)
    shard(make_model(tmp_path / "checkpoint"), tmp_path / "compiled")
    assert most == 3, "q, k and v belong to one hook, everything else goes by itself"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_what_stops_half_way_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model = make_model(tmp_path / "checkpoint")
    compiled = tmp_path / "compiled"
    monkeypatch.setattr(sharding, "shard_children", fail_at(21, error))
    with pytest.raises(type(error)):
        model.shard_weights(str(compiled))
    assert list(compiled.iterdir()) == []


def test_what_stops_half_way_leaves_earlier_files_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shard(make_model(tmp_path / "checkpoint"), tmp_path / "compiled")
    again = make_model(tmp_path / "checkpoint")  # other weights
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(sharding, "shard_children", fail_at(21, OSError("disk full")))
        shard(again, tmp_path / "compiled")
    files = sorted((tmp_path / "compiled").rglob("*.safetensors"))
    assert [path.name for path in (tmp_path / "compiled").iterdir()] == ["weights"] and len(files) == 2
    for file, tensors in zip(files, before, strict=True):
        for name, tensor in load_file(file).items():
            assert_close(tensor, tensors[name], label=name)
    after = shard(again, tmp_path / "compiled")
    assert not torch.equal(after[0]["lm_head.weight"], before[0]["lm_head.weight"])


def test_too_small_a_disk_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "checkpoint")
    shard(model, tmp_path / "fits")
    needed = sum(file.stat().st_size for file in (tmp_path / "fits" / "weights").iterdir())
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr(sharding.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match=f"2 ranks need {needed} bytes, the disk has {needed - 1} free; make room for 1"):
        model.shard_weights(str(tmp_path / "compiled"))
    assert list((tmp_path / "compiled").iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, "layers.0.mlp.up_proj.weight: no tensor"),
        (torch.ones(48, 16), r"up_proj.weight: the checkpoint gives rank 0 torch.float32 \(24, 16\).*torch.bfloat16"),
    ],
)
def test_a_tensor_that_is_not_the_modules_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: torch.Tensor | None, words: str
) -> None:
    model = make_model(tmp_path / "checkpoint")
    checkpoint = model.checkpoint_loader_fn()
    monkeypatch.setattr(model, "checkpoint_loader_fn", lambda: checkpoint)
    if tensor is None:
        del checkpoint["layers.0.mlp.up_proj.weight"]
    else:
        checkpoint["layers.0.mlp.up_proj.weight"] = tensor
    with pytest.raises(ValueError, match=words):
        model.shard_weights(str(tmp_path / "compiled"))


@pytest.mark.parametrize(("written", "loaded"), [(None, "fp8"), ("fp8", None)])
def test_files_of_another_dtype_are_refused_at_load(tmp_path: Path, written: str | None, loaded: str | None) -> None:
    """A bfloat16 weight below a module that scales fp8 ones would run, and give garbage."""
    shard(make_model(tmp_path / "checkpoint", 1, weights_dtype=written), tmp_path / "compiled")
    model = make_model(tmp_path / "checkpoint", 1, weights_dtype=loaded)
    with pytest.raises(ValueError, match=r"written for another configuration .*weight is torch") as caught:
        model.load(str(tmp_path / "compiled"))
    assert "torch.float8_e4m3fn" in str(caught.value) and "convert it anew" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_scale_is_refused_at_load(tmp_path: Path) -> None:
    model = make_model(tmp_path / "checkpoint", 1, weights_dtype="fp8")
    (tensors,) = shard(model, tmp_path / "compiled")
    del tensors["layers.0.mlp.up_proj.scale"]
    save_file(tensors, tmp_path / "compiled" / "weights" / "tp0_sharded_checkpoint.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.scale is missing, the module declares torch.float32"):
        model.load(str(tmp_path / "compiled"))


@pytest.mark.parametrize("options", [{"save_sharded_checkpoint": False}, {"skip_sharding": True}])
def test_nothing_is_written_unless_asked_for_but_the_hook_is_called(tmp_path: Path, options: dict[str, bool]) -> None:
    model, called = make_model(tmp_path / "checkpoint"), []
    for name, value in options.items():
        setattr(model.neuron_config, name, value)
    model.shard_weights(str(tmp_path / "compiled"), pre_shard_weights_hook=called.append)
    assert called == [model] and not (tmp_path / "compiled").exists()


@pytest.mark.slow
def test_converting_4_gb_takes_far_less_memory_than_a_shard_and_a_rank(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--json", "--directory", str(tmp_path)]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert figures["source"] >= 4e9 and figures["bound"] == figures["largest_shard"] + figures["written"]
    assert figures["resident"] <= figures["bound"], figures
    # The largest tensor that is made of others, and a rank's block of the embedding: 0.17 and 0.16 GB.
    assert figures["anonymous"] <= 0.4e9 <= figures["bound"], figures
    assert list(tmp_path.iterdir()) == []
