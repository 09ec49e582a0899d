"""Who is timed: lcattn, the strongest forms that plain torch offers, and the attention of well-known models.

A provider prepares a workload once, outside any timing: reordering, masks and tables that a model would
keep are made there. Projections of model layers are replaced by ready tensors, so that attention alone is
timed, as for lcattn. What a provider answers may differ from the workload (another pattern, no bias): its
`note` says so, its correctness is checked against what it does answer, and only visible scores of that
pattern count as useful work.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcattn
from lcattn import reference, tolerance
from lcattn.api import make_problem
from lcattn.layout import Layout
from lcattn.position import Position
from lcattn.problem import Gradients

from .workloads import Inputs, Workload

MakePosition = Callable[[Tensor], Position]


@dataclass(frozen=True)
class Prepared:
    """A workload made ready for one provider and pass.

    Attributes:
        forward: computes the output, in the provider's own layout of dimensions.
        leaves: tensors that take gradients: q, k, v, and table if its gradient is computed.
        answers: the layout that is computed; position: from the table to its position, None for none; scale.
        counted: the layout whose visible scores are the useful work, where that is not `answers`.
        tokens_first: outputs and q, k, v are [B, N, H * D] instead of [B, H, N, D].
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    answers: Layout
    position: MakePosition | None
    scale: float
    counted: Layout | None = None
    tokens_first: bool = False

    def heads_first(self, x: Tensor, H: int) -> Tensor:
        """An output or gradient of q, k, v as [B, H, N, D]."""
        return x.unflatten(2, (H, -1)).transpose(1, 2) if self.tokens_first else x

    def own(self, x: Tensor) -> Tensor:
        """A [B, H, N, D] tensor in the provider's layout."""
        return _tokens_first(x) if self.tokens_first else x

    def backward(self, dout: Tensor) -> None:
        """One forward and backward; gradients are left in `leaves`. dout as `own` gives it."""
        for leaf in self.leaves.values():
            leaf.grad = None
        self.forward().backward(dout)


@dataclass(frozen=True)
class Provider:
    """A way to compute a workload.

    Attributes:
        name, label, note: what it is called, and what one should know of its figures.
        prepare: from workload, inputs and whether gradients are wanted.
        needs: a package that must be installed.
        backward: None, or why it has no backward pass here.
        fixed_bias: its position takes no gradient, which is less work; otherwise the gate asks for that gradient.
        reject: why it cannot compute a workload, or None if it can.
    """

    name: str
    label: str
    note: str
    prepare: Callable[[Workload, Inputs, bool], Prepared]
    needs: str | None = None
    backward: str | None = None
    fixed_bias: bool = False
    reject: Callable[[Workload], str | None] = lambda workload: None

    def supports(self, workload: Workload, measure: str) -> str | None:
        """Why it cannot run this workload and pass here, or None if it can."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if measure == "forward+backward" and self.backward:
            return self.backward
        return self.reject(workload)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).contiguous()


def _leaves(inputs: Inputs, grad: bool, names: tuple[str, ...] = ("q", "k", "v", "table")) -> dict[str, Tensor]:
    return {n: getattr(inputs, n).detach().clone().requires_grad_(grad) for n in names}


def _lcattn(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    x = _leaves(inputs, grad)
    layout, position = w.layout, w.position(x["table"])

    def forward() -> Tensor:
        return lcattn.attention(x["q"], x["k"], x["v"], layout=layout, position=position)

    return Prepared(forward, x, layout, w.position, w.D**-0.5)


def _lcattn_plain(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    x = _leaves(inputs, grad, ("q", "k", "v"))

    def forward() -> Tensor:
        return lcattn.attention(x["q"], x["k"], x["v"], layout=w.layout)

    return Prepared(forward, x, w.layout, None, w.D**-0.5)


def _lcattn_shaw(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    x = _leaves(inputs, grad)
    draw = torch.Generator().manual_seed(0)
    # scores from it of standard deviation 2, beside the content's 3
    table = torch.randn(*inputs.table.shape, w.D, generator=draw) * 2 / 3**0.5
    x["table"] = table.requires_grad_(grad)
    position = functools.partial(lcattn.Shaw, min_offset=w.min_offset)

    def forward() -> Tensor:
        return lcattn.attention(x["q"], x["k"], x["v"], layout=w.layout, position=position(x["table"]))

    return Prepared(forward, x, w.layout, position, w.D**-0.5)


def _bias_tile(w: Workload, table: Tensor) -> Tensor:
    """[H, chunk, 2 chunk]: bias of a chunk's queries to the chunk before and their own; -inf ahead."""
    offset = torch.arange(-w.chunk, w.chunk) - torch.arange(w.chunk)[:, None]
    return table[:, (offset - w.min_offset).clamp(max=table.shape[1] - 1)].masked_fill(offset > 0, float("-inf"))


