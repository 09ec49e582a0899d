"""Small random models of transformers, batches for them, and how what they give is compared."""

import copy
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import transformers as tf

import lcattn
from lcattn import hf, tolerance

B, T, VOCAB = 2, 80, 97
PADS = (0, 13)

_SMALL = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
_SMALL |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GQA = dict(num_key_value_heads=2, head_dim=16)
T5 = dict(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
# smooth: at the kink of a ReLU rounding decides between two gradients
T5 |= dict(feed_forward_proj="gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
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
    # a window of 0, which is none
    "qwen2_moe": (
        tf.Qwen2MoeForCausalLM,
        tf.Qwen2MoeConfig(
            **_SMALL,
            num_key_value_heads=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=2,
            num_experts_per_tok=2,
            experts_implementation="eager",
        ),
        "sdpa",
    ),
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
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**T5), "eager"),
    "mt5": (tf.MT5ForConditionalGeneration, tf.MT5Config(**T5 | dict(feed_forward_proj="gated-gelu")), "eager"),
}
DECODERS = ["gpt2", "llama", "qwen3", "mistral", "qwen2_moe", "gemma2", "gemma3", "phi", "gpt_neox", "gpt_oss"]
_QUERIES = r"(\.q|query|q_proj|Wqkv|c_attn|q_attn|query_key_value)\.weight$"
_FUSED = "Wqkv|c_attn|query_key_value"

_spreads: list[float] = []


def _probe(module: Any, query: Tensor, key: Tensor, *args: Any, scaling: float | None = None, **kwargs: Any) -> Any:
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    _spreads.append(float((query @ keys.mT * factor).std()))
    return hf.attention_forward(module, query, key, *args, scaling=scaling, **kwargs)


def registered() -> Iterator[None]:
    """The body of a fixture, for a file whose tests make these models."""
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
        on(model, "lcattn")
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
    return on(model, trusted)


def on(model: Any, implementation: str) -> Any:
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
    got = results(on(converted, "lcattn") if ours is None else ours(converted), inputs, seen)
    agree(got, truth, lambda: results(copy.deepcopy(model), inputs, seen))


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0) | options
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


PREFIX = 5


def prefix_tuned(name: str) -> Any:
    model = make(name)
    task = "CAUSAL_LM" if name == "llama" else "TOKEN_CLS"
    if name == "bert":
        encoder = model
        model = tf.BertForTokenClassification(encoder.config).eval()
        model.bert.load_state_dict(encoder.bert.state_dict())
        model.set_attn_implementation("sdpa")
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=PREFIX)).eval()
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    return tuned


def odd(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k) % 3 == 0


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out
