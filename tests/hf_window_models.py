"""Small random encoders with windows of their own, inputs for them, and how what they give is compared."""

import contextlib
import copy
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from lcattn import hf, ops
from tests.conftest import SEED
from tests.hf_models import VOCAB, B, agree, batch, results

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
def float64() -> Iterator[None]:
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
    with float64():
        want = results(copy.deepcopy(trusted).double(), inputs, seen)
    converted = ours(copy.deepcopy(model))
    hf.check(converted)
    agree(results(converted, inputs, seen), want, lambda: results(copy.deepcopy(trusted), inputs, seen))


def bird(T: int, **options: Any) -> Any:
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