def _folded(w: Workload, inputs: Inputs, grad: bool, learn_bias: bool) -> Prepared:
    x = _leaves(inputs, grad, ("q", "k", "v", "table") if learn_bias else ("q", "k", "v"))
    C, n = w.chunk, w.N // w.chunk
    learn_bias = learn_bias and grad
    # a bias that does not change between calls is lowered once
    kept = None if learn_bias else _bias_tile(w, inputs.table).to(w.dtype)[:, None]

    def neighbours(t: Tensor) -> Tensor:
        # chunk c and the one before it are 2 C rows of a view: nothing is copied
        return t.unfold(2, 2 * C, C).transpose(3, 4)[0]

    def forward() -> Tensor:
        q, k, v = x["q"], x["k"], x["v"]
        bias = _bias_tile(w, x["table"]).to(w.dtype)[:, None] if kept is None else kept
        first = F.scaled_dot_product_attention(
            q[:, :, :C], k[:, :, :C], v[:, :, :C], attn_mask=bias[..., C:].transpose(0, 1)
        )
        if n == 1:
            return first
        folded = q[0].unflatten(1, (n, C))[:, 1:]
        rest = F.scaled_dot_product_attention(folded, neighbours(k), neighbours(v), attn_mask=bias)
        return torch.cat([first, rest.flatten(1, 2)[None]], 2)

    return Prepared(forward, x, w.layout, w.position, w.D**-0.5)


def _padded(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    x = _leaves(inputs, grad)
    C, n = w.chunk, w.N // w.chunk

    def neighbours(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, C, 0))[0].unfold(1, 2 * C, C).permute(1, 0, 3, 2)

    def forward() -> Tensor:
        mask = _bias_tile(w, x["table"]).to(w.dtype).repeat(n, 1, 1, 1)
        mask[0, :, :, :C] = float("-inf")
        folded = x["q"][0].unflatten(1, (n, C)).transpose(0, 1)
        out = F.scaled_dot_product_attention(folded, neighbours(x["k"]), neighbours(x["v"]), attn_mask=mask)
        return out.transpose(0, 1).flatten(1, 2)[None]

    return Prepared(forward, x, w.layout, w.position, w.D**-0.5)


def _dense(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    x = _leaves(inputs, grad, ("q", "k", "v"))

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)

    return Prepared(forward, x, lcattn.Causal(), None, w.D**-0.5, counted=w.layout)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(w: Workload, inputs: Inputs, grad: bool, bias: bool) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask

    x = _leaves(inputs, grad)
    table, C, last = x["table"], w.chunk, 2 * w.chunk - 1

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i // C - j // C <= 1)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[h, (j - i + last).clamp(0, last)]

    block_mask = create_block_mask(visible, None, None, w.N, w.N, device="cpu")
    score_mod = add_bias if bias else None

    def forward() -> Tensor:
        return _compiled_flex()(x["q"], x["k"], x["v"], score_mod=score_mod, block_mask=block_mask)

    return Prepared(forward, x, w.layout, w.position if bias else None, w.D**-0.5)


