"""Rotary positions remapped past the trained length, against each paper's definition written out pair by pair."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import lcattn
from lcattn import hf, reference, tolerance
from lcattn.api import make_problem
from lcattn.position import Position

BASE = 500.0
ROTARY = lcattn.Rotary(BASE)


def dual_chunk(i: int, j: int, s: int, w: int) -> tuple[int, int] | None:
    """Where query i and key j stand, by the paper's three kinds of attention."""
    if i // s == j // s:
        return i % s, j % s
    if i // s == j // s + 1:
        return min(i % s + s, s + w - 1), j % s
    if i // s > j // s:
        return s + w - 1, j % s
    # two-sided, mirrored
    return (max(i % s - s, -w), j % s) if j // s == i // s + 1 else (-w, j % s)


def self_extend(i: int, j: int, group: int, window: int) -> tuple[int, int]:
    if abs(i - j) < window:
        return i, j
    shift = window - window // group
    return i // group + (shift if j < i else -shift), j // group


def rerope(i: int, j: int, window: int) -> tuple[int, int]:
    return (i, j) if abs(i - j) < window else ((window if j < i else -window), 0)


METHODS: dict[str, tuple[Any, Any]] = {
    "dual_chunk": (
        lambda two_sided=False: lcattn.DualChunk(13, 5, ROTARY, two_sided),
        lambda i, j: dual_chunk(i, j, 13, 5),
    ),
    "dual_chunk_whole": (
        lambda two_sided=False: lcattn.DualChunk(16, 16, ROTARY, two_sided),
        lambda i, j: dual_chunk(i, j, 16, 16),
    ),
    "self_extend": (
        lambda two_sided=False: lcattn.SelfExtend(3, 11, ROTARY, two_sided),
        lambda i, j: self_extend(i, j, 3, 11),
    ),
    "rerope": (lambda two_sided=False: lcattn.ReRoPE(9, ROTARY, two_sided), lambda i, j: rerope(i, j, 9)),
}


def frequencies(base: float, D: int) -> Tensor:
    """As models hold them: float32."""
    return (1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32) / D)).double()


