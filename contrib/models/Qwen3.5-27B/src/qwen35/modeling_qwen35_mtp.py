# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The MTP head, which drafts the tokens after the next one, and the programs of a step with drafts.

The head pairs the decoder's output h_p at a position with the embedding of the token after it, x_{p+1}, and guesses the
one after that (DeepSeek-V3, arXiv 2412.19437, equations 21 to 23; its weights and their order as vLLM's
`qwen3_5_mtp.py` reads them):

    u = fc([norm_e(embed(x_{p+1})) | norm_h(h_p)]),   m = norm(layer(u) at position p),   logits of x_{p+2} = lm_head(m)

A further guess takes the guessed token for x_{p+1}, m for h_p, and the next position. embed and lm_head are the
decoder's, and h is its output after its last norm.

So a pair is complete one token late. Whatever the decoder takes in, the head goes over the same tokens, each with the
output before it: of the first token that is the one kept in the slot. Chunks and restored prefixes need no more.

A step of k drafts verifies x_{p+1} and the drafts of what follows in one pass of the decoder, accepts the longest run
of drafts that the decoder itself would have chosen, takes it in, and drafts again. The pass leaves the DeltaNet states
alone and yields what its tokens would change of them; taking in applies that of the accepted ones. Keys and values of
rejected tokens are overwritten by the next step. Where all rows are greedy, the step is one program, SPECULATION. Else
the host chooses between two: VERIFICATION gives it the logits, DRAFT takes what it accepted.

NxDI's classes for speculation (`NeuronFusedSpecModel`, EAGLE) are not used: they hold two models with a cache each,
take rejected tokens for harmless once their keys are overwritten, which those in a DeltaNet state are not, and NxDI's
CPU mode refuses them. What they would add, an argmax and a loop of k passes, is the smaller part of this module.

Letters: B rows, k drafts, T = k + 1 verified tokens, S tokens per row, D hidden, V vocabulary, P places of the bucket;
per rank: M KV heads, E head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .configuration_qwen35 import Qwen35InferenceConfig
from .layers.attention import RecentTokens
from .layers.cache import DeltaNetState, DeltaNetTokens, KeyValue, LayerState, Qwen35CacheManager, SpeculationState
from .layers.linear import column_parallel
from .layers.norms import Qwen35RMSNorm
from .nxdi import NeuronBaseModel
from .phase import Phase, cached_before, real_tokens
from .submodels import ModelInputs


class NeuronQwen35MTP(nn.Module):
    """The head; `layer` is a decoder layer with attention, of the main model's sizes."""

    def __init__(self, config: Qwen35InferenceConfig, layer: nn.Module) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = Qwen35RMSNorm(hidden, eps), Qwen35RMSNorm(hidden, eps)
        self.fc = column_parallel(config, 2 * hidden, hidden, gather_output=True)
        self.layers = nn.ModuleList([layer])  # under the checkpoint's name
        self.norm = Qwen35RMSNorm(hidden, eps)

    def key_values(self, embeds: torch.Tensor, hidden: torch.Tensor, rotary: torch.Tensor) -> KeyValue:
        """Keys and values [B, M, S, E] of pairs: embeds and hidden [B, S, D], rotary positions [B, 3, S] of hidden."""
        layer: Any = self.layers[0]
        key_value: KeyValue = layer.self_attn.key_values(rotary, layer.input_layernorm(self._pair(embeds, hidden)))
        return key_value

    def forward(
        self,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        rotary: torch.Tensor,
        cached: RecentTokens,
        recent: RecentTokens | None = None,
    ) -> tuple[torch.Tensor, KeyValue]:
        """The normed output [B, S, D], and keys and values, of pairs as in `key_values`.

        They see each other from left to right, what is `cached`, of P places, and the `recent` pairs between.
        """
        S = embeds.shape[1]
        index = torch.arange(S, device=embeds.device)
        output, key_value, *_ = self.layers[0](
            self._pair(embeds, hidden),
            phase=Phase.VERIFICATION,
            past_key_value=cached.key_value,
            attention_mask=cached.mask,
            active_mask=(index.unsqueeze(1) >= index).view(1, 1, S, S),
            position_ids=rotary[:, 0],
            rotary_position_ids=rotary,
            recent=recent,
        )
        return self.norm(output), key_value

    def _pair(self, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        normed = (self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden))
        paired: torch.Tensor = self.fc(torch.cat(normed, dim=-1))
        return paired