def _local_attention(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    from local_attention import LocalAttention

    x = _leaves(inputs, grad)
    layer = LocalAttention(w.chunk, causal=True, look_backward=1, use_rotary_pos_emb=False)
    kept = None if grad else _bias_tile(w, x["table"]).to(w.dtype)

    def forward() -> Tensor:
        bias = _bias_tile(w, x["table"]).to(w.dtype) if kept is None else kept
        return layer(x["q"], x["k"], x["v"], attn_bias=bias)

    return Prepared(forward, x, w.layout, w.position, w.D**-0.5)


class _Given(nn.Module):
    """Stands for a projection and gives a ready tensor."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, _: Tensor) -> Tensor:
        return self.make()


def _model_leaves(inputs: Inputs, grad: bool) -> dict[str, Tensor]:
    return {n: _tokens_first(getattr(inputs, n)).requires_grad_(grad) for n in ("q", "k", "v")}


def _longformer(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    x = _model_leaves(inputs, grad)
    config = LongformerConfig(
        hidden_size=w.H * w.D,
        num_attention_heads=w.H,
        attention_window=[2 * w.chunk],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, 0)
    # the layer scales its query in place, which a leaf forbids
    layer.query = _Given(lambda: x["q"].transpose(0, 1) * 1)
    layer.key = _Given(lambda: x["k"].transpose(0, 1))
    layer.value = _Given(lambda: x["v"].transpose(0, 1))
    hidden, nothing = torch.empty(1, w.N, w.H * w.D, dtype=w.dtype), torch.zeros(1, w.N)

    def forward() -> Tensor:
        return layer(hidden, nothing, nothing.bool(), nothing.bool(), False)[0]

    return Prepared(forward, x, lcattn.Window(w.chunk, w.chunk), None, w.D**-0.5, tokens_first=True)


def _bigbird(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    from transformers.models.big_bird.modeling_big_bird import (
        BigBirdBlockSparseAttention,
        BigBirdConfig,
        BigBirdModel,
    )

    x = _model_leaves(inputs, grad)
    block = w.chunk // 4
    config = BigBirdConfig(
        hidden_size=w.H * w.D,
        num_attention_heads=w.H,
        block_size=block,
        num_random_blocks=1,
        max_position_embeddings=w.N,
    )
    # training mode: in evaluation every random block is block 0, which is seen twice
    layer = BigBirdBlockSparseAttention(config, seed=1).train()
    layer.query, layer.key, layer.value = (_Given(lambda n=n: x[n]) for n in ("q", "k", "v"))
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, w.N, dtype=w.dtype), block
    )
    hidden = torch.empty(1, w.N, w.H * w.D, dtype=w.dtype)

    def forward() -> Tensor:
        return layer(hidden, band, rows, columns, blocked, blocked)[0]

    drawn = []
    plan = layer._bigbird_block_rand_mask_with_head
    layer._bigbird_block_rand_mask_with_head = lambda **arguments: drawn.append(plan(**arguments)) or drawn[-1]
    with torch.no_grad():
        forward()
    layer._bigbird_block_rand_mask_with_head = plan
    n = w.N // block
    seen = torch.eye(n, dtype=torch.bool)
    seen[1:-1] |= seen[:-2] | seen[2:]
    seen[[0, -1]] = seen[:, [0, -1]] = True
    mask = seen.repeat(w.H, 1, 1)
    for h, picks in enumerate(drawn[0]):
        for row, columns_picked in enumerate(picks.tolist()):
            mask[h, row + 1, columns_picked] = True
    return Prepared(forward, x, lcattn.Blocks(mask[None], block), None, w.D**-0.5, tokens_first=True)


def _longt5(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    from transformers.models.longt5.modeling_longt5 import (
        LongT5Config,
        LongT5LocalAttention,
        _get_local_attention_mask,
    )

    x = _model_leaves(inputs, grad)
    radius = w.chunk * 3 // 4 - 1
    config = LongT5Config(
        d_model=w.H * w.D, d_kv=w.D, num_heads=w.H, local_radius=radius, dropout_rate=0.0, is_decoder=False
    )
    layer = LongT5LocalAttention(config, has_relative_attention_bias=True).to(w.dtype)
    layer.q, layer.k, layer.v = (_Given(lambda n=n: x[n]) for n in ("q", "k", "v"))
    layer.o = nn.Identity()
    weight = layer.relative_attention_bias.weight
    with torch.no_grad():
        weight.copy_(inputs.table[:, : weight.shape[0]].T)
    weight.requires_grad_(grad)
    x["table"] = weight
    hidden = torch.empty(1, w.N, w.H * w.D, dtype=w.dtype)
    mask = _get_local_attention_mask(torch.ones(1, w.N), radius + 1, torch.device("cpu"))

    with torch.no_grad():
        kept = None if grad else layer(hidden, mask)[1]

    def forward() -> Tensor:
        return layer(hidden, mask, position_bias=kept)[0]

    position = functools.partial(lcattn.T5Bias, bidirectional=True, max_distance=128)
    return Prepared(forward, x, lcattn.Window(radius, radius), position, 1.0, tokens_first=True)


def _whole_chunks(w: Workload) -> str | None:
    return f"{w.N} tokens are no multiple of {w.chunk}" if w.N % w.chunk else None


def _longformer_reason(w: Workload) -> str | None:
    if w.N % (2 * w.chunk):
        return f"{w.N} tokens are no multiple of its window of {2 * w.chunk}"
    return None if w.dtype == torch.float32 else "its layer is timed in float32 only"


def _flex_reason(w: Workload) -> str | None:
    return "create_block_mask looks at every pair: 10 GB and 20 s at 32,768 tokens" if w.N > 16384 else None


def _bigbird_reason(w: Workload) -> str | None:
    if w.N in (1024, 3072, 4096):
        return "lengths 1024, 3072 and 4096 follow another random plan"
    return _whole_chunks(w)


_NO_FLEX_BACKWARD = "flex_attention has no backward on CPU: it raises where a gradient is required"

PROVIDERS = {
    p.name: p
    for p in (
        Provider("lcattn", "lcattn", "the work asked for, gradient of the bias included", _lcattn),
        Provider("lcattn-plain", "lcattn, no position", "the same pattern without a bias", _lcattn_plain),
        Provider(
            "lcattn-shaw",
            "lcattn, relative keys",
            "the same pattern, a learned key by offset and head (Shaw) instead of a bias, its gradient included",
            _lcattn_shaw,
        ),
        Provider(
            "sdpa-folded",
            "SDPA, folded chunks, learned bias",
            "the same work; a mask that takes a gradient sends SDPA to its unfused path",
            functools.partial(_folded, learn_bias=True),
            reject=_whole_chunks,
        ),
        Provider(
            "sdpa-folded-fixed",
            "SDPA, folded chunks, fixed bias",
            "no gradient of the bias: less work, fused both ways",
            functools.partial(_folded, learn_bias=False),
            fixed_bias=True,
            reject=_whole_chunks,
        ),
        Provider(
            "sdpa-padded",
            "SDPA, padded chunks, learned bias",
            "the same work as it is usually written: keys padded by a chunk, a mask a chunk, made in every call",
            _padded,
            reject=_whole_chunks,
        ),
        Provider(
            "sdpa-causal",
            "SDPA, dense causal",
            "sees every earlier key, no bias; only the workload's visible scores count as useful",
            _dense,
        ),
        Provider(
            "flex-bias",
            "flex_attention, learned bias",
            "compiled; block mask made beforehand; forward only",
            functools.partial(_flex, bias=True),
            backward=_NO_FLEX_BACKWARD,
            reject=_flex_reason,
        ),
        Provider(
            "flex",
            "flex_attention, no bias",
            "compiled; block mask made beforehand; forward only",
            functools.partial(_flex, bias=False),
            backward=_NO_FLEX_BACKWARD,
            reject=_flex_reason,
        ),
        Provider(
            "local-attention",
            "local-attention, bias",
            "the same work",
            _local_attention,
            needs="local_attention",
            reject=_whole_chunks,
        ),
        Provider(
            "longformer",
            "Longformer layer",
            "two-sided window of a chunk each side, no bias; projections left out",
            _longformer,
            needs="transformers",
            reject=_longformer_reason,
        ),
        Provider(
            "bigbird",
            "BigBird layer",
            "3 + 2 + 1 blocks of a quarter chunk, no bias; projections left out",
            _bigbird,
            needs="transformers",
            reject=_bigbird_reason,
        ),
        Provider(
            "longt5",
            "LongT5 local layer",
            "two-sided window of 3/4 chunk each side, T5's bias; projections left out",
            _longt5,
            needs="transformers",
        ),
    )
}


def reference_answer(
    prepared: Prepared, inputs: Inputs, dtype: torch.dtype, differentiate: Callable[..., Gradients]
) -> dict[str, Tensor]:
    """What a provider should give, by lcattn's dense reference in `dtype`: out, and gradients of leaves."""
    q, k, v, dout = (getattr(inputs, n).to(dtype) for n in ("q", "k", "v", "dout"))
    table = prepared.leaves.get("table", inputs.table).detach().to(dtype).requires_grad_()
    position = prepared.position and prepared.position(table)
    asked = (prepared.answers, position, prepared.scale)
    problem = make_problem(q, k, v, *asked, None, None, None, None, None, 0.0)
    with torch.no_grad():
        found = {"out": reference.attention(problem)[0]}
    grads = differentiate(problem, dout, None)
    found |= {"dq": grads.q[0], "dk": grads.k[0], "dv": grads.v[0]}
    if grads.qr is not None:
        # relative keys meet the queries themselves
        found["dq"] = found["dq"] + grads.qr
    for term, grad in ((problem.bias, grads.bias), (problem.rel_key, grads.rel_key)):
        if term is not None:
            (found["dtable"],) = torch.autograd.grad(term, table, grad)
    return found


def own_answer(prepared: Prepared, w: Workload, inputs: Inputs, grad: bool) -> dict[str, Tensor]:
    """What a provider gives: out, with `grad` also gradients of its leaves, in the reference's dimensions."""
    if not grad:
        with torch.no_grad():
            return {"out": prepared.heads_first(prepared.forward(), w.H)}
    out = prepared.forward()
    out.backward(prepared.own(inputs.dout))
    found = {"out": prepared.heads_first(out.detach(), w.H)}
    for name, leaf in prepared.leaves.items():
        if leaf.grad is not None:
            found[f"d{name}"] = leaf.grad if name == "table" else prepared.heads_first(leaf.grad, w.H)
    return found


@dataclass(frozen=True)
class Verdict:
    """Whether a provider may be timed, and what there is to say about its answer."""

    ok: bool
    remark: str = ""


def gate(provider: Provider, w: Workload, measure: str, seed: int) -> Verdict:
    """Holds a provider's answer to the small form of a workload against the float64 reference.

    lcattn must keep the error budget. A peer that exceeds it is less accurate, which is remarked; one that
    does not agree to half the digits of the dtype answers another question, and is not timed.
    """
    small = w.small()
    if provider.supports(small, measure):
        small = dataclasses.replace(small, N=4 * w.chunk)
    if reason := provider.supports(small, measure):
        return Verdict(False, f"its answer cannot be checked: {reason}")
    inputs = small.draw(seed)
    grad = measure == "forward+backward"
    prepared = provider.prepare(small, inputs, grad)
    got = own_answer(prepared, small, inputs, grad)
    learned = ("dtable",) if prepared.position and not provider.fixed_bias else ()
    asked = {"out", *(("dq", "dk", "dv", *learned) if grad else ())}
    if got.keys() != asked:
        return Verdict(False, f"wrong answer: expected {', '.join(sorted(asked))}, got {', '.join(sorted(got))}")
    truth = reference_answer(prepared, inputs, torch.float64, reference.gradients)
    eager = reference_answer(prepared, inputs, w.dtype, reference.recomputed_gradients)
    over, wrong = [], []
    for name, answer in got.items():
        found = tolerance.compare(name, answer, truth[name], eager[name].to(w.dtype))
        if not found.ok:
            error = (answer.double() - truth[name]).norm() / truth[name].norm()
            over.append(str(found))
            if provider.name.startswith("lcattn") or not error <= torch.finfo(w.dtype).eps ** 0.5:
                wrong.append(str(found))
    if wrong:
        return Verdict(False, "wrong answer: " + "; ".join(wrong))
    return Verdict(True, "over the error budget: " + "; ".join(over) if over else "")
