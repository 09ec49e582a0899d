"""Blocks chosen by content: the choice, what follows from it, and that nothing leaks or changes in decoding."""

import copy
import dataclasses
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as tf

import lcattn
from lcattn import cases, dispatch, hf, ops, tolerance
from lcattn.api import make_problem
from lcattn.cases import Draw, Shape
from lcattn.layout import Layout, Not, SelectedBlocks, TopKBlocks, from_spec
from lcattn.lowering_selected import call_table
from tests.test_layout import dense, leaves, pairs


def tensors(draw: Draw, s: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    std = cases.SCORE_STD**0.5
    q = draw.normal(s.B, s.H, s.T, s.D, dtype=dtype, std=std)
    k = draw.normal(s.B, s.G, s.S, s.D, dtype=dtype, std=std)
    return q, k, draw.normal(s.B, s.G, s.S, s.D, dtype=dtype)


def problem(q: Tensor, k: Tensor, v: Tensor, layout: Layout, **given):
    names = ("position", "scale", "softcap", "sink", "key_mask", "q_pos", "k_pos", "dropout")
    values = [given.pop(name, 0.0 if name == "dropout" else None) for name in names]
    assert not given
    return make_problem(q, k, v, layout, *values)


def prefill(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dtype: torch.dtype, **given) -> Tensor:
    """All at once, densely."""
    return lcattn.attention(*(t.to(dtype) for t in (q, k, v)), layout=layout, backend="reference", **given)


def listed(selected: SelectedBlocks, b: int, lists: int, query_block: int) -> list[int]:
    """The blocks that a block of queries sees, in order."""
    blocks = selected.blocks[b if len(selected.blocks) > 1 else 0]
    row = query_block - int(selected.first[b if len(selected.first) > 1 else 0])
    return sorted(x for x in blocks[lists if len(blocks) > 1 else 0, row].tolist() if x >= 0)


def choose(keys: dict[int, Tensor], block: int, k: int, query_block: int) -> list[int]:
    """The choice for one block of queries by the definition, from the visible keys by coordinate."""

    def mean(at: int) -> Tensor:
        zero = torch.zeros_like(next(iter(keys.values())), dtype=torch.float64)
        return sum((keys[x].double() for x in range(at * block, (at + 1) * block) if x in keys), zero) / block

    scores = {}
    for at in range(query_block - 1):
        if any(x in keys for x in range(at * block, (at + 1) * block)):
            scores[at] = float(mean(query_block - 1) @ mean(at))
    return sorted(sorted(scores, key=lambda at: (-scores[at], at))[:k])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["square", "end", "run", "padded"])
