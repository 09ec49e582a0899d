"""`lcattn.hf.extend` on models of every kind: what it serves, what it refuses, and what it leaves as it was."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import lcattn
from lcattn import hf
from tests.extend_models import OPTIONS, TINY, make
from tests.hf_models import registered

_registered = pytest.fixture(registered, scope="module", autouse=True)


def test_attention_factor_of_a_model_leaves_windows_as_they_are() -> None:
    model, ids = make("gemma3"), torch.randint(3, 90, (1, 60))
    plain = hf.extend(model, 90, "self_extend", **OPTIONS["self_extend"])(ids).logits
    sharp = hf.extend(model, 90, "self_extend", **OPTIONS["self_extend"], attention_factor=1.3)(ids).logits
    assert not torch.allclose(plain, sharp, atol=1e-3)
    local, full = (layer.self_attn.__dict__["_lcattn"].position[0] for layer in model.model.layers)
    assert local.attention_factor == 1 and full.rotary.attention_factor == 1.3
    torch.testing.assert_close(hf.extend(model, 90, "self_extend", **OPTIONS["self_extend"])(ids).logits, plain)


def test_bad_input_leaves_the_model_as_it_was() -> None:
    model = make("llama")
    ids = torch.randint(3, 90, (1, 30))
    before = model(ids).logits
    table = torch.zeros(1, 4, 4)
    trained = lcattn.Rotary(rope_parameters={"max_position_embeddings": 16})
    for message, call in (
        ("more than the trained 32", lambda: hf.extend(model, 100, "dual_chunk", chunk=30, local=3)),
        ("more than the trained 32", lambda: hf.extend(model, 1000, "self_extend", group=5, window=16)),
        ("more than the trained 32", lambda: hf.extend(model, 100, "rerope", window=32)),
        ("local must be at most chunk", lambda: hf.extend(model, 100, "dual_chunk", chunk=3, local=9)),
        ("chunk must be an integer", lambda: hf.extend(model, 100, "dual_chunk", chunk=0, local=1)),
        ("method: expected one of", lambda: hf.extend(model, 100, "magic")),
        ("attention_factor must be a positive", lambda: hf.extend(model, 100, "rerope", window=16, attention_factor=0)),
        ("options: yarn takes factor, got attention", lambda: hf.extend(model, 100, "yarn", attention_factor=1.1)),
        ("Rotary: attention_factor must be", lambda: lcattn.Rotary(attention_factor=math.inf)),
        ("Rotary: attention_factor must be", lambda: lcattn.Rotary(attention_factor="1.07")),
        ("options: rerope takes window, got group", lambda: hf.extend(model, 100, "rerope", group=3)),
        ("to must be an integer", lambda: hf.extend(model, 0)),
        ("yarn: factor must be at least 1", lambda: hf.extend(model, 100, "yarn", factor=0.5)),
        ("yarn: factor must be a positive number, got inf", lambda: hf.extend(model, 100, "yarn", factor=math.inf)),
        ("chunk must be an integer >= 1, got 'a'", lambda: hf.extend(model, 100, "dual_chunk", chunk="a")),
        ("local must be less than the trained length, 32", lambda: hf.extend(model, 100, "dual_chunk", local=32)),
        ("rotary must be a Rotary, got 500.0", lambda: lcattn.DualChunk(8, 4, 500.0)),
        ("two_sided must be True or False, got 3", lambda: lcattn.ReRoPE(8, two_sided=3)),
        ("must be at most the trained length, 16", lambda: lcattn.DualChunk(12, 8, trained)),
        ("min_offset must be an integer of 32 bits", lambda: lcattn.Shaw(table, None)),
        ("min_offset must be an integer of 32 bits", lambda: lcattn.RelativeBias(table[:, :, 0], 1 << 40)),
        (
            "max_offset must be an integer",
            lambda: lcattn.TransformerXL.sinusoid(table[0], *[table[0, :1]] * 2, 0, None),
        ),
        ("no rotary positions", lambda: hf.extend(tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)), 100)),
        ("group must be an integer", lambda: lcattn.SelfExtend(0, 4)),
        ("window must be an integer", lambda: lcattn.ReRoPE(-1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="expected a layout"):
        hf.extend(model, 100, layout="Full()")
    with pytest.raises(TypeError, match="expected a transformers model, got NoneType"):
        hf.extend(None, 100)
    with pytest.raises(TypeError, match="got the class Shaw"):
        lcattn.attention(*[torch.zeros(1, 1, 2, 4)] * 3, position=lcattn.Shaw)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("method", ["linear", "dynamic", "yarn"])
def test_scaled_frequencies_are_not_scaled_again(method: str) -> None:
    model = make("llama")
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model.config.rope_parameters |= {"rope_type": "llama3", "factor": 2.0} | more
    model = type(model)(model.config).eval()
    ids = torch.randint(3, 90, (1, 30))
    before = model(ids).logits
    with pytest.raises(ValueError, match=f"{method} can't scale positions of rope_type 'llama3' again"):
        hf.extend(model, 100, method)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("method", ["dual_chunk", "yarn"])
def test_an_extended_model_is_saved_as_it_was(tmp_path: Path, method: str) -> None:
    model = make("llama")
    ids = torch.randint(3, 90, (1, 60))
    plain = model(ids).logits
    hf.extend(model, 90, method)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == 32
    assert torch.equal(loaded(ids).logits, plain)


GPT2 = dict(vocab_size=90, n_embd=32, n_layer=1, n_head=2)


MLA = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
MLA |= dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_convention_is_refused(dtype: torch.dtype) -> None:
    """However mild the attention, and so however little the text shows of it."""
    model = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**TINY | MLA)).eval().to(dtype)
    ids = torch.randint(3, 90, (1, 30))
    before = model(ids).logits
    with pytest.raises(ValueError, match="in a way that is not supported"):
        hf.extend(model, 100, "dual_chunk", **OPTIONS["dual_chunk"])
    assert torch.equal(model(ids).logits, before)


GQA = dict(num_key_value_heads=2, head_dim=16)
INTERLEAVED: dict[str, tuple[Any, Any]] = {
    "cohere": (tf.CohereForCausalLM, tf.CohereConfig(**TINY, num_key_value_heads=2)),
    "cohere_norm": (tf.CohereForCausalLM, tf.CohereConfig(**TINY, num_key_value_heads=2, use_qk_norm=True)),
    "cohere2": (tf.Cohere2ForCausalLM, tf.Cohere2Config(**TINY | GQA, sliding_window=8, sliding_window_pattern=2)),
    "glm": (tf.GlmForCausalLM, tf.GlmConfig(**TINY | GQA)),
    "glm4": (tf.Glm4ForCausalLM, tf.Glm4Config(**TINY | GQA)),
    "helium": (tf.HeliumForCausalLM, tf.HeliumConfig(**TINY | GQA)),
    "ernie4_5": (tf.Ernie4_5ForCausalLM, tf.Ernie4_5Config(**TINY | GQA)),
}


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_pairs_are_read_too(name: str, scale: int) -> None:
    kind, config = INTERLEAVED[name]
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
                parameter.mul_(scale)
                # a norm that weighs every feature otherwise
                parameter.mul_(1 + torch.rand_like(parameter))
    ids = torch.randint(3, 90, (2, 60))
    plain = model(ids).logits
    extended = hf.extend(model, 90, "dual_chunk", **OPTIONS["dual_chunk"])
    # one chunk is read as the model reads it
    torch.testing.assert_close(extended(ids[:, :20]).logits, plain[:, :20], rtol=1e-4, atol=1e-5)
    whole = extended(ids).logits
    start = extended(ids[:, :25], use_cache=True)
    parts = [start.logits]
    for at in range(25, 60):
        parts.append(extended(ids[:, at : at + 1], past_key_values=start.past_key_values).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)
    assert torch.equal(hf.use(model, None)(ids).logits, plain)
    # rounding hides no convention: layers come out alike
    chosen = [_turned(hf.extend(model.to(dtype), 90)) for dtype in (torch.float32, torch.bfloat16)]
    assert chosen[0] == chosen[1] and any(hooked for hooked, _ in chosen[0])


def _turned(model: Any) -> list[tuple[bool, int]]:
    """Of each attention: whether its projections or norms reorder features, and how many positions it has."""
    modules = [module for module in model.modules() if "_lcattn" in module.__dict__]
    hooked = [any(part._forward_hooks for part in module.modules()) for module in modules]
    return list(zip(hooked, [len(module.__dict__["_lcattn"].position) for module in modules], strict=True))


def test_a_tuned_prefix_is_refused() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(make("llama"), config).eval()
    with pytest.raises(ValueError, match="prefix tuning gives keys that are not to be turned"):
        hf.extend(model, 90, "rerope", window=16)


def test_layers_without_positions_stay_without() -> None:
    """Cohere2's layers that see everything turn nothing, and the operator doesn't either."""
    kind, config = INTERLEAVED["cohere2"]
    assert _turned(hf.extend(kind(config).eval(), 90)) == [(True, 1), (False, 0)]


def test_positions_that_do_not_count_tokens_are_refused() -> None:
    model = hf.extend(make("llama"), 90, "self_extend", **OPTIONS["self_extend"])
    ids = torch.randint(3, 90, (2, 40))
    seen = torch.ones_like(ids)
    seen[1, :9] = 0
    here = torch.arange(40)[None]
    gap, late = (here + 11 * (here >= at) for at in (9, 20))
    want = model(ids).logits
    for start in (0, 5):
        torch.testing.assert_close(model(ids, position_ids=here + start).logits, want)
    padded = model(ids, attention_mask=seen).logits
    for pad in (0, 1):
        positions = (seen.cumsum(1) - 1).masked_fill(seen == 0, pad)
        torch.testing.assert_close(model(ids, attention_mask=seen, position_ids=positions).logits, padded)
        cache = model(ids[:, :15], attention_mask=seen[:, :15], position_ids=positions[:, :15]).past_key_values
        rest = model(ids[:, 15:], attention_mask=seen, position_ids=positions[:, 15:], past_key_values=cache).logits
        torch.testing.assert_close(rest, padded[:, 15:], rtol=1e-4, atol=1e-4)
    documents = torch.cat([torch.arange(13), torch.arange(27)])[None]
    parts = torch.cat([model(ids[:, :13]).logits, model(ids[:, 13:]).logits], 1)
    packed = model(ids, position_ids=documents.expand(2, -1), use_cache=False).logits
    torch.testing.assert_close(packed, parts, rtol=1e-4, atol=1e-4)
    cache = model(ids).past_key_values
    for message, inputs in (
        (r"got \[20\] for token 9 of row 0", dict(position_ids=gap, attention_mask=torch.ones_like(ids))),
        (r"got \[31\] for token 20 of row 1", dict(position_ids=torch.cat([here, late]), attention_mask=seen)),
        (r"on from the 40 cached, got \[60\] for token 0", dict(position_ids=here + 60, past_key_values=cache)),
    ):
        with pytest.raises(ValueError, match=f"position_ids: .*{message}"):
            model(ids, **inputs)
    torch.testing.assert_close(model(ids).logits, want)
    hf.use(model, None)(ids, position_ids=gap)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_text_of_a_vision_model(name: str) -> None:
    """Its text is read on; positions of images, which differ by axis, are refused."""
    text = TINY | GQA | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=64)
    config = getattr(tf, f"{name}Config")(text_config=text, vision_config=vision)
    model = getattr(tf, f"{name}ForConditionalGeneration")(config).eval()
    ids = torch.randint(3, 90, (1, 60))
    plain = model(input_ids=ids).logits
    hf.extend(model, 90, "rerope", window=31)
    axes = torch.stack([torch.arange(60)] * 3)[:, None]
    got = model(input_ids=ids, position_ids=axes).logits
    torch.testing.assert_close(got, model(input_ids=ids).logits)
    torch.testing.assert_close(got[:, :31], plain[:, :31], rtol=1e-4, atol=1e-5)
    axes[1] //= 3
    with pytest.raises(ValueError, match=r"alike on all axes, got \[1, 0, 1\] for token 1"):
        model(input_ids=ids, position_ids=axes)


def test_encoder_and_decoder() -> None:
    part = TINY | GQA | dict(sliding_window=8)
    model = tf.T5GemmaForConditionalGeneration(tf.T5GemmaConfig(encoder=part, decoder=part, vocab_size=90)).eval()
    ids = torch.randint(3, 90, (2, 70))
    plain = model(input_ids=ids[:, :16], decoder_input_ids=ids).logits
    hf.extend(model, 90, "rerope", window=16)
    got = model(input_ids=ids[:, :16], decoder_input_ids=ids).logits
    torch.testing.assert_close(got[:, :16], plain[:, :16], rtol=1e-4, atol=1e-5)
    assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()
    assert torch.equal(hf.use(model, None)(input_ids=ids[:, :16], decoder_input_ids=ids).logits, plain)


def test_trained_is_what_the_model_reads() -> None:
    """Of scaled frequencies the length they were scaled to; whoever scales again starts from before."""
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 32}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    long = TINY | dict(max_position_embeddings=256)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**long, rope_parameters=llama3)).eval()
    position = hf.extend(model, 512, "dual_chunk").model.layers[0].self_attn.__dict__["_lcattn"].position[0]
    assert (position.chunk, position.local) == (192, 64)
    model = hf.extend(tf.LlamaForCausalLM(tf.LlamaConfig(**long, rope_parameters=yarn)).eval(), 512, "yarn")
    scaled = model.model.rotary_emb.config.rope_parameters
    assert (scaled["factor"], scaled["original_max_position_embeddings"]) == (16, 32)
