"""DeBERTa and XLNet on lcattn: masks as they are read, memory, dropout, restoring, and what is refused."""

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

import lcattn
from lcattn import layout as layouts
from lcattn.hf.swap import SWAPS
from lcattn.hf.swap.given import read_mask
from tests.hf_content_models import DEBERTA, HIDDEN, VOCAB, B, T, convert, make_deberta, make_xlnet, padding, use


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
    config = tf.DebertaConfig(**DEBERTA, talking_head=True)
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
