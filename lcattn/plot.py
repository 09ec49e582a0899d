"""Pictures: layouts in the terminal and as PNG, and the charts of the benchmarks and of the demonstration.

Charts are drawn from plain numbers read back from a CSV; nothing here measures anything.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .layout import Layout
from .lowering import BlockTable

_SHADES = " ░▒▓█"
_COLOURS = ("#3b6ea8", "#d9822b")
_GREY = "#8a8f98"


@dataclass(frozen=True)
class Picture:
    """How many pairs a layout shows in each cell of a grid over T queries and S keys.

    Attributes:
        counts: [rows, columns] int64, visible pairs; areas: [rows, columns] int64, pairs there are.
        T, S: lengths; table: the lowered table it was counted from, block by block.
    """

    counts: np.ndarray
    areas: np.ndarray
    T: int
    S: int
    table: BlockTable

    @property
    def visible(self) -> int:
        """Visible pairs in all."""
        return int(self.counts.sum())

    @property
    def share(self) -> float:
        """Visible pairs over T * S."""
        return self.visible / (self.T * self.S)


def picture(layout: Layout, T: int, S: int, cells: int = 64, head: int = 0, block: int | None = None) -> Picture:
    """Counts a layout's visible pairs from its block table: O(entries * cells), never O(T * S).

    Args:
        layout: what to draw; T, S: queries, standing at the end, and keys.
        cells: rows and columns of the picture, at most; head: the head to draw where heads differ.
        block: side of a block of the table; by default 64, less for lengths that would give a coarse picture.
    """
    if block is None:
        block = 64
        while block > 1 and max(T, S) < block * cells:
            block //= 2
    H = layout.own_sizes()[1]
    if 1 < H <= head:
        raise ValueError(f"head: {layout} is of {H} heads and has no head {head}")
    table = layout.block_table(T, S, block, block, heads=max(head + 1, H))
    seg = table.seg_ptr[0, min(head, table.seg_ptr.shape[1] - 1)].numpy().astype(np.int64)
    entries = table.entries.numpy().astype(np.int64)
    at = np.arange(seg[0, 0], seg[-1, -1])
    q_block = np.repeat(np.arange(len(seg)), seg[:, -1] - seg[:, 0])
    full = at < seg[q_block, 1]
    first, payload = entries[at].T
    n_rows = np.minimum(block, T - q_block * block)

    q_edges, k_edges = _edges(T, block, cells), _edges(S, block, cells)
    row = np.searchsorted(q_edges, q_block * block, side="right") - 1
    counts = np.zeros((len(q_edges) - 1, len(k_edges) - 1), dtype=np.int64)

    low, high = first[full] * block, np.minimum((first[full] + payload[full]) * block, S)
    for column, (left, right) in enumerate(itertools.pairwise(k_edges)):
        width = np.clip(np.minimum(high, right) - np.maximum(low, left), 0, None)
        counts[:, column] += np.bincount(row[full], weights=width * n_rows[full], minlength=len(counts)).astype(
            np.int64
        )

    # visible pairs of each tile's upper left corner, since the lengths may cut a tile anywhere
    bits = np.unpackbits(table.mask_tiles.numpy().view(np.uint8), axis=-1, bitorder="little")[..., :block]
    corner = np.zeros((len(bits), block + 1, block + 1), dtype=np.int32)
    corner[:, 1:, 1:] = bits.cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32)
    k_start = first[~full] * block
    inside = corner[payload[~full], n_rows[~full], np.minimum(block, S - k_start)]
    np.add.at(counts, (row[~full], np.searchsorted(k_edges, k_start, side="right") - 1), inside)
    return Picture(counts, np.outer(np.diff(q_edges), np.diff(k_edges)), T, S, table)


def _edges(n: int, block: int, cells: int) -> np.ndarray:
    """Edges of at most `cells` cells of whole blocks over [0, n)."""
    n_blocks = -(-n // block)
    step = -(-n_blocks // cells) * block
    return np.append(np.arange(0, n, step), n)


def terminal(image: Picture) -> str:
    """The picture as text: a query per row, a key per column, darker where more is visible."""
    # a character is twice as high as wide
    rows = range(0, len(image.counts), 2)
    counts = np.stack([image.counts[r : r + 2].sum(0) for r in rows])
    share = counts / np.stack([image.areas[r : r + 2].sum(0) for r in rows])
    level = np.where(share >= 1, 4, np.ceil(np.minimum(share, 0.999) * 3)).astype(int)
    width = counts.shape[1]
    lines = ["┌" + "─" * width + "┐"]
    lines += ["│" + "".join(_SHADES[x] for x in row) + "│" for row in level]
    lines.append("└" + "─" * width + "┘")
    return "\n".join(lines)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'lcattn[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "figure.dpi": 150,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "legend.frameon": False,
        }
    )
    return pyplot


def _save(figure: Any, path: Path) -> Path:
    """Writes the figure, and gives the path with the suffix that a name without one gets."""
    if path.suffix.lower() not in ("", ".png"):
        raise ValueError(f"plots are written as PNG: expected a name that ends in .png, got {path}")
    path = path.with_suffix(path.suffix or ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    _pyplot().close(figure)
    return path


def save_layout(image: Picture, title: str, path: Path) -> Path:
    """Writes the picture as PNG."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5.2, 4.4))
    shown = axes.imshow(
        image.counts / image.areas,
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(0, image.S, image.T, 0),
        interpolation="nearest",
        aspect="auto" if image.T != image.S else "equal",
    )
    axes.set(xlabel="key position (tokens)", ylabel="query position (tokens)", title=title)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    figure.colorbar(shown, label="visible share of the cell", shrink=0.85)
    return _save(figure, path)


