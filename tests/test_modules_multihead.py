"""MultiheadAttention against torch's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcattn
from lcattn import tolerance
from lcattn.modules import MultiheadAttention
from tests.module_scores import TRIANGLE, B, E, H, T, dense_bias, sharpen


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


def as_float(hidden: Tensor, value: float = -math.inf) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, value)


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
    "finite_float_mask": ({}, lambda: {"attn_mask": as_float(hide_some(T, T), -1e9)}),
    "padding": ({}, lambda: {"key_padding_mask": hide_some(B, T), "average_attn_weights": False}),
    "float_padding": ({}, lambda: {"key_padding_mask": as_float(hide_some(B, T)), "need_weights": False}),
    "finite_float_padding": ({}, lambda: {"key_padding_mask": as_float(hide_some(B, T), -1e4)}),
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
    "small_mask": ({"attn_mask": torch.full((T, T), -9e3)}, ValueError, f"attn_mask: .*{ADDITIVE}"),
    "list_mask": ({"attn_mask": [[False] * T] * T}, TypeError, "attn_mask: expected a tensor, got list"),
    "list_padding": ({"key_padding_mask": [[False]]}, TypeError, "key_padding_mask: expected a tensor, got list"),
    "list_key": ({"key": [1.0]}, TypeError, "key: expected a tensor, got list"),
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


def test_a_mask_that_would_be_trained_is_refused() -> None:
    x, mask = torch.randn(1, 5, 8), torch.nn.Parameter(torch.zeros(5, 5))
    with pytest.raises(ValueError, match="attn_mask: a mask that requires a gradient would not get one"):
        lcattn.modules.MultiheadAttention(8, 2, batch_first=True)(x, x, x, attn_mask=mask)
