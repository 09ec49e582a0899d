"""Attention modules of transformers that bypass its attention interface, and the class that replaces each.

A model is converted by giving its attention modules another class, derived from their own: parameters, names, hooks and
configuration stay, and giving the class back restores the model.
"""

from torch import nn

from . import deberta, xlnet

# the class of a transformers module -> ours, derived from it, with the forward of its own
SWAPS: dict[type[nn.Module], type[nn.Module]] = {**deberta.SWAPS, **xlnet.SWAPS}
