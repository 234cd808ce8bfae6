"""Synthetic activations whose true features are known: a forest of concepts and their special cases, and loners."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import embedding_bag, normalize

from msae.data.firing import bernoulli, folded_normal_mean, intensities, merged, zipf
from msae.data.seeds import stream
from msae.data.source import Chunk, Split

BLOCK = 16_384  # rows drawn at a time: another number, other rows
COPULA_CELLS = 262_144  # rows × features that are drawn densely at a time, where features are correlated: in cache
LISTS = ("branching", "child_p", "magnitude_mean")
MOST_SHARED = 0.99  # of the variance of a feature's Gaussian that may come from the shared factors


class Level(NamedTuple):
    """Children start..stop − 1, `each` of them for every parent from `parents` on, parent by parent."""

    parents: int
    start: int
    stop: int
    each: int


class ForestSource:
    """Rows x = Σ value · feature (+ noise) over the active features; a child is only ever active with its parent.

    There are `trees` roots, each node of level l has `branching[l]` children, and `independent` features are alone.
    They are numbered roots, then level by level parent by parent, then independent ones. The defaults are the
    20-feature tree of Nabeshima's Matryoshka post.

    - **Rates**, the probabilities with which features are active, whatever their parents do. `rates="uniform"`: roots
      `root_p`, independent ones `independent_p`, a child `child_p` (or one for each level) times its parent's.
      `rates="zipf"`: the i-th of n features is asked for min_p + (max_p − min_p)(i^−e − n^−e)/(1 − n^−e), e =
      `zipf_exponent`; from the roots down, what is impossible is lowered: `exclusive` siblings are scaled to sum to no
      more than `most_with_child` of their parent's rate, others capped at that. `rate` has what came of it. Given its
      parent a child fires with rate / parent's rate, so that its own rate is exact; siblings either exclude each other
      or are independent.
    - **Values**: |m + s·randn|, m = `magnitude_mean` ([first, last]: linear over the features), s = |`magnitude_std` +
      `magnitude_std_spread` · randn| drawn once for each feature: constant without s, half-normal without m. With
      `scale_by_parent` a child's is multiplied by its parent's value / the mean of the parent's own |m + s·randn|.
    - **Directions** in `d_in` (null: as many as features) dimensions: `orthogonal`, or `random` on the sphere; then,
      where `parent_cosine` is given, each child's is turned so that it has this cosine with its parent's. Norms are 1 +
      `norm_spread` · randn.
    - **Correlation** of roots and independent features (children only follow): a Gaussian copula. Each of these fires
      where g = λ·z + √(1 − ‖λ‖²)·randn exceeds the quantile of its rate, which is therefore exact; a row has one z ~
      randn of `correlation_rank` (0: none), λ ~ `correlation_scale` · randn is shortened where ‖λ‖² exceeds 0.99. So
      corr(g_i, g_j) = λ_i·λ_j, with mean square `correlation_scale`⁴ · `correlation_rank`.
    - `noise`: standard deviation of what is added to every entry of x.

    SynthSAEBench-16k (arXiv 2602.14687) is `conf/experiment/forest_16k.yaml`. Known differences to SAELens's: there all
    features' Gaussians are correlated, before the hierarchy is imposed; impossible rates (nearly all children's: asked
    are 59 active features a row) are cut by clamping probabilities and breaking ties between siblings, here
    proportionally, which leaves 35.0 of them instead of 34.5; negative values become 0, not their absolute; directions
    are made a little more orthogonal by 100 steps of descent; and a constant vector of norm 0.5 is added.

    The world (directions, norms, loadings λ, spreads s) and the rows draw from separate streams of `seed`, and each
    chunk has its own. Work and memory grow with the active features, never with rows × features, except where
    features are correlated: roots and independent ones are then drawn densely, a few rows at a time. `name` begins the
    directory's name. Raises ValueError in one line for what is impossible.
    """

    hook_names = ("synthetic",)
    budget_key = "data.source.rows"

    def __init__(
        self,
        rows: int = 1_048_576,
        val_rows: int = 65_536,
        trees: int = 3,
        branching: Sequence[int] = (3,),
        independent: int = 8,
        exclusive: bool = True,
        rates: Literal["uniform", "zipf"] = "uniform",
        root_p: float = 0.15,
        child_p: float | Sequence[float] = 0.2,
        independent_p: float = 0.05,
        zipf_exponent: float = 0.5,
        max_p: float = 0.4,
        min_p: float = 5e-4,
        most_with_child: float = 1.0,
        magnitude_mean: float | Sequence[float] = 1.0,
        magnitude_std: float = 0.0,
        magnitude_std_spread: float = 0.0,
        scale_by_parent: bool = False,
        d_in: int | None = None,
        directions: Literal["orthogonal", "random"] = "orthogonal",
        parent_cosine: float | None = None,
        norm_spread: float = 0.05,
        correlation_rank: int = 0,
        correlation_scale: float = 0.1,
        noise: float = 0.0,
        seed: int = 0,
        chunk_rows: int = 262_144,
        name: str = "tree",
    ) -> None:
        child_ps = [float(child_p)] * len(branching) if isinstance(child_p, (int, float)) else list(child_p)
        means = [float(magnitude_mean)] * 2 if isinstance(magnitude_mean, (int, float)) else list(magnitude_mean)
        given = {k: v for k, v in locals().items() if k not in ("self", "name", "child_ps", "means")}
        self.config = {k: list(v) if k in LISTS and isinstance(v, Sequence) else v for k, v in given.items()}
        refuse_impossible(self.config, child_ps, means)
        self.name, self.seed, self.noise, self.scale_by_parent = name, seed, noise, scale_by_parent
        self.rows, self.val_rows, self.chunk_rows = rows, val_rows, chunk_rows
        self.trees, self.independent, self.exclusive = trees, independent, exclusive

        self.levels, parents, start = list[Level](), 0, trees
        for each in branching:
            self.levels.append(Level(parents, start, start + (start - parents) * each, each))
            parents, start = start, self.levels[-1].stop
        self.features_count = n = start + independent
        self.parent = torch.full((n,), -1)
        for parents, start, stop, each in self.levels:
            self.parent[start:stop] = torch.arange(parents, start).repeat_interleave(each)
        d_in = n if d_in is None else d_in
        if directions == "orthogonal" and d_in < n:
            raise ValueError(
                f"data.source.d_in={d_in} has no room for {n} orthogonal directions; set data.source.directions=random"
            )

        self.features = self._directions(d_in, directions, parent_cosine)  # [n_features, d_in]
        self.features *= (1 + norm_spread * torch.randn(n, generator=stream(seed, "norms")))[:, None]
        self.mean = torch.linspace(means[0], means[1], n)
        self.std = (magnitude_std + magnitude_std_spread * torch.randn(n, generator=stream(seed, "magnitudes"))).abs()
        self.has_spread = bool(self.std.any())
        self.expected = folded_normal_mean(self.mean, self.std)  # of a feature's own magnitude

        if rates == "zipf":
            rate = self._possible(zipf(n, zipf_exponent, max_p, min_p), most_with_child)
        else:
            rate = torch.full((n,), float(independent_p), dtype=torch.float64)
            rate[:trees] = root_p
            for level, p in zip(self.levels, child_ps, strict=True):
                rate[level.start : level.stop] = rate[self.parent[level.start : level.stop]] * p
        self.rate = rate.float()
        self.top = torch.cat([torch.arange(trees), torch.arange(n - independent, n)])  # features without a parent
        given_parent = rate / rate[self.parent].clamp_min(1e-30)  # of children alone
        self.intensity = torch.cat([rate.new_zeros(1), intensities(rate[self.top]).cumsum(0)])
        self.tables = [self._table(level, given_parent[level.start : level.stop]) for level in self.levels]
        self.loadings = correlation_scale * torch.randn(
            len(self.top), correlation_rank, generator=stream(seed, "loadings")
        )
        self.loadings *= (math.sqrt(MOST_SHARED) / self.loadings.norm(dim=1, keepdim=True)).clamp(max=1)
        own = (1 - self.loadings.square().sum(1)).sqrt()
        quantile = -torch.special.ndtri(rate[self.top]).float()
        self.copula = (quantile / own, (self.loadings / own[:, None]).T)

    # The world --------------------------------------------------------------------------------------------------------

    def _directions(self, d_in: int, kind: str, parent_cosine: float | None) -> Tensor:
        """Unit rows [n_features, d_in]."""
        n, generator = self.features_count, stream(self.seed, "world")
        if kind == "orthogonal":
            found = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0][:n].contiguous()
        else:
            found = normalize(torch.randn(n, d_in, generator=generator), dim=1)
        if parent_cosine is None:
            return found
        for level in self.levels:
            child, up = found[level.start : level.stop], found[self.parent[level.start : level.stop]]
            aside = normalize(child - (child * up).sum(1, keepdim=True) * up, dim=1)
            child.copy_(parent_cosine * up + math.sqrt(1 - parent_cosine**2) * aside)
        return found

    def _possible(self, rate: Tensor, most: float) -> Tensor:
        """The rates lowered from the roots down, until each parent has room for its children."""
        for level in self.levels:
            children = rate[level.start : level.stop].view(-1, level.each)
            room = most * rate[level.parents : level.start, None]
            if self.exclusive:
                children *= (room / children.sum(1, keepdim=True).clamp_min(1e-30)).clamp(max=1)
            else:
                children.copy_(children.minimum(room))
        return rate

    def _table(self, level: Level, p: Tensor) -> Tensor:
        """What `_children` searches: of exclusive children the j-th parent's cumulative p + j, else intensities."""
        if not self.exclusive:
            return torch.cat([p.new_zeros(1), intensities(p).cumsum(0)])
        cumulative = p.view(-1, level.each).cumsum(1).clamp(max=1)
        return (cumulative + torch.arange(len(cumulative))[:, None]).flatten()

    # Rows -------------------------------------------------------------------------------------------------------------

    def draw(self, rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The active entries of so many rows, by row and then feature: row, feature [active] int64, value float32."""
        offsets, feature, value = self.draw_csr(rows, generator)
        return torch.repeat_interleave(torch.arange(rows), offsets.diff()), feature, value

    def draw_csr(self, rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The same as `draw` with offsets [rows + 1] instead of rows."""
        row, cell = self._top(rows, generator)
        feature = self.top[cell]
        value = self._magnitudes(feature, generator)
        is_root = cell < self.trees
        alone = tuple(t[~is_root] for t in (row, feature, value))
        row, feature, value = (t[is_root] for t in (row, feature, value))
        pieces = [(row, feature, value)]
        for level, table in zip(self.levels, self.tables, strict=True):
            which, cell = self._children(level, table, feature - level.parents, generator)
            up = value[which] / self.expected[feature[which]]
            row, feature = row[which], level.start + cell
            value = self._magnitudes(feature, generator)
            if self.scale_by_parent:
                value = value * up
            pieces.append((row, feature, value))
        return merged(rows, [*pieces, alone])

    def _top(self, rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Which of `top` are active: row and place in `top`."""
        if self.loadings.shape[1] == 0:
            return bernoulli(self.intensity, torch.zeros(rows, dtype=torch.int64), len(self.top), generator)
        found, most = [], max(1, COPULA_CELLS // len(self.top))
        for start in range(0, rows, most):
            n = min(most, rows - start)
            z = torch.randn(n, self.loadings.shape[1], generator=generator)
            own = torch.randn(n, len(self.top), generator=generator)
            row, cell = (own > torch.addmm(self.copula[0], z, self.copula[1], alpha=-1)).nonzero(as_tuple=True)
            found.append((row + start, cell))
        return torch.cat([row for row, _ in found]), torch.cat([cell for _, cell in found])

    def _children(self, level: Level, table: Tensor, parent: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Children of active parents (places in their level): which of these has it, and its place in its own level."""
        if not self.exclusive:
            return bernoulli(table, parent * level.each, level.each, generator)
        u = torch.rand(len(parent), generator=generator, dtype=torch.float64)
        cell = torch.searchsorted(table, parent + u, right=True)
        which = (cell < (parent + 1) * level.each).nonzero().flatten()  # else none of them
        return which, cell[which]

    def _magnitudes(self, feature: Tensor, generator: Generator) -> Tensor:
        mean = self.mean[feature]
        if not self.has_spread:
            return mean
        return (mean + self.std[feature] * torch.randn(len(feature), generator=generator)).abs()

    def _blocks(self, split: str, chunk: int, rows: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Where a block of rows starts, and its offsets, features and values."""
        generator = stream(self.seed, split, chunk)
        for start in range(0, rows, BLOCK):
            yield start, *self.draw_csr(min(BLOCK, rows - start), generator)

    def _rows(self, split: str, chunk: int, rows: int) -> Tensor:
        x, generator = torch.empty(rows, self.features.shape[1]), stream(self.seed, "noise", split, chunk)
        for start, offsets, feature, value in self._blocks(split, chunk, rows):
            block = x[start : start + len(offsets) - 1]
            block.copy_(
                embedding_bag(
                    feature, self.features, offsets, mode="sum", per_sample_weights=value, include_last_offset=True
                )
            )
            if self.noise:
                block += self.noise * torch.randn(block.shape, generator=generator)
        return x

    # A source ---------------------------------------------------------------------------------------------------------

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {"source": "forest", **self.config}

    def provenance(self) -> dict[str, Any]:
        return {"torch": torch.__version__}

    def expected_rows(self) -> int:
        return self.rows + self.val_rows

    def most_rows(self) -> tuple[int, int]:
        return min(self.chunk_rows, self.rows), self.val_rows

    def d_in(self, hook_name: str) -> int:
        return self.features.shape[1]

    def bytes_per_row(self, hook_name: str) -> int:
        return 4 * self.features.shape[1]

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for number, start in enumerate(range(0, self.rows, self.chunk_rows)):
            if number < (state["chunks"] if state else 0):
                continue
            sizes = {"train": min(self.chunk_rows, self.rows - start)}
            if number == 0:
                sizes["val"] = self.val_rows
            splits = {s: Split({self.hook_names[0]: self._rows(s, number, n)}) for s, n in sizes.items()}
            yield Chunk(splits, {"chunks": number + 1})

    def truth(self) -> dict[str, Tensor]:
        """features [n, d_in], parent [n] (−1: none), rate [n]; CSR of the val rows (offsets, feature, value)."""
        blocks = [block[1:] for block in self._blocks("val", 0, self.val_rows)]
        counts = torch.cat([offsets.diff() for offsets, _, _ in blocks])
        return {
            "features": self.features,
            "parent": self.parent,
            "rate": self.rate,
            "offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            "feature": torch.cat([feature.to(torch.int32) for _, feature, _ in blocks]),
            "value": torch.cat([value for _, _, value in blocks]),
        }


def refuse_impossible(c: dict[str, Any], child_ps: list[float], means: list[float]) -> None:
    """Raise ValueError in one line for a value that cannot be."""

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            raise ValueError(message)

    def within(low: float, high: float, *keys: str) -> None:
        for key in keys:
            many = c[key] if isinstance(c[key], list) else [] if c[key] is None else [c[key]]
            wanted = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
            refuse(not all(low <= v <= high for v in many), f"data.source.{key}={c[key]} must be {wanted}")

    within(1, math.inf, "rows", "val_rows", "chunk_rows", "branching", "d_in")
    within(0, math.inf, "trees", "independent", "magnitude_mean", "magnitude_std", "magnitude_std_spread")
    within(0, math.inf, "correlation_rank", "correlation_scale", "noise")
    within(0, 1, "root_p", "child_p", "independent_p", "max_p", "min_p", "most_with_child")
    within(-1, 1, "parent_cosine")
    for key, known in (("rates", ("uniform", "zipf")), ("directions", ("orthogonal", "random"))):
        refuse(c[key] not in known, f"data.source.{key}={c[key]} is unknown; there are {' and '.join(known)}")
    refuse(
        c["trees"] + c["independent"] == 0, "there must be features; raise data.source.trees or data.source.independent"
    )
    depth = len(c["branching"])
    refuse(
        len(child_ps) != depth,
        f"data.source.child_p={c['child_p']} must be one number, or one for each of {depth} levels of branching",
    )
    refuse(
        c["zipf_exponent"] <= 0 or c["min_p"] > c["max_p"],
        f"data.source.zipf_exponent={c['zipf_exponent']} must be over 0 and min_p={c['min_p']} ≤ max_p={c['max_p']}",
    )
    for each, p in zip(c["branching"], child_ps, strict=True):
        refuse(
            c["exclusive"] and c["rates"] == "uniform" and each * p > 1 + 1e-9,
            f"data.source.child_p={p} × {each} exclusive children is over 1; lower it, or data.source.exclusive=false",
        )
    refuse(len(means) != 2, f"data.source.magnitude_mean={c['magnitude_mean']} must be a number, or the first and last")
    refuse(
        min(means) == c["magnitude_std"] == c["magnitude_std_spread"] == 0,
        "data.source.magnitude_mean is 0 without data.source.magnitude_std; raise one of them",
    )
    refuse(
        c["parent_cosine"] is not None and c["d_in"] == 1,
        "data.source.parent_cosine needs data.source.d_in=2 or more dimensions",
    )
