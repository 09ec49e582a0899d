"""ChunkedSelfAttention and EncoderLayer, against attention written out in the test and against torch's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lcattn
from lcattn import tolerance
from lcattn.modules import ChunkedSelfAttention, EncoderLayer
from tests.module_scores import B, E, H, T, dense_bias, sharpen


def dense_chunked(
    module: ChunkedSelfAttention, x: Tensor, key_mask: Tensor | None, q_pos: Tensor, k_pos: Tensor
) -> Tensor:
    """ChunkedSelfAttention written out densely; coordinates [B, T]."""
    D, G = module.head_dim, module.num_kv_heads
    C, lookback, lookahead, n_global, causal = module.test_config
    q, k, v = module.qkv(x).split((E, G * D, G * D), 2)
    q = q.unflatten(2, (H, D)).transpose(1, 2)
    k, v = (y.unflatten(2, (G, D)).transpose(1, 2).repeat_interleave(H // G, 1) for y in (k, v))
    i, j = q_pos[:, None, :, None], k_pos[:, None, None, :]
    c = torch.div(j, C, rounding_mode="floor") - torch.div(i, C, rounding_mode="floor")
    seen = (c >= -lookback) & (c <= lookahead)
    if n_global:
        seen = seen | (i < n_global) | (j < n_global)
    if causal:
        seen = seen & (j <= i)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    table = module.position.table
    index = (j - i + (lookback + 1) * C - 1).clamp(0, table.shape[1] - 1).expand(B, H, T, T)
    score = q @ k.mT / math.sqrt(D) + table[torch.arange(H)[:, None, None], index]
    score = score.masked_fill(~seen, -math.inf)
    score = torch.where(seen.any(3, keepdim=True), score, 0.0)
    p = torch.softmax(score, 3) * seen
    return module.out((p @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "config",
    [(8, 1, 0, 0, True), (8, 1, 1, 0, False), (5, 2, 0, 3, True), (16, 0, 1, 2, False), (64, 1, 0, 0, True)],
    ids=str,
)
def test_chunked_self_attention_is_the_formula(config: tuple, masked: bool, dtype: torch.dtype) -> None:
    C, lookback, lookahead, n_global, causal = config
    ours = ChunkedSelfAttention(
        E, H, C, lookback, lookahead, causal=causal, num_kv_heads=2, n_global=n_global, dtype=dtype
    )
    ours.test_config = config
    x = torch.randn(B, T, E, dtype=dtype)
    sharpen(ours, x)
    assert ours.position.table.abs().max() == 0
    reach = (lookback + 1) * C - 1 + (0 if causal else (lookahead + 1) * C - 1)
    assert ours.position.table.shape == (H, reach + 1)
    with torch.no_grad():
        ours.position.table.normal_(std=2)
        ours.qkv.bias.normal_()
        ours.out.bias.normal_()
    key_mask, pos = None, torch.arange(T).expand(B, T)
    if masked:
        key_mask = torch.rand(B, T) < 0.7
        pos = pos + torch.tensor([[0], [11]]) + (torch.arange(T) >= 20) * 4
    probe = torch.randn(B, T, E)

    def run(module: nn.Module, inputs: list[Tensor], dense: bool = True) -> dict[str, Tensor]:
        kind = module.out.weight.dtype
        leaf = inputs[0].detach().to(kind).requires_grad_()
        module.zero_grad()
        if dense:
            out = dense_chunked(module, leaf, key_mask, pos, pos)
        else:
            given = {"q_pos": pos, "k_pos": pos, "key_mask": key_mask} if masked else {}
            out = module(leaf, **given)
        (out * probe.to(kind)).sum().backward()
        return {"out": out, "dinput": leaf.grad} | {f"d{n}": p.grad for n, p in module.named_parameters()}

    truth = run(copy.deepcopy(ours).double(), [x])
    eager = copy.deepcopy(ours)
    tolerance.check(run(ours, [x], dense=False), truth, lambda: run(eager, [x]))


def test_coordinates_order_the_tokens() -> None:
    """Tokens in another order, with their coordinates, give the same outputs in that order."""
    ours = ChunkedSelfAttention(E, H, 8, causal=True, n_global=1)
    x = torch.randn(B, T, E)
    sharpen(ours, x)
    nn.init.normal_(ours.position.table, std=2)
    order = torch.randperm(T)
    shuffled = ours(x[:, order], q_pos=order, k_pos=order)
    torch.testing.assert_close(shuffled, ours(x)[:, order], rtol=1e-4, atol=1e-5)


def test_a_later_token_changes_nothing_before_it() -> None:
    layer = EncoderLayer(E, H, 8, causal=True, n_global=2, num_kv_heads=1).eval()
    x = torch.randn(B, T, E)
    sharpen(layer.attention, x)
    nn.init.normal_(layer.attention.position.table, std=2)
    out = layer(x)
    for j in (0, 7, 8, 20, T - 1):
        other = x.clone()
        other[:, j] += torch.randn(B, E)
        changed = (layer(other) - out).abs().amax((0, 2))
        assert changed[:j].sum() == 0 and changed[j] > 0
        # within reach of the chunk after
        assert (changed[j : min(T, j // 8 * 8 + 16)] > 0).all()


@pytest.mark.parametrize("also", [lcattn.Bridge(8), lcattn.TopKBlocks(1, 8)], ids=lambda also: type(also).__name__)
def test_what_chunks_see_besides(also: lcattn.Layout) -> None:
    """A far token reaches a later one only through what `also` adds, and gradients flow through it."""
    plain = ChunkedSelfAttention(E, H, 8, causal=True)
    more = ChunkedSelfAttention(E, H, 8, causal=True, also=also)
    more.load_state_dict(plain.state_dict())
    x = torch.randn(B, T, E)
    sharpen(plain, x)
    sharpen(more, x)
    # tokens of the third chunk onwards see nothing of the first by chunks alone
    for module, reaches in ((plain, False), (more, True)):
        given = x.clone().requires_grad_()
        module(given)[:, 16:].square().sum().backward()
        assert bool((given.grad[:, :8] != 0).any()) == reaches


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_is_torchs(norm_first: bool, activation: str) -> None:
    make = {"dim_feedforward": 80, "norm_first": norm_first, "activation": activation, "dropout": 0.0}
    ours = EncoderLayer(E, H, 8, lookahead=1, n_global=2, **make)
    eager = nn.TransformerEncoderLayer(E, H, batch_first=True, **make)
    x = torch.randn(B, T, E)
    sharpen(ours.attention, x)
    names = {
        "attention.qkv.weight": "self_attn.in_proj_weight",
        "attention.qkv.bias": "self_attn.in_proj_bias",
    }
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1 or "table" in name:
                parameter.add_(torch.randn(parameter.shape))
            if name != "attention.position.table":
                their_name = names.get(name, name.replace("attention.out", "self_attn.out_proj"))
                eager.get_parameter(their_name).copy_(parameter)
    i = torch.arange(T)
    seen = ((i[:, None] // 8 - i[None, :] // 8).abs() <= 1) | (i[:, None] < 2) | (i[None, :] < 2)
    probe = torch.randn(B, T, E)

    def run(layer: nn.Module) -> dict[str, Tensor]:
        kind = layer.linear1.weight.dtype
        leaf = x.detach().to(kind).requires_grad_()
        if isinstance(layer, EncoderLayer):
            out = layer(leaf)
        else:
            table = ours.attention.position.table.detach().to(kind)
            mask = dense_bias(table, -15, i, i).masked_fill(~seen, -math.inf).repeat(B, 1, 1)
            out = layer(leaf, src_mask=mask)
        (out * probe.to(kind)).sum().backward()
        return {
            "out": out,
            "dx": leaf.grad,
            "dlinear1": layer.linear1.weight.grad,
            "dnorm1": layer.norm1.weight.grad,
        }

    truth = run(copy.deepcopy(eager).double())
    tolerance.check(run(ours), truth, lambda: run(eager))


def test_encoder_layer_drops_out_in_training_only() -> None:
    layer = EncoderLayer(E, H, 8, dropout=0.2, norm_first=False, bias=False, activation=torch.tanh)
    x = torch.randn(B, T, E)
    assert not torch.equal(layer(x), layer(x))
    state = torch.get_rng_state()
    first = layer(x)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert not any("bias" in name for name, _ in layer.named_parameters())
