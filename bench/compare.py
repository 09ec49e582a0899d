"""The same workloads on this tree and on another commit of lcattn, in turns."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lcattn

from .measure import Progress, Sgemm, entry, paired, workload
from .records import blank


def serve(names: list[str], seed: int) -> None:
    """Prepares lcattn on the named workloads, then answers each line "workload pass" with a paired round."""
    sgemm = Sgemm()
    entries = {(w, m): entry(workload(w), "lcattn", m, seed) for w in names for m in workload(w).passes}
    print("ready", flush=True)
    row = blank()
    for line in sys.stdin:
        name, measure = line.split()
        found = paired(entries[name, measure], sgemm, row)
        print(json.dumps({"relative": found.relative, "share": found.share, "ms": found.value}), flush=True)


class _Worker:
    """`serve` in a process of its own, with the lcattn found in `tree`."""

    def __init__(self, tree: Path, names: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench", "serve-child", *names],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended with status {self.process.wait()}; its errors stand above")
        return line

    def round(self, name: str, measure: str) -> dict[str, float]:
        assert self.process.stdin is not None
        print(name, measure, file=self.process.stdin, flush=True)
        return json.loads(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@contextmanager
def _worktree(root: Path, revision: str, progress: Progress) -> Iterator[Path]:
    """A temporary checkout of a revision, built, with this tree's benchmarks."""
    with tempfile.TemporaryDirectory(prefix="lcattn-compare-") as folder:
        tree = Path(folder) / "tree"
        progress(f"checking out {revision}")
        added = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), revision],
            cwd=root,
            capture_output=True,
            text=True,
        )
        if added.returncode:
            raise ValueError(f"cannot check out {revision!r}: {added.stderr.strip()}")
        try:
            progress(f"building {revision}")
            built = subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                cwd=tree,
                capture_output=True,
                text=True,
            )
            if built.returncode:
                raise RuntimeError(f"{revision} does not build:\n{(built.stdout + built.stderr).strip()[-2000:]}")
            shutil.copytree(Path(__file__).parent, tree / "bench", dirs_exist_ok=True)
            # what the benchmarks draw and count with came later than some revisions
            for name in ("plot.py", "tolerance.py"):
                if not (tree / "lcattn" / name).exists():
                    shutil.copy2(root / "lcattn" / name, tree / "lcattn")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=root, capture_output=True)


def compare(revision: str, names: list[str], rounds: int, progress: Progress) -> list[tuple[str, ...]]:
    """Rows (workload, pass, share there, share here, time here / there, range), from interleaved rounds."""
    root = Path(lcattn.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        raise ValueError("compare needs a source tree under git")
    rows = []
    with _worktree(root, revision, progress) as tree:
        progress("preparing")
        workers = [_Worker(path, names) for path in (tree, root)]
        try:
            for name in names:
                for measure in workload(name).passes:
                    progress(f"{name}, {measure}")
                    found: list[list[dict[str, float]]] = [[], []]
                    for number in range(rounds):
                        # who starts alternates, so that neither gains from the other's wake
                        for which in (0, 1) if number % 2 else (1, 0):
                            found[which].append(workers[which].round(name, measure))
                    ratios = [b["relative"] / a["relative"] for a, b in zip(*found, strict=True)]
                    there, here = (statistics.median(x["share"] for x in side) for side in found)
                    rows.append(
                        (
                            name,
                            measure,
                            f"{there:.1%}",
                            f"{here:.1%}",
                            f"{statistics.median(ratios):.3f}",
                            f"{min(ratios):.3f} to {max(ratios):.3f}",
                        )
                    )
        finally:
            for worker in workers:
                worker.close()
    return rows
