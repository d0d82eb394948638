# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The planner: its counts against arithmetic written out here, its limits against counting, its words and pictures."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.cli.main import main
from qwen35.cli.plan import as_table, recommended_as_markdown, recommended_layout, write_png
from qwen35.configuration_qwen35 import QWEN35_PRESETS, Qwen35ConfigError
from qwen35.hardware import INSTANCES, TRN2_3XLARGE, TRN2_48XLARGE, rank_bandwidth, rank_flops, rank_hbm_bytes
from qwen35.nxdi import NXDI_AVAILABLE
from qwen35.planning.plan import (
    RESERVE,
    Limits,
    Plan,
    _Run,
    _walk,
    count_resident,
    largest,
    layout_of,
    plan,
    require_fits,
    resized,
    walk_buckets,
    work_of,
)
from qwen35.planning.recommended import FIRST_CACHE_BUCKET, FIRST_PROMPT_BUCKET, RECOMMENDED, device_neuron_config
from qwen35.serving.loading import MINI_CHECKPOINT
from support.models import TINY, save_checkpoint

MODEL_ROOT = Path(__file__).parents[2]
needs_stand_ins = pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's layers do not run without a process group")


@pytest.fixture
def outside_any_rank(backend: str) -> None:
    """On NxDI `to_cpu`, of any test before, leaves the process a rank, which cannot take the shapes of another."""
    if NXDI_AVAILABLE:
        from neuronx_distributed.parallel_layers import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()


def application(fields: dict[str, Any], **options: Any) -> NeuronQwen35ForCausalLM:
    settings = {"logical_nc_config": 2, "torch_dtype": torch.bfloat16, **options}
    return NeuronQwen35ForCausalLM(
        "no-such-checkpoint", Qwen35InferenceConfig(Qwen35NeuronConfig(**settings), **fields)
    )


def of_27b(
    seq_len: int = 32768, batch: int = 1, tp_degree: int = 4, prompt_bucket: int | None = None
) -> NeuronQwen35ForCausalLM:
    neuron_config = device_neuron_config(TRN2_48XLARGE, tp_degree, seq_len, batch, prompt_bucket=prompt_bucket)
    config = Qwen35InferenceConfig(neuron_config, **QWEN35_PRESETS["27B"])
    return NeuronQwen35ForCausalLM("no-such-checkpoint", config)


# Heads of 128 dims, so that the kernels take them; a chip's worth of HBM is far more than it needs.
SMALL = {**TINY, "linear_key_head_dim": 128, "linear_value_head_dim": 128}


