"""Encoders with windows of their own (Longformer, LED, LongT5, BigBird) on lcattn, against themselves as they are."""

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lcattn
from lcattn import hf, ops
from lcattn.hf import swap
from lcattn.hf.swap.bigbird import ListedBlocks

from . import test_hf
from .conftest import SEED
from .test_hf import PADS, VOCAB, B, _generate, _Largest, agree, batch, logits_agree, results

# no multiple of a window or a block
T = 77

_BERT = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
_BERT |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=600)
_BART = dict(vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
_BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_T5 = dict(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
# smooth: at the kink of a ReLU rounding decides between two gradients
_T5 |= dict(feed_forward_proj="gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, local_radius=11)

_BIRD = dict(block_size=8, num_random_blocks=2, attention_type="block_sparse")

MODELS: dict[str, Any] = {
    "bigbird": (tf.BigBirdForMaskedLM, tf.BigBirdConfig(**_BERT, **_BIRD)),
    "bigbird full": (
        tf.BigBirdForMaskedLM,
        tf.BigBirdConfig(**_BERT, **_BIRD | dict(attention_type="original_full")),
    ),
    "bigbird decoder": (
        tf.BigBirdForCausalLM,
        tf.BigBirdConfig(**_BERT, **_BIRD | dict(attention_type="original_full"), is_decoder=True),
    ),
    "bigbird_pegasus": (
        tf.BigBirdPegasusForConditionalGeneration,
        tf.BigBirdPegasusConfig(**_BART, **_BIRD, decoder_start_token_id=2, max_position_embeddings=600),
    ),
    "longformer": (tf.LongformerForMaskedLM, tf.LongformerConfig(**_BERT, attention_window=[8, 16])),
    "led": (
        tf.LEDForConditionalGeneration,
        tf.LEDConfig(
            **_BART,
            attention_window=[16, 8],
            decoder_start_token_id=2,
            max_encoder_position_embeddings=600,
            max_decoder_position_embeddings=600,
        ),
    ),
    "longt5 local": (tf.LongT5ForConditionalGeneration, tf.LongT5Config(**_T5, encoder_attention_type="local")),
    "longt5 global": (
        tf.LongT5ForConditionalGeneration,
        tf.LongT5Config(**_T5, encoder_attention_type="transient-global", global_block_size=8),
    ),
}
_QUERIES = r"(\.q|query|query_global|q_proj)\.weight$"


@contextlib.contextmanager
def spreads(of_keys: int = 2) -> Iterator[list[float]]:
    """The standard deviation of the content scores of every call of the operator over `of_keys` keys or more."""
    found: list[float] = []
    plain = ops.attention

    def probe(problem: Any, backend: str) -> Any:
        q, k = problem.q[0], problem.k[0]
        if k.shape[2] >= of_keys:
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            found.append(float((q @ keys.mT * problem.scale).detach().std()))
        return plain(problem, backend)

    ops.attention = probe
    try:
        yield found
    finally:
        ops.attention = plain


def make(name: str) -> Any:
    """A small random model whose attention is far from uniform, in eval mode."""
    return copy.deepcopy(_made(name))


@functools.cache
def _made(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return _make(name)


def _make(name: str) -> Any:
    kind, config = MODELS[name]
    model = kind(copy.deepcopy(config)).eval()
    inputs = marked(model, batch(model, None, T))
    with torch.no_grad():
        for _ in range(30):
            with spreads() as found:
                hf.convert(model)(**inputs)
            hf.use(model, None)
            short = 4 / min(found)
            if short < 1.2:
                break
            for parameter_name, parameter in model.named_parameters():
                if re.search(_QUERIES, parameter_name):
                    parameter *= short
    assert min(found) >= 3, f"{name}: scores spread {found}"
    return model


def marked(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With global tokens, for models that take them: one at the first real token, another two in the first row."""
    if model.config.model_type in ("longformer", "led"):
        seen = inputs.get("attention_mask", torch.ones(B, T, dtype=torch.long))
        chosen = (seen.cumsum(1) == 1) & seen.bool()
        chosen[0, [33, 70]] = True
        inputs["global_attention_mask"] = chosen.long()
    return inputs


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Trusted modules in float64 throughout: some narrow their scores to float32 on the way."""
    softmax, narrow = nn.functional.softmax, Tensor.float
    nn.functional.softmax = lambda x, dim, dtype=None: softmax(x, dim)  # type: ignore[assignment]
    Tensor.float = lambda self: self if self.dtype == torch.float64 else narrow(self)  # type: ignore[method-assign]
    yield
    nn.functional.softmax, Tensor.float = softmax, narrow  # type: ignore[method-assign]


def compare(model: Any, inputs: dict[str, Any], truth: Any = None, ours: Any = hf.convert) -> None:
    """A converted model against a trusted one, itself by default: logits at real tokens, loss and all gradients."""
    seen = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    trusted = model if truth is None else truth
    with _float64():
        want = results(copy.deepcopy(trusted).double(), inputs, seen)
    converted = ours(copy.deepcopy(model))
    hf.check(converted)
    agree(results(converted, inputs, seen), want, lambda: results(copy.deepcopy(trusted), inputs, seen))


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_equals_original(name: str, padding: str | None, seed: int) -> None:
    model = make(name)
    compare(model, marked(model, batch(model, padding, T)))


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name: str, seed: int) -> None:
    model = make(name).bfloat16()
    inputs = marked(model, batch(model, "right", T))
    seen = inputs["attention_mask"].bool()
    with _float64():
        truth = copy.deepcopy(model).double()(**inputs).logits[seen]
    got = hf.convert(copy.deepcopy(model))(**inputs).logits[seen]
    assert got.dtype == torch.bfloat16
    logits_agree(got, truth, lambda: model(**inputs).logits[seen])


@pytest.mark.parametrize("name", ["longformer", "led"])
def test_without_global_tokens(name: str, seed: int) -> None:
    model = make(name)
    compare(model, batch(model, "right", T))


@pytest.mark.parametrize("length", [1, 2, 9, 17])
@pytest.mark.parametrize("name", MODELS)
def test_short_and_empty(name: str, length: int, seed: int) -> None:
    """Texts shorter than a window or a block, one of them nothing but padding."""
    model = make(name)
    inputs = batch(model, None, length)
    inputs["attention_mask"] = torch.tensor([[1], [0]]).expand(2, length)
    if model.config.is_encoder_decoder:
        inputs |= dict(decoder_input_ids=inputs["input_ids"], decoder_attention_mask=inputs["attention_mask"])
    inputs.pop("labels")
    seen = inputs["attention_mask"].bool()
    with _float64():
        truth = copy.deepcopy(model).double()(**inputs).logits[seen]
    converted = hf.convert(copy.deepcopy(model))
    got = converted(**inputs).logits
    logits_agree(got[seen], truth, lambda: copy.deepcopy(model)(**inputs).logits[seen])
    assert got.isfinite().all()
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in converted.parameters() if p.grad is not None)


def test_lora(seed: int) -> None:
    config = peft.LoraConfig(target_modules=["query", "value", "query_global"], init_lora_weights=False)
    model = peft.get_peft_model(make("longformer"), config).eval()
    inputs = marked(model, batch(model, "right", T))
    compare(model, inputs)
    hf.convert(model).merge_and_unload()
    assert isinstance(model.base_model.model.longformer.encoder.layer[0].attention.self.query, nn.Linear)


@pytest.mark.parametrize("name", ["led", "longt5 local", "longt5 global", "bigbird decoder"])
def test_generate_equals_original(name: str, seed: int) -> None:
    model = make(name)
    inputs = batch(model, "left" if "decoder" in name else "right", T)
    inputs = marked(model, {key: inputs[key] for key in ("input_ids", "attention_mask")})
    options = dict(max_new_tokens=8, min_new_tokens=8)
    want, _ = _generate(model, inputs, **options)
    with _float64():
        _, truth = _generate(copy.deepcopy(model).double(), inputs, **options)
    got, ours = _generate(hf.convert(copy.deepcopy(model)), inputs, **options)
    assert torch.equal(got, want)
    logits_agree(ours, truth, lambda: _generate(model, inputs, **options)[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["longformer", "longt5 global", "bigbird"])
def test_gradient_checkpointing(name: str, reentrant: bool, seed: int) -> None:
    model = _undropped(make(name))

    def ours(converted: Any) -> Any:
        converted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        converted.enable_input_require_grads()
        return hf.convert(converted)

    compare(model.train(), marked(model, batch(model, "right", T)), ours=ours)


def _undropped(model: Any) -> Any:
    """The model with no dropout in training."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("name", ["longformer", "led", "longt5 local", "longt5 global"])
def test_nothing_of_size_t_by_s(name: str, seed: int) -> None:
    model = hf.convert(make(name))
    length = 500
    inputs = batch(model, "left", length)
    inputs.pop("labels")
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    with _Largest() as largest, torch.no_grad():
        encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    # of the tokens times something: the embeddings, or LongT5's masks of three blocks
    assert largest.elements <= B * length * VOCAB < length * length


# layouts in place of windows


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

    with _float64():
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


# BigBird's blocks


def _bird(T: int, **options: Any) -> Any:
    """BigBird's module alone, its inputs [hidden, masks] with padding at both ends, and a weight for the loss."""
    options = dict(block_size=8, num_random_blocks=2, max_position_embeddings=4096) | options
    # without biases: the gradient of the keys' is 0 but for rounding, which has no size to be held to
    config = tf.BigBirdConfig(hidden_size=32, num_attention_heads=2, use_bias=False, **options)
    module = tf.models.big_bird.modeling_big_bird.BigBirdBlockSparseAttention(config, seed=int(torch.randint(99, ())))
    nn.init.normal_(module.query.weight, 0, 0.35)
    nn.init.normal_(module.key.weight, 0, 0.35)
    real = torch.ones(2, T)
    real[0, :5] = real[1, -11:] = 0
    blocked, *rest = tf.BigBirdModel.create_masks_for_block_sparse_attn(real, options["block_size"])
    return module, torch.randn(2, T, 32), (*rest, blocked, blocked), torch.randn(2, T, 32)


def _run_bird(module: Any, hidden: Tensor, masks: Any, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    module, x = copy.deepcopy(module).to(dtype), hidden.to(dtype).requires_grad_()
    out = module(x, *(mask.to(dtype) for mask in masks))[0]
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad((out * weight.to(dtype)).sum(), [x, *parameters.values()])
    return {"out": out} | {f"d {n}": g for n, g in zip(("x", *parameters), grads, strict=True)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (72, dict(num_random_blocks=1)),
        (120, {}),
        (200, dict(num_random_blocks=3)),
        (256, dict(block_size=32, num_random_blocks=1)),
        # the plans of the paper, which repeat blocks
        (1024, dict(block_size=64, num_random_blocks=3)),
        (1024, dict(block_size=64, num_random_blocks=3, max_position_embeddings=1024)),
    ],
)
def test_bigbird_plans(length: int, options: dict[str, Any], training: bool, seed: int) -> None:
    module, *inputs = _bird(length, **options)
    module.train(training)
    truth = _run_bird(module, *inputs, torch.float64)
    ours = copy.deepcopy(module)
    ours.__class__ = swap.find(type(module))
    with spreads(length) as found:
        got = _run_bird(ours, *inputs, torch.float32)
    assert min(found) >= 3
    agree(got, truth, lambda: _run_bird(module, *inputs, torch.float32))


def test_bigbird_counts_repeated_blocks_as_often_as_the_original(seed: int) -> None:
    module, *inputs = _bird(120)
    module.__class__ = swap.find(type(module))
    # in evaluation every random block is block 0, in training no block is drawn twice
    assert [times for times, _ in module.eval()._plan(120).again] == [2]
    assert module.train()._plan(120).again == ()
    hidden, masks, _ = inputs
    counted = module.eval()(hidden, *masks)[0]
    plan = module._plan(120)
    once = lcattn.attention(
        *(of(hidden).unflatten(2, (2, 16)).transpose(1, 2) for of in (module.query, module.key, module.value)),
        layout=plan.layout,
        key_mask=masks[2][:, 0, 0] > 0,
    )
    once = once.transpose(1, 2).flatten(2) * masks[1][:, 0]
    middle = slice(8, -8)
    assert not torch.allclose(counted[:, middle], once[:, middle], atol=1e-2)
    torch.testing.assert_close(counted[:, :8], once[:, :8])


def test_bigbird_leaves_random_numbers_of_numpy_alone(seed: int) -> None:
    module, hidden, masks, _ = _bird(120)
    module.__class__ = swap.find(type(module))
    np.random.seed(seed)
    want = np.random.random()
    np.random.seed(seed)
    module.train()(hidden, *masks)
    assert np.random.random() == want


def test_bigbird_without_a_seed_draws_anew(seed: int) -> None:
    module, hidden, masks, _ = _bird(200)
    module.__class__ = swap.find(type(module))
    module.train()
    assert torch.equal(module(hidden, *masks)[0], module(hidden, *masks)[0])
    module.seed = None
    assert not torch.equal(module(hidden, *masks)[0], module(hidden, *masks)[0])


def test_bigbird_keeps_its_layout_in_full_attention(seed: int) -> None:
    model = make("bigbird")
    full = copy.deepcopy(model)
    full.bert.set_attention_type("original_full")
    used = hf.use(model, lcattn.Window(3, 3))
    inputs = batch(model, None, 40)
    want = hf.use(full, lcattn.Window(3, 3))(**inputs).logits
    assert torch.equal(used(**inputs).logits, want)
    assert not torch.allclose(hf.use(used, lcattn.Full())(**inputs).logits, want)


@pytest.mark.parametrize("name", ["bigbird", "bigbird_pegasus"])
@pytest.mark.parametrize("used", [False, True])
def test_bigbird_turns_to_full_attention(name: str, used: bool, seed: int) -> None:
    model = make(name)
    trusted = copy.deepcopy(model)
    if used:
        hf.use(model, lcattn.Full())
        (trusted.bert if name == "bigbird" else trusted.model.encoder).set_attention_type("original_full")
    else:
        hf.convert(model)
    for length in (80, 40, 80):
        # a short text, and the long one after it
        inputs = batch(model, "right", length)
        seen = inputs["attention_mask"].bool()
        truth = copy.deepcopy(trusted).double()(**inputs).logits[seen]
        # kept, so that both remember a short text
        eager = trusted(**inputs).logits[seen]
        logits_agree(model(**inputs).logits[seen], truth, lambda eager=eager: eager)
        hf.check(model)
    inputs = batch(model, "right", 80)
    narrow = hf.use(copy.deepcopy(trusted), lcattn.Window(3, 3))(**inputs).logits
    hf.use(model, lcattn.Window(3, 3))
    assert torch.equal(model(**inputs).logits, narrow)
    hf.use(model, None)
    assert not any(swap.original(type(module)) or "_lcattn" in module.__dict__ for module in model.modules())
    inputs = batch(model, None, 80)
    assert torch.equal(model(**inputs).logits, trusted(**inputs).logits)


@pytest.mark.parametrize("block", [1, 8, 24, 64, 100])
def test_listed_blocks(block: int, seed: int) -> None:
    for length in (50, 64, 333):
        rows = -(-length // block)
        for heads in (1, 3):
            picks = torch.randint(-1, rows, (heads, rows, 4))
            layout = ListedBlocks(picks, block)
            mask = torch.zeros(1, heads, rows, rows + 1, dtype=torch.bool)
            mask[0].scatter_(2, torch.where(picks < 0, rows, picks), True)
            want = mask[..., :-1].repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :length, :length]
            table = lcattn.lowering.lower(layout, T=length, S=length, heads=heads)
            assert torch.equal(table.to_dense(length, length), want)
            again = lcattn.layout.from_spec(layout.spec, layout.tensors)
            assert torch.equal(
                lcattn.lowering.lower(again, T=length, S=length, heads=heads).to_dense(length, length), want
            )
    nothing = ListedBlocks(torch.full((1, rows, 2), -1), block)
    assert lcattn.lowering.lower(nothing, T=length, S=length).n_pairs() == 0
    with pytest.raises(ValueError, match="picks must be"):
        lcattn.attention(*[torch.zeros(1, 3, 7, 16)] * 3, layout=layout)
    with pytest.raises(ValueError, match="picks must be"):
        ListedBlocks(torch.zeros(3, 4), block)


# converting and restoring


@pytest.mark.parametrize("name", MODELS)
def test_convert_and_restore(name: str, seed: int, tmp_path: Path) -> None:
    model = make(name)
    inputs = marked(model, batch(model, None, T))
    before, state = model(**inputs).logits, model.state_dict()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"runs on 'eager'|lcattn\.hf\.convert"):
        hf.check(model)
    assert hf.convert(model) is model
    hf.check(model)
    ours = model(**inputs).logits
    assert torch.equal(ours, hf.convert(model)(**inputs).logits)
    assert model.state_dict().keys() == state.keys()
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.architectures == [classes[0].__name__]
    assert torch.equal(again.eval()(**inputs).logits, before)
    copied = copy.deepcopy(model)
    for restored in (model, copied):
        assert hf.use(restored, None) is restored
        assert [type(module) for module in restored.modules()] == classes
        assert restored.config._attn_implementation == "eager"
        assert torch.equal(restored(**inputs).logits, before)


def test_convert_models_of_the_interface(seed: int) -> None:
    for name in ("bert", "t5"):
        model = test_hf.make(name)
        test_hf.compare(model, batch(model, "right"), ours=hf.convert)
        hf.check(hf.convert(model))
        hf.use(hf.convert(model), None)
        assert model.config._attn_implementation == test_hf.MODELS[name][2]
    model = hf.use(test_hf.make("bert"), lcattn.Chunked(8))
    inputs = batch(model, None)
    narrow = model(**inputs).logits
    assert not torch.allclose(narrow, hf.convert(model)(**inputs).logits)


def test_all_or_nothing(seed: int) -> None:
    model = make("led")

    class OddAttention(tf.models.led.modeling_led.LEDDecoderAttention):
        pass

    model.led.decoder.layers[1].encoder_attn.__class__ = OddAttention
    classes = [type(module) for module in model.modules()]
    for change in (hf.convert, lambda m: hf.use(m, lcattn.Full())):
        with pytest.raises(ValueError, match=r"OddAttention \(led\.decoder\.layers\.1\.encoder_attn\) computes"):
            change(model)
        assert [type(module) for module in model.modules()] == classes
        assert model.config._attn_implementation == "eager"
        assert not any("_lcattn" in module.__dict__ for module in model.modules())
    with pytest.raises(TypeError, match="transformers model"):
        hf.convert(nn.Linear(2, 2))


@pytest.mark.parametrize("name", MODELS)
def test_attention_weights_are_refused(name: str, seed: int) -> None:
    model = hf.convert(make(name))
    inputs = marked(model, batch(model, None, T))
    with pytest.raises(NotImplementedError, match="output_attentions=True is not supported"):
        model(**inputs, output_attentions=True)
    hf.use(model, None)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"config\.output_attentions"):
        hf.convert(model)


def test_dilation_is_refused(seed: int) -> None:
    model = make("longformer")
    inputs = batch(model, None, T)
    model.config.attention_dilation = [1, 1]
    hf.convert(model)(**inputs)
    model.config.attention_dilation = [1, 2]
    with pytest.raises(ValueError, match=r"attention_dilation is 2 in layer 1.*Dilated\(8, 8, 2\)"):
        model(**inputs)
    hf.use(model, lcattn.Dilated(8, 8, 2))(**inputs)


def test_bad_arguments(seed: int) -> None:
    with pytest.raises(TypeError, match=r"expected the index \[:, 0, 0, :\]"):
        hf.make_mask(B, T, T)[0]
    model = hf.convert(make("longt5 local"))
    layer = model.encoder.block[0].layer[0].LocalSelfAttention
    with pytest.raises(NotImplementedError, match="position_bias"):
        layer(torch.randn(B, T, 64), position_bias=torch.zeros(1, 1, 4, 12, 36))
    module, hidden, _, _ = _bird(120)
    module.__class__ = swap.find(type(module))
    for length in (119, 32):
        with pytest.raises(ValueError, match=f"multiple of 8 tokens, 40 at least, got {length}"):
            module(hidden[:, :length])


# dropout


@pytest.mark.parametrize("name", ["longformer", "led", "longt5 local", "longt5 global", "bigbird full"])
def test_dropout_has_the_statistics_of_the_original(name: str, seed: int) -> None:
    """Mean and variance over many draws, elementwise: dropout of weights changes an output by its expectation of 0."""
    model = make(name)
    pattern = "SelfAttention|LocalAttention|GlobalAttention|LEDDecoderAttention"
    theirs = next(m for m in model.modules() if re.search(pattern, type(m).__name__) and swap.find(type(m)))
    ours = copy.deepcopy(theirs)
    ours.__class__ = swap.find(type(theirs))
    mask: dict[str, Any] = {}
    length = 48
    if "mask" in inspect.signature(type(theirs).forward).parameters:
        seen = torch.ones(1, length)
        local = tf.models.longt5.modeling_longt5._get_local_attention_mask(seen, 12, seen.device)
        mask = dict(mask=local if "local" in name else seen)
    elif "is_index_masked" in inspect.signature(type(theirs).forward).parameters:
        marks = torch.zeros(1, length)
        marks[0, [0, 30]] = 1
        mask = dict(
            attention_mask=marks, is_index_masked=marks < 0, is_index_global_attn=marks > 0, is_global_attn=True
        )
    hidden = torch.randn(1, length, 64)
    draws = 200
    found = []
    for module in (theirs, ours):
        if isinstance(module.dropout, nn.Dropout):
            module.dropout.p = 0.3
        else:
            module.dropout = 0.3
        with torch.no_grad():
            certain = module.eval()(hidden, **mask)[0]
            module.train()
            outs = torch.stack([module(hidden, **mask)[0] for _ in range(draws)])
        # 5 standard errors, for thousands of elements
        error = outs.std(0) / draws**0.5
        assert ((outs.mean(0) - certain).abs() <= 5 * error + 1e-5).all()
        found.append(outs.var(0).mean())
    assert 0.9 < found[0] / found[1] < 1.1
