"""Firings against a dense encode: which rows are read, what counts as firing, and what a shuffle keeps and destroys."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import Tensor

from msae.data.harvest import harvest
from msae.data.shards import Shards, quantise
from msae.data.source import Chunk, Split
from msae.data.synthetic import ForestSource
from msae.evaluation import truth
from msae.hierarchy import firings as module
from msae.hierarchy.firings import Firings, Piece, collect, pieces, read
from msae.sae import MatryoshkaSAE
from tests.test_model import MODES, SPARSITIES, make


class Given:
    """A source of these rows: a tensor for each shard, and what stands beside it."""

    name, hook_names, budget_key = "given", ("given",), "data.source.rows"

    def __init__(
        self,
        val: Sequence[Tensor],
        train: Sequence[Tensor],
        index: Sequence[dict[str, Tensor]] = (),
        truth: dict[str, Tensor] | None = None,
    ) -> None:
        self.shards = [("val", rows) for rows in val] + [("train", rows) for rows in train]
        self.beside, self.true = list(index) or [{}] * len(self.shards), truth

    def identity(self, hook_name: str) -> dict[str, Any]:
        content = b"".join(rows.float().numpy().tobytes() for _, rows in self.shards)
        return {"content": hashlib.sha256(content).hexdigest(), "dtype": str(self.shards[0][1].dtype)}

    def provenance(self) -> dict[str, Any]:
        return {}

    def expected_rows(self) -> int:
        return sum(len(rows) for _, rows in self.shards)

    def most_rows(self) -> tuple[int, int]:
        return self.expected_rows(), self.expected_rows()

    def d_in(self, hook_name: str) -> int:
        return self.shards[0][1].shape[1]

    def bytes_per_row(self, hook_name: str) -> int:
        return 4 * self.d_in(hook_name)

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for number, ((split, rows), beside) in enumerate(zip(self.shards, self.beside, strict=True)):
            if number >= (state["next"] if state else 0):
                scales = {}
                if rows.dtype == torch.int8:
                    rows, scales["given"] = quantise(rows.float())
                yield Chunk({split: Split({"given": rows}, beside, scales)}, {"next": number + 1})

    def truth(self) -> dict[str, Tensor] | None:
        return self.true


def given_shards(root: Path, val: Sequence[Tensor], train: Sequence[Tensor], *args: Any, **options: Any) -> Shards:
    """A real shard directory that holds these rows."""
    return harvest(Given(val, train, *args, **options), root, show=False)["given"]


def random_firings(rows: int, d_sae: int, density: float = 0.3, seed: int = 0) -> Firings:
    """Some latents never fire, some rows are empty."""
    random = np.random.default_rng(seed)
    dense = (random.random((rows, d_sae)) < density) * (0.1 + random.random((rows, d_sae)))
    dense[:, random.random(d_sae) < 0.2] = 0
    dense[random.random(rows) < 0.1] = 0
    return of_dense(dense)


def of_dense(dense: np.ndarray[Any, Any], parts: list[Piece] | None = None) -> Firings:
    matrix = csr_array(np.asarray(dense, dtype=np.float32))
    return Firings(matrix, [Piece("val", 0, 0, len(dense))] if parts is None else parts)


def all_rows(shards: Shards) -> Tensor:
    """Held-out rows first, then training rows [rows, d_in]."""
    counts = [(split, i) for split in ("val", "train") for i in range(len(shards.rows(split)))]
    return torch.cat([shards.activations(split, i).float() for split, i in counts])


@pytest.fixture(scope="module")
def forest(tmp_path_factory) -> Shards:
    source = ForestSource(rows=600, val_rows=100, chunk_rows=256, magnitude_std=0.3, noise=0.1)
    return harvest(source, tmp_path_factory.mktemp("forest"), show=False)["synthetic"]


def of_text(lengths: list[int], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Shuffled rows of sequences of these lengths; a row says its sequence and position."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
    order = torch.randperm(len(sequence), generator=generator)
    sequence, position = sequence[order], position[order]
    rows = torch.stack([sequence, position, torch.full_like(sequence, seed)], 1).float()
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    return rows, {"sequence": sequence.int(), "position": position.int(), "tokens": tokens}


LENGTHS = [[3, 5, 1, 4], [2, 2, 6], [7, 1], [4, 4, 4, 4, 3]]  # of the sequences of two held-out, two training shards


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Shards:
    made = [of_text(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    rows, index = [m[0] for m in made], [m[1] for m in made]
    return given_shards(tmp_path_factory.mktemp("text"), rows[:2], rows[2:], index)


# --- which rows ------------------------------------------------------------------------------------------------


def taken(shards: Shards, parts: list[Piece]) -> list[list[int]]:
    """The rows of each shard that the pieces take, in order of splits and shards."""
    found = {(part.split, part.shard): part for part in parts}
    assert len(found) == len(parts)
    rows = []
    for split in ("val", "train"):
        for shard, count in enumerate(shards.rows(split)):
            part = found.pop((split, shard), None)
            if part is None:
                rows.append([])
            else:
                rows.append(list(range(count)) if part.index is None else part.index.tolist())
                assert part.rows == len(rows[-1]) > 0
    assert not found
    return rows


@pytest.mark.parametrize("tokens", [1, 99, 100, 101, 355, 356, 357, 500, 699, 700, 701, 10**9, None])
def test_pieces_are_held_out_rows_then_training_rows_and_are_cut_at_tokens(forest, tokens) -> None:
    parts = pieces(forest, tokens)
    left = 700 if tokens is None else min(tokens, 700)
    expected = []
    for count in [100, 256, 256, 88]:
        expected.append(list(range(min(count, left))))
        left -= len(expected[-1])
    assert taken(forest, parts) == expected
    assert [part.split for part in parts] == ["val", "train", "train", "train"][: len(parts)]
    assert [part.shard for part in parts] == [0, 0, 1, 2][: len(parts)]
    assert [part.start for part in parts] == [0, *np.cumsum([part.rows for part in parts])[:-1]]
    assert [part.stop for part in parts] == np.cumsum([part.rows for part in parts]).tolist()


@pytest.mark.parametrize("tokens", [*range(1, 53), None])
def test_of_text_the_last_shard_gives_whole_sequences(text, tokens) -> None:
    parts = pieces(text, tokens)
    total = sum(map(sum, LENGTHS))
    left = total if tokens is None else min(tokens, total)
    expected: list[list[int]] = []
    for (split, shard), lengths in zip([("val", 0), ("val", 1), ("train", 0), ("train", 1)], LENGTHS, strict=True):
        sequences = 0
        while left > 0 and sequences < len(lengths):  # as many as it takes
            left -= lengths[sequences]
            sequences += 1
        of = text.index(split, shard)["sequence"].tolist()
        expected.append([row for row, sequence in enumerate(of) if sequence < sequences])
    assert taken(text, parts) == expected
    assert parts[-1].stop == sum(map(len, expected))


def test_text_of_a_language_model_gives_whole_sequences(tmp_path) -> None:
    from msae.data.language_model import LanguageModelSource
    from tests.tiny_lm import sentences, tiny_model

    (tmp_path / "text.txt").write_text("\n".join(sentences(200)))
    hook, settings = "blocks.1.hook_resid_pre", {"context": 16, "chunk_tokens": 160, "dtype": "float32"}
    model, words = str(tiny_model(tmp_path / "tiny")), str(tmp_path / "text.txt")
    source = LanguageModelSource(model=model, hook_names=[hook], text=words, tokens=400, device="cpu", **settings)
    shards = harvest(source, tmp_path / "shards", show=False)[hook]
    held_out = sum(shards.rows("val"))
    for tokens in (held_out + 30, held_out + 200):
        parts = pieces(shards, tokens)
        last = parts[-1]
        assert last.split == "train"
        assert last.index is not None
        of = shards.index("train", last.shard)["sequence"]
        mine = of[last.index].unique()
        assert torch.isin(of, mine).sum() == last.rows
        assert 0 <= last.stop - tokens < 16


def test_read_gives_the_rows_in_order_in_float32(forest, text) -> None:
    for shards, tokens in [(forest, 300), (text, 17), (text, None)]:
        for part in pieces(shards, tokens):
            dense = shards.activations(part.split, part.shard)
            dense = dense if part.index is None else dense[part.index]
            for batch in (1, 7, part.rows, part.rows + 1):
                got = list(read(shards, part, batch))
                assert [len(x) for x in got] == [min(batch, part.rows - s) for s in range(0, part.rows, batch)]
                assert torch.equal(torch.cat(got), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_read_gives_float32_whatever_the_files_hold(tmp_path, dtype) -> None:
    rows = torch.arange(-60, 60).view(40, 3).to(dtype)
    shards = given_shards(tmp_path, [rows[:11]], [rows[11:]])
    assert shards.stored_dtype == dtype
    x = torch.cat([x for part in pieces(shards, 25) for x in read(shards, part, 4)])
    assert x.dtype == torch.float32
    assert len(x) == 25
    torch.testing.assert_close(x, rows[:25].float(), rtol=1e-2, atol=0.3 if dtype == torch.int8 else 1e-6)


# --- collect ---------------------------------------------------------------------------------------------------


def dense_codes(sae: MatryoshkaSAE, x: Tensor, floor: float) -> np.ndarray[Any, Any]:
    """Encode row by row × ‖decoder row‖ ÷ scale, and the floor, one latent after the other."""
    codes = np.zeros((len(x), sae.d_sae))
    with torch.no_grad():
        for i, row in enumerate(x):
            codes[i] = sae.encode(row[None].to(sae.W_dec))[0].double().numpy()
        norms = sae.W_dec.double().norm(dim=1).numpy()
    if not sae.rescale_acts_by_decoder_norm:
        codes *= norms
    codes /= float(sae.scale)
    for latent in range(sae.d_sae):
        most = codes[:, latent].max()
        for i in range(len(x)):
            if codes[i, latent] <= floor * most:
                codes[i, latent] = 0
    return codes


def random_sae(sparsity: str, rescale: bool = False, normalise: str = "none", d_in: int = 20) -> MatryoshkaSAE:
    sae = make(
        *(d_in, 24, [5, 12, 24], 4, 1.0),
        dtype=torch.float32,
        sparsity=sparsity,
        rescale_acts_by_decoder_norm=rescale,
    )
    if normalise != "none":
        x = torch.randn(500, d_in, generator=torch.Generator().manual_seed(5)) * 0.5 + 0.2
        b_dec = sae.b_dec.detach().clone()
        sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()), normalise)
        with torch.no_grad():
            sae.b_dec += b_dec * 0.1
    if sparsity == "batch_topk":
        sae.threshold.fill_(0.5)
    with torch.no_grad():
        sae.b_enc[3] = -1e6  # dead
        if not rescale:
            sae.W_dec[7] = 0  # a latent that reconstructs nothing is silent
    return sae


CASES = [(s, r, n) for s in SPARSITIES for r in (False, True) for n in (MODES if s == "batch_topk" else ["centred"])]


@pytest.mark.parametrize(("sparsity", "rescale", "normalise"), CASES)
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_collect_is_a_dense_encode_times_decoder_norm(forest, monkeypatch, sparsity, rescale, normalise, floor) -> None:
    monkeypatch.setattr(truth, "BLOCK", 24 * 50)  # several blocks of rows
    sae = random_sae(sparsity, rescale, normalise)
    firings = collect(sae, forest, 450, floor)
    x = all_rows(forest)[:450]
    expected = dense_codes(sae, x, floor)
    found = firings.matrix.toarray()
    assert firings.rows == 450
    assert firings.d_sae == 24
    assert 450 < firings.matrix.nnz < 450 * 23
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert in_order(firings)
    assert not found[:, [3] if rescale else [3, 7]].any()
    if floor == 0:  # and it is what the SAE reconstructs with
        directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
        recon = torch.from_numpy(found) @ directions + sae.unscale(sae.b_dec.detach())
        torch.testing.assert_close(recon, sae(x).detach(), rtol=1e-4, atol=1e-4)


def in_order(firings: Firings) -> bool:
    """Within each row the latents rise, none twice."""
    spans = zip(firings.matrix.indptr[:-1], firings.matrix.indptr[1:], strict=True)
    return all((np.diff(firings.matrix.indices[a:b].astype(int)) > 0).all() for a, b in spans)


def test_collect_over_several_batches_of_a_shard_and_of_text(text, tmp_path) -> None:
    rows = torch.randn(2 * module.BATCH + 100, 2, generator=torch.Generator().manual_seed(0))
    sae = MatryoshkaSAE(2, 3, [3], 1, sparsity="l1", seed=1)
    found = collect(sae, given_shards(tmp_path, [rows[:50]], [rows[50:]]))
    with torch.no_grad():
        expected = sae.encode(rows) * sae.W_dec.norm(dim=1)
    np.testing.assert_allclose(found.matrix.toarray(), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert found.pieces == [Piece("val", 0, 0, 50), Piece("train", 0, 50, len(rows) - 50)]

    sae = MatryoshkaSAE(3, 3, [3], 1, sparsity="l1")
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3)), sae.W_dec.copy_(torch.eye(3))
    part = collect(sae, text, 25)
    x = torch.cat(
        [text.activations(p.split, p.shard)[slice(None) if p.index is None else p.index] for p in part.pieces]
    )
    np.testing.assert_array_equal(part.matrix.toarray(), x.numpy())
    assert 25 <= part.rows == len(x) < all_rows(text).shape[0]


def test_the_floor_is_a_share_of_the_maximum_over_the_rows_that_are_read(tmp_path) -> None:
    x = torch.tensor([[1.0, 4.0], [0.5, 2.0], [0.51, 2.1], [100.0, 0.0]])
    shards = given_shards(tmp_path, [x[:2]], [x[2:]])
    sae = MatryoshkaSAE(2, 2, [2], 1, sparsity="l1")
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2)), sae.W_dec.copy_(torch.eye(2))
    np.testing.assert_array_equal(collect(sae, shards, 3, 0.5).matrix.toarray() > 0, [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(
        collect(sae, shards, None, 0.5).matrix.toarray() > 0, [[0, 1], [0, 0], [0, 1], [1, 0]]
    )


def test_collect_where_nothing_fires(forest) -> None:
    sae = make(20, 6, [6], 2, dtype=torch.float32, sparsity="jumprelu")
    with torch.no_grad():
        sae.threshold.fill_(1e9)
    firings = collect(sae, forest, 130, 0.02)
    assert (firings.rows, firings.d_sae, firings.matrix.nnz) == (130, 6, 0)
    assert not firings.counts().any()
    assert not firings.largest().any()


def test_without_a_threshold_it_says_so_in_one_line(forest) -> None:
    with pytest.raises(ValueError, match=r"^this SAE has no threshold yet[^\n]*$"):
        collect(make(20, 6, [6], 2, dtype=torch.float32), forest)


@pytest.mark.parametrize("tokens", [0, -5])
def test_without_rows_it_says_so_in_one_line(forest, tokens) -> None:
    with pytest.raises(ValueError, match=rf"tokens={tokens}[^\n]*$"):
        collect(random_sae("l1"), forest, tokens)


# --- what is known of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_counts_largest_and_strong_are_those_of_loops(seed) -> None:
    firings = random_firings(60, 12, seed=seed)
    dense = firings.matrix.toarray()
    assert firings.counts().tolist() == [int((dense[:, j] > 0).sum()) for j in range(12)]
    assert firings.largest().tolist() == [dense[:, j].max() for j in range(12)]
    assert (firings.counts() == 0).any() or seed != 0
    for floor in (0.0, 0.1, 0.5, 0.99):
        strong = firings.strong(floor)
        expected = dense.copy()
        for j in range(12):
            expected[dense[:, j] <= np.float32(floor) * dense[:, j].max(), j] = 0
        np.testing.assert_array_equal(strong.matrix.toarray(), expected)
        assert strong.matrix.nnz == (expected > 0).sum()
        assert strong.rows == 60
        assert strong.d_sae == 12
        assert strong.pieces is firings.pieces
        assert in_order(strong)
        np.testing.assert_array_equal(strong.largest(), firings.largest())  # the maximum itself stays
    np.testing.assert_array_equal(firings.matrix.toarray(), dense)


def test_what_is_exactly_at_the_floor_is_silent() -> None:
    firings = of_dense(np.array([[4, 0, 1], [2, 0, 0], [2.01, 3, 0.5], [1, 0, 0.49]]))
    np.testing.assert_array_equal(firings.strong(0.5).matrix.toarray() > 0, [[1, 0, 1], [0, 0, 0], [1, 1, 0], [0] * 3])


# --- shuffled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 40, 100, 101, 10**6])
def test_a_shuffle_moves_every_latent_by_one_offset_within_each_block(block) -> None:
    firings = random_firings(100, 15, seed=3)
    dense, shuffled = firings.matrix.toarray(), firings.shuffled(1, block)
    moved = shuffled.matrix.toarray()
    assert in_order(shuffled)
    assert shuffled.pieces is firings.pieces
    assert moved.shape == dense.shape
    assert shuffled.matrix.nnz == firings.matrix.nnz
    for start in range(0, 100, block):
        before, after = dense[start : start + block], moved[start : start + block]
        for j in range(15):  # so rates and activations are kept exactly
            assert any((np.roll(before[:, j], k) == after[:, j]).all() for k in range(len(before)))
    np.testing.assert_array_equal(shuffled.counts(), firings.counts())
    np.testing.assert_array_equal(shuffled.largest(), firings.largest())
    np.testing.assert_array_equal(firings.matrix.toarray(), dense)  # it is a copy


def test_a_shuffle_is_one_of_its_seed_and_blocks_have_offsets_of_their_own() -> None:
    firings = random_firings(200, 10, seed=1)
    a, b, other = (firings.shuffled(seed, 50).matrix.toarray() for seed in (4, 4, 5))
    np.testing.assert_array_equal(a, b)
    assert (a != other).any()
    same = of_dense(np.tile(np.eye(50, 8), (4, 1))).shuffled(0, 50).matrix.toarray().reshape(4, 50, 8)
    places = same.argmax(axis=1)  # of each latent in each block
    assert (places != places[0]).any()
    shifts = of_dense(np.eye(4)[:, [0] * 200]).shuffled(0, 4).matrix.toarray().argmax(axis=0)
    assert (np.bincount(shifts, minlength=4) > 25).all()  # by any number of rows
    for latents in places - np.arange(8):
        assert len(set((latents % 50).tolist())) > 1


@pytest.mark.parametrize("block", [500, 2**16])
def test_identical_latents_are_strangers_after_a_shuffle(block) -> None:
    random = np.random.default_rng(0)
    rows, rate, copies = 4000, 0.1, 20
    one = (random.random(rows) < rate) * (0.5 + random.random(rows))
    firings = of_dense(np.tile(one[:, None], (1, copies)))
    n = int(firings.counts()[0])
    fires = firings.shuffled(0, block).matrix.toarray() > 0
    together = fires.T.astype(int) @ fires
    apart = together[~np.eye(copies, dtype=bool)]
    assert (np.diag(together) == n).all()
    # two in 500 rows may have the same offset in a block; all the same in no case
    assert apart.mean() == pytest.approx(n * n / rows, rel=0.1)
    assert apart.max() < n / 3


def test_the_default_block_is_smaller_than_large_data(monkeypatch) -> None:
    """So that what changes along the data, such as documents of one kind, stays where it is."""
    rows = 2**16 + 10
    dense = np.zeros((rows, 2), dtype=np.float32)
    dense[2**16 :] = 1
    shuffled = of_dense(dense).shuffled(0).matrix.toarray()
    assert not shuffled[: 2**16].any()
    assert shuffled[2**16 :].all()


CHECKS: list[Callable[[Firings], object]] = [Firings.counts, Firings.largest, lambda f: f.strong(0.1)]


@pytest.mark.parametrize("check", CHECKS)
def test_latents_that_never_fire_have_a_place(check) -> None:
    firings = of_dense(np.zeros((5, 4)))
    found = check(firings)
    if isinstance(found, Firings):
        assert (found.rows, found.d_sae) == (5, 4)
    else:
        assert found.tolist() == [0, 0, 0, 0]
    assert firings.shuffled(0, 2).matrix.nnz == 0
