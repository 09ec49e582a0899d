"""transformers on lcattn: layouts on existing models, against the same models under dense masks."""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as tf
from transformers import masking_utils as mu

import lcattn
from lcattn import hf
from tests.hf_models import (
    MODELS,
    PADS,
    PREFIX,
    T5,
    VOCAB,
    B,
    T,
    agree,
    batch,
    generate,
    logits_agree,
    make,
    odd,
    on,
    prefix_tuned,
    registered,
    results,
)

_registered = pytest.fixture(registered, scope="module", autouse=True)


def _dense(layout: lcattn.Layout, positions: Tensor, causal: bool) -> Tensor:
    """The layout at coordinates [B, T] as a [B, 1, T, T] mask, from its definition."""
    rows = torch.arange(positions.shape[1])
    q_pos, k_pos = positions[:, None, :, None], positions[:, None, None, :]
    ctx = lcattn.layout.Context(0, 0, len(rows), len(rows), rows[:, None], rows)
    seen = layout.visible(q_pos, k_pos, ctx)
    return seen & (k_pos <= q_pos) if causal else seen


_CHUNKS = lcattn.Chunked(16, lookback=1, lookahead=1) | lcattn.Global(3)


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "gpt2", "llama", "mistral", "modernbert", "gemma3", "gpt_oss", "t5"]
)
def test_use_equals_dense_mask(name: str, padding: str | None, seed: int) -> None:
    model = make(name)
    inputs = batch(model, padding)
    seen = inputs.get("attention_mask", torch.ones(B, T, dtype=torch.long))
    positions = seen.cumsum(1) - 1 if padding == "left" else torch.arange(T).expand(B, T)
    encoder = name in ("bert", "roberta", "modernbert", "t5")
    mask = _dense(_CHUNKS, positions, not encoder) & seen.bool()[:, None, None, :]
    mask |= torch.eye(T, dtype=torch.bool) & ~seen.bool()[:, None, :, None]
    if name == "t5":
        model = tf.T5EncoderModel(model.config).eval()
        model.encoder.load_state_dict(make("t5").encoder.state_dict())
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": seen}
    dense: Any = {"attention_mask": mask}
    if name in ("mistral", "modernbert", "gemma3", "gpt_oss"):
        # no window of the model's own is left
        kinds = getattr(model.config, "layer_types", None)
        dense = {"attention_mask": dict.fromkeys(set(kinds), mask) if kinds and name != "mistral" else mask}
    if name == "modernbert" or model.config._attn_implementation == "eager":
        model.set_attn_implementation("eager")
        low = torch.finfo(torch.float32).min
        floats = torch.zeros(mask.shape).masked_fill(~mask, low)
        kinds = dense["attention_mask"]
        dense = {"attention_mask": dict.fromkeys(kinds, floats) if isinstance(kinds, dict) else floats}

    def run(m: Any, extra: dict[str, Any]) -> dict[str, Tensor]:
        if name == "t5":
            return {"hidden": m(**inputs | extra).last_hidden_state[seen.bool()]}
        return results(m, inputs | extra, seen)

    truth = run(copy.deepcopy(model).double(), dense)
    got = run(hf.use(copy.deepcopy(model), _CHUNKS), {})
    agree(got, truth, lambda: run(copy.deepcopy(model), dense))
    with pytest.raises(AssertionError):
        agree(run(on(copy.deepcopy(model), "lcattn"), {}), truth, lambda: run(copy.deepcopy(model), dense))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_use_leaves_cross_attention_whole(name: str, seed: int) -> None:
    model = make(name)
    model.set_attn_implementation("sdpa")
    inputs = batch(model, "right")
    seen = inputs["attention_mask"]
    positions = torch.arange(T).expand(B, T)
    keys = seen.bool()[:, None, None, :]

    def dense(run: Any) -> dict[str, Tensor]:
        encoded = run.get_encoder()(inputs["input_ids"], attention_mask=_dense(_CHUNKS, positions, False) & keys)
        decoder_mask = _dense(_CHUNKS, positions, True) & keys
        return results(run, inputs | {"encoder_outputs": encoded, "decoder_attention_mask": decoder_mask})

    truth, trusted = dense(copy.deepcopy(model).double()), copy.deepcopy(model)
    agree(results(hf.use(model, _CHUNKS), inputs), truth, lambda: dense(trusted))


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_use_on_padded_equals_unpadded(name: str, seed: int) -> None:
    model = make(name)
    inputs = batch(model, "left")
    if name == "bert":
        # learned absolute positions count the padding
        starts = torch.tensor(PADS)[:, None]
        inputs["position_ids"] = (torch.arange(T) - starts).clamp(0)
    used = hf.use(copy.deepcopy(model), _CHUNKS)
    got = used(**inputs).logits
    for row, pads in enumerate(PADS):
        ids = inputs["input_ids"][row : row + 1, pads:]
        positions = torch.arange(T - pads)[None]
        call = dict(input_ids=ids, attention_mask=_dense(_CHUNKS, positions, name != "bert"))
        truth = copy.deepcopy(model).double()(**call).logits[0]
        logits_agree(got[row, pads:], truth, lambda call=call: model(**call).logits[0])


