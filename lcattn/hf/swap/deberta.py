"""DeBERTa and DeBERTa-v2/v3: disentangled self-attention, and encoders that make no [T, T] tensors for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as v2

from ...position import Disentangled
from ...position.content import deberta_buckets
from ..masks import Mask
from . import replaces
from .base import join_heads, refuse_weights, split_heads
from .given import attend, once, read_mask


@once
def _mask(values: Tensor, T: int) -> Mask:
    if values.dim() != 4 or values.shape[1] != 1 or values.shape[2] not in (1, T) or values.shape[3] != T:
        raise ValueError(f"attention_mask: expected [B or 1, 1, {T} or 1, {T}], got {list(values.shape)}")
    return read_mask(values.data[:, 0] != 0, T)


@once
def _is_bucketed(relative_pos: Tensor, T: int, span: int, max_distance: int | None) -> bool:
    """Whether relative_pos [..., T, T] holds what `Disentangled` computes for itself."""
    if relative_pos.shape[-2:] != (T, T):
        return False
    index, first = deberta_buckets(span, max_distance, relative_pos.device)
    offset = torch.arange(1 - T, T, device=relative_pos.device)
    expected = index[(offset - first).clamp(0, len(index) - 1)]
    # all that distance decides is in the first column, upwards, and the first row
    by_offset = torch.cat([relative_pos[..., 1:, 0].flip(-1), relative_pos[..., 0, :]], -1).long()
    found = (by_offset + span).clamp(0, 2 * span - 1)
    alike = torch.equal(relative_pos[..., 1:, 1:], relative_pos[..., :-1, :-1])
    return alike and bool((found == expected).all())


def _check_relative_pos(relative_pos: Tensor | None, T: int, span: int, max_distance: int | None) -> None:
    if relative_pos is not None and not _is_bucketed(relative_pos, T, span, max_distance):
        raise NotImplementedError(
            f"relative_pos: expected None or the model's own buckets of query - key, [1, {T}, {T}],"
            f" got others of {list(relative_pos.shape)}"
        )


def _embeddings(rel_embeddings: Tensor, middle: int, span: int) -> Tensor:
    if rel_embeddings.dim() != 2 or rel_embeddings.shape[0] < middle + span:
        got = list(rel_embeddings.shape)
        raise ValueError(f"rel_embeddings: expected [{2 * middle}, hidden size], got {got}")
    return rel_embeddings[middle - span : middle + span]


@replaces(v2.DisentangledSelfAttention)
class DebertaV2SelfAttention(v2.DisentangledSelfAttention):
    """DeBERTa-v2's self-attention on lcattn; same parameters, outputs and gradients.

    Rows of hidden queries, which nothing sees, see the real keys. relative_pos None stands for the usual positions.
    NotImplementedError: attention weights, positions other than the model's own, queries of another length.

    Source: He et al. 2021 (DeBERTa), equation 4.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        refuse_weights(self, output_attentions)
        if query_states is None:
            query_states = hidden_states
        if query_states.shape != hidden_states.shape:
            got = list(query_states.shape)
            raise NotImplementedError(
                f"query_states: expected {list(hidden_states.shape)}, as hidden_states, got {got}"
            )
        H, T = self.num_attention_heads, hidden_states.shape[1]
        q = split_heads(self.query_proj(query_states), H)
        k = split_heads(self.key_proj(hidden_states), H)
        v = split_heads(self.value_proj(hidden_states), H)
        terms = [name for name in ("c2p", "p2c") if name in self.pos_att_type]
        position = []
        if self.relative_attention and terms:
            if rel_embeddings is None:
                raise ValueError(
                    "rel_embeddings: expected the encoder's, since the model has relative attention, got None"
                )
            span = self.pos_ebd_size
            max_distance = self.max_relative_positions if self.position_buckets > 0 else None
            _check_relative_pos(relative_pos, T, span, max_distance)
            rel = _embeddings(self.pos_dropout(rel_embeddings), span, span)
            keys = queries = None
            if "c2p" in terms:
                keys = split_heads((self.key_proj if self.share_att_key else self.pos_key_proj)(rel), H)
            if "p2c" in terms:
                queries = split_heads((self.query_proj if self.share_att_key else self.pos_query_proj)(rel), H)
            position.append(Disentangled(keys, queries, max_distance))
        scale = (q.shape[3] * (1 + len(terms))) ** -0.5
        out = attend(self, q, k, v, _mask(attention_mask, T), position, scale, self.dropout)
        return join_heads(out), None


@replaces(v1.DisentangledSelfAttention)
class DebertaSelfAttention(v1.DisentangledSelfAttention):
    """DeBERTa's self-attention on lcattn; same parameters, outputs and gradients.

    Rows of hidden queries, which nothing sees, see the real keys. relative_pos None stands for the usual positions.
    NotImplementedError: attention weights, positions other than the model's own, query_states, talking heads.

    Source: He et al. 2021 (DeBERTa), equation 4.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        refuse_weights(self, output_attentions)
        if query_states is not None:
            raise NotImplementedError("query_states: expected None, got a tensor; DeBERTa computes none of its own")
        if self.talking_head:
            raise NotImplementedError(f"{type(self).__name__}: talking_head mixes weights, which are never formed")
        H, T = self.num_attention_heads, hidden_states.shape[1]
        q, k, v = split_heads(self.in_proj(hidden_states), H).chunk(3, dim=-1)
        q = q + split_heads(self.q_bias[None], H)
        v = v + split_heads(self.v_bias[None], H)
        terms = [name for name in ("c2p", "p2c") if name in self.pos_att_type]
        position = []
        if self.relative_attention and rel_embeddings is not None and terms:
            # what T tokens can reach
            span = min(T, self.max_relative_positions)
            _check_relative_pos(relative_pos, T, span, None)
            rel = _embeddings(self.pos_dropout(rel_embeddings), self.max_relative_positions, span)
            keys = split_heads(self.pos_proj(rel), H) if "c2p" in terms else None
            queries = split_heads(self.pos_q_proj(rel), H) if "p2c" in terms else None
            position.append(Disentangled(keys, queries))
        scale = (q.shape[3] * (1 + len(self.pos_att_type))) ** -0.5
        out = attend(self, q, k, v, _mask(attention_mask, T), position, scale, self.dropout)
        return join_heads(out), None


def _padding_alone(self: Any, attention_mask: Tensor) -> Tensor:
    """[B, T] as [B, 1, 1, T]; a mask by pairs [B, T, T] as [B, 1, T, T]."""
    if attention_mask.dim() == 2:
        return attention_mask[:, None, None]
    return attention_mask[:, None] if attention_mask.dim() == 3 else attention_mask


def _as_given(
    self: Any, hidden_states: Tensor, query_states: Tensor | None = None, relative_pos: Tensor | None = None
) -> Tensor | None:
    return relative_pos


@replaces(v2.DebertaV2Encoder)
class DebertaV2Encoder(v2.DebertaV2Encoder):
    """DeBERTa-v2's encoder, which hands its layers padding as it came and no table of T x T positions."""

    get_attention_mask = _padding_alone
    get_rel_pos = _as_given


@replaces(v1.DebertaEncoder)
class DebertaEncoder(v1.DebertaEncoder):
    """DeBERTa's encoder, which hands its layers padding as it came and no table of T x T positions."""

    get_attention_mask = _padding_alone
    get_rel_pos = _as_given
