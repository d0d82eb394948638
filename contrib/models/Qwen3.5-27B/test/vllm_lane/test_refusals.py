# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is not served is refused by its name, with what to do, in one line, before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import AsyncEngineArgs, EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from qwen35_vllm import options, refusals
from qwen35_vllm.options import ConfigurationRefused
from support.models import save_checkpoint
from support.vllm_engines import add, engine_of, finish, save_served_checkpoint, tokens_of
from support.vllm_server import SECONDS_TO_START

pytestmark = pytest.mark.vllm


def configured(path: Path, qwen35: dict[str, Any] | None = None, **arguments: Any) -> VllmConfig:
    """The configuration that vLLM makes of arguments, our platform's hook among what it asks."""
    chosen = {"max_model_len": 64, "max_num_seqs": 2, "dtype": "float32", "skip_tokenizer_init": True, **arguments}
    return EngineArgs(model=str(path), additional_config={"qwen35": qwen35 or {}}, **chosen).create_engine_config()


def refusal(path: Path, qwen35: dict[str, Any] | None = None, **arguments: Any) -> str:
    with pytest.raises(ConfigurationRefused) as refused:
        configured(path, qwen35, **arguments)
    text = str(refused.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "--speculative-config, method ngram of ngram: only the checkpoint's own head drafts; pass ",
        ),
        (
            {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}},
            "num_speculative_tokens=2 needs the tensors mtp.*, which this checkpoint does not have; set num_spec",
        ),
        (
            {"speculative_config": {"method": "mtp", "num_speculative_tokens": 8}},
            "num_speculative_tokens=8 must be a whole number of 0..7",
        ),
        (
            {
                "speculative_config": {
                    "method": "mtp",
                    "num_speculative_tokens": 1,
                    "rejection_sample_method": "synthetic",
                    "synthetic_acceptance_rates": [0.5],
                }
            },
            "--speculative-config, rejection_sample_method='synthetic': drafts change no token; leave it out",
        ),
        ({"quantization": "experts_int8", "dtype": "bfloat16"}, "--quantization experts_int8: only fp8 is served"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2: there is no Neuron device here"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2: of one machine, only tensor"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size: a row has no blocks to move"),
        ({"dtype": "float16"}, "--dtype float16: gates and decays overflow it; pass bfloat16 or float32"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2: keys and values are kept in --dtype or fp8"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds: the compiled programs take token ids"),
        ({"hf_overrides": {"text_config": {"rms_norm_eps": 1e-5}}}, "--hf-overrides: "),
        ({"load_format": "dummy"}, "--load-format dummy: safetensors are read"),
        ({"download_dir": "somewhere"}, "--download-dir: set HF_HOME"),
        ({"runner": "pooling"}, "--runner pooling: the model generates text"),
        (
            {"kv_transfer_config": {"kv_connector": "SharedStorageConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config, SharedStorageConnector: a row has no blocks to transfer",
        ),
    ],
    ids=str,
)
def test_an_option_that_is_not_served_is_named(arguments: dict[str, Any], told: str, served_checkpoint: Path) -> None:
    assert told in refusal(served_checkpoint, **arguments)


def test_all_are_named_at_once(served_checkpoint: Path) -> None:
    told = refusal(served_checkpoint, download_dir="somewhere", load_format="dummy")
    assert "--download-dir" in told and "--load-format" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"enable_lora": True}, "LoRA is not supported.* without `enable_lora`"),  # here, or as ours
        ({"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported for this model"),
        ({"enable_sleep_mode": True}, "Sleep mode is not supported"),
    ],
    ids=str,
)
def test_what_the_model_s_class_does_not_have_vllm_refuses_itself(
    arguments: dict[str, Any], told: str, served_checkpoint: Path
) -> None:
    with pytest.raises((ValueError, NotImplementedError, ConfigurationRefused), match=told):
        configured(served_checkpoint, **arguments)


def test_the_checkpoint_s_own_problems_are_told_too(tmp_path: Path) -> None:
    path = save_served_checkpoint(tmp_path / "checkpoint")
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"linear_conv_kernel_dim": 4', '"linear_conv_kernel_dim": 1'))
    assert "linear_conv_kernel_dim=1 must be 2 or more" in refusal(path)


def test_wrong_options_of_ours_are_told(served_checkpoint: Path) -> None:
    assert "'chunk' is unknown" in refusal(served_checkpoint, {"chunk": 4})
    told = refusal(served_checkpoint, {"on_device_sampling": True, "prompt_logprobs": True})
    assert "output_prompt_logits=True with on_device_sampling_config" in told
    told = refusal(served_checkpoint, {"ctx_batch_size": 4})
    assert "ctx_batch_size=4 exceeds" in told