class Pairs(NamedTuple):
    """The tokens that a step takes in and the one after them, each with the decoder's output before it.

    tokens, positions [B, S]: x_{p+1} and those after it, at p + 1 and on, 0 at padding. hidden [B, S, D]: h_p, kept in
    the slot, and those after it. rotary [B, 3, S]: of hidden. taken_in [B]: how many tokens are, so that pairs 0 to
    taken_in of a row are real.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor
    rotary: torch.Tensor
    taken_in: torch.Tensor


class MTPPrograms(NeuronBaseModel):
    """What a decoder with an MTP head does beside decoding: the bodies of the programs that draft."""

    mtp: NeuronQwen35MTP | None
    kv_mgr: Qwen35CacheManager

    def with_head(
        self,
        updated: list[torch.Tensor],
        phase: Phase,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        seq_ids: torch.Tensor,
        position_ids: torch.Tensor,
        rotary: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """All entries after a call that took tokens in, from those of the decoder's layers, `updated`.

        embeds and hidden [B, S, D], the tokens and the decoder's outputs; rotary [B, S] or [B, 3, S], or None where
        those are position_ids [B, S].
        """
        assert self.mtp is not None, "asked where there is a head"
        kept, axes = self.kv_mgr.speculation, _axes(position_ids if rotary is None else rotary)
        first, first_rotary = torch.zeros_like(hidden[:, 0]), torch.zeros_like(axes[:, :, 0])
        if phase.reads_cache:
            first, first_rotary = (self.kv_mgr.rows_of(entry, seq_ids, phase) for entry in (kept.hidden, kept.rotary))
        key_value = self.mtp.key_values(
            embeds,
            torch.cat((first.unsqueeze(1), hidden[:, :-1]), dim=1),
            torch.cat((first_rotary.unsqueeze(2), axes[:, :, :-1]), dim=2),
        )
        head = self.config.num_hidden_layers
        cached = self.kv_mgr.update_kv_by_layer_id(head, seq_ids, position_ids, key_value, phase)
        real = real_tokens(position_ids, phase)
        last = torch.zeros_like(seq_ids) if real is None else real.sum(dim=1) - 1
        ends = (_at(hidden, last), _at(axes.transpose(1, 2), last))
        pairs = zip(kept[:2], ends, strict=True)
        new = [self.kv_mgr.written(entry, rows, seq_ids, phase) for entry, rows in pairs]
        return [*updated, *cached, *new, *(entry.view(entry.shape) for entry in kept[2:])]

    def run_program(self, phase: Phase, inputs: ModelInputs) -> list[torch.Tensor]:
        """What a program gives, then all entries.

        SPECULATION, of x_{p+1} and drafts: the decoder's choices [B, T] int32, of which one more is good than drafts
        were accepted; how many were, [B] int32, -1 where the logits of a good choice are no numbers; drafts [B, k]
        int32. VERIFICATION, of the same: logits [B, T, V] float32. DRAFT, of x_{p+1}, those of the tokens verified last
        that are accepted, and the one after them: drafts [B, k] int32.
        """
        if phase is Phase.DRAFT:
            return self._draft_after_verification(inputs)
        hidden, kept, logits = self._verify(inputs)
        if phase is Phase.VERIFICATION:
            return [logits, *self._keep_verified(inputs, hidden, kept)]
        return self._accept_and_draft(inputs, hidden, kept, logits)

    def _verify(self, inputs: ModelInputs) -> tuple[torch.Tensor, list[Any], torch.Tensor]:
        """One pass over the tokens [B, T]: outputs [B, T, D], what each layer would keep, and logits [B, T, V]."""
        hidden, kept = self.decode_tokens(inputs, Phase.VERIFICATION)
        return hidden, kept, self._logits(hidden)

    def decode_tokens(self, inputs: ModelInputs, phase: Phase) -> tuple[torch.Tensor, list[Any]]:
        """The decoder's normed outputs [B, T, D], and what each layer would keep, without writing it."""
        raise NotImplementedError("the decoder does")

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, V] float32, without the columns that pad the head to whole ranks."""
        logits: torch.Tensor = self.lm_head(hidden).float()
        return logits[..., : self.config.vocab_size]

    def _keep_verified(self, inputs: ModelInputs, hidden: torch.Tensor, kept: list[Any]) -> list[torch.Tensor]:
        """The entries once tokens are verified: keys and values are written, states wait for what is accepted."""
        seq_ids, manager, phase = inputs.seq_ids, self.kv_mgr, Phase.VERIFICATION
        changes = [state for state in kept if isinstance(state, DeltaNetTokens)]
        entries = manager.speculation
        waiting = [hidden]
        if changes:
            rank_one = [torch.cat((c.keys.flatten(2), c.u.flatten(2), c.g), dim=2) for c in changes]
            waiting += [torch.stack([c.conv_inputs for c in changes], dim=1), torch.stack(rank_one, dim=1)]
        written = [manager.written(*pair, seq_ids, phase) for pair in zip(entries[2:], waiting, strict=False)]
        unchanged = [entry.view(entry.shape) for entry in entries]
        speculation = SpeculationState(*unchanged[:2], *written, *unchanged[2 + len(written) :])
        return manager.update_all(self._attention_caches(inputs, kept), speculation)

    def _attention_caches(self, inputs: ModelInputs, kept: list[Any]) -> dict[int, LayerState]:
        """The attention layers' caches with the keys and values of verified tokens."""
        positions = inputs.position_ids.long()
        return {
            layer: self.kv_mgr.update_kv_by_layer_id(layer, inputs.seq_ids, positions, state, Phase.VERIFICATION)
            for layer, state in enumerate(kept)
            if isinstance(state, KeyValue)
        }

    def _accept_and_draft(
        self, inputs: ModelInputs, hidden: torch.Tensor, kept: list[Any], logits: torch.Tensor
    ) -> list[torch.Tensor]:
        """Greedy acceptance: the drafts before the first that is not the decoder's own choice."""
        chosen = logits.max(dim=-1).indices  # [B, T]
        real = real_tokens(inputs.position_ids, Phase.VERIFICATION)
        assert real is not None, "a step with drafts may be padded"
        accepted, good = torch.zeros_like(inputs.seq_ids), _finite(logits[:, 0])
        running = torch.ones_like(real[:, 0])
        for i in range(1, chosen.shape[1]):
            running = running & real[:, i] & (inputs.input_ids[:, i] == chosen[:, i - 1])
            accepted = accepted + running.to(accepted.dtype)
            good = good & (_finite(logits[:, i]) | ~running)
        caches = self._attention_caches(inputs, kept)
        changes = {layer: state for layer, state in enumerate(kept) if isinstance(state, DeltaNetTokens)}
        pairs = self._pairs(inputs, torch.cat((inputs.input_ids[:, :1], chosen), dim=1), hidden, accepted + 1)
        drafts, entries = self._take_in_and_draft(inputs.seq_ids, pairs, caches, changes)
        return [chosen.int(), torch.where(good, accepted, -1).int(), drafts, *entries]

    def _pairs(self, inputs: ModelInputs, tokens: torch.Tensor, hidden: torch.Tensor, taken_in: torch.Tensor) -> Pairs:
        """Of tokens [B, T + 1], x_{p+1} first, and of the outputs [B, T, D] at its place and on."""
        phase, entries = Phase.VERIFICATION, self.kv_mgr.speculation
        before, before_rotary = (
            self.kv_mgr.rows_of(e, inputs.seq_ids, phase) for e in (entries.hidden, entries.rotary)
        )
        first = inputs.position_ids[:, :1].long()
        index = torch.arange(tokens.shape[1], device=tokens.device)
        given = first if inputs.rotary_position_id is None else inputs.rotary_position_id[:, :1].long()
        following = _axes(given + index[:-1])
        return Pairs(
            tokens=tokens,
            positions=torch.where(index <= taken_in.unsqueeze(1), first + index, 0),
            hidden=torch.cat((before.unsqueeze(1), hidden), dim=1),
            rotary=torch.cat((before_rotary.unsqueeze(2).long(), following), dim=2),
            taken_in=taken_in,
        )

    def _draft_after_verification(self, inputs: ModelInputs) -> list[torch.Tensor]:
        """Take in what the host accepted of the tokens verified last, none of a prompt just encoded, and draft."""
        phase, entries, manager = Phase.VERIFICATION, self.kv_mgr.speculation, self.kv_mgr
        hidden, conv_inputs, rank_one = (manager.rows_of(entry, inputs.seq_ids, phase) for entry in entries[2:])
        real = real_tokens(inputs.position_ids, phase)
        assert real is not None, "a step with drafts may be padded"
        pairs = self._pairs(inputs, inputs.input_ids, hidden, real.sum(dim=1) - 1)
        changes = {
            layer: self._layer_tokens(layer, conv_inputs[:, i], rank_one[:, i])
            for i, layer in enumerate(self.config.linear_attention_layers)
        }
        drafts, updated = self._take_in_and_draft(inputs.seq_ids, pairs, {}, changes)
        return [drafts, *updated]

    def _layer_tokens(self, layer: int, conv_inputs: torch.Tensor, rank_one: torch.Tensor) -> DeltaNetTokens:
        """`DeltaNetTokens` of what `_keep_verified` put side by side."""
        mixer: Any = self.layers[layer].linear_attn
        keys, u, g = rank_one.split((mixer.key_dim, mixer.value_dim, mixer.num_value_heads), dim=2)
        return DeltaNetTokens(
            conv_inputs, keys.unflatten(2, (-1, mixer.key_head_dim)), u.unflatten(2, (-1, mixer.value_head_dim)), g
        )

    def _take_in_and_draft(
        self,
        seq_ids: torch.Tensor,
        pairs: Pairs,
        caches: dict[int, LayerState],
        changes: dict[int, DeltaNetTokens],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Drafts [B, k] int32, and all entries: caches as they are given, states and those of drafting taken along."""
        manager, phase = self.kv_mgr, Phase.VERIFICATION
        layers = dict(caches)
        for layer, tokens in changes.items():
            mixer: Any = self.layers[layer].linear_attn
            state = DeltaNetState(*manager.get_kv_by_layer_id(layer, self.n_positions, phase, seq_ids))
            new_state = mixer.commit(state, tokens, pairs.taken_in)
            layers[layer] = manager.update_kv_by_layer_id(layer, seq_ids, pairs.positions, new_state, phase)
        drafts, key_value = self._draft(seq_ids, pairs)
        head = self.config.num_hidden_layers
        # The last token of a sequence that is full gets the place after it, which is of the room for padding.
        layers[head] = manager.update_kv_by_layer_id(head, seq_ids, pairs.positions, key_value, phase)
        ends = (_at(pairs.hidden, pairs.taken_in), _at(pairs.rotary.transpose(1, 2), pairs.taken_in))
        kept = manager.speculation
        new = [manager.written(entry, rows, seq_ids, phase) for entry, rows in zip(kept[:2], ends, strict=True)]
        speculation = SpeculationState(*new, *(entry.view(entry.shape) for entry in kept[2:]))
        return drafts, manager.update_all(layers, speculation)

    def _draft(self, seq_ids: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, KeyValue]:
        """Drafts [B, k] int32 of what follows the last pair, and keys and values of the pairs.

        What earlier drafts of this call leave in the head is kept beside its cache, not in it: the next step goes over
        those tokens again, with the decoder's own outputs.
        """
        assert self.mtp is not None, "asked where there is a head"
        place = torch.arange(self.n_positions, device=seq_ids.device)
        before = cached_before(pairs.positions, self.n_positions) & (place > 0)  # there is no pair at 0
        cached = RecentTokens(
            KeyValue(
                *self.kv_mgr.get_kv_by_layer_id(
                    self.config.num_hidden_layers, self.n_positions, Phase.VERIFICATION, seq_ids
                )
            ),
            before.view(-1, 1, 1, self.n_positions),
        )
        output, key_value = self.mtp(self.embed_tokens(pairs.tokens), pairs.hidden, pairs.rotary, cached)
        index = torch.arange(pairs.tokens.shape[1], device=seq_ids.device)
        real = (index <= pairs.taken_in.unsqueeze(1)).view(-1, 1, 1, len(index))
        recent = RecentTokens(key_value, real)
        hidden = _at(output, pairs.taken_in).unsqueeze(1)
        rotary = _at(pairs.rotary.transpose(1, 2), pairs.taken_in).unsqueeze(2)
        drafts = [self._logits(hidden).max(dim=-1).indices]  # each [B, 1]
        for _ in range(1, self.config.num_speculative_tokens):
            rotary = rotary + 1
            hidden, own = self.mtp(self.embed_tokens(drafts[-1]), hidden, rotary, cached, recent)
            drafts.append(self._logits(hidden).max(dim=-1).indices)
            recent = _joined(recent, own)
        return torch.cat(drafts, dim=1).int(), key_value


def _axes(positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions [B, 3, S] of those on three axes, or of [B, S], the same on all."""
    return positions if positions.dim() == 3 else positions.unsqueeze(1).expand(-1, 3, -1)


def _at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, S, n] at index [B]: [B, n]."""
    return torch.gather(x, 1, index.long().view(-1, 1, 1).expand(-1, 1, x.shape[2]))[:, 0]


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Whether all of logits [B, V] are numbers, [B] bool: the largest of those that are not would be any of them."""
    largest = torch.finfo(logits.dtype).max
    return ((logits >= -largest) & (logits <= largest)).all(dim=1)


def _joined(recent: RecentTokens, key_value: KeyValue) -> RecentTokens:
    """With a further pair, of each row."""
    pairs = zip(recent.key_value, key_value, strict=True)
    mask = torch.cat((recent.mask, torch.ones_like(recent.mask[..., :1])), dim=3)
    return RecentTokens(KeyValue(*(torch.cat(both, dim=2) for both in pairs)), mask)
