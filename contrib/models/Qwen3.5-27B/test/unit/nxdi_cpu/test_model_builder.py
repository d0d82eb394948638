# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the walk of a model finds before a trace or the runtime would."""

from __future__ import annotations

import pytest
import torch

from nxdi_cpu.model_builder import TraceError, alias_problems
from qwen35.nxdi import NXDI_AVAILABLE
from support.tracing import small_application, traced


def test_a_missing_a_shifted_and_a_mistyped_alias_are_told_apart() -> None:
    _, module, aliases, inputs = next(traced(small_application()))
    with torch.device("meta"):
        outputs = module(*(tensor.to("meta") for tensor in inputs))
    first = module.kv_mgr.past_key_values[0]
    assert alias_problems(module, aliases, outputs) == []
    assert "kv_mgr.past_key_values.0 has no alias" in alias_problems(
        module, {p: i for p, i in aliases.items() if p is not first}, outputs
    )
    assert any("they must be the last" in line for line in alias_problems(module, aliases, [*outputs, outputs[0]]))
    cast = [outputs[0], outputs[1].bfloat16(), *outputs[2:]]
    (line,) = alias_problems(module, aliases, cast)
    assert "past_key_values.0 is torch.float32" in line and "output 1 is torch.bfloat16" in line
    (line,) = alias_problems(module, aliases, [outputs[0], first, *outputs[2:]])
    assert "the step would not change it" in line


@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI's own compile needs the compiler")
def test_a_state_that_comes_back_in_another_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    app = small_application()
    module_cls = app._model_cls
    forward = module_cls.forward
    monkeypatch.setattr(module_cls, "forward", lambda *args: [t.bfloat16() for t in forward(*args)])
    with pytest.raises(TraceError, match=r"context_encoding_model, bucket 0: kv_mgr\.past_key_values\.0 is"):
        app.get_builder().trace()