def test_use_on_packed_documents_restarts(seed: int) -> None:
    model = make("llama")
    lengths = (37, 5, 38)
    ids = torch.randint(3, VOCAB, (1, T))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = hf.use(copy.deepcopy(model), _CHUNKS)(ids, position_ids=positions, use_cache=False).logits[0]
    mask = _dense(_CHUNKS, positions, True) & (
        mu.find_packed_sequence_indices(positions)[:, None, :, None]
        == mu.find_packed_sequence_indices(positions)[:, None, None, :]
    )
    inputs = dict(attention_mask=mask, position_ids=positions)
    truth = copy.deepcopy(model).double()(ids, **inputs).logits[0]
    logits_agree(got, truth, lambda: model(ids, **inputs).logits[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_use_generates_as_it_reads(cache: str, padding: str | None, seed: int) -> None:
    """Decoding step by step gives the logits of one pass over the whole text."""
    trusted = make("llama")
    model = hf.use(copy.deepcopy(trusted), _CHUNKS)
    inputs = batch(model, padding, length=40)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
    sequences, logits = generate(model, inputs, cache_implementation=cache)
    seen = inputs.get("attention_mask", torch.ones(B, 40, dtype=torch.long))
    seen = nn.functional.pad(seen, (0, 12), value=1)
    positions = (seen.cumsum(1) - 1).clamp(0)
    mask = _dense(_CHUNKS, seen.cumsum(1) - 1, True) & seen.bool()[:, None, None, :]
    mask |= torch.eye(52, dtype=torch.bool)
    whole = dict(input_ids=sequences, attention_mask=mask, position_ids=positions)
    truth = copy.deepcopy(trusted).double()(**whole).logits[:, 39:51]
    logits_agree(logits.transpose(0, 1), truth, lambda: trusted(**whole).logits[:, 39:51])


def test_use_needs_a_cache_that_keeps_its_keys(seed: int) -> None:
    model = hf.use(make("mistral"), lcattn.Chunked(32))
    inputs = dict(input_ids=torch.randint(3, VOCAB, (1, 60)))
    with pytest.raises(ValueError, match="DynamicCache"):
        generate(model, inputs)
    sequences, logits = generate(model, inputs, past_key_values=tf.DynamicCache())
    read = model(sequences).logits[:, 59:-1]
    torch.testing.assert_close(logits.transpose(0, 1), read, rtol=1e-3, atol=1e-3)
    # what the cache still holds is enough for a narrower layout
    hf.use(model, lcattn.Window(10, 0))
    sequences, logits = generate(model, inputs)
    read = model(sequences).logits[:, 59:-1]
    torch.testing.assert_close(logits.transpose(0, 1), read, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_use_keeps_a_tuned_prefix_visible(name: str, padding: str | None, seed: int) -> None:
    model = prefix_tuned(name)
    inputs = batch(model, padding)
    inputs.pop("labels")
    seen = inputs.get("attention_mask", torch.ones(B, T, dtype=torch.long)).bool()
    tokens = _dense(_CHUNKS, seen.cumsum(1) - 1, name == "llama") & seen[:, None, None, :]
    mask = torch.cat([torch.ones(B, 1, T, PREFIX, dtype=torch.bool), tokens], 3)

    # the same pass through the plain model, given the prefix as keys and values
    def plain(model: Any, dtype: torch.dtype) -> Tensor:
        cache = model.to(dtype).get_prompt(B)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        out = model.get_base_model()(inputs["input_ids"], attention_mask=mask, past_key_values=cache)
        return out.logits[seen]

    truth = plain(copy.deepcopy(model), torch.float64)
    got = hf.use(copy.deepcopy(model), _CHUNKS)(**inputs).logits[seen]
    logits_agree(got, truth, lambda: plain(model, torch.float32))


def test_use_with_a_position(seed: int) -> None:
    model = make("llama")
    alibi = lcattn.Alibi.for_heads(4)
    inputs = batch(model, "left")

    def run(model: Any) -> dict[str, Tensor]:
        offsets = torch.arange(T) - torch.arange(T)[:, None]
        bias = -(alibi.slopes.to(model.dtype)[:, None, None] * offsets.abs())[None]
        hidden = (offsets > 0) | ~inputs["attention_mask"].bool()[:, None, None, :]
        bias = bias.masked_fill(hidden, torch.finfo(model.dtype).min)
        return results(model, inputs | {"attention_mask": bias}, inputs["attention_mask"])

    truth = run(copy.deepcopy(model).double())
    used = hf.use(copy.deepcopy(model), lcattn.Full(), alibi)
    agree(results(used, inputs), truth, lambda: run(copy.deepcopy(model)))


def test_use_replaces_and_restores(seed: int) -> None:
    for name in ("llama", "t5"):
        model = make(name)
        inputs = batch(model, None)
        before = model(**inputs).logits
        state = set(model.state_dict())
        wide = hf.use(model, lcattn.Full())(**inputs).logits
        assert hf.use(model, lcattn.Chunked(8)) is model
        assert not torch.allclose(wide, model(**inputs).logits)
        assert torch.equal(wide, hf.use(model, lcattn.Full())(**inputs).logits)
        assert set(model.state_dict()) == state
        assert hf.use(model, None) is model
        assert torch.equal(before, model(**inputs).logits)
        assert model.config._attn_implementation == MODELS[name][2]


def _refused() -> dict[str, Callable[[], Any]]:
    return {
        "umt5": lambda: tf.UMT5Model(tf.UMT5Config(**T5)),
        "MambaModel": lambda: tf.MambaModel(tf.MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1)),
        # not on the list of known ones: found out by its source
        "FunnelRelMultiheadAttention": lambda: tf.FunnelModel(
            tf.FunnelConfig(vocab_size=VOCAB, d_model=64, n_head=4, d_head=16, d_inner=64, block_sizes=[1, 1])
        ),
    }


@pytest.mark.parametrize("name", _refused())
def test_use_refuses_what_it_cannot_serve(name: str, seed: int) -> None:
    model = _refused()[name]()
    with pytest.raises(ValueError, match=name):
        hf.use(model, lcattn.Chunked(8))
    assert model.config._attn_implementation != "lcattn"
    assert not any("_lcattn" in module.__dict__ for module in model.modules())
    with pytest.raises(ValueError, match=name):
        hf.check(model)


def test_bad_arguments(seed: int) -> None:
    model = make("llama")
    with pytest.raises(TypeError, match="layout: expected a layout"):
        hf.use(model, "causal")
    with pytest.raises(ValueError, match="position: give a layout"):
        hf.use(model, None, lcattn.Alibi.for_heads(4))
    with pytest.raises(ValueError, match="additive position"):
        hf.use(model, lcattn.Full(), lcattn.Rotary())
    with pytest.raises(TypeError, match="transformers model"):
        hf.use(nn.Linear(2, 2), lcattn.Full())
    with pytest.raises(ValueError, match="runs on 'sdpa'"):
        hf.check(model)
    hf.check(hf.use(model, lcattn.Full()))
    hf.use(model, lcattn.FromMaskMod(odd))
    with pytest.raises(ValueError, match="plain indices from 0"):
        generate(model, dict(input_ids=torch.randint(3, VOCAB, (1, 8))))
    model = make("t5")
    model.set_attn_implementation("lcattn")
    with pytest.raises(NotImplementedError, match=r"lcattn\.hf\.use"):
        model(**batch(model, None))
    mask = hf.make_mask(B, T, T)
    q = torch.randn(B, 4, T, 16)
    with pytest.raises(ValueError, match="made for 2 x 80 queries"):
        hf.attention_forward(model, q[:, :, :40], q, q, mask)
    with pytest.raises(TypeError, match="attention_mask: expected"):
        hf.attention_forward(model, q, q, q, [mask])
    with pytest.raises(ValueError, match=r"expected \[B or 1, H or 1, 80, 80\]"):
        hf.attention_forward(model, q, q, q, torch.ones(B, 1, T, 40, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        hf.make_mask(B, T, T, attention_mask=torch.ones(B, T, T))


def test_positions_for_other_heads_leave_the_model_as_it_was(seed: int) -> None:
    model = make("llama")
    inputs = batch(model, None)
    before = model(**inputs).logits
    table = torch.zeros(1, 3, 8)
    for message, position in (
        ("slopes must have 4 heads, got 3", lcattn.Alibi(torch.ones(3))),
        ("table must have 4 heads", lcattn.RelativeBias(torch.zeros(3, 9), -4)),
        ("rel_key must have the head dim of q, 16", lcattn.Shaw(table, -1)),
    ):
        with pytest.raises(ValueError, match=message):
            hf.use(model, lcattn.Causal(), position)
        assert torch.equal(model(**inputs).logits, before) and model.config._attn_implementation != "lcattn"
    hf.use(model, lcattn.Causal(), lcattn.Alibi(torch.ones(4)))(**inputs)


def test_what_is_no_model_is_named() -> None:
    for call in (
        lambda: hf.use(None, lcattn.Causal()),
        lambda: hf.use(None, None),
        lambda: hf.convert(None),
        lambda: hf.check(nn.Linear(2, 2)),
    ):
        with pytest.raises(TypeError, match="model: expected a transformers model, got"):
            call()


def test_values_of_fewer_features(seed: int) -> None:
    """DeepSeek's latent attention: heads of 24 features for scores, 16 for values."""
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
    sizes |= dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2)
    trusted = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**sizes, num_key_value_heads=4)).eval()
    inputs = batch(trusted, "left")
    seen = inputs["attention_mask"]
    truth = results(copy.deepcopy(trusted).double(), inputs, seen)
    model = hf.convert(copy.deepcopy(trusted))
    agree(results(model, inputs, seen), truth, lambda: results(trusted, inputs, seen))
