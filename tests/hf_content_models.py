"""Random DeBERTa and XLNet models, runs of them, and how what they give is compared."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as tf

import lcattn
from lcattn import layout as layouts
from lcattn.hf.masks import Conversion
from lcattn.hf.swap import find
from tests.hf_models import agree

B, T, VOCAB, HIDDEN, HEADS = 2, 61, 97, 48, 4
PADS = (0, 13)

DEBERTA = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2)
DEBERTA |= dict(num_attention_heads=HEADS, max_position_embeddings=128, relative_attention=True)
DEBERTA |= dict(position_biased_input=False, pos_att_type=["c2p", "p2c"], max_relative_positions=20)
_XLNET = dict(vocab_size=VOCAB, d_model=HIDDEN, n_layer=2, n_head=HEADS, d_inner=48, pad_token_id=0)
_XLNET |= dict(bos_token_id=1, eos_token_id=2)

DEBERTAS: dict[str, tuple[Any, Any]] = {
    "v2, log buckets": (tf.DebertaV2ForMaskedLM, tf.DebertaV2Config(**DEBERTA, position_buckets=8)),
    "v3": (
        tf.DebertaV2ForMaskedLM,
        tf.DebertaV2Config(
            **DEBERTA | dict(max_relative_positions=-1),
            position_buckets=12,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
    ),
    "v2, conv and absolute": (
        tf.DebertaV2ForMaskedLM,
        tf.DebertaV2Config(**DEBERTA | dict(position_biased_input=True), conv_kernel_size=3),
    ),
    "v2, c2p": (
        tf.DebertaV2ForMaskedLM,
        tf.DebertaV2Config(**DEBERTA | dict(pos_att_type=["c2p"]), position_buckets=9),
    ),
    "v2, p2c": (tf.DebertaV2ForMaskedLM, tf.DebertaV2Config(**DEBERTA | dict(pos_att_type=["p2c"]))),
    "v2, neither": (tf.DebertaV2ForMaskedLM, tf.DebertaV2Config(**DEBERTA | dict(pos_att_type=[]))),
    "v2, absolute": (
        tf.DebertaV2ForMaskedLM,
        tf.DebertaV2Config(**DEBERTA | dict(relative_attention=False, position_biased_input=True)),
    ),
    "v1": (tf.DebertaForMaskedLM, tf.DebertaConfig(**DEBERTA)),
    "v1, longer than the text": (tf.DebertaForMaskedLM, tf.DebertaConfig(**DEBERTA | dict(max_relative_positions=90))),
    "v1, p2c": (tf.DebertaForMaskedLM, tf.DebertaConfig(**DEBERTA | dict(pos_att_type=["p2c"]))),
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


def visible(layout: layouts.Layout, start: Tensor) -> Tensor:
    """Who sees whom under a layout whose coordinates count from start [B], [B, T, T] bool."""
    at = torch.arange(T)[None] - start[:, None]
    index = torch.arange(T)
    context = layouts.Context(torch.arange(B)[:, None, None], 0, T, T, index[:, None], index)
    return layout.visible(at[:, :, None], at[:, None, :], context).expand(B, T, T)


LAYOUT = lcattn.Chunked(16) | lcattn.Global(2)
