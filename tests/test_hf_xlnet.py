"""XLNet on lcattn, against transformers' own modules in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hf_content_models import (
    LAYOUT,
    PADS,
    VOCAB,
    B,
    T,
    compare,
    convert,
    make_xlnet,
    padding,
    reader,
    use,
    visible,
)

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
