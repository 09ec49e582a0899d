"""The modules against torch's own, and against attention written out in the test."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcattn
from lcattn import tolerance
from lcattn.modules import ChunkedSelfAttention, EncoderLayer, MultiheadAttention

E, H, B, T = 32, 4, 2, 37


def sharpen(module: nn.Module, x: Tensor) -> None:
    """Scales the query and key projections of a module until its scores have a standard deviation of 3.2."""
    D = E // H
    with torch.no_grad():
        if isinstance(module, ChunkedSelfAttention):
            weights = [module.qkv.weight[: (module.num_heads + module.num_kv_heads) * D]]
            q = F.linear(x, module.qkv.weight[:E])
            k = F.linear(x, module.qkv.weight[E : E + module.num_kv_heads * D])
        elif module.in_proj_weight is not None:
            weights = [module.in_proj_weight[: 2 * E]]
            q, k = F.linear(x, module.in_proj_weight[: 2 * E]).chunk(2, -1)
        else:
            weights = [module.q_proj_weight, module.k_proj_weight]
            q = F.linear(x, module.q_proj_weight)
            k = F.linear(torch.randn(*x.shape[:-1], module.kdim).to(x), module.k_proj_weight)
        # std of a sum of D products of independent features
        std = float(q.float().std() * k.float().std() * math.sqrt(D) / math.sqrt(D))
        for weight in weights:
            weight *= math.sqrt(3.2 / std)


def run_torch_like(module: nn.Module, inputs: list[Tensor], probes: dict[str, Tensor], **call) -> dict[str, Tensor]:
    """Outputs, weights and every gradient of a MultiheadAttention, ours or torch's."""
    dtype = next(module.parameters()).dtype
    leaves: dict[int, Tensor] = {}
    for x in inputs:
        leaves.setdefault(id(x), x.detach().to(dtype).requires_grad_())
    for name in ("attn_mask", "key_padding_mask"):
        if call.get(name) is not None and call[name].is_floating_point():
            call[name] = call[name].to(dtype)
    module.zero_grad()
    out, weights = module(*(leaves[id(x)] for x in inputs), **call)
    results = {"out": out}
    if weights is not None:
        results["weights"] = weights
    for name, result in results.items():
        if name not in probes:
            probes[name] = torch.randn(result.shape)
    sum((results[name] * probes[name].to(dtype)).sum() for name in results).backward()
    results |= {f"dinput{i}": leaf.grad for i, leaf in enumerate(leaves.values())}
    return results | {f"d{name}": p.grad for name, p in module.named_parameters()}


def hide_some(*shape: int, keep_first: bool = True) -> Tensor:
    """A random bool mask in torch's sense (True hides) that leaves every row its first key."""
    hidden = torch.rand(shape) < 0.4
    if keep_first:
        hidden[..., 0] = False
    return hidden


def as_float(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)


TRIANGLE = torch.ones(T, T, dtype=torch.bool).triu(1)

# constructor arguments, then what makes the call's
CALLS = {
    "plain": ({}, lambda: {}),
    "batch_second": ({"batch_first": False}, lambda: {}),
    "no_bias": ({"bias": False}, lambda: {"average_attn_weights": False}),
    "no_weights": ({}, lambda: {"need_weights": False}),
    "mask": ({}, lambda: {"attn_mask": hide_some(T, T)}),
    "mask_per_head": ({}, lambda: {"attn_mask": hide_some(B * H, T, T), "need_weights": False}),
    "float_mask": ({}, lambda: {"attn_mask": as_float(hide_some(T, T))}),
    "float_mask_per_head": ({}, lambda: {"attn_mask": as_float(hide_some(B * H, T, T))}),
    "padding": ({}, lambda: {"key_padding_mask": hide_some(B, T), "average_attn_weights": False}),
    "float_padding": ({}, lambda: {"key_padding_mask": as_float(hide_some(B, T)), "need_weights": False}),
    "both": ({}, lambda: {"attn_mask": hide_some(T, T), "key_padding_mask": hide_some(B, T)}),
    "causal": ({}, lambda: {"attn_mask": TRIANGLE, "is_causal": True, "need_weights": False}),
    "causal_weights": ({}, lambda: {"attn_mask": as_float(TRIANGLE), "is_causal": True}),
    "causal_padding": (
        {},
        lambda: {"attn_mask": TRIANGLE, "is_causal": True, "key_padding_mask": hide_some(B, T)},
    ),
    "bias_kv": ({"add_bias_kv": True}, lambda: {"attn_mask": hide_some(T, T, keep_first=False)}),
    "zero_attn": ({"add_zero_attn": True}, lambda: {"key_padding_mask": hide_some(B, T, keep_first=False)}),
    "bias_kv_zero_attn": (
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
        lambda: {
            "attn_mask": hide_some(B * H, T, T),
            "key_padding_mask": hide_some(B, T),
            "average_attn_weights": False,
        },
    ),
    "bias_kv_no_weights": ({"add_bias_kv": True}, lambda: {"need_weights": False}),
}


