"""transformers on lcattn: mask functions, block masks and masks by values say what they say to sdpa."""

import copy
import functools
import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as tf
from transformers import masking_utils as mu

from lcattn import hf
from tests.hf_models import VOCAB, B, T, agree, batch, logits_agree, make, odd, on, registered, results

_registered = pytest.fixture(registered, scope="module", autouse=True)


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
        "window of 0": mu.or_masks(mu.sliding_window_causal_mask_function(0), mu.blockwise_overlay(ids)),
        "keys ahead": mu.sliding_window_overlay(0),
        "keys far ahead": mu.sliding_window_overlay(-4),
        "two-sided window": mu.sliding_window_bidirectional_mask_function(11),
        "chunks": mu.chunked_causal_mask_function(16, pads),
        "chunks from elsewhere": mu.chunked_causal_mask_function(16, pads + 3),
        "blocks": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(ids)),
        "blocks in a window": mu.or_masks(window, mu.blockwise_overlay(ids)),
        "padding": mu.and_masks(window, mu.padding_mask_function(ids >= 0)),
        "padding in or": mu.or_masks(odd, mu.padding_mask_function(ids >= 0)),
        "unknown": odd,
        "unknown and": mu.and_masks(window, odd),
        "unknown or": mu.or_masks(window, of_batch),
        "unknown scalar": mu.and_masks(mu.causal_mask_function, _scalar_only),
        "offsets": mu.add_offsets_to_mask_function(window, 3, 1),
        "packed": mu.packed_sequence_compatibility_function(mu.causal_mask_function, positions, documents),
        "packed window": mu.packed_sequence_compatibility_function(window, positions, documents),
        "packed unknown": mu.packed_sequence_compatibility_function(odd, positions, documents),
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
            assert torch.equal(_seen(mask, t, s), want.expand(B, 2, t, s)), (
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
    agree(run(on(copy.deepcopy(model), "lcattn")), truth, lambda: run(copy.deepcopy(model)))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_by_values_follows_its_tensor(kind: str, seed: int) -> None:
    model = on(make("bert"), "lcattn")
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
    got = on(copy.deepcopy(model), "lcattn")(ids, attention_mask=block_mask).logits
    logits_agree(got, truth, lambda: model(ids, attention_mask=dense).logits)


@pytest.mark.parametrize("value", [0.5, -3.0, "learned"])
def test_additive_mask_raises(value: Any, seed: int) -> None:
    model = on(make("bert"), "lcattn")
    mask = torch.zeros(B, 1, T, T)
    if value == "learned":
        mask.requires_grad_()
    else:
        mask[0, 0, 3, 4] = value
    with pytest.raises(ValueError, match="float mask must hold 0"):
        model(torch.randint(3, VOCAB, (B, T)), attention_mask=mask)


def test_models_that_compute_with_the_values_of_their_mask(seed: int) -> None:
    model = tf.DogeForCausalLM(
        tf.DogeConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
        )
    )
    with pytest.raises(AttributeError, match=r"is no tensor.*asked for its 'dtype'"):
        on(model, "lcattn")(torch.randint(3, VOCAB, (B, T)))
    with pytest.raises(NotImplementedError, match=r"is no tensor.*met in add"):
        torch.zeros(B, 4, T, T) + hf.make_mask(B, T, T)


def test_a_mask_function_that_wraps_another(seed: int) -> None:
    @functools.wraps(mu.causal_mask_function)
    def thinned(b: Any, h: Any, q: Any, k: Any) -> Any:
        return mu.causal_mask_function(b, h, q, k) & ((q - k) % 3 == 0)

    rows, columns = torch.arange(T)[:, None], torch.arange(T)
    _agrees_with_dense(thinned, thinned(0, 0, rows, columns).expand(B, 1, T, T))


def test_a_mask_function_that_begins_to_read_the_batch(seed: int) -> None:
    state: list[Tensor] = []

    class Function:
        # not hashable
        __eq__ = None

        def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
            return (state[0][b, k] if state else q >= 0) | (q == k)

    function = Function()
    _agrees_with_dense(function, torch.ones(B, 1, T, T, dtype=torch.bool))
    state.append(torch.rand(B, T) < 0.6)
    _agrees_with_dense(function, state[0][:, None, None] | torch.eye(T, dtype=torch.bool))


def _agrees_with_dense(function: Any, dense: Tensor) -> None:
    assert torch.equal(_seen(hf.make_mask(B, T, T, mask_function=function), T, T), dense.expand(B, 2, T, T))


def _seen(mask: Any, t: int, s: int) -> Tensor:
    """Who sees whom, [B, 2, t, s]: with equal scores and one-hot values an output is nonzero where a key is seen."""
    q, k = torch.zeros(B, 2, t, s), torch.zeros(B, 2, s, s)
    v = torch.eye(s).expand(B, 2, s, s).clone()
    out, _ = hf.attention_forward(nn.Module(), q, k, v, mask)
    return out.transpose(1, 2) > 0
