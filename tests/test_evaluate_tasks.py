"""lcattn eval: losses in slices, puzzles a solver can solve, answers, associative recall."""

import itertools
import os
import re
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

from lcattn import tolerance
from lcattn.evaluate import loss, mqar, needles, recall
from lcattn.layout import Full, from_spec
from tests.evaluate_models import CONFIGS, TEXT, TRAINED, byte_tokenizer, in_double, log_p, make_model

tokenizer = pytest.fixture(byte_tokenizer, scope="module")


@pytest.fixture(scope="module")
def haystack(tokenizer: Any) -> needles.Haystack:
    return needles.Haystack.of(tokenizer, TEXT)


# losses


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_in_slices_are_the_losses(name: str) -> None:
    model, tokens = make_model(name), torch.randint(1, 256, (1, 1111))
    ticks: list[int] = []
    forward = model.base_model.forward
    got = {"losses": loss.read(model, tokens, lambda: ticks.append(1))}
    truth = {"losses": -in_double(model, lambda: log_p(model, tokens))}
    tolerance.check(got, truth, lambda: {"losses": -log_p(model, tokens)})
    assert len(ticks) == 2 and model.base_model.forward == forward
    assert not any(m._forward_hooks for m in model.modules())
    assert float(got["losses"].std()) > 0.3


def test_a_failing_head_leaves_the_model_whole() -> None:
    model = make_model()
    with pytest.raises(ZeroDivisionError), loss._standing_in(model.base_model, None):
        raise ZeroDivisionError
    assert "forward" not in model.base_model.__dict__


