"""The dense reference and the positions, against other people's definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import lcattn
from lcattn import cases, reference, tolerance
from lcattn.cases import Draw, Shape

SMALL = Shape(1, 2, 1, 5, 7, 4)


@pytest.mark.parametrize("position", cases.POSITIONS)
@pytest.mark.parametrize("variant", ["plain", "everything", "empty_rows"])
def test_gradcheck(position, variant, seed):
    case = cases.make(Draw(seed), "window", position, variant, SMALL)
    problem = tolerance.to_dtype(case.problem, torch.float64)
    names = ["q", "k", "v", *[n for n in tolerance.TERMS if getattr(problem, n) is not None]]
    flat, spec = torch.utils._pytree.tree_flatten({n: getattr(problem, n) for n in names})

    def f(*tensors):
        import dataclasses

        out, lse = reference.attention(
            dataclasses.replace(problem, **torch.utils._pytree.tree_unflatten(tensors, spec))
        )
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(f, [t.detach().requires_grad_() for t in flat])


def test_philox_known_answers():
    # known answer tests of Random123 for philox4x32-10
    zero = torch.zeros((), dtype=torch.long)
    words = reference.philox_words((zero, zero, zero, zero), zero)
    assert [hex(int(w)) for w in words] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    ones = torch.tensor(0xFFFFFFFF)
    words = reference.philox_words((ones, ones, ones, ones), torch.tensor(-1))
    assert [hex(int(w)) for w in words] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


def test_dropout_keeps_the_asked_share():
    keep = reference.dropout_keep(2, 3, 60, 70, 0.3, torch.tensor([123]))
    assert abs(float(keep.double().mean()) - 0.7) < 0.01
    assert not torch.equal(keep[0, 0], keep[0, 1]) and not torch.equal(keep[0], keep[1])


def tensors(draw, s, dtype=torch.float64):
    std = cases.SCORE_STD**0.5
    q = draw.normal(s.B, s.H, s.T, s.D, dtype=dtype, std=std)
    k = draw.normal(s.B, s.G, s.S, s.D, dtype=dtype, std=std)
    return q, k, draw.normal(s.B, s.G, s.S, s.D, dtype=dtype)


def test_against_flex_attention_on_random_mask_and_score_mods(seed):
    draw = Draw(seed)
    for _ in range(6):
        s = Shape(2, 4, 2, draw.integer(1, 90), draw.integer(1, 150), 16)
        q, k, v = tensors(draw, s, torch.float32)
        layout = cases.LAYOUTS["mask_mod"](draw, s)
        slopes = draw.uniform(s.H)

        def score_mod(score, b, h, q_idx, kv_idx, layout=layout, slopes=slopes, s=s):
            score = score - slopes[h] * (kv_idx - q_idx - (s.S - s.T)).abs()
            return torch.where(layout.mask_mod(b, h, q_idx, kv_idx), score, -math.inf)

        want = torch.nan_to_num(flex_attention(q, k, v, score_mod=score_mod, enable_gqa=True))
        got = lcattn.attention(q, k, v, layout=layout, position=lcattn.Alibi(slopes), backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_t5_buckets_are_transformers(seed):
    from transformers.models.t5.modeling_t5 import T5Attention

    for bidirectional in (True, False):
        for buckets, distance in ((32, 128), (8, 20), (64, 33)):
            offset = torch.arange(-400, 401)
            want = T5Attention._relative_position_bucket(offset, bidirectional, buckets, distance)
            weight = torch.arange(buckets, dtype=torch.float64)[:, None]
            terms = lcattn.T5Bias(weight, bidirectional, distance).lower(*[torch.zeros(1, 1, 1, 1)] * 3, None, None)
            got = terms.bias[0, 0][(offset - terms.bias_min).clamp(0, terms.bias.shape[2] - 1)]
            assert torch.equal(got.long(), want)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 20 for i in range(16)],
            "long_factor": [2.0 + i / 3 for i in range(16)],
            "original_max_position_embeddings": 128,
        },
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ],
    ids=lambda p: p["rope_type"],
)
@pytest.mark.parametrize("length", [40, 140, 300])
def test_rotary_is_transformers(parameters, length, seed):
    """Below and above the original length, and above the largest."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    draw = Draw(seed)
    q, k, v = tensors(draw, Shape(2, 2, 2, length, length, 32), torch.float32)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters=dict(parameters),
    )
    position = torch.arange(length)[None].expand(2, -1)
    cos, sin = LlamaRotaryEmbedding(config)(q, position)
    want_q, want_k = apply_rotary_pos_emb(q, k, cos, sin)
    given = {**parameters, "max_position_embeddings": 256}
    terms = lcattn.Rotary(rope_parameters=given).lower(q, k, v, None, None)
    # the original's angles are float32
    torch.testing.assert_close(terms.q[0], want_q, rtol=1e-5, atol=1e-6 * length)
    torch.testing.assert_close(terms.k[0], want_k, rtol=1e-5, atol=1e-6 * length)
    # a cache with room for more than the text
    last, roomy = torch.tensor([length - 1]), torch.cat([k, torch.zeros_like(k)], 2)
    assert torch.equal(
        lcattn.attention(
            q[:, :, -1:],
            roomy,
            roomy,
            layout=lcattn.Causal(),
            position=lcattn.Rotary(rope_parameters=given),
            q_pos=last,
        ),
        lcattn.attention(
            q[:, :, -1:], k, k, layout=lcattn.Causal(), position=lcattn.Rotary(rope_parameters=given), q_pos=last
        ),
    )


