"""DeBERTa, DeBERTa-v2 and XLNet on lcattn, against transformers' own modules in float64."""

import copy
import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as tf
from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as v2

import lcattn
from lcattn import layout as layouts
from lcattn.hf.masks import Conversion
from lcattn.hf.swap import SWAPS, find
from lcattn.hf.swap.given import read_mask
from tests.test_hf import agree

B, T, VOCAB, HIDDEN, HEADS = 2, 61, 97, 48, 4
PADS = (0, 13)

_DEBERTA = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2)
_DEBERTA |= dict(num_attention_heads=HEADS, max_position_embeddings=128, relative_attention=True)
_DEBERTA |= dict(position_biased_input=False, pos_att_type=["c2p", "p2c"], max_relative_positions=20)
_XLNET = dict(vocab_size=VOCAB, d_model=HIDDEN, n_layer=2, n_head=HEADS, d_inner=48, pad_token_id=0)
_XLNET |= dict(bos_token_id=1, eos_token_id=2)

DEBERTAS: dict[str, tuple[Any, Any]] = {
    "v2, log buckets": (tf.DebertaV2ForMaskedLM, tf.DebertaV2Config(**_DEBERTA, position_buckets=8)),
    "v3": (
        tf.DebertaV2ForMaskedLM,
        tf.DebertaV2Config(
            **_DEBERTA | dict(max_relative_positions=-1),
            position_buckets=12,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
    ),
    "v2, conv and absolute": (
        tf.DebertaV2ForMaskedLM,
        tf.DebertaV2Config(**_DEBERTA | dict(position_biased_input=True), conv_kernel_size=3),
    ),
    "v2, c2p": (
        tf.DebertaV2ForMaskedLM,
        tf.DebertaV2Config(**_DEBERTA | dict(pos_att_type=["c2p"]), position_buckets=9),
    ),
    "v2, p2c": (tf.DebertaV2ForMaskedLM, tf.DebertaV2Config(**_DEBERTA | dict(pos_att_type=["p2c"]))),
    "v2, neither": (tf.DebertaV2ForMaskedLM, tf.DebertaV2Config(**_DEBERTA | dict(pos_att_type=[]))),
    "v2, absolute": (
        tf.DebertaV2ForMaskedLM,
        tf.DebertaV2Config(**_DEBERTA | dict(relative_attention=False, position_biased_input=True)),
    ),
    "v1": (tf.DebertaForMaskedLM, tf.DebertaConfig(**_DEBERTA)),
    "v1, longer than the text": (tf.DebertaForMaskedLM, tf.DebertaConfig(**_DEBERTA | dict(max_relative_positions=90))),
    "v1, p2c": (tf.DebertaForMaskedLM, tf.DebertaConfig(**_DEBERTA | dict(pos_att_type=["p2c"]))),
}
XLNETS: dict[str, Any] = {
    "bi": tf.XLNetConfig(**_XLNET),
    "uni": tf.XLNetConfig(**_XLNET, attn_type="uni"),
    "same length": tf.XLNetConfig(**_XLNET, attn_type="uni", same_length=True),
    "clamped": tf.XLNetConfig(**_XLNET, clamp_len=9),
    "bi_data": tf.XLNetConfig(**_XLNET, bi_data=True),
}


class _Scores(TorchDispatchMode):
    """Standard deviation of what goes into each softmax, hidden keys aside."""

    def __init__(self) -> None:
        super().__init__()
        self.spreads: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._softmax.default:
            self.spreads.append(float(args[0][args[0] > -1e4].std()))
        return func(*args, **(kwargs or {}))


def far_from_uniform(model: Any, run: Callable[[Any], Any]) -> Any:
    """The model in eval mode, with weights under which every term of the scores counts."""
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rel_embeddings.weight"):
                parameter.normal_(0, 1)
            elif (".self." in name and name.endswith("weight")) or name.endswith(("attn.q", "attn.k", "attn.r")):
                parameter.normal_(0, 0.4)
            elif ".self." in name or name.endswith(("attn.v", "attn.o", "mask_emb")):
                parameter.normal_(0, 0.3)
            elif name.endswith(("_bias", "seg_embed", "word_embedding.weight", "word_embeddings.weight")):
                parameter.normal_(0, 1)
        with _Scores() as scores:
            run(model)
    assert min(scores.spreads) >= 3, scores.spreads
    return model


def make_deberta(name: str) -> Any:
    kind, config = DEBERTAS[name]
    model = kind(copy.deepcopy(config))
    ids = torch.randint(3, VOCAB, (B, T))
    return far_from_uniform(model, lambda model: model(input_ids=ids))


def make_xlnet(name: str) -> Any:
    model = tf.XLNetLMHeadModel(copy.deepcopy(XLNETS[name]))
    ids = torch.randint(3, VOCAB, (B, T))
    return far_from_uniform(model, lambda model: model(input_ids=ids, token_type_ids=ids % 3))


def convert(model: Any) -> Any:
    for module in model.modules():
        module.__class__ = find(type(module)) or type(module)
    return model


def use(model: Any, layout: layouts.Layout) -> Any:
    for module in convert(model).modules():
        module.__dict__["_lcattn"] = Conversion(layout)
    return model


def in_float64(model: Any) -> Any:
    model = copy.deepcopy(model).double()
    if isinstance(model, tf.XLNetLMHeadModel):
        # the two streams would multiply it as the float32 that it is made in
        make = model.transformer.relative_positional_encoding
        model.transformer.relative_positional_encoding = lambda *args, **kwargs: make(*args, **kwargs).double()
    return model


def results(model: Any, run: Callable[[Any], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Logits, loss and every parameter's gradient."""
    model.zero_grad()
    logits, loss = run(model)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "loss": loss} | {f"d {n}": g for n, g in grads.items()}


def compare(
    model: Any, run: Callable[[Any], tuple[Tensor, Tensor]], ours: Callable[[Any], Any] = convert, run_ours: Any = None
) -> None:
    """A model on lcattn against itself as it is, float64 the truth and float32 the budget."""
    truth = results(in_float64(model), run)
    got = results(ours(copy.deepcopy(model)), run_ours or run)
    agree(got, truth, lambda: results(model, run))


def padding(side: str | None, length: int = T, batch: int = B) -> Tensor:
    seen = torch.ones(batch, length, dtype=torch.long)
    for row, pads in enumerate(PADS[-batch:]):
        if side == "left":
            seen[row, :pads] = 0
        elif side == "right":
            seen[row, length - pads :] = 0
    return seen


def reader(
    seen: Tensor | None, logits_of: Tensor | None = None, length: int = T, batch: int = B, **more: Any
) -> Callable[[Any], Any]:
    """A run over random ids: logits and loss at the tokens of logits_of [B, T], all by default."""
    ids = torch.randint(3, VOCAB, (batch, length))
    if seen is not None:
        more["attention_mask"] = seen
    at = torch.ones(batch, length).bool() if logits_of is None else logits_of.bool()

    def run(model: Any) -> tuple[Tensor, Tensor]:
        # XLNet takes no mask of integers
        floats = {n: x.to(model.dtype) if n in ("attention_mask", "perm_mask") else x for n, x in more.items()}
        logits = model(input_ids=ids, **floats).logits[at]
        return logits, nn.functional.cross_entropy(logits, ids[at])

    return run


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", DEBERTAS)
def test_deberta_equals_transformers(name: str, side: str | None, seed: int) -> None:
    model = make_deberta(name)
    compare(model, reader(padding(side), padding(side)))


@pytest.mark.parametrize("length", [1, 2, 7, 128])
@pytest.mark.parametrize("name", ["v2, log buckets", "v1"])
def test_deberta_at_other_lengths(name: str, length: int, seed: int) -> None:
    compare(make_deberta(name), reader(None, length=length))


@pytest.mark.parametrize("name", ["v2, log buckets", "v1"])
def test_deberta_in_an_encoder_of_its_own(name: str, seed: int) -> None:
    # dense masks and positions, as transformers' encoders make them
    def attention_alone(model: Any) -> Any:
        for module in model.modules():
            if type(module) in (v1.DisentangledSelfAttention, v2.DisentangledSelfAttention):
                module.__class__ = find(type(module))
        return model

    compare(make_deberta(name), reader(padding("right"), padding("right")), attention_alone)


def encode(mask: Tensor, real: Tensor | None = None) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """A run of a DeBERTa encoder on random states, under a mask [B, T, T] or [B, T]."""
    states, arriving = torch.randn(B, T, HIDDEN), torch.randn(B, T, HIDDEN)

    def run(model: Any) -> tuple[Tensor, Tensor]:
        out = model(states.to(model.layer[0].intermediate.dense.weight.dtype), mask).last_hidden_state
        if real is not None:
            out = out[real.bool()]
        return out, (out * (arriving if real is None else arriving[real.bool()])).sum()

    return run


@pytest.mark.parametrize("name", ["v2, log buckets", "v1"])
def test_deberta_with_a_mask_by_pairs(name: str, seed: int) -> None:
    encoder = make_deberta(name).deberta.encoder
    mask = torch.rand(B, T, T) < 0.4
    mask |= torch.eye(T).bool()
    compare(encoder, encode(mask))


def test_deberta_with_queries_of_their_own(seed: int) -> None:
    model = make_deberta("v2, log buckets")
    x, queries = torch.randn(2, B, T, HIDDEN).unbind()

    def out(model: Any) -> dict[str, Tensor]:
        encoder, dtype = model.deberta.encoder, model.dtype
        module, rel = encoder.layer[0].attention.self, encoder.get_rel_embedding()
        mask = torch.ones(B, 1, T, T)
        return {"out": module(x.to(dtype), mask, query_states=queries.to(dtype), rel_embeddings=rel)[0]}

    agree(out(convert(copy.deepcopy(model))), out(in_float64(model)), lambda: out(model))


def test_a_mask_that_changes_is_read_again(seed: int) -> None:
    module = convert(make_deberta("v2, absolute")).deberta.encoder.layer[0].attention.self
    x, mask = torch.randn(1, T, HIDDEN), torch.ones(1, 1, 1, T)
    first = module(x, mask)[0]
    mask[..., 40:] = 0
    changed = module(x, mask)[0]
    assert not torch.allclose(first, changed)
    assert torch.equal(changed, module(x, mask.clone())[0])


_REAL = torch.arange(9) % 4 != 0


def _pattern(T: int, causal: bool, selves: bool) -> Tensor:
    """Of keys that _REAL or its complement hides, [2, T, 9]; queries stand at the end."""
    queries, keys = torch.arange(9 - T, 9)[:, None], torch.arange(9)
    seen = (
        torch.stack([_REAL, ~_REAL])[:, None] | (keys == queries) if selves else torch.stack([_REAL, ~_REAL])[:, None]
    )
    return seen & (keys <= queries) if causal else seen.expand(2, T, 9)


@pytest.mark.parametrize("T", [9, 5, 2])
@pytest.mark.parametrize("selves", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_found_in_dense_masks(causal: bool, selves: bool, T: int) -> None:
    seen = _pattern(T, causal, selves)
    mask = read_mask(seen, T)
    assert "Blocks" not in mask.layout.spec
    q_idx, k_idx = torch.arange(T)[:, None], torch.arange(9)
    context = layouts.Context(torch.arange(2)[:, None, None], 0, T, 9, q_idx, k_idx)
    found = mask.layout.visible(q_idx + 9 - T, k_idx, context).expand(2, T, 9)
    assert torch.equal(found if mask.key_mask is None else found & mask.key_mask[:, None], seen)
    # one bit more, and it is no padding
    other = seen.clone()
    other[1, -1, 0] ^= True
    layout = read_mask(other, T).layout
    assert torch.equal(layout.visible(q_idx + 9 - T, k_idx, context).expand(2, T, 9), other)


def test_masks_are_let_go(seed: int) -> None:
    model = convert(make_xlnet("bi"))
    kept = []
    model.transformer.layer[0].register_forward_pre_hook(
        lambda _, args, kwargs: kept.extend(weakref.ref(kwargs[n]) for n in ("attn_mask_h", "seg_mat")),
        with_kwargs=True,
    )
    ids = torch.randint(3, VOCAB, (B, T))
    model(ids, token_type_ids=ids % 2, attention_mask=padding("left").float()).logits.sum().backward()
    assert len(kept) == 2
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


@pytest.mark.parametrize("name", ["v2, log buckets", "v1", "xlnet"])
def test_inference_mode_first_and_training_after(name: str, seed: int) -> None:
    model = convert(make_xlnet("bi") if name == "xlnet" else make_deberta(name))
    ids, seen = torch.randint(3, VOCAB, (B, T)), padding("right").float()
    with torch.inference_mode():
        before = model(ids, attention_mask=seen).logits
    after = model(ids, attention_mask=seen).logits
    after.sum().backward()
    assert torch.equal(before, after.detach())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["v2, log buckets", "v1"])
def test_gradient_checkpointing(name: str, reentrant: bool, seed: int) -> None:
    model = make_deberta(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def ours(model: Any) -> Any:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return convert(model)

    compare(model, reader(padding("right"), padding("right")), ours)


def visible(layout: layouts.Layout, start: Tensor) -> Tensor:
    """Who sees whom under a layout whose coordinates count from start [B], [B, T, T] bool."""
    at = torch.arange(T)[None] - start[:, None]
    index = torch.arange(T)
    context = layouts.Context(torch.arange(B)[:, None, None], 0, T, T, index[:, None], index)
    return layout.visible(at[:, :, None], at[:, None, :], context).expand(B, T, T)


LAYOUT = lcattn.Chunked(16) | lcattn.Global(2)


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", ["v2, log buckets", "v1"])
def test_deberta_under_a_layout(name: str, side: str | None, seed: int) -> None:
    encoder = make_deberta(name).deberta.encoder
    seen = padding(side)
    start = torch.tensor(PADS if side == "left" else (0, 0))
    dense = visible(LAYOUT, start) & seen.bool()[:, None, :]
    # the same states, padding alone and the layout on the modules
    torch.manual_seed(seed + 1)
    states = encode(dense, seen)
    torch.manual_seed(seed + 1)
    ours = encode(seen, seen)
    compare(encoder, states, lambda m: use(m, LAYOUT), ours)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", ["v2, log buckets", "v3", "v1", "xlnet"])
def test_nothing_is_of_length_squared(name: str, seed: int) -> None:
    length = 1200
    if name == "xlnet":
        model, more = make_xlnet("bi"), {}
    else:
        model = make_deberta(name)
        more = {"attention_mask": torch.ones(1, length).index_fill(1, torch.arange(5), 0)}
    model = use(model, lcattn.Window(30, 30))
    ids = torch.randint(3, VOCAB, (1, length))
    with _Largest() as largest:
        model(input_ids=ids, **more).logits.sum().backward()
    assert largest.elements < length * length / 4


_XLNET_CASES = [
    (name, kinds, side) for name in ("bi", "uni") for kinds in (None, 1, 2, 4) for side in (None, "right", "left")
]
_XLNET_CASES += [
    (n, kinds, side) for n in ("same length", "clamped", "bi_data") for kinds, side in ((None, None), (2, "left"))
]


@pytest.mark.parametrize("name, segments, side", _XLNET_CASES)
def test_xlnet_equals_transformers(name: str, segments: int | None, side: str | None, seed: int) -> None:
    model = make_xlnet(name)
    # transformers adds padding to a causal mask in place, which only one row survives
    batch = 1 if side is not None and model.config.attn_type == "uni" else B
    more = {} if segments is None else {"token_type_ids": torch.randint(0, segments, (batch, T))}
    seen = None if side is None else padding(side, batch=batch)
    compare(model, reader(seen, batch=batch, **more))


@pytest.mark.parametrize("length", [1, 2, 8, 130])
def test_xlnet_at_other_lengths(length: int, seed: int) -> None:
    types = torch.randint(0, 2, (B, length))
    compare(make_xlnet("bi"), reader(None, length=length, token_type_ids=types))


@pytest.mark.parametrize("name", ["bi", "uni", "same length", "bi_data"])
@pytest.mark.parametrize("mem_len", [None, 40])
def test_xlnet_memories(name: str, mem_len: int | None, seed: int) -> None:
    model = make_xlnet(name)
    model.transformer.mem_len = mem_len
    batch = 1 if model.config.attn_type == "uni" else B
    parts = torch.randint(3, VOCAB, (3, batch, 33))
    masks = [padding(side, 33, batch) for side in ("left", None, "right")]
    types = torch.randint(0, 3, (3, batch, 33))

    def run(model: Any) -> tuple[Tensor, Tensor]:
        mems, losses, logits = None, [], []
        for ids, seen, kinds in zip(parts, masks, types, strict=True):
            out = model(ids, attention_mask=seen.to(model.dtype), token_type_ids=kinds, mems=mems, use_mems=True)
            mems = out.mems
            logits.append(out.logits)
            losses.append(nn.functional.cross_entropy(out.logits.flatten(0, 1), ids.flatten()))
        return torch.cat(logits, 1), torch.stack(losses).sum()

    compare(model, run)


def permuted(batch: int, predicted: int, others: bool) -> dict[str, Tensor]:
    """perm_mask and target_mapping of a random order; with others, all but the predicted see one another."""
    order = torch.stack([torch.randperm(T) for _ in range(batch)])
    rank = order.argsort(1)
    perm_mask = (rank[:, :, None] <= rank[:, None, :]).float()
    last = order[:, -predicted:]
    if others:
        is_predicted = torch.zeros(batch, T).scatter_(1, last, 1.0).bool()
        perm_mask = torch.where(is_predicted[:, :, None], perm_mask, is_predicted[:, None, :].float())
    return {"perm_mask": perm_mask, "target_mapping": nn.functional.one_hot(last, T).float()}


# under causality another order would leave some predicted tokens nothing to see
_ORDERS = [(name, order) for name in ("bi", "bi_data") for order in ("random", "random, others at once", "reading")]


@pytest.mark.parametrize("name, order", [*_ORDERS, ("uni", "reading")])
def test_xlnet_two_streams(name: str, order: str, seed: int) -> None:
    model = make_xlnet(name)
    batch = 1 if name == "uni" else B
    given = permuted(batch, 19, order == "random, others at once")
    if order == "reading":
        given["perm_mask"] = torch.eye(T).repeat(batch, 1, 1)
        given["target_mapping"] = nn.functional.one_hot(torch.arange(T - 19, T), T).float().repeat(batch, 1, 1)
    ids, kinds = torch.randint(3, VOCAB, (batch, T)), torch.randint(0, 2, (batch, T))
    labels = torch.randint(3, VOCAB, (batch, 19))

    def run(model: Any) -> tuple[Tensor, Tensor]:
        dense = {n: x.to(model.dtype) for n, x in given.items()}
        out = model(ids, token_type_ids=kinds, labels=labels, **dense)
        return out.logits, out.loss

    compare(model, run)


def test_xlnet_generates_the_same(seed: int) -> None:
    model = make_xlnet("bi")
    ids = torch.randint(3, VOCAB, (B, 9))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(ids, **options), convert(copy.deepcopy(model)).generate(ids, **options))


@pytest.mark.parametrize("side", [None, "left"])
def test_xlnet_under_a_layout(side: str | None, seed: int) -> None:
    model = make_xlnet("bi")
    seen = None if side is None else padding(side)
    start = torch.tensor(PADS if side == "left" else (0, 0))
    hidden = ~visible(LAYOUT, start)
    types = torch.randint(0, 2, (B, T))
    real = padding(side)
    torch.manual_seed(seed + 1)
    dense = reader(seen, real, perm_mask=hidden, token_type_ids=types)
    torch.manual_seed(seed + 1)
    compare(model, dense, lambda m: use(m, LAYOUT), reader(seen, real, token_type_ids=types))


@pytest.mark.parametrize("name", ["v2, log buckets", "v1", "xlnet"])
def test_dropout_is_applied_and_repeats(name: str, seed: int) -> None:
    model = make_xlnet("bi") if name == "xlnet" else make_deberta(name)
    convert(model).train()
    # in the weights alone, and in XLNet in r, which then differs within the batch
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if type(module) in SWAPS.values() and isinstance(getattr(module, "dropout", None), nn.Dropout):
            module.dropout.p = 0.4
    if name == "xlnet":
        model.transformer.dropout.p = 0.4
    ids = torch.randint(3, VOCAB, (B, T))

    def logits(at: int) -> Tensor:
        torch.manual_seed(at)
        return model(input_ids=ids).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(1), logits(2))
    assert logits(1).isfinite().all()


@pytest.mark.parametrize("name", ["v2, log buckets", "v1", "xlnet"])
def test_the_old_class_restores_the_model(name: str, seed: int) -> None:
    model = make_xlnet("bi") if name == "xlnet" else make_deberta(name)
    ids = torch.randint(3, VOCAB, (B, T))
    before = model(input_ids=ids).logits
    names = [n for n, _ in model.named_parameters()]
    convert(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert any(type(module) in SWAPS.values() for module in model.modules())
    back = {ours: theirs for theirs, ours in SWAPS.items()}
    for module in model.modules():
        module.__class__ = back.get(type(module), type(module))
    assert torch.equal(model(input_ids=ids).logits, before)


def _deberta_call(name: str, **changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        model = convert(make_deberta(name))
        module = model.deberta.encoder.layer[0].attention.self
        given = dict(attention_mask=torch.ones(B, 1, 1, T), rel_embeddings=model.deberta.encoder.get_rel_embedding())
        return module(torch.randn(B, T, HIDDEN), **given | changes)

    return call


def _talking() -> Any:
    config = tf.DebertaConfig(**_DEBERTA, talking_head=True)
    return convert(tf.DebertaForMaskedLM(config))(torch.randint(3, VOCAB, (B, T)))


def _xlnet_call(**given: Any) -> Callable[[], Any]:
    return lambda: convert(make_xlnet("bi"))(torch.randint(3, VOCAB, (B, T)), **given)


def _xlnet_module(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        module = convert(make_xlnet("bi")).transformer.layer[0].rel_attn
        given = dict(g=None, attn_mask_h=None, attn_mask_g=None, r=torch.randn(2 * T, B, HIDDEN), seg_mat=None)
        return module(torch.randn(T, B, HIDDEN), **given | changes)

    return call


_ALL = torch.arange(T).expand(B, T)
_FIRST = nn.functional.one_hot(torch.tensor([[4], [9]]), T).float()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (_deberta_call("v2, p2c", output_attentions=True), NotImplementedError, "output_attentions: expected False"),
        (_deberta_call("v1", output_attentions=True), NotImplementedError, "output_attentions: expected False"),
        (_deberta_call("v2, p2c", rel_embeddings=None), ValueError, "rel_embeddings: expected the encoder's"),
        (_deberta_call("v2, p2c", rel_embeddings=torch.zeros(39, 48)), ValueError, r"rel_embeddings: expected \[40, "),
        (_deberta_call("v1", rel_embeddings=torch.zeros(39, 48)), ValueError, r"rel_embeddings: expected \[40, "),
        (
            _deberta_call("v2, p2c", relative_pos=torch.zeros(1, T, T)),
            NotImplementedError,
            r"relative_pos: expected None or .* \[1, 61, 61\]",
        ),
        (_deberta_call("v1", relative_pos=_ALL[:1, :, None] - _ALL[:1, None] + 1), NotImplementedError, "relative_pos"),
        (
            _deberta_call("v2, p2c", query_states=torch.zeros(B, 3, HIDDEN)),
            NotImplementedError,
            "query_states: expected",
        ),
        (
            _deberta_call("v1", query_states=torch.zeros(B, T, HIDDEN)),
            NotImplementedError,
            "query_states: expected None",
        ),
        (_deberta_call("v1", attention_mask=torch.ones(B, T)), ValueError, r"attention_mask: expected \[B or 1, 1, 61"),
        (
            _deberta_call("v1", attention_mask=torch.ones(B, 1, 1, 9)),
            ValueError,
            r"attention_mask: .* got \[2, 1, 1, 9\]",
        ),
        (_talking, NotImplementedError, "talking_head"),
        (_xlnet_call(output_attentions=True), NotImplementedError, "output_attentions: expected False"),
        (_xlnet_call(token_type_ids=_ALL), NotImplementedError, "seg_mat: expected.* of 16 kinds at most"),
        (
            _xlnet_call(perm_mask=torch.ones(B, T, T), target_mapping=_FIRST),
            NotImplementedError,
            "perm_mask: 2 predicted tokens see no key",
        ),
        (
            _xlnet_module(attn_mask_h=torch.zeros(T, T, B)),
            ValueError,
            r"attn_mask: expected \[61 or 1, 61, B or 1, 1\]",
        ),
        (_xlnet_module(attn_mask_h=torch.full((T, T, B, 1), 0.5)), ValueError, "attn_mask: expected 0 where"),
        (_xlnet_module(seg_mat=torch.rand(T, T, B, 2).round()), NotImplementedError, "seg_mat: expected"),
        (_xlnet_module(r=torch.randn(T, B, HIDDEN)), ValueError, "r: expected offsets from -61 to 0 at least, 62 rows"),
    ],
)
def test_what_is_not_served_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
