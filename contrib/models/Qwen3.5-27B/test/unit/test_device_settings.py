# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The device settings file: what is read is what was written, what is wrong is one line, and what `auto` becomes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qwen35
from qwen35 import Qwen35ConfigError, Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS
from qwen35.configuration_qwen35_vl import QWEN35_VISION_PRESETS, Qwen35VLInferenceConfig
from qwen35.device_settings import FEATURES, DeviceSettings, read_settings, warn_once, write_settings
from qwen35.kernel_selection import (
    ATTENTION_PHASES,
    KERNEL_CHOICES,
    KERNEL_ENVIRONMENT,
    DeltaNetInverse,
    DeltaNetKernel,
    MLPKernel,
    select_deltanet_inverse,
    select_deltanet_kernel,
    select_mlp_kernel,
)

DOCUMENT = Path(qwen35.__file__).parents[2] / "docs" / "device_settings.md"
REMEDY = "; correct it, or let the self-test write it anew"


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No override in the environment, and nothing said yet."""
    for name in KERNEL_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    warn_once.cache_clear()


def written(path: Path, kernels: dict[str, Any], failing: dict[str, str] | None = None) -> Path:
    write_settings(path / "trn2.json", DeviceSettings(kernels, failing or {}))
    return path / "trn2.json"


def config(**options: Any) -> Qwen35InferenceConfig:
    return Qwen35InferenceConfig(Qwen35NeuronConfig(**options), **QWEN35_PRESETS["27B"])


by_phase = st.dictionaries(st.sampled_from(ATTENTION_PHASES), st.sampled_from(KERNEL_CHOICES["attention_kernel"]))
any_kernels = st.fixed_dictionaries(
    {},
    optional={name: st.sampled_from(choices) for name, choices in KERNEL_CHOICES.items()}
    | {"attention_kernel": st.sampled_from(KERNEL_CHOICES["attention_kernel"]) | by_phase},
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class TestFile:
    @given(
        kernels=any_kernels,
        failing=st.dictionaries(st.sampled_from([*FEATURES]), st.text(min_size=1)),
        made=st.dictionaries(st.text(), json_values, max_size=4),
    )
    def test_what_is_read_is_what_was_written(
        self, kernels: dict[str, Any], failing: dict[str, str], made: dict[str, Any], tmp_path_factory: Any
    ) -> None:
        settings = DeviceSettings(kernels, failing, made)
        path = tmp_path_factory.getbasetemp() / "round_trip" / "settings.json"
        write_settings(path, settings)
        assert read_settings(path) == settings and read_settings(str(path)).digest == settings.digest
        assert json.loads(path.read_text())["format"] == 1 and [*path.parent.iterdir()] == [path]

    def test_the_digest_is_that_of_what_is_said(self, tmp_path: Path) -> None:
        file = written(tmp_path, {"mlp_kernel": "nki", "deltanet_kernel": "torch"})
        digest = read_settings(file).digest
        file.write_text(json.dumps(json.loads(file.read_text()), indent=7, sort_keys=True))
        assert read_settings(file).digest == digest and re.fullmatch("[0-9a-f]{64}", digest)
        assert read_settings(written(tmp_path, {"mlp_kernel": "torch", "deltanet_kernel": "torch"})).digest != digest

    def test_what_cannot_be_written_leaves_the_file_that_is_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = written(tmp_path, {"mlp_kernel": "nki"})
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            written(tmp_path, {"mlp_kernel": "torch"})
        assert read_settings(file).kernels == {"mlp_kernel": "nki"} and [*tmp_path.iterdir()] == [file]

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ("", "is not valid JSON (Expecting value: line 1 column 1 (char 0))" + REMEDY),
            ("{'format': 1}", "is not valid JSON (Expecting property name"),
            ("[]", "holds a list, not an object" + REMEDY),
            ("{}", ": format=None must be 1" + REMEDY),
            ('{"format": true}', ": format=True must be 1" + REMEDY),
            ('{"format": 0}', ": format=0 must be 1" + REMEDY),
            ('{"format": 2, "new": 1}', ": format=2 is newer than 1, which is read here; update this package, or let"),
            ('{"format": 1, "kernel": {}}', ": 'kernel' is unknown" + REMEDY),
            ('{"format": 1, "kernels": ["fused"]}', ": kernels=['fused'] must be an object" + REMEDY),
            ('{"format": 1, "kernels": null}', ": kernels=None must be an object" + REMEDY),
            (
                '{"format": 1, "kernels": {"kernel": "fused"}}',
                ": kernels: 'kernel' is unknown; it has deltanet_kernel,",
            ),
            (
                '{"format": 1, "kernels": {"deltanet_kernel": "fast", "mlp_kernel": []}}',
                ": kernels: deltanet_kernel='fast' must be one of auto, fused, looped, chunked, recurrent, torch; "
                "kernels: mlp_kernel=[] must be one of auto, torch, nki" + REMEDY,
            ),
            (
                '{"format": 1, "kernels": {"attention_kernel": {"decode": "nki", "continuation": 1}}}',
                ": kernels: attention_kernel['decode'] is no phase; it has context_encoding, continuation, token_genera"
                "tion; kernels: attention_kernel['continuation']=1 must be one of auto, nki, torch" + REMEDY,
            ),
            (
                '{"format": 1, "kernels": {"deltanet_inverse": {"continuation": "plain"}}}',
                ": kernels: deltanet_inverse={'continuation': 'plain'} must be one of auto, tiled, plain" + REMEDY,
            ),
            ('{"format": 1, "failing": ["vision"]}', ": failing=['vision'] must be an object" + REMEDY),
            ('{"format": 1, "failing": {"sight": "x"}}', ": failing: 'sight' is unknown; it has vision, speculation,"),
            ('{"format": 1, "failing": {"vision": ""}}', ": failing: vision='' must be the reason, as text" + REMEDY),
            ('{"format": 1, "failing": {"vision": true}}', ": failing: vision=True must be the reason"),
            ('{"format": 1, "made": "by me"}', ": made='by me' must be an object" + REMEDY),
            ('{"format": 1, "made": {"seconds": NaN}}', ": made={'seconds': nan} must be in values that JSON has"),
            ("[" * 100_000, "is not valid JSON (nested more than 32 levels deep)" + REMEDY),
        ],
        ids=lambda text: text[:50],
    )
    def test_what_is_wrong_with_a_file_is_one_line(self, content: str, told: str, tmp_path: Path) -> None:
        (tmp_path / "trn2.json").write_text(content)
        with pytest.raises(ValueError) as refused:
            read_settings(tmp_path / "trn2.json")
        message = str(refused.value)
        assert message.startswith(f"{tmp_path / 'trn2.json'}") and told in message and message.isprintable()

    @given(fields=st.dictionaries(st.sampled_from(["made", "kernels", "failing", "x"]), json_values))
    def test_any_object_is_read_or_refused_in_one_line(self, fields: dict[str, Any], tmp_path_factory: Any) -> None:
        path = tmp_path_factory.getbasetemp() / "any_object.json"
        path.write_text(json.dumps({"format": 1, **fields}))
        try:
            read_settings(path)
        except ValueError as error:
            assert str(error).isprintable() and str(path) in str(error)

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        told = f"settings={tmp_path}/trn2.json does not exist; name a file that the self-test wrote"
        with pytest.raises(ValueError, match=re.escape(told)):
            Qwen35NeuronConfig(settings=tmp_path / "trn2.json")
        with pytest.raises(ValueError, match="is not a file but a directory"):
            read_settings(tmp_path)

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (({"deltanet_kernel": "fast"},), "deltanet_kernel='fast' must be one of"),
            (({}, {"vision": None}), "vision=None must be the reason"),
            (({}, {}, {"by": Path("x")}), "must be in values that JSON has"),
        ],
    )
    def test_wrong_settings_are_refused_when_they_are_made(self, arguments: tuple[Any, ...], told: str) -> None:
        with pytest.raises(ValueError, match=re.escape(told)):
            DeviceSettings(*arguments)

    def test_the_document_has_an_example_and_every_feature(self, tmp_path: Path) -> None:
        text = DOCUMENT.read_text(encoding="utf-8")
        example = re.search(r"```json\n(.*?)```", text, re.DOTALL)
        assert example is not None
        (tmp_path / "example.json").write_text(example[1])
        assert {*read_settings(tmp_path / "example.json").kernels} == {*KERNEL_CHOICES}
        assert [*FEATURES] == re.findall(
            r"^\| `(\w+)` \|", text.split("feature in `failing`")[1].split("\n\n")[0], re.M
        )


ALL = {"deltanet_kernel": "looped", "deltanet_inverse": "plain", "attention_kernel": "torch", "mlp_kernel": "torch"}


class TestWhatAutoIs:
    def test_without_settings_it_is_the_documented_default(self) -> None:
        neuron = Qwen35NeuronConfig()
        kept = (neuron.deltanet_kernel, neuron.deltanet_inverse, neuron.attention_kernel, neuron.mlp_kernel)
        assert kept == ("auto", "tiled", "auto", "torch") and neuron.device_settings is None
        assert vars(Qwen35NeuronConfig(deltanet_inverse="auto", mlp_kernel="auto")) == vars(neuron)
        neuron.deltanet_inverse = neuron.mlp_kernel = "auto"  # set later: the same
        later = Qwen35InferenceConfig(neuron, **QWEN35_PRESETS["27B"])
        assert select_deltanet_inverse(later) is DeltaNetInverse.TILED and select_mlp_kernel(later) is MLPKernel.TORCH

    @pytest.mark.parametrize(
        ("field", "explicit", "in_file", "expected"),
        [
            ("deltanet_kernel", None, "looped", "looped"),
            ("deltanet_kernel", "auto", "looped", "looped"),
            ("deltanet_kernel", DeltaNetKernel.AUTO, "looped", "looped"),
            ("deltanet_kernel", "torch", "looped", "torch"),
            ("deltanet_kernel", None, "auto", "auto"),
            ("deltanet_kernel", None, None, "auto"),
            ("deltanet_inverse", None, "plain", "plain"),
            ("deltanet_inverse", "auto", "plain", "plain"),
            ("deltanet_inverse", DeltaNetInverse.TILED, "plain", "tiled"),
            ("deltanet_inverse", None, "auto", "tiled"),
            ("deltanet_inverse", None, None, "tiled"),
            ("mlp_kernel", None, "nki", "nki"),
            ("mlp_kernel", "torch", "nki", "torch"),
            ("mlp_kernel", None, None, "torch"),
            ("attention_kernel", None, None, "auto"),
            ("attention_kernel", None, "auto", "auto"),
            ("attention_kernel", "nki", {"continuation": "torch"}, "nki"),
            ("attention_kernel", None, "torch", dict.fromkeys(ATTENTION_PHASES, "torch")),
            (
                "attention_kernel",
                None,
                {"continuation": "torch"},
                {"context_encoding": "auto", "continuation": "torch", "token_generation": "auto"},
            ),
            (
                "attention_kernel",
                {"continuation": "nki", "token_generation": "auto"},
                "torch",
                {"context_encoding": "torch", "continuation": "nki", "token_generation": "torch"},
            ),
        ],
    )
    def test_an_argument_goes_before_the_file_and_the_file_before_the_default(
        self, field: str, explicit: Any, in_file: Any, expected: Any, tmp_path: Path
    ) -> None:
        file = written(tmp_path, {} if in_file is None else {field: in_file})
        neuron = Qwen35NeuronConfig(settings=file, **({} if explicit is None else {field: explicit}))
        assert getattr(neuron, field) == expected

    @pytest.mark.parametrize(("name", "kernel"), KERNEL_ENVIRONMENT.items())
    def test_the_environment_goes_before_the_file(
        self, name: str, kernel: DeltaNetKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = written(tmp_path, {"deltanet_kernel": "looped"})
        assert select_deltanet_kernel(config(settings=file)) is DeltaNetKernel.LOOPED
        monkeypatch.setenv(name, "1")
        assert select_deltanet_kernel(config(settings=file)) is kernel

    def test_a_saved_configuration_has_the_kernels_and_needs_no_file(self, tmp_path: Path) -> None:
        file = written(tmp_path, ALL, {"speculation": "NCC_EBVF030"})
        digest = read_settings(file).digest
        config(settings=file).save(tmp_path)
        file.unlink()
        neuron = Qwen35InferenceConfig.load(tmp_path).neuron_config
        by_phase = dict.fromkeys(ATTENTION_PHASES, "torch")
        assert {name: getattr(neuron, name) for name in ALL} == {**ALL, "attention_kernel": by_phase}
        record = json.loads((tmp_path / "neuron_config.json").read_text())["neuron_config"]["device_settings"]
        assert record == neuron.device_settings == {
            "file": str(file),
            "digest": digest,
            "kernels": {**ALL, "attention_kernel": by_phase},
            "failing": {"speculation": "NCC_EBVF030"},
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("record", "told"),
        [
            ("trn2.json", "device_settings: 'trn2.json' must be an object with file, digest, kernels and failing"),
            ({"file": "x"}, "device_settings: {'file': 'x'} must be an object with file, digest"),
            ({"file": 1, "digest": "", "kernels": {}, "failing": {}}, "device_settings: file=1 and digest='' must be"),
            (
                {"file": "", "digest": "", "kernels": {"mlp_kernel": "fast"}, "failing": {}},
                "device_settings: kernels: mlp_kernel='fast' must be one of auto, torch, nki; pass settings=FILE",
            ),
        ],
    )
    def test_a_record_that_is_none_is_refused(self, record: Any, told: str) -> None:
        with pytest.raises(Qwen35ConfigError, match=re.escape(told)):
            config(device_settings=record)


class TestWhatDoesNotFit:
    """A settings file knows no model: what it names is left to the default where an argument would be refused."""

    @pytest.mark.usefixtures("library_is_there")
    @pytest.mark.parametrize(
        ("kernels", "options", "fields", "left", "told"),
        [
            (
                {"deltanet_kernel": "fused", "deltanet_inverse": "plain"},
                {},
                {"linear_key_head_dim": 64},
                {"deltanet_kernel": "auto", "deltanet_inverse": "plain"},
                ["deltanet_kernel='fused' has heads of 128 dims, not 64 and 128; use 'torch'"],
            ),
            (
                {"attention_kernel": "nki"},
                {"prefill_chunk_size": 4096},
                {},
                {"attention_kernel": {"context_encoding": "nki", "continuation": "auto", "token_generation": "nki"}},
                ["attention_kernel['continuation']='nki' takes chunks of at most 2048 tokens, not prefill_chunk_size"],
            ),
            (
                {"attention_kernel": {"continuation": "nki", "token_generation": "torch"}},
                {"kv_cache_dtype": "fp8"},
                {},
                {"attention_kernel": {"context_encoding": "auto", "continuation": "auto", "token_generation": "torch"}},
                ["attention_kernel['continuation']='nki' reads keys and values of torch_dtype, not kv_cache_dtype"],
            ),
            (
                {"mlp_kernel": "nki"},
                {"torch_dtype": torch.float32},
                {},
                {"mlp_kernel": "torch"},
                ["mlp_kernel='nki' computes in bfloat16, not torch_dtype=torch.float32"],
            ),
            ({"mlp_kernel": "nki"}, {"tp_degree": 4}, {}, {"mlp_kernel": "nki"}, []),
        ],
    )
    def test_it_is_left_to_the_default_and_said(
        self,
        kernels: dict[str, Any],
        options: dict[str, Any],
        fields: dict[str, Any],
        left: dict[str, Any],
        told: list[str],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        options = {"seq_len": 8192, "max_context_length": 512, "torch_dtype": torch.bfloat16, **options}
        file = written(tmp_path, kernels)
        for _ in range(2):  # said once
            neuron = Qwen35NeuronConfig(settings=file, **options)
            Qwen35InferenceConfig(neuron, **{**QWEN35_PRESETS["27B"], **fields})
        assert {name: getattr(neuron, name) for name in left} == left
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(lines) == len(told)
        for line, words in zip(lines, told, strict=True):
            assert line.startswith(f"{file}: {words}") and line.endswith("; the default takes its place")
        for field in left:
            if told and kernels[field] not in (left[field], "plain"):
                with pytest.raises(Qwen35ConfigError, match=re.escape(field)):
                    Qwen35InferenceConfig(
                        Qwen35NeuronConfig(**options, **{field: kernels[field]}), **{**QWEN35_PRESETS["27B"], **fields}
                    )

    def test_one_configuration_s_kernels_are_judged_for_each_model(self, tmp_path: Path) -> None:
        neuron = Qwen35NeuronConfig(settings=written(tmp_path, {"deltanet_kernel": "fused"}))
        assert select_deltanet_kernel(Qwen35InferenceConfig(neuron, **QWEN35_PRESETS["27B"])) is DeltaNetKernel.FUSED
        other = Qwen35InferenceConfig(neuron, **{**QWEN35_PRESETS["27B"], "linear_value_head_dim": 64})
        assert select_deltanet_kernel(other) is DeltaNetKernel.TORCH

    def test_sizes_that_are_no_sizes_are_refused_all_the_same(self, tmp_path: Path) -> None:
        with pytest.raises(Qwen35ConfigError, match="tp_degree=0 must be a positive integer"):
            config(settings=written(tmp_path, {"attention_kernel": "nki", "mlp_kernel": "nki"}), tp_degree=0)


class TestFailingFeatures:
    @pytest.mark.parametrize(
        ("feature", "uses", "without"),
        [
            ("speculation", {"num_speculative_tokens": 2}, {}),
            ("fp8_weights", {"weights_dtype": "fp8"}, {"kv_cache_dtype": "fp8"}),
            ("fp8_cache", {"kv_cache_dtype": "fp8"}, {"weights_dtype": "fp8"}),
            ("batch", {"batch_size": 2}, {"tp_degree": 2}),
            ("tensor_parallel", {"tp_degree": 2}, {"batch_size": 2}),
            ("chunked_prompts", {"seq_len": 512, "prefill_chunk_size": 256}, {"seq_len": 512}),
        ],
    )
    def test_using_one_is_said_with_the_reason(
        self,
        feature: str,
        uses: dict[str, Any],
        without: dict[str, Any],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        file = written(tmp_path, {}, {feature: "NCC_X: no\nsecond line"})
        config(settings=file, **without)
        assert caplog.records == []
        config(settings=file, **uses)
        asked_by = FEATURES[feature][0]
        line = f"{file}: {feature} ({asked_by}) failed on this device: NCC_X: no\\nsecond line"
        assert [record.getMessage() for record in caplog.records] == [line]

    def test_images_are_one(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        neuron = Qwen35NeuronConfig(settings=written(tmp_path, {}, {"vision": "NCC_X"}), seq_len=2048)
        fields = dict(image_token_id=1, video_token_id=2, vision_config=QWEN35_VISION_PRESETS["27B"])
        Qwen35InferenceConfig(neuron, **QWEN35_PRESETS["27B"], **fields)
        assert caplog.records == [], "a text model of the same checkpoint"
        Qwen35VLInferenceConfig(neuron, **QWEN35_PRESETS["27B"], **fields)
        assert "vision (images and video) failed on this device: NCC_X" in caplog.text
