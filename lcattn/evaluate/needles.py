"""Needles in a haystack of real text: puzzles, and prompts of an exact number of tokens.

Passkey after Mohtashami & Jaggi 2023 (Landmark Attention), section 4.2; the others after Hsieh et al. 2024 (RULER),
section 3, with texts of our own.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

_ADJECTIVES = (
    "amber brave calm dusty early faint gentle hollow icy jolly keen lucky mellow narrow olive proud quiet rusty"
    " silent tidy upper velvet wild yellow"
).split()
_NOUNS = (
    "anchor basket candle drum engine feather garden hammer island jacket kettle lantern mirror needle orchard"
    " pencil quarry ribbon saddle tunnel umbrella violin window zipper"
).split()


@dataclass(frozen=True)
class Puzzle:
    """What is hidden and asked.

    Attributes:
        intro, question: what stands before and after the haystack; the answer continues the question.
        needles: (depth in [0, 1], text) of each, in the order of the text.
        answers: strings that the answer must hold; distractors: other answers of the same form.
        hay: a haystack of its own, as sentences, in place of the text's.
    """

    intro: str
    needles: tuple[tuple[float, str], ...]
    question: str
    answers: tuple[str, ...]
    distractors: tuple[tuple[str, ...], ...]
    hay: tuple[str, ...] = ()


@dataclass(frozen=True)
class Haystack:
    """A text as tokens, to be cut where a sentence ends.

    Attributes:
        tokenizer: of the model; words: distinct words of the text.
        tokens: of the whole text; ends: where its sentences end among them, ascending, 0 first.
    """

    tokenizer: Any
    words: tuple[str, ...]
    tokens: list[int]
    ends: list[int]

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> Haystack:
        """ValueError if the text is empty."""
        sentences = [part for part in re.split(r"(?<=[.!?])(?=\s)", text) if part.strip()]
        if not sentences:
            raise ValueError("text: it holds no text")
        pieces = _tokens(tokenizer, sentences)
        ends = [0, *itertools.accumulate(len(piece) for piece in pieces)]
        words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
        return cls(tokenizer, tuple(words), list(itertools.chain.from_iterable(pieces)), ends)

    def cut(self, length: int, start: int, depths: list[float]) -> list[list[int]]:
        """`length` tokens from one on, cut where a sentence ends nearest to each depth, the depths ascending."""
        ends = [0, *(e - start for e in self.ends if 0 < e - start < length), length]
        cuts = [0]
        for depth in depths:
            at = bisect.bisect_left(ends, depth * length)
            cuts.append(min(ends[max(0, at - 1) : at + 1], key=lambda end: abs(end - depth * length)))
        hay = self.tokens[start : start + length]
        return [hay[a:b] for a, b in itertools.pairwise([*cuts, length])]

    def start(self, length: int, rng: Random) -> int:
        """The beginning of a sentence with `length` tokens from there on. ValueError if the text is too short."""
        if length > len(self.tokens):
            raise ValueError(f"text: it has {len(self.tokens):,} tokens, expected {length:,} or more")
        return rng.choice(self.ends[: bisect.bisect_right(self.ends, len(self.tokens) - length)])


@dataclass(frozen=True)
class Prompt:
    """A puzzle as tokens.

    Attributes:
        tokens: [1, n] int64; places: where each needle begins, as an index into them.
        answer: the right answer's tokens; distractors: of the others.
    """

    puzzle: Puzzle
    tokens: Tensor
    places: tuple[int, ...]
    answer: tuple[int, ...]
    distractors: tuple[tuple[int, ...], ...]


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids


def _number(rng: Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _numbers(rng: Random, digits: int, count: int) -> list[str]:
    """Distinct numbers."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_number(rng, digits)] = None
    return list(found)


def _names(rng: Random, count: int) -> list[str]:
    pairs = [f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS]
    return rng.sample(pairs, count)


def _in_groups(items: list[str], size: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(items[i : i + size]) for i in range(0, len(items), size))