@pytest.mark.parametrize("length", [TRAINED + 2, 150, 3 * TRAINED + 5])
def test_measured_means_are_means_of_the_right_tokens(length: int) -> None:
    model, tokens = make_model(), torch.randint(1, 256, (1, length))
    own = loss.own_start(length, TRAINED)
    assert own == (TRAINED if length <= 2 * TRAINED else length - TRAINED)
    for origin in (0, own):
        found = loss.measure(model, tokens, TRAINED, span=32, origin=origin)
        # nan for what is not predicted, so that a wrong index shows
        by_token = torch.full((length,), torch.nan, dtype=torch.float64)
        by_token[origin + 1 :] = -in_double(model, lambda o=origin: log_p(model, tokens[:, o:]))
        eager = by_token.clone().float()
        eager[origin + 1 :] = -log_p(model, tokens[:, origin:])

        def means(values: Tensor, origin: int = origin, found: Any = found) -> dict[str, Tensor]:
            spans = [values[max(s["start"], origin + 1) : s["end"]].mean() for s in found["loss_by_span"]]
            rest = {} if origin else {"past": values[TRAINED:].mean(), "within": values[1:TRAINED].mean()}
            return {"spans": torch.stack(spans), "compared": values[own + 1 :].mean(), **rest}

        got = {
            "spans": torch.tensor([s["loss"] for s in found["loss_by_span"]]),
            "compared": torch.tensor(found["compared"]),
        }
        if origin == 0:
            got |= {name: torch.tensor(found[f"{name}_trained"]) for name in ("past", "within")}
        else:
            assert found["past_trained"] is found["within_trained"] is None
        tolerance.check(got, means(by_token), lambda eager=eager, means=means: means(eager))
        edges = [s["start"] for s in found["loss_by_span"]] + [found["loss_by_span"][-1]["end"]]
        assert edges[0] in (origin, origin // 32 * 32 + 32) and edges[-1] == length
        assert [s["end"] for s in found["loss_by_span"]] == edges[1:] and all(e % 32 == 0 for e in edges[1:-1])
        points = loss.curve(found)
        assert all(origin <= x <= length + loss.CURVE_STEP for x, _ in points) and points


# needles


def _solve(text: str) -> list[str]:
    """The answers, from nothing but the prompt's text."""
    if "pass key" in text:
        return re.findall(r"The pass key is (\d{5})\. Remember", text)
    if found := re.search(r"What (?:is the secret number|are all four secret numbers) of the ([a-z]+ [a-z]+)\?", text):
        return re.findall(rf"The secret number of the {found[1]} is (\d{{7}})\.", text)
    if found := re.search(r"assigned the value (\d+),", text):
        known, chain = found[1], []
        # in the order of the text, each refers to one before it
        for name, of in re.findall(r"\nVAR ([A-Z]{5}) = (?:VAR )?(\w+)\n", text):
            if of == known or of in chain:
                chain.append(name)
        return chain
    words = re.findall(r"\d+\. ([a-z]+)", text)
    counts = sorted({word: words.count(word) for word in words}.items(), key=lambda pair: -pair[1])
    assert counts[9][1] >= 10 * counts[10][1]
    return [word for word, _ in counts[:10]]


@pytest.mark.parametrize("task", needles.TASKS)
@pytest.mark.parametrize("length", [1700, 2411])
def test_puzzles_are_solvable_and_exactly_where_asked(
    task: str, length: int, haystack: needles.Haystack, tokenizer: Any, seed: int
) -> None:
    depths = (0.0, 0.31, 1.0) if task in needles.AT_DEPTH else (None,)
    for depth in depths:
        prompt = needles.make(task, haystack, length, depth, 5, Random(f"{seed} {depth}"))
        puzzle, tokens = prompt.puzzle, prompt.tokens[0].tolist()
        text = tokenizer.decode(tokens)
        assert sorted(_solve(text)) == sorted(puzzle.answers)
        assert text.startswith(puzzle.intro) and text.endswith(puzzle.question)
        assert tokenizer.decode(prompt.answer) == " " + ", ".join(puzzle.answers)
        total = len(tokens) + len(prompt.answer) + needles.RESERVE
        assert total == length if task != "common_words" else 0.8 * length < total <= length

        # the text around the needles is the haystack's, unbroken
        hay, at = [], len(tokenizer(puzzle.intro).input_ids)
        for place, (_, needle) in zip(prompt.places, puzzle.needles, strict=True):
            hay += tokens[at:place]
            at = place + len(tokenizer(needle).input_ids)
            assert tokenizer.decode(tokens[place:at]) == needle
        hay += tokens[at : len(tokens) - len(tokenizer(puzzle.question).input_ids)]
        if task != "common_words":
            assert tokenizer.decode(hay) in TEXT
        # a token is a letter here, so that places in the text are places among the tokens
        ends = [0, *(dot.end() for dot in re.finditer(r"\.(?= )", tokenizer.decode(hay))), len(hay)]
        before = len(tokenizer(puzzle.intro).input_ids)
        for place, (asked, needle) in zip(prompt.places, puzzle.needles, strict=True):
            here = place - before
            assert here in ends and abs(here - asked * len(hay)) == min(abs(end - asked * len(hay)) for end in ends)
            before += len(needle)
        if depth is not None:
            assert any(asked == depth and puzzle.answers[0] in needle for asked, needle in puzzle.needles)

        texts = [" " + ", ".join(answers) for answers in puzzle.distractors]
        assert [tokenizer.decode(d) for d in prompt.distractors] == texts and len(set(texts)) == 5
        assert all(len(d) == len(puzzle.answers) and not set(d) & set(puzzle.answers) for d in puzzle.distractors)


def test_the_seed_decides_prompts(haystack: needles.Haystack) -> None:
    for task in needles.TASKS:
        one, same, other = (
            needles.make(task, haystack, 1700, 0.5, 3, Random(f"{s}")).tokens.tolist() for s in (1, 1, 2)
        )
        assert one == same != other


def test_prompts_that_cannot_be(haystack: needles.Haystack, tokenizer: Any) -> None:
    for task in needles.TASKS:
        with pytest.raises(ValueError, match=rf"lengths: {task} needs [\d,]+ tokens or more, got 40"):
            needles.make(task, haystack, 40, 0.5, 3, Random(0))
    tokens = len(haystack.tokens)
    with pytest.raises(ValueError, match=f"text: it has {tokens:,} tokens, expected"):
        needles.make("single", haystack, tokens + 1000, 0.5, 3, Random(0))
    with pytest.raises(ValueError, match=r"common_words needs \d+ words"):
        needles.make("common_words", needles.Haystack.of(tokenizer, "Few words here."), 1300, None, 3, Random(0))
    with pytest.raises(ValueError, match="no text"):
        needles.Haystack.of(tokenizer, " \n ")


@pytest.mark.parametrize(
    "output, answers, share",
    [
        (" 12345.", ("12345",), 1.0),
        (" 123456", ("12345",), 0.0),
        (" 912345", ("12345",), 0.0),
        ("ABCDE, then fghij", ("ABCDE", "FGHIJ", "KLMNO", "PQRST"), 0.5),
        ("", ("12345",), 0.0),
    ],
)
def test_recall_counts_whole_words(output: str, answers: tuple[str, ...], share: float) -> None:
    assert needles.recall(output, answers) == share


# answers


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_greedy_is_what_generate_gives(name: str) -> None:
    model = make_model(name)
    # generate() hides the padding token, 0; the end token comes early where it is made likely
    for end, tokens in itertools.product((256, None), torch.randint(1, 256, (3, 1, 37))):
        model.generation_config.eos_token_id = end
        trusted = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 37:].tolist()
        # chance may end a text before its fifth token
        second = trusted[min(4, len(trusted) - 1)]
        found = recall.continue_greedily(model, tokens, 12)
        assert list(found.tokens) == [t for t in trusted if t != end]
        assert found.first_token_s > 0 and found.next_token_s is not None and found.next_token_s > 0
        assert list(recall.continue_greedily(model, tokens, 1).tokens) == [t for t in trusted[:1] if t != end]
        assert recall.continue_greedily(model, tokens, 1).next_token_s is None
        model.generation_config.eos_token_id = [second, 999]
        assert recall.continue_greedily(model, tokens, 12).tokens == tuple(trusted[: trusted.index(second)])
        model.generation_config.eos_token_id = None


