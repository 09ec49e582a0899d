"""Layouts: the lowered table says exactly what `visible` says, at a cost of O(entries)."""

import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import lcattn
from lcattn import layout as layouts
from lcattn import lowering
from lcattn.layout import Context, from_spec
from lcattn.lowering import lower

lengths = st.integers(1, 200)


@st.composite
def leaves(draw, T, S, heads, batch):
    """Any layout but a joined one."""
    small = st.integers(0, 90)
    kind = draw(st.integers(0, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if kind == 0:
        return lcattn.Full()
    if kind == 1:
        return lcattn.Causal()
    if kind == 2:
        side = st.one_of(st.none(), small)
        return lcattn.Window(draw(side), draw(side))
    if kind == 3:
        return lcattn.Chunked(
            draw(st.integers(1, 90)), draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(-9, 70))
        )
    if kind == 4:
        return lcattn.Global(draw(st.integers(1, 90)))
    if kind == 5:
        return lcattn.Global(indices=tuple(draw(st.lists(st.integers(-5, 250), max_size=4))))
    if kind == 6:
        return lcattn.Global(every=draw(st.integers(1, 90)))
    if kind == 7:
        return lcattn.Dilated(draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.integers(1, 9)))
    if kind == 8:
        return lcattn.Random(draw(st.integers(1, 70)), draw(st.integers(1, 3)), draw(st.integers(0, 99)))
    if kind == 9:
        rows = draw(st.sampled_from((1, batch)))
        ids = torch.randint(-1, 4, (rows, S), generator=generator)
        ids = ids.sort(1).values if draw(st.booleans()) else ids
        q_ids = torch.randint(-1, 4, (rows, T), generator=generator)
        return lcattn.Documents(ids, q_ids=q_ids if T > S or draw(st.booleans()) else None)
    if kind == 10:
        block = draw(st.sampled_from((1, 16, 50, 64)))
        shape = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))), -(-T // block), -(-S // block))
        return lcattn.Blocks(torch.rand(shape, generator=generator) < 0.5, block)
    if kind == 11:
        return lcattn.FromMaskMod(lambda b, h, q_idx, kv_idx: (q_idx * 3 + kv_idx + h + b) % 5 < 3)
    if kind == 12:
        return lcattn.Bridge(draw(st.integers(1, 90)))
    if kind == 13:
        block, lists = draw(st.sampled_from((7, 16, 50, 64, 128))), draw(st.sampled_from((1, heads)))
        shape = (draw(st.sampled_from((1, batch))), lists, draw(st.integers(1, 5)), draw(st.integers(1, 4)))
        blocks = torch.randint(-1, S // block + 2, shape, generator=generator)
        first = torch.randint(-2, 3, (draw(st.sampled_from((1, batch))),), generator=generator)
        return lcattn.SelectedBlocks(blocks, first, block, heads // lists)
    return lcattn.PerHead([lcattn.Window(3 * h, h) for h in range(heads)])


@st.composite
def problems(draw):
    T, S, heads, batch = draw(lengths), draw(lengths), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    leaf = leaves(T, S, heads, batch)
    joined = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(layouts.Not, inner),
        ),
        max_leaves=4,
    )
    return draw(joined), T, S, heads, batch


def dense(layout, T, S, heads, batch, q_pos=None, k_pos=None):
    """What `visible` says, [batch, heads, T, S]."""
    q_pos = torch.arange(S - T, S)[None] if q_pos is None else q_pos
    k_pos = torch.arange(S)[None] if k_pos is None else k_pos
    ctx = Context(
        torch.arange(batch)[:, None, None, None],
        torch.arange(heads)[:, None, None],
        T,
        S,
        torch.arange(T)[:, None],
        torch.arange(S),
    )
    return layout.visible(q_pos[:, None, :, None], k_pos[:, None, None, :], ctx).expand(batch, heads, T, S)


def pairs(seg_ptr, entries, transpose):
    """All (b, h, query block, key block, phase, tile or None) of one direction."""
    found = []
    for b, bh in enumerate(seg_ptr.tolist()):
        for h, rows in enumerate(bh):
            for r, seg in enumerate(rows):
                for f in range(len(seg) // 2):
                    for block, count in entries[seg[2 * f] : seg[2 * f + 1]].tolist():
                        found += [(b, h, r, c, f, None) for c in range(block, block + count)]
                    for block, tile in entries[seg[2 * f + 1] : seg[2 * f + 2]].tolist():
                        found.append((b, h, r, block, f, tile))
    return sorted(((b, h, c, r, f, t) if transpose else (b, h, r, c, f, t) for b, h, r, c, f, t in found), key=repr)


def check_table(table, layout, T, S, heads, batch, q_pos=None, k_pos=None):
    want = dense(layout, T, S, heads, batch, q_pos, k_pos)
    assert torch.equal(table.to_dense(T, S).expand_as(want), want)
    assert pairs(table.seg_ptr, table.entries, False) == pairs(table.seg_ptr_t, table.entries_t, True)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from((32, 64, 48)))
def test_table_is_visible(problem, block):
    layout, T, S, heads, batch = problem
    table = lower(layout, T=T, S=S, heads=heads, batch=batch, block_q=block, block_k=64)
    check_table(table, layout, T, S, heads, batch)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.integers(0, 4), st.integers(0, 2**31))
