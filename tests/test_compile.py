"""opcheck of the operator, and the operator and modules under torch.compile and torch.export."""

from __future__ import annotations

import io
import math
import unittest.mock
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

import lcattn
from lcattn import dispatch, ops
from lcattn.api import make_problem
from lcattn.layout import Layout
from lcattn.modules import ChunkedSelfAttention, EncoderLayer, MultiheadAttention
from lcattn.position import rotary
from lcattn.problem import TERMS, Problem

B, H, D = 2, 4, 16
# five lengths: odd, a multiple of the block, below and above one block
LENGTHS = (37, 72, 100, 129, 192)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def draw(T: int, G: int = H, S: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v whose scores have a standard deviation of 3."""
    S = T if S is None else S
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)
    return (q * 3**0.5).to(dtype), (k * 3**0.5).to(dtype), v.to(dtype)


CAUSAL = lcattn.Causal()


def problem(layout: Layout = CAUSAL, *, T: int = 40, S: int | None = None, G: int = H, **call) -> Problem:
    dtype = call.pop("dtype", torch.float32)
    names = ("position", "scale", "softcap", "sink", "key_mask", "q_pos", "k_pos", "dropout")
    values = [call.pop(name, 0.0 if name == "dropout" else None) for name in names]
    assert not call
    return make_problem(*draw(T, G, S, dtype), layout, *values)


def documents() -> Layout:
    return lcattn.Documents(ids=torch.randint(3, (B, 40)).sort(1).values) & lcattn.Causal()


PROBLEMS = {
    "plain": lambda: problem(),
    "bias_window": lambda: problem(
        lcattn.Window(9, 4),
        position=lcattn.RelativeBias(torch.randn(H, 14), -9),
        key_mask=torch.rand(B, 40) < 0.8,
    ),
    "grouped": lambda: problem(lcattn.Chunked(16), G=2, T=33, S=40),
    "sink_softcap": lambda: problem(sink=torch.randn(H), softcap=5.0, position=lcattn.Alibi.for_heads(H)),
    "documents": lambda: problem(documents()),
    "blocks": lambda: problem(lcattn.Blocks(torch.rand(B, 1, 3, 3) < 0.6, 16)),
    "coordinates": lambda: problem(q_pos=torch.arange(40) + 3, k_pos=torch.arange(40).expand(B, 40).clone()),
    "dropout": lambda: problem(dropout=0.3),
    "bfloat16": lambda: problem(lcattn.Chunked(16), dtype=torch.bfloat16),
}


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def with_gradients(p: Problem) -> Problem:
    for tensors in (p.q, p.k, p.v):
        for tensor in tensors:
            tensor.requires_grad_()
    for name in TERMS:
        if getattr(p, name) is not None and getattr(p, name).is_leaf:
            getattr(p, name).requires_grad_()
    return p


@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck(name: str, backend: str) -> None:
    p = with_gradients(PROBLEMS[name]())
    backend = dispatch.check_name(backend)
    inputs = ops.arguments(p, backend)
    out, *rest = torch.ops.lcattn.attention(*inputs)
    torch.library.opcheck(torch.ops.lcattn.attention.default, inputs)
    if backend == "reference":
        # its backward is autograd, which the modes that opcheck runs an operator under switch off below it
        return
    wanted = [getattr(p, term) is not None and getattr(p, term).requires_grad for term in TERMS]
    detached = tree_map_only(Tensor, Tensor.detach, inputs)
    saved = [t.detach() for t in (out, *rest)]
    incoming = (torch.randn_like(out), torch.randn_like(rest[0]))
    torch.library.opcheck(
        torch.ops.lcattn.attention_backward.default,
        (*detached, *saved, *incoming, wanted),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("differentiable", [False, True])
def test_modes_see_the_operator(differentiable: bool) -> None:
    """A tracer records the operator, and a fake tensor stays fake, in inference too."""
    q = torch.randn(1, 2, 5, 16, requires_grad=differentiable)

    def call(q: Tensor) -> Tensor:
        return lcattn.attention(q, q, q, layout=CAUSAL)

    assert any("lcattn.attention" in str(node.target) for node in make_fx(call)(q).graph.nodes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(call(q), FakeTensor)


# positions like them, but of other tables; no other test asks for either
REMEMBERED = {
    "rotary": (lambda: lcattn.Rotary(12345.0), lambda: lcattn.Rotary(12345.0 + 1e-9)),
    "dual_chunk": (
        lambda: lcattn.DualChunk(9, 4, lcattn.Rotary(12345.0)),
        lambda: lcattn.DualChunk(9, 4, lcattn.Rotary(12345.0 + 1e-9)),
    ),
    "t5": (lambda: lcattn.T5Bias(T5_WEIGHT, True, 1234), lambda: lcattn.T5Bias(T5_WEIGHT.clone(), True, 1234)),
}
T5_WEIGHT = torch.linspace(-3, 3, 64).reshape(32, 2)


@pytest.mark.parametrize("name", REMEMBERED)
@pytest.mark.parametrize("watcher", ["export", "fake"])
def test_what_a_mode_saw_is_not_remembered(name: str, watcher: str) -> None:
    seen, other = (make() for make in REMEMBERED[name])
    q = torch.randn(1, 2, 40, 16)

    class Call(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return lcattn.attention(q, q, q, layout=CAUSAL, position=seen)

    if watcher == "export":
        exported = torch.export.export(Call(), (q,), strict=False).module()
        torch.testing.assert_close(exported(q), Call()(q))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            Call()(mode.from_tensor(q))
    for backend in ("cpu", "reference"):
        found, right = (lcattn.attention(q, q, q, layout=CAUSAL, position=p, backend=backend) for p in (seen, other))
        assert type(found) is Tensor
        torch.testing.assert_close(found, right)


def run(
    f: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    parameters: Iterable[Tensor] = (),
    length: int | None = None,
) -> list[Tensor]:
    """The output of f and its gradients for floating inputs and parameters; `length` is marked dynamic."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    for leaf in leaves:
        for dim, size in enumerate(leaf.shape):
            if size == length:
                torch._dynamo.mark_dynamic(leaf, dim)
    out = f(*leaves)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    wanted = [x for x in leaves if x.requires_grad] + list(parameters)
    return [out.detach(), *torch.autograd.grad((out * probe).sum(), wanted)]


def check_lengths(
    f: Callable[..., Tensor],
    draw_inputs: Callable[[int], tuple[Tensor, ...]],
    parameters: Iterable[Tensor] = (),
) -> None:
    """f compiled whole gives eager's output and gradients at every length, from one graph."""
    parameters = list(parameters)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in LENGTHS:
            inputs = draw_inputs(T)
            state = torch.get_rng_state()
            # the kernel that turns rounds otherwise than the formula, which compiled graphs keep
            with unittest.mock.patch.object(rotary, "fuses_turns", return_value=False):
                expected = run(f, inputs, parameters)
            torch.set_rng_state(state)
            for got, want in zip(run(compiled, inputs, parameters, T), expected, strict=True):
                torch.testing.assert_close(got, want)


CHUNKS = (lcattn.Chunked(16) | lcattn.Global(3)) & lcattn.Causal()


@pytest.mark.parametrize(
    "position",
    [
        None,
        lcattn.RelativeBias(torch.randn(H, 32, requires_grad=True), -31),
        lcattn.T5Bias(torch.randn(32, H)),
        [lcattn.Rotary(), lcattn.Alibi.for_heads(H)],
        lcattn.Shaw(torch.randn(1, 17, D, requires_grad=True), -16),
        lcattn.TransformerXL(*(torch.randn(H, *n, D, requires_grad=True) for n in ((40,), (), ())), -39),
        lcattn.Disentangled(*(torch.randn(H, 16, D, requires_grad=True) for _ in range(2)), 30),
    ],
    ids=["none", "bias", "t5", "rotary_alibi", "shaw", "transformer_xl", "disentangled"],
)
def test_attention_compiles_once_for_five_lengths(position) -> None:
    held = vars(position).values() if hasattr(position, "__dict__") else ()
    tables = [t for t in held if isinstance(t, Tensor) and t.requires_grad]
    check_lengths(lambda q, k, v: lcattn.attention(q, k, v, layout=CHUNKS, position=position), draw, tables)


def test_masks_and_coordinates_compile_once() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, key_mask: Tensor, pos: Tensor) -> Tensor:
        layout = lcattn.Window(20, 5)
        return lcattn.attention(q, k, v, layout=layout, sink=sink, softcap=9.0, key_mask=key_mask, q_pos=pos, k_pos=pos)

    check_lengths(
        f,
        lambda T: (
            *draw(T, 2),
            torch.randn(H),
            torch.rand(B, T) < 0.8,
            torch.arange(T) + 5 * (torch.arange(T) > 9),
        ),
    )


