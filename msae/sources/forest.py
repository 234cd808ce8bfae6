"""Synthetic activations with known features: a forest of concepts and their special cases, and independent ones."""

import math
from collections.abc import Iterator
from dataclasses import field
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import embedding_bag, normalize

from msae.seeds import stream
from msae.settings import Count, Natural, NonNegative, Positive, Share, as_plain, settings
from msae.sources.firing import bernoulli, cumulative, folded_normal_mean, intensities, merge_rows, zipf
from msae.sources.source import Chunk, Split

BLOCK = 16_384  # rows drawn at a time; another number gives other rows
COPULA_CELLS = 262_144  # rows × correlated features drawn densely at a time, so that they fit in the cache
MOST_SHARED = 0.99  # greatest share of the variance of a feature's Gaussian that the shared factors give
TINY = 1e-30  # keeps the division by a rate of 0 finite
Cosine = Annotated[float, Field(ge=-1, le=1)]
FirstAndLast = Annotated[list[NonNegative], Field(min_length=2, max_length=2)]


class Level(NamedTuple):
    """One level of the trees: `each` children for every parent, parent by parent."""

    parents: slice
    children: slice
    each: int


@settings
class ForestSource:
    """Rows x = Σ value · feature (+ noise) over the active features; a child is active only with its parent.

    There are `trees` roots, each node of level l has `branching[l]` children, and `independent` features have neither
    parent nor children. Features are numbered roots first, then level by level and parent by parent, independent ones
    last. The defaults are the 20-feature tree of Nabeshima's Matryoshka post.

    - **Rates** are the features' probabilities of being active. With `rates` uniform a child has `child_p` times its
      parent's. With zipf the i-th of n features is asked for min_p + (max_p − min_p)(i^−e − n^−e)/(1 − n^−e), e =
      `zipf_exponent`, and from the roots down impossible rates are lowered; `rate` holds the result. Given its parent,
      a child fires with rate / parent's rate, so its own rate is exact. Siblings exclude each other or are independent.
    - **Values** are |m + s·randn|, m = `magnitude_mean`, s = |`magnitude_std` + `magnitude_std_spread` · randn| drawn
      once for each feature: constant without s, half-normal without m.
    - **Correlation** of roots and independent features (children only follow) is a Gaussian copula. Such a feature
      fires where g = λ·z + √(1 − ‖λ‖²)·randn exceeds the quantile of its rate, which is therefore exact. A row has one
      z ~ randn of `correlation_rank`; λ ~ `correlation_scale` · randn is shortened where ‖λ‖² exceeds 0.99. So
      corr(g_i, g_j) = λ_i·λ_j, with mean square `correlation_scale`⁴ · `correlation_rank`.

    SynthSAEBench-16k (arXiv 2602.14687) is `conf/experiment/forest_16k.yaml`. SAELens's generator of it differs: it
    correlates all features' Gaussians before it imposes the hierarchy; it cuts impossible rates (nearly all children's:
    59 active features a row are asked for) by clamping probabilities and breaking ties between siblings, which leaves
    34.5, where lowering them in proportion leaves 35.0; it makes negative values 0, not their absolute; it makes
    directions a little more orthogonal by 100 steps of descent; and it adds a constant vector of norm 0.5.

    The world (directions, norms, loadings λ, spreads s) and the rows draw from separate streams of `seed`, and each
    chunk has its own. Work and memory grow with the active features, not with rows × features; only correlated
    features are drawn densely, a few rows at a time.
    """

    hook_names: ClassVar[list[str]] = ["synthetic"]
    budget_key: ClassVar[str] = "data.source.rows"

    rows: Count = 1_048_576
    """Training rows."""
    val_rows: Count = 65_536
    """Held-out rows."""
    trees: Natural = 3
    """Roots."""
    branching: list[Count] = field(default_factory=lambda: [3])
    """Children of a root, of each of its children, and so on."""
    independent: Natural = 8
    """Features that have neither parent nor children."""
    exclusive: bool = True
    """At most one child of a parent is active."""
    rates: Literal["uniform", "zipf"] = "uniform"
    """How often features are active: by kind, or falling with their number."""
    root_p: Share = 0.15
    """Uniform: P(root)."""
    child_p: Share | list[Share] = 0.2
    """Uniform: P(child | parent), of all levels or of each."""
    independent_p: Share = 0.05
    """Uniform: P(independent feature)."""
    zipf_exponent: Positive = 0.5
    """Zipf: e."""
    max_p: Share = 0.4
    """Zipf: rate of the first feature."""
    min_p: Share = 5e-4
    """Zipf: rate of the last."""
    most_with_child: Share = 1.0
    """Zipf: exclusive siblings together have at most this share of their parent's rate, others at most each."""
    magnitude_mean: NonNegative | FirstAndLast = 1.0
    """m, or that of the first feature and of the last, linear between them."""
    magnitude_std: NonNegative = 0.0
    """Mean of s."""
    magnitude_std_spread: NonNegative = 0.0
    """Spread of s over the features."""
    scale_by_parent: bool = False
    """A child's value is multiplied by its parent's value / the mean of the parent's own |m + s·randn|."""
    d_in: Count | None = None
    """Width of a row; null: as many as features."""
    directions: Literal["orthogonal", "random"] = "orthogonal"
    """Orthogonal to each other, or random on the sphere."""
    parent_cosine: Cosine | None = None
    """Each child's direction is turned so that it has this cosine with its parent's."""
    norm_spread: NonNegative = 0.05
    """Norms are 1 + this · randn."""
    correlation_rank: Natural = 0
    """Shared factors; 0: features are independent."""
    correlation_scale: NonNegative = 0.1
    """Spread of the loadings λ."""
    noise: NonNegative = 0.0
    """Standard deviation of what is added to every entry of x."""
    seed: int = 0
    """Seed of world and rows."""
    chunk_rows: Count = 262_144
    """Rows of a chunk; another number, other rows."""
    name: str = "tree"
    """Beginning of the directory's name."""

    def __post_init__(self) -> None:
        if self.features_count == 0:
            raise ValueError("there must be features; raise data.source.trees or data.source.independent")
        if len(self.child_ps) != len(self.branching):
            raise ValueError(
                f"data.source.child_p={self.child_p} must be a number, or one for each of {len(self.branching)} levels"
            )
        if self.min_p > self.max_p:
            raise ValueError(f"data.source.min_p={self.min_p} is over max_p={self.max_p}; lower it")
        for each, p in zip(self.branching, self.child_ps, strict=True):
            if self.exclusive and self.rates == "uniform" and each * p > 1 + 1e-9:
                raise ValueError(
                    f"data.source.child_p={p} × {each} exclusive children is over 1; "
                    "lower it, or set data.source.exclusive=false"
                )
        if float(self.mean.min()) == self.magnitude_std == self.magnitude_std_spread == 0:
            raise ValueError("data.source.magnitude_mean is 0 without data.source.magnitude_std; raise one of them")
        if self.parent_cosine is not None and self.d_in == 1:
            raise ValueError("data.source.parent_cosine needs data.source.d_in=2 or more")
        if self.directions == "orthogonal" and self.width() < self.features_count:
            raise ValueError(
                f"data.source.d_in={self.d_in} has no room for {self.features_count} orthogonal directions; "
                "set data.source.directions=random"
            )

    # The world --------------------------------------------------------------------------------------------------------

    @property
    def child_ps(self) -> list[float]:
        """P(child | parent) of each level."""
        return self.child_p if isinstance(self.child_p, list) else [self.child_p] * len(self.branching)

    @cached_property
    def levels(self) -> list[Level]:
        """The levels below the roots."""
        levels, parents = list[Level](), slice(0, self.trees)
        for each in self.branching:
            children = slice(parents.stop, parents.stop + (parents.stop - parents.start) * each)
            levels.append(Level(parents, children, each))
            parents = children
        return levels

    @property
    def features_count(self) -> int:
        """How many features there are."""
        return (self.levels[-1].children.stop if self.levels else self.trees) + self.independent

    @cached_property
    def parent(self) -> Tensor:
        """The parent of each feature [n_features]; −1: none."""
        parent = torch.full((self.features_count,), -1)
        for parents, children, each in self.levels:
            parent[children] = torch.arange(parents.start, parents.stop).repeat_interleave(each)
        return parent

    @cached_property
    def top(self) -> Tensor:
        """The features without a parent: roots, then independent ones."""
        return (self.parent < 0).nonzero().flatten()

    @cached_property
    def features(self) -> Tensor:
        """Directions times norms [n_features, d_in]."""
        n, d_in, generator = self.features_count, self.width(), stream(self.seed, "world")
        if self.directions == "orthogonal":
            features = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0][:n].contiguous()
        else:
            features = normalize(torch.randn(n, d_in, generator=generator), dim=1)
        if (cosine := self.parent_cosine) is not None:
            for level in self.levels:
                child, above = features[level.children], features[self.parent[level.children]]
                aside = normalize(child - (child * above).sum(1, keepdim=True) * above, dim=1)
                child.copy_(cosine * above + math.sqrt(1 - cosine**2) * aside)
        return features * (1 + self.norm_spread * torch.randn(n, generator=stream(self.seed, "norms")))[:, None]

    @cached_property
    def mean(self) -> Tensor:
        """m of each feature."""
        first, last = self.magnitude_mean if isinstance(self.magnitude_mean, list) else [self.magnitude_mean] * 2
        return torch.linspace(first, last, self.features_count)

    @cached_property
    def std(self) -> Tensor:
        """s of each feature."""
        spread = torch.randn(self.features_count, generator=stream(self.seed, "magnitudes"))
        return (self.magnitude_std + self.magnitude_std_spread * spread).abs()

    @cached_property
    def expected(self) -> Tensor:
        """The mean of each feature's own magnitude |m + s·randn|."""
        return folded_normal_mean(self.mean, self.std)

    @property
    def rate(self) -> Tensor:
        """How often each feature is active [n_features]."""
        return self._exact_rate.float()

    @cached_property
    def _exact_rate(self) -> Tensor:
        """The same in float64, with which rows are drawn."""
        if self.rates == "zipf":
            return self._lower_impossible(zipf(self.features_count, self.zipf_exponent, self.max_p, self.min_p))
        rate = torch.full((self.features_count,), self.independent_p, dtype=torch.float64)
        rate[: self.trees] = self.root_p
        for level, p in zip(self.levels, self.child_ps, strict=True):
            rate[level.children] = rate[self.parent[level.children]] * p
        return rate

    def _lower_impossible(self, rate: Tensor) -> Tensor:
        """Lower the rates in place, from the roots down, until each parent has room for its children."""
        for level in self.levels:
            children = rate[level.children].view(-1, level.each)
            room = self.most_with_child * rate[level.parents, None]
            if self.exclusive:
                children *= (room / children.sum(1, keepdim=True).clamp_min(TINY)).clamp(max=1)
            else:
                children.copy_(children.minimum(room))
        return rate

    @cached_property
    def _intensity(self) -> Tensor:
        """Cumulative intensities of the features without a parent."""
        return cumulative(intensities(self._exact_rate[self.top]))

    @cached_property
    def _tables(self) -> list[Tensor]:
        """What `_children` searches at each level: the j-th parent's cumulative p + j, or cumulative intensities."""
        given_parent = self._exact_rate / self._exact_rate[self.parent].clamp_min(TINY)  # of children alone
        tables = []
        for level in self.levels:
            p = given_parent[level.children]
            if self.exclusive:
                of_parent = p.view(-1, level.each).cumsum(1).clamp(max=1)
                tables.append((of_parent + torch.arange(len(of_parent))[:, None]).flatten())
            else:
                tables.append(cumulative(intensities(p)))
        return tables

    @cached_property
    def loadings(self) -> Tensor:
        """λ of the features without a parent [top, correlation_rank]."""
        shape, generator = (len(self.top), self.correlation_rank), stream(self.seed, "loadings")
        loadings = self.correlation_scale * torch.randn(shape, generator=generator)
        return loadings * (math.sqrt(MOST_SHARED) / loadings.norm(dim=1, keepdim=True)).clamp(max=1)

    @cached_property
    def _copula(self) -> tuple[Tensor, Tensor]:
        """Quantiles of the rates [top] and loadings [correlation_rank, top], in units of a feature's own part of g."""
        own = (1 - self.loadings.square().sum(1)).sqrt()
        quantile = -torch.special.ndtri(self._exact_rate[self.top]).float()
        return quantile / own, (self.loadings / own[:, None]).T

    # Rows -------------------------------------------------------------------------------------------------------------

    def draw(self, rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The active entries of so many rows, by row, then feature: offsets [rows + 1], feature, value [active]."""
        row, cell = self._top_cells(rows, generator)
        feature = self.top[cell]
        value = self._magnitudes(feature, generator)
        is_root = cell < self.trees
        independent = (row[~is_root], feature[~is_root], value[~is_root])
        row, feature, value = row[is_root], feature[is_root], value[is_root]
        pieces = [(row, feature, value)]
        for level, table in zip(self.levels, self._tables, strict=True):
            active, cell = self._children(level, table, feature - level.parents.start, generator)
            scale = value[active] / self.expected[feature[active]]
            row, feature = row[active], level.children.start + cell
            value = self._magnitudes(feature, generator)
            if self.scale_by_parent:
                value = value * scale
            pieces.append((row, feature, value))
        return merge_rows(rows, [*pieces, independent])

    def _top_cells(self, rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Which features without a parent are active: pairs of row and index into `top`."""
        if self.correlation_rank == 0:
            return bernoulli(self._intensity, torch.zeros(rows, dtype=torch.int64), len(self.top), generator)
        quantile, loadings = self._copula
        active, most = [], max(1, COPULA_CELLS // len(self.top))
        for start in range(0, rows, most):
            n = min(most, rows - start)
            z = torch.randn(n, self.correlation_rank, generator=generator)
            own = torch.randn(n, len(self.top), generator=generator)
            cells = (own > torch.addmm(quantile, z, loadings, alpha=-1)).nonzero()
            cells[:, 0] += start
            active.append(cells)
        row, cell = torch.cat(active).unbind(1)
        return row, cell

    def _children(self, level: Level, table: Tensor, parent: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Active children of active parents, whose numbers in their level are given: index into these, own number."""
        if not self.exclusive:
            return bernoulli(table, parent * level.each, level.each, generator)
        u = torch.rand(len(parent), generator=generator, dtype=torch.float64)
        cell = torch.searchsorted(table, parent + u, right=True)
        has_child = (cell < (parent + 1) * level.each).nonzero().flatten()
        return has_child, cell[has_child]

    def _magnitudes(self, feature: Tensor, generator: Generator) -> Tensor:
        if not self.std.any():
            return self.mean[feature]
        return (self.mean[feature] + self.std[feature] * torch.randn(len(feature), generator=generator)).abs()

    def _blocks(self, split: str, chunk: int, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Offsets, features and values of each block of rows."""
        generator = stream(self.seed, split, chunk)
        for start in range(0, rows, BLOCK):
            yield self.draw(min(BLOCK, rows - start), generator)

    def _rows(self, split: str, chunk: int, rows: int) -> Tensor:
        x, generator = torch.empty(rows, self.width()), stream(self.seed, "noise", split, chunk)
        for block, (offsets, feature, value) in zip(x.split(BLOCK), self._blocks(split, chunk, rows), strict=True):
            sums = embedding_bag(
                feature, self.features, offsets, mode="sum", per_sample_weights=value, include_last_offset=True
            )
            block.copy_(sums)
            if self.noise:
                block += self.noise * torch.randn(block.shape, generator=generator)
        return x

    # A source ---------------------------------------------------------------------------------------------------------

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {"source": "forest", **{key: value for key, value in as_plain(self).items() if key != "name"}}

    def provenance(self) -> dict[str, Any]:
        return {"torch": torch.__version__}

    def expected_rows(self) -> int:
        return self.rows + self.val_rows

    def most_rows(self) -> tuple[int, int]:
        return min(self.chunk_rows, self.rows), self.val_rows

    def width(self, hook_name: str = "synthetic") -> int:
        return self.features_count if self.d_in is None else self.d_in

    def bytes_per_row(self, hook_name: str) -> int:
        return 4 * self.width()

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        starts = range(0, self.rows, self.chunk_rows)
        for number in range(state["chunks"] if state else 0, len(starts)):
            sizes = {"train": min(self.chunk_rows, self.rows - starts[number])}
            if number == 0:
                sizes["val"] = self.val_rows
            yield Chunk({s: partial(self._split, s, number, n) for s, n in sizes.items()}, {"chunks": number + 1})

    def _split(self, split: str, chunk: int, rows: int) -> Split:
        return Split({self.hook_names[0]: self._rows(split, chunk, rows)})

    def truth(self) -> dict[str, Tensor]:
        """features [n, d_in], parent [n] (−1: none), rate [n]; CSR of the val rows (offsets, feature, value)."""
        offsets, feature, value = zip(*self._blocks("val", 0, self.val_rows), strict=True)
        return {
            "features": self.features,
            "parent": self.parent,
            "rate": self.rate,
            "offsets": cumulative(torch.cat([block.diff() for block in offsets])),
            "feature": torch.cat(feature).to(torch.int32),
            "value": torch.cat(value),
        }
