"""transformers on lcattn: attention and masks under the name "lcattn", and layouts put on existing models.

A model asks for its mask once per forward pass and hands it to every layer. Ours is a `Mask`: layouts, key
padding and where queries and keys stand, read off the functions that transformers composes. Attention modules that
bypass the interface are replaced: `convert`, and `lcattn.hf.swap` for which and how exactly.
"""

from .extend import extend
from .masks import Mask, make_mask
from .models import attention_forward, check, convert, register, use

__all__ = ["Mask", "attention_forward", "check", "convert", "extend", "make_mask", "register", "use"]