def test_layouts_that_hold_tensors_compile_once() -> None:
    def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return lcattn.attention(q, k, v, layout=lcattn.Documents(ids=ids) & CHUNKS)

    def packed(q: Tensor, k: Tensor, v: Tensor, edges: Tensor) -> Tensor:
        return lcattn.attention(q, k, v, layout=lcattn.Documents(cu_seqlens=edges) & lcattn.Causal())

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return lcattn.attention(q, k, v, layout=lcattn.Blocks(mask, 1))

    check_lengths(documents, lambda T: (*draw(T), torch.randint(4, (B, T)).sort(1).values))
    check_lengths(packed, lambda T: (*draw(T), torch.tensor([0, 5, T // 2, T])))
    check_lengths(masked, lambda T: (*draw(T), torch.rand(B, 1, T, T) < 0.5))


def test_packed_documents_of_another_length_raise_when_compiled() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def packed(q: Tensor, k: Tensor, v: Tensor, edges: Tensor) -> Tensor:
        return lcattn.attention(q, k, v, layout=lcattn.Documents(cu_seqlens=edges))

    with pytest.raises(ValueError, match="Documents: cu_seqlens must end at S = 40, got 39"):
        packed(*draw(40), torch.tensor([0, 7, 39]))


def test_a_mask_mod_compiles_once() -> None:
    layout = lcattn.FromMaskMod(lambda b, h, q_idx, kv_idx: (q_idx * 3 + kv_idx + h) % 5 < 3)
    check_lengths(lambda q, k, v: lcattn.attention(q, k, v, layout=layout & lcattn.Causal()), draw)


def test_dropout_compiles_once_and_draws_as_eager() -> None:
    check_lengths(lambda q, k, v: lcattn.attention(q, k, v, layout=CHUNKS, dropout=0.4), draw)


def test_lse_and_merge_compile_once() -> None:
    def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = k.shape[2] // 2
        pos = torch.arange(k.shape[2])
        parts = [
            lcattn.attention_with_lse(q, k[:, :, at], v[:, :, at], layout=CHUNKS, q_pos=pos, k_pos=pos[at])
            for at in (slice(None, n), slice(n, None))
        ]
        return lcattn.merge(parts)[0]

    check_lengths(halves, draw)
    inputs = draw(40)
    whole = run(lambda q, k, v: lcattn.attention(q, k, v, layout=CHUNKS), inputs)
    for got, want in zip(run(halves, inputs), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


E = H * D


def sharpen(module: nn.Module) -> nn.Module:
    """Draws every matrix with a gain that gives scores of a standard deviation of 3 for normal inputs."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=(3**0.5 / E) ** 0.5 if parameter.dim() == 2 else 0.3)
    return module


def tokens(T: int) -> tuple[Tensor, ...]:
    return (torch.randn(B, T, E),)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "multihead": lambda: MultiheadAttention(E, H, batch_first=True, layout=CHUNKS, position=lcattn.Rotary()),
    "multihead_bias_kv": lambda: MultiheadAttention(E, H, batch_first=True, add_bias_kv=True, add_zero_attn=True),
    "chunked": lambda: ChunkedSelfAttention(E, H, 16, n_global=2, num_kv_heads=2),
    "encoder_layer": lambda: EncoderLayer(E, H, 16, causal=True, dropout=0.1),
}


def call(module: nn.Module, **kwargs) -> Callable[..., Tensor]:
    if isinstance(module, MultiheadAttention):
        return lambda x: module(x, x, x, **kwargs)[0]
    return lambda x: module(x, **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ["multihead", "multihead_bias_kv"])
def test_multihead_attention_compiles_once(name: str, need_weights: bool) -> None:
    module = sharpen(MODULES[name]())
    check_lengths(call(module, need_weights=need_weights), tokens, module.parameters())


@pytest.mark.parametrize("name", ["chunked", "encoder_layer"])
def test_chunked_modules_compile_once(name: str) -> None:
    module = sharpen(MODULES[name]())
    check_lengths(call(module), tokens, module.parameters())


def test_torch_masks_compile_once_and_are_checked_when_run() -> None:
    module = sharpen(MultiheadAttention(E, H, batch_first=True, layout=lcattn.Window(30, 30)))

    def f(x: Tensor, hidden: Tensor, padding: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
        return module(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]

    check_lengths(f, lambda T: (*tokens(T), torch.rand(T, T) < 0.3, torch.rand(B, T) < 0.2), module.parameters())

    def additive(x: Tensor, mask: Tensor) -> Tensor:
        return module(x, x, x, attn_mask=mask, need_weights=False)[0]

    for backend in ("aot_eager", "inductor"):
        with torch.no_grad(), pytest.raises(RuntimeError, match="attn_mask: a float mask may hold only 0 and -inf"):
            torch.compile(additive, fullgraph=True, backend=backend)(*tokens(40), torch.randn(40, 40))


@pytest.mark.parametrize("train", [True, False])
def test_an_encoder_with_our_attention_compiles_once(train: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(E, H, batch_first=True, layout=lcattn.Window(5, 5))
    encoder = sharpen(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train(train)
    check_lengths(encoder, tokens, encoder.parameters())


def test_inductor_trains_a_module_once_for_two_lengths() -> None:
    module = sharpen(ChunkedSelfAttention(E, H, 16, n_global=1, lookahead=1))
    compiled = torch.compile(module, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (37, 90):
            (x,) = tokens(T)
            expected = run(module, (x,), module.parameters())
            for got, want in zip(run(compiled, (x,), module.parameters(), T), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_export(name: str) -> None:
    module = sharpen(MODULES[name]()).eval()

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return call(self.module, **({"need_weights": False} if "multihead" in name else {}))(x)

    dynamic = {"x": {1: torch.export.Dim("length", min=2, max=4096)}}
    exported = torch.export.export(Call(), tokens(40), dynamic_shapes=dynamic)
    assert {f"module.{n}" for n in module.state_dict()} <= set(exported.state_dict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for T in LENGTHS:
        (x,) = tokens(T)
        torch.testing.assert_close(loaded(x), Call()(x))
