"""Attention modules of transformers that bypass its attention interface, and the class that replaces each.

A model is converted by giving its attention modules another class, derived from their own: parameters, names, hooks and
configuration stay, and giving the class back restores the model. Each class has the name of the one it replaces, since
transformers looks classes up by name (saved architectures, `_no_split_modules`).

Equal means outputs at real tokens, loss and all gradients, within the float32 error budget, padded on either side, at
any length:

| architecture | what is equal | where not (see below) |
|---|---|---|
| Longformer, LED's encoder | windows, global tokens and their own projections | padding, dilation |
| LED's decoder | self- and cross-attention, caches | |
| LongT5, local | the window and its bias | a module called without a mask |
| LongT5, transient-global | the window, the side keys, the bias of each | a module called without a mask |
| LongT5's decoder | self- and cross-attention, caches, T5's bias by its bucket table | |
| DeBERTa, DeBERTa-v2 | c2p, p2c, log buckets, shared or own projections | padding, talking heads |
| XLNet | content, position and segment terms, two streams, memory, permutations | see below |
| BigBird, BigBirdPegasus | windows, global blocks, random blocks drawn from the same seed | numpy's random numbers |
| BigBird in full attention | self- and cross-attention, causal or not, caches | |

- Padding: the original's attention gives zeros at padding, ours what the keys there give. The input is not filled up to
  whole windows, and Longformer's and LED's masks of size [T, T] are not made.
- Dilation: transformers ignores a configuration's attention_dilation, so we refuse it; `use(model, Dilated(...))`.
- Without a mask LongT5's modules see the zeros that fill their last block; models always give a mask.
- Repeated blocks of BigBird count as often as in the original: in evaluation all random blocks are block 0 once more,
  in training the plans for 1024, 3072 and 4096 tokens repeat some. The original reseeds numpy at each call, we don't.
  A short text turns a model to full attention for good, as it does the original.
- DeBERTa: queries at padding see the real keys; no [T, T] tensor is made. v1's talking heads, its query_states, a
  relative_pos of one's own, and v2's position_buckets below 4 or as far as max_relative_positions raise.
- XLNet: more than 16 segments, and a predicted token that sees no key, raise.

Dropout of attention weights is drawn differently and has the same statistics (BigBird's block attention has none). No
attention weights are returned: `output_attentions=True` raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=type[nn.Module])

# the class of a transformers module -> ours, derived from it, with the forward of its own; filled by `find`
SWAPS: dict[type[nn.Module], type[nn.Module]] = {}

# folder of transformers.models -> our module, imported when a model of that folder is first seen
_FOLDERS = {
    "big_bird": "bigbird",
    "bigbird_pegasus": "bigbird",
    "deberta": "deberta",
    "deberta_v2": "deberta",
    "led": "longformer",
    "longformer": "longformer",
    "longt5": "longt5",
    "xlnet": "xlnet",
}


def replaces(original: type[nn.Module]) -> Callable[[Module], Module]:
    """Enters the class it decorates, derived from `original`, into `SWAPS`."""

    def enter(ours: Module) -> Module:
        SWAPS[original] = ours
        return ours

    return enter


def find(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that replaces `kind`, exactly that class, or None."""
    prefix, _, folder = kind.__module__.rpartition(".")[0].rpartition(".")
    name = f"{__name__}.{_FOLDERS.get(folder)}"
    if prefix == "transformers.models" and folder in _FOLDERS:
        importlib.import_module(name)
    return SWAPS.get(kind)


def original(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that `kind` replaces, None if it is none of ours."""
    return next((theirs for theirs, ours in SWAPS.items() if ours is kind), None)
