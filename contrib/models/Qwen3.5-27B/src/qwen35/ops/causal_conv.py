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
        last = window[:, S:]
    else:
        # Row n of the window is the first of the W - 1 inputs that precede token n: here, the first padded one. Looked
        # up as in a table of rows, because a gather moves single elements.
        n = lengths_mask.long().sum(dim=1, keepdim=True) + torch.arange(before, device=x.device)
        first = (before + S) * torch.arange(B, device=x.device).unsqueeze(1)
        last = F.embedding(first + n, window.flatten(0, 1))
    return y, last.transpose(1, 2).contiguous()
