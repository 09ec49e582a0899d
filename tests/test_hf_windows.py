"""Encoders with windows of their own (Longformer, LED, LongT5, BigBird) on lcattn, against themselves as they are."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lcattn
from lcattn import hf
from lcattn.hf import swap
from tests import hf_models
from tests.hf_models import VOCAB, B, Largest, batch, generate, logits_agree
from tests.hf_window_models import MODELS, T, bird, compare, float64, make, marked


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
    with float64():
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
    with float64():
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
    want, _ = generate(model, inputs, **options)
    with float64():
        _, truth = generate(copy.deepcopy(model).double(), inputs, **options)
    got, ours = generate(hf.convert(copy.deepcopy(model)), inputs, **options)
    assert torch.equal(got, want)
    logits_agree(ours, truth, lambda: generate(model, inputs, **options)[1])


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
    with Largest() as largest, torch.no_grad():
        encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    # of the tokens times something: the embeddings, or LongT5's masks of three blocks
    assert largest.elements <= B * length * VOCAB < length * length


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
        model = hf_models.make(name)
        hf_models.compare(model, batch(model, "right"), ours=hf.convert)
        hf.check(hf.convert(model))
        hf.use(hf.convert(model), None)
        assert model.config._attn_implementation == hf_models.MODELS[name][2]
    model = hf.use(hf_models.make("bert"), lcattn.Chunked(8))
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
    with pytest.raises(TypeError, match=r"is no tensor.*asked for \["):
        hf.make_mask(B, T, T)[0]
    model = hf.convert(make("longt5 local"))
    layer = model.encoder.block[0].layer[0].LocalSelfAttention
    with pytest.raises(NotImplementedError, match="position_bias"):
        layer(torch.randn(B, T, 64), position_bias=torch.zeros(1, 1, 4, 12, 36))
    module, hidden, _, _ = bird(120)
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
