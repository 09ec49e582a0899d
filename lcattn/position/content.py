"""Positions that meet content: tables of vectors by offset, multiplied by queries or by keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Terms, check_heads, check_offset, check_positive, check_table, remembered


def _check_vectors(owner: str, name: str, table: Tensor) -> None:
    check_table(owner, name, table, "[H, L, D]")
    if 0 in table.shape:
        raise ValueError(f"{owner}: {name} must hold at least one head, one entry and one feature, got {_shape(table)}")


def _check_fit(owner: str, name: str, table: Tensor, q: Tensor) -> None:
    """Heads first and features last, as q's."""
    check_heads(owner, name, table.shape[0], q)
    if table.shape[-1] != q.shape[3]:
        raise ValueError(f"{owner}: {name} must have the head dim of q, {q.shape[3]}, got {_shape(table)}")


def _shape(table: Tensor) -> str:
    return str(list(table.shape))


@dataclass(frozen=True)
class Shaw:
    """Relative keys: score += scale * q_i . rel_key[h, clamp(k_pos - q_pos - min_offset, 0, L - 1)].

    Args:
        rel_key: [H or 1, L, D] float; entry c is for offset key - query = min_offset + c, both ends clamp.
        min_offset: the offset of entry 0; -k for the paper's 2 k + 1 entries.

    Source: Shaw et al. 2018, equation 5 (keys only).
    """

    rel_key: Tensor
    min_offset: int

    def __post_init__(self) -> None:
        _check_vectors("Shaw", "rel_key", self.rel_key)
        check_offset("Shaw", "min_offset", self.min_offset)

    def check(self, q: Tensor) -> None:
        """Raises ValueError if the position cannot serve the heads and features of q [B, H, T, D]."""
        _check_fit("Shaw", "rel_key", self.rel_key, q)

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        self.check(q)
        return Terms(rel_key=self.rel_key, rel_key_min=self.min_offset, qr=q)


@dataclass(frozen=True)
class TransformerXL:
    """Transformer-XL's attention: score = scale * ((q_i + u_h) . k_j + (q_i + v_h) . r[h, o]), o = k_pos - q_pos.

    Args:
        r: [H or 1, L, D] float; entry c is for offset min_offset + c, both ends clamp; `sinusoid` makes it.
        u, v: [H or 1, D] float, the biases of content and of position (XLNet's r_w_bias and r_r_bias).
        min_offset: the offset of entry 0.

    Source: Dai et al. 2019 (Transformer-XL), section 3.3, the unnumbered equation of A^rel (terms a to d).
    """

    r: Tensor
    u: Tensor
    v: Tensor
    min_offset: int

    def __post_init__(self) -> None:
        _check_vectors("TransformerXL", "r", self.r)
        check_table("TransformerXL", "u", self.u, "[H, D]")
        check_table("TransformerXL", "v", self.v, "[H, D]")
        check_offset("TransformerXL", "min_offset", self.min_offset)

    @classmethod
    def sinusoid(
        cls, weight: Tensor, u: Tensor, v: Tensor, min_offset: int, max_offset: int, base: float = 10000.0
    ) -> TransformerXL:
        """r[h, o] = W_h R(-o) for offsets o from min_offset to max_offset, where R(d) = [sin(d w), cos(d w)].

        Args:
            weight: [H D, E] float, the paper's W_k,R as `torch.nn.Linear` holds it, E even; H and D are u's.
            u, v: [H, D].
            min_offset, max_offset: beyond them r keeps its last value; what the layout can reach is enough.
            base: w_e = base^(-2 e / E).
        """
        check_table("TransformerXL.sinusoid", "weight", weight, "[H D, E]")
        check_table("TransformerXL.sinusoid", "u", u, "[H, D]")
        H, D = u.shape
        E = weight.shape[1]
        if weight.shape[0] != H * D or E % 2 or not E:
            raise ValueError(
                f"TransformerXL.sinusoid: weight must be [{H} * {D}, E], as u is {_shape(u)}, with an even E,"
                f" got {_shape(weight)}"
            )
        check_offset("TransformerXL.sinusoid", "min_offset", min_offset)
        check_offset("TransformerXL.sinusoid", "max_offset", max_offset)
        check_positive("TransformerXL.sinusoid", "base", base)
        if max_offset < min_offset:
            raise ValueError(
                f"TransformerXL.sinusoid: max_offset must be at least min_offset, {min_offset}, got {max_offset}"
            )
        # angles of far offsets need float64 before their sine
        distance = -torch.arange(min_offset, max_offset + 1, device=weight.device, dtype=torch.float64)
        frequency = base ** (-torch.arange(0, E, 2, device=weight.device, dtype=torch.float64) / E)
        angle = distance[:, None] * frequency
        sinusoids = torch.cat([angle.sin(), angle.cos()], 1).to(weight.dtype)
        return cls((sinusoids @ weight.T).unflatten(1, (H, D)).transpose(0, 1), u, v, min_offset)

    def check(self, q: Tensor) -> None:
        """Raises ValueError if the position cannot serve the heads and features of q [B, H, T, D]."""
        for name, table in (("r", self.r), ("u", self.u), ("v", self.v)):
            _check_fit("TransformerXL", name, table, q)

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        self.check(q)
        u, v = (bias.to(q.dtype)[:, None] for bias in (self.u, self.v))
        return Terms(q=(q + u,), rel_key=self.r, rel_key_min=self.min_offset, qr=q + v)


