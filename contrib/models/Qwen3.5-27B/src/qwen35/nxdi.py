# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The seam to NxDI: the only module that imports `neuronx_distributed*`.

Where the Neuron SDK is missing, the same names come from the CPU stand-ins in `nxdi_cpu`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any


def _nxdi_is_installed() -> bool:
    # The wheels of that name on the public package index are empty: look for a module, not for the distribution.
    try:
        return find_spec("neuronx_distributed_inference.models.model_base") is not None
    except ImportError:
        return False


NXDI_AVAILABLE = _nxdi_is_installed()
"""True when the real NxDI is importable, on a Neuron machine or with its sources on the path."""

_NXD, _NXDI = "neuronx_distributed", "neuronx_distributed_inference"
_MODULES = {
    # name: (its module in NxDI or NxD, its stand-in's module)
    "VISION_ENCODER_MODEL_TAG": (f"{_NXDI}.models.model_wrapper", "nxdi_cpu.model_wrapper"),
    "BaseParallelLinear": (f"{_NXD}.parallel_layers.layers", "nxdi_cpu.layers"),
    "ColumnParallelLinear": (f"{_NXD}.parallel_layers.layers", "nxdi_cpu.layers"),
    "DecoderModelInstance": (f"{_NXDI}.models.model_wrapper", "nxdi_cpu.model_wrapper"),
    "EncoderModelInstance": (f"{_NXDI}.models.model_wrapper", "nxdi_cpu.model_wrapper"),
    "FlashAttentionStrategy": (f"{_NXDI}.modules.attention.attention_base", "nxdi_cpu.attention"),
    "HuggingFaceGenerationAdapter": (f"{_NXDI}.utils.hf_adapter", "nxdi_cpu.hf_adapter"),
    "InferenceConfig": (f"{_NXDI}.models.config", "nxdi_cpu.config"),
    "KVQuantizationConfig": (f"{_NXD}.quantization.quantization_config", "nxdi_cpu.quantization"),
    "KVCacheManager": (f"{_NXDI}.modules.kvcache.kv_cache_manager", "nxdi_cpu.kv_cache"),
    "ModelWrapper": (f"{_NXDI}.models.model_wrapper", "nxdi_cpu.model_wrapper"),
    "NeuronApplicationBase": (f"{_NXDI}.models.application_base", "nxdi_cpu.application_base"),
    "NeuronAttentionBase": (f"{_NXDI}.modules.attention.attention_base", "nxdi_cpu.attention"),
    "NeuronAttentionBaseOutput": (f"{_NXDI}.modules.attention.attention_base", "nxdi_cpu.attention"),
    "NeuronBaseForCausalLM": (f"{_NXDI}.models.model_base", "nxdi_cpu.model_base"),
    "NeuronBaseModel": (f"{_NXDI}.models.model_base", "nxdi_cpu.model_base"),
    "NeuronConfig": (f"{_NXDI}.models.config", "nxdi_cpu.config"),
    "OnDeviceSamplingConfig": (f"{_NXDI}.models.config", "nxdi_cpu.config"),
    "ParallelEmbedding": (f"{_NXD}.parallel_layers.layers", "nxdi_cpu.layers"),
    "RowParallelLinear": (f"{_NXD}.parallel_layers.layers", "nxdi_cpu.layers"),
    "convert": (f"{_NXD}.quantization.quantize", "nxdi_cpu.quantization"),
    "get_default_per_channel_custom_qconfig_dict": (
        f"{_NXD}.quantization.quantization_config",
        "nxdi_cpu.quantization",
    ),
    "get_tensor_model_parallel_size": (f"{_NXD}.parallel_layers.parallel_state", "nxdi_cpu.parallel_state"),
    "invoke_preshard_hook": (f"{_NXD}.trace.trace", "nxdi_cpu.sharding"),
    "load_pretrained_config": (f"{_NXDI}.utils.hf_adapter", "nxdi_cpu.hf_adapter"),
    "reduce_from_tensor_model_parallel_region": (f"{_NXD}.parallel_layers.mappings", "nxdi_cpu.parallel_state"),
    "set_tensor_model_parallel_attributes": (f"{_NXD}.parallel_layers.utils", "nxdi_cpu.layers"),
    "shard_children": (f"{_NXD}.trace.trace", "nxdi_cpu.sharding"),
}

if TYPE_CHECKING:
    from nxdi_cpu.application_base import NeuronApplicationBase
    from nxdi_cpu.attention import FlashAttentionStrategy, NeuronAttentionBase, NeuronAttentionBaseOutput
    from nxdi_cpu.config import InferenceConfig, NeuronConfig, OnDeviceSamplingConfig
    from nxdi_cpu.hf_adapter import HuggingFaceGenerationAdapter, load_pretrained_config
    from nxdi_cpu.kv_cache import KVCacheManager
    from nxdi_cpu.layers import (
        BaseParallelLinear,
        ColumnParallelLinear,
        ParallelEmbedding,
        RowParallelLinear,
        set_tensor_model_parallel_attributes,
    )
    from nxdi_cpu.model_base import NeuronBaseForCausalLM, NeuronBaseModel
    from nxdi_cpu.model_wrapper import (
        VISION_ENCODER_MODEL_TAG,
        DecoderModelInstance,
        EncoderModelInstance,
        ModelWrapper,
    )
    from nxdi_cpu.parallel_state import get_tensor_model_parallel_size, reduce_from_tensor_model_parallel_region
    from nxdi_cpu.quantization import KVQuantizationConfig, convert, get_default_per_channel_custom_qconfig_dict
    from nxdi_cpu.sharding import invoke_preshard_hook, shard_children