def test_table_is_visible_at_any_coordinates(problem, kind, seed):
    layout, T, S, heads, batch = problem
    g = torch.Generator().manual_seed(seed)
    pad = torch.randint(0, 50, (batch, 1), generator=g)
    q_pos, k_pos = (
        (torch.randint(-30, 250, (1, T), generator=g), torch.randint(-30, 250, (1, S), generator=g)),
        (torch.arange(T)[None] % 37, torch.arange(S)[None] % 37),
        (torch.arange(S - T, S) - pad, torch.arange(S) - pad),
        (torch.arange(7, 7 + T)[None], torch.arange(S)[None]),
        (torch.randint(0, 90, (batch, T), generator=g).sort(1).values, torch.arange(S)[None]),
    )[kind]
    table = lower(layout, T=T, S=S, heads=heads, batch=batch, q_pos=q_pos, k_pos=k_pos)
    check_table(table, layout, T, S, heads, batch, q_pos, k_pos)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_spec_round_trip(problem):
    layout, T, S, heads, batch = problem
    again = from_spec(layout.spec, layout.tensors)
    assert again.spec == layout.spec
    assert torch.equal(dense(again, T, S, heads, batch), dense(layout, T, S, heads, batch))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_phases_split_the_table(problem):
    layout, T, S, heads, batch = problem
    near = lcattn.Window(11, 5)
    table = lower(layout, T=T, S=S, heads=heads, batch=batch, phases=(near, layouts.Not(near)))
    for phase, part in enumerate((near, layouts.Not(near))):
        want = dense(layout & part, T, S, heads, batch)
        assert torch.equal(table.to_dense(T, S, phase).expand_as(want), want)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_one_table_serves_every_length(data):
    S = data.draw(st.integers(1, 300))
    T = data.draw(st.integers(1, S))
    layout = data.draw(leaves(T, S, 1, 1).filter(lambda x: not x.by_index)) & lcattn.Chunked(40, 2, 1)
    table, row_start, default = lowering.cached_table(layout, (), 1, 1, T, S, None, None)
    n = table.seg_ptr.shape[2] * 64
    assert default and row_start == S - T and n >= S
    assert torch.equal(table.to_dense(n, n)[0, 0, S - T : S, :S], dense(layout, T, S, 1, 1)[0, 0])