def test_replicas_that_an_instance_has_no_cores_for_are_refused(served_checkpoint: Path) -> None:
    told = refusal(served_checkpoint, {"instance": "trn2.3xlarge"}, data_parallel_size=5)
    assert "--data-parallel-size 5 of --tensor-parallel-size 1 need 5 cores, instance=trn2.3xlarge has 4" in told


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save_served_checkpoint(tmp_path / "checkpoint")
    fields = json.loads((path / "config.json").read_text())
    llama = {**fields["text_config"], "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(llama))
    assert "model_type='llama' is not one of qwen3_5, qwen3_5_text" in refusal(path)


def test_tensor_parallel_is_taken_where_neuron_devices_are(
    served_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "runs_on_neuron", lambda: True)
    config = configured(served_checkpoint, tensor_parallel_size=2)
    assert config.parallel_config.distributed_executor_backend == "uni", "NxDI drives all ranks from one process"


def test_vllm_s_limits_are_the_model_s(served_checkpoint: Path) -> None:
    config = configured(served_checkpoint, {"prefill_chunk_size": 16, "ctx_batch_size": 2})
    neuron = options.neuron_config(config, options.serve_options(config))
    assert (neuron.seq_len, neuron.kv_cache_batch_size, neuron.tp_degree) == (64, 2, 1)
    assert (neuron.prefill_chunk_size, neuron.ctx_batch_size, str(neuron.torch_dtype)) == (16, 2, "torch.float32")
    assert (config.cache_config.block_size, config.cache_config.num_gpu_blocks_override) == (64, 3)
    assert config.cache_config.enable_prefix_caching is False
    assert config.scheduler_config.async_scheduling is True


def test_a_server_that_is_not_told_has_few_rows() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args([]).max_num_seqs == 8
    assert parser.parse_args(["--max-num-seqs", "128"]).max_num_seqs == 128


def test_a_checkpoint_of_text_alone_is_served(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint")
    config = configured(tmp_path / "checkpoint")
    assert config.model_config.architecture == "Qwen3_5ForCausalLM" and not config.model_config.is_multimodal_model


def test_blocks_that_the_user_configures_are_kept(served_checkpoint: Path) -> None:
    config = configured(served_checkpoint, block_size=16, num_gpu_blocks_override=7)
    assert (config.cache_config.block_size, config.cache_config.num_gpu_blocks_override) == (16, 7)
    assert configured(served_checkpoint, block_size=16).cache_config.num_gpu_blocks_override == 9


def test_the_hook_may_be_called_again(served_checkpoint: Path) -> None:
    from vllm.platforms import current_platform

    config = configured(served_checkpoint)
    before = (config.cache_config.block_size, config.cache_config.num_gpu_blocks_override)
    current_platform.check_and_update_config(config)
    assert (config.cache_config.block_size, config.cache_config.num_gpu_blocks_override) == before


def test_more_tokens_at_least_than_there_is_room_for_are_refused(served_checkpoint: Path) -> None:
    """vLLM 0.23 would keep the request in its row for good, without a step for it."""
    fitting, beyond = (
        SamplingParams(temperature=0, max_tokens=40, min_tokens=tokens, ignore_eos=True) for tokens in (14, 15)
    )
    with engine_of(served_checkpoint, max_model_len=64) as engine:
        add(engine, "fits", [1] * 50, fitting)
        assert [len(tokens) for tokens in tokens_of(finish(engine)["fits"])] == [14]
        with pytest.raises(
            VLLMValidationError, match="min_tokens=15 exceeds the 14 tokens that max_model_len=64 leaves"
        ):
            add(engine, "beyond", [1] * 50, beyond)


def test_vllm_serve_says_so_in_a_line_and_ends(served_checkpoint: Path, tmp_path: Path) -> None:
    """Of the checks of a configuration, the last: that there is a compiled model where none may be made."""
    given = json.dumps({"qwen35": {"compiled_path": str(tmp_path / "compiled"), "compile": "never"}})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(served_checkpoint)]
    ended = subprocess.run(
        [*command, "--port", "0", "--additional-config", given],
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_START,
    )
    assert ended.returncode != 0
    said = ended.stderr.splitlines()[-1]
    assert "qwen35_vllm.options.ConfigurationRefused: compile=never, and there is no compiled model in" in said
    assert "EngineCore" not in ended.stdout + ended.stderr, "nothing was started"