else:
    # A module is imported when a name of it is first asked for, since some of them load all of transformers.
    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        original, stand_in = _MODULES[name]
        value = globals()[name] = getattr(import_module(original if NXDI_AVAILABLE else stand_in), name)
        return value


if TYPE_CHECKING or not NXDI_AVAILABLE:
    from nxdi_cpu.parallel_state import as_rank
else:

    @contextmanager
    def as_rank(rank: int, tp_degree: int) -> Iterator[None]:
        """Build modules with the shapes of rank `rank` of `tp_degree`, without a process group, as NxD does to load.

        Raises:
            RuntimeError: this process is a rank already, as on a CPU after `to_cpu`.
        """
        from neuronx_distributed.parallel_layers import parallel_state
        from neuronx_distributed.trace.trace import _mock_parallel_state

        if parallel_state.model_parallel_is_initialized():
            raise RuntimeError("this process is a rank already: take the shapes of one in a process of its own")
        _mock_parallel_state(tp_degree, rank)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


_MODEL_TABLE = f"{_NXDI}.utils.constants"


class _ModelTableFinder(MetaPathFinder):
    """Calls `fill` with the module of NxDI's models when somebody has imported it, once."""

    def __init__(self, fill: Callable[[ModuleType], None]) -> None:
        self.fill = fill

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODEL_TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fill(module: ModuleType) -> None:
                execute(module)
                self.fill(module)

            spec.loader.exec_module = execute_and_fill  # type: ignore[method-assign]
        return spec


def offer_application(model_types: Sequence[str], load: Callable[[], type]) -> None:
    """Put an application into NxDI's table of models, in which other programs look up what they run.

    The table's module imports every model of NxDI, which most processes that offer one do without: it is filled when
    somebody imports it.

    Args:
        model_types: keys of `MODEL_TYPES` in `neuronx_distributed_inference.utils.constants`.
        load: gives the class; called when the table is there.
    """

    def fill(table: ModuleType) -> None:
        application = load()
        for model_type in model_types:
            table.MODEL_TYPES[model_type] = {"causal-lm": application}

    if _MODEL_TABLE in sys.modules:
        fill(sys.modules[_MODEL_TABLE])
    else:
        sys.meta_path.insert(0, _ModelTableFinder(fill))


def compile_program(module: Any, inputs: tuple[Any, ...], lnc: int, workdir: str) -> Callable[..., Any]:
    """A module as one program of a logical core, loaded there: it takes and gives CPU tensors of the inputs' shapes.

    On a device by torch_neuronx.trace (frameworks/torch/torch-neuronx/api-reference-guide/inference/
    api-torch-neuronx-trace.rst), which has not run yet. On the stand-ins it is the module itself, whose kernels the
    emulator runs.

    Args:
        module: a torch module without parameters.
        inputs: CPU tensors.
        lnc: physical cores of the logical one, for the compiler's --lnc; the runtime's NEURON_LOGICAL_NC_CONFIG must
            agree (about-neuron/arch/neuron-features/logical-neuroncore-config.rst).
        workdir: where the compiler keeps what it makes.
    """
    if not NXDI_AVAILABLE:
        return module
    import torch_neuronx

    program: Callable[..., Any] = torch_neuronx.trace(
        module, inputs, compiler_workdir=workdir, compiler_args=["--auto-cast=none", f"--lnc={lnc}"]
    )
    return program


# What is printed goes to standard error; the answer alone goes to the parent.
_CHILD = """
import os, pickle, sys
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
sys.modules["neuronx_distributed_inference"] = None  # importing it fails from here on
function, args = pickle.load(sys.stdin.buffer)
try:
    result = function(*args), None
except ValueError as error:
    result = None, str(error)
pickle.dump(result, answer)
"""


def on_stand_ins(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) on the CPU stand-ins: here, or in a new process where NxDI is installed.

    The function is one of this package, found by its name; arguments and result are pickled.

    Raises:
        ValueError: what the function raises; another class of it arrives as this one, with its message.
        subprocess.CalledProcessError: anything else went wrong; standard error has the traceback.
    """
    if not NXDI_AVAILABLE:
        return function(*args)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # a device is not wanted, and may be another process's
    }
    child = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=pickle.dumps((function, args)),
        stdout=subprocess.PIPE,
        check=True,
        env=environment,
    )
    result, problem = pickle.loads(child.stdout)
    if problem is not None:
        raise ValueError(problem)
    return result


__all__ = [
    "NXDI_AVAILABLE",
    "VISION_ENCODER_MODEL_TAG",
    "BaseParallelLinear",
    "ColumnParallelLinear",
    "DecoderModelInstance",
    "EncoderModelInstance",
    "FlashAttentionStrategy",
    "HuggingFaceGenerationAdapter",
    "InferenceConfig",
    "KVCacheManager",
    "KVQuantizationConfig",
    "ModelWrapper",
    "NeuronApplicationBase",
    "NeuronAttentionBase",
    "NeuronAttentionBaseOutput",
    "NeuronBaseForCausalLM",
    "NeuronBaseModel",
    "NeuronConfig",
    "OnDeviceSamplingConfig",
    "ParallelEmbedding",
    "RowParallelLinear",
    "as_rank",
    "compile_program",
    "convert",
    "get_default_per_channel_custom_qconfig_dict",
    "get_tensor_model_parallel_size",
    "invoke_preshard_hook",
    "load_pretrained_config",
    "offer_application",
    "on_stand_ins",
    "reduce_from_tensor_model_parallel_region",
    "set_tensor_model_parallel_attributes",
    "shard_children",
]
