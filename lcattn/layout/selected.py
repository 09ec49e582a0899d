"""Far blocks chosen by content: `TopKBlocks`, which the user writes, and `SelectedBlocks`, which a call makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Bounds, Context, Layout, check_int, register, set_fields
from .data import callable_number

if TYPE_CHECKING:
    from ..lowering import Region

Scorer = Callable[[Tensor, Tensor, int], Tensor]


@register
@dataclass(frozen=True, repr=False, eq=False)
class SelectedBlocks(Layout):
    """Blocks of queries see listed blocks of keys.

    With blocks of `block` coordinates (x is in block x // block), query coordinate x in head h sees key coordinate y
    iff y // block is one of blocks[b, h // group, x // block - first[b]]. Rows beyond the list see nothing.

    Args:
        blocks: [B or 1, G, n_q_blocks, k] int, blocks of keys, or -1 for none; G = 1 serves all heads.
        first: [B or 1] int, the block of queries of the first row.
        block: coordinates in a block; group: query heads that share a list.
    """

    blocks: Tensor
    first: Tensor
    block: int = 64
    group: int = 1

    def __post_init__(self) -> None:
        check_int("SelectedBlocks", "block", self.block, 1)
        check_int("SelectedBlocks", "group", self.group, 1)
        for name, value, dims in (("blocks", self.blocks, 4), ("first", self.first, 1)):
            if not isinstance(value, Tensor) or value.dim() != dims or value.is_floating_point():
                what = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"SelectedBlocks: {name} must have {dims} dimensions of integers, got {what}")
        set_fields(self, spec=f"SelectedBlocks(@, @, {self.block}, {self.group})", tensors=(self.blocks, self.first))
        set_fields(self, by_index=True, per_head=self.blocks.shape[1] > 1)
        set_fields(self, per_batch=self.blocks.shape[0] > 1 or self.first.shape[0] > 1)

    def own_sizes(self) -> tuple[int, int]:
        b, lists, _, _ = self.blocks.shape
        return max(b, self.first.shape[0]), lists * self.group if lists > 1 else 1

    def check(self, B: int, H: int, T: int, S: int) -> None:
        b, lists, _, _ = self.blocks.shape
        if b not in (1, B) or self.first.shape[0] not in (1, B) or (lists != 1 and lists * self.group != H):
            raise ValueError(
                f"SelectedBlocks: blocks must be [{B} or 1, 1 or {H} / group, rows, k] and first [{B} or 1], got"
                f" {list(self.blocks.shape)}, {list(self.first.shape)} and group {self.group}"
            )

    def _block_of(self, position: Tensor) -> Tensor:
        return torch.div(position, self.block, rounding_mode="floor")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        device, (_, _, n_rows, k) = q_pos.device, self.blocks.shape
        b, h = (torch.as_tensor(x, device=device) for x in (ctx.b, ctx.h))
        lists = (self.blocks if self.blocks.device == device else self.blocks.to(device)).long()
        row = self._block_of(q_pos) - self.first.to(device)[b if self.first.shape[0] > 1 else torch.zeros_like(b)]
        batch = b if lists.shape[0] > 1 else torch.zeros_like(b)
        head = h // self.group if lists.shape[1] > 1 else torch.zeros_like(h)
        listed = lists[batch, head, row.clamp(0, n_rows - 1)]
        listed = torch.where(((row >= 0) & (row < n_rows))[..., None], listed, -1)
        k_block = self._block_of(k_pos)
        seen = torch.zeros(torch.broadcast_shapes(listed.shape[:-1], k_block.shape), dtype=torch.bool, device=device)
        for i in range(k):
            seen = seen | ((listed[..., i] == k_block) & (k_block >= 0))
        return seen

    def row_range(self, b: int) -> tuple[int, int]:
        """The first block of queries of a batch row's list, and the one after its last."""
        first = int(self.first[b if self.first.shape[0] > 1 else 0])
        return first, first + self.blocks.shape[2]

    def _grid(self, region: Region) -> tuple[Tensor, int]:
        """Which blocks one head lists, [rows, columns] bool, and the block of its first row."""

        def make() -> tuple[Tensor, int]:
            b = region.b if self.blocks.shape[0] > 1 else 0
            head = region.h // self.group if self.blocks.shape[1] > 1 else 0
            listed = self.blocks[b, head].cpu().long()
            n_columns = int(listed.max()) + 1 if listed.numel() else 0
            # a column more takes what is listed as none
            grid = torch.zeros(len(listed), max(n_columns, 1) + 1, dtype=torch.bool)
            grid.scatter_(1, torch.where(listed < 0, grid.shape[1] - 1, listed), True)
            return grid[:, :-1], self.row_range(region.b)[0]

        found: tuple[Tensor, int] = region.memo(("SelectedBlocks", id(self.blocks)), make)
        return found

    def bounds(self, region: Region) -> Bounds:
        def make() -> Tensor:
            grid, _ = self._grid(region)
            counts = torch.zeros(grid.shape[0] + 1, grid.shape[1] + 1, dtype=torch.int32)
            counts[1:, 1:] = grid.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
            return counts

        counts = region.memo(("SelectedBlocks counts", id(self.blocks)), make)
        _, first = self._grid(region)
        r0, r1 = self._block_of(region.q_lo) - first, self._block_of(region.q_hi) - first + 1
        c0, c1 = self._block_of(region.k_lo), self._block_of(region.k_hi) + 1
        area = (r1 - r0) * (c1 - c0)
        r0, r1 = (r.clamp(0, counts.shape[0] - 1) for r in (r0, r1))
        c0, c1 = (c.clamp(0, counts.shape[1] - 1) for c in (c0, c1))
        count = counts[r1, c1] - counts[r0, c1] - counts[r1, c0] + counts[r0, c0]
        return count > 0, count == area

    def _mixed_key(self, region: Region) -> list[Tensor]:
        rows, columns = ((size + self.block - 2) // self.block + 1 for size in (region.block_q, region.block_k))
        if rows > 8 or columns > 32:
            return super()._mixed_key(region)
        # where the corner stands within a block, and which blocks it and those after it are listed in
        grid, first = self._grid(region)
        row = self._block_of(region.q_lo)[:, None] - first + torch.arange(rows)
        column = self._block_of(region.k_lo)[:, None] + torch.arange(columns)
        inside_rows, inside_columns = (row >= 0) & (row < grid.shape[0]), (column >= 0) & (column < grid.shape[1])
        row, column = row.clamp(0, grid.shape[0] - 1), column.clamp(0, grid.shape[1] - 1)
        listed = grid[row[:, :, None], column[:, None, :]] & inside_rows[:, :, None] & inside_columns[:, None, :]
        bits = (listed.long() << torch.arange(columns)).sum(2)
        return [torch.remainder(region.q_lo, self.block), torch.remainder(region.k_lo, self.block), *bits.unbind(1)]


def _previous_block_scores(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The default scorer: means of keys against the mean of the keys just before, [B, G, n_q_blocks, n_k_blocks]."""
    # decoding and prefill must round to the same scores: sums in one order, products too precise for theirs to matter
    means = _sum_in_halves(k.unflatten(2, (-1, block)).to(_wide(k.dtype))).double() / block
    n_q, n_k = q.shape[2], means.shape[2]
    probe = torch.nn.functional.pad(means, (0, 0, max(0, n_q - n_k), 0))[:, :, -n_q:]
    # the probe itself would win every time
    itself = torch.arange(n_k, device=k.device) == torch.arange(n_k - n_q, n_k, device=k.device)[:, None]
    return (probe @ means.mT).masked_fill(itself, -torch.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_in_halves(x: Tensor) -> Tensor:
    """The sum over the last dimension but one, in an order that depends on its size alone, never on memory layout."""
    while (n := x.shape[-2]) > 1:
        half = n // 2
        sums = x[..., :half, :] + x[..., half : 2 * half, :]
        x = torch.cat([sums, x[..., 2 * half :, :]], -2) if n % 2 else sums
    return x[..., 0, :]


@register
@dataclass(frozen=True, repr=False, eq=False)
class TopKBlocks(Layout):
    """Blocks of queries see the k earlier blocks of keys that suit them best, by content.

    Blocks are of `block` coordinates. A block of queries r chooses, in each kv head, among blocks of keys that lie
    wholly before it, those of the largest score (the earlier of equals; fewer than k where there are fewer). By default

        score[r, c] = mean of the keys of block r - 1 . mean of the keys of block c,   c < r - 1,

    hidden keys being zeros.

    The probe is made of keys, not of queries: nothing at or after a query of block r may decide what it sees, or the
    future would leak, and while the block is decoded its own first query is gone, but keys stay in the cache. So the
    choice is the same in prefill and decoding. It is made afresh in each call, in O((T / block) (S / block) D + S D),
    and has no gradient; scores, values and keys of the chosen blocks have theirs as usual.

    Join it with a local window, since a query's own block is never chosen, nor by default the one before it, the
    probe: `(Chunked(512) | TopKBlocks(8)) & Causal()`. Negative coordinates are never chosen. q_pos and k_pos, where
    given, step by one in each row.

    Args:
        k: blocks chosen; block: coordinates in a block, multiples of 64 are cheapest to lower.
        scorer: f(q, k, block) -> scores [B, G or H, n_q_blocks, n_k_blocks] float, instead of the default; -inf leaves
            a block out. q: [B, H, n_q_blocks, D], the first query of each block, NaN where the call does not hold it
            (decoding; a scorer that decodes must read keys alone); k: [B, G, n_k_blocks * block, D], the keys of the
            blocks before the last block of queries, zeros where hidden or missing. Block r of the queries follows
            block n_k_blocks - n_q_blocks + r of the keys. Scores of block r may depend on queries up to r and on keys
            up to the block that it follows, and on no later ones. Keep one function: it is known by its identity.
        per: "kv", one choice a kv head, scores averaged over its query heads; "head", one a query head, where the
            scorer tells them apart.

    Raises:
        ValueError: k, block, scorer or per is wrong; in a call, T > S without q_pos, or coordinates with gaps, or
            scores of a wrong shape, or, from a scorer of one's own, NaN, or scores that change with what comes later
            (tried once, in the first call that can tell).

    Source: Lu et al. 2025 (MoBA), equations 5 and 6, with a key for their query.
    """

    k: int
    block: int = 64
    scorer: Scorer | None = None
    per: str = "kv"

    by_content = True

    def __post_init__(self) -> None:
        check_int("TopKBlocks", "k", self.k, 1)
        check_int("TopKBlocks", "block", self.block, 1)
        if self.scorer is not None and not callable(self.scorer):
            raise ValueError(f"TopKBlocks: scorer must be callable as f(q, k, block), got {self.scorer!r}")
        if self.per not in ("kv", "head"):
            raise ValueError(f'TopKBlocks: per must be "kv" or "head", got {self.per!r}')
        scorer = None if self.scorer is None else f"_callable({callable_number(self.scorer)})"
        set_fields(self, spec=f"TopKBlocks({self.k}, {self.block}, {scorer}, {self.per!r})")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        raise ValueError("TopKBlocks: what it sees depends on q and k; `select` it, as lcattn.attention does")

    def bounds(self, region: Region) -> Bounds:
        raise ValueError("TopKBlocks: what it sees depends on q and k; `select` it, as lcattn.attention does")

    def check(self, B: int, H: int, T: int, S: int) -> None:
        pass

    def select(
        self,
        q: Tensor,
        k: Tensor,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> SelectedBlocks:
        """The blocks chosen for a call; q: [B, H, T, D], k: [B, G, S, D], coordinates and mask as in a `Problem`."""
        with torch.no_grad():
            return self._select(q.detach(), k.detach(), q_pos, k_pos, key_mask)

    def _select(
        self, q: Tensor, k: Tensor, q_pos: Tensor | None, k_pos: Tensor | None, key_mask: Tensor | None
    ) -> SelectedBlocks:
        H, T, G, S, block = q.shape[1], q.shape[2], k.shape[1], k.shape[2], self.block
        if q_pos is None and T > S:
            raise ValueError(f"TopKBlocks: {T} queries stand at the end of {S} keys; give q_pos where T > S")
        if q_pos is None and k_pos is None:
            first_q = torch.full((1,), S - T, device=q.device)
            n_k = (S - 1) // block
            n_q = n_k - (S - T) // block + 1
            keys = k[:, :, : n_k * block]
            seen = None if key_mask is None else key_mask[:, : n_k * block]
            occupied = torch.ones(1, n_k, dtype=torch.bool, device=q.device)
        else:
            first_q = _first("q_pos", q_pos, S - T, q.device)
            first_k = _first("k_pos", k_pos, 0, q.device)
            # the most blocks that so many coordinates touch, and all that any of those queries may choose from
            n_q = (T + block - 2) // block + 1
            n_k = (S + block - 2) // block + n_q
            start = (torch.div(first_q, block, rounding_mode="floor") + n_q - 1 - n_k) * block
            at = (start - first_k)[:, None] + torch.arange(n_k * block, device=q.device)
            seen = (at >= 0) & (at < S)
            at = at.clamp(0, S - 1)
            rows, heads = (torch.arange(n, device=q.device) for n in (len(k), G))
            keys = k[rows[:, None, None], heads[:, None], at[:, None]]
            if key_mask is not None:
                seen = seen & key_mask.expand(len(k), S).gather(1, at.expand(len(k), -1))
        first = torch.div(first_q, block, rounding_mode="floor")
        if n_k == 0:
            return self._listed(torch.full((1, 1, n_q, 1), -1, device=q.device), first, H)
        if seen is not None:
            keys = torch.where(seen[:, None, :, None], keys, 0)
            occupied = seen.unflatten(1, (n_k, block)).any(2)
        column = torch.arange(n_k, device=q.device) + (first + n_q - 1 - n_k)[:, None]
        row = torch.arange(n_q, device=q.device) + first[:, None]
        # room for more rows than there are blocks of queries asks nothing of a scorer
        may = (column[:, None, :] < row[:, :, None]) & (row * block < first_q[:, None] + T)[:, :, None]
        may = may & (occupied & (column >= 0))[:, None, :]
        scores = self._scores(q, keys, row * block - first_q[:, None], may[:, None])
        # an order that has no equals: by score, then the earlier block
        bits = (scores.float() + 0.0).view(torch.int32).long()
        order = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 31) - column[:, None, None, :].clamp(min=0)
        chosen = order.topk(min(self.k, n_k), dim=3).indices
        columns = column[:, None, None, :].expand(scores.shape).gather(3, chosen)
        found = torch.where(scores.gather(3, chosen) > -torch.inf, columns, -1)
        return self._listed(found, first, H)

    def _listed(self, blocks: Tensor, first: Tensor, H: int) -> SelectedBlocks:
        return SelectedBlocks(blocks.int(), first.int(), self.block, H // blocks.shape[1])

    def _scores(self, q: Tensor, keys: Tensor, at: Tensor, may: Tensor) -> Tensor:
        """Scores [B, lists, n_q_blocks, n_k_blocks], -inf where a block may not be chosen; at: indices of probes."""
        B, H, T, D = q.shape
        G, n_q, n_k = keys.shape[1], at.shape[1], may.shape[3]
        held = (at >= 0) & (at < T)
        index = at.clamp(0, T - 1)[:, None, :, None].expand(B, H, -1, D)
        probes = torch.where(held[:, None, :, None], q.gather(2, index), torch.nan)
        scores: Any = (self.scorer or _previous_block_scores)(probes, keys, self.block)
        if (
            not isinstance(scores, Tensor)
            or not scores.is_floating_point()
            or scores.shape not in ((B, G, n_q, n_k), (B, H, n_q, n_k))
        ):
            what = f"{list(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"TopKBlocks: scorer must give [{B}, {G} or {H}, {n_q}, {n_k}] floats (n_q_blocks by n_k_blocks),"
                f" got {what}"
            )
        if self.scorer is not None:
            _check_no_leak(self.scorer, probes, keys, self.block, scores, may)
        if self.per == "kv" and scores.shape[1] != G:
            scores = scores.unflatten(1, (G, -1)).mean(2)
        scores = scores.masked_fill(~may, -torch.inf)
        if self.scorer is not None:
            _require(
                ~scores.isnan().any(),
                "TopKBlocks: scorer gave NaN; the first query of a block is NaN where the call does not hold it, as in"
                " decoding, where a scorer must read keys alone",
            )
        return scores


# numbers of scorers whose scores were seen to stay when what comes later changed
_LEAK_FREE: set[int] = set()


def _check_no_leak(scorer: Scorer, probes: Tensor, keys: Tensor, block: int, scores: Tensor, may: Tensor) -> None:
    """Asks a scorer once more, with other queries and keys after the middle: scores before it must stay."""
    n_rows = may.shape[2] // 2
    first = (may.shape[3] - may.shape[2] + n_rows) * block
    number = callable_number(scorer)
    if number in _LEAK_FREE or torch.compiler.is_compiling() or first <= 0 or not may[:, :, :n_rows].any():
        return
    other_probes, other_keys = (
        torch.cat([x[:, :, :n], x[:, :, n:] * -2], 2) for x, n in ((probes, n_rows), (keys, first))
    )
    again = scorer(other_probes, other_keys, block)
    before, after = (given[:, :, :n_rows].masked_fill(~may[:, :, :n_rows], 0) for given in (scores, again))
    spread = float(before[before.isfinite()].abs().max()) if before.isfinite().any() else 0.0
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * spread, equal_nan=True):
        raise ValueError(
            "TopKBlocks: scorer gave a block of queries other scores when later queries and keys changed: the future"
            " would leak, and decoding would choose otherwise"
        )
    _LEAK_FREE.add(number)


def _first(name: str, position: Tensor | None, default: int, device: torch.device) -> Tensor:
    """The first coordinate of each row, [B or 1] int64, of rows that step by one."""
    if position is None:
        return torch.full((1,), default, device=device)
    message = f"TopKBlocks: {name} must step by one in each row (packed documents do not: give Documents(...) instead)"
    _require((position.diff(dim=1) == 1).all(), message)
    return position[:, 0].long()


def _require(condition: Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)
