# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a model is loaded with: checkpoints, here or on a hub; configurations; this machine's defaults; ends of text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..configuration_qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig, is_count, is_number, is_size
from ..configuration_qwen35_vl import Qwen35VLInferenceConfig
from ..json_files import Rule, read_object, wrong_fields
from ..nxdi import NXDI_AVAILABLE

if TYPE_CHECKING:
    from transformers import GenerationConfig

MINI_CHECKPOINT = Path(__file__).parent.parent / "mini"
"""The small trained checkpoint that ships with the package: a test vehicle with the architecture of the real ones."""

CONFIG_FILES = ("*.json", "*.jinja")
"""Of a hub's repository, what describes a model: configurations, chat template, tokenizer.json."""

CHECKPOINT_FILES = (*CONFIG_FILES, "*.safetensors", "merges.txt")
"""Of a hub's repository, what a model is loaded from."""

GENERATION_FIELDS: Mapping[str, Rule] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (is_number, "a finite number")),
    "top_k": (is_count, "a whole number of at least 0"),
    **dict.fromkeys(("max_new_tokens", "max_length"), (is_size, "a positive whole number")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (is_count, "a token id")),
}
"""What is taken of a generation_config.json beside `eos_token_id`; the rest is of transformers' own generation."""

END_OF_TURN = "<|im_end|>"
"""What ends a turn in the family's chat templates."""


def resolve_checkpoint(model: str, revision: str | None = None, files: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """The directory of a checkpoint: an existing path, or what `files` match of a hub's repository, in the cache.

    The hub, its token, the cache and being offline are huggingface_hub's affair: HF_ENDPOINT, HF_TOKEN, HF_HOME,
    HF_HUB_OFFLINE.

    Args:
        model: a path, or "organisation/name" on the hub; a path that exists wins.
        revision: a branch, tag or commit of the repository; None is its main branch.
        files: patterns of the names of files, at the top of the repository.

    Raises:
        ValueError: a revision is given with a path.
        OSError: there is no such directory or repository, or it cannot be fetched and is not in the cache.
    """
    path = Path(model)
    if path.exists():
        if revision is not None:
            raise ValueError(f"--revision {revision}: {model} is a directory here; leave it out")
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is None:
        return path  # whoever reads it says that it is not there
    # Here, because it takes a while to import, and a path does not need it.
    from huggingface_hub import errors, snapshot_download

    name = model if revision is None else f"{model} at revision {revision}"
    cause: Exception
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*files], ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        problem, cause = (
            "on the hub one must accept its conditions: do so there, then 'hf auth login' or HF_TOKEN",
            error,
        )
    except errors.RevisionNotFoundError as error:
        cause, problem = error, "the hub has no such revision: name a branch, a tag or a commit"
    except errors.RepositoryNotFoundError as error:
        cause, problem = error, "the hub has none of this name: check it; a private one needs HF_TOKEN"
    except errors.LocalEntryNotFoundError as error:
        problem, cause = (
            f"not whole in the cache, nor fetched from the hub ({_first_line(error)}): go online once",
            error,
        )
    except Exception as error:  # of the HTTP client, whichever huggingface_hub's version has
        cause, problem = error, f"not fetched from the hub ({type(error).__name__}: {_first_line(error)}): try again"
    raise OSError(f"--model {name}: no such directory here; {problem}") from cause


