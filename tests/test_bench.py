"""The benchmarks: every provider's answer is checked, wrong ones are caught, reports follow from the CSV."""

from __future__ import annotations

import dataclasses
import math
import mmap
from pathlib import Path

import pytest
import torch
from lcattn.bench import measure, records, report
from lcattn.bench.providers import PROVIDERS, Prepared, Provider, gate
from lcattn.bench.records import Results, Row
from lcattn.bench.workloads import PEERS, WORKLOADS, Inputs, Workload, visible_pairs

import lcattn

TINY = dataclasses.replace(WORKLOADS["main"], N=256, D=16, H=2, chunk=64)


@pytest.mark.parametrize("pass_", report.MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_answer_is_right(name: str, dtype: torch.dtype, pass_: str, seed: int) -> None:
    w = dataclasses.replace(TINY, dtype=dtype)
    reason = PROVIDERS[name].supports(w, pass_)
    if name.startswith("flex") and (name, dtype) != ("flex-bias", torch.float32):
        reason = reason or "compiles for half a minute; its float32 form with the bias is checked"
    if reason:
        pytest.skip(reason)
    verdict = gate(PROVIDERS[name], w, pass_, seed)
    assert verdict.ok, verdict.remark


def _shifted(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    """Folded SDPA with its bias one entry off."""
    shifted = dataclasses.replace(inputs, table=inputs.table.roll(1, 1))
    return PROVIDERS["sdpa-folded-fixed"].prepare(w, shifted, grad)


def _two_sided(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    """Chunks without causality, claimed to be causal."""
    right = PROVIDERS["lcattn"].prepare(w, inputs, grad)
    x = right.leaves
    return dataclasses.replace(
        right,
        forward=lambda: lcattn.attention(
            x["q"], x["k"], x["v"], layout=lcattn.Chunked(w.chunk), position=w.position(x["table"])
        ),
    )


def _no_bias_gradient(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    """The right output, with the gradient of the bias doubled."""
    right = PROVIDERS["lcattn"].prepare(w, inputs, grad)
    if grad:
        right.leaves["table"].register_hook(lambda g: 2 * g)
    return right


def _unlearned(w: Workload, inputs: Inputs, grad: bool) -> Prepared:
    """The right output, with no gradient of the bias offered."""
    right = PROVIDERS["lcattn"].prepare(w, inputs, grad)
    right.leaves["table"].requires_grad_(False)
    return dataclasses.replace(right, leaves={name: right.leaves[name] for name in "qkv"})


@pytest.mark.parametrize("defect", [_shifted, _two_sided, _no_bias_gradient, _unlearned])
def test_wrong_answers_are_caught(defect: object, seed: int) -> None:
    broken = Provider("broken", "broken", "", defect, fixed_bias=defect is _shifted)  # type: ignore[arg-type]
    verdict = gate(broken, TINY, "forward+backward", seed)
    assert not verdict.ok and "wrong answer" in verdict.remark


def test_reasons_are_told(seed: int) -> None:
    assert "no backward on CPU" in str(PROVIDERS["flex-bias"].supports(TINY, "forward+backward"))
    assert "no multiple of 64" in str(PROVIDERS["sdpa-folded"].supports(dataclasses.replace(TINY, N=100), "forward"))
    assert "create_block_mask" in str(PROVIDERS["flex"].supports(WORKLOADS["long"], "forward"))
    w = dataclasses.replace(TINY, providers=("flex-bias",), passes=("forward+backward",))
    entries, skipped = measure.prepare([w], None, report.MEASURES, seed, lambda _: None)
    assert not entries and [item.reason for item in skipped] == [PROVIDERS["flex-bias"].backward]


def test_scores_are_far_from_uniform(seed: int) -> None:
    inputs = WORKLOADS["main"].small().draw(seed)
    assert float((inputs.q @ inputs.k.mT / 8).std()) > 2.9


def test_useful_work_counts_visible_scores() -> None:
    i = torch.arange(300)
    seen = (i <= i[:, None]) & (i[:, None] // 64 - i // 64 <= 1)
    assert visible_pairs(lcattn.Chunked(64) & lcattn.Causal(), 3, 300) == 3 * int(seen.sum())
    heads = lcattn.PerHead([lcattn.Full(), lcattn.Causal()])
    assert visible_pairs(heads, 2, 100) == 100 * 100 + 5050


def test_rounds_are_paired_and_interleaved(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SGEMM_SIZE", 64)
    w = dataclasses.replace(TINY, providers=("sdpa-folded", "sdpa-causal"))
    entries, skipped = measure.prepare([w], None, report.MEASURES, seed, lambda _: None)
    assert len(entries) == 4 and not any(item.wrong for item in skipped)
    rows = list(measure.interleaved(entries, 3, records.blank()))
    assert [row.round for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    first = [(row.provider, row.measure) for row in rows[::4]]
    assert len(set(first)) == 3
    assert all(row.value > 0 and row.beside_ms > 0 and row.work > 0 for row in rows)
    by_pass = {row.measure: row.work for row in rows}
    assert by_pass["forward+backward"] == pytest.approx(3.5 * by_pass["forward"])


def _rows() -> list[Row]:
    """Two rounds of invented figures: lcattn at 80 and 75% of sgemm, folded SDPA at a fifth of that."""
    base = dataclasses.replace(records.blank("made"), beside_ms=10.0, beside="sgemm", work=1.0, beside_work=1.0)
    rows = []
    for number, share in enumerate((0.80, 0.75)):
        for measured in report.MEASURES:
            for provider, factor in (("lcattn", 1), ("sdpa-folded", 5), ("sdpa-folded-fixed", 4)):
                for workload, longer in (("main", 1), ("long", 8)):
                    rows.append(
                        dataclasses.replace(
                            base,
                            workload=workload,
                            provider=provider,
                            measure=measured,
                            round=number,
                            value=10.0 / share * factor * longer,
                            work=float(longer),
                        )
                    )
    memory = dataclasses.replace(base, workload="main", provider="lcattn", unit="MiB", work=0.0, beside_ms=0.0)
    rows.append(dataclasses.replace(memory, measure="extra memory", value=40.0))
    rows.append(dataclasses.replace(memory, measure="io memory", value=100.0))
    return rows


def test_csv_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    rows = _rows()
    records.append(path, rows[:5])
    records.append(path, rows[5:])
    records.append(path, [dataclasses.replace(rows[0], run="later")])
    assert records.read(path, "made") == rows
    assert [row.run for row in records.read(path)] == ["later"]
    with pytest.raises(ValueError, match="no rows of run 'x'"):
        records.read(path, "x")
    with pytest.raises(ValueError, match="does not exist"):
        records.read(tmp_path / "absent.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        records.append(tmp_path / "other.csv", rows)
    with pytest.raises(ValueError, match="other columns"):
        records.read(tmp_path / "other.csv")


def test_csv_of_a_killed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, rows = tmp_path / "rows.csv", _rows()
    path.touch()
    with pytest.raises(ValueError, match="is empty"):
        records.read(path)
    records.append(path, rows[:3])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert records.read(path) == rows[:2] and "incomplete" in capsys.readouterr().err
    records.append(path, rows[2:])
    assert records.read(path) == rows and not capsys.readouterr().err


def test_report_and_plots_come_from_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    records.append(path, _rows())
    results = Results(records.read(path))
    assert results.share("main", "lcattn", "forward") == pytest.approx(0.775)
    assert results.ratio(("main", "sdpa-folded", "forward"), ("main", "lcattn", "forward")) == pytest.approx(5)
    assert results.share("main", "flex", "forward") is None
    met = {target.name: target.met for target in report.targets(results)}
    assert met["head dim 64, forward, share of sgemm"] is True
    assert met["head dim 64, forward, speed over SDPA, folded chunks, fixed bias"] is False
    assert met["head dim 128, forward, share of sgemm"] is None
    assert met["65,536 tokens, forward, time over 8,192"] is True
    assert met["memory beyond inputs, output and gradients, over theirs"] is False
    text = report.summary(results)
    assert "77.5%" in text and "not measured" in text
    written = report.plots(results, tmp_path / "plots")
    assert [p.name for p in written] == ["bench-main.png", "bench-long.png", "bench-lengths.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_memory_is_counted(seed: int) -> None:
    w = dataclasses.replace(TINY, N=2048)
    found = measure.memory_once(w, "lcattn", seed)
    assert found["io_mib"] == pytest.approx(8 * 2 * 2048 * 16 * 4 / 2**20)
    # pages of their own: a tensor could come from heap that earlier tests left resident
    pages = mmap.mmap(-1, 64 << 20)
    growth = measure.PeakGrowth()
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    pages.close()
    assert growth.bytes() == pytest.approx(64 << 20, rel=0.1)


def test_every_workload_names_known_providers() -> None:
    assert set(PEERS) == set(PROVIDERS)
    for w in WORKLOADS.values():
        assert set(w.providers) <= set(PROVIDERS) and "lcattn" in w.providers
        assert math.gcd(w.N, w.chunk) == w.chunk
