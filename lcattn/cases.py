"""Problems drawn for tests and benchmarks alike: layouts x positions x dtypes, over shapes and variants that hurt.

Everything is drawn afresh from a seed. When a bug slips by, its class of case is added here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import layout as layouts
from . import position as positions
from .layout import Layout
from .position import Terms
from .problem import Problem

Option = TypeVar("Option")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# content scores of this standard deviation, since nearly uniform attention hides errors of position
SCORE_STD = 3.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem."""

    B: int
    H: int
    G: int
    T: int
    S: int
    D: int


@dataclass(frozen=True)
class Case:
    """A problem with the gradients that arrive at its outputs."""

    name: str
    problem: Problem
    dout: Tensor
    dlse: Tensor | None


class Draw:
    """Random tensors and choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[Option]) -> Option:
        return options[self.integer(0, len(options) - 1)]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * std).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self.generator)


def _documents(draw: Draw, s: Shape) -> Layout:
    ids = draw.integers(0, 4, s.B, s.S).sort(1).values
    if s.T > s.S:
        return layouts.Documents(ids, q_ids=draw.integers(0, 4, s.B, s.T).sort(1).values)
    return layouts.Documents(ids)


def _mask_mod(draw: Draw, s: Shape) -> Layout:
    a, b = draw.integer(2, 9), draw.integer(1, 9)
    return layouts.FromMaskMod(lambda batch, head, q_idx, kv_idx: (q_idx * a + kv_idx * b + head + batch) % 7 < 4)


def _block_mask(draw: Draw, s: Shape) -> Layout:
    rows, columns = -(-s.T // 32), -(-s.S // 32)
    return layouts.Blocks(draw.uniform(s.B, s.H, rows, columns) < 0.5, 32)


def _element_mask(draw: Draw, s: Shape) -> Layout:
    return layouts.Blocks(draw.uniform(s.B, 1, s.T, s.S) < 0.4, 1)


def _selected(draw: Draw, s: Shape) -> Layout:
    block, lists = draw.choice((16, 64, 64, 128)), draw.choice([n for n in range(1, s.H + 1) if s.H % n == 0])
    first = draw.integer(-2, 1) + (s.S - s.T) // block
    shape = (draw.choice((1, s.B)), lists, s.T // block + 2, draw.integer(1, 4))
    blocks = draw.integers(-1, s.S // block + 2, *shape)
    return layouts.SelectedBlocks(blocks, torch.tensor([first]), block, s.H // lists)


LAYOUTS: dict[str, Callable[[Draw, Shape], Layout]] = {
    "full": lambda draw, s: layouts.Full(),
    "causal": lambda draw, s: layouts.Causal(),
    "window": lambda draw, s: layouts.Window(draw.integer(0, 90), draw.integer(0, 90)),
    "one_key": lambda draw, s: layouts.Window(0, 0),
    "chunked": lambda draw, s: layouts.Chunked(
        draw.integer(5, 90), draw.integer(0, 2), draw.integer(0, 1), draw.integer(0, 20)
    ),
    "chunked_causal": lambda draw, s: layouts.Chunked(64) & layouts.Causal(),
    "chunked_global": lambda draw, s: (layouts.Chunked(draw.integer(30, 70)) | layouts.Global(5)) & layouts.Causal(),
    "global": lambda draw, s: layouts.Global(every=draw.integer(20, 90)) | layouts.Window(9, 9),
    "global_at": lambda draw, s: layouts.Global(indices=(3, 40, 100)) | layouts.Window(20, 0),
    "bridge": lambda draw, s: layouts.Bridge(draw.integer(1, 90)) | layouts.Window(5, 5),
    "bridge_causal": lambda draw, s: (layouts.Chunked(45, 0) | layouts.Bridge(45)) & layouts.Causal(),
    "dilated": lambda draw, s: layouts.Dilated(draw.integer(1, 9), draw.integer(1, 9), draw.integer(2, 9)),
    "random": lambda draw, s: layouts.Random(draw.integer(8, 64), 2, draw.integer(0, 999)) | layouts.Window(8, 8),
    "documents": _documents,
    "documents_causal": lambda draw, s: _documents(draw, s) & layouts.Causal(),
    "mask_mod": _mask_mod,
    "blocks": _block_mask,
    "mask": _element_mask,
    "selected": lambda draw, s: _selected(draw, s) | layouts.Window(8, 8),
    "selected_causal": lambda draw, s: (layouts.Chunked(50) | _selected(draw, s)) & layouts.Causal(),
    "per_head": lambda draw, s: layouts.PerHead(tuple(layouts.Window(h * 7, h * 5) for h in range(s.H))),
}

# layouts in which no query sees a key after itself, for the causality and decoding properties
CAUSAL_LAYOUTS: tuple[str, ...] = (
    "causal",
    "chunked_causal",
    "chunked_global",
    "bridge_causal",
    "documents_causal",
    "selected_causal",
)


def _table(draw: Draw, s: Shape, *shape: int) -> Tensor:
    return draw.normal(*shape, std=1.5)


def _vectors(draw: Draw, s: Shape, length: int) -> Tensor:
    return _table(draw, s, draw.choice((1, s.H)), length, s.D)


def _shaw(draw: Draw, s: Shape) -> positions.Position:
    length = draw.integer(1, 60)
    return positions.Shaw(_vectors(draw, s, length), -draw.integer(0, length))


def _transformer_xl(draw: Draw, s: Shape) -> positions.Position:
    length = draw.integer(1, 300)
    u, v = _table(draw, s, s.H, s.D), _table(draw, s, s.H, s.D)
    return positions.TransformerXL(_vectors(draw, s, length), u, v, -draw.integer(0, length))


def _disentangled(draw: Draw, s: Shape) -> positions.Position:
    span = draw.integer(4, 30)
    keys, queries = draw.choice(((True, True), (True, True), (True, False), (False, True)))
    return positions.Disentangled(
        _vectors(draw, s, 2 * span) if keys else None,
        _vectors(draw, s, 2 * span) if queries else None,
        draw.choice((None, draw.integer(span // 2 + 2, 200))),
    )


def _relative_terms(draw: Draw, s: Shape, q: Tensor, k: Tensor, v: Tensor) -> Terms:
    # vectors of their own on both sides, and tables of different range
    length = draw.integer(3, 60)
    return Terms(
        rel_key=_vectors(draw, s, draw.integer(3, 60)),
        rel_key_min=-draw.integer(0, length),
        rel_query=_vectors(draw, s, length),
        rel_query_min=-draw.integer(0, length),
        qr=draw.normal(*q.shape, dtype=q.dtype),
        kr=draw.normal(*k.shape, dtype=k.dtype),
    )


def _dual_chunk(draw: Draw, s: Shape, q: Tensor, k: Tensor, v: Tensor) -> positions.Position | None:
    chunk = draw.integer(5, 120)
    two_sided = bool(draw.integer(0, 1))
    return positions.DualChunk(chunk, draw.integer(1, chunk), two_sided=two_sided) if s.D % 2 == 0 else None


def _phases(draw: Draw, s: Shape, q: Tensor, k: Tensor, v: Tensor) -> Terms:
    near = layouts.Window(draw.integer(0, 40), draw.integer(0, 40))
    far_q = draw.normal(*q.shape, dtype=q.dtype, std=SCORE_STD**0.5)
    far_k = draw.normal(*k.shape, dtype=k.dtype, std=SCORE_STD**0.5)
    q_pos = torch.arange(s.S - s.T, s.S)[None, None]
    k_pos = torch.arange(s.S)[None, None]
    group = draw.integer(2, 9)
    return Terms(
        q=(q, far_q),
        k=(k, far_k),
        v=(v,),
        phases=(near, layouts.Not(near)),
        phase_map=((0, 0, 0), (1, 1, 0)),
        offset_q_pos=torch.cat([q_pos, q_pos // group]),
        offset_k_pos=torch.cat([k_pos, k_pos // group]),
        bias=_table(draw, s, 2, s.H, 30),
        bias_min=-20,
        slope=-draw.uniform(s.H),
    )


def _phase_values(draw: Draw, s: Shape, q: Tensor, k: Tensor, v: Tensor) -> Terms:
    near = layouts.Chunked(draw.integer(10, 70), 0)
    return Terms(
        v=(v, draw.normal(*v.shape, dtype=v.dtype)),
        phases=(near, layouts.Not(near)),
        phase_map=((0, 0, 0), (0, 0, 1)),
        bias=_table(draw, s, 1, s.H, 9),
        bias_min=-4,
    )


POSITIONS: dict[str, Callable[[Draw, Shape, Tensor, Tensor, Tensor], positions.Position | tuple | None]] = {
    "none": lambda draw, s, q, k, v: None,
    "bias": lambda draw, s, q, k, v: positions.RelativeBias(
        _table(draw, s, s.H, draw.integer(1, 300)), -draw.integer(-20, 300)
    ),
    "shared_bias": lambda draw, s, q, k, v: positions.RelativeBias(_table(draw, s, 1, 100), -50),
    "t5": lambda draw, s, q, k, v: positions.T5Bias(_table(draw, s, 32, s.H), bool(draw.integer(0, 1)), 40),
    "alibi": lambda draw, s, q, k, v: positions.Alibi(draw.uniform(s.H) * 0.3),
    "rotary": lambda draw, s, q, k, v: positions.Rotary() if s.D % 2 == 0 else None,
    "partial_rotary": lambda draw, s, q, k, v: (
        positions.Rotary(rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5}) if s.D % 4 == 0 else None
    ),
    "dual_chunk": _dual_chunk,
    "self_extend": lambda draw, s, q, k, v: (
        positions.SelfExtend(draw.integer(1, 9), draw.integer(1, 90), two_sided=bool(draw.integer(0, 1)))
        if s.D % 2 == 0
        else None
    ),
    "rerope": lambda draw, s, q, k, v: (
        positions.ReRoPE(draw.integer(1, 90), two_sided=bool(draw.integer(0, 1))) if s.D % 2 == 0 else None
    ),
    "bias_alibi": lambda draw, s, q, k, v: (
        positions.RelativeBias(_table(draw, s, s.H, 64), -32),
        positions.Alibi(draw.uniform(s.H) * 0.3),
    ),
    "shaw": lambda draw, s, q, k, v: _shaw(draw, s),
    "transformer_xl": lambda draw, s, q, k, v: _transformer_xl(draw, s),
    "disentangled": lambda draw, s, q, k, v: _disentangled(draw, s),
    "relative_terms": _relative_terms,
    "phases": _phases,
    "phase_values": _phase_values,
}


def _with_key_mask(draw: Draw, p: Problem) -> Problem:
    B, _, _, _, S, _ = p.sizes
    return dataclasses.replace(p, key_mask=draw.uniform(B, S) < 0.7)


def _with_empty_rows(draw: Draw, p: Problem) -> Problem:
    B, _, _, _, S, _ = p.sizes
    mask = draw.uniform(B, S) < 0.5
    mask[draw.integer(0, B - 1)] = False
    return dataclasses.replace(p, key_mask=mask)


def _with_dropout(draw: Draw, p: Problem) -> Problem:
    return dataclasses.replace(p, dropout=0.3, seed=draw.integers(0, 2**62, 1))


def _with_large_scores(draw: Draw, p: Problem) -> Problem:
    return dataclasses.replace(p, scale=p.scale * 300)


def _with_shifted_start(draw: Draw, p: Problem) -> Problem:
    # a run of queries inside the keys, as when a cache of fixed size is partly filled
    _, _, _, T, S, _ = p.sizes
    start = draw.integer(0, S)
    return dataclasses.replace(p, q_pos=torch.arange(start, start + T)[None])


def _with_left_padding(draw: Draw, p: Problem) -> Problem:
    B, _, _, T, S, _ = p.sizes
    pad = draw.integers(0, max(S // 2, 1), B)[:, None]
    k_pos = torch.arange(S) - pad
    q_pos = torch.arange(S - T, S) - pad
    return dataclasses.replace(p, q_pos=q_pos, k_pos=k_pos, key_mask=k_pos >= 0)


def _with_restarts(draw: Draw, p: Problem) -> Problem:
    _, _, _, T, S, _ = p.sizes
    return dataclasses.replace(p, q_pos=torch.arange(T)[None] % 37, k_pos=torch.arange(S)[None] % 37)


def _with_scattered_coordinates(draw: Draw, p: Problem) -> Problem:
    _, _, _, T, S, _ = p.sizes
    q_pos, k_pos = draw.integers(-50, 400, 1, T), draw.integers(-50, 400, 1, S).sort(1).values
    return dataclasses.replace(p, q_pos=q_pos, k_pos=k_pos)


def _relaid(p: Problem, names: tuple[str, ...], relay: Callable[[Tensor], Tensor]) -> Problem:
    changed: dict[str, Any] = {n: tuple(map(relay, getattr(p, n))) for n in names}
    return dataclasses.replace(p, **changed)


def _with_transposed_strides(draw: Draw, p: Problem) -> Problem:
    # what a fused projection gives: [B, length, heads, D] seen as [B, heads, length, D]
    def relaid(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    return _relaid(p, ("q", "k", "v"), relaid)


def _with_feature_strides(draw: Draw, p: Problem) -> Problem:
    def relaid(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]

    return _relaid(p, ("q", "k", "v"), relaid)


def _with_expanded_heads(draw: Draw, p: Problem) -> Problem:
    return _relaid(p, ("k", "v"), lambda t: t[:, :1].expand_as(t))


def _with_saturated_scores(draw: Draw, p: Problem) -> Problem:
    """All far up the softcap's tanh, where 1 - tanh^2 has lost most of its digits."""
    bias = p.q[0].new_zeros(1, 1, 1, dtype=torch.float32) if p.bias is None else p.bias
    return dataclasses.replace(p, softcap=3.0, bias=bias + 20.0)