class Count:
    """How many rectangles and elements a lowering looks at."""

    def __init__(self, monkeypatch, kind):
        self.rectangles = self.elements = 0
        bounds, visible = kind.bounds, kind.visible

        def counted_bounds(layout, region):
            self.rectangles += region.q_lo.numel()
            return bounds(layout, region)

        def counted_visible(layout, q_pos, k_pos, ctx):
            seen = visible(layout, q_pos, k_pos, ctx)
            self.elements += seen.numel()
            return seen

        monkeypatch.setattr(kind, "bounds", counted_bounds)
        monkeypatch.setattr(kind, "visible", counted_visible)


@pytest.mark.parametrize(
    "layout",
    [
        (lcattn.Chunked(512) | lcattn.Global(16)) & lcattn.Causal(),
        (lcattn.Window(700, 700) | lcattn.Random(64, 2)) & lcattn.Causal(),
        (lcattn.Chunked(512, 0) | lcattn.Bridge(512)) & lcattn.Causal(),
        lcattn.Causal() & lcattn.Documents(cu_seqlens=torch.arange(0, 2**17 + 1, 1024)),
        lcattn.Full() & lcattn.Causal(),
    ],
    ids=["chunked", "random", "bridge", "documents", "causal"],
)
def test_lowering_costs_its_entries(layout, monkeypatch):
    n = 2**17
    count = Count(monkeypatch, layouts.And)
    table = lower(layout, T=n, S=n)
    blocks = n // 64
    # a full run stands for many blocks, so count runs and tiles, and the log of the splitting
    assert count.rectangles <= 20 * (len(table.entries) + blocks)
    assert count.elements <= 4096 * (len(table.mask_tiles) + 200)


def test_a_million_tokens_lower_in_little_memory():
    layout = (lcattn.Chunked(512) | lcattn.Global(16)) & lcattn.Causal()
    table = layout.block_table(2**20, 2**20)
    assert table.nbytes < 2_000_000
    assert len(table.mask_tiles) <= 3


@pytest.mark.parametrize(
    "layout, sizes",
    [
        (lcattn.PerHead([lcattn.Window(3, 0), lcattn.Causal()]) & lcattn.Full(), {}),
        (lcattn.Blocks(torch.rand(2, 1, 2, 2) < 0.6) | layouts.Not(lcattn.PerHead([lcattn.Causal()] * 2)), {}),
        (lcattn.Documents(torch.tensor([[0] * 100, [0] * 50 + [1] * 50])), {"heads": 2}),
        (lcattn.SelectedBlocks(torch.tensor([[[[0], [1]]]] * 2), torch.tensor([0, 1])), {}),
        (lcattn.FromMaskMod(lambda b, h, q_idx, kv_idx: q_idx + b > kv_idx + h), {"batch": 2, "heads": 2}),
    ],
)
def test_a_table_is_of_all_heads_and_batch_rows(layout, sizes):
    check_table(layout.block_table(100, 100, **sizes), layout, 100, 100, 2, 2)


@pytest.mark.parametrize(
    "layout, given, words",
    [
        (lcattn.PerHead([lcattn.Full()] * 3), {"heads": 2}, ["heads=2", "PerHead", "got 3"]),
        (lcattn.Documents(torch.zeros(1, 50, dtype=torch.long)), {}, ["S=100", "ids", "(1, 50)"]),
        (lcattn.Blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool)), {}, ["S=100", "mask", "[1, 1, 1, 1]"]),
        (lcattn.Full(), {"block_q": 0}, ["block_q", ">= 1", "0"]),
        (lcattn.Full(), {"block_k": 2.0}, ["block_k", "integer", "2.0"]),
        (lcattn.Full(), {"batch": -1}, ["batch", "-1"]),
    ],
)
def test_a_table_of_wrong_sizes_names_them(layout, given, words):
    with pytest.raises(ValueError) as raised:
        layout.block_table(100, 100, **given)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_content_keyed_cache_tells_documents_apart():
    first = torch.zeros(1, 100, dtype=torch.long)
    second = first.clone()
    second[0, 50:] = 1
    tables = [
        lowering.cached_table(lcattn.Documents(ids), (), 1, 1, 100, 100, None, None)[0]
        for ids in (first, second, first)
    ]
    assert tables[0] is tables[2]
    assert not torch.equal(tables[0].to_dense(100, 100), tables[1].to_dense(100, 100))


