"""lcattn eval: readings as they are named, put on a model and taken off."""

import os
import re

import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as tf

from lcattn import dispatch, hf, tolerance
from lcattn.evaluate import loss, recall, sources
from lcattn.evaluate.readings import METHODS, Reading, parse_all
from lcattn.hf.extend import METHODS as EXTENDERS
from lcattn.layout import Full, from_spec
from tests.evaluate_models import TRAINED, in_double, log_p, make_model


def test_readings_are_parsed_and_named() -> None:
    spec = "(Chunked(1024, 1) | Global(4))"
    for text, layout, expected in [
        ("plain", None, Reading("plain")),
        ("plain", spec, Reading("plain", (), from_spec(spec))),
        ("plain:attention=lcattn", None, Reading("plain", (), Full())),
        ("plain:attention=sdpa", spec, Reading("plain")),
        (f" yarn:factor=2.5, layout={spec}", "Full()", Reading("yarn", (("factor", 2.5),), from_spec(spec))),
        ("dual_chunk:chunk=4096,local=1024", None, Reading("dual_chunk", (("chunk", 4096), ("local", 1024)))),
        ("self_extend:kind=a", None, Reading("self_extend", (("kind", "a"),))),
    ]:
        found = Reading.parse(text, layout)
        assert found.describe() == expected.describe()
        assert Reading.parse(found.name).describe() == expected.describe()
    assert Reading.parse("yarn:factor=4").name == "yarn:factor=4"
    assert sorted(METHODS) == sorted(["plain", *EXTENDERS])


@pytest.mark.parametrize(
    "text, message",
    [
        ("yarm", "expected one of plain, linear, dynamic, yarn, dual_chunk, self_extend, rerope, got 'yarm'"),
        ("", "expected one of plain"),
        ("dual_chunk:chunk", "expected dual_chunk:key=value,key=value"),
        ("dual_chunk:chunk=", "expected dual_chunk:key=value"),
        ("yarn:factor=2,factor=3", "factor twice"),
        ("plain:chunk=4", "plain takes no chunk"),
        ("plain:attention=flash", "sdpa or lcattn, got 'flash'"),
        ("rerope:attention=sdpa", "rerope runs on lcattn"),
        ("plain:layout=Chunky(3)", "unknown ['Chunky']"),
        ("plain:layout=Chunked()", "chunk"),
    ],
)
def test_readings_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Reading.parse(text)


def test_a_reading_twice() -> None:
    with pytest.raises(ValueError, match="plain is given twice"):
        parse_all(["plain", "plain:attention=sdpa"], None)


def test_a_reading_is_put_on_and_taken_off() -> None:
    model, tokens = make_model(), torch.randint(1, 256, (1, 90))
    source = sources.Source("small", model, None, TRAINED)
    before = loss.read(model, tokens)
    with Reading.parse("plain:layout=Chunked(16, 1)").put_on(source, 90):
        assert model.config._attn_implementation == "lcattn"
        chunked = loss.read(model, tokens)
    assert model.config._attn_implementation == "sdpa" and torch.equal(loss.read(model, tokens), before)
    assert float((chunked - before)[32:].abs().max()) > 1e-2
    with pytest.raises(ZeroDivisionError), Reading.parse("plain:layout=Chunked(16, 1)").put_on(source, 90):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    with (
        pytest.raises(ValueError, match=r"yarn stretches the 64 tokens .* got 64"),
        Reading.parse("yarn").put_on(source, TRAINED),
    ):
        pass


@pytest.mark.parametrize(
    "text, attention",
    [
        ("yarn", "sdpa"),
        ("linear:factor=4", "sdpa"),
        ("dynamic:attention=lcattn", "lcattn"),
        ("yarn:layout=Chunked(32, 1)", "lcattn"),
        ("dual_chunk:chunk=40,local=16", "lcattn"),
        ("self_extend:window=16,layout=Chunked(64, 1)", "lcattn"),
        ("rerope:window=30", "lcattn"),
    ],
)
def test_extended_readings_are_those_of_extend(text: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is what `hf.extend` makes of the model, and the model is itself again afterwards."""
    model, tokens = make_model(), torch.randint(1, 256, (1, 150))
    source = sources.Source("small", model, None, TRAINED)
    before, reading = loss.read(model, tokens), Reading.parse(text)
    with reading.put_on(source, 150):
        assert model.config._attn_implementation == attention
        got = loss.read(model, tokens)
        greedy = recall.continue_greedily(model, tokens[:, :100], 6).tokens
        trusted = model.generate(tokens[:, :100], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 100:]
        assert list(greedy) == trusted.tolist()
    assert model.config._attn_implementation == "sdpa" and model.config.max_position_embeddings == TRAINED
    assert torch.equal(loss.read(model, tokens), before)
    assert float((got - before).abs().max()) > 1e-2

    def extended() -> dict[str, Tensor]:
        hf.extend(model, to=150, method=reading.method, layout=reading.layout, **dict(reading.options))
        try:
            return {"losses": -log_p(model, tokens)}
        finally:
            hf.use(model, None)

    monkeypatch.setattr(dispatch, "preferred", "reference")
    tolerance.check({"losses": got}, in_double(model, extended), extended)


@pytest.mark.parametrize(
    "text, message",
    [
        ("dual_chunk:chunks=3", "options: dual_chunk takes chunk, local, got chunks"),
        ("dual_chunk:chunk=1000", "more than the trained 64"),
        ("yarn:factor=0.5", "factor"),
        ("rerope:window=a", "window"),
    ],
)
def test_readings_that_the_model_refuses(text: str, message: str) -> None:
    model = make_model()
    with (
        pytest.raises(ValueError, match=message),
        Reading.parse(text).put_on(sources.Source("small", model, None, TRAINED), 150),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_positions_for_the_text() -> None:
    model = tf.AutoModelForCausalLM.from_config(
        tf.GPT2Config(n_positions=TRAINED, n_embd=32, n_layer=1, n_head=2, vocab_size=9)
    )
    source = sources.Source("absolute", model.eval(), None, TRAINED)
    with (
        pytest.raises(ValueError, match="plain: absolute has no positions for so many tokens"),
        Reading("plain").put_on(source, 65),
    ):
        loss.read(model, torch.zeros(1, 65, dtype=torch.long))
