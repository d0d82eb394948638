# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution of the DeltaNet layer, with the state that carries it from one call to the next.

Letters: B batch, S tokens, Ch channels (q, k and v side by side), W kernel width (4).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, state: Tensor | None = None, lengths_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = silu(sum_w weight[:, w] x_{t - W + 1 + w}), per channel; inputs before the first token are the state.

    Sums are accumulated in float32 or wider and, as in transformers, rounded to weight.dtype before the SiLU.

    Args:
        x: [B, S, Ch], inputs before convolution and activation.
        weight: [Ch, W].
        state: [B, Ch, W - 1], the W - 1 inputs before x, oldest first; None for zeros, the start of a sequence.
        lengths_mask: [B, S], true for real tokens, which come first; None when all are real.

    Returns:
        y: [B, S, Ch] in x.dtype; rows of padded tokens hold nothing of use.
        new_state: [B, Ch, W - 1] in x.dtype, the last W - 1 inputs of state and real tokens together, so that a row
            with fewer than W - 1 real tokens keeps part of its old state, and one with none keeps all of it.
    """
    B, S, Ch = x.shape
    before = weight.shape[-1] - 1
    if weight.shape[0] != Ch:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [{Ch}, W] from x {list(x.shape)}")
    if state is None:
        state = x.new_zeros(B, Ch, before)
    elif state.shape != (B, Ch, before):
        raise ValueError(f"state has shape {list(state.shape)}, expected {[B, Ch, before]} from x {list(x.shape)}")
    window = torch.cat((state.to(x.dtype).transpose(1, 2), x), dim=1)  # [B, W - 1 + S, Ch]

    # Shifted multiply-adds in the layout of x: a depthwise conv1d wants [B, Ch, S] and takes 2 to 15 times as long on
    # CPU, with the two transposes.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    inputs, taps = window.to(dtype), weight.to(dtype).t()
    if S > 1:
        taps = taps.contiguous()  # pays when a row of taps meets many tokens, not in decode
    y = inputs[:, :S] * taps[0]
    for w in range(1, before + 1):
        y.addcmul_(inputs[:, w : w + S], taps[w])
    y = F.silu(y.to(weight.dtype), inplace=True).to(x.dtype)

    if lengths_mask is None:
        return y, window[:, S:].transpose(1, 2).contiguous()
    return y, _inputs_before(window, lengths_mask.long().sum(dim=1), before)


def commit_conv(x: Tensor, state: Tensor, accepted: Tensor) -> Tensor:
    """The state after the first accepted[b] of the T tokens of row b, of which `causal_conv` convolved all.

    Args:
        x: [B, T, Ch], inputs before convolution and activation.
        state: [B, Ch, W - 1], the inputs before x, oldest first; not modified.
        accepted: [B] integers, 0 to T; 0 leaves a row's state as it is.

    Returns:
        new_state: [B, Ch, W - 1] in x.dtype.
    """
    B, _, Ch = x.shape
    if state.shape[:2] != (B, Ch):
        raise ValueError(f"state has shape {list(state.shape)}, expected [{B}, {Ch}, W - 1] from x {list(x.shape)}")
    if accepted.shape != (B,):
        raise ValueError(f"accepted has shape {list(accepted.shape)}, expected {[B]} from x {list(x.shape)}")
    window = torch.cat((state.to(x.dtype).transpose(1, 2), x), dim=1)
    return _inputs_before(window, accepted.long(), state.shape[2])


def _inputs_before(window: Tensor, tokens: Tensor, before: int) -> Tensor:
    """The `before` inputs that precede token tokens[b] of each row, [B, Ch, before].

    Args:
        window: [B, before + S, Ch], the state and S tokens.
    """
    B, length, _ = window.shape
    # Row n of the window is the first of the inputs that precede token n: the first one that is padded or rejected.
    # Looked up as in a table of rows, because a gather moves single elements.
    n = tokens.unsqueeze(1) + torch.arange(before, device=window.device)
    first = length * torch.arange(B, device=window.device).unsqueeze(1)
    return F.embedding(first + n, window.flatten(0, 1)).transpose(1, 2).contiguous()