@pytest.mark.parametrize(("block", "k"), [(8, 3), (13, 2), (64, 1), (5, 1000)])
def test_selection_is_the_plain_loop(kind, block, k, masked, seed):
    draw = Draw(seed)
    T, S = {"square": (150, 150), "end": (41, 150), "run": (30, 150), "padded": (100, 150)}[kind]
    s = Shape(2, 4, 2, T, S, 8)
    q, keys, _ = tensors(draw, s)
    starts = torch.tensor([[S - T], [S - T]])
    pads = torch.zeros(2, 1, dtype=torch.long)
    if kind == "run":
        starts = torch.tensor([[77], [77]])
    if kind == "padded":
        pads = torch.tensor([[0], [29]])
    mask = draw.uniform(2, S) < 0.8 if masked else None
    if mask is not None:
        mask[0, : 2 * block] = False
    q_pos = starts + torch.arange(T) - pads
    k_pos = torch.arange(S) - pads
    given = {
        "square": {},
        "end": {},
        "run": {"q_pos": q_pos[:1]},
        "padded": {"q_pos": q_pos, "k_pos": k_pos},
    }[kind]
    selected = TopKBlocks(k, block).select(q, keys, key_mask=mask, **given)
    selected.check(2, 4, T, S)
    assert selected.blocks.dtype == torch.int32
    for b in range(2):
        for g in range(2):
            held = {
                x: keys[b, g, j] for j, x in enumerate(k_pos[b].tolist()) if x >= 0 and (mask is None or mask[b, j])
            }
            for row in {x // block for x in q_pos[b].tolist() if x >= 0}:
                assert listed(selected, b, g, row) == choose(held, block, k, row), (b, g, row)


def test_first_blocks_have_no_past(seed):
    q, k, _ = tensors(Draw(seed), Shape(1, 2, 1, 70, 70, 8))
    selected = TopKBlocks(4, 32).select(q, k)
    assert [listed(selected, 0, 0, row) for row in range(3)] == [[], [], [0]]
    assert int((TopKBlocks(4, 32).select(q[:, :, :60], k[:, :, :60]).blocks >= 0).sum()) == 0
    out = lcattn.attention(q, k, k, layout=TopKBlocks(4, 32) & lcattn.Causal())
    assert torch.equal(out[:, :, :64], torch.zeros(1, 2, 64, 8)) and bool((out[:, :, 64:] != 0).any(3).all())


def test_equal_scores_take_the_earlier_block_whatever_the_length(seed):
    q, k, _ = tensors(Draw(seed), Shape(1, 2, 1, 16, 16, 8))
    k = k.repeat(1, 1, 20, 1)
    for S in (160, 161, 300, 320):
        for T in (1, S):
            selected = TopKBlocks(3, 16).select(q[:, :, :1].expand(1, 2, T, 8), k[:, :, :S])
            assert listed(selected, 0, 0, (S - 1) // 16) == [0, 1, 2]


@pytest.mark.parametrize("per", ["kv", "head"])
def test_a_scorer_of_ones_own(per, seed):
    B, H, G, T, block = 2, 4, 2, 100, 16
    q, k, v = tensors(Draw(seed), Shape(B, H, G, T, T, 8))

    def by_first_query(q: Tensor, k: Tensor, block: int) -> Tensor:
        means = k.unflatten(2, (-1, block)).mean(3).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return q @ means.mT

    top = TopKBlocks(2, block, by_first_query, per)
    selected = top.select(q, k)
    assert selected.blocks.shape == (B, H if per == "head" else G, 7, 2) and selected.group == (
        1 if per == "head" else 2
    )
    for b in range(B):
        for h in range(H):
            for row in range(1, 7):
                heads = [h] if per == "head" else [h // 2 * 2, h // 2 * 2 + 1]
                means = k[b, h // 2].double()[: 6 * block].unflatten(0, (-1, block)).mean(1)[:row]
                score = sum(q[b, x, row * block].double() @ means.mT for x in heads)
                want = sorted(score.topk(min(2, row)).indices.tolist())
                assert listed(selected, b, h // selected.group, row) == want
    again = from_spec(top.spec)
    assert again == top and again.scorer is by_first_query
    # a query at a block's start decodes; inside a block its first query is gone, and that is said
    layout = (lcattn.Window(9, 0) | top) & lcattn.Causal()
    truth, eager = (prefill(q, k, v, layout, dtype)[:, :, 96:97] for dtype in (torch.float64, torch.float32))
    step = lcattn.attention(q[:, :, 96:97], k[:, :, :97], v[:, :, :97], layout=layout)
    tolerance.check({"out": step}, {"out": truth}, lambda: {"out": eager})
    with pytest.raises(ValueError, match=r"scorer gave NaN; .* read keys alone"):
        lcattn.attention(q[:, :, 98:99], k[:, :, :99], v[:, :, :99], layout=layout)


def test_a_scorer_may_leave_blocks_out(seed):
    q, k, _ = tensors(Draw(seed), Shape(1, 1, 1, 100, 100, 8))

    def never_the_second(q: Tensor, k: Tensor, block: int) -> Tensor:
        scores = torch.zeros(1, 1, q.shape[2], k.shape[2] // block)
        scores[..., 1] = -torch.inf
        return scores

    selected = TopKBlocks(9, 16, never_the_second).select(q, k)
    assert listed(selected, 0, 0, 6) == [0, 2, 3, 4, 5]


def _document_ids(s: Shape) -> Tensor:
    return (torch.arange(s.S) + 31 * torch.arange(s.B)[:, None]) // 150


SQUARE, END = Shape(2, 4, 2, 333, 333, 16), Shape(2, 4, 2, 71, 390, 16)
JOINS = {
    "alone": lambda top, s: top & lcattn.Causal(),
    "chunked": lambda top, s: (lcattn.Chunked(40) | top) & lcattn.Causal(),
    "window": lambda top, s: (lcattn.Window(30, 0) | top) & lcattn.Causal(),
    "global": lambda top, s: (lcattn.Window(9, 9) | lcattn.Global(3) | top) & lcattn.Causal(),
    "bridge": lambda top, s: (lcattn.Chunked(32, 0) | lcattn.Bridge(32) | top) & lcattn.Causal(),
    "dilated": lambda top, s: lcattn.Dilated(3, 2, 7) | top,
    "random": lambda top, s: (lcattn.Random(32, 1) | lcattn.Window(5, 0) | top) & lcattn.Causal(),
    "full": lambda top, s: lcattn.Full() | top,
    "narrowed": lambda top, s: (top & lcattn.Window(150, None)) | lcattn.Window(4, 0),
    "documents": lambda top, s: (lcattn.Chunked(40) | top) & lcattn.Documents(_document_ids(s)) & lcattn.Causal(),
    "blocks": lambda top, s: (
        top | lcattn.Blocks(torch.eye(-(-s.T // 16), -(-s.S // 16), dtype=torch.bool)[None, None], 16)
    ),
    "mask_mod": lambda top, s: (
        (lcattn.Window(20, 0) | top) & lcattn.FromMaskMod(lambda b, h, q_idx, kv_idx: (q_idx + kv_idx + h) % 5 != 1)
    ),
    "per_head": lambda top, s: lcattn.PerHead([lcattn.Window(9, 0) | top, *[lcattn.Causal()] * (s.H - 1)]),
    "per_head_all": lambda top, s: lcattn.PerHead([lcattn.Window(9 * h, 0) | top for h in range(s.H)]),
    "two": lambda top, s: (lcattn.Window(20, 0) | top | TopKBlocks(1, 16)) & lcattn.Causal(),
    "not": lambda top, s: Not(top) & lcattn.Causal(),
}


@pytest.mark.parametrize(("block", "s"), [(64, SQUARE), (64, END), (24, SQUARE)], ids=["square", "end", "small"])
@pytest.mark.parametrize("join", JOINS)
def test_joined_with_each_layout_within_the_budget(join, block, s, seed):
    draw = Draw(seed)
    q, k, v = tensors(draw, s)
    layout = JOINS[join](TopKBlocks(2, block), s)
    p = problem(q, k, v, layout)
    assert layout.by_content and not p.layout.by_content
    found = tolerance.verify(p, "cpu", draw.normal(*q.shape), draw.normal(*q.shape[:3]))
    assert all(c.ok for c in found), [str(c) for c in found if not c.ok]


@pytest.mark.parametrize("kind", ["bfloat16", "bias", "phases", "padded", "run", "key_mask"])
def test_every_kind_of_call_within_the_budget(kind, seed):
    draw = Draw(seed)
    s = Shape(2, 4, 2, 150, 150, 16)
    q, k, v = tensors(draw, s, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    layout = (lcattn.Chunked(40) | TopKBlocks(1)) & lcattn.Causal()
    pads = torch.tensor([[0], [21]])
    given = {
        "bfloat16": {},
        "bias": {"position": lcattn.RelativeBias(draw.normal(s.H, 90, std=2), -80)},
        "phases": {"position": cases.POSITIONS["phases"](draw, s, q, k, v)},
        "padded": {
            "q_pos": torch.arange(150) - pads,
            "k_pos": torch.arange(150) - pads,
            "key_mask": torch.arange(150) >= pads,
        },
        "run": {"q_pos": torch.arange(67, 87), "position": lcattn.Alibi(draw.uniform(s.H))},
        "key_mask": {"key_mask": draw.uniform(2, 150) < 0.7},
    }[kind]
    if kind == "run":
        q = q[:, :, :20]
    p = problem(q, k, v, layout, **given)
    found = tolerance.verify(p, "cpu", draw.normal(*q.shape, dtype=q.dtype), draw.normal(*q.shape[:3]))
    assert all(c.ok for c in found), [str(c) for c in found if not c.ok]


@st.composite
def selections(draw):
    """An expression with a selection in it, and sizes."""
    heads, batch = draw(st.sampled_from((1, 2, 4))), draw(st.integers(1, 2))
    S = draw(st.integers(1, 400))
    T = draw(st.integers(1, S))
    block = draw(st.sampled_from((64, 64, 128, 32)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lists, groups = (draw(st.sampled_from(sorted({1, heads, max(heads // 2, 1)}))) for _ in range(2))
    shape = (draw(st.sampled_from((1, batch))), lists, draw(st.integers(1, 8)), draw(st.integers(0, 4)))
    blocks = torch.randint(-1, S // block + 2, shape, generator=generator)
    first = torch.randint(-1, 3, (draw(st.sampled_from((1, batch))),), generator=generator)
    layout: Layout = SelectedBlocks(blocks, first, block, heads // lists)
    for _ in range(draw(st.integers(0, 3))):
        other = draw(leaves(T, S, heads, batch))
        layout = layout & other if draw(st.booleans()) else other | layout
    return layout, T, S, heads, groups, batch


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(selections(), st.booleans())
def test_table_is_visible(drawn, in_phases):
    layout, T, S, heads, groups, batch = drawn
    near = lcattn.Window(50, 5)
    phases = (near, Not(near)) if in_phases else ()
    table, row, _ = call_table(layout, phases, batch, heads, groups, T, S, None, None)
    assert table.seg_ptr.shape[1] in (1, groups, heads)
    for phase, part in enumerate(phases or (lcattn.Full(),)):
        want = dense(layout & part, T, S, heads, batch)
        got = table.to_dense(row + T, S, phase)[:, :, row:]
        got = got.repeat_interleave(heads // got.shape[1], 1)
        assert torch.equal(got.expand_as(want), want)
    assert pairs(table.seg_ptr, table.entries, False) == pairs(table.seg_ptr_t, table.entries_t, True)
    forward, _, _ = call_table(layout, phases, batch, heads, groups, T, S, None, None, transposed=False)
    for name in ("seg_ptr", "entries", "mask_tiles"):
        assert torch.equal(getattr(forward, name), getattr(table, name))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("block", [32, 64])
def test_lists_need_not_be_those_of_the_kv_heads(block, groups, seed):
    blocks = Draw(seed).integers(-1, 4, 1, 2, 9, 2)
    layout = (lcattn.Window(9, 0) | SelectedBlocks(blocks, torch.tensor([0]), block, 2)) & lcattn.Causal()
    table, _, _ = call_table(layout, (), 1, 4, groups, 250, 250, None, None)
    got = table.to_dense(250, 250)
    assert got.shape[1] in (groups, 4)
    assert torch.equal(got.repeat_interleave(4 // got.shape[1], 1), dense(layout, 250, 250, 4, 1))


@pytest.mark.parametrize("in_phases", [False, True])
@pytest.mark.parametrize(
    ("T", "narrower"),
    [(333, lcattn.Documents(torch.arange(333)[None] // 200)), (333, lcattn.Causal()), (1, lcattn.Causal())],
    ids=["documents", "prefill", "decode"],
)
def test_the_table_is_built_on_the_device_in_sizes_known_beforehand(T, narrower, in_phases):
    near = lcattn.Window(50, 5)
    phases = (near, Not(near)) if in_phases else ()

    def table(device: str, seed: int):
        draw = Draw(seed)
        q, k, _ = (t.to(device) for t in tensors(draw, Shape(2, 4, 2, T, 333, 16)))
        layout = (lcattn.Chunked(40) | TopKBlocks(2).select(q, k)) & narrower
        return call_table(layout, phases, 2, 4, 2, T, 333, None, None)[0]

    # a meta tensor has no values, so whoever asks for one fails
    there, (here, again) = table("meta", 0), (table("cpu", seed) for seed in (1, 2))
    assert not torch.equal(here.entries, again.entries)
    for name in ("seg_ptr", "entries", "seg_ptr_t", "entries_t", "mask_tiles"):
        assert getattr(there, name).device.type == "meta"
        assert getattr(there, name).shape == getattr(here, name).shape == getattr(again, name).shape


def test_a_function_joined_by_and_is_asked_of_what_is_seen_alone(seed):
    asked = 0

    def odd(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        nonlocal asked
        asked += torch.broadcast_tensors(q_idx, kv_idx)[0].numel()
        return (q_idx + kv_idx) % 2 == 1

    q, k, v = tensors(Draw(seed), Shape(1, 1, 1, 4096, 4096, 8))
    layout = (lcattn.Chunked(64) | TopKBlocks(1)) & lcattn.FromMaskMod(odd)
    lcattn.attention(q, k, v, layout=layout)
    # two chunks and a block for each of 64 blocks of queries, and the few pairs that tracing asks for
    assert asked <= 64 * 3 * 64**2 + 8


def test_a_table_names_no_pair_twice(seed):
    q, k, _ = tensors(Draw(seed), Shape(1, 2, 2, 700, 700, 8))
    layout = (lcattn.Chunked(100) | TopKBlocks(3).select(q, k)) & lcattn.Causal()
    table, _, _ = call_table(layout, (), 1, 2, 2, 700, 700, None, None)
    found = [pair[:4] for pair in pairs(table.seg_ptr, table.entries, False)]
    assert len(found) == len(set(found))


def test_tables_of_a_selection_are_not_kept(seed):
    from lcattn import lowering

    q, k, v = tensors(Draw(seed), Shape(1, 2, 2, 300, 300, 8))
    layout = (lcattn.Chunked(77) | TopKBlocks(2)) & lcattn.Causal()
    lcattn.attention(q, k, v, layout=layout)
    before = list(lowering.cache.tables)
    for _ in range(3):
        k = k.roll(40, 2)
        lcattn.attention(q, k, v, layout=layout)
    assert list(lowering.cache.tables) == before


@pytest.mark.parametrize("block", [64, 16, 10])
def test_nothing_leaks_from_the_future(block, seed):
    draw = Draw(seed)
    q, k, v = tensors(draw, Shape(1, 4, 2, 220, 220, 16))
    layout = (lcattn.Chunked(30) | TopKBlocks(1, block)) & lcattn.Causal()
    want = lcattn.attention(q, k, v, layout=layout)
    changes = 0
    for j in (1, 60, 63, 64, 100, 128, 160, 219):
        changed_q, changed_k, changed_v = q.clone(), k.clone(), v.clone()
        changed_q[:, :, j:] = draw.normal(*q[:, :, j:].shape, std=9)
        changed_k[:, :, j:] = draw.normal(*k[:, :, j:].shape, std=9)
        changed_v[:, :, j:] = 1e30
        got = lcattn.attention(changed_q, changed_k, changed_v, layout=layout)
        assert torch.equal(got[:, :, :j], want[:, :, :j])
        before, after = (TopKBlocks(1, block).select(q, x).blocks for x in (k, changed_k))
        changes += int((before != after).any())
    # the changes do reach later choices
    assert changes >= 3


@pytest.mark.parametrize("block", [64, 16])
def test_decoding_token_by_token_equals_prefill(block, seed):
    draw = Draw(seed)
    q, k, v = tensors(draw, Shape(2, 4, 2, 300, 300, 16))
    top = TopKBlocks(1, block)
    layout = (lcattn.Chunked(20) | top) & lcattn.Causal()
    position = lcattn.RelativeBias(draw.normal(4, 64), -63)
    whole = top.select(q, k)
    pads = torch.tensor([[0], [11]])
    seen = torch.arange(300) >= pads
    padded = {"q_pos": torch.arange(300) - pads, "k_pos": torch.arange(300) - pads, "key_mask": seen}

    def whole_call(dtype: torch.dtype, **given) -> Tensor:
        p = dataclasses.replace(position, table=position.table.to(dtype))
        return prefill(q, k, v, layout, dtype, position=p, **given)

    steps = (0, 1, 63, 64, 127, 128, 129, 200, 299)
    got: dict[str, list[Tensor]] = {"grown": [], "fixed": [], "padded": []}
    for t in steps:
        step, grown = q[:, :, t : t + 1], (k[:, :, : t + 1], v[:, :, : t + 1])
        for b in range(2):
            for g in range(2):
                now = top.select(step, grown[0])
                assert listed(now, b, g, t // block) == listed(whole, b, g, t // block)
        call = {"layout": layout, "position": position}
        got["grown"].append(lcattn.attention(step, *grown, **call))
        got["fixed"].append(lcattn.attention(step, k, v, q_pos=torch.tensor([t]), **call))
        now = {"q_pos": padded["q_pos"][:, t : t + 1], "k_pos": padded["k_pos"][:, : t + 1]}
        got["padded"].append(lcattn.attention(step, *grown, **call, **now, key_mask=seen[:, : t + 1]))
    for name, parts in got.items():
        given = padded if name == "padded" else {}
        truth, eager = (whole_call(dtype, **given)[:, :, list(steps)] for dtype in (torch.float64, torch.float32))
        tolerance.check({name: torch.cat(parts, 2)}, {name: truth}, lambda name=name, eager=eager: {name: eager})
    # far blocks do matter
    near = lcattn.attention(q, k, v, layout=lcattn.Chunked(20) & lcattn.Causal(), position=position)
    assert float((near - whole_call(torch.float32))[:, :, 140:].abs().max()) > 0.1


def test_long_decoding_with_more_than_one_row_of_blocks(seed):
    draw = Draw(seed)
    q, k, v = tensors(draw, Shape(1, 2, 1, 700, 700, 16))
    layout = (lcattn.Chunked(100) | TopKBlocks(2)) & lcattn.Causal()
    slopes = torch.tensor([0.01, 0.02])
    truth, eager = (
        prefill(q, k, v, layout, dtype, position=lcattn.Alibi(slopes.to(dtype)))
        for dtype in (torch.float64, torch.float32)
    )
    for start, stop in ((0, 130), (130, 131), (131, 400), (500, 700)):
        part = lcattn.attention(
            q[:, :, start:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            layout=layout,
            position=lcattn.Alibi(slopes),
        )
        rows = slice(start, stop)
        tolerance.check({"out": part}, {"out": truth[:, :, rows]}, lambda rows=rows: {"out": eager[:, :, rows]})


@pytest.mark.parametrize("given", [False, True])
def test_compiles_whole_with_gradients(given, seed):
    q, k, v = tensors(Draw(seed), Shape(2, 4, 2, 200, 200, 16))
    layout = (lcattn.Chunked(40) | TopKBlocks(2, 32)) & lcattn.Causal()
    pos = {"q_pos": torch.arange(200), "k_pos": torch.arange(200)} if given else {}

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lcattn.attention(q, k, v, layout=layout, **pos)

    def run(f) -> dict[str, Tensor]:
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out = f(*inputs)
        grads = torch.autograd.grad((out * torch.sin(torch.arange(16.0))).sum(), inputs)
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    torch._dynamo.reset()
    got = run(torch.compile(f, fullgraph=True, backend="aot_eager"))
    want = run(f)
    assert all(torch.equal(got[name], want[name]) for name in want)
    p = problem(q.requires_grad_(), k, v, layout, **pos)
    torch.library.opcheck(
        torch.ops.lcattn.attention.default, ops.arguments(p, "cpu"), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights, seed, monkeypatch):
    layout = (lcattn.Chunked(20) | TopKBlocks(1, 16)) & lcattn.Causal()
    module = lcattn.modules.MultiheadAttention(64, 4, batch_first=True, layout=layout)
    with torch.no_grad():
        module.in_proj_weight[:128] *= 3
    x = torch.randn(2, 101, 64)

    def run(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        monkeypatch.setattr(dispatch, "preferred", backend)
        m = copy.deepcopy(module).to(dtype)
        out, weights = m(*[x.to(dtype)] * 3, need_weights=need_weights)
        out.square().sum().backward()
        found = {"out": out} | {f"d {n}": p.grad for n, p in m.named_parameters()}
        return found | ({} if weights is None else {"weights": weights})

    tolerance.check(
        run(torch.float32, "auto"), run(torch.float64, "reference"), lambda: run(torch.float32, "reference")
    )
    far = lcattn.modules.MultiheadAttention(64, 4, batch_first=True, layout=lcattn.Chunked(20) & lcattn.Causal())
    far.load_state_dict(module.state_dict())
    assert float((far(x, x, x)[0] - module(x, x, x)[0]).detach().abs().max()) > 0.05


def llama() -> tf.LlamaForCausalLM:
    config = tf.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # scores of a standard deviation of 3 and more
            if "q_proj" in name or "k_proj" in name:
                parameter *= 10
    return model


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_equals_prefill(cache, padding, seed, monkeypatch):
    layout = lcattn.Chunked(12) | TopKBlocks(1, 8)
    model = llama()
    ids = torch.randint(3, 97, (2, 45))
    seen = torch.ones_like(ids)
    if padding:
        seen[1, :13] = 0
    converted = hf.use(copy.deepcopy(model), layout)
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False, cache_implementation=cache)
    options |= dict(return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    made = converted.generate(ids, attention_mask=seen, **options)
    whole = torch.cat([seen, torch.ones(2, 20, dtype=torch.long)], 1)

    def prefill(model: tf.LlamaForCausalLM, dtype: torch.dtype, layout: Layout = layout) -> dict[str, Tensor]:
        monkeypatch.setattr(dispatch, "preferred", "reference")
        m = hf.use(copy.deepcopy(model).to(dtype), layout)
        with torch.no_grad():
            logits = m(made.sequences, attention_mask=whole, use_cache=False).logits
        return {"logits": logits[:, 44:-1]}

    got = {"logits": torch.stack(made.logits, 1)}
    truth = prefill(model, torch.float64)
    tolerance.check(got, truth, lambda: prefill(model, torch.float32))
    near = prefill(model, torch.float64, lcattn.Chunked(12))["logits"]
    assert float((near - truth["logits"]).abs().max()) > 0.05
    if padding:
        # the row alone, without its padding, gives the same
        def alone(dtype: torch.dtype) -> dict[str, Tensor]:
            m = hf.use(copy.deepcopy(model).to(dtype), layout)
            with torch.no_grad():
                return {"logits": m(made.sequences[1:, 13:], use_cache=False).logits[:, 31:-1]}

        tolerance.check({"logits": got["logits"][1:]}, alone(torch.float64), lambda: alone(torch.float32))


def test_hugging_face_packing_is_refused(seed):
    model = hf.use(llama(), lcattn.Chunked(12) | TopKBlocks(1, 8))
    positions = torch.cat([torch.arange(30), torch.arange(20)])[None]
    with pytest.raises(ValueError, match=r"TopKBlocks: .*_pos must step by one"):
        model(torch.randint(3, 97, (1, 50)), position_ids=positions, use_cache=False)


def call(top: TopKBlocks, T: int = 40, S: int = 40, **given) -> Tensor:
    q, k, v = tensors(Draw(0), Shape(2, 4, 2, T, S, 8))
    return lcattn.attention(q, k, v, layout=(lcattn.Window(5, 0) | top) & lcattn.Causal(), **given)


def scorer(result):
    return TopKBlocks(1, 16, lambda q, k, block: result)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TopKBlocks(0), ["k must", ">= 1", "0"]),
        (lambda: TopKBlocks(2, block=0), ["block", ">= 1", "0"]),
        (lambda: TopKBlocks(2, scorer="mean"), ["scorer", "callable", "'mean'"]),
        (lambda: TopKBlocks(2, per="query"), ["per", '"kv" or "head"', "'query'"]),
        (lambda: call(TopKBlocks(1, 16), T=40, S=30), ["40 queries", "30 keys", "q_pos"]),
        (lambda: call(TopKBlocks(1, 16), k_pos=torch.arange(40) * 2), ["k_pos", "step by one"]),
        (lambda: call(TopKBlocks(1, 16), q_pos=torch.arange(40) % 7), ["q_pos", "step by one"]),
        (lambda: call(scorer(torch.zeros(2, 2, 3, 3))), ["scorer", "[2, 2 or 4, 3, 2]", "[2, 2, 3, 3]"]),
        (lambda: call(scorer(torch.zeros(2, 2, 3, 2).long())), ["scorer", "floats", "int64"]),
        (lambda: call(scorer(1.0)), ["scorer", "float"]),
        (lambda: call(scorer(torch.full((2, 2, 3, 2), torch.nan))), ["scorer gave NaN"]),
        (lambda: lcattn.TopKBlocks(1).block_table(99, 99), ["TopKBlocks", "depends on q and k"]),
        (
            lambda: SelectedBlocks(torch.zeros(1, 3, 1, 1, dtype=torch.int), torch.zeros(1).int()).check(1, 4, 9, 9),
            ["SelectedBlocks", "4 / group", "[1, 3, 1, 1]"],
        ),
    ],
)
def test_bad_input_names_what_is_wrong(make, words):
    with pytest.raises(ValueError) as raised:
        make()
    for word in words:
        assert word in str(raised.value), str(raised.value)


@pytest.mark.parametrize("of", ["queries", "keys"])
@pytest.mark.parametrize("per", ["kv", "head"])
def test_a_scorer_that_looks_ahead_is_refused(of, per, seed):
    def centred(q: Tensor, k: Tensor, block: int) -> Tensor:
        means = k.unflatten(2, (-1, block)).mean(3)
        if of == "keys":
            means = means - means.mean(2, keepdim=True)
        else:
            q = q - q.mean(2, keepdim=True)
        return q @ means.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)

    q, k, v = tensors(Draw(seed), Shape(2, 4, 2, 300, 300, 16))
    with pytest.raises(ValueError, match="scorer gave a block of queries other scores when later"):
        lcattn.attention(q, k, v, layout=(lcattn.Chunked(64) | TopKBlocks(1, 64, centred, per)) & lcattn.Causal())