def passkey(rng: Random, depth: float, n_distractors: int) -> Puzzle:
    """A five-digit pass key at a depth."""
    key, *others = _numbers(rng, 5, 1 + n_distractors)
    return Puzzle(
        "There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it.\n\n",
        ((depth, f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"),),
        "\n\nWhat is the pass key? The pass key is",
        (key,),
        _in_groups(others, 1),
    )


def _secret(name: str, number: str) -> str:
    return f"\nThe secret number of the {name} is {number}.\n"


_SECRETS = "Some secret numbers are hidden within the following text. Memorize them.\n\n"


def single(rng: Random, depth: float, n_distractors: int) -> Puzzle:
    """One secret number at a depth."""
    (name,) = _names(rng, 1)
    number, *others = _numbers(rng, 7, 1 + n_distractors)
    return Puzzle(
        _SECRETS,
        ((depth, _secret(name, number)),),
        f"\n\nWhat is the secret number of the {name}? The secret number of the {name} is",
        (number,),
        _in_groups(others, 1),
    )


def multi_key(rng: Random, depth: float, n_distractors: int) -> Puzzle:
    """Four secret numbers; the one at the depth is asked for, the others' come first among the distractors."""
    names = _names(rng, 4)
    numbers = _numbers(rng, 7, 4 + max(0, n_distractors - 3))
    depths = [depth, *(rng.random() for _ in names[1:])]
    needles = [(d, _secret(name, number)) for d, name, number in zip(depths, names, numbers, strict=False)]
    return Puzzle(
        _SECRETS,
        tuple(sorted(needles, key=lambda needle: needle[0])),
        f"\n\nWhat is the secret number of the {names[0]}? The secret number of the {names[0]} is",
        (numbers[0],),
        _in_groups(numbers[1:], 1)[:n_distractors],
    )


def multi_value(rng: Random, depth: float, n_distractors: int) -> Puzzle:
    """One name with four secret numbers, anywhere; all are asked for."""
    (name,) = _names(rng, 1)
    numbers = _numbers(rng, 7, 4 * (1 + n_distractors))
    depths = sorted(rng.random() for _ in range(4))
    return Puzzle(
        _SECRETS,
        tuple((d, _secret(name, number)) for d, number in zip(depths, numbers, strict=False)),
        f"\n\nWhat are all four secret numbers of the {name}? The four secret numbers of the {name} are",
        tuple(numbers[:4]),
        _in_groups(numbers[4:], 4),
    )


def variables(rng: Random, depth: float, n_distractors: int) -> Puzzle:
    """A chain of five variables, each assigned the one before it; a second chain to be mistaken for it."""
    names: list[str] = []
    while len(names) < 10 + 5 * n_distractors:
        name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        if name not in names:
            names.append(name)
    values = _numbers(rng, 5, 2)
    needles = []
    for chain, value in zip(_in_groups(names[:10], 5), values, strict=True):
        sources = [value, *(f"VAR {name}" for name in chain)]
        depths = sorted(rng.random() for _ in chain)
        needles += [(d, f"\nVAR {name} = {of}\n") for d, name, of in zip(depths, chain, sources, strict=False)]
    return Puzzle(
        "Memorize the chains of variable assignments hidden within the following text.\n\n",
        tuple(sorted(needles, key=lambda needle: needle[0])),
        f"\n\nWhich five variables are assigned the value {values[0]}, directly or through others?"
        f" The five variables assigned {values[0]} are",
        tuple(names[:5]),
        _in_groups(names[10:], 5),
    )


# tokens of a prompt's length that are left for an answer wordier than expected
RESERVE = 8
# ten common words, each ten times, and ten others
_LEAST_ENTRIES = 110


def common_words(rng: Random, words: tuple[str, ...], n_entries: int, n_distractors: int) -> Puzzle:
    """A numbered list of words: ten of them come ten times as often as the others and are asked for.

    About half of the n_entries are common words, up to 30 times each.
    """
    often = max(10, min(30, n_entries // 20))
    seldom = often // 10
    n_rare = max(10, (n_entries - 10 * often) // seldom)
    n_words = 10 + n_rare + 10 * n_distractors
    if len(words) < n_words:
        raise ValueError(f"text: common_words needs {n_words:,} words of 4 to 9 small letters, it has {len(words):,}")
    drawn = rng.sample(words, n_words)
    entries = drawn[:10] * often + drawn[10 : 10 + n_rare] * seldom
    rng.shuffle(entries)
    return Puzzle(
        "Below is a numbered list of words. Some appear far more often than the others. Memorize those.\n\n",
        (),
        "\n\nWhat are the ten most common words of the list? The ten most common words are",
        tuple(drawn[:10]),
        _in_groups(drawn[10 + n_rare :], 10),
        tuple(f"{'' if i == 1 else ' '}{i}. {word}" for i, word in enumerate(entries, 1)),
    )


# what a puzzle is made of: a source of chance, the depth where there is one, how many distractors
AT_DEPTH: dict[str, Callable[[Random, float, int], Puzzle]] = {
    "passkey": passkey,
    "single": single,
    "multi_key": multi_key,
}
ANYWHERE: dict[str, Callable[[Random, float, int], Puzzle]] = {"multi_value": multi_value, "variables": variables}
TASKS = (*AT_DEPTH, *ANYWHERE, "common_words")


def make(task: str, haystack: Haystack, length: int, depth: float | None, n_distractors: int, rng: Random) -> Prompt:
    """A prompt whose tokens, with the answer's and RESERVE more, are `length` (for common_words, at most that).

    Args:
        task: one of TASKS; depth: for those of AT_DEPTH; n_distractors: wrong answers to compare with.
        rng: decides all that is drawn, the part of the text too.

    Raises:
        ValueError: the length is too small for the task, or the text too short for it.
    """
    if task == "common_words":
        return _list_prompt(haystack, length, n_distractors, rng)
    puzzle = {**AT_DEPTH, **ANYWHERE}[task](rng, 0.0 if depth is None else depth, n_distractors)
    intro, question, answer, needles = _parts(haystack.tokenizer, puzzle)
    room = length - RESERVE - sum(map(len, (intro, question, answer, *needles)))
    if room < len(needles):
        raise ValueError(f"lengths: {task} needs {length - room + len(needles):,} tokens or more, got {length:,}")
    pieces = haystack.cut(room, haystack.start(room, rng), [depth for depth, _ in puzzle.needles])
    tokens, places = intro + pieces[0], []
    for needle, piece in zip(needles, pieces[1:], strict=True):
        places.append(len(tokens))
        tokens += needle + piece
    return _prompt(haystack.tokenizer, puzzle, tokens + question, places, answer)


def _list_prompt(haystack: Haystack, length: int, n_distractors: int, rng: Random) -> Prompt:
    state = rng.getstate()
    n_entries = _LEAST_ENTRIES
    fits = None
    while True:
        rng.setstate(state)
        puzzle = common_words(rng, haystack.words, n_entries, n_distractors)
        intro, question, answer, _ = _parts(haystack.tokenizer, puzzle)
        (hay,) = _tokens(haystack.tokenizer, ["".join(puzzle.hay)])
        total = len(intro + hay + question + answer) + RESERVE
        if total > length:
            break
        fits = _prompt(haystack.tokenizer, puzzle, intro + hay + question, [], answer)
        # entries grow longer with their numbers
        n_entries += max(1, int(0.8 * (length - total) * len(puzzle.hay) / len(hay)))
    if fits is None:
        raise ValueError(f"lengths: common_words needs {total:,} tokens or more, got {length:,}")
    return fits


def _parts(tokenizer: Any, puzzle: Puzzle) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Tokens of intro (with what the tokenizer puts first), question, answer and needles."""
    intro = list(tokenizer(puzzle.intro, verbose=False).input_ids)
    if intro and intro[-1] == tokenizer.eos_token_id:
        intro.pop()
    question, answer, *needles = _tokens(
        tokenizer, [puzzle.question, _spoken(puzzle.answers), *(text for _, text in puzzle.needles)]
    )
    return intro, question, answer, needles


def _spoken(answers: tuple[str, ...]) -> str:
    """An answer as it continues the question."""
    return " " + ", ".join(answers)


def _prompt(tokenizer: Any, puzzle: Puzzle, tokens: list[int], places: list[int], answer: list[int]) -> Prompt:
    texts = [_spoken(answers) for answers in puzzle.distractors]
    distractors = tuple(map(tuple, _tokens(tokenizer, texts))) if texts else ()
    return Prompt(puzzle, torch.tensor([tokens]), tuple(places), tuple(answer), distractors)


def recall(output: str, answers: tuple[str, ...]) -> float:
    """Share of the answers that stand in the output, as whole words, whatever their case."""
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", output, re.IGNORECASE) for answer in answers]
    return sum(match is not None for match in found) / len(answers)
