# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes of a rank against arithmetic written out here, what fits against counting, and the check of `compile`."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35 import NeuronQwen35ForCausalLM, Qwen35InferenceConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS, Qwen35ConfigError
from qwen35.memory import fit
from qwen35.memory.fit import (
    RESERVE,
    Limits,
    count_resident,
    largest,
    layout_of,
    limits,
    require_fits,
    resized,
)
from support.applications import SMALL, application, install_neuron_ls, needs_stand_ins, of_27b, of_27b_at_256k


class TestLayout:
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
    @given(length=st.integers(1, 1024), more=st.integers(0, 500), slots=st.integers(1, 6), further=st.integers(0, 4))
    def test_more_context_or_more_slots_never_take_less(self, length: int, more: int, slots: int, further: int) -> None:
        model = application(SMALL, seq_len=64)
        small = layout_of(resized(model, length, slots))
        large = layout_of(resized(model, min(length + more, 1024), slots + further))
        assert small.total <= large.total
        assert small.kv_cache <= large.kv_cache and small.recurrent_state <= large.recurrent_state

    @needs_stand_ins
    @settings(max_examples=4)
    @given(seq_len=st.sampled_from([128, 512, 1024]), bucket=st.sampled_from([32, 128, 512]), slots=st.integers(1, 4))
    def test_a_resized_model_is_the_one_configured_so(self, seq_len: int, bucket: int, slots: int) -> None:
        options = dict(is_continuous_batching=True, ctx_batch_size=1, enable_bucketing=True)
        bucket = min(bucket, seq_len)
        direct = application(SMALL, seq_len=seq_len, max_context_length=bucket, batch_size=slots, **options)
        start = application(SMALL, seq_len=1024, max_context_length=bucket, batch_size=2, **options)
        assert layout_of(resized(start, seq_len, slots)) == layout_of(direct)

    @needs_stand_ins
    def test_the_reserve_is_what_the_published_port_used_beyond_what_is_counted(self) -> None:
        counted = layout_of(of_27b(seq_len=128), copies=4)
        assert 0 <= counted.total - 23.57 * 2**30 <= 0.25e9, "rounded up"
        assert "23.57" in RESERVE.source


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
    def test_a_step_more_does_not_fit(self) -> None:
        model, activations = of_27b(seq_len=262144), layout_of(of_27b_at_256k()).activations
        assert limits(of_27b_at_256k(), activations) == Limits(context=262144, batch=1)
        replicated = limits(of_27b_at_256k(), activations, copies=4)
        assert not layout_of(resized(model, 262144, 2)).fits
        assert layout_of(resized(model, replicated.context, 1), copies=4).fits
        assert not layout_of(resized(model, replicated.context + 128, 1), copies=4).fits


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
        for length, slots, fits in (
            (context, 512, True),
            (context + 128, 512, False),
            (262144, batch, True),
            (262144, batch + 1, False),
        ):
            assert layout_of(resized(model, length, slots)).fits is fits, (length, slots)
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

    def test_a_subclass_from_elsewhere_is_checked_as_the_class_that_another_process_can_import(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Subclass(NeuronQwen35ForCausalLM):
            pass

        sent: list[Any] = []
        monkeypatch.setattr(fit, "on_stand_ins", lambda function, *args: sent.extend((function, *args)))
        require_fits(Subclass("no-such-checkpoint", application(SMALL, instance="trn2.3xlarge").config))
        assert pickle.loads(pickle.dumps(sent[:2])) == [fit._require_fits, NeuronQwen35ForCausalLM]

    def test_a_cpu_and_an_unnamed_instance_are_not_checked(self) -> None:
        too_much = dict(QWEN35_PRESETS["27B"])
        for options in (dict(on_cpu=True, instance="trn2.3xlarge", torch_dtype=torch.float32), dict(instance=None)):
            require_fits(application(too_much, seq_len=262144, batch_size=64, max_context_length=128, **options))

    @pytest.fixture
    def on_trn2_3xlarge(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install_neuron_ls(tmp_path, json.dumps([{"memory_size": 96 * 2**30}]))
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    @pytest.mark.usefixtures("on_trn2_3xlarge")
    def test_what_does_not_fit_a_detected_instance_is_warned_of(self) -> None:
        told = (
            r"^this machine is a trn2\.3xlarge, and nothing else is named: seq_len=128 .* set tp_degree to 2 or 4; see"
        )
        with pytest.warns(UserWarning, match=told):
            require_fits(application({**SMALL, "vocab_size": 120_000_000}))
        with pytest.warns(UserWarning, match="tp_degree=8 exceeds the 4 logical cores of trn2.3xlarge"):
            require_fits(application(QWEN35_PRESETS["27B"], tp_degree=8))

    @pytest.mark.usefixtures("on_trn2_3xlarge")
    def test_what_fits_a_detected_instance_is_not_spoken_of_nor_is_a_cpu(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            require_fits(application(SMALL))
            require_fits(application(SMALL, instance="trn2.3xlarge"))
            require_fits(application(QWEN35_PRESETS["27B"], on_cpu=True, torch_dtype=torch.float32))

    @pytest.mark.usefixtures("on_trn2_3xlarge")
    def test_a_named_instance_that_is_not_this_machine_is_warned_of_and_what_does_not_fit_it_refused(self) -> None:
        with pytest.warns(UserWarning, match=r"this machine is a trn2\.3xlarge: instance='trn2\.48xlarge' is what the"):
            require_fits(application(SMALL, instance="trn2.48xlarge"))
        with pytest.raises(ValueError, match=r"needs .* GB of HBM per rank, instance='trn2\.3xlarge' has 25\.8"):
            require_fits(application({**SMALL, "vocab_size": 120_000_000}, instance="trn2.3xlarge"))

    def test_an_unknown_instance_is_refused_with_the_known(self) -> None:
        with pytest.raises(Qwen35ConfigError, match=r"instance='inf2' is unknown; set it to trn2\.3xlarge, trn2\.48xl"):
            application(SMALL, instance="inf2")

    def test_the_instance_is_kept_with_a_compiled_model(self, tmp_path: Path) -> None:
        application(SMALL, instance="trn2.48xlarge").config.save(str(tmp_path))
        assert Qwen35InferenceConfig.load(str(tmp_path)).neuron_config.instance == "trn2.48xlarge"
