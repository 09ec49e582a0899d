"""Rotary positions remapped past the trained length, against each paper's definition written out pair by pair."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import lcattn
from lcattn import hf, reference, tolerance
from lcattn.api import make_problem
from lcattn.position import Position
from tests.extend_models import KINDS, OPTIONS, make

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


DEFINITIONS = {
    "dual_chunk": lambda i, j: dual_chunk(i, j, 20, 7),
    "self_extend": lambda i, j: self_extend(i, j, 5, 16),
    "rerope": lambda i, j: rerope(i, j, 16),
}


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


def test_weights_of_a_short_text_are_the_models_own() -> None:
    """Within one chunk, or the window, nothing is remapped."""
    q, k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    plain = make_problem(q, k, v, lcattn.Causal(), ROTARY, None, None, None, None, None, None, 0.0)
    for name in METHODS:
        got = make_problem(q, k, v, lcattn.Causal(), METHODS[name][0](), None, None, None, None, None, None, 0.0)
        torch.testing.assert_close(reference.attention(got)[0], reference.attention(plain)[0])