def dense(
    q: Tensor, k: Tensor, v: Tensor, where: Any, seen: Tensor, start: int = 0, base: float = BASE, turned: float = 0.0
) -> Tensor:
    """Attention in which pair (i, j) scores q_i . R(distance) k_j, from complex features.

    All of them may have been turned by one distance before, which no score notices but in how it rounds.
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    offset = torch.zeros(T, S, dtype=torch.float64)
    for i in range(T):
        for j in range(S):
            at = where(start + i, j)
            offset[i, j] = at[1] - at[0]
    theta = frequencies(base, D)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    qc, kc = (torch.complex(*x.chunk(2, -1)) for x in (q, k))
    if turned:
        once = torch.polar(torch.ones((), dtype=torch.float64), turned * theta).to(qc.dtype)
        qc, kc = qc * once, kc * once
    real = torch.promote_types(q.dtype, torch.float32)
    turn = torch.polar(torch.ones((), dtype=torch.float64), offset[..., None] * theta).to(qc.dtype)
    score = torch.einsum("bhid,bhjd,ijd->bhij", qc.conj(), kc, turn).real.to(real) / math.sqrt(D)
    return score.masked_fill(~seen, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_is_its_papers_definition(name: str, two_sided: bool) -> None:
    make, where = METHODS[name]
    T, layout = 77, lcattn.Full() if two_sided else lcattn.Causal()
    q, k, v = torch.randn(2, 4, T, 16) * 2, torch.randn(2, 2, T, 16) * 2, torch.randn(2, 2, T, 16)
    seen = torch.ones(T, T, dtype=torch.bool) if two_sided else torch.ones(T, T, dtype=torch.bool).tril()
    probe = torch.randn(2, 4, T, 16)

    def run(dtype: torch.dtype, attend: Any) -> dict[str, Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return dict(
            zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, probe.to(dtype))), strict=True)
        )

    position = make(two_sided)
    truth = run(torch.float64, lambda q, k, v: dense(q, k, v, where, seen))
    exact = run(
        torch.float64, lambda q, k, v: lcattn.attention(q, k, v, layout=layout, position=position, backend="reference")
    )
    for part in truth:
        torch.testing.assert_close(exact[part], truth[part], rtol=1e-9, atol=1e-9)
    got = run(torch.float32, lambda q, k, v: lcattn.attention(q, k, v, layout=layout, position=position))
    problem = make_problem(q, k, v, layout, position, None, None, None, None, None, None, 0.0)
    assert not [str(c) for c in tolerance.verify(problem, "cpu", probe) if not c.ok]

    # whoever turns queries and keys, and not scores, rounds both
    def eager() -> dict[str, Tensor]:
        turned = float(torch.randint(1, 1000, ()))
        return run(torch.float32, lambda q, k, v: dense(q, k, v, where, seen, turned=turned))

    tolerance.check(got, truth, eager)


@pytest.mark.parametrize("name", [*METHODS, "rotary"])
def test_keys_turned_as_they_are_read(name: str) -> None:
    """Few queries in inference leave keys as they are; whole and part rotary, scattered coordinates, none to turn."""
    position: Position = (
        METHODS[name][0]()
        if name in METHODS
        else lcattn.Rotary(rope_parameters={"rope_theta": BASE, "partial_rotary_factor": 0.5})
    )
    for D, dtype in ((64, torch.float32), (20, torch.float32), (32, torch.bfloat16)):
        q, k, v = (torch.randn(2, h, n, D, dtype=dtype) * 2 for h, n in ((4, 2), (2, 150), (2, 150)))
        k_pos = torch.arange(150) - torch.tensor([[0], [31]])
        for given in ((None, None), (k_pos[:, -2:], k_pos)):
            problem = make_problem(q, k, v, lcattn.Causal(), position, None, None, None, None, *given, 0.0)
            assert problem.turn_table is not None and all(t is k for t in problem.k)
            assert not [str(c) for c in tolerance.verify(problem, "cpu") if not c.ok]
            # with a gradient to come they are turned beforehand
            assert not [str(c) for c in tolerance.verify(problem, "cpu", torch.randn_like(q)) if not c.ok]
            if dtype == torch.bfloat16:
                continue
            # and as well as many queries turn them
            out = lcattn.attention(q, k, v, layout=lcattn.Causal(), position=position, q_pos=given[0], k_pos=given[1])
            many = torch.cat([torch.randn(2, 4, 60, D), q], 2)
            q_pos = None if given[0] is None else k_pos[:, -62:]
            whole = lcattn.attention(many, k, v, layout=lcattn.Causal(), position=position, q_pos=q_pos, k_pos=given[1])
            torch.testing.assert_close(out, whole[:, :, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*METHODS, "rotary", "partial"])
def test_many_rows_turn_exactly(name: str, dtype: torch.dtype) -> None:
    """Values and gradients of the kernel that turns, against the formula in float64, at all kinds of coordinates."""
    parameters = {"rope_theta": BASE, "partial_rotary_factor": 0.5}
    position: Any = METHODS[name][0](True) if name in METHODS else lcattn.Rotary(BASE)
    position = lcattn.Rotary(rope_parameters=parameters) if name == "partial" else position
    for D, T, S in ((64, 70, 150), (36, 130, 90), (128, 33, 64)):
        q, k = (torch.randn(2, n, h, D, dtype=dtype).transpose(1, 2).requires_grad_() for n, h in ((T, 4), (S, 2)))
        near = (torch.randint(-50, 400, (2, T)), torch.randint(-50, 400, (1, S)))
        far = (torch.randint(-(10**7), 10**7, (1, T)), torch.arange(S)[None] + 10**8)
        for q_pos, k_pos in ((None, None), near, far):
            got = position.lower(q, k, k, q_pos, k_pos)
            wide_q, wide_k = (x.detach().double().requires_grad_() for x in (q, k))
            want = position.lower(wide_q, wide_k, wide_k, q_pos, k_pos)
            pairs = [*zip(got.q, want.q, strict=True), *zip(got.k, want.k, strict=True)]
            for rounded, exact in pairs:
                torch.testing.assert_close(rounded.double(), exact, rtol=torch.finfo(dtype).eps, atol=3e-6)
            weights = [torch.randn_like(rounded) for rounded, _ in pairs]
            sums = [sum((t * w).sum() for t, w in zip(side, weights, strict=True)) for side in zip(*pairs, strict=True)]
            gradients = torch.autograd.grad(sums[0], (q, k))
            for rounded, exact in zip(gradients, torch.autograd.grad(sums[1], (wide_q, wide_k)), strict=True):
                # every way is rounded, then their sum
                error = len(pairs) * torch.finfo(dtype).eps * exact.abs().max().item()
                torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=error + 1e-5)


@pytest.mark.parametrize("T", [5, 60])
@pytest.mark.parametrize("name", [*METHODS, "rotary"])
def test_what_inference_leaves_serves_training(name: str, T: int) -> None:
    """Tables first made in inference mode are kept, and a backward must be able to save them."""
    # frequencies that no other test has made tables of
    rotary = lcattn.Rotary(1000.0 + T)
    position: Any = rotary if name == "rotary" else dataclasses.replace(METHODS[name][0](), rotary=rotary)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (T, 90, 90))
    with torch.inference_mode():
        want = lcattn.attention(q, k, v, layout=lcattn.Causal(), position=position)
    leaf = q.clone().requires_grad_()
    out = lcattn.attention(leaf, k, v, layout=lcattn.Causal(), position=position)
    out.sum().backward()
    torch.testing.assert_close(out, want.clone())
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


TINY = dict(vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=32)
OPTIONS = {"dual_chunk": dict(chunk=20, local=7), "self_extend": dict(group=5, window=16), "rerope": dict(window=16)}
DEFINITIONS = {
    "dual_chunk": lambda i, j: dual_chunk(i, j, 20, 7),
    "self_extend": lambda i, j: self_extend(i, j, 5, 16),
    "rerope": lambda i, j: rerope(i, j, 16),
}
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**TINY, num_key_value_heads=2)),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=16)),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=24)),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig(**TINY)),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**TINY)),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(
            **TINY,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        ),
    ),
    "glm": (tf.GlmForCausalLM, tf.GlmConfig(**TINY, num_key_value_heads=2, head_dim=16)),
    "modernbert": (
        tf.ModernBertForMaskedLM,
        tf.ModernBertConfig(**TINY, local_attention=12, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2),
    ),
}


def make(name: str) -> Any:
    """A small random model whose scores spread."""
    kind, config = KINDS[name]
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj", "k_proj", "Wqkv", "query_key_value")):
                parameter.mul_(10)
            if "q_norm" in parameter_name:
                parameter.fill_(4.0)
    return model


def use_dense(model: Any, method: str) -> Any:
    """The extended model with its attention replaced by the definition; keys and queries arrive unturned."""
    hf.extend(model, 90, method, **OPTIONS[method])

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
        T, S = q.shape[2], k.shape[2]
        i, j = torch.arange(T)[:, None], torch.arange(S)
        seen = j <= i if getattr(module, "is_causal", True) else torch.ones(T, S, dtype=torch.bool)
        # some keep it in the config alone
        window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        if window is not None:
            near = (i - j < window) if getattr(module, "is_causal", True) else (i - j).abs() < window
            seen = seen & near
        kinds = module.config.rope_parameters
        layer_types = getattr(module.config, "layer_types", None)
        own = kinds.get(layer_types[module.layer_idx], kinds) if layer_types else kinds
        R = int(q.shape[3] * own.get("partial_rotary_factor", 1.0))
        where = DEFINITIONS[method] if window is None else lambda i, j: (i, j)
        scale = scaling * math.sqrt(R)
        # what is not turned scores by itself, appended to what is
        rest = (q[..., R:] @ k[..., R:].repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * scaling
        out = dense_with(q[..., :R] * scale, k[..., :R], v, where, seen, own["rope_theta"], rest)
        return out.transpose(1, 2).contiguous(), None

    tf.AttentionInterface.register("lcattn", attend)
    return model


def dense_with(q: Tensor, k: Tensor, v: Tensor, where: Any, seen: Tensor, base: float, rest: Tensor) -> Tensor:
    """`dense`, with more to add to the scores: a pair of features for each query whose product with keys is that."""
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    offset = torch.tensor([[where(i, j)[1] - where(i, j)[0] for j in range(S)] for i in range(T)], dtype=torch.float64)
    theta = frequencies(base, D)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    (qa, qb), (ka, kb) = q.chunk(2, -1), k.chunk(2, -1)
    cos, sin = (offset[..., None] * theta).cos().to(q.dtype), (offset[..., None] * theta).sin().to(q.dtype)
    even = torch.einsum("bhid,bhjd,ijd->bhij", qa, ka, cos) + torch.einsum("bhid,bhjd,ijd->bhij", qb, kb, cos)
    odd = torch.einsum("bhid,bhjd,ijd->bhij", qb, ka, sin) - torch.einsum("bhid,bhjd,ijd->bhij", qa, kb, sin)
    score = (even + odd) / math.sqrt(D) + rest
    return score.masked_fill(~seen, -math.inf).softmax(-1) @ v


@pytest.fixture(autouse=True)
def registered() -> Any:
    hf.register()
    yield
    hf.register()


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_model_reads_by_the_definition(name: str, method: str) -> None:
    """Logits and every gradient of an extended model, well past its trained length."""
    model = make(name)
    ids = torch.randint(3, 90, (2, 71))
    probe = torch.randn(2, 71, 90)

    def run(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(ids).logits
        (logits * probe.to(logits.dtype)).sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        size = [float(g.double().square().mean().sqrt()) + 1e-12 for g in grads]
        return {"logits": logits, "gradients": torch.cat([g / s for g, s in zip(grads, size, strict=True)])}

    got = run(hf.extend(copy.deepcopy(model), 90, method, **OPTIONS[method]))
    trusted = use_dense(copy.deepcopy(model), method)
    truth = run(copy.deepcopy(trusted).double())
    tolerance.check(got, truth, lambda: run(trusted))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", OPTIONS)
def test_decoding_equals_reading(method: str, cache: str) -> None:
    """Greedy generation across the trained length, left-padded, gives what each whole text gives in one pass."""
    model = hf.extend(make("llama"), 90, method, **OPTIONS[method])
    prompt = torch.randint(3, 90, (2, 40))
    seen = torch.ones(2, 40, dtype=torch.long)
    seen[1, :9] = 0
    made = model.generate(
        prompt,
        attention_mask=seen,
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(made.logits, 1)
    for row, pads in enumerate((0, 9)):
        whole = model(made.sequences[row : row + 1, pads:]).logits[0, 39 - pads : -1]
        torch.testing.assert_close(logits[row], whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_later_token_changes_nothing_before_it(method: str) -> None:
    model = hf.extend(make("llama"), 90, method, **OPTIONS[method])
    ids = torch.randint(3, 90, (1, 70))
    before = model(ids).logits
    for j in (1, 19, 20, 41, 69):
        other = ids.clone()
        other[0, j] = (ids[0, j] + 1) % 90
        changed = (model(other).logits - before).abs().amax(2)[0]
        assert changed[:j].sum() == 0 and changed[j] > 0


@pytest.mark.parametrize("method", ["yarn", "linear", "dynamic"])
def test_scalings_are_transformers_own(method: str) -> None:
    model = make("llama")
    ids = torch.randint(3, 90, (2, 71))
    config = copy.deepcopy(model.config)
    config.rope_parameters |= {"rope_type": method, "factor": 4.0, "original_max_position_embeddings": 32}
    scaled = tf.LlamaForCausalLM(config).eval()
    scaled.load_state_dict(model.state_dict())
    plain = model(ids).logits
    got = hf.extend(model, 128, method)(ids).logits
    torch.testing.assert_close(got, scaled(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)
    hf.use(model, None)
    assert torch.equal(model(ids).logits, plain) and model.config.max_position_embeddings == 32


def test_a_layout_beside_it() -> None:
    """What is out of the layout is not read; what is in it, as without."""
    model = hf.extend(make("llama"), 100, "dual_chunk", lcattn.Chunked(20, 1) | lcattn.Global(3), chunk=20, local=7)
    ids = torch.randint(3, 90, (1, 70))
    before = model(ids).logits
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % 90
    changed = (model(other).logits - before).abs().amax(2)[0]
    assert changed[10:40].min() > 0
    everything = hf.extend(model, 100, "dual_chunk", lcattn.Full(), chunk=20, local=7)(ids).logits
    torch.testing.assert_close(everything, hf.extend(model, 100, "dual_chunk", chunk=20, local=7)(ids).logits)
    assert not torch.allclose(everything, before, atol=1e-3)


@pytest.mark.parametrize("T", [2, 40])
@pytest.mark.parametrize("name", [*METHODS, "rotary"])
def test_attention_factor_multiplies_scores_by_its_square(name: str, T: int) -> None:
    """Scores of all phases, of turned keys and of those left as they are."""
    position: Any = METHODS[name][0]() if name in METHODS else ROTARY
    sharp = dataclasses.replace(ROTARY, attention_factor=1.3)
    sharper = sharp if name == "rotary" else dataclasses.replace(position, rotary=sharp)
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, T), (2, 70), (2, 70)))
    got = lcattn.attention(q, k, v, layout=lcattn.Causal(), position=sharper)
    want = lcattn.attention(q, k, v, layout=lcattn.Causal(), position=position, scale=1.3**2 / 4)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_attention_factor_of_a_model_leaves_windows_as_they_are() -> None:
    model, ids = make("gemma3"), torch.randint(3, 90, (1, 60))
    plain = hf.extend(model, 90, "self_extend", **OPTIONS["self_extend"])(ids).logits
    sharp = hf.extend(model, 90, "self_extend", **OPTIONS["self_extend"], attention_factor=1.3)(ids).logits
    assert not torch.allclose(plain, sharp, atol=1e-3)
    local, full = (layer.self_attn.__dict__["_lcattn"].position[0] for layer in model.model.layers)
    assert local.attention_factor == 1 and full.rotary.attention_factor == 1.3
    torch.testing.assert_close(hf.extend(model, 90, "self_extend", **OPTIONS["self_extend"])(ids).logits, plain)


def test_bad_input_leaves_the_model_as_it_was() -> None:
    model = make("llama")
    ids = torch.randint(3, 90, (1, 30))
    before = model(ids).logits
    table = torch.zeros(1, 4, 4)
    trained = lcattn.Rotary(rope_parameters={"max_position_embeddings": 16})
    for message, call in (
        ("more than the trained 32", lambda: hf.extend(model, 100, "dual_chunk", chunk=30, local=3)),
        ("more than the trained 32", lambda: hf.extend(model, 1000, "self_extend", group=5, window=16)),
        ("more than the trained 32", lambda: hf.extend(model, 100, "rerope", window=32)),
        ("local must be at most chunk", lambda: hf.extend(model, 100, "dual_chunk", chunk=3, local=9)),
        ("chunk must be an integer", lambda: hf.extend(model, 100, "dual_chunk", chunk=0, local=1)),
        ("method: expected one of", lambda: hf.extend(model, 100, "magic")),
        ("attention_factor must be a positive", lambda: hf.extend(model, 100, "rerope", window=16, attention_factor=0)),
        ("options: yarn takes factor, got attention", lambda: hf.extend(model, 100, "yarn", attention_factor=1.1)),
        ("Rotary: attention_factor must be", lambda: lcattn.Rotary(attention_factor=math.inf)),
        ("Rotary: attention_factor must be", lambda: lcattn.Rotary(attention_factor="1.07")),
        ("options: rerope takes window, got group", lambda: hf.extend(model, 100, "rerope", group=3)),
        ("to must be an integer", lambda: hf.extend(model, 0)),
        ("yarn: factor must be at least 1", lambda: hf.extend(model, 100, "yarn", factor=0.5)),
        ("yarn: factor must be a positive number, got inf", lambda: hf.extend(model, 100, "yarn", factor=math.inf)),
        ("chunk must be an integer >= 1, got 'a'", lambda: hf.extend(model, 100, "dual_chunk", chunk="a")),
        ("local must be less than the trained length, 32", lambda: hf.extend(model, 100, "dual_chunk", local=32)),
        ("rotary must be a Rotary, got 500.0", lambda: lcattn.DualChunk(8, 4, 500.0)),
        ("two_sided must be True or False, got 3", lambda: lcattn.ReRoPE(8, two_sided=3)),
        ("must be at most the trained length, 16", lambda: lcattn.DualChunk(12, 8, trained)),
        ("min_offset must be an integer of 32 bits", lambda: lcattn.Shaw(table, None)),
        ("min_offset must be an integer of 32 bits", lambda: lcattn.RelativeBias(table[:, :, 0], 1 << 40)),
        (
            "max_offset must be an integer",
            lambda: lcattn.TransformerXL.sinusoid(table[0], *[table[0, :1]] * 2, 0, None),
        ),
        ("no rotary positions", lambda: hf.extend(tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)), 100)),
        ("group must be an integer", lambda: lcattn.SelfExtend(0, 4)),
        ("window must be an integer", lambda: lcattn.ReRoPE(-1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="expected a layout"):
        hf.extend(model, 100, layout="Full()")
    with pytest.raises(TypeError, match="expected a transformers model, got NoneType"):
        hf.extend(None, 100)
    with pytest.raises(TypeError, match="got the class Shaw"):
        lcattn.attention(*[torch.zeros(1, 1, 2, 4)] * 3, position=lcattn.Shaw)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("method", ["linear", "dynamic", "yarn"])
def test_scaled_frequencies_are_not_scaled_again(method: str) -> None:
    model = make("llama")
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model.config.rope_parameters |= {"rope_type": "llama3", "factor": 2.0} | more
    model = type(model)(model.config).eval()
    ids = torch.randint(3, 90, (1, 30))
    before = model(ids).logits
    with pytest.raises(ValueError, match=f"{method} can't scale positions of rope_type 'llama3' again"):
        hf.extend(model, 100, method)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("method", ["dual_chunk", "yarn"])
def test_an_extended_model_is_saved_as_it_was(tmp_path: Path, method: str) -> None:
    model = make("llama")
    ids = torch.randint(3, 90, (1, 60))
    plain = model(ids).logits
    hf.extend(model, 90, method)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == 32
    assert torch.equal(loaded(ids).logits, plain)


GPT2 = dict(vocab_size=90, n_embd=32, n_layer=1, n_head=2)


MLA = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
MLA |= dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_convention_is_refused(dtype: torch.dtype) -> None:
    """However mild the attention, and so however little the text shows of it."""
    model = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**TINY | MLA)).eval().to(dtype)
    ids = torch.randint(3, 90, (1, 30))
    before = model(ids).logits
    with pytest.raises(ValueError, match="in a way that is not supported"):
        hf.extend(model, 100, "dual_chunk", **OPTIONS["dual_chunk"])
    assert torch.equal(model(ids).logits, before)


GQA = dict(num_key_value_heads=2, head_dim=16)
INTERLEAVED: dict[str, tuple[Any, Any]] = {
    "cohere": (tf.CohereForCausalLM, tf.CohereConfig(**TINY, num_key_value_heads=2)),
    "cohere_norm": (tf.CohereForCausalLM, tf.CohereConfig(**TINY, num_key_value_heads=2, use_qk_norm=True)),
    "cohere2": (tf.Cohere2ForCausalLM, tf.Cohere2Config(**TINY | GQA, sliding_window=8, sliding_window_pattern=2)),
    "glm": (tf.GlmForCausalLM, tf.GlmConfig(**TINY | GQA)),
    "glm4": (tf.Glm4ForCausalLM, tf.Glm4Config(**TINY | GQA)),
    "helium": (tf.HeliumForCausalLM, tf.HeliumConfig(**TINY | GQA)),
    "ernie4_5": (tf.Ernie4_5ForCausalLM, tf.Ernie4_5Config(**TINY | GQA)),
}


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_pairs_are_read_too(name: str, scale: int) -> None:
    kind, config = INTERLEAVED[name]
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
                parameter.mul_(scale)
                # a norm that weighs every feature otherwise
                parameter.mul_(1 + torch.rand_like(parameter))
    ids = torch.randint(3, 90, (2, 60))
    plain = model(ids).logits
    extended = hf.extend(model, 90, "dual_chunk", **OPTIONS["dual_chunk"])
    # one chunk is read as the model reads it
    torch.testing.assert_close(extended(ids[:, :20]).logits, plain[:, :20], rtol=1e-4, atol=1e-5)
    whole = extended(ids).logits
    start = extended(ids[:, :25], use_cache=True)
    parts = [start.logits]
    for at in range(25, 60):
        parts.append(extended(ids[:, at : at + 1], past_key_values=start.past_key_values).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)
    assert torch.equal(hf.use(model, None)(ids).logits, plain)
    # rounding hides no convention: layers come out alike
    chosen = [_turned(hf.extend(model.to(dtype), 90)) for dtype in (torch.float32, torch.bfloat16)]
    assert chosen[0] == chosen[1] and any(hooked for hooked, _ in chosen[0])


def _turned(model: Any) -> list[tuple[bool, int]]:
    """Of each attention: whether its projections or norms reorder features, and how many positions it has."""
    modules = [module for module in model.modules() if "_lcattn" in module.__dict__]
    hooked = [any(part._forward_hooks for part in module.modules()) for module in modules]
    return list(zip(hooked, [len(module.__dict__["_lcattn"].position) for module in modules], strict=True))


def test_a_tuned_prefix_is_refused() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(make("llama"), config).eval()
    with pytest.raises(ValueError, match="prefix tuning gives keys that are not to be turned"):
        hf.extend(model, 90, "rerope", window=16)


def test_layers_without_positions_stay_without() -> None:
    """Cohere2's layers that see everything turn nothing, and the operator doesn't either."""
    kind, config = INTERLEAVED["cohere2"]
    assert _turned(hf.extend(kind(config).eval(), 90)) == [(True, 1), (False, 0)]


def test_positions_that_do_not_count_tokens_are_refused() -> None:
    model = hf.extend(make("llama"), 90, "self_extend", **OPTIONS["self_extend"])
    ids = torch.randint(3, 90, (2, 40))
    seen = torch.ones_like(ids)
    seen[1, :9] = 0
    here = torch.arange(40)[None]
    gap, late = (here + 11 * (here >= at) for at in (9, 20))
    want = model(ids).logits
    for start in (0, 5):
        torch.testing.assert_close(model(ids, position_ids=here + start).logits, want)
    padded = model(ids, attention_mask=seen).logits
    for pad in (0, 1):
        positions = (seen.cumsum(1) - 1).masked_fill(seen == 0, pad)
        torch.testing.assert_close(model(ids, attention_mask=seen, position_ids=positions).logits, padded)
        cache = model(ids[:, :15], attention_mask=seen[:, :15], position_ids=positions[:, :15]).past_key_values
        rest = model(ids[:, 15:], attention_mask=seen, position_ids=positions[:, 15:], past_key_values=cache).logits
        torch.testing.assert_close(rest, padded[:, 15:], rtol=1e-4, atol=1e-4)
    documents = torch.cat([torch.arange(13), torch.arange(27)])[None]
    parts = torch.cat([model(ids[:, :13]).logits, model(ids[:, 13:]).logits], 1)
    packed = model(ids, position_ids=documents.expand(2, -1), use_cache=False).logits
    torch.testing.assert_close(packed, parts, rtol=1e-4, atol=1e-4)
    cache = model(ids).past_key_values
    for message, inputs in (
        (r"got \[20\] for token 9 of row 0", dict(position_ids=gap, attention_mask=torch.ones_like(ids))),
        (r"got \[31\] for token 20 of row 1", dict(position_ids=torch.cat([here, late]), attention_mask=seen)),
        (r"on from the 40 cached, got \[60\] for token 0", dict(position_ids=here + 60, past_key_values=cache)),
    ):
        with pytest.raises(ValueError, match=f"position_ids: .*{message}"):
            model(ids, **inputs)
    torch.testing.assert_close(model(ids).logits, want)
    hf.use(model, None)(ids, position_ids=gap)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_text_of_a_vision_model(name: str) -> None:
    """Its text is read on; positions of images, which differ by axis, are refused."""
    text = TINY | GQA | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=64)
    config = getattr(tf, f"{name}Config")(text_config=text, vision_config=vision)
    model = getattr(tf, f"{name}ForConditionalGeneration")(config).eval()
    ids = torch.randint(3, 90, (1, 60))
    plain = model(input_ids=ids).logits
    hf.extend(model, 90, "rerope", window=31)
    axes = torch.stack([torch.arange(60)] * 3)[:, None]
    got = model(input_ids=ids, position_ids=axes).logits
    torch.testing.assert_close(got, model(input_ids=ids).logits)
    torch.testing.assert_close(got[:, :31], plain[:, :31], rtol=1e-4, atol=1e-5)
    axes[1] //= 3
    with pytest.raises(ValueError, match=r"alike on all axes, got \[1, 0, 1\] for token 1"):
        model(input_ids=ids, position_ids=axes)


def test_encoder_and_decoder() -> None:
    part = TINY | GQA | dict(sliding_window=8)
    model = tf.T5GemmaForConditionalGeneration(tf.T5GemmaConfig(encoder=part, decoder=part, vocab_size=90)).eval()
    ids = torch.randint(3, 90, (2, 70))
    plain = model(input_ids=ids[:, :16], decoder_input_ids=ids).logits
    hf.extend(model, 90, "rerope", window=16)
    got = model(input_ids=ids[:, :16], decoder_input_ids=ids).logits
    torch.testing.assert_close(got[:, :16], plain[:, :16], rtol=1e-4, atol=1e-5)
    assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()
    assert torch.equal(hf.use(model, None)(input_ids=ids[:, :16], decoder_input_ids=ids).logits, plain)


def test_trained_is_what_the_model_reads() -> None:
    """Of scaled frequencies the length they were scaled to; whoever scales again starts from before."""
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 32}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    long = TINY | dict(max_position_embeddings=256)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**long, rope_parameters=llama3)).eval()
    position = hf.extend(model, 512, "dual_chunk").model.layers[0].self_attn.__dict__["_lcattn"].position[0]
    assert (position.chunk, position.local) == (192, 64)
    model = hf.extend(tf.LlamaForCausalLM(tf.LlamaConfig(**long, rope_parameters=yarn)).eval(), 512, "yarn")
    scaled = model.model.rotary_emb.config.rope_parameters
    assert (scaled["factor"], scaled["original_max_position_embeddings"]) == (16, 32)


def test_weights_of_a_short_text_are_the_models_own() -> None:
    """Within one chunk, or the window, nothing is remapped."""
    q, k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    plain = make_problem(q, k, v, lcattn.Causal(), ROTARY, None, None, None, None, None, None, 0.0)
    for name in METHODS:
        got = make_problem(q, k, v, lcattn.Causal(), METHODS[name][0](), None, None, None, None, None, None, 0.0)
        torch.testing.assert_close(reference.attention(got)[0], reference.attention(plain)[0])