@pytest.mark.parametrize(
    "message, parameters",
    [
        ("must be a dictionary, got 'x'", "x"),
        ("must be those of one kind of layer, got one each of .'full_attention'", {"full_attention": {}}),
        ("rope_type must be one of default, .* got .'yarn'", {"rope_type": ["yarn"]}),
        ("'linear' needs factor, got no factor", {"rope_type": "linear"}),
        ("'linear' needs factor, got no factor", {"type": "linear"}),
        ("'dynamic' needs factor, max_position_embeddings", {"rope_type": "dynamic", "factor": 2.0}),
        ("got no original_max_position_embeddings", {"rope_type": "yarn", "factor": 2.0}),
        ("got no low_freq_factor", {"rope_type": "llama3", "factor": 2.0}),
        (
            "longrope needs factor, attention_factor or",
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
        ),
        ("rope_theta'. must be a positive number, got 0", {"rope_theta": 0}),
        ("factor'. must be a positive number, got 0.0", {"rope_type": "linear", "factor": 0.0}),
    ],
)
def test_rotary_names_what_is_wrong_with_its_parameters(message, parameters):
    with pytest.raises(ValueError, match=f"^Rotary: .*{message}"):
        lcattn.Rotary(rope_parameters=parameters)


def test_rotary_parameters_go_before_the_base():
    assert lcattn.Rotary(500.0, rope_parameters={"type": "default"}).rope_parameters["rope_theta"] == 500.0
    assert lcattn.Rotary(500.0, rope_parameters={"rope_theta": 7.0}).rope_parameters["rope_theta"] == 7.0
    q = torch.zeros(1, 1, 3, 8)
    short = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "max_position_embeddings": 9}
    with pytest.raises(ValueError, match=r"'short_factor'. must have 4 factors for head dim 8, got 1"):
        lcattn.attention(q, q, q, position=lcattn.Rotary(rope_parameters=short))


def test_alibi_slopes_are_the_papers():
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    assert lcattn.Alibi.for_heads(8).slopes.tolist() == [2.0**-i for i in range(1, 9)]
    want = build_mpt_alibi_tensor(12, 3)
    # the last column stands one before the end, at a distance of one
    torch.testing.assert_close(sorted(lcattn.Alibi.for_heads(12).slopes.tolist()), sorted((-want[:, 0, -2]).tolist()))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_merge_of_disjoint_keys_is_the_whole(backend, seed):
    draw = Draw(seed)
    s = Shape(2, 2, 1, 33, 50, 16)
    q, k, v = (t.requires_grad_() for t in tensors(draw, s, torch.float32))
    sink = draw.normal(s.H)
    layout = lcattn.Chunked(20) & lcattn.Causal()
    dout, dlse = draw.normal(s.B, s.H, s.T, s.D), draw.normal(s.B, s.H, s.T)

    def both(parts):
        out, lse = lcattn.merge(parts)
        return out, lse, *torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])

    whole = both([lcattn.attention_with_lse(q, k, v, layout=layout, sink=sink, backend=backend)])
    at = [slice(0, 11), slice(11, 12), slice(12, 50)]
    q_pos = torch.arange(17, 50)
    parts = both(
        lcattn.attention_with_lse(
            q,
            k[:, :, c],
            v[:, :, c],
            layout=layout,
            sink=sink if i == 1 else None,
            q_pos=q_pos,
            k_pos=torch.arange(50)[c],
            backend=backend,
        )
        for i, c in enumerate(at)
    )
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_merge_of_empty_rows_is_zero():
    out, lse = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -math.inf)
    merged, total = lcattn.merge([(out, lse), (out, lse)])
    assert torch.equal(merged, out) and torch.equal(total, lse)


def test_dense_reference_is_sdpa(seed):
    draw = Draw(seed)
    q, k, v = tensors(draw, Shape(2, 4, 2, 30, 40, 16))
    mask = draw.uniform(2, 4, 30, 40) < 0.5
    want = torch.nan_to_num(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
    got = lcattn.attention(q, k, v, layout=lcattn.Blocks(mask, 1), backend="reference")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("position", cases.POSITIONS)
@pytest.mark.parametrize("variant", ["plain", "everything", "empty_rows_sink"])
def test_recomputed_gradients_are_autograds(position, variant, seed):
    case = cases.make(Draw(seed), "chunked_global", position, variant, Shape(2, 4, 2, 20, 30, 8))
    problem = tolerance.to_dtype(case.problem, torch.float64)
    dout, dlse = case.dout.double(), torch.randn(2, 4, 20, dtype=torch.float64)
    want = reference.gradients(problem, dout, dlse)
    got = reference.recomputed_gradients(problem, dout, dlse)
    torch.testing.assert_close(got.__dict__, want.__dict__)
