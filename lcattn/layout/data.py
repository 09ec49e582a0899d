"""Layouts that read data: document ids, explicit masks, FlexAttention's functions."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Bounds, Context, Layout, check_int, register, set_fields

if TYPE_CHECKING:
    from ..lowering import Region


@register
@dataclass(frozen=True, repr=False, eq=False)
class Documents(Layout):
    """Tokens see only tokens of their own document.

    Args:
        ids: [B or 1, S] int, the document of every key; a negative id marks padding, which sees and is seen by nothing.
        cu_seqlens: [n + 1] int, document edges 0 = c_0 < ... < c_n = S, instead of ids, the same for every batch row.
        q_ids: [B or 1, T] int, the documents of the queries; by default those of the last T keys.
    """

    ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    q_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.cu_seqlens is None):
            raise ValueError("Documents: give either ids or cu_seqlens, not both and not neither")
        if self.cu_seqlens is not None:
            edges = torch.as_tensor(self.cu_seqlens)
            if edges.dim() != 1 or edges.numel() < 2 or edges.is_floating_point():
                raise ValueError(
                    f"Documents: cu_seqlens must be [n + 1] integers, got {tuple(edges.shape)} {edges.dtype}"
                )
            set_fields(self, cu_seqlens=edges)
        for name in ("ids", "q_ids"):
            if getattr(self, name) is None:
                continue
            value = torch.as_tensor(getattr(self, name))
            value = value[None] if value.dim() == 1 else value
            if value.dim() != 2 or value.is_floating_point():
                raise ValueError(
                    f"Documents: {name} must be [B, length] integers, got {tuple(value.shape)} {value.dtype}"
                )
            set_fields(self, **{name: value})
        first, name = self._key_documents()
        tensors = (first,) if self.q_ids is None else (first, self.q_ids)
        set_fields(self, tensors=tensors, by_index=True, per_batch=any(t.dim() > 1 and t.shape[0] > 1 for t in tensors))
        set_fields(self, spec=f"Documents({name}=@)" if self.q_ids is None else f"Documents({name}=@, q_ids=@)")

    def _key_documents(self) -> tuple[Tensor, str]:
        """The document of every key, or the edges where they are no data yet, and how a spec names the two."""
        if self.cu_seqlens is None:
            assert self.ids is not None
            return self.ids, "ids"
        edges = self.cu_seqlens
        if torch.compiler.is_compiling() or edges.is_meta:
            # the number of ids is data, which a tracer cannot read: they are expanded where the operator runs
            return edges, "cu_seqlens"
        edges = edges.long()
        if edges[0] != 0 or (edges.diff() <= 0).any():
            raise ValueError(f"Documents: cu_seqlens must be edges 0 = c_0 < ... < c_n = S, got {self.cu_seqlens}")
        numbers = torch.arange(len(edges) - 1, device=edges.device)
        return torch.repeat_interleave(numbers, edges.diff())[None], "ids"

    def own_sizes(self) -> tuple[int, int]:
        return max(1 if t is self.cu_seqlens else t.shape[0] for t in self.tensors), 1

    def check(self, B: int, H: int, T: int, S: int) -> None:
        for name, value, length in (("ids", self.ids, S), ("q_ids", self.q_ids, T)):
            if value is not None and (value.shape[1] != length or value.shape[0] not in (1, B)):
                raise ValueError(f"Documents: {name} must be [{B} or 1, {length}], got {tuple(value.shape)}")
        if self.cu_seqlens is not None and (ids := self.tensors[0]).dim() == 2 and ids.shape[1] != S:
            raise ValueError(f"Documents: cu_seqlens must end at S = {S}, got {ids.shape[1]}")
        if self.q_ids is None and T > S:
            raise ValueError(f"Documents: {T} queries stand at the end of {S} keys; give q_ids where T > S")

    def _query_ids(self, ctx_T: int) -> Tensor:
        ids = self.tensors[0]
        return self.q_ids if self.q_ids is not None else ids[:, ids.shape[1] - ctx_T :]

    def _look_up(self, table: Tensor, b: Tensor | int, idx: Tensor) -> Tensor:
        row = torch.as_tensor(b if table.shape[0] > 1 else 0, device=table.device)
        return table[row, idx.to(table.device).clamp(0, table.shape[1] - 1)]

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        q_doc = self._look_up(self._query_ids(ctx.T), ctx.b, ctx.q_idx)
        k_doc = self._look_up(self.tensors[0], ctx.b, ctx.k_idx)
        return ((q_doc == k_doc) & (k_doc >= 0)).to(q_pos.device)

    def bounds(self, region: Region) -> Bounds:
        q_lo, q_hi = region.query_extent(("Documents.q", id(self)), lambda b: self._row(self._query_ids(region.T), b))
        k_lo, k_hi = region.key_extent(("Documents.k", id(self)), lambda b: self._row(self.tensors[0], b))
        some = (q_lo <= k_hi) & (k_lo <= q_hi) & (q_hi >= 0) & (k_hi >= 0)
        return some, (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo) & (q_lo >= 0)

    @staticmethod
    def _row(table: Tensor, b: int) -> Tensor:
        return table[b if table.shape[0] > 1 else 0].cpu().long()


# what a float mask adds to hide a key: at or below this no weight is left in float32
HIDDEN = -1e4


@register
@dataclass(frozen=True, repr=False, eq=False)
class Blocks(Layout):
    """An explicit block mask, by plain indices from 0: query i sees key j iff mask[b, h, i // block, j // block].

    Args:
        mask: [B or 1, H or 1, ceil(T / block), ceil(S / block)] bool; with block = 1 an ordinary attention mask.
    """

    mask: Tensor
    block: int = 64

    scattered = True

    def __post_init__(self) -> None:
        check_int("Blocks", "block", self.block, 1)
        if not isinstance(self.mask, Tensor) or self.mask.dim() != 4 or self.mask.dtype != torch.bool:
            what = f"{tuple(self.mask.shape)} {self.mask.dtype}" if isinstance(self.mask, Tensor) else repr(self.mask)
            raise ValueError(f"Blocks: mask must be a [B, H, T / block, S / block] bool tensor, got {what}")
        set_fields(self, spec=f"Blocks(@, {self.block})", tensors=(self.mask,), by_index=True)
        set_fields(self, per_batch=self.mask.shape[0] > 1, per_head=self.mask.shape[1] > 1)

    def own_sizes(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[1]

    def check(self, B: int, H: int, T: int, S: int) -> None:
        rows, columns = -(-T // self.block), -(-S // self.block)
        b, h, *grid = self.mask.shape
        if b not in (1, B) or h not in (1, H) or grid != [rows, columns]:
            raise ValueError(
                f"Blocks: mask must be [{B} or 1, {H} or 1, {rows}, {columns}] for blocks of {self.block},"
                f" got {list(self.mask.shape)}"
            )

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        b = ctx.b if self.per_batch else 0
        h = ctx.h if self.per_head else 0
        row = torch.div(ctx.q_idx, self.block, rounding_mode="floor").clamp(0, self.mask.shape[2] - 1)
        column = torch.div(ctx.k_idx, self.block, rounding_mode="floor").clamp(0, self.mask.shape[3] - 1)
        at = [torch.as_tensor(x, device=self.mask.device) for x in (b, h, row, column)]
        return self.mask[tuple(at)].to(q_pos.device)

    def bounds(self, region: Region) -> Bounds:
        def count_table() -> Tensor:
            grid = self.mask[region.b if self.per_batch else 0, region.h if self.per_head else 0].cpu()
            counts = torch.zeros(grid.shape[0] + 1, grid.shape[1] + 1, dtype=torch.int32)
            counts[1:, 1:] = grid.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
            return counts

        counts = region.memo(("Blocks", id(self.mask)), count_table)
        r0, r1 = region.q_first // self.block, region.q_last // self.block + 1
        c0, c1 = region.k_first // self.block, region.k_last // self.block + 1
        count = counts[r1, c1] - counts[r0, c1] - counts[r1, c0] + counts[r0, c0]
        return count > 0, count == (r1 - r0) * (c1 - c0)


CALLABLES: dict[int, Callable[..., Any]] = {}


# drawn where a tracer cannot follow, and at random, so that a spec never names another process's function
@torch.compiler.assume_constant_result
def _fresh_number() -> int:
    return secrets.randbits(63)


def callable_number(function: Callable[..., Any]) -> int:
    """The key under which `CALLABLES` holds a function, for specs to name it by."""
    known = next((number for number, f in CALLABLES.items() if f is function), None)
    if known is None:
        known = _fresh_number()
        CALLABLES[known] = function
    return known


@register
@dataclass(frozen=True, repr=False, eq=False)
class FromMaskMod(Layout):
    """FlexAttention's `mask_mod(b, h, q_idx, kv_idx) -> bool`, with its own indices, both from 0.

    Lowering it costs O(T * S) time (every tile may differ), in strips of bounded memory; joined by `&` with a
    bounded layout it costs the blocks of that layout. Create one per function and keep it: tables are cached by it.
    """

    mask_mod: Callable[..., Any]

    scattered = True

    def __post_init__(self) -> None:
        if not callable(self.mask_mod):
            raise ValueError(f"FromMaskMod: mask_mod must be callable as f(b, h, q_idx, kv_idx), got {self.mask_mod!r}")
        known = callable_number(self.mask_mod)
        per_batch, per_head = reads_batch_and_head(self.mask_mod)
        set_fields(self, spec=f"FromMaskMod({known})", by_index=True, per_batch=per_batch, per_head=per_head)

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        device = q_pos.device
        q_idx, k_idx = ctx.q_idx.clamp(0, max(ctx.T - 1, 0)), ctx.k_idx.clamp(0, max(ctx.S - 1, 0))
        b, h = (torch.as_tensor(x, device=device) for x in (ctx.b, ctx.h))
        shape = torch.broadcast_shapes(b.shape, h.shape, q_idx.shape, k_idx.shape)
        seen = torch.as_tensor(self.mask_mod(b, h, q_idx, k_idx), device=device)
        if seen.dtype != torch.bool:
            raise ValueError(f"FromMaskMod: mask_mod must return bool, got {seen.dtype}")
        return seen.expand(shape)

    def bounds(self, region: Region) -> Bounds:
        some = torch.ones_like(region.q_lo, dtype=torch.bool)
        return some, ~some


def reads_batch_and_head(mask_mod: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a mask_mod uses b and h, from its traced graph; both when it cannot be traced."""
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        # distinct tensors, or the tracer would take b and h for one
        b, h, q_idx, k_idx = (torch.zeros(shape, dtype=torch.long) for shape in ((), (), (2, 1), (1, 2)))
        graph = make_fx(mask_mod)(b, h, q_idx, k_idx).graph
    except Exception:
        return True, True
    b_node, h_node = [node for node in graph.nodes if node.op == "placeholder"][:2]
    return bool(b_node.users), bool(h_node.users)


def FromBlockMask(block_mask: Any) -> Layout:
    """The layout of a FlexAttention `BlockMask`: its full blocks, and its mask_mod in its partial blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise ValueError(f"FromBlockMask: expected a torch BlockMask, got {type(block_mask).__name__}")
    block_q, block_k = block_mask.BLOCK_SIZE
    if block_q != block_k:
        raise ValueError(f"FromBlockMask: expected square blocks, got {block_mask.BLOCK_SIZE}")

    def grid(num_blocks: Tensor, indices: Tensor) -> Tensor:
        listed = torch.arange(indices.shape[-1], device=indices.device) < num_blocks[..., None]
        counts = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
        return counts.scatter_add_(-1, indices.long(), listed.int()) > 0

    partial = Blocks(grid(block_mask.kv_num_blocks, block_mask.kv_indices), block_q)
    layout: Layout = partial & FromMaskMod(block_mask.mask_mod)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        layout = layout | Blocks(grid(block_mask.full_kv_num_blocks, block_mask.full_kv_indices), block_q)
    return layout
