"""Positions that meet content, against definitions written densely here and against transformers' own module."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DebertaV2Config
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta

import lcattn
from lcattn import cases, tolerance
from lcattn.api import make_problem
from lcattn.cases import Draw

B, H, G, T, S, D = 2, 4, 2, 45, 61, 12
LAYOUT = lcattn.Window(25, 19) | lcattn.Global(2)


def offsets() -> Tensor:
    """k_pos - q_pos, [T, S], queries at the end."""
    return torch.arange(S)[None] - torch.arange(S - T, S)[:, None]


def dense(score: Tensor, v: Tensor) -> Tensor:
    """Softmax over what LAYOUT lets be seen, written out."""
    o = offsets()
    seen = ((o >= -25) & (o <= 19)) | (torch.arange(S) < 2) | (torch.arange(S - T, S) < 2)[:, None]
    return torch.softmax(score.masked_fill(~seen, -math.inf), 3) @ v.repeat_interleave(H // G, 1)


def _heads(k: Tensor) -> Tensor:
    return k.repeat_interleave(H // G, 1)


def _shaw(low: int, shared: bool) -> tuple[Callable, Callable, dict[str, tuple[int, ...]]]:
    def ours(p: dict[str, Tensor]) -> lcattn.Shaw:
        return lcattn.Shaw(p["table"], low)

    def score(p: dict[str, Tensor]) -> Tensor:
        index = (offsets() - low).clamp(0, 16)
        vectors = p["table"].expand(H, -1, -1)[:, index]
        return p["q"] @ _heads(p["k"]).mT + torch.einsum("bhid,hijd->bhij", p["q"], vectors)

    return ours, score, {"table": (1 if shared else H, 17, D)}


def _transformer_xl() -> tuple[Callable, Callable, dict[str, tuple[int, ...]]]:
    E, low, high = 10, -30, 22

    def ours(p: dict[str, Tensor]) -> lcattn.TransformerXL:
        return lcattn.TransformerXL.sinusoid(p["weight"], p["u"], p["v_bias"], low, high, base=100.0)

    def score(p: dict[str, Tensor]) -> Tensor:
        distance = -offsets().clamp(low, high).to(p["q"].dtype)[..., None]
        angle = distance / 100.0 ** (torch.arange(0, E, 2).to(distance.dtype) / E)
        keys = torch.cat([angle.sin(), angle.cos()], 2) @ p["weight"].T
        content = (p["q"] + p["u"][:, None]) @ _heads(p["k"]).mT
        return content + torch.einsum("bhid,ijhd->bhij", p["q"] + p["v_bias"][:, None], keys.unflatten(2, (H, D)))

    return ours, score, {"weight": (H * D, E), "u": (H, D), "v_bias": (H, D)}


def _disentangled(
    keys: bool, queries: bool, span: int, max_distance: int | None
) -> tuple[Callable, Callable, dict[str, tuple[int, ...]]]:
    def ours(p: dict[str, Tensor]) -> lcattn.Disentangled:
        return lcattn.Disentangled(p.get("rel_key"), p.get("rel_query"), max_distance)

    def score(p: dict[str, Tensor]) -> Tensor:
        result = p["q"] @ _heads(p["k"]).mT
        # equation 3: delta(i, j) of content to position, delta(j, i) of position to content
        key_of_query = -offsets()
        for name, vectors, equation in (
            ("rel_key", p["q"], "bhid,hijd->bhij"),
            ("rel_query", p["k"], "bhjd,hijd->bhij"),
        ):
            if name not in p:
                continue
            d = key_of_query
            if max_distance is not None:
                d = deberta.make_log_bucket_position(d, span, max_distance).long()
            table = p[name].expand(H, -1, -1)[:, (d + span).clamp(0, 2 * span - 1)]
            result = result + torch.einsum(equation, vectors if name == "rel_key" else _heads(vectors), table)
        return result

    shape = (H, 2 * span, D)
    return ours, score, {n: shape for n, given in (("rel_key", keys), ("rel_query", queries)) if given}


POSITIONS = {
    "shaw": _shaw(-8, shared=False),
    "shaw of one head, off centre": _shaw(-3, shared=True),
    "transformer-xl": _transformer_xl(),
    "disentangled": _disentangled(True, True, 9, None),
    "disentangled keys": _disentangled(True, False, 30, None),
    "disentangled queries": _disentangled(False, True, 7, None),
    "disentangled buckets": _disentangled(True, True, 8, 23),
    "disentangled odd buckets": _disentangled(True, True, 5, 17),
    "disentangled buckets, keys": _disentangled(True, False, 16, 40),
    "disentangled buckets, queries": _disentangled(False, True, 16, 40),
}


def parameters(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    draw = Draw(seed)
    std = 2.1
    drawn = {"q": draw.normal(B, H, T, D, std=std), "k": draw.normal(B, G, S, D, std=std), "v": draw.normal(B, G, S, D)}
    return drawn | {name: draw.normal(*shape, std=std) for name, shape in shapes.items()}


def results(compute: Callable[[dict[str, Tensor]], Tensor], given: dict[str, Tensor], dtype: torch.dtype) -> dict:
    """Outputs and the gradient of every parameter, for one arriving gradient."""
    p = {name: t.to(dtype).requires_grad_() for name, t in given.items()}
    out = compute(p)
    arriving = Draw(7).normal(*out.shape).to(dtype)
    return {"out": out} | {
        f"d {n}": g for n, g in zip(p, torch.autograd.grad(out, [*p.values()], arriving), strict=True)
    }


@pytest.mark.parametrize("name", POSITIONS)
def test_position_is_its_definition(name: str, seed: int) -> None:
    ours, score, shapes = POSITIONS[name]
    given = parameters(shapes, seed)
    # below 1 / sqrt(D), as DeBERTa's own, so that the factor on every term shows
    scale = (3 * D) ** -0.5

    def plainly(p: dict[str, Tensor]) -> Tensor:
        scores = score(p) * scale
        assert float(scores.detach().std()) >= 3
        return dense(scores, p["v"])

    def lowered(p: dict[str, Tensor]) -> Tensor:
        return lcattn.attention(
            p["q"], p["k"], p["v"], layout=LAYOUT, position=ours(p), scale=scale, backend="reference"
        )

    truth = results(plainly, given, torch.float64)
    for part, tensor in results(lowered, given, torch.float64).items():
        torch.testing.assert_close(tensor, truth[part], rtol=1e-9, atol=1e-10, msg=lambda m, part=part: f"{part}: {m}")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", POSITIONS)
def test_cpu_within_the_budget(name: str, dtype: torch.dtype, seed: int) -> None:
    ours, _, shapes = POSITIONS[name]
    given = parameters(shapes, seed + 1)
    q, k, v = (given.pop(n).to(dtype) for n in ("q", "k", "v"))
    key_mask = Draw(seed).uniform(B, S) < 0.8
    q_pos, k_pos = torch.arange(3, 3 + T)[None], torch.arange(S)[None].repeat(B, 1) - torch.tensor([[0], [9]])
    problem = make_problem(q, k, v, LAYOUT, ours(given), None, None, None, key_mask, q_pos, k_pos, 0.0)
    found = tolerance.verify(problem, "cpu", Draw(seed + 2).normal(*q.shape, dtype=dtype))
    assert not [str(c) for c in found if not c.ok]


@pytest.mark.parametrize("pos_att_type", [["c2p", "p2c"], ["c2p"], ["p2c"]], ids="|".join)
@pytest.mark.parametrize("buckets", [-1, 6, 16])
def test_disentangled_is_transformers(buckets: int, pos_att_type: list[str], seed: int) -> None:
    config = DebertaV2Config(
        hidden_size=H * D,
        num_attention_heads=H,
        relative_attention=True,
        position_buckets=buckets,
        max_relative_positions=20,
        pos_att_type=pos_att_type,
        share_att_key=True,
    )
    module = deberta.DisentangledSelfAttention(config).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.6)
    span = module.pos_ebd_size
    x, rel = torch.randn(1, T, H * D).double(), torch.randn(2 * span, H * D).double()
    want, _ = module(x, torch.ones(1, 1, T, T), rel_embeddings=rel)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (H, D)).transpose(-3, -2)

    q, k, v = (heads(project(x)) for project in (module.query_proj, module.key_proj, module.value_proj))
    position = lcattn.Disentangled(
        heads(module.key_proj(rel)) if "c2p" in pos_att_type else None,
        heads(module.query_proj(rel)) if "p2c" in pos_att_type else None,
        20 if buckets > 0 else None,
    )
    # transformers takes the root in float32
    scale = 1 / float(torch.tensor(D * (1.0 + len(pos_att_type))).sqrt())
    got = lcattn.attention(q, k, v, position=position, scale=scale, backend="reference")
    torch.testing.assert_close(got.transpose(1, 2).flatten(2), want, rtol=1e-9, atol=1e-10)


def test_buckets_are_transformers_and_end(seed: int) -> None:
    draw = Draw(seed)
    pairs = [(256, 512), (128, 512), (4, 4), (5, 9), (7, 300)]
    pairs += [(draw.integer(4, 300), draw.integer(160, 2000)) for _ in range(20)]
    offset = torch.arange(-5000, 5001)
    for span, max_distance in pairs:
        table = torch.arange(2.0 * span)[None, :, None]
        some = torch.zeros(1, 1, 1, 1)
        terms = lcattn.Disentangled(table, None, max_distance).lower(some, some, some, None, None)
        length = terms.rel_key.shape[1]
        got = terms.rel_key[0, (offset - terms.rel_key_min).clamp(0, length - 1), 0]
        want = deberta.make_log_bucket_position(-offset, span, max_distance) + span
        assert torch.equal(got, want.clamp(0, 2 * span - 1)), (span, max_distance)
        if span % 2 == 0:
            assert length <= 2 * max_distance + 5


def test_far_sinusoids_are_exact(seed: int) -> None:
    far = 1_000_000
    weight = torch.eye(4)
    position = lcattn.TransformerXL.sinusoid(weight, torch.zeros(1, 4), torch.zeros(1, 4), -far, -far + 1)
    want = [math.sin(far), math.sin(far / 100), math.cos(far), math.cos(far / 100)]
    torch.testing.assert_close(position.r[0, 0], torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "disentangled"])
def test_inference_first_and_training_after(name: str) -> None:
    # distances that no other test asks for, since buckets are remembered
    if name == "t5":
        table = torch.randn(32, H, requires_grad=True)
        position: lcattn.position.Position = lcattn.T5Bias(table, max_distance=77)
    else:
        table = torch.randn(H, 16, D, requires_grad=True)
        position = lcattn.Disentangled(table, table, 77)
    q, k, v = (torch.randn(1, H, 30, D) for _ in range(3))
    with torch.inference_mode():
        before = lcattn.attention(q, k, v, position=position)
    after = lcattn.attention(q, k, v, position=position)
    (grad,) = torch.autograd.grad(after.sum(), table)
    assert torch.equal(before, after.detach()) and grad.abs().sum() > 0


_TABLE, _BIAS = torch.zeros(H, 8, D), torch.zeros(H, D)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lcattn.Shaw(torch.zeros(H, 8), 0), r"Shaw: rel_key must be a \[H, L, D\] floating-point tensor"),
        (lambda: lcattn.Shaw(_TABLE.long(), 0), r"Shaw: rel_key must be .* got .* torch.int64"),
        (lambda: lcattn.Shaw(None, 0), "Shaw: rel_key must be .* got NoneType"),
        (lambda: lcattn.Shaw(torch.zeros(H, 0, D), 0), "Shaw: rel_key must hold at least one .* one entry"),
        (lambda: lcattn.Shaw(torch.zeros(3, 8, D), 0), r"Shaw: rel_key must have 4 heads \(or 1\), got 3"),
        (lambda: lcattn.Shaw(torch.zeros(H, 8, D + 1), 0), "Shaw: rel_key must have the head dim of q, 12, got"),
        (lambda: lcattn.TransformerXL(_BIAS, _BIAS, _BIAS, 0), "TransformerXL: r must be a"),
        (lambda: lcattn.TransformerXL(_TABLE, _BIAS[0], _BIAS, 0), r"TransformerXL: u must be a \[H, D\]"),
        (lambda: lcattn.TransformerXL(_TABLE, _BIAS, _TABLE, 0), r"TransformerXL: v must be a \[H, D\]"),
        (
            lambda: lcattn.TransformerXL(_TABLE, _BIAS[:2], _BIAS, 0),
            r"TransformerXL: u must have 4 heads \(or 1\), got 2",
        ),
        (lambda: lcattn.TransformerXL(_TABLE, _BIAS, _BIAS[:, 1:], 0), "TransformerXL: v must have the head dim of q"),
        (
            lambda: lcattn.TransformerXL.sinusoid(torch.zeros(H * D, 3), _BIAS, _BIAS, 0, 1),
            r"sinusoid: weight must be \[4 \* 12, E\], as u is \[4, 12\], with an even E, got \[48, 3\]",
        ),
        (
            lambda: lcattn.TransformerXL.sinusoid(torch.zeros(H * D, 4), _BIAS, _BIAS, 3, 2),
            "sinusoid: max_offset must be at least min_offset, 3, got 2",
        ),
        (lambda: lcattn.Disentangled(), "Disentangled: give rel_key, rel_query or both"),
        (lambda: lcattn.Disentangled(_TABLE[:, :7]), "Disentangled: rel_key must have an even number of entries"),
        (lambda: lcattn.Disentangled(_TABLE, _TABLE[:, :6]), "must have as many entries, got .* and"),
        (lambda: lcattn.Disentangled(_TABLE[:, :6], None, 30), "max_distance needs tables of at least 8 entries"),
        (lambda: lcattn.Disentangled(_TABLE, None, 3), "must exceed the 3 of the exact buckets, got 3"),
        (lambda: lcattn.Disentangled(None, _TABLE[:2]), r"Disentangled: rel_query must have 4 heads \(or 1\), got 2"),
        (lambda: lcattn.Disentangled(None, _TABLE[..., 1:]), "Disentangled: rel_query must have the head dim of q"),
    ],
)
def test_bad_arguments_are_named(make: Callable, message: str) -> None:
    q, k, v = torch.zeros(B, H, T, D), torch.zeros(B, G, S, D), torch.zeros(B, G, S, D)
    with pytest.raises(ValueError, match=message):
        lcattn.attention(q, k, v, position=make())
