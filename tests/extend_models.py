"""Small random rotary models to extend, and how."""

import copy
from typing import Any

import torch
import transformers as tf

TINY = dict(vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=32)
OPTIONS = {"dual_chunk": dict(chunk=20, local=7), "self_extend": dict(group=5, window=16), "rerope": dict(window=16)}
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**TINY, num_key_value_heads=2)),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=16)),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=24)),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig(**TINY)),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**TINY)),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(
            **TINY,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        ),
    ),
    "glm": (tf.GlmForCausalLM, tf.GlmConfig(**TINY, num_key_value_heads=2, head_dim=16)),
    "modernbert": (
        tf.ModernBertForMaskedLM,
        tf.ModernBertConfig(**TINY, local_attention=12, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2),
    ),
}


def make(name: str) -> Any:
    """A small random model whose scores spread."""
    kind, config = KINDS[name]
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj", "k_proj", "Wqkv", "query_key_value")):
                parameter.mul_(10)
            if "q_norm" in parameter_name:
                parameter.fill_(4.0)
    return model