VARIANTS: dict[str, Callable[[Draw, Problem], Problem]] = {
    "plain": lambda draw, p: p,
    "sink": lambda draw, p: dataclasses.replace(p, sink=draw.normal(p.sizes[1], std=3)),
    "softcap": lambda draw, p: dataclasses.replace(p, softcap=5.0),
    "saturated": _with_saturated_scores,
    "dropout": _with_dropout,
    "key_mask": _with_key_mask,
    "empty_rows": _with_empty_rows,
    "empty_rows_sink": lambda draw, p: dataclasses.replace(_with_empty_rows(draw, p), sink=draw.normal(p.sizes[1])),
    "large_scores": _with_large_scores,
    "shifted_start": _with_shifted_start,
    "left_padding": _with_left_padding,
    "restarts": _with_restarts,
    "scattered": _with_scattered_coordinates,
    "transposed": _with_transposed_strides,
    "feature_strides": _with_feature_strides,
    "expanded_heads": _with_expanded_heads,
    "everything": lambda draw, p: _with_dropout(
        draw, dataclasses.replace(_with_key_mask(draw, p), softcap=8.0, sink=draw.normal(p.sizes[1]))
    ),
}

SHAPES: tuple[Shape, ...] = (
    Shape(2, 2, 2, 130, 130, 64),
    Shape(1, 4, 2, 200, 200, 32),
    Shape(1, 2, 1, 64, 64, 16),
    Shape(2, 3, 1, 65, 190, 20),
    Shape(1, 2, 2, 1, 300, 64),
    Shape(1, 6, 2, 1, 150, 33),
    Shape(2, 4, 4, 5, 129, 128),
    Shape(1, 2, 2, 150, 70, 40),
    Shape(1, 1, 1, 1, 1, 16),
    Shape(1, 3, 3, 127, 128, 1),
    Shape(1, 1, 1, 193, 257, 80),
    Shape(1, 2, 1, 100, 100, 256),
    Shape(1, 2, 2, 90, 300, 96),
    Shape(3, 2, 2, 33, 31, 192),
    # so many key blocks that several threads share a row of them, forward and decoding
    Shape(1, 1, 1, 70, 2200, 16),
    Shape(1, 2, 1, 1, 700, 40),
)