def _first_line(error: BaseException) -> str:
    """What an error says first, or what its cause does: huggingface_hub adds paragraphs of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_compiled_config(compiled_path: Path) -> Qwen35InferenceConfig:
    """The configuration that a compiled model was saved with.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is corrupt.
    """
    if not (compiled_path / "neuron_config.json").exists():
        raise FileNotFoundError(f"{compiled_path}: no neuron_config.json there; name what 'qwen35 compile' wrote")
    fields = read_object(compiled_path / "neuron_config.json")
    config_cls = Qwen35VLInferenceConfig if fields.get("takes_images") else Qwen35InferenceConfig
    config = config_cls.load(str(compiled_path))
    assert isinstance(config, Qwen35InferenceConfig)
    return config


def checkpoint_of(compiled_path: Path) -> Path:
    """The checkpoint that a compiled model was made of: its tokenizer is there.

    Raises:
        FileNotFoundError: it is not where it was.
    """
    path = Path(load_compiled_config(compiled_path)._name_or_path)
    if not path.exists():
        raise FileNotFoundError(f"{compiled_path} was compiled of {path}, which is gone: pass --model")
    return path


def default_neuron_config(
    seq_len: int,
    batch_size: int = 1,
    tp_degree: int = 1,
    torch_dtype: torch.dtype | None = None,
    prefill_chunk_size: int | None = None,
    weights_dtype: str | None = None,
    kv_cache_dtype: str | None = None,
    settings: Path | None = None,
) -> Qwen35NeuronConfig:
    """Options for prompts and answers of `seq_len` tokens together: float32 on a CPU, bfloat16 on Neuron.

    Raises:
        ValueError: the device settings file `settings` is not there or not valid.
    """
    return Qwen35NeuronConfig(
        tp_degree=tp_degree,
        batch_size=batch_size,
        seq_len=seq_len,
        max_context_length=seq_len,
        prefill_chunk_size=prefill_chunk_size,
        torch_dtype=torch_dtype or (torch.bfloat16 if NXDI_AVAILABLE else torch.float32),
        on_cpu=not NXDI_AVAILABLE,
        enable_bucketing=True,
        weights_dtype=weights_dtype,
        kv_cache_dtype=kv_cache_dtype,
        settings=settings,
    )


def load_generation_config(model_path: Path, config: Qwen35InferenceConfig, tokenizer: Any) -> GenerationConfig:
    """Of the checkpoint's generation_config.json, where it has one, `GENERATION_FIELDS`; `eos_token_ids` as its ends.

    Raises:
        ValueError: a file is corrupt, or a field is of a wrong type; all of them are named.
    """
    # Here, because transformers takes seconds to import, and a configuration does not need it.
    from transformers import GenerationConfig

    eos = eos_token_ids(model_path, config.vocab_size, tokenizer)
    file = model_path / "generation_config.json"
    given = read_object(file)
    if problems := wrong_fields(given, GENERATION_FIELDS):
        raise ValueError(f"{file}: {'; '.join(problems)}; correct it or leave it out")
    taken = {name: given[name] for name in GENERATION_FIELDS if given.get(name) is not None}
    return GenerationConfig(**taken, eos_token_id=eos)


def eos_token_ids(model_path: Path, vocab_size: int, tokenizer: Any) -> list[int]:
    """Tokens that end a text: of generation_config.json, config.json (both levels), the tokenizer and its template.

    Each of them may lack it or name another: a published model's config.json has <|endoftext|>, its chat turns end with
    <|im_end|>, and fine-tunes often come without a generation_config.json.

    Raises:
        ValueError: a file has something else there than token ids, or is corrupt.
    """
    found: dict[int, None] = {}  # in order, each once
    for place, value in _given_eos(model_path):
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{place}: eos_token_id={str(value)[:80]!r} must be token ids in 0..{vocab_size - 1}, one or a "
                    "list; correct it or leave it out"
                )
            found[token] = None
    names = [tokenizer.eos_token]
    if END_OF_TURN in str(getattr(tokenizer, "chat_template", None)):
        names.append(END_OF_TURN)
    vocabulary = tokenizer.get_vocab()
    found |= {vocabulary[name]: None for name in names if vocabulary.get(name, vocab_size) < vocab_size}
    return [*found]


def _given_eos(model_path: Path) -> Iterator[tuple[str, Any]]:
    """What the checkpoint's files say of `eos_token_id`, and where."""
    generation, config = (read_object(model_path / name) for name in ("generation_config.json", "config.json"))
    text = config.get("text_config")
    for place, fields in (
        ("generation_config.json", generation),
        ("config.json", config),
        ("config.json, text_config", text if isinstance(text, dict) else {}),
    ):
        if fields.get("eos_token_id") is not None:
            yield f"{model_path}: {place}", fields["eos_token_id"]