def compare_with_torch(make: dict, inputs: list[Tensor], call: dict, dtype: torch.dtype = torch.float32) -> None:
    make = {"batch_first": True} | make
    eager = nn.MultiheadAttention(E, H, **make)
    sharpen(eager, inputs[0])
    with torch.no_grad():
        for parameter in eager.parameters():
            # biases start at zero in torch, where an error in them would not show
            if parameter.dim() == 1:
                parameter.normal_(std=0.5)
    eager = eager.to(dtype)
    ours = MultiheadAttention(E, H, **make, dtype=dtype)
    ours.load_state_dict(eager.state_dict())
    inputs_of = {id(x): x.to(dtype) for x in inputs}
    inputs = [inputs_of[id(x)] for x in inputs]
    probes: dict[str, Tensor] = {}

    def run(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
        return run_torch_like(module, inputs, probes, **call)

    truth = run(copy.deepcopy(eager).double(), inputs)
    tolerance.check(run(ours, inputs), truth, lambda: run(eager, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_multihead_attention_is_torchs(name: str, dtype: torch.dtype) -> None:
    make, call = CALLS[name]
    x = torch.randn(B, T, E) if make.get("batch_first", True) else torch.randn(T, B, E)
    compare_with_torch(make, [x, x, x], call(), dtype)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 20, "vdim": 48}], ids=["same_width", "own_widths"])
def test_cross_attention_is_torchs(batch_first: bool, widths: dict) -> None:
    S = 23
    key, value = torch.randn(B, S, widths.get("kdim", E)), torch.randn(B, S, widths.get("vdim", E))
    inputs = [torch.randn(B, T, E), key, value]
    if not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    call = {"attn_mask": hide_some(T, S), "key_padding_mask": hide_some(B, S)}
    compare_with_torch({"batch_first": batch_first, **widths}, inputs, call)
    compare_with_torch({"batch_first": batch_first, **widths}, inputs, {"need_weights": False})


@pytest.mark.parametrize("per_head", [False, True])
def test_unbatched_input_is_torchs(per_head: bool) -> None:
    x = torch.randn(T, E)
    mask = hide_some(H, T, T) if per_head else hide_some(T, T)
    call = {"attn_mask": mask, "key_padding_mask": hide_some(T), "average_attn_weights": per_head}
    compare_with_torch({"batch_first": per_head}, [x, x, x], call)


@pytest.mark.parametrize(
    "make", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 20, "vdim": 48}, {"add_zero_attn": True}]
)
def test_state_dict_loads_both_ways(make: dict) -> None:
    theirs, ours = nn.MultiheadAttention(E, H, **make), MultiheadAttention(E, H, **make)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))
    ours._reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))