def test_likelihoods_are_those_of_whole_texts() -> None:
    model, tokens = make_model(), torch.randint(1, 256, (1, 41))
    answers = [(5,), (7, 9, 11), (7, 9, 12), (200, 3, 4, 5, 6)]

    def whole() -> dict[str, Tensor]:
        found = []
        for answer in answers:
            text = torch.cat([tokens, torch.tensor([answer])], 1)
            found.append(log_p(model, text)[-len(answer) :].mean())
        return {"log_p": torch.stack(found)}

    got = {"log_p": torch.tensor(recall.log_likelihoods(model, tokens, answers))}
    tolerance.check(got, in_double(model, whole), whole)


def test_rank_counts_the_answers_that_are_likelier(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = SimpleNamespace(tokens=None, answer=(1,), distractors=((2,), (3,), (4,), (5,)))
    for likelihoods, place in (([0.0, -1, -2, -3, -4], 0), ([-2.5, -1, -2, -3, -4], 2), ([-1.0, -1, -1, -1, -1], 4)):
        monkeypatch.setattr(recall, "log_likelihoods", lambda *_, found=likelihoods: list(map(float, found)))
        ranked = recall.rank(None, prompt)  # type: ignore[arg-type]
        assert (ranked["rank"], ranked["score"], ranked["log_p"]) == (place, 1 - place / 4, likelihoods[0])
    monkeypatch.setattr(recall, "log_likelihoods", lambda *_: [float("nan"), 0.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="not finite"):
        recall.rank(None, prompt)  # type: ignore[arg-type]


class _Scripted(nn.Module):
    """Says what it is told to."""

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.script, self.config = script, CONFIGS["llama"]
        self.generation_config = SimpleNamespace(eos_token_id=256)

    def forward(self, input_ids: Tensor, logits_to_keep: int, **kwargs: Any) -> Any:
        assert logits_to_keep == 1
        self.script, token = self.script[1:], self.script[0]
        return SimpleNamespace(logits=F.one_hot(torch.tensor([[token]]), 260).float())


@pytest.mark.parametrize("task", needles.TASKS)
def test_a_right_answer_scores_one(task: str, haystack: needles.Haystack, tokenizer: Any) -> None:
    prompt = needles.make(task, haystack, 1700, 0.5, 3, Random(1))
    for said, score in ((prompt.answer, 1.0), (prompt.distractors[0], 0.0)):
        found = recall.answer(_Scripted([*said, 256]), tokenizer, prompt, len(said) + 1)
        assert found["score"] == score and found["output"] == tokenizer.decode(said)


# associative recall


@pytest.mark.parametrize("gap", [6, 7, 40])
def test_sequences_answer_each_key_a_gap_away(gap: int) -> None:
    task = mqar.Recall(3, 5)
    tokens, answers = task.draw(gap, 20, torch.Generator().manual_seed(gap))
    assert tokens.shape == answers.shape == (20, gap + 6)
    for row, told in zip(tokens.tolist(), answers.tolist(), strict=True):
        pairs = {row[i]: row[i + 1] for i in range(0, 6, 2)}
        assert len(pairs) == 3 and max(pairs) < 5 <= min(pairs.values()) and max(pairs.values()) < 10
        asked = [i for i, value in enumerate(told) if value != mqar.NOT_ASKED]
        assert asked == [gap, gap + 2, gap + 4]
        assert all(told[i] == pairs[row[i]] and row[i] == row[i - gap] for i in asked)
        rest = set(range(6, gap + 6)) - set(asked)
        assert all(row[i] == task.vocabulary - 1 for i in rest)


@pytest.mark.parametrize("two_sided", [False, True])
def test_recall_models_see_by_their_layout(two_sided: bool) -> None:
    model = mqar.RecallModel(11, from_spec("Window(2, 2)"), two_sided)
    for layer in model.layers:
        nn.init.normal_(layer.attention.qkv.weight, std=0.3)
    tokens = torch.randint(11, (1, 30))
    changed = tokens.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 11
    with torch.no_grad():
        differ = (model(tokens) != model(changed)).any(-1)[0].nonzero()[:, 0].tolist()
    # two layers of two tokens each way, and a token is told the one before it
    assert differ == list(range(11 if two_sided else 15, 21))


def test_what_a_layout_carries_is_learned_and_the_rest_is_chance(seed: int) -> None:
    task, training = mqar.Recall(2, 4), mqar.Training(60, 32, 1e-2)
    losses: list[float] = []
    full = mqar.measure(Full(), task, training, (4, 12), False, seed, losses.append)
    near = mqar.measure(from_spec("Window(3, 0)"), task, training, (4, 12), False, seed)
    assert [found["gap"] for found in full["accuracy"]] == [4, 12]
    assert min(found["accuracy"] for found in full["accuracy"]) > 0.9
    assert near["accuracy"][1]["accuracy"] < 0.5
    assert len(losses) == 60 and full["final_loss"] == losses[-1] < losses[0] and full["layout"] == "Full()"
    short = mqar.Training(3, 4)
    one, same, other = (mqar.measure(Full(), task, short, (4, 12), False, s)["final_loss"] for s in (1, 1, 2))
    assert one == same != other


def test_accuracy_is_of_the_queries_alone() -> None:
    task = mqar.Recall(3, 5)

    class Knows(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            gap = tokens.shape[1] - 6
            said = torch.zeros_like(tokens)
            # two of three
            said[:, gap : gap + 4 : 2] = tokens[:, 1:5:2]
            return F.one_hot(said, task.vocabulary).float()

    found = mqar.accuracy(Knows(), task, 9, 50, torch.Generator().manual_seed(0))
    assert found == pytest.approx(2 / 3)


def test_impossible_recall() -> None:
    with pytest.raises(ValueError, match="pairs"):
        mqar.Recall(0)
    with pytest.raises(ValueError, match="symbols: expected at least as many as pairs, 9, got 8"):
        mqar.Recall(9, 8)
    with pytest.raises(ValueError, match="3 pairs need a gap of 6 or more, got 5"):
        mqar.Recall(3).draw(5, 1, torch.Generator())
    with pytest.raises(ValueError, match="steps"):
        mqar.Training(0)
