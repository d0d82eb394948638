# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Activations and matrix products of a bucket's program, walked on the meta device, against arithmetic written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen35.memory.fit import layout_of
from qwen35.memory.programs import _Run, _walk, walk_buckets
from support.applications import SMALL, application, needs_stand_ins, of_27b, of_27b_at_256k

pytestmark = needs_stand_ins


@pytest.mark.parametrize("layers", [12, 6], ids=["three blocks", "no whole block"])
@pytest.mark.parametrize(
    "options", [dict(batch_size=1), dict(tp_degree=2, batch_size=3), dict(num_speculative_tokens=2)], ids=str
)
def test_blocks_stand_for_all_layers(options: dict[str, Any], layers: int) -> None:
    model = application({**SMALL, "num_hidden_layers": layers}, seq_len=512, enable_bucketing=True, **options)
    found = walk_buckets(model)
    assert found == [bucket for bucket, _ in _walk(model, slice(None), 1)]
    assert [(b.submodel, b.bucket) for b in found] == [
        (wrapper.tag, bucket) for wrapper in model.models for bucket in wrapper.neuron_config.buckets
    ]


@pytest.mark.slow
def test_blocks_stand_for_all_layers_of_27b_at_256k_tokens() -> None:
    model = of_27b(seq_len=262144, attention_kernel="torch")
    whole = [bucket for bucket, _ in _walk(model, slice(-1, None), 4)]
    assert walk_buckets(model, slice(-1, None)) == whole and len(whole) == 3


@pytest.mark.slow
def test_blocks_stand_for_a_little_more_than_all_layers_beside_attention_kernels() -> None:
    """A step's most bytes, 2.5 MB, are then alive where the keys and values of its blocks, 1 KB each, are gone."""
    model = of_27b(seq_len=262144)
    whole = [bucket for bucket, _ in _walk(model, slice(-1, None), 4)]
    found = walk_buckets(model, slice(-1, None))
    assert [program.matmuls for program in found] == [program.matmuls for program in whole]
    for program, walked in zip(found, whole, strict=True):
        assert walked.bytes <= program.bytes <= walked.bytes + 14 * 2 * 256 * 2, program.submodel


def test_the_largest_bucket_takes_the_most() -> None:
    model = application(SMALL, seq_len=512, enable_bucketing=True, batch_size=2)
    assert layout_of(model).activations == max(bucket.bytes for bucket in walk_buckets(model))


def test_drafts_are_walked_where_a_kernel_attends_to_the_cache() -> None:
    """The decoder's layers get caches uncut for it; the MTP head, which has no kernel, gets its own by bucket."""
    fields = {**SMALL, "head_dim": 64, "rope_parameters": {**SMALL["rope_parameters"], "mrope_section": [3, 3, 2]}}
    for kernel in ("nki", "torch"):
        model = application(
            fields, seq_len=512, enable_bucketing=True, num_speculative_tokens=2, attention_kernel=kernel
        )
        buckets = [(wrapper.tag, bucket) for wrapper in model.models for bucket in wrapper.neuron_config.buckets]
        assert [(found.submodel, found.bucket) for found in walk_buckets(model)] == buckets


def test_what_is_alive_at_once_is_counted_and_views_are_not() -> None:
    kept = torch.zeros(100, device="meta")
    with _Run([kept]) as live:
        a = torch.ones(1000, device="meta")  # 4,000 bytes
        view = kept[:50].view(5, 10)
        b = a.view(10, 100)[:5] + 1  # 2,000
        del a
        c = b * 2  # 2,000, after 4,000 were freed
        live.mark()
        c.mul_(3)
    assert view.untyped_storage().nbytes() == 400
    assert live.replay(without=[]) == (6000, [(4000, 0)])
    assert live.replay(without=[b]) == (4000, [(2000, 0)]), "an output that takes a parameter's place"


def test_a_prompt_counts_its_mlp_and_its_scores() -> None:
    found, _ = walk_buckets(of_27b(seq_len=2048, prompt_bucket=2048, attention_kernel="torch"), slice(-1, None))
    rows = 2048
    mlp = 2 * rows * 4352 * 2 + 2 * rows * 5120 * 2  # gate and up; the stream and its norm
    scores = rows * rows * 6 * (2 + 2 + 4)  # masked scores and their softmax, six heads; PyTorch's own steps
    assert max(mlp, scores) < found.bytes < mlp + 2 * scores


def test_tiles_of_products_are_counted_by_the_shapes_of_the_factors() -> None:
    model = of_27b(seq_len=2048, prompt_bucket=2048, attention_kernel="torch")
    found, decoding = walk_buckets(model, slice(-1, None))
    # [rows, k] x [k, n] of a rank: rows stay and 512 columns move, or the other way round.
    matrices = {
        64: [(5120, 4352), (5120, 4352), (4352, 5120)],
        48: [(5120, 2560 + 1536), (5120, 24), (1536, 5120)],
        16: [(5120, 6 * 256), (5120, 6 * 256), (5120, 256), (5120, 256), (6 * 256, 5120)],
    }
    # Queries by keys over 256 dims; of the weights by the values, over 2,048 keys, the values stay.
    scores = 16 * 6 * (2 * 16 * 4 + 16 * 2 * 4)
    head = 40 * -(-248320 // 4 // 512)  # one token stays, the weights move past it

    def tiles(k: int, n: int) -> int:
        return -(-k // 128) * min(16 * -(-n // 512), -(-n // 128) * 4)

    expected = sum(layers * sum(tiles(*shape) for shape in shapes) for layers, shapes in matrices.items())
    assert found.matmuls == expected + scores + head
    assert head < decoding.matmuls < 0.1 * found.matmuls
    by_kernel, _ = walk_buckets(of_27b(seq_len=2048, prompt_bucket=2048), slice(-1, None))
    assert by_kernel.matmuls == expected + head, "what is inside a kernel is not counted"
    assert by_kernel.bytes < found.bytes, "a kernel keeps its scores on chip"


def test_the_caches_that_outputs_replace_are_not_counted_twice() -> None:
    decoding = [b for b in walk_buckets(of_27b_at_256k()) if b.submodel == "token_generation_model"]
    # Scores of 6 heads in float32 and bfloat16, and the mask: not the 4.3 GB of the cache.
    assert decoding[-1].bytes < 262144 * 6 * 16


@pytest.mark.usefixtures("library_is_there")
def test_products_in_the_librarys_mlp_are_none_of_the_compilers() -> None:
    options = dict(seq_len=2048, prompt_bucket=2048, attention_kernel="torch")
    (prompt, plain), (same_prompt, by_kernel) = (
        walk_buckets(of_27b(**options, mlp_kernel=kernel), slice(-1, None)) for kernel in ("torch", "nki")
    )
    # One row times a matrix: the row stays, 512 columns move; or tiles of the matrix stay and one column moves.
    tiles = sum(k // 128 * -(-n // 512) for k, n in [(5120, 4352), (5120, 4352), (4352, 5120)])
    assert plain.matmuls - by_kernel.matmuls == 64 * tiles
    assert same_prompt.matmuls == prompt.matmuls