@dataclass(frozen=True)
class Bar:
    """One provider's result in one pass: a median and the range of its rounds."""

    label: str
    measure: str
    median: float
    low: float
    high: float


def save_bars(bars: Sequence[Bar], xlabel: str, title: str, path: Path, target: float | None = None) -> Path:
    """Writes horizontal bars grouped by label, one colour a measure, whiskers over the rounds' range."""
    plt = _pyplot()
    labels = list(dict.fromkeys(bar.label for bar in bars))
    measures = list(dict.fromkeys(bar.measure for bar in bars))
    height = 0.8 / len(measures)
    figure, axes = plt.subplots(figsize=(6.4, 0.8 + (0.2 + 0.22 * len(measures)) * len(labels)))
    for m, measure in enumerate(measures):
        mine = [bar for bar in bars if bar.measure == measure]
        at = [labels.index(bar.label) + (m - (len(measures) - 1) / 2) * height for bar in mine]
        medians = np.array([bar.median for bar in mine])
        whiskers = [medians - [bar.low for bar in mine], np.array([bar.high for bar in mine]) - medians]
        axes.barh(at, medians, height * 0.9, color=_COLOURS[m % len(_COLOURS)], label=measure)
        axes.errorbar(medians, at, xerr=whiskers, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        for y, bar in zip(at, mine, strict=True):
            axes.annotate(
                f"{bar.median:.3g}",
                (bar.high, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    if target is not None:
        axes.axvline(target, color=_GREY, linestyle="--", linewidth=1, label="target")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set(xlabel=xlabel, title=title)
    if len(measures) > 1 or target is not None:
        axes.legend(loc="lower right")
    return _save(figure, path)


def save_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    path: Path,
    log: bool = False,
    mark: tuple[float, str] | None = None,
) -> Path:
    """Writes one line of (x, y) points a name; `log` scales x by powers of two and y by powers of ten; `mark` draws and
    names a vertical line."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    marker = "o" if log else None
    # lines that coincide stay visible through each other's gaps
    for (name, points), style in zip(lines.items(), itertools.cycle(("-", "--", ":")), strict=False):
        axes.plot(*zip(*points, strict=True), style, marker=marker, markersize=4, linewidth=2, label=name)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        axes.minorticks_off()
    if mark is not None:
        axes.axvline(mark[0], color=_GREY, linestyle="--", linewidth=1, label=mark[1])
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def save_heatmaps(
    panels: Mapping[str, np.ndarray],
    columns: Sequence[str],
    rows: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str,
    path: Path,
) -> Path:
    """Writes one grid of shares in [0, 1] a name, side by side; NaN stays blank."""
    plt = _pyplot()
    height = 1.3 + 0.2 * max(5, len(rows))
    figure, found = plt.subplots(
        1, len(panels), figsize=(1.2 + 2.6 * len(panels), height), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, (name, grid) in zip(found[0], panels.items(), strict=True):
        shown = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel=xlabel)
        axes.set_title("\n".join(textwrap.wrap(name, 32)), fontsize=8)
    found[0, 0].set(ylabel=ylabel)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(shown, ax=list(found[0]), label="score", shrink=0.85)
    return _save(figure, path)
