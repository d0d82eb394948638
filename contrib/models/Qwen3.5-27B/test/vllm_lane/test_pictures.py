# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Requests with images and videos through vLLM's engine: their tokens, in whatever steps, and who pays for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("vllm")

from vllm import EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.engine.llm_engine import LLMEngine

import qwen35
from qwen35 import NeuronQwen35VLForCausalLM
from qwen35.cli import main
from qwen35.phase import Phase
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from qwen35.vision.media import Video
from qwen35_vllm.options import MODALITIES, ConfigurationRefused
from support.pictures import picture
from support.vllm_engines import close, engine_of, finish, make_engine, tokens_of, worker_of
from support.vllm_media import ENGINE, TOKENIZER, add_chat, conversation, expected_inputs

pytestmark = pytest.mark.vllm

STEPS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=3)
LOGPROB_TOLERANCE = 1e-4  # two float32 implementations of 8 layers and an encoder of 2
FRAMES = [picture(96, 64, seed=i) for i in range(4)]
CONVERSATIONS: Mapping[str, list[dict[str, Any]]] = {
    "one": conversation(picture(90, 70), "Which colour is this?"),
    "two": conversation("Compare", picture(70, 200, seed=1), "and", picture(200, 70, seed=2), "."),
    "clip": conversation(Video(FRAMES, 2.0), "What happens?"),
    "both": conversation(picture(64, 64, seed=3), Video(FRAMES[:3], 5.0), "Which colour is the first?"),
    "same": conversation(picture(90, 70), picture(64, 64, seed=3), picture(90, 70), "Which is different?"),
    "text": conversation("What is the capital of France?"),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    """What `TextGenerator` answers to each, without vLLM."""
    config = qwen35.Qwen35VLInferenceConfig.from_pretrained(MINI_CHECKPOINT, default_neuron_config(512))
    generator = TextGenerator.load(MINI_CHECKPOINT, config)
    generator.generation_config.eos_token_id = []
    return {name: generator.chat([messages], STEPS).tokens[0] for name, messages in CONVERSATIONS.items()}


def model_of(engine: LLMEngine) -> NeuronQwen35VLForCausalLM:
    model = worker_of(engine)._runner._runner.model
    assert isinstance(model, NeuronQwen35VLForCausalLM)
    return model


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    """One for the tests that need no other, which leave it idle."""
    with engine_of(MINI_CHECKPOINT, **ENGINE) as shared:
        yield shared


@contextmanager
def encoded(engine: LLMEngine) -> Iterator[list[list[int]]]:
    """The grids that the encoder is called with."""
    vision, calls = model_of(engine).vision, []
    assert vision is not None
    encode = vision.forward

    def record(pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        calls.extend(grids.tolist())
        return encode(pixels, grids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "forward", record)
        yield calls


def answer_all(engine: LLMEngine, names: Sequence[str] = (*CONVERSATIONS,)) -> dict[str, Any]:
    """The outputs of conversations that are queued all at once."""
    for name in names:
        add_chat(engine, name, CONVERSATIONS[name], GREEDY)
    return finish(engine)


def tokens_by_name(outputs: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: tokens_of(output)[0] for name, output in outputs.items()}


def test_tokens_are_those_of_a_text_generator_all_at_once(engine: LLMEngine, alone: dict[str, list[int]]) -> None:
    outputs = answer_all(engine)
    assert tokens_by_name(outputs) == alone
    for name, messages in CONVERSATIONS.items():
        assert outputs[name].prompt_token_ids == expected_inputs(messages)["input_ids"][0].tolist()


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers has no Qwen3.5 before 5")
def test_logprobs_are_those_of_transformers(engine: LLMEngine) -> None:
    from support.oracle import transformers_model

    model, worst = transformers_model(MINI_CHECKPOINT), 0.0
    model.generation_config.eos_token_id = None
    outputs = answer_all(engine)
    for name, messages in CONVERSATIONS.items():
        inputs = expected_inputs(messages)
        ids, answer = inputs["input_ids"], outputs[name].outputs[0]
        config = model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        with torch.no_grad():
            expected = model.generate(
                **inputs,
                mm_token_type_ids=kinds,
                do_sample=False,
                max_new_tokens=STEPS,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        assert list(answer.token_ids) == expected.sequences[0, ids.shape[1] :].tolist(), name
        for logits, own in zip(expected.logits, answer.logprobs, strict=True):
            scores = logits[0].float().log_softmax(-1)
            worst = max(worst, *(abs(float(scores[token]) - one.logprob) for token, one in own.items()))
    assert worst < LOGPROB_TOLERANCE, worst
    print(f"logprobs differ from transformers' by at most {worst:.1e}")


@pytest.mark.parametrize("budget", [16, 23, 64])
def test_chunks_cut_pictures_anywhere_and_the_cache_keeps_no_more_than_it_has_room_for(
    budget: int, alone: dict[str, list[int]]
) -> None:
    with engine_of(
        MINI_CHECKPOINT,
        {"prefill_chunk_size": 16, "ctx_batch_size": 2},
        **ENGINE | {"max_num_seqs": 2},
        max_num_batched_tokens=budget,
    ) as engine:
        core: Any = engine.engine_core.engine_core
        room, kept = core.scheduler.encoder_cache_manager.cache_size, worker_of(engine)._runner._media._kept
        for name, messages in CONVERSATIONS.items():
            add_chat(engine, name, messages, GREEDY)
        outputs, most = {}, 0
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
            worker_of(engine)._thread.run(lambda: None)
            most = max(most, sum(map(len, kept.values())))
        assert tokens_by_name(outputs) == alone
        assert 0 < most <= room


def test_equal_pictures_are_encoded_once(engine: LLMEngine) -> None:
    first, second, clip = picture(64, 96, seed=20), picture(96, 64, seed=21), Video(FRAMES[1:], 3.0)
    with encoded(engine) as calls:
        add_chat(engine, "three", conversation(first, second, first.copy(), "Which is different?"), GREEDY)
        together = finish(engine)
        assert sorted(calls) == [[1, 4, 6], [1, 6, 4]]
        for name, content in {"again": (second, "?"), "clip": (first, clip), "clip again": (clip, "?")}.items():
            add_chat(engine, name, conversation(*content), GREEDY)
        finish(engine)
        assert calls[2:] == [[2, 4, 6]]
        add_chat(engine, "three", conversation(first, second, first, "Which is different?"), GREEDY)
        assert tokens_by_name(finish(engine)) == tokens_by_name(together)


def test_a_cache_that_is_reset_is_filled_again(engine: LLMEngine, alone: dict[str, list[int]]) -> None:
    with encoded(engine) as calls:
        for _ in range(2):
            core: Any = engine.engine_core.engine_core
            core.reset_encoder_cache()
            assert tokens_by_name(answer_all(engine, ["two"])) == {"two": alone["two"]}
        assert len(calls) == 4


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["asynchronous", "synchronous"])
def test_what_is_preempted_has_its_pictures_again(async_scheduling: bool, alone: dict[str, list[int]]) -> None:
    blocks = {"block_size": 16, "num_gpu_blocks_override": 7}  # six of 16 tokens: not enough for all that run
    options = {**ENGINE, **blocks, "async_scheduling": async_scheduling, "max_model_len": 96, "max_num_seqs": 3}
    long = GREEDY.clone()
    long.max_tokens = 20
    preempted: list[str] = []
    names = ("one", "two", "clip")
    with engine_of(MINI_CHECKPOINT, {"prefill_chunk_size": 16}, **options) as engine:
        expected = {}
        for name in names:
            add_chat(engine, name, CONVERSATIONS[name], long)
            expected |= tokens_by_name(finish(engine))
        update = worker_of(engine)._runner.rows.update

        def record(scheduled: Any) -> Any:
            preempted.extend(scheduled.scheduled_cached_reqs.resumed_req_ids)
            return update(scheduled)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker_of(engine)._runner.rows, "update", record)
            for name in names:
                add_chat(engine, name, CONVERSATIONS[name], long)
            assert tokens_by_name(finish(engine)) == expected
    assert preempted, "nothing was preempted: fewer blocks are needed"
    for name in names:
        assert expected[name][:STEPS] == alone[name]


def test_text_runs_the_text_s_own_programs_beside_pictures(
    engine: LLMEngine, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Phase, bool, int]] = []
    forward = model_of(engine).forward

    def record(*args: Any, **kwargs: Any) -> Any:
        ran.append((kwargs["phase"], kwargs["placed"] is not None, len(args[0])))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model_of(engine), "forward", record)
    assert tokens_by_name(answer_all(engine, ["text"])) == {"text": alone["text"]}
    assert not any(with_media for _, with_media, _ in ran)
    text = [call for call in ran if call[0] is not Phase.TOKEN_GENERATION]
    ran.clear()
    names = ("one", "text", "clip")
    assert tokens_by_name(answer_all(engine, names)) == {name: alone[name] for name in names}
    beside = [call for call in ran if call[0] is not Phase.TOKEN_GENERATION and not call[1]]
    assert beside == text, "its prompt is encoded without media, whatever is in the step"
    assert any(with_media for _, with_media, _ in ran)


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["asynchronous", "synchronous"])
def test_a_picture_that_cannot_be_encoded_ends_its_request_alone(
    async_scheduling: bool, alone: dict[str, list[int]]
) -> None:
    with engine_of(MINI_CHECKPOINT, **ENGINE, async_scheduling=async_scheduling) as engine:
        vision = model_of(engine).vision
        assert vision is not None
        encode = vision.forward

        def fail_on_clips(pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
            if int(grids[0, 0]) > 1:
                raise RuntimeError("out of memory")
            return encode(pixels, grids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vision, "forward", fail_on_clips)
            outputs = answer_all(engine, ["one", "clip", "text", "both"])
        reasons = {name: output.outputs[0].finish_reason for name, output in outputs.items()}
        assert reasons == {"one": "length", "clip": "error", "text": "length", "both": "error"}
        for name in ("one", "text"):
            assert tokens_of(outputs[name])[0] == alone[name]
        assert tokens_by_name(answer_all(engine, ["both"])) == {"both": alone["both"]}


def test_drafts_change_no_token(alone: dict[str, list[int]]) -> None:
    drafting = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
    options = {**ENGINE, **drafting, "max_model_len": 128, "max_num_seqs": 1}
    with engine_of(MINI_CHECKPOINT, {"prefill_chunk_size": 16}, **options) as engine:
        few = GREEDY.clone()
        few.max_tokens = 4
        add_chat(engine, "clip", CONVERSATIONS["clip"], few)
        assert tokens_by_name(finish(engine)) == {"clip": alone["clip"][:4]}


@pytest.mark.parametrize(
    "off", [{"limit_mm_per_prompt": {"image": 0, "video": 0}}, {"language_model_only": True}], ids=["limits", "text"]
)
def test_without_pictures_the_text_s_model_is_loaded(off: dict[str, Any], alone: dict[str, list[int]]) -> None:
    engine = make_engine(MINI_CHECKPOINT, **ENGINE, **off)
    assert not isinstance(worker_of(engine)._runner._runner.model, NeuronQwen35VLForCausalLM)
    assert tokens_by_name(answer_all(engine, ["text"])) == {"text": alone["text"]}
    info = MULTIMODAL_REGISTRY.create_processor(engine.vllm_config.model_config, tokenizer=TOKENIZER).info
    for modality in MODALITIES:  # as the server asks for each item of a chat
        with pytest.raises((ValueError, VLLMValidationError), match=rf"At most 0 {modality}\(s\) may be provided"):
            info.validate_num_items(modality, 1)
    close(engine)


@pytest.mark.parametrize(
    ("prompt", "limits", "told"),
    [
        # Tokens with their pictures; without them there would be room.
        ("two", {"max_model_len": 32}, "maximum (model|context) length (of|is) 32"),
        ("two", {"limit_mm_per_prompt": {"image": 1}}, r"At most 1 image\(s\) may be provided in one prompt"),
        ("clip", {"limit_mm_per_prompt": {"video": 0}}, r"At most 0 video\(s\) may be provided in one prompt"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_before_it_is_queued(prompt: str, limits: Any, told: str) -> None:
    engine = make_engine(MINI_CHECKPOINT, **{**ENGINE, **limits})
    with pytest.raises((ValueError, VLLMValidationError), match=told):
        add_chat(engine, prompt, CONVERSATIONS[prompt], GREEDY)
    assert not engine.has_unfinished_requests()
    close(engine)


COMPILED = ("--seq-len", "512", "--batch", "4", "--dtype", "float32", "--model", str(MINI_CHECKPOINT))


def test_a_model_compiled_with_vision_is_loaded(tmp_path: Path, alone: dict[str, list[int]]) -> None:
    assert main(["compile", str(tmp_path / "compiled"), *COMPILED, "--vision"]) == 0
    with engine_of(MINI_CHECKPOINT, {"compiled_path": str(tmp_path / "compiled")}, **ENGINE) as engine:
        assert tokens_by_name(answer_all(engine, ["both"])) == {"both": alone["both"]}


@pytest.mark.parametrize(
    ("compiled_with", "arguments", "told"),
    [
        ((), {}, "it takes no images, which are to be served: compile it with --vision, or pass --language-model-only"),
        (("--vision",), {"language_model_only": True}, "it takes images, and none are to be served: allow some, or c"),
    ],
    ids=["text", "vision"],
)
def test_a_model_compiled_otherwise_is_refused(
    compiled_with: tuple[str, ...], arguments: dict[str, Any], told: str, tmp_path: Path
) -> None:
    assert main(["compile", str(tmp_path / "compiled"), *COMPILED, *compiled_with]) == 0
    given = {"qwen35": {"compiled_path": str(tmp_path / "compiled")}}
    with pytest.raises(ConfigurationRefused) as refused:
        EngineArgs(
            model=str(MINI_CHECKPOINT), dtype="float32", additional_config=given, **ENGINE, **arguments
        ).create_engine_config()
    assert told in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"enable_mm_embeds": True}, "--enable-mm-embeds: images and videos are encoded here"),
        ({"mm_encoder_only": True}, "--mm-encoder-only: the model generates text"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate 0.5: videos keep all their tokens"),
        ({"mm_processor_kwargs": {"size": 3}}, "--mm-processor-kwargs, 'size': give min_pixels, max_pixels, fps"),
    ],
    ids=str,
)
def test_options_of_media_that_are_not_served_are_named(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationRefused) as refused:
        EngineArgs(model=str(MINI_CHECKPOINT), dtype="float32", **ENGINE, **arguments).create_engine_config()
    assert told in str(refused.value) and len(str(refused.value).splitlines()) == 1