# drawn besides for the CPU: heads that share keys, and more of these than its kernels keep at hand; so many heads that
# decoding takes those of a kv head in turns
CPU_SHAPES: tuple[Shape, ...] = (*SHAPES, Shape(3, 6, 3, 70, 530, 128), Shape(1, 22, 2, 3, 200, 24))


def make(
    draw: Draw, layout: str, position: str, variant: str, shape: Shape, dtype: torch.dtype = torch.float32
) -> Case:
    """One case by the names of its parts."""
    s = shape
    std = SCORE_STD**0.5
    q = draw.normal(s.B, s.H, s.T, s.D, dtype=dtype, std=std)
    k = draw.normal(s.B, s.G, s.S, s.D, dtype=dtype, std=std)
    v = draw.normal(s.B, s.G, s.S, s.D, dtype=dtype)
    terms = positions.lower(POSITIONS[position](draw, s, q, k, v), q, k, v, None, None)
    values = {f.name: getattr(terms, f.name) for f in dataclasses.fields(terms)}
    values |= {"q": terms.q or (q,), "k": terms.k or (k,), "v": terms.v or (v,)}
    problem = Problem(**values, layout=LAYOUTS[layout](draw, s), scale=s.D**-0.5)
    problem = VARIANTS[variant](draw, problem)
    dout = draw.normal(s.B, s.H, s.T, s.D, dtype=dtype)
    dlse = draw.normal(s.B, s.H, s.T) if draw.integer(0, 1) else None
    name = "-".join([layout, position, variant, str(dtype).removeprefix("torch.")])
    return Case(f"{name}-B{s.B}H{s.H}G{s.G}T{s.T}S{s.S}D{s.D}", problem, dout, dlse)


def draw_cases(
    seed: int, dtypes: Sequence[torch.dtype] = DTYPES, head_dims: Sequence[int] = ()
) -> Iterator[Callable[[], Case]]:
    """Every layout x position x dtype, and every variant x shape; the rest of each case drawn from the seed.

    Yields makers, so that a test can report a case before paying for it. For kernels that take few of them, the dtypes
    to draw from, and head dims that replace those of the shapes.
    """
    draw = Draw(seed)
    shapes = SHAPES if head_dims else CPU_SHAPES

    def maker(layout: str, position: str, variant: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Case]:
        own = draw.integer(0, 2**31)
        if head_dims:
            shape = dataclasses.replace(shape, D=draw.choice(head_dims))
        return lambda: make(Draw(own), layout, position, variant, shape, dtype)

    for layout in LAYOUTS:
        for position in POSITIONS:
            for dtype in dtypes:
                yield maker(layout, position, draw.choice(tuple(VARIANTS)), draw.choice(shapes), dtype)
    for variant in VARIANTS:
        for shape in shapes:
            layout, position = draw.choice(tuple(LAYOUTS)), draw.choice(tuple(POSITIONS))
            yield maker(layout, position, variant, shape, dtypes[0])
