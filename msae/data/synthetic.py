"""Synthetic activations whose true features are known: a small forest of concepts and their special cases."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from msae.data.seeds import stream
from msae.data.source import Chunk, Split


class TreeSource:
    """Rows x = Σ active features, where a child is only ever active together with its parent.

    `parents` features fire with `parent_p` each; given that, exactly one of the parent's `children` fires with
    probability `child_p` each and none otherwise; `independent` more fire with `independent_p`. Binary activations,
    orthogonal directions with norms 1 + norm_spread · randn. The defaults are the 20-feature tree of Nabeshima's
    Matryoshka post. Features are numbered parents, then children parent by parent, then independent ones.
    The world (directions) and the rows draw from separate random streams. Raises ValueError for impossible rates.
    """

    name = "tree"
    hook_names = ("synthetic",)
    budget_key = "data.source.rows"

    def __init__(
        self,
        rows: int = 1_048_576,
        val_rows: int = 65_536,
        parents: int = 3,
        children: int = 3,
        parent_p: float = 0.15,
        child_p: float = 0.2,
        independent: int = 8,
        independent_p: float = 0.05,
        norm_spread: float = 0.05,
        seed: int = 0,
        chunk_rows: int = 262_144,
    ) -> None:
        if parents < 0 or children < 0 or independent < 0 or parents + independent == 0:
            raise ValueError(f"there must be features, not {parents=}, {children=}, {independent=}")
        if children * child_p > 1:
            raise ValueError(f"data.source.child_p={child_p} × {children} exclusive children is over 1")
        if not (0 <= parent_p <= 1 and 0 <= independent_p <= 1 and child_p >= 0):
            raise ValueError(f"probabilities must lie in [0, 1]: {parent_p=}, {child_p=}, {independent_p=}")
        if rows <= 0 or val_rows <= 0 or chunk_rows <= 0:
            raise ValueError(f"data.source.rows={rows}, val_rows={val_rows}, chunk_rows={chunk_rows} must be positive")
        self.config = {k: v for k, v in locals().items() if k != "self"}
        self.rows, self.val_rows, self.chunk_rows, self.seed = rows, val_rows, chunk_rows, seed
        self.parents, self.children, self.independent = parents, children, independent
        self.parent_p, self.child_p, self.independent_p = parent_p, child_p, independent_p
        self.features_count = parents * (1 + children) + independent
        directions = torch.linalg.qr(
            torch.randn(self.features_count, self.features_count, generator=stream(seed, "world"))
        )[0]
        spread = torch.randn(self.features_count, generator=stream(seed, "norms"))
        self.features = directions * (1 + norm_spread * spread)[:, None]  # [n_features, d_in]
        self.parent = torch.full((self.features_count,), -1)
        self.parent[parents : parents * (1 + children)] = torch.arange(parents).repeat_interleave(children)

    def draw(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows n_features"]:
        """Binary feature activations of so many independent rows."""
        active = torch.rand(rows, self.parents, generator=generator) < self.parent_p
        which = (torch.rand(rows, self.parents, generator=generator) / max(self.child_p, 1e-12)).floor()
        child = (which[..., None] == torch.arange(self.children)) & active[..., None]
        alone = torch.rand(rows, self.independent, generator=generator) < self.independent_p
        return torch.cat([active, child.flatten(1), alone], dim=1).float()

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {"source": "tree", **self.config}

    def provenance(self) -> dict[str, Any]:
        return {"torch": torch.__version__}

    def expected_rows(self) -> int:
        return self.rows + self.val_rows

    def most_rows(self) -> tuple[int, int]:
        return min(self.chunk_rows, self.rows), self.val_rows

    def d_in(self, hook_name: str) -> int:
        return self.features_count

    def bytes_per_row(self, hook_name: str) -> int:
        return 4 * self.features_count

    def _codes(self, split: str, chunk: int, rows: int) -> Tensor:
        return self.draw(rows, stream(self.seed, split, chunk))

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for number, start in enumerate(range(0, self.rows, self.chunk_rows)):
            if number < (state["chunks"] if state else 0):
                continue
            sizes = {"train": min(self.chunk_rows, self.rows - start)}
            if number == 0:
                sizes["val"] = self.val_rows
            splits = {
                s: Split({self.hook_names[0]: self._codes(s, number, n) @ self.features}) for s, n in sizes.items()
            }
            yield Chunk(splits, {"chunks": number + 1})

    def truth(self) -> dict[str, Tensor]:
        """features [n, d_in], parent [n] (−1: a root), val rows' activations as CSR (offsets, feature, value)."""
        codes = self._codes("val", 0, self.val_rows)
        row, feature = codes.nonzero(as_tuple=True)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (codes != 0).sum(1).cumsum(0)])
        return {
            "features": self.features.contiguous(),
            "parent": self.parent,
            "offsets": offsets,
            "feature": feature.to(torch.int32),
            "value": codes[row, feature],
        }
