"""How well a model answers a prompt: greedily, or by how likely the right answer is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .needles import Prompt, recall


@dataclass(frozen=True)
class Continuation:
    """Tokens that a model continued with, seconds to the first of them, and mean seconds to each next one."""

    tokens: tuple[int, ...]
    first_token_s: float
    next_token_s: float | None


def _prefill(model: Any, tokens: Tensor) -> tuple[Any, Tensor]:
    """The cache of a prompt [1, n], and the logits [vocabulary] of its last token, the only ones computed."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits[0, -1]


def _ends(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    return set(end if isinstance(end, (list, tuple)) else [end])


@torch.inference_mode()
def continue_greedily(model: Any, tokens: Tensor, max_new_tokens: int) -> Continuation:
    """The likeliest token, again and again, on the model's cache; until its end token, which is left out.

    Args:
        model: a transformers causal language model; tokens [1, n] int64; max_new_tokens: 1 or more.
    """
    start = time.perf_counter()
    cache, logits = _prefill(model, tokens)
    first_s = time.perf_counter() - start
    ends, found, steps = _ends(model), [], 0
    while True:
        token = int(logits.argmax())
        if token in ends:
            break
        found.append(token)
        if len(found) == max_new_tokens:
            break
        one = torch.tensor([[token]], device=tokens.device)
        logits = model(input_ids=one, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        steps += 1
    next_s = (time.perf_counter() - start - first_s) / steps if steps else None
    return Continuation(tuple(found), first_s, next_s)


@torch.inference_mode()
def log_likelihoods(model: Any, tokens: Tensor, answers: list[tuple[int, ...]]) -> list[float]:
    """Mean log-probability a token of each answer after a prompt, read once: (1/n) sum log p(a_t | prompt, a_<t).

    Args:
        model: a transformers causal language model whose cache can forget its latest tokens; tokens [1, n] int64.
    """
    cache, last = _prefill(model, tokens)
    found = []
    for answer in answers:
        logits = last[None]
        if len(answer) > 1:
            more = torch.tensor([answer[:-1]], device=tokens.device)
            logits = torch.cat([logits, model(input_ids=more, past_key_values=cache, use_cache=True).logits[0]])
            cache.crop(1 - len(answer))
        log_p = logits.float().log_softmax(-1)
        found.append(float(log_p.gather(1, torch.tensor([answer], device=tokens.device).T).mean()))
    return found


def answer(model: Any, tokenizer: Any, prompt: Prompt, max_new_tokens: int) -> dict[str, Any]:
    """Greedy: score (recall of the answers), output, first_token_s, next_token_s."""
    found = continue_greedily(model, prompt.tokens, max_new_tokens)
    output = tokenizer.decode(found.tokens, skip_special_tokens=True)
    return {
        "score": recall(output, prompt.puzzle.answers),
        "output": output,
        "first_token_s": found.first_token_s,
        "next_token_s": found.next_token_s,
    }


def rank(model: Any, prompt: Prompt) -> dict[str, Any]:
    """By likelihood: rank of the right answer among the distractors (0 is first; ties count against it), score (share
    of the distractors that it beats; 0.5 is chance), log_p (mean a token) and seconds."""
    start = time.perf_counter()
    right, *wrong = log_likelihoods(model, prompt.tokens, [prompt.answer, *prompt.distractors])
    if not all(map(math.isfinite, [right, *wrong])):
        raise ValueError("the model gives log-probabilities that are not finite")
    better = sum(other >= right for other in wrong)
    return {
        "score": 1 - better / len(wrong),
        "rank": better,
        "log_p": right,
        "seconds": time.perf_counter() - start,
    }
