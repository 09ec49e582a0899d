"""All modules: saved and loaded, printed, and refused what they cannot be made of."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import lcattn
from lcattn.modules import ChunkedSelfAttention, EncoderLayer, MultiheadAttention
from tests.module_scores import B, E, H, T

BAD_MODULES = {
    "layout": (lambda: MultiheadAttention(E, H, layout="causal"), TypeError, "layout: expected a layout"),
    "mha_position": (
        lambda: MultiheadAttention(E, H, position=3),
        TypeError,
        "position: expected a position",
    ),
    "mha_bias_heads": (
        lambda: MultiheadAttention(E, H, position=[lcattn.Rotary(), lcattn.RelativeBias(torch.zeros(3, 5), 0)]),
        ValueError,
        r"table must have 4 heads \(or 1\), got 3",
    ),
    "slopes": (
        lambda: ChunkedSelfAttention(E, H, 8, position=lcattn.Alibi(torch.ones(3))),
        ValueError,
        "slopes must have 4 heads, got 3",
    ),
    "features": (
        lambda: ChunkedSelfAttention(E, H, 8, position=lcattn.Shaw(torch.zeros(1, 3, E), 0)),
        ValueError,
        "rel_key must have the head dim of q, 8, got",
    ),
    "mha_dropout": (lambda: MultiheadAttention(E, H, dropout=2.0), ValueError, "dropout: expected a probability"),
    "mha_nan": (lambda: MultiheadAttention(E, H, dropout=float("nan")), ValueError, "dropout: expected a finite"),
    "lookback": (lambda: ChunkedSelfAttention(E, H, 8, lookback=None), ValueError, "lookback: .* got None"),
    "lookahead": (lambda: ChunkedSelfAttention(E, H, 8, lookahead=None), ValueError, "lookahead: .* got None"),
    "heads": (
        lambda: ChunkedSelfAttention(E, 5, 8),
        ValueError,
        "embed_dim: expected a multiple of num_heads=5",
    ),
    "kv_heads": (
        lambda: ChunkedSelfAttention(E, H, 8, num_kv_heads=3),
        ValueError,
        "num_kv_heads: expected a divisor",
    ),
    "chunk": (lambda: ChunkedSelfAttention(E, H, 0), ValueError, "chunk must be an integer >= 1"),
    "n_global": (
        lambda: ChunkedSelfAttention(E, H, 8, n_global=-1),
        ValueError,
        "n_global: expected 0 or more",
    ),
    "also": (lambda: ChunkedSelfAttention(E, H, 8, also="Full()"), TypeError, "also: expected a layout"),
    "dropout": (
        lambda: ChunkedSelfAttention(E, H, 8, dropout=1 - 1e-9),
        ValueError,
        "dropout: expected a probability",
    ),
    "position": (lambda: ChunkedSelfAttention(E, H, 8, position="rotary"), ValueError, "position: expected"),
    "activation": (
        lambda: EncoderLayer(E, H, 8, activation="tanh"),
        ValueError,
        "activation: expected one of gelu",
    ),
    "x": (
        lambda: ChunkedSelfAttention(E, H, 8)(torch.randn(T, E)),
        ValueError,
        r"x: expected \[batch, length, 32\]",
    ),
    "k_pos": (
        lambda: ChunkedSelfAttention(E, H, 8)(torch.randn(B, T, E), q_pos=torch.arange(T)),
        ValueError,
        "k_pos: expected coordinates beside q_pos",
    ),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_a_bad_module_is_named(name: str) -> None:
    make, error, message = BAD_MODULES[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiheadAttention(E, H, batch_first=True, layout=lcattn.Window(4, 0), position=lcattn.Rotary()),
        lambda: ChunkedSelfAttention(E, H, 8, n_global=2, num_kv_heads=2),
        lambda: EncoderLayer(E, H, 8, causal=True),
    ],
    ids=["MultiheadAttention", "ChunkedSelfAttention", "EncoderLayer"],
)
def test_saving(make) -> None:
    module, other = make().eval(), make().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    call = (lambda m, x: m(x, x, x)[0]) if isinstance(module, MultiheadAttention) else lambda m, x: m(x)
    x = torch.randn(B, T, E)
    other.load_state_dict(module.state_dict())
    assert torch.equal(call(other, x), call(module, x))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(call(torch.load(file, weights_only=False), x), call(module, x))


def test_repr_tells_the_layout() -> None:
    assert "layout=Window(4, 0)" in repr(MultiheadAttention(E, H, layout=lcattn.Window(4, 0)))
    text = repr(EncoderLayer(E, H, 8, causal=True, num_kv_heads=2, dropout=0.1))
    for part in (
        "num_kv_heads=2",
        "(Chunked(8, 1, 0, 0) & Causal())",
        "RelativeBias, table=[4, 16]",
        "dropout=0.1",
    ):
        assert part in text
