"""Longformer and the encoder-decoder LED on lcattn: sliding windows, global tokens with projections of their own.

Source: Beltagy et al. 2020 (Longformer), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.models.led import modeling_led
from transformers.models.longformer import modeling_longformer

from ...api import attention, attention_with_lse, merge
from ...layout import Window
from ..masks import Mask
from ..models import attention_forward
from . import replaces
from .base import (
    conversion_of,
    coordinates,
    dropout_of,
    join_heads,
    positions_of,
    real_keys,
    refuse_weights,
    split_heads,
    view_of,
)


class _Windowed(nn.Module):
    """Self-attention of a sliding window and of global tokens, at any length.

    A token sees the real keys at most one_sided_attn_window_size away, and every global token, by query, key and value.
    A global token sees every real token, by query_global, key_global and value_global. What `use` puts on the module
    replaces the window; global tokens stay.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_global: nn.Linear
    key_global: nn.Linear
    value_global: nn.Linear
    config: Any
    num_heads: int
    layer_id: int
    one_sided_attn_window_size: int
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor]:
        """Attention of hidden_states [B, T, C]; attention_mask [B, T], < 0 at padding, > 0 at global tokens.

        Returns:
            (out [B, T, C],), at padding whatever its keys give.

        Raises:
            NotImplementedError: output_attentions; ValueError: the configuration asks for a dilated window.
        """
        refuse_weights(self, output_attentions)
        self._refuse_dilation()
        if attention_mask is None:
            attention_mask = hidden_states.new_zeros(hidden_states.shape[:2])
        is_global, real = attention_mask > 0, attention_mask >= 0
        q, k, v = (split_heads(of(hidden_states), self.num_heads) for of in (self.query, self.key, self.value))
        window = Window(self.one_sided_attn_window_size, self.one_sided_attn_window_size)
        position = positions_of(self)
        view = view_of(self, hidden_states, window, real_keys(real), relative=position is not None)
        dropout = dropout_of(self, self.dropout)
        local = attention_with_lse(
            q,
            k,
            v,
            layout=view.layout,
            position=position,
            key_mask=real_keys(real & ~is_global),
            q_pos=view.q_pos,
            k_pos=view.k_pos,
            dropout=dropout,
        )
        counts = is_global.sum(1)
        n_global = int(counts.max())
        if n_global == 0:
            return (join_heads(local[0]),)
        # each row's global tokens in order; rows with fewer are filled up by tokens that `taken` hides
        index = is_global.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n_global]
        taken = torch.arange(n_global, device=index.device) < counts[:, None]
        T = hidden_states.shape[1]
        q_pos, k_pos = (coordinates(pos, T, index.device) for pos in (view.q_pos, view.k_pos))
        side = attention_with_lse(
            q,
            *(x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v)),
            position=position,
            key_mask=taken,
            # without a position coordinates are of no matter, and the default ones share a table
            q_pos=coordinates(None, T, index.device) if position is None else q_pos,
            k_pos=None if position is None else k_pos.expand(len(index), -1).gather(1, index),
            dropout=dropout,
        )
        out = join_heads(merge([local, side])[0])
        chosen = hidden_states.gather(1, index[..., None].expand(-1, -1, hidden_states.shape[2]))
        rows = attention(
            split_heads(self.query_global(chosen), self.num_heads),
            split_heads(self.key_global(hidden_states), self.num_heads),
            split_heads(self.value_global(hidden_states), self.num_heads),
            position=position,
            key_mask=real_keys(real),
            q_pos=None if position is None else q_pos.expand(len(index), -1).gather(1, index),
            k_pos=None if position is None else k_pos,
            dropout=dropout,
        )
        return (out.masked_scatter(is_global[..., None], join_heads(rows)[taken].to(out.dtype)),)

    def _refuse_dilation(self) -> None:
        """transformers ignores a dilation in silence, so that what is meant is for the caller to say."""
        dilation = getattr(self.config, "attention_dilation", None) or 1
        if not isinstance(dilation, int):
            dilation = dilation[self.layer_id]
        if dilation != 1 and conversion_of(self) is None:
            side = self.one_sided_attn_window_size
            raise ValueError(
                f"{type(self).__name__}: attention_dilation is {dilation} in layer {self.layer_id}, expected 1, which"
                f" is what transformers computes; for dilated windows: lcattn.hf.use(model,"
                f" lcattn.Dilated({side}, {side}, {dilation}))"
            )


@replaces(modeling_longformer.LongformerSelfAttention)
class LongformerSelfAttention(_Windowed, modeling_longformer.LongformerSelfAttention):
    __doc__ = _Windowed.__doc__


@replaces(modeling_led.LEDEncoderSelfAttention)
class LEDEncoderSelfAttention(_Windowed, modeling_led.LEDEncoderSelfAttention):
    __doc__ = _Windowed.__doc__


@replaces(modeling_longformer.LongformerModel)
class LongformerModel(modeling_longformer.LongformerModel):
    """Longformer that does not fill up its input to whole windows."""

    def _pad_to_window_size(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pad_token_id: int,
    ) -> tuple[Any, ...]:
        return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds


class _OneRow(Tensor):
    """A mask of which LED reads one row of keys, after expanding it to as many rows as there are queries."""

    def expand(self, *sizes: Any) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


@replaces(modeling_led.LEDEncoder)
class LEDEncoder(modeling_led.LEDEncoder):
    """LED's encoder that does not fill up its input to whole windows, nor expands its mask to [B, 1, T, T]."""

    def _pad_to_window_size(
        self, input_ids: Tensor | None, attention_mask: Tensor, inputs_embeds: Tensor | None, pad_token_id: int
    ) -> tuple[Any, ...]:
        return 0, input_ids, attention_mask.as_subclass(_OneRow), inputs_embeds


@replaces(modeling_led.LEDDecoderAttention)
class LEDDecoderAttention(modeling_led.LEDDecoderAttention):
    """LED's decoder attention: over its own tokens, causal, or over the encoder's."""

    layer_idx: Any
    dropout: Any

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Mask | Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None, Any]:
        """Attention of hidden_states [B, T, C] to key_value_states [B, S, C], or to themselves and the cache.

        Returns:
            (out [B, T, C], None, past_key_values).

        Raises:
            NotImplementedError: output_attentions.
        """
        refuse_weights(self, output_attentions)
        cross = key_value_states is not None
        cache, updated = past_key_values, False
        if isinstance(past_key_values, EncoderDecoderCache):
            updated = bool(past_key_values.is_updated.get(self.layer_idx))
            cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
        if cross and cache is not None and updated:
            k, v = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            states = hidden_states if key_value_states is None else key_value_states
            k, v = (split_heads(of(states), self.num_heads) for of in (self.k_proj, self.v_proj))
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
                if cross and cache is not past_key_values:
                    past_key_values.is_updated[self.layer_idx] = True
        out, _ = attention_forward(
            self,
            split_heads(self.q_proj(hidden_states), self.num_heads),
            k,
            v,
            attention_mask,
            dropout=dropout_of(self, self.dropout),
            scaling=self.scaling,
            is_causal=not cross,
        )
        return self.out_proj(out.flatten(2)), None, past_key_values
