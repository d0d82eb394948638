# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint on disk must be, and how a broken one is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen35.weights import checkpoint
from qwen35.weights.checkpoint import CheckpointError, CheckpointReader, TensorSpec, lay_out
from support.compare import assert_close

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "c": torch.randn(2, 1, 4, generator=generator).half(),
    }


def sharded(directory: Path, **index_changes: str | None) -> Path:
    """a and b in the first shard, c in the second; `index_changes` rewrite or (None) remove index entries."""
    held = tensors()
    save_file({name: held[name] for name in "ab"}, directory / FIRST)
    save_file({"c": held["c"]}, directory / SECOND)
    weight_map = {"a": FIRST, "b": FIRST, "c": SECOND} | index_changes
    kept = {name: file for name, file in weight_map.items() if file}
    (directory / checkpoint.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    return directory


def refuse(directory: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(directory)
    assert str(directory) in str(caught.value)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def the_only(problems: list[str], *words: str) -> None:
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0], f"{word!r} is not in: {problems[0]}"


@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_are_read_bit_exactly(tmp_path: Path, shards: int) -> None:
    if shards == 1:
        save_file(tensors(), tmp_path / checkpoint.SINGLE_FILE)
    else:
        sharded(tmp_path)
    reader = CheckpointReader(tmp_path)
    assert sorted(reader) == ["a", "b", "c"] and len(reader) == 3
    for name, expected in tensors().items():
        assert reader[name].dtype == expected.dtype
        assert_close(reader[name], expected, label=name)


def test_specs_and_files_come_from_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "safe_open", None)
    reader = CheckpointReader(sharded(tmp_path))
    assert reader.spec("a") == TensorSpec((3, 4), torch.float32) and reader.spec("a").nbytes == 48
    assert reader.spec("b") == TensorSpec((5,), torch.bfloat16) and reader.spec("c").shape == (2, 1, 4)
    assert reader.file_of("c") == tmp_path / SECOND
    assert "a" in reader and "z" not in reader  # asking must not read either


def test_an_unknown_tensor_is_a_key_error(tmp_path: Path) -> None:
    reader = CheckpointReader(sharded(tmp_path))
    for ask in (reader.__getitem__, reader.spec, reader.file_of):
        with pytest.raises(KeyError):
            ask("z")


def test_one_file_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda path, **kw: opened.append(path.name) or real(path, **kw))
    with CheckpointReader(sharded(tmp_path)) as reader:
        for name in ("a", "b", "c", "a"):
            reader[name]
    reader["a"]
    assert opened == [FIRST, SECOND, FIRST, FIRST]  # the last, because the reader was closed in between


@pytest.mark.parametrize("dtype", list(checkpoint._DTYPES.values()), ids=str)
def test_every_dtype_that_checkpoints_use_is_known(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.ones(6).to(dtype)}, tmp_path / checkpoint.SINGLE_FILE)
    assert CheckpointReader(tmp_path).spec("x") == TensorSpec((6,), dtype)


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    save_file({"s": torch.tensor(3.0), "e": torch.empty(0, 4)}, tmp_path / checkpoint.SINGLE_FILE)
    reader = CheckpointReader(tmp_path)
    assert reader.spec("s").shape == () and reader["s"].item() == 3.0 and reader["e"].shape == (0, 4)


def test_a_single_file_is_preferred_to_a_left_over_index(tmp_path: Path) -> None:
    save_file({"only": torch.ones(1)}, sharded(tmp_path) / checkpoint.SINGLE_FILE)
    assert list(CheckpointReader(tmp_path)) == ["only"]


def test_a_tensor_that_the_index_forgot_is_still_found(tmp_path: Path) -> None:
    assert "b" in CheckpointReader(sharded(tmp_path, b=None))


# Refusals


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    the_only(refuse(tmp_path / "nowhere"), "no such directory", "download")


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    the_only(refuse(tmp_path / "file"), "no such directory")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    the_only(refuse(tmp_path), checkpoint.SINGLE_FILE, checkpoint.INDEX_FILE, "download the safetensors files")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00003.bin"])
def test_a_pickled_checkpoint_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80")
    the_only(refuse(tmp_path), "pytorch_model.bin", "convert it to safetensors")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "\x80\x81"]
)
def test_a_corrupt_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / checkpoint.INDEX_FILE).write_text(text, encoding="latin-1")
    the_only(refuse(tmp_path), checkpoint.INDEX_FILE, "corrupt", "download it again")