def dense_bias(table: Tensor, first: int, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    return table[:, (k_pos[None, :] - q_pos[:, None] - first).clamp(0, table.shape[1] - 1)]


def test_layout_and_position_equal_torchs_dense_mask() -> None:
    """Our layout and learned bias against torch given the same as a dense additive mask."""
    table = torch.randn(H, 25) * 2
    layout = (lcattn.Chunked(7) | lcattn.Global(2)) & lcattn.Causal()
    ours = MultiheadAttention(
        E, H, batch_first=True, layout=layout, position=lcattn.RelativeBias(nn.Parameter(table.clone()), -20)
    )
    x = torch.randn(B, T, E)
    sharpen(ours, x)
    i = torch.arange(T)
    q_idx, k_idx = i[:, None], i[None, :]
    seen = ((q_idx // 7 - k_idx // 7) <= 1) & (q_idx // 7 >= k_idx // 7) | (q_idx < 2) | (k_idx < 2)
    seen &= k_idx <= q_idx
    eager = nn.MultiheadAttention(E, H, batch_first=True)
    eager.load_state_dict(ours.state_dict(), strict=False)

    probes: dict[str, Tensor] = {}

    def dense(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
        leaf = table.detach().to(next(module.parameters()).dtype).requires_grad_()
        mask = dense_bias(leaf, -20, i, i).masked_fill(~seen, -math.inf).repeat(B, 1, 1)
        results = run_torch_like(module, inputs, probes, attn_mask=mask)
        return results | {"dposition.table": leaf.grad}

    inputs = [x, x, x]
    truth = dense(copy.deepcopy(eager).double(), inputs)
    tolerance.check(run_torch_like(ours, inputs, probes), truth, lambda: dense(eager, inputs))


def test_causal_alone_needs_no_mask() -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, T, E)
    sharpen(ours, x)
    alone = ours(x, x, x, is_causal=True, need_weights=False)[0]
    assert torch.equal(alone, ours(x, x, x, is_causal=True, attn_mask=TRIANGLE, need_weights=False)[0])
    torch.testing.assert_close(alone, ours(x, x, x, attn_mask=TRIANGLE, need_weights=False)[0])


def test_a_query_that_sees_nothing_gives_the_output_bias() -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    with torch.no_grad():
        ours.out_proj.bias.normal_()
    x = torch.randn(B, T, E, requires_grad=True)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(x, x, x, key_padding_mask=padding)
    assert torch.equal(out[1], ours.out_proj.bias.expand(T, E))
    assert weights[1].abs().max() == 0
    (out.sum() + weights.square().sum()).backward()
    assert x.grad.isfinite().all() and x.grad[1].abs().max() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("more_keys", [False, True])
def test_dropout_returns_the_weights_it_used(more_keys: bool) -> None:
    p = 0.3
    ours = MultiheadAttention(E, H, dropout=p, batch_first=True, add_bias_kv=more_keys, add_zero_attn=more_keys)
    x, n = torch.randn(B, T, E), T + 2 * more_keys
    state = torch.get_rng_state()
    out, weights = ours(x, x, x, average_attn_weights=False)
    torch.set_rng_state(state)
    torch.testing.assert_close(out, ours(x, x, x, need_weights=False)[0])
    assert not torch.equal(out, ours(x, x, x, need_weights=False)[0])
    dropped = int((weights == 0).sum())
    total = B * H * T * n
    assert abs(dropped - p * total) < 5 * math.sqrt(total * p * (1 - p))
    # out is the dropped weights applied to the values
    v = F.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    if more_keys:
        v = torch.cat([v, ours.bias_v.expand(B, 1, E), torch.zeros(B, 1, E)], 1)
    v = v.unflatten(2, (H, E // H)).transpose(1, 2)
    torch.testing.assert_close(out, ours.out_proj((weights @ v).transpose(1, 2).flatten(2)))
    ours.eval()
    exact = ours(x, x, x)
    assert torch.equal(exact[0], ours(x, x, x)[0])
    torch.testing.assert_close(exact[1].sum(2), torch.ones(B, T))


ADDITIVE = "may hold only 0 and -inf"
BAD_CALLS = {
    "additive_mask": ({"attn_mask": torch.randn(T, T)}, ValueError, f"attn_mask: .*{ADDITIVE}"),
    "huge_mask": ({"attn_mask": torch.full((T, T), -1e9)}, ValueError, f"attn_mask: .*{ADDITIVE}"),
    "nan_mask": ({"attn_mask": torch.full((T, T), math.nan)}, ValueError, f"attn_mask: .*{ADDITIVE}"),
    "additive_padding": (
        {"key_padding_mask": torch.ones(B, T)},
        ValueError,
        f"key_padding_mask: .*{ADDITIVE}",
    ),
    "int_mask": ({"attn_mask": torch.ones(T, T).long()}, TypeError, "attn_mask: expected bool or float"),
    "mask_shape": (
        {"attn_mask": torch.ones(B, T, T).bool()},
        ValueError,
        r"attn_mask: expected \[37, 37\] or",
    ),
    "padding_shape": (
        {"key_padding_mask": torch.ones(T).bool()},
        ValueError,
        r"key_padding_mask: expected \[2, 37\]",
    ),
    "key_width": (
        {"key": torch.randn(B, T, E + 1)},
        ValueError,
        "key: expected 3 dimensions, the last of 32",
    ),
    "key_batch": ({"key": torch.randn(B + 1, T, E)}, ValueError, "value: expected length and batch of key"),
    "query_dims": ({"query": torch.randn(1, B, T, E)}, ValueError, "query: expected 2 dimensions, or 3"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_named(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    x = torch.randn(B, T, E)
    with pytest.raises(error, match=message):
        MultiheadAttention(E, H, batch_first=True)(**({"query": x, "key": x, "value": x} | call))


BAD_MODULES = {
    "layout": (lambda: MultiheadAttention(E, H, layout="causal"), TypeError, "layout: expected a layout"),
    "mha_position": (
        lambda: MultiheadAttention(E, H, position=3),
        TypeError,
        "position: expected a position",
    ),
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


def test_positions_are_registered() -> None:
    bias = lcattn.RelativeBias(nn.Parameter(torch.randn(H, 9)), -4)
    both = MultiheadAttention(E, H, batch_first=True, position=[bias, lcattn.Rotary(), lcattn.Alibi.for_heads(H)])
    assert [name for name, _ in both.named_parameters() if "position" in name] == ["position.0.table"]
    assert [name for name in both.state_dict() if "position" in name] == ["position.0.table"]
    x = torch.randn(B, T, E)
    sharpen(both, x)
    both(x, x, x, need_weights=False)[0].square().sum().backward()
    assert both.position[0].table.grad.abs().max() > 0
    twin = copy.deepcopy(both)
    assert torch.equal(twin(x, x, x)[0], both(x, x, x)[0])
    with torch.no_grad():
        twin.position[0].table += torch.randn(H, 9)
    assert not torch.allclose(twin(x, x, x)[0], both(x, x, x)[0])
    half = copy.deepcopy(both).to(torch.bfloat16)
    assert half.position[0].table.dtype == half.position[2].slopes.dtype == torch.bfloat16
    assert half(x.bfloat16(), x.bfloat16(), x.bfloat16())[0].dtype == torch.bfloat16


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
