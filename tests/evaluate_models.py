"""Small causal models that lcattn eval measures, a text and a tokenizer for them, and what is trusted of them."""

import os
import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import transformers as tf

TRAINED = 64
_WORDS = "river stone market winter letter garden simple answer number window travel people morning yellow".split()


def _text(n_sentences: int = 700) -> str:
    draw = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = _WORDS + ["".join(draw.choices(letters, k=draw.randint(4, 9))) for _ in range(400)]
    sentences = [" ".join(draw.choices(words, k=draw.randint(3, 9))).capitalize() + "." for _ in range(n_sentences)]
    return " ".join(sentences)


TEXT = _text()


def byte_tokenizer() -> Any:
    """A token a byte, and an end token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


_SMALL = dict(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_SMALL |= dict(max_position_embeddings=TRAINED, bos_token_id=None, eos_token_id=256, pad_token_id=None)
CONFIGS: dict[str, Any] = {
    "llama": tf.LlamaConfig(**_SMALL, num_key_value_heads=1),
    # caps its logits
    "gemma2": tf.Gemma2Config(**_SMALL, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0),
    # scales its logits
    "cohere": tf.CohereConfig(**_SMALL, logit_scale=0.3),
    "gpt2": tf.GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=2048, eos_token_id=256),
}


def make_model(name: str = "llama") -> Any:
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for path, weight in model.named_parameters():
        # scores, and losses, far from uniform
        if re.search(r"(q_proj|k_proj|c_attn)\.weight", path):
            nn.init.normal_(weight, std=0.7)
        if re.search(r"embed_tokens|wte|lm_head", path):
            nn.init.normal_(weight, std=0.5)
    return model


def log_p(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities of each next token, [T - 1], from the whole logits."""
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def in_double(model: Any, compute: Callable[[], Any]) -> Any:
    try:
        model.double()
        return compute()
    finally:
        model.float()