@pytest.mark.parametrize("name", [checkpoint.SINGLE_FILE, checkpoint.INDEX_FILE])
@pytest.mark.parametrize("loops", [False, True])
def test_a_link_to_nothing_is_named(name: str, loops: bool, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(name if loops else "nothing")
    the_only(refuse(tmp_path), f"{name} is a link to nothing; download it again")


def test_all_missing_shards_are_named_at_once(tmp_path: Path) -> None:
    sharded(tmp_path, c="model-3.safetensors", d="model-4.safetensors")
    the_only(refuse(tmp_path), "model-3.safetensors, model-4.safetensors", "missing", "download")


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4999802720\n"
    (sharded(tmp_path) / SECOND).write_text(pointer)
    the_only(refuse(tmp_path), SECOND, "git-lfs pointer", "git lfs pull")


@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_with_its_sizes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    path = directory / checkpoint.SINGLE_FILE
    save_file(tensors(), path)
    whole = path.read_bytes()
    kept = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:kept])
    problems = refuse(directory)
    the_only(problems, checkpoint.SINGLE_FILE, f"it has {kept}", "fetch model.safetensors again")
    if kept >= 8 + int.from_bytes(whole[:8], "little"):
        the_only(problems, f"its header says {len(whole)} bytes")


def test_bytes_beyond_the_last_tensor_are_refused(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / checkpoint.SINGLE_FILE)
    with (tmp_path / checkpoint.SINGLE_FILE).open("ab") as file:
        file.write(b"tail")
    the_only(refuse(tmp_path), "truncated or corrupt", "it has")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"not json", ("corrupt header",)),
        (b'{"x": 3}', ("corrupt header",)),
        (b"[]", ("corrupt header",)),
        (b'{"x": {"dtype": "F32", "shape": [2]}}', ("corrupt header", "data_offsets")),
        (b'{"x": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}', ("dtype", "F3")),
        (b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', ("x has 8 bytes", "need 12")),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path: Path, header: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / checkpoint.SINGLE_FILE
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    the_only(refuse(tmp_path), checkpoint.SINGLE_FILE, "again", *words)


def test_a_tensor_that_its_shard_lacks_is_known_to_whoever_needs_it(tmp_path: Path) -> None:
    reader = CheckpointReader(sharded(tmp_path, d=SECOND))
    assert reader.listed_only == {"d": SECOND} and "d" not in reader


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    save_file({"c": torch.ones(1), "a": torch.ones(1)}, sharded(tmp_path) / SECOND)
    the_only(refuse(tmp_path), f"a is both in {FIRST} and in {SECOND}", "delete the stale file")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    save_file(
        {"a": torch.ones(1)}, sharded(tmp_path, d="third.safetensors", e="gone.safetensors") / "third.safetensors"
    )
    (tmp_path / SECOND).write_bytes(b"short")
    problems = refuse(tmp_path)
    assert len(problems) == 3
    for word in ("gone.safetensors", f"{SECOND} is truncated", "a is both in"):
        assert any(word in problem for problem in problems), word


# Writing


def test_a_file_written_by_its_layout_is_read_back(tmp_path: Path) -> None:
    held = tensors() | {"d": torch.arange(3, dtype=torch.int32), "e": torch.ones(3, 3).bfloat16()}
    layout = lay_out({name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()})
    path = tmp_path / checkpoint.SINGLE_FILE
    with path.open("wb") as file:
        file.write(layout.header)
        for name in reversed(held):  # any order will do
            file.seek(layout.offsets[name])
            file.write(held[name].view(torch.uint8).numpy())
    assert path.stat().st_size == layout.nbytes
    assert sorted(load_file(path)) == sorted(CheckpointReader(tmp_path)) == sorted(held)
    for name, tensor in load_file(path).items():
        assert_close(tensor, held[name], label=name)
        assert layout.offsets[name] % tensor.dtype.itemsize == 0, f"{name} is not aligned to its dtype"
