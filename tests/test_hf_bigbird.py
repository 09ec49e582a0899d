"""BigBird's blocks on lcattn: its plans, blocks repeated or drawn at random, its turn to full attention."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lcattn
from lcattn import hf
from lcattn.hf import swap
from lcattn.hf.swap.bigbird import ListedBlocks
from tests.hf_models import agree, batch, logits_agree
from tests.hf_window_models import bird, make, spreads


def _run_bird(module: Any, hidden: Tensor, masks: Any, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    module, x = copy.deepcopy(module).to(dtype), hidden.to(dtype).requires_grad_()
    out = module(x, *(mask.to(dtype) for mask in masks))[0]
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad((out * weight.to(dtype)).sum(), [x, *parameters.values()])
    return {"out": out} | {f"d {n}": g for n, g in zip(("x", *parameters), grads, strict=True)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (72, dict(num_random_blocks=1)),
        (120, {}),
        (200, dict(num_random_blocks=3)),
        (256, dict(block_size=32, num_random_blocks=1)),
        # the plans of the paper, which repeat blocks
        (1024, dict(block_size=64, num_random_blocks=3)),
        (1024, dict(block_size=64, num_random_blocks=3, max_position_embeddings=1024)),
    ],
)
def test_bigbird_plans(length: int, options: dict[str, Any], training: bool, seed: int) -> None:
    module, *inputs = bird(length, **options)
    module.train(training)
    truth = _run_bird(module, *inputs, torch.float64)
    ours = copy.deepcopy(module)
    ours.__class__ = swap.find(type(module))
    with spreads(length) as found:
        got = _run_bird(ours, *inputs, torch.float32)
    assert min(found) >= 3
    agree(got, truth, lambda: _run_bird(module, *inputs, torch.float32))


def test_bigbird_counts_repeated_blocks_as_often_as_the_original(seed: int) -> None:
    module, *inputs = bird(120)
    module.__class__ = swap.find(type(module))
    # in evaluation every random block is block 0, in training no block is drawn twice
    assert [times for times, _ in module.eval()._plan(120).again] == [2]
    assert module.train()._plan(120).again == ()
    hidden, masks, _ = inputs
    counted = module.eval()(hidden, *masks)[0]
    plan = module._plan(120)
    once = lcattn.attention(
        *(of(hidden).unflatten(2, (2, 16)).transpose(1, 2) for of in (module.query, module.key, module.value)),
        layout=plan.layout,
        key_mask=masks[2][:, 0, 0] > 0,
    )
    once = once.transpose(1, 2).flatten(2) * masks[1][:, 0]
    middle = slice(8, -8)
    assert not torch.allclose(counted[:, middle], once[:, middle], atol=1e-2)
    torch.testing.assert_close(counted[:, :8], once[:, :8])


def test_bigbird_leaves_random_numbers_of_numpy_alone(seed: int) -> None:
    module, hidden, masks, _ = bird(120)
    module.__class__ = swap.find(type(module))
    np.random.seed(seed)
    want = np.random.random()
    np.random.seed(seed)
    module.train()(hidden, *masks)
    assert np.random.random() == want


def test_bigbird_without_a_seed_draws_anew(seed: int) -> None:
    module, hidden, masks, _ = bird(200)
    module.__class__ = swap.find(type(module))
    module.train()
    assert torch.equal(module(hidden, *masks)[0], module(hidden, *masks)[0])
    module.seed = None
    assert not torch.equal(module(hidden, *masks)[0], module(hidden, *masks)[0])


def test_bigbird_keeps_its_layout_in_full_attention(seed: int) -> None:
    model = make("bigbird")
    full = copy.deepcopy(model)
    full.bert.set_attention_type("original_full")
    used = hf.use(model, lcattn.Window(3, 3))
    inputs = batch(model, None, 40)
    want = hf.use(full, lcattn.Window(3, 3))(**inputs).logits
    assert torch.equal(used(**inputs).logits, want)
    assert not torch.allclose(hf.use(used, lcattn.Full())(**inputs).logits, want)


@pytest.mark.parametrize("name", ["bigbird", "bigbird_pegasus"])
@pytest.mark.parametrize("used", [False, True])
def test_bigbird_turns_to_full_attention(name: str, used: bool, seed: int) -> None:
    model = make(name)
    trusted = copy.deepcopy(model)
    if used:
        hf.use(model, lcattn.Full())
        (trusted.bert if name == "bigbird" else trusted.model.encoder).set_attention_type("original_full")
    else:
        hf.convert(model)
    for length in (80, 40, 80):
        # a short text, and the long one after it
        inputs = batch(model, "right", length)
        seen = inputs["attention_mask"].bool()
        truth = copy.deepcopy(trusted).double()(**inputs).logits[seen]
        # kept, so that both remember a short text
        eager = trusted(**inputs).logits[seen]
        logits_agree(model(**inputs).logits[seen], truth, lambda eager=eager: eager)
        hf.check(model)
    inputs = batch(model, "right", 80)
    narrow = hf.use(copy.deepcopy(trusted), lcattn.Window(3, 3))(**inputs).logits
    hf.use(model, lcattn.Window(3, 3))
    assert torch.equal(model(**inputs).logits, narrow)
    hf.use(model, None)
    assert not any(swap.original(type(module)) or "_lcattn" in module.__dict__ for module in model.modules())
    inputs = batch(model, None, 80)
    assert torch.equal(model(**inputs).logits, trusted(**inputs).logits)


@pytest.mark.parametrize("block", [1, 8, 24, 64, 100])
def test_listed_blocks(block: int, seed: int) -> None:
    for length in (50, 64, 333):
        rows = -(-length // block)
        for heads in (1, 3):
            picks = torch.randint(-1, rows, (heads, rows, 4))
            layout = ListedBlocks(picks, block)
            mask = torch.zeros(1, heads, rows, rows + 1, dtype=torch.bool)
            mask[0].scatter_(2, torch.where(picks < 0, rows, picks), True)
            want = mask[..., :-1].repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :length, :length]
            table = lcattn.lowering.lower(layout, T=length, S=length, heads=heads)
            assert torch.equal(table.to_dense(length, length), want)
            again = lcattn.layout.from_spec(layout.spec, layout.tensors)
            assert torch.equal(
                lcattn.lowering.lower(again, T=length, S=length, heads=heads).to_dense(length, length), want
            )
    nothing = ListedBlocks(torch.full((1, rows, 2), -1), block)
    assert lcattn.lowering.lower(nothing, T=length, S=length).n_pairs() == 0
    with pytest.raises(ValueError, match="picks must be"):
        lcattn.attention(*[torch.zeros(1, 3, 7, 16)] * 3, layout=layout)
    with pytest.raises(ValueError, match="picks must be"):
        ListedBlocks(torch.zeros(3, 4), block)
