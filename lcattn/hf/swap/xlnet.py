"""XLNet: two-stream relative attention with segments."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.xlnet import modeling_xlnet as xlnet

from ...position import TransformerXL
from ..masks import Mask
from . import replaces
from .base import refuse_weights
from .given import attend, once, read_mask, unmasked

# XLNet's own tokenizer makes four: two texts, the class token and padding
_MAX_SEGMENTS = 16


@once
def _mask(values: Tensor, T: int, S: int) -> Mask:
    if values.dim() != 4 or values.shape[0] not in (1, T) or values.shape[1] != S or values.shape[3] != 1:
        raise ValueError(f"attn_mask: expected [{T} or 1, {S}, B or 1, 1], got {list(values.shape)}")
    hidden = values.data[..., 0]
    if not bool(((hidden == 0) | (hidden == 1)).all()):
        raise ValueError("attn_mask: expected 0 where a key is seen and 1 where it is not, got other values")
    return read_mask((hidden == 0).permute(2, 0, 1), T)


@once
def _blind(values: Tensor) -> Tensor:
    """Queries that see no key, [T or 1, B or 1] bool."""
    return (values.data[..., 0] != 0).all(1)


@once
def _segments(seg_mat: Tensor) -> tuple[Tensor, Tensor]:
    """What seg_mat [T, S, B, 2] was made of: the segment of every query and key, one-hot, [B, T, C] and [B, S, C] bool.

    Queries are the last T keys. A key whose segment no query has belongs to none.
    """
    T, S, B, _ = seg_mat.shape
    same = (seg_mat.data[..., 0] != 0).permute(2, 0, 1)
    other = (seg_mat.data[..., 1] != 0).permute(2, 0, 1)
    segment = torch.full((B, S), -1, device=seg_mat.device)
    rows = torch.arange(B, device=seg_mat.device)
    n = 0
    while n < _MAX_SEGMENTS and bool((left := segment[:, S - T :] < 0).any()):
        first = left.int().argmax(1)
        segment = torch.where(left.any(1)[:, None] & (segment < 0) & same[rows, first], n, segment)
        n += 1
    queries = segment[:, S - T :]
    alike = queries[:, :, None] == segment[:, None, :]
    if bool((queries < 0).any()) or not (torch.equal(same, alike) and torch.equal(other, ~alike)):
        raise NotImplementedError(
            "seg_mat: expected, one-hot, whether query and key have equal token_type_ids, of"
            f" {_MAX_SEGMENTS} kinds at most"
        )
    kinds = torch.arange(n, device=seg_mat.device)
    return queries[..., None] == kinds, segment[..., None] == kinds


@once
def _by_batch(values: Tensor) -> tuple[Tensor, ...]:
    """[T, S, B, n] as B tensors [T, S, 1, n] of their own, so that what is read off each is remembered."""
    return tuple(part.clone() for part in values.data.split(1, dim=2))


def _split(values: Tensor | None, B: int) -> tuple[Tensor | None, ...]:
    if values is None or values.shape[2] == 1:
        return (values,) * B
    return _by_batch(values)


@replaces(xlnet.XLNetRelativeAttention)
class XLNetRelativeAttention(xlnet.XLNetRelativeAttention):
    """XLNet's relative attention on lcattn; same parameters, outputs and gradients, in both streams.

    score = scale * ((q_i + r_w_bias) . k_j + (q_i + r_r_bias) . r_{i - j} + (q_i + r_s_bias) . seg_embed[s_ij]). The
    segment term needs no s_ij: less seg_embed[1], which adds the same to a whole row, it is a product of what the
    query says, in the column of its segment, and 1 in the column of the key's.

    Rows of r that differ within the batch (bi_data, dropout of the embeddings in training) cost one call each.
    NotImplementedError: attention weights; a predicted token that sees no key, to which XLNet gives the mean of all.

    Source: Yang et al. 2019 (XLNet), sections 2.3 to 2.5; Dai et al. 2019, section 3.3.
    """

    def forward(
        self,
        h: Tensor,
        g: Tensor | None,
        attn_mask_h: Tensor | None,
        attn_mask_g: Tensor | None,
        r: Tensor,
        seg_mat: Tensor | None,
        mems: Tensor | None = None,
        target_mapping: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        refuse_weights(self, output_attentions)
        if g is not None and attn_mask_g is not None:
            blind = _blind(attn_mask_g)
            if target_mapping is not None:
                blind = blind & (target_mapping != 0).any(0)
            if bool(blind.any()):
                raise NotImplementedError(
                    f"perm_mask: {int(blind.sum())} predicted tokens see no key; every predicted token must see one"
                )
        # the same for all, it is projected once
        if r.shape[1] > 1 and torch.equal(r, r[:, :1].expand_as(r)):
            r = r[:, :1]
        return super().forward(
            h, g, attn_mask_h, attn_mask_g, r.to(self.r.dtype), seg_mat, mems=mems, target_mapping=target_mapping
        )

    def rel_attn_core(
        self,
        q_head: Tensor,
        k_head_h: Tensor,
        v_head_h: Tensor,
        k_head_r: Tensor,
        seg_mat: Tensor | None = None,
        attn_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Tensor:
        """out [T, B, H, D] of q [T, B, H, D], k and v [S, B, H, D], r [L, B or 1, H, D] for offsets from -S."""
        refuse_weights(self, output_attentions)
        T, S, B = q_head.shape[0], k_head_h.shape[0], q_head.shape[1]
        if k_head_r.shape[1] > 1:
            heads = zip(*(t.split(1, dim=1) for t in (q_head, k_head_h, v_head_h, k_head_r)), strict=True)
            given = zip(heads, _split(seg_mat, B), _split(attn_mask, B), strict=True)
            parts = [self.rel_attn_core(q, k, v, r, seg, mask) for (q, k, v, r), seg, mask in given]
            return torch.cat(parts, 1)
        if k_head_r.shape[0] <= S:
            raise ValueError(f"r: expected offsets from -{S} to 0 at least, {S + 1} rows, got {k_head_r.shape[0]}")
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q_head, k_head_h, v_head_h))
        r, u_bias, v_bias = k_head_r[:, 0].transpose(0, 1), self.r_w_bias, self.r_r_bias
        if seg_mat is not None:
            of_query, of_key = (hot[:, None].to(q.dtype) for hot in _segments(seg_mat))
            differs = self.seg_embed[0] - self.seg_embed[1]
            says = ((q + self.r_s_bias[:, None]) * differs[:, None]).sum(3, keepdim=True)
            q = torch.cat([q, (says * of_query).to(q.dtype)], 3)
            k = torch.cat([k, of_key.expand(-1, k.shape[1], -1, -1)], 3)
            v, r, u_bias, v_bias = (F.pad(t, (0, of_key.shape[3])) for t in (v, r, u_bias, v_bias))
        mask = unmasked(T, S, q.device) if attn_mask is None else _mask(attn_mask, T, S)
        position = [TransformerXL(r, u_bias, v_bias, min_offset=-S)]
        out = attend(self, q, k, v, mask, position, self.scale, self.dropout)
        return out[..., : self.d_head].permute(2, 0, 1, 3)