class TestMemory:
    pytestmark = pytest.mark.usefixtures("outside_any_rank")

    def test_27b_at_tp_4_is_what_the_sizes_of_its_matrices_say(self) -> None:
        counted = count_resident(of_27b()).layout(0)
        weights = counted.weights
        assert weights.embedding == weights.lm_head == 248320 * 5120 * 2 // 4
        assert weights.mlp == 64 * 3 * 5120 * 17408 * 2 // 4
        # Query and gate of 24 heads, key and value of 4, output of 24; two norms in float32, one int32 rank a layer.
        attention = 16 * (5120 * 256 * (24 + 24 + 4 + 4 + 24) * 2 // 4 + 2 * 256 * 4)
        assert weights.attention - attention in range(0, 16 * 4 + 1)
        matrices = 5120 * (2 * 2048 + 2 * 6144 + 2 * 48) + 6144 * 5120 + 4 * 10240  # q, k, v, z, b, a; out; conv
        assert weights.deltanet == 48 * (matrices * 2 // 4 + 2 * 12 * 4 + 128 * 4)
        assert weights.total == pytest.approx(13.45e9, rel=1e-3)
        assert (
            counted.kv_cache == 16 * 2 * (32768 + 128) * 256 * 2
        )  # and room for what is masked, as prompts in chunks need
        assert counted.recurrent_state == 48 * 12 * 128 * 128 * 4
        assert counted.conv_state == 48 * 3 * 2560 * 2

    def test_whole_deltanet_is_the_whole_checkpoints(self) -> None:
        whole, alone = count_resident(of_27b()).layout(0, copies=4), count_resident(of_27b(tp_degree=1)).layout(0)
        # The norms of 128 have a copy on every rank already.
        assert whole.weights.deltanet == alone.weights.deltanet
        assert whole.recurrent_state == alone.recurrent_state and whole.conv_state == alone.conv_state
        assert whole.weights.mlp == count_resident(of_27b()).weights.mlp
        assert whole.kv_cache == 64 * 2 * (32768 + 128) * 256 * 2, "published ports have a KV cache for every layer"

    def test_one_rank_has_nothing_to_replicate(self) -> None:
        counted = count_resident(application(SMALL))
        assert counted.whole_deltanet == counted.weights.deltanet

    @needs_stand_ins
    @settings(max_examples=5)
    @given(length=st.integers(1, 1024), more=st.integers(0, 500), lines=st.integers(1, 6), further=st.integers(0, 4))
    def test_more_context_or_more_lines_never_take_less(self, length: int, more: int, lines: int, further: int) -> None:
        model = application(SMALL, seq_len=64)
        small = layout_of(resized(model, length, lines))
        large = layout_of(resized(model, min(length + more, 1024), lines + further))
        assert small.total <= large.total
        assert small.kv_cache <= large.kv_cache and small.recurrent_state <= large.recurrent_state

    @needs_stand_ins
    @settings(max_examples=4)
    @given(seq_len=st.sampled_from([128, 512, 1024]), bucket=st.sampled_from([32, 128, 512]), lines=st.integers(1, 4))
    def test_a_resized_model_is_the_one_configured_so(self, seq_len: int, bucket: int, lines: int) -> None:
        options = dict(is_continuous_batching=True, ctx_batch_size=1, enable_bucketing=True)
        bucket = min(bucket, seq_len)
        direct = application(SMALL, seq_len=seq_len, max_context_length=bucket, batch_size=lines, **options)
        start = application(SMALL, seq_len=1024, max_context_length=bucket, batch_size=2, **options)
        assert layout_of(resized(start, seq_len, lines)) == layout_of(direct)


@needs_stand_ins
class TestActivations:
    @pytest.mark.parametrize("layers", [12, 6], ids=["three blocks", "no whole block"])
    @pytest.mark.parametrize("options", [dict(batch_size=1), dict(tp_degree=2, batch_size=3)], ids=str)
    def test_blocks_stand_for_all_layers(self, options: dict[str, Any], layers: int) -> None:
        model = application({**SMALL, "num_hidden_layers": layers}, seq_len=512, enable_bucketing=True, **options)
        found = walk_buckets(model)
        assert found == [bucket for bucket, _ in _walk(model, slice(None), 1)]
        assert [(b.submodel, b.bucket) for b in found] == [
            (wrapper.tag, bucket) for wrapper in model.models for bucket in wrapper.neuron_config.buckets
        ]

    @pytest.mark.slow
    def test_blocks_stand_for_all_layers_of_27b_at_256k_tokens(self) -> None:
        model = of_27b(seq_len=262144)
        whole = [bucket for bucket, _ in _walk(model, slice(-1, None), 4)]
        assert walk_buckets(model, slice(-1, None)) == whole and len(whole) == 3

    def test_the_largest_bucket_takes_the_most(self) -> None:
        model = application(SMALL, seq_len=512, enable_bucketing=True, batch_size=2)
        assert layout_of(model).activations == max(bucket.bytes for bucket in walk_buckets(model))

    def test_what_is_alive_at_once_is_counted_and_views_are_not(self) -> None:
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

    def test_a_prompt_counts_its_mlp_and_its_scores(self) -> None:
        found, _ = walk_buckets(of_27b(seq_len=2048, prompt_bucket=2048), slice(-1, None))
        rows = 2048
        mlp = 2 * rows * 4352 * 2 + 2 * rows * 5120 * 2  # gate and up; the stream and its norm
        scores = rows * rows * 6 * (2 + 2 + 4)  # masked scores and their softmax, six heads; PyTorch's own steps
        assert max(mlp, scores) < found.bytes < mlp + 2 * scores

    def test_tiles_of_products_are_counted_by_the_shapes_of_the_factors(self) -> None:
        found, decoding = walk_buckets(of_27b(seq_len=2048, prompt_bucket=2048), slice(-1, None))
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

    def test_the_caches_that_outputs_replace_are_not_counted_twice(self, plan_of_256k: Plan) -> None:
        decoding = [b for b in plan_of_256k.programs if b.submodel == "token_generation_model"]
        # Scores of 6 heads in float32 and bfloat16, and the mask: not the 4.3 GB of the cache.
        assert decoding[-1].bytes < 262144 * 6 * 16


class TestLimits:
    @given(limit=st.integers(1, 3000), fixed=st.integers(0, 10**6), each=st.integers(1, 5000), square=st.integers(0, 9))
    def test_largest_is_the_last_that_fits(self, limit: int, fixed: int, each: int, square: int) -> None:
        calls = []

        def headroom(n: int) -> int:
            calls.append(n)
            return 10**6 - fixed - each * n - square * n * n

        expected = max((n for n in range(1, limit + 1) if headroom(n) >= 0), default=0)
        calls.clear()
        assert largest(headroom, limit) == expected
        assert len(calls) <= (6 if not square else 3 + 2 * math.ceil(math.log2(limit + 1)))

    @needs_stand_ins
    def test_a_step_more_does_not_fit(self, plan_of_256k: Plan) -> None:
        model, replicated = of_27b(seq_len=262144), plan_of_256k.replicated.limits
        assert plan_of_256k.sharded.limits == Limits(context=262144, batch=1)
        assert not layout_of(resized(model, 262144, 2)).fits
        assert layout_of(resized(model, replicated.context, 1), copies=4).fits
        assert not layout_of(resized(model, replicated.context + 128, 1), copies=4).fits


@pytest.fixture(scope="module")
def plan_of_256k() -> Plan:
    """27B at TP=4 in bfloat16, 262,144 tokens, batch 1; of each submodel the largest bucket alone, to save time."""
    neuron_config = device_neuron_config(TRN2_3XLARGE, 4, 262144, 1)
    neuron_config.enable_bucketing = False
    config = Qwen35InferenceConfig(neuron_config, **QWEN35_PRESETS["27B"])
    return plan(NeuronQwen35ForCausalLM("no-such-checkpoint", config), TRN2_3XLARGE)


@needs_stand_ins
class TestPlan:
    def test_27b_at_tp_4_fits_256k_tokens_in_24_gb_of_a_rank(self, plan_of_256k: Plan) -> None:
        found = plan_of_256k
        layout = found.sharded.layout
        assert found.fits and layout.total < 24e9 < layout.hbm == 24 * 2**30
        assert layout.kv_cache == 16 * 2 * (262144 + 128) * 256 * 2
        assert found.valid_tp_degrees == (1, 2, 4)
        # The published layout: 11.1 GB of DeltaNet, and a context that ends long before.
        replicated = found.replicated
        assert replicated.layout.weights.deltanet == pytest.approx(11.12e9, rel=1e-3)
        assert not replicated.layout.fits and replicated.limits.batch == 0
        assert 512 <= replicated.limits.context < 4096
        table = as_table(found)
        assert re.search(r"KV cache +4\.297 +17\.188\n", table)
        assert re.search(r"weights: DeltaNet +2\.781 +11\.124\n", table)
        assert re.search(r"fits +yes +NO\n", table)
        assert re.search(r"longest context at batch 1 +262,144 ", table)
        assert all(word in table for word in ("modelled", "trainium2.rst", "inferred"))

    def test_the_reserve_is_what_the_published_port_used_beyond_what_is_counted(self) -> None:
        counted = layout_of(of_27b(seq_len=128), copies=4)
        assert 0 <= counted.total - 23.57 * 2**30 <= 0.25e9, "rounded up"

    def test_the_vision_encoder_is_planned_on_the_host(self) -> None:
        config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, device_neuron_config(TRN2_3XLARGE, 2, 256, 1))
        found = plan(NeuronQwen35ForCausalLM(str(MINI_CHECKPOINT), config), TRN2_3XLARGE)
        assert found.vision is not None and found.vision.rank is not None
        with safe_open(MINI_CHECKPOINT / "model.safetensors", "pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys() if "visual" in name]
        assert found.vision.host == 2 * sum(sizes)
        assert found.vision.host / 2 < found.vision.rank < found.vision.host, "half of it, and what is not split"


class TestWork:
    pytestmark = pytest.mark.usefixtures("outside_any_rank")

    def test_a_token_at_batch_1_is_bound_by_reading_the_weights(self) -> None:
        model = of_27b()
        work, weights = work_of(model), count_resident(model).weights
        states = 2 * 48 * (12 * 128 * 128 * 4 + 3 * 2560 * 2)
        moved = weights.total - weights.embedding + states
        assert work.tpot(0) == pytest.approx(moved / (2.9e12 / 4))
        assert work.tpot(32768) == pytest.approx((moved + 16 * 2 * 32768 * 256 * 2) / (2.9e12 / 4))
        assert 0.0170 < work.tpot(0) < 0.0186, "the bound of all 54 GB at 2.9 TB/s"

    def test_a_prompt_is_bound_by_its_products(self) -> None:
        work = work_of(of_27b())
        matrices = 64 * 3 * 5120 * 17408 + 16 * 5120 * 256 * 80 + 48 * 5120 * (2 * 2048 + 3 * 6144 + 96) + 48 * 40960
        state, attention = 48 * 48 * 3 * 128 * 128, 16 * 24 * 2 * 256
        flops = 2 * 2048 * (matrices + state) + 2 * attention * (2048 * 2049 // 2) + 2 * 248320 * 5120
        assert work.ttft(2048, 2048) == pytest.approx(flops / 667e12, rel=1e-6)

    @given(tokens=st.integers(1, 5000), piece=st.integers(1, 3000), rows=st.integers(1, 4))
    @settings(max_examples=30)
    def test_a_prompt_in_pieces_does_the_same_products_and_reads_the_weights_again(
        self, tokens: int, piece: int, rows: int
    ) -> None:
        work = WORK
        whole, pieces = work.ttft(tokens, tokens, rows), work.ttft(tokens, piece, rows)
        assert whole <= pieces * (1 + 1e-9)
        assert pieces <= work.ttft(tokens + 1, piece, rows)
        assert work.ttft(tokens, piece, rows) <= work.ttft(tokens, piece, rows + 1)

    def test_whole_deltanet_layers_cost_every_rank_all_of_their_work(self) -> None:
        ours, whole, alone = work_of(of_27b()), work_of(of_27b(), copies=4), work_of(of_27b(tp_degree=1))
        assert whole.state_bytes == alone.state_bytes == 4 * ours.state_bytes
        mlp_and_attention = (alone.token_flops - whole.token_flops) / 3 * 4  # of one rank alone
        assert 4 * ours.token_flops == pytest.approx(alone.token_flops)
        assert mlp_and_attention == pytest.approx(2 * (64 * 3 * 5120 * 17408 + 16 * 5120 * 256 * 80))


WORK = work_of(of_27b())


def test_a_rank_has_its_cores_share_of_a_chip() -> None:
    assert rank_hbm_bytes(2) == 24 * 2**30 == 2 * rank_hbm_bytes(1)
    assert rank_bandwidth(2) == 0.725e12 and rank_flops(2, torch.bfloat16) == 667e12 / 4
    assert rank_flops(2, torch.float32) == 181e12 / 4
    assert TRN2_3XLARGE.ranks(2) == 4 and TRN2_48XLARGE.ranks(2) == 64 and TRN2_48XLARGE.ranks(1) == 128
    assert all(instance.chips.source for instance in INSTANCES.values()) and "23.57" in RESERVE.source


@pytest.mark.usefixtures("outside_any_rank")
class TestBeforeCompiling:
    def refusal(self, **options: Any) -> str:
        fields = {**SMALL, "max_position_embeddings": 262144, "vocab_size": options.pop("vocab_size", 160)}
        with pytest.raises(ValueError) as refused:
            application(fields, instance="trn2.3xlarge", **options).compile("nowhere")
        return str(refused.value)

    @needs_stand_ins
    def test_what_does_not_fit_is_refused_with_what_does(self) -> None:
        message = self.refusal(seq_len=262144, max_context_length=128, batch_size=512)  # 34 GB of KV cache
        assert "seq_len=262144 with kv_cache_batch_size=512 at tp_degree=1 needs" in message
        assert "instance='trn2.3xlarge' has 25.8 GB" in message
        context, batch = map(int, re.findall(r"to at most (\d+)", message))
        model = application({**SMALL, "max_position_embeddings": 262144}, seq_len=262144, max_context_length=128)
        for length, lines, fits in (
            (context, 512, True),
            (context + 128, 512, False),
            (262144, batch, True),
            (262144, batch + 1, False),
        ):
            assert layout_of(resized(model, length, lines)).fits is fits, (length, lines)
        assert "or set tp_degree to 2 or 4; see" in message

    def test_weights_that_leave_no_room_ask_for_another_degree_alone(self) -> None:
        message = self.refusal(vocab_size=120_000_000)
        assert message.endswith("has 25.8 GB: set tp_degree to 2 or 4; see 'qwen35 plan'")

    def test_what_fits_nowhere_asks_for_a_larger_instance(self) -> None:
        assert self.refusal(vocab_size=10**9).endswith("use a larger instance; see 'qwen35 plan'")

    @needs_stand_ins
    def test_a_program_too_long_for_the_compiler_is_warned_of(self) -> None:
        with pytest.warns(UserWarning, match=r"continuation_model, bucket 262144.*prefill_chunk_size=4096"):
            require_fits(of_27b(seq_len=262144, prompt_bucket=4096))

    def test_more_ranks_than_cores_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"tp_degree=8 exceeds the 4 logical cores of trn2\.3xlarge .*: 1, 2, 4"):
            require_fits(application(QWEN35_PRESETS["27B"], instance="trn2.3xlarge", tp_degree=8))

    def test_a_cpu_and_an_unnamed_instance_are_not_checked(self) -> None:
        too_much = dict(QWEN35_PRESETS["27B"])
        for options in (dict(on_cpu=True, instance="trn2.3xlarge", torch_dtype=torch.float32), dict(instance=None)):
            require_fits(application(too_much, seq_len=262144, batch_size=64, max_context_length=128, **options))

    def test_an_unknown_instance_is_refused_with_the_known(self) -> None:
        with pytest.raises(Qwen35ConfigError, match=r"instance='inf2' is unknown; set it to trn2\.3xlarge, trn2\.48xl"):
            application(SMALL, instance="inf2")

    def test_the_instance_is_kept_with_a_compiled_model(self, tmp_path: Path) -> None:
        application(SMALL, instance="trn2.48xlarge").config.save(str(tmp_path))
        assert Qwen35InferenceConfig.load(str(tmp_path)).neuron_config.instance == "trn2.48xlarge"


@pytest.mark.usefixtures("backend")
class TestCommand:
    def plan(self, tmp_path: Path, *arguments: str) -> int:
        save_checkpoint(
            tmp_path / "checkpoint", max_position_embeddings=2048, linear_key_head_dim=128, linear_value_head_dim=128
        )
        return main(["plan", "--model", str(tmp_path / "checkpoint"), "--tp", "2", "--seq-len", "512", *arguments])

    def test_json_says_what_is_modelled_and_where_each_figure_is_from(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.plan(tmp_path, "--json", "--batch", "3", "--prompt-bucket", "256") == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["lines"], printed["prompt_rows"], printed["prompt_bucket"]) == (3, 1, 256)
        ours, whole = printed["this_model"], printed["layout_of_published_ports"]
        assert ours["fits"] and ours["longest_context"] == 2048 and ours["total"] < whole["total"]
        assert set(ours["modelled"]["ttft_s"]) == {"256", "512"}
        assert all(figure["source"] for figure in printed["figures"])
        assert [b["bucket"] for b in printed["programs_modelled"]] == [256, 512, 512]

    def test_a_picture_is_drawn(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("matplotlib")
        assert self.plan(tmp_path, "--png", str(tmp_path / "plan.png")) == 0
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert "trn2.3xlarge, tp_degree=2, LNC=2, bfloat16: 1 x 512 tokens" in capsys.readouterr().out

    @needs_stand_ins
    def test_a_picture_without_matplotlib_says_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan_of_256k: Plan
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ValueError, match=r"pip install 'qwen35-neuron\[plot\]'"):
            write_png(of_27b(), plan_of_256k, tmp_path / "plan.png")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--tp", "3"), ("tp_degree=3", "1, 2, 4, 8, 16")),
            (("--tp", "16"), ("tp_degree=16 exceeds the 4 logical cores", "1, 2, 4")),
            (("--seq-len", "300000"), ("seq_len=300000", "262144")),
            (("--batch", "0"), ("batch_size=0", "positive")),
            (("--model", "/nowhere"), ("/nowhere", "config.json")),
        ],
    )
    def test_errors_name_the_value_and_the_remedy(
        self, arguments: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("qwen35: error:") and not captured.out
        assert all(word in captured.err for word in words)

    @needs_stand_ins
    def test_a_recommended_configuration_is_compiled_by_its_name(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_checkpoint(
            tmp_path / "checkpoint", max_position_embeddings=262144, linear_key_head_dim=128, linear_value_head_dim=128
        )
        arguments = ("--model", str(tmp_path / "checkpoint"), "--recommended", "trn2.3xlarge-batch", "--json")
        assert main(["compile", str(tmp_path / "out"), *arguments]) == 0
        neuron = Qwen35InferenceConfig.load(str(tmp_path / "out")).neuron_config
        assert neuron.context_encoding_buckets == [256, 512, 1024]
        assert neuron.token_generation_buckets == [4096, 8192, 16384, 32768]
        assert (neuron.tp_degree, neuron.seq_len, neuron.prefill_chunk_size) == (4, 32768, 1024)
        assert (neuron.instance, neuron.on_cpu, neuron.torch_dtype) == ("trn2.3xlarge", False, torch.bfloat16)


@needs_stand_ins
class TestRecommended:
    @pytest.mark.parametrize("entry", RECOMMENDED.values(), ids=RECOMMENDED)
    def test_each_fits_its_instance_with_a_gigabyte_to_spare(self, entry: Any) -> None:
        assert recommended_layout(entry.name).headroom > 1e9
        assert entry.replicas >= 1 and entry.name.startswith(entry.instance.name)

    def test_the_readme_shows_them_as_they_are(self) -> None:
        assert recommended_as_markdown() in (MODEL_ROOT / "README.md").read_text()

    @pytest.mark.parametrize("entry", RECOMMENDED.values(), ids=RECOMMENDED)
    def test_the_programs_of_each_are_far_from_too_long_for_the_compiler(self, entry: Any) -> None:
        for program in walk_buckets(of_27b(entry.seq_len, entry.batch, entry.tp_degree), slice(-1, None)):
            assert program.matmuls <= 1.2e6, program

    def test_the_shortest_buckets_wait_for_the_weights(self) -> None:
        work = work_of(of_27b())
        assert work.ttft(FIRST_PROMPT_BUCKET, FIRST_PROMPT_BUCKET) < 1.1 * work.ttft(1, 1)
        assert work.tpot(FIRST_CACHE_BUCKET) < 1.01 * work.tpot(0)

    def test_every_instance_and_degree_has_one(self) -> None:
        covered = {(entry.instance.name, entry.tp_degree) for entry in RECOMMENDED.values()}
        assert covered == {("trn2.3xlarge", 4), *(("trn2.48xlarge", tp) for tp in (4, 8, 16))}
