"""DeBERTa and DeBERTa-v2 on lcattn, against transformers' own modules in float64."""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as v2

from lcattn.hf.swap import find
from tests.hf_content_models import (
    DEBERTAS,
    HIDDEN,
    LAYOUT,
    PADS,
    B,
    T,
    compare,
    convert,
    in_float64,
    make_deberta,
    padding,
    reader,
    use,
    visible,
)
from tests.hf_models import agree


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