@remembered(64)
def deberta_buckets(span: int, max_distance: int | None, device: torch.device) -> tuple[Tensor, int]:
    """Index into tables of 2 span entries for every offset up to where it no longer changes, and the first offset."""
    if max_distance is None:
        first = 1 - span
        offset = torch.arange(first, span + 1, device=device)
        return span - offset, first
    middle = span // 2
    # the bucket reaches span, past the last, within one of here: at max_distance if span is even, further if it is odd
    reach = middle * ((max_distance - 1) / middle) ** (max(span - middle - 1, middle - 1) / (middle - 1))
    first = -math.ceil(reach) - 1
    distance = -torch.arange(first, 1 - first, device=device)
    size = distance.abs().clamp(min=1)
    # float32 as in the original, since a last bit decides a bucket where the logarithm meets a whole number
    ratio = torch.log(size / middle) / torch.log(torch.tensor((max_distance - 1) / middle, device=device))
    far = distance.sign() * (torch.ceil(ratio * (middle - 1)) + middle)
    bucket = torch.where(size <= middle, distance.to(far.dtype), far).long()
    return (bucket + span).clamp(0, 2 * span - 1), first


@dataclass(frozen=True)
class Disentangled:
    """DeBERTa's attention: score += scale * (q_i . rel_key[h, c] + k_j . rel_query[h, c]), c = bucket(q_pos - k_pos).

    bucket(d) = clamp(d + N, 0, 2 N - 1) for tables of 2 N entries. With max_distance, d further than N // 2 is first
    replaced by a logarithmic bucket that reaches the end of the tables at max_distance. Either way the lowered tables
    end where buckets saturate, whatever the length. DeBERTa scales every term by 1 / sqrt(D * n), n of them: pass that
    as `scale`.

    Args:
        rel_key: [H or 1, 2 N, D] float, projected embeddings of position as keys (content to position); None for none.
        rel_query: the same as queries (position to content); None for none.
        max_distance: None for DeBERTa's exact distances; DeBERTa-v2's max_relative_positions for its buckets, N then
            being its position_buckets, at least 4.

    Source: He et al. 2021 (DeBERTa), equations 3 and 4; logarithmic buckets as released with DeBERTa-v2.
    """

    rel_key: Tensor | None = None
    rel_query: Tensor | None = None
    max_distance: int | None = None

    def __post_init__(self) -> None:
        tables = self._tables()
        if not tables:
            raise ValueError("Disentangled: give rel_key, rel_query or both, got neither")
        for name, table in tables.items():
            _check_vectors("Disentangled", name, table)
            if table.shape[1] % 2:
                raise ValueError(f"Disentangled: {name} must have an even number of entries, got {_shape(table)}")
        spans = {table.shape[1] // 2 for table in tables.values()}
        if len(spans) > 1:
            shapes = " and ".join(_shape(table) for table in tables.values())
            raise ValueError(f"Disentangled: rel_key and rel_query must have as many entries, got {shapes}")
        span = spans.pop()
        if self.max_distance is not None:
            check_offset("Disentangled", "max_distance", self.max_distance)
        if self.max_distance is not None and (span < 4 or self.max_distance <= span // 2 + 1):
            raise ValueError(
                f"Disentangled: max_distance needs tables of at least 8 entries and must exceed the {span // 2 + 1}"
                f" of the exact buckets, got {self.max_distance} for {2 * span} entries"
            )

    def _tables(self) -> dict[str, Tensor]:
        tables = {"rel_key": self.rel_key, "rel_query": self.rel_query}
        return {name: table for name, table in tables.items() if table is not None}

    def check(self, q: Tensor) -> None:
        """Raises ValueError if the position cannot serve the heads and features of q [B, H, T, D]."""
        for name, table in self._tables().items():
            _check_fit("Disentangled", name, table, q)

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        self.check(q)
        tables = self._tables()
        some = next(iter(tables.values()))
        index, first = deberta_buckets(some.shape[1] // 2, self.max_distance, some.device)
        by_offset = {name: table[:, index] for name, table in tables.items()}
        return Terms(
            rel_key=by_offset.get("rel_key"),
            rel_key_min=first if self.rel_key is not None else 0,
            rel_query=by_offset.get("rel_query"),
            rel_query_min=first if self.rel_query is not None else 0,
            qr=q if self.rel_key is not None else None,
            kr=k if self.rel_query is not None else None,
        )