def test_cache_is_bounded():
    cache = lowering.Cache(limit_bytes=20_000)
    for chunk in range(1, 60):
        cache.get(chunk, lambda chunk=chunk: lower(lcattn.Chunked(chunk), T=300, S=300))
    assert cache.n_bytes <= 20_000 and cache.n_bytes == sum(t.nbytes for t in cache.tables.values())
    assert cache.n_dropped == 59 - len(cache.tables) > 0


def test_cache_counts_a_table_once_that_two_threads_make():
    cache = lowering.Cache(limit_bytes=1 << 20)
    both = threading.Barrier(2)

    def make() -> lowering.BlockTable:
        both.wait()
        return lower(lcattn.Causal(), T=300, S=300)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: cache.get("causal", make), range(2))
    assert one is other and cache.n_bytes == one.nbytes


def test_random_is_the_same_whatever_the_length():
    layout = lcattn.Random(16, 2, 5) & lcattn.Causal()
    long = dense(layout, 200, 200, 1, 1)
    assert torch.equal(long[..., :90, :90], dense(layout, 90, 90, 1, 1))
    # every grid row sees at least one block it picked
    assert bool(long.any(3).all())


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: lcattn.Chunked(0), "chunk"),
        (lambda: lcattn.Chunked(4, lookback=-1), "lookback"),
        (lambda: lcattn.Window(-1, 2), "left"),
        (lambda: lcattn.Global(), "exactly one"),
        (lambda: lcattn.Global(0), "first"),
        (lambda: lcattn.Dilated(1, 1, 0), "step"),
        (lambda: lcattn.Random(0, 1), "block"),
        (lambda: lcattn.Bridge(0), "every"),
        (lambda: lcattn.SelectedBlocks(torch.zeros(1, 1, 1), torch.zeros(1)), "blocks"),
        (lambda: lcattn.SelectedBlocks(torch.zeros(1, 1, 1, 1, dtype=torch.int), torch.zeros(1)), "first"),
        (lambda: lcattn.TopKBlocks(0), "k must"),
        (lambda: lcattn.TopKBlocks(1, 0), "block"),
        (lambda: lcattn.TopKBlocks(1, scorer=3), "scorer"),
        (lambda: lcattn.TopKBlocks(1, per="query"), "per"),
        (lambda: lcattn.Documents(), "either"),
        (lambda: lcattn.Documents(torch.zeros(1, 3)), "ids"),
        (lambda: lcattn.Documents((0, 0, 1), q_ids=(0.5,)), "q_ids"),
        (lambda: lcattn.Documents(cu_seqlens=torch.tensor([5, 17])), "0 = c_0 .* 5, 17"),
        (lambda: lcattn.Documents(cu_seqlens=(0, 4, 4, 12)), "0 = c_0"),
        (lambda: lcattn.Documents(cu_seqlens=torch.tensor([0, 8, 4], dtype=torch.uint8)), "0 = c_0"),
        (lambda: lcattn.Blocks(torch.zeros(1, 1, 2, 2)), "mask"),
        (lambda: lcattn.FromMaskMod(3), "mask_mod"),
        (lambda: lcattn.PerHead([]), "PerHead"),
        (lambda: from_spec("Nothing()"), "unknown"),
        (lambda: from_spec("Full() +"), "not a layout expression"),
        (lambda: from_spec("Full().visible"), "not allowed"),
        (lambda: from_spec("Documents(ids=@)"), "needs 1 tensors"),
        (lambda: from_spec("FromMaskMod(-1)"), "this process does not hold"),
        (lambda: lower(lcattn.Full(), T=0, S=3), "at least 1"),
    ],
)
def test_bad_layouts_name_what_is_wrong(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def near(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx).abs() < 9


def test_copies_hold_their_functions_again():
    from torch.nn.attention.flex_attention import create_block_mask

    ids = torch.tensor([0, 5, 70])
    mod = lcattn.FromMaskMod(near)
    for layout in (
        mod,
        (mod | lcattn.Global(3)) & lcattn.Causal(),
        layouts.Not(lcattn.PerHead([mod, lcattn.Full()])),
        lcattn.FromBlockMask(create_block_mask(near, 1, 2, 70, 70, device="cpu", BLOCK_SIZE=64)),
        lcattn.Documents(cu_seqlens=ids, q_ids=torch.zeros(1, 70, dtype=torch.int)) | lcattn.Global(indices=(5, 2)),
        lcattn.SelectedBlocks(torch.ones(1, 2, 2, 1, dtype=torch.int), torch.zeros(1, dtype=torch.int), 64, 1),
    ):
        for again in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
            assert again.spec == layout.spec and (layout.tensors or again == layout)
            assert torch.equal(dense(again, 70, 70, 2, 1), dense(layout, 70, 70, 2, 1))
    scored = lcattn.TopKBlocks(3, scorer=near)
    assert pickle.loads(pickle.dumps(scored)) == scored
    assert lcattn.FromMaskMod(near) == mod != lcattn.FromMaskMod(lambda b, h, q_idx, kv_idx: q_idx == kv_idx)


def test_another_process_holds_its_own_functions():
    layout = lcattn.FromMaskMod(near) & lcattn.Causal()
    code = (
        "import pickle, sys, lcattn\n"
        # the first function of that process, as `near` may be of this one
        "lcattn.FromMaskMod(lambda b, h, q_idx, kv_idx: q_idx == kv_idx)\n"
        f"try: lcattn.layout.from_spec({layout.spec!r})\n"
        "except ValueError as error: assert 'this process does not hold' in str(error)\n"
        "else: raise AssertionError('found a function')\n"
        f"again = pickle.loads({pickle.dumps(layout)!r})\n"
        "print(again.block_table(70, 70).to_dense(70, 70).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == int(dense(layout, 70, 70, 1, 1).sum())


def test_joining_with_something_else_is_a_type_error():
    with pytest.raises(TypeError, match="int"):
        lcattn.Full() & 3


def test_bridges_carry_across_joins():
    layout = (lcattn.Chunked(4, 0) | lcattn.Bridge(4)) & lcattn.Causal()
    rows = [torch.nonzero(row).flatten().tolist() for row in dense(layout, 12, 12, 1, 1)[0, 0]]
    assert rows[6] == [3, 4, 5, 6]
    assert rows[10] == [3, 7, 8, 9, 10]
    assert rows[11] == [3, 7, 8, 9, 10, 11]
    # alone and two-sided: a bridge is seen by its own chunk and all later ones, and sees its own chunk
    alone = [torch.nonzero(row).flatten().tolist() for row in dense(lcattn.Bridge(4), 12, 12, 1, 1)[0, 0]]
    assert alone[5] == [3, 7]
    assert alone[7] == [3, 4, 5, 6, 7]
    assert alone[8] == [3, 7, 11]


def test_from_block_mask_is_flex_attentions_mask():
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((q_idx - kv_idx) < 90 + 20 * h)

    block_mask = create_block_mask(mask_mod, 1, 2, 300, 300, device="cpu", BLOCK_SIZE=64)
    want = create_mask(mask_mod, 1, 2, 300, 300, device="cpu")
    layout = lcattn.FromBlockMask(block_mask)
    assert torch.equal(dense(layout, 300, 300, 2, 1), want)
    check_table(lower(layout, T=300, S=300, heads=2), layout, 300, 300, 2, 1)
