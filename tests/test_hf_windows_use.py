"""Encoders with windows of their own under other layouts, against dense attention or another window of theirs."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lcattn
from lcattn import hf
from lcattn.hf import swap
from tests.hf_models import PADS, B, agree, batch, logits_agree, results
from tests.hf_window_models import T, compare, float64, make, marked


def _longformer(module: Any, hidden: Tensor, mask: Tensor, layout: lcattn.Layout, alibi: lcattn.Alibi) -> Tensor:
    """Dense attention of a Longformer module under another layout and a position, [B, T, C] at real tokens."""
    pos = (mask >= 0).cumsum(1) - 1
    q_pos, k_pos = pos[:, :, None], pos[:, None, :]
    ctx = lcattn.layout.Context(0, 0, T, T, torch.arange(T)[:, None], torch.arange(T))
    is_global, real = mask > 0, mask >= 0
    seen = (layout.visible(q_pos, k_pos, ctx) | is_global[:, None, :]) & real[:, None, :]
    bias = -alibi.slopes.to(hidden.dtype)[:, None, None] * (k_pos - q_pos).abs()[:, None]

    def attend(query: nn.Linear, key: nn.Linear, value: nn.Linear, seen: Tensor) -> Tensor:
        q, k, v = (of(hidden).unflatten(2, (4, 16)).transpose(1, 2) for of in (query, key, value))
        scores = (q @ k.mT / 4 + bias).masked_fill(~seen[:, None], -torch.inf)
        # a padded query sees something, or its NaN would reach every gradient
        scores = torch.where(real[:, None, :, None], scores, 0)
        return (scores.softmax(3) @ v).transpose(1, 2).flatten(2)

    local = attend(module.query, module.key, module.value, seen)
    rows = attend(module.query_global, module.key_global, module.value_global, real[:, None, :].expand(-1, T, -1))
    return torch.where(is_global[..., None], rows, local)[real]


def test_use_replaces_the_window_and_keeps_global_tokens(seed: int) -> None:
    model = make("longformer")
    module = model.longformer.encoder.layer[0].attention.self
    real = torch.arange(T) >= torch.tensor(PADS)[:, None]
    mask = torch.where(real, 0.0, -1.0)
    mask[0, [3, 40]] = mask[1, 20] = 1.0
    layout, alibi = lcattn.Chunked(16, 1, 1) | lcattn.Global(2), lcattn.Alibi.for_heads(4)
    hf.use(model, layout, alibi)
    hidden, weight = 3 * torch.randn(B, T, 64), torch.randn(int(real.sum()), 64)

    def run(attend: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        x = hidden.to(dtype).requires_grad_()
        parameters = dict(module.to(dtype).named_parameters())
        out = attend(x)
        grads = torch.autograd.grad((out * weight.to(dtype)).sum(), [x, *parameters.values()])
        return {"out": out} | {f"d {n}": g for n, g in zip(("x", *parameters), grads, strict=True)}

    def dense(x: Tensor) -> Tensor:
        return _longformer(module, x, mask, layout, alibi)

    truth = run(dense, torch.float64)
    got = run(lambda x: module(x, mask)[0][real], torch.float32)
    agree(got, truth, lambda: run(dense, torch.float32))


def _narrowed(model: Any) -> Any:
    """The original with windows of four tokens to either side."""
    for module in model.modules():
        if hasattr(module, "one_sided_attn_window_size"):
            module.one_sided_attn_window_size = 4
        if hasattr(module, "local_radius"):
            module.local_radius, module.block_len = 4, 5
    return model


class _Encoder(nn.Module):
    """An encoder with logits and a loss."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, labels: Tensor, **inputs: Tensor) -> Any:
        logits = self.encoder(**inputs).last_hidden_state
        return tf.utils.ModelOutput(logits=logits, loss=(logits * labels.clamp(0)[..., None]).mean())


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["longformer", "led", "longt5 local", "longt5 global"])
def test_use_equals_another_window_of_the_original(name: str, padding: str, seed: int) -> None:
    model = make(name)
    inputs = marked(model, batch(model, padding, T))
    if model.config.is_encoder_decoder:
        # decoders have no window
        model = _Encoder(model.get_encoder())
        inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    compare(model, inputs, truth=_narrowed(copy.deepcopy(model)), ours=lambda m: hf.use(m, lcattn.Window(4, 4)))


@pytest.mark.parametrize("name", ["led", "longt5 global"])
def test_use_leaves_cross_attention_whole(name: str, seed: int) -> None:
    model = make(name)
    inputs = marked(model, batch(model, "right", T))
    narrow, positions = lcattn.Window(4, 4), torch.arange(T)
    offsets = positions - positions[:, None]
    seen = (offsets.abs() <= 4) & (offsets <= 0) & inputs["decoder_attention_mask"].bool()[:, None, None, :]
    encoder = {key: value for key, value in inputs.items() if key.endswith("attention_mask") and "decoder" not in key}

    def dense(run: Any) -> dict[str, Tensor]:
        encoded = _narrowed(run).get_encoder()(inputs["input_ids"], **encoder)
        mask = torch.zeros(seen.shape, dtype=run.dtype).masked_fill(~seen, torch.finfo(run.dtype).min)
        given = dict(encoder_outputs=encoded, decoder_attention_mask=mask)
        return results(run, inputs | given, inputs["attention_mask"])

    with float64():
        truth = dense(copy.deepcopy(model).double())
    agree(results(hf.use(copy.deepcopy(model), narrow), inputs), truth, lambda: dense(copy.deepcopy(model)))


def test_cross_attention_without_a_mask(seed: int) -> None:
    module = make("led").led.decoder.layers[0].encoder_attn
    ours = copy.deepcopy(module)
    ours.__class__ = swap.find(type(module))
    hidden, encoded = torch.randn(B, 20, 64), torch.randn(B, 31, 64)
    truth = copy.deepcopy(module).double()(hidden.double(), encoded.double())[0]
    logits_agree(ours(hidden, encoded)[0], truth, lambda: module(hidden, encoded)[0])


@pytest.mark.parametrize("name", ["bigbird", "bigbird_pegasus"])
def test_use_equals_full_attention_of_the_original(name: str, seed: int) -> None:
    model = make(name)
    inputs = batch(model, "left", T)
    full = copy.deepcopy(model)
    (full.bert if name == "bigbird" else full.model.encoder).set_attention_type("original_full")
    compare(model, inputs, truth=full, ours=lambda m: hf.use(m, lcattn.Full()))


def test_use_on_padded_equals_unpadded(seed: int) -> None:
    layout = lcattn.Chunked(16) | lcattn.Global(2)
    model = hf.use(make("longformer"), layout)
    inputs = marked(model, batch(model, "left", T))
    inputs.pop("labels")
    # learned positions are counted from the first token that is not padding
    inputs["input_ids"] *= inputs["attention_mask"]
    got = model(**inputs).logits
    for row, pads in enumerate(PADS):
        alone = {key: value[row : row + 1, pads:] for key, value in inputs.items()}
        torch.testing.assert_close(got[row, pads:], model(**alone).logits[0], rtol=1e-3, atol=1e-4)
