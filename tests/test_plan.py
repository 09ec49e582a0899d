"""Forwards that are repeated by a plan: the same bits as without one, and errors as ever."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import lcattn
from lcattn import dispatch, lowering, plan
from lcattn.api import make_problem
from lcattn.cases import Draw

LAYOUTS = {
    "full": lcattn.Full(),
    "chunked": (lcattn.Chunked(40) | lcattn.Global(3)) & lcattn.Causal(),
    "per_head": lcattn.PerHead([lcattn.Causal(), lcattn.Window(20, 0), lcattn.Chunked(30), lcattn.Full()]),
    "nothing": lcattn.Window(0, 0) & lcattn.Chunked(8, 0),
}


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setattr(plan, "_plans", {})


def count() -> int:
    return sum(map(len, plan._plans.values()))


def unplanned(call: dict) -> tuple[Tensor, Tensor]:
    names = ("position", "scale", "softcap", "sink", "key_mask", "q_pos", "k_pos")
    values = {**dict.fromkeys(names), "dropout": 0.0, **call}
    return dispatch.BACKENDS["cpu"].forward(make_problem(**values), False)[:2]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "S"), [(1, 90), (5, 90), (8, 90), (7, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_repeated_call_gives_the_bits_of_one_without_a_plan(layout, T, S, dtype, seed):
    draw = Draw(seed)

    def call(strided: bool) -> dict:
        q, k, v = (draw.normal(2, n, length, 24, dtype=dtype) for n, length in ((4, T), (2, S), (2, S)))
        if strided:
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        return {"q": q, "k": k, "v": v, "layout": LAYOUTS[layout]}

    table, sink = draw.normal(4, 60), draw.normal(4)
    more = {"position": lcattn.RelativeBias(table, -50), "sink": sink, "softcap": 3.0, "scale": 0.3}
    for n_plans, (strided, given) in enumerate(((False, {}), (True, {}), (False, more), (True, more)), start=1):
        for time in range(3):
            now = call(strided) | given
            got, want = lcattn.attention_with_lse(**now), unplanned(now)
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, want, strict=True))
            # made when a call comes again
            assert count() == n_plans - (time == 0)
            # values may change where they lie
            table.copy_(draw.normal(4, 60))
            sink.copy_(draw.normal(4))


@torch.no_grad()
def test_what_may_differ_has_a_plan_of_its_own(seed):
    draw = Draw(seed)
    q, k, v = draw.normal(1, 4, 1, 16), draw.normal(1, 2, 200, 16), draw.normal(1, 2, 200, 16)
    table, layout = draw.normal(4, 30), lcattn.Causal()
    base = {"q": q, "k": k, "v": v, "layout": layout, "position": lcattn.RelativeBias(table, -20)}
    changes = [
        {},
        {"k": k[:, :, :150], "v": v[:, :, :150]},
        {"q": q.transpose(1, 3).contiguous().transpose(1, 3)},
        {"layout": lcattn.Chunked(50)},
        {"position": None},
        {"position": lcattn.RelativeBias(table, -19)},
        {"position": lcattn.RelativeBias(table[:1], -20)},
        {"sink": draw.normal(4)},
        {"scale": 0.5},
        {"softcap": 2.0},
        {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()},
        {"q": q.expand(3, -1, -1, -1), "k": k.expand(3, -1, -1, -1), "v": v.expand(3, -1, -1, -1)},
    ]
    shared = [
        {"position": lcattn.RelativeBias(draw.normal(4, 30), -20)},
        {"position": [lcattn.RelativeBias(draw.normal(4, 30), -20)]},
        {"position": []},
        {"sink": draw.normal(4)},
        {"scale": np.float64(0.5)},
    ]
    for _ in range(3):
        for change in changes + shared:
            call = base | change
            got, want = lcattn.attention_with_lse(**call), unplanned(call)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), change
    assert count() == len(changes)


def test_calls_that_can_have_no_plan_have_none(seed):
    draw = Draw(seed)
    q, k, v = draw.normal(1, 2, 1, 16), draw.normal(1, 2, 50, 16), draw.normal(1, 2, 50, 16)
    table = draw.normal(2, 30)
    calls = [
        {"q": draw.normal(1, 2, 9, 16)},
        {"key_mask": torch.ones(1, 50, dtype=torch.bool)},
        {"q_pos": torch.tensor([49])},
        {"k_pos": torch.arange(50)},
        {"dropout": 0.5},
        {"backend": "reference"},
        {"layout": lcattn.Documents(torch.zeros(1, 50, dtype=torch.int32))},
        {"layout": lcattn.TopKBlocks(1, 16) | lcattn.Window(9, 0)},
        {"position": lcattn.Alibi(torch.ones(2))},
        {"q": torch._neg_view(q)},
        {"k": torch._neg_view(k)},
        {"v": torch._neg_view(v)},
        {"v": torch._efficientzerotensor((1, 2, 50, 16))},
        {"sink": torch._neg_view(torch.ones(2))},
        {"position": lcattn.RelativeBias(torch._neg_view(table), 0)},
        {"position": [lcattn.RelativeBias(table, 0), lcattn.Alibi(torch.ones(2))]},
        {"layout": lcattn.FromMaskMod(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx - 49)},
        {"position": lcattn.RelativeBias(table.bfloat16(), 0)},
        {"position": lcattn.RelativeBias(table.T.contiguous().T, 0)},
        {"position": lcattn.RelativeBias(table.clone().requires_grad_(), 0)},
        {"q": q.clone().requires_grad_()},
        {"sink": torch.zeros(2, dtype=torch.bfloat16)},
    ]
    for change in calls:
        call = {"q": q, "k": k, "v": v, "layout": lcattn.Full()} | change
        for _ in range(3):
            out = lcattn.attention(**call)
        assert not count(), change
        if not call.get("dropout"):
            want = lcattn.attention(**{**call, "backend": "reference"})
            torch.testing.assert_close(out, want, msg=str(change))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            assert lcattn.attention(q, k, v).dtype == torch.bfloat16
    with torch.profiler.profile() as profile:
        for _ in range(3):
            lcattn.attention(q, k, v)
    assert "lcattn::cpu_forward" in {event.key for event in profile.key_averages()}
    assert not count()
    # but a gradient that nobody asks for is no hindrance
    with torch.no_grad():
        for _ in range(2):
            lcattn.attention(q.clone().requires_grad_(), k, v)
    assert count() == 1


@torch.no_grad()
def test_errors_are_those_of_any_call(seed):
    draw = Draw(seed)
    q, k, v = draw.normal(1, 2, 1, 16), draw.normal(1, 2, 50, 16), draw.normal(1, 2, 50, 16)
    for _ in range(2):
        lcattn.attention(q, k, v)
    for change, message in (
        ({"v": v[..., :8]}, "v: expected"),
        ({"v": v[:, :, :49]}, "v: expected the shape of k"),
        ({"k": k.double()}, "k: expected dtype"),
        ({"k": k[:, :, :1].expand(1, 2, 50, 16)}, "k: its length dimension has stride 0"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"position": lcattn.RelativeBias(torch.zeros(3, 4), 0)}, "RelativeBias: table must have 2 heads"),
        ({"sink": torch.zeros(3)}, "sink: expected"),
        ({"layout": lcattn.PerHead([lcattn.Full()])}, "PerHead: expected 2 layouts"),
    ):
        for _ in range(3):
            with pytest.raises(ValueError, match=message):
                lcattn.attention(**({"q": q, "k": k, "v": v} | change))
    with pytest.raises(RuntimeError, match="no backend can compute this call"):
        lcattn.attention(q.double(), k.double(), v.double())
    for wrong in ([1.0], None):
        with pytest.raises(TypeError, match="q: expected a tensor"):
            lcattn.attention(wrong, k, v)
    for wrong in (0j, np.zeros(2), torch.zeros(2), torch.zeros((), requires_grad=True)):
        with pytest.raises((TypeError, ValueError), match="dropout: expected a number"):
            lcattn.attention(q, k, v, dropout=wrong)
    assert count() == 1


@torch.no_grad()
def test_plans_are_few_and_keep_nothing_that_is_given(seed, monkeypatch):
    monkeypatch.setattr(plan, "_MAX_PLANS", 3)
    monkeypatch.setattr(plan, "_MAX_KEYS", 2)
    made = []
    monkeypatch.setattr(
        plan, "_forward", lambda problem, make=plan._forward: made.append(problem.k[0].shape[2]) or make(problem)
    )
    draw = Draw(seed)
    q, table = draw.normal(1, 2, 1, 16), draw.normal(2, 30)

    def call(k: Tensor, first: int = -9) -> None:
        lcattn.attention(q, k, k, position=lcattn.RelativeBias(table.clone(), first), sink=table[:, 0].clone())

    for _ in range(2):
        call(q)
    for S in range(40, 50):
        k = draw.normal(1, 2, S, 16)
        kept = [weakref.ref(k.untyped_storage()), weakref.ref(k)]
        for _ in range(2):
            call(k)
        del k
        gc.collect()
        assert not any(ref() is not None for ref in kept)
        assert count() <= 3
        # what is used stays
        call(q)
    assert count() == 3 and made == [1, *range(40, 50)]
    for first in range(5):
        for _ in range(3):
            call(q, first)
        call(q)
    assert len(plan._plans) == 2 and made[11:] == [1] * 5
    # and none outlives the tables that the cache of lowering drops
    monkeypatch.setattr(lowering.cache, "n_dropped", lowering.cache.n_dropped + 1)
    call(draw.normal(1, 2, 60, 16))
    assert len(plan._plans) == 1


@torch.no_grad()
def test_outputs_that_torch_makes_otherwise_are_refused(seed):
    draw = Draw(seed)
    q, k = draw.normal(1, 2, 1, 16), draw.normal(1, 2, 50, 16)
    for _ in range(2):
        lcattn.attention(q, k, k)
    for made in (torch.empty(2), None, torch.empty(1, 2, 1, 16, dtype=torch.float16)):

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None, made=made):
                return made if function is torch.empty_like else function(*args, **(kwargs or {}))

        with Mode(), pytest.raises(RuntimeError, match="room for an output is not as the plan has it"):
            lcattn.attention(q, k, k)


@torch.no_grad()
def test_tracers_see_the_operator(seed):
    draw = Draw(seed)
    q, k = draw.normal(1, 2, 1, 16), draw.normal(1, 2, 50, 16)
    for _ in range(2):
        want = lcattn.attention(q, k, k)
    for pre_dispatch in (False, True):
        graph = make_fx(lambda q, k: lcattn.attention(q, k, k), pre_dispatch=pre_dispatch)(q, k)
        assert torch.equal(graph(q, k), want)


@torch.no_grad()
def test_lse_is_made_only_when_asked_for(seed):
    draw = Draw(seed)
    q, k, v = draw.normal(1, 2, 1, 16), draw.normal(1, 2, 50, 16), draw.normal(1, 2, 50, 16)
    out, lse = lcattn.attention_with_lse(q, k, v)
    for _ in range(2):
        assert torch.equal(lcattn.attention(q, k, v), out)
    assert count() == 1
    again, lse_again = lcattn.attention_with_lse(q, k, v)
    assert torch.equal(again, out) and torch.equal(lse_again, lse) and count() == 1


@torch.no_grad()
def test_many_threads_use_the_plans_of_one_layout(seed, monkeypatch):
    """Plans are dropped by one thread while another runs them."""
    monkeypatch.setattr(plan, "_MAX_PLANS", 2)
    draw = Draw(seed)
    calls = [(draw.normal(1, 2, 1, 16), draw.normal(1, 2, S, 16)) for S in range(100, 108)]
    wanted = [unplanned({"q": q, "k": k, "v": k, "layout": lcattn.Causal()})[0] for q, k in calls]

    def work(start: int) -> bool:
        with torch.no_grad():
            order = [(start * 3 + i // 2) % len(calls) for i in range(200)]
            return all(
                torch.equal(lcattn.attention(calls[i][0], calls[i][1], calls[i][1], layout=lcattn.Causal()), wanted[i])
                for i in order
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
