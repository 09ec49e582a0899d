"""MultiheadAttention within torch's encoders and decoders: its layout is kept on their fast paths, nested or not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import lcattn
from lcattn.modules import MultiheadAttention
from tests.module_scores import TRIANGLE, B, E, H, T, sharpen

WINDOW = 3
OUTSIDE = (torch.arange(T)[:, None] - torch.arange(T)[None, :]).abs() > WINDOW


def torch_encoder(norm_first: bool = False, layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, layers)
    x = torch.randn(B, T, E)
    for layer in encoder.layers:
        sharpen(layer.self_attn, x)
    return encoder.eval()


def give_window(layer: nn.TransformerEncoderLayer) -> None:
    ours = MultiheadAttention(E, H, batch_first=True, layout=lcattn.Window(WINDOW, WINDOW))
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours.eval()


@pytest.fixture
def no_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch's fused encoder layer and its fused attention raise."""

    def taken(*args, **kwargs):
        raise AssertionError("torch's fast path was taken")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", taken)
    monkeypatch.setattr(torch, "_native_multi_head_attention", taken)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_keeps_our_layout_in_eval(norm_first: bool, no_fast_path: None) -> None:
    layer = torch_encoder(norm_first).layers[0]
    x = torch.randn(B, T, E)
    padding = torch.arange(T).expand(B, T) >= torch.tensor([[T], [T - 9]])
    with torch.no_grad(), pytest.raises(AssertionError, match="fast path was taken"):
        layer(x)
    # torch itself, off its fast path because gradients are wanted
    expected = layer(x, src_mask=OUTSIDE, src_key_padding_mask=padding)
    give_window(layer)
    with torch.no_grad():
        out = layer(x, src_key_padding_mask=padding)
    # tokens whose whole window is padding have no meaning in torch, where they are NaN
    real = ~padding
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x, src_key_padding_mask=padding)[real], out[real])


@pytest.mark.parametrize("swap_first", [True, False], ids=["swapped_then_stacked", "stacked_then_swapped"])
@pytest.mark.parametrize("left_aligned", [True, False])
def test_encoder_keeps_our_layout_in_eval(
    swap_first: bool, left_aligned: bool, no_fast_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = torch_encoder()
    ours = copy.deepcopy(theirs)
    if swap_first:
        give_window(ours.layers[0])
        with pytest.warns(UserWarning, match="_qkv_same_embed_dim"):
            ours = nn.TransformerEncoder(ours.layers[0], 2).eval()
        for ours_layer, layer in zip(ours.layers, theirs.layers, strict=True):
            ours_layer.load_state_dict(layer.state_dict())
    else:
        for layer in ours.layers:
            give_window(layer)
    x = torch.randn(B, T, E)
    padding = torch.arange(T).expand(B, T) >= torch.tensor([[T], [T - 9]])
    if not left_aligned:
        padding = padding.flip(1)
    expected = theirs(x, mask=OUTSIDE, src_key_padding_mask=padding)
    nested = []
    whole = MultiheadAttention.forward
    monkeypatch.setattr(
        MultiheadAttention,
        "forward",
        lambda m, q, *a, **k: (nested.append(q.is_nested), whole(m, q, *a, **k))[1],
    )
    with torch.no_grad():
        out = ours(x, src_key_padding_mask=padding)
    assert any(nested) == (left_aligned and not swap_first)
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_encoder_takes_a_causal_mask_beside_our_layout(no_fast_path: None) -> None:
    theirs = torch_encoder()
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        give_window(layer)
    x, causal = torch.randn(B, T, E), nn.Transformer.generate_square_subsequent_mask(T)
    expected = theirs(x, mask=OUTSIDE | TRIANGLE)
    with torch.no_grad():
        out = ours(x, mask=causal)
        hinted = ours(x, mask=causal, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(out, hinted)


def test_decoder_layer_takes_ours() -> None:
    layer = nn.TransformerDecoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    x, memory = torch.randn(B, T, E), torch.randn(B, 19, E)
    sharpen(layer.self_attn, x)
    sharpen(layer.multihead_attn, x)
    expected = layer(x, memory, tgt_mask=OUTSIDE | TRIANGLE)
    for name, layout in (("self_attn", lcattn.Window(WINDOW, 0)), ("multihead_attn", lcattn.Full())):
        ours = MultiheadAttention(E, H, batch_first=True, layout=layout)
        ours.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, ours)
    torch.testing.assert_close(layer(x, memory), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"attn_mask: .*may hold only"):
        layer(x, memory, tgt_mask=torch.randn(T, T))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_input(layout: torch.layout) -> None:
    ours = MultiheadAttention(E, H, batch_first=True, layout=lcattn.Window(WINDOW, 1))
    rows = [torch.randn(n, E) for n in (12, 5, 30)]
    x = torch.nested.nested_tensor(rows, layout=layout)
    out, weights = ours(x, x, x, need_weights=False)
    assert weights is None and out.layout == layout
    for got, row in zip(out.unbind(), rows, strict=True):
        torch.testing.assert_close(got, ours(row, row, row, need_weights=False)[0])
    with pytest.raises(ValueError, match="query: a nested tensor"):
        ours(x, x, x)
