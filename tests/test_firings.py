"""Firings against a dense encode: which rows are read, what counts as firing, and what a shuffle keeps and destroys."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.hierarchy import firings as module
from msae.hierarchy.firings import BATCH, Array, Firings, FirstRows, Piece, collect, latent_codes, pieces
from msae.sae import MatryoshkaSAE, SparseCode
from msae.sae.model import Normalise
from msae.sae.sparsity import SPARSITIES
from msae.sources.source import Chunk
from tests.sources import FakeSource, ready


class Given(FakeSource):
    """A source of these rows: a tensor for each shard, and what stands beside it."""

    name = "given"

    def __init__(self, val: Sequence[Tensor], train: Sequence[Tensor], index: Sequence[dict[str, Tensor]] = ()) -> None:
        self.shards = [("val", rows) for rows in val] + [("train", rows) for rows in train]
        self.index = list(index) or [{}] * len(self.shards)
        content = hashlib.sha256(b"".join(rows.float().numpy().tobytes() for _, rows in self.shards)).hexdigest()
        first = self.shards[0][1]
        count = sum(len(rows) for _, rows in self.shards)
        super().__init__({"given": first.shape[1]}, first.dtype, count, content=content)

    def truth(self) -> None:
        return None

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for number, ((split, rows), index) in enumerate(zip(self.shards, self.index, strict=True), 1):
            yield Chunk(ready({split: self.split({"given": rows.float()}, **index)}), {"next": number})


def given_shards(root: Path, val: Sequence[Tensor], train: Sequence[Tensor], *index: Any) -> Shards:
    """A real shard directory that holds these rows."""
    return harvest(Given(val, train, *index), root, show=False)["given"]


def code_of(dense: Tensor) -> SparseCode:
    """These activations [rows, d_sae] as a sparse code."""
    rows, latents = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return SparseCode(offsets, latents, dense[rows, latents].float(), dense.shape[1])


def of_dense(dense: Any) -> Firings:
    """These activations [rows, d_sae] as firings."""
    code = code_of(torch.from_numpy(np.asarray(dense, dtype=np.float32)))
    return Firings(replace(code, latents=code.latents.int()))


def firings_of(sae: MatryoshkaSAE, shards: Shards, tokens: int | None = None, floor: float = 0.0) -> Firings:
    """The firings of one SAE on about so many rows of these shards."""
    (firings,) = collect([sae], FirstRows(shards, tokens), floor)
    return firings


class InMemory(NamedTuple):
    """Rows in memory, in batches."""

    batches: Sequence[Tensor]

    def read(self, what: str) -> Iterator[Tensor]:
        return iter(self.batches)


def sae_of(
    decoder: Tensor, encoder: Tensor | None = None, prefixes: Sequence[int] = (), threshold: float = 0.1
) -> MatryoshkaSAE:
    """Latents fire where x · encoder row > threshold; the encoder is the decoder unless given."""
    n, d_in = decoder.shape
    sae = MatryoshkaSAE(d_in, n, list(prefixes) or [n], 1)
    with torch.no_grad():
        sae.W_dec.copy_(decoder)
        sae.W_enc.copy_((decoder if encoder is None else encoder).T)
    sae.threshold.fill_(threshold)
    return sae


def identity(n: int) -> MatryoshkaSAE:
    """Latent i is what is positive in column i."""
    return sae_of(torch.eye(n), threshold=0.0)


def random_dense(rows: int, d_sae: int, seed: int = 0) -> Array:
    """Some latents never fire, some rows are empty."""
    random = np.random.default_rng(seed)
    dense = (random.random((rows, d_sae)) < 0.3) * (0.1 + random.random((rows, d_sae)))
    dense[:, random.random(d_sae) < 0.2] = 0
    dense[random.random(rows) < 0.1] = 0
    return dense.astype(np.float32)


def rows_of(shards: Shards, parts: list[Piece]) -> Tensor:
    """The rows that the pieces take, in float32."""
    taken = [(shards.activations(p.split, p.shard), p.index) for p in parts]
    return torch.cat([(rows if index is None else rows[index]).float() for rows, index in taken])


def rows_of_text(lengths: list[int], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Shuffled rows [sequence, position, seed] of sequences of these lengths, and the index beside them."""
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
    order = torch.randperm(len(sequence), generator=torch.Generator().manual_seed(seed))
    sequence, position = sequence[order], position[order]
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    index = {"sequence": sequence.int(), "position": position.int(), "tokens": tokens}
    return torch.stack([sequence, position, torch.full_like(sequence, seed)], 1).float(), index


# Of the sequences of two held-out and two training shards; a row without text is a sequence of its own.
LENGTHS = {"text": [[3, 5, 1, 4], [2, 2, 6], [7, 1], [4, 4, 4, 4, 3]], "rows": [[1] * n for n in (10, 3, 25, 8)]}


def shards_of(kind: str, root: Path, dtype: torch.dtype = torch.float32) -> Shards:
    """The shards of LENGTHS; text with its index beside it."""
    made = [rows_of_text(lengths, seed) for seed, lengths in enumerate(LENGTHS[kind])]
    rows = [rows.to(dtype) for rows, _ in made]
    return given_shards(root, rows[:2], rows[2:], [index for _, index in made] if kind == "text" else ())


# Which rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LENGTHS)
def test_pieces_are_held_out_rows_then_training_rows_and_end_with_a_whole_sequence(kind, tmp_path):
    shards, order = shards_of(kind, tmp_path), [("val", 0), ("val", 1), ("train", 0), ("train", 1)]
    total = sum(map(sum, LENGTHS[kind]))
    for tokens in [*range(1, total + 3), 10**9, None]:
        missing = total if tokens is None else min(tokens, total)
        expected = []
        for where, lengths in zip(order, LENGTHS[kind], strict=True):
            sequences = 0
            while missing > 0 and sequences < len(lengths):  # as many as it takes
                missing -= lengths[sequences]
                sequences += 1
            if sequences:
                of = shards.index(*where)["sequence"].tolist() if kind == "text" else range(len(lengths))
                expected.append((*where, [row for row, sequence in enumerate(of) if sequence < sequences]))
        parts = pieces(shards, tokens)
        rows = [list(range(part.rows)) if part.index is None else part.index.tolist() for part in parts]
        assert [(part.split, part.shard, taken) for part, taken in zip(parts, rows, strict=True)] == expected
        assert [part.rows for part in parts] == list(map(len, rows))
        ends = np.cumsum([part.rows for part in parts]).tolist()
        assert ([part.start for part in parts], [part.stop for part in parts]) == ([0, *ends[:-1]], ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_rows_are_read_in_order_in_their_type_as_often_as_they_are_asked_for(dtype, tmp_path, monkeypatch):
    shards = shards_of("text", tmp_path, dtype)
    assert shards.stored_dtype == dtype
    for tokens in (17, None):
        parts, rows = pieces(shards, tokens), FirstRows(shards, tokens)
        for batch in (1, 7, 10**6):
            monkeypatch.setattr(module, "BATCH", batch)
            for _ in range(2):
                batches = list(rows.read("again"))
                expected = [min(batch, part.rows - start) for part in parts for start in range(0, part.rows, batch)]
                assert [len(x) for x in batches] == expected
                x = torch.cat(batches)
                assert x.dtype == shards.dtype
                assert torch.equal(x.float(), rows_of(shards, parts))
                assert len(x) == len(rows)


# Collecting -----------------------------------------------------------------------------------------------------------


def random_sae(sparsity: str, rescale: bool, normalise: Normalise, d_in: int = 12, d_sae: int = 24) -> MatryoshkaSAE:
    """No bias is zero and no row has unit norm; latent 3 is dead, and 7 reconstructs nothing unless rescaled."""
    sae = MatryoshkaSAE(d_in, d_sae, [5, 12, d_sae], 4, sparsity=sparsity, rescale_acts_by_decoder_norm=rescale)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, d_in, generator=generator) * 0.5 + 0.2
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()), normalise)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.b_enc, sae.W_dec):
            weight.copy_(torch.randn(weight.shape, generator=generator))
        sae.b_dec += 0.1 * torch.randn(d_in, generator=generator)
        if sae.sparsity.threshold_is in ("calibrated", "learned"):
            sae.threshold.fill_(0.5)
        sae.b_enc[3] = -1e6
        sae.W_dec[7] *= rescale  # or its reconstruction is 0 / 0
    return sae


def dense_codes(sae: MatryoshkaSAE, x: Tensor, floor: float) -> Array:
    """Encode row by row × ‖decoder row‖ ÷ scale, and the floor, one latent after the other."""
    with torch.no_grad():
        codes = np.stack([sae.encode(row[None])[0].double().numpy() for row in x])
        if not sae.rescale_acts_by_decoder_norm:
            codes *= sae.W_dec.double().norm(dim=1).numpy()
    codes /= float(sae.scale)
    for column in codes.T:
        column[column <= floor * column.max()] = 0
    return codes


MECHANISMS = [name for name, cls in SPARSITIES.items() if cls.__module__ == "msae.sae.sparsity"]
CASES = [(name, rescale, "centred") for name in MECHANISMS for rescale in (False, True)]
CASES += [("batch_topk", False, mode) for mode in get_args(Normalise) if mode != "centred"]


@pytest.mark.parametrize(("sparsity", "rescale", "normalise"), CASES)
def test_collect_is_a_dense_encode_times_decoder_norm(tmp_path, monkeypatch, sparsity, rescale, normalise):
    monkeypatch.setattr(module, "BLOCK", 24 * 50)  # several blocks of rows
    rows = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
    shards, sae = given_shards(tmp_path, [rows[:70]], [rows[70:]]), random_sae(sparsity, rescale, normalise)
    x = rows[:300]
    for floor in (0.0, 0.3):
        firings, expected = firings_of(sae, shards, 300, floor), dense_codes(sae, x, floor)
        codes = firings.matrix.toarray()
        assert (firings.rows, firings.d_sae) == (300, 24)
        assert 300 < firings.matrix.nnz < 300 * 22
        np.testing.assert_array_equal(codes > 0, expected > 0)
        np.testing.assert_allclose(codes, expected, rtol=1e-4, atol=1e-5)
        assert is_in_order(firings)
        assert not codes[:, [3] if rescale else [3, 7]].any()
        np.testing.assert_array_equal(firings.counts, (codes > 0).sum(0))
        np.testing.assert_array_equal(firings.largest, codes.max(0))
        if floor == 0:  # and it is what the SAE reconstructs with
            directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
            recon = torch.from_numpy(codes) @ directions + sae.unscale(sae.b_dec.detach())
            torch.testing.assert_close(recon, sae(x).detach(), rtol=1e-4, atol=1e-4)


def is_in_order(firings: Firings) -> bool:
    """Whether within each row the latents rise, none twice."""
    return all((part.diff() > 0).all() for part in firings.code.latents.split(firings.code.offsets.diff().tolist()))


def test_collect_reads_several_batches_of_a_shard_and_whole_sequences_of_text(tmp_path):
    rows = torch.randn(2 * BATCH + 100, 2, generator=torch.Generator().manual_seed(0))
    shards = given_shards(tmp_path, [rows[:50]], [rows[50:]])
    np.testing.assert_array_equal(firings_of(identity(2), shards).matrix.toarray(), rows.relu())
    assert pieces(shards, None) == [Piece("val", 0, 0, 50), Piece("train", 0, 50, len(rows) - 50)]

    shards = shards_of("text", tmp_path)
    part = firings_of(identity(3), shards, 27)
    np.testing.assert_array_equal(part.matrix.toarray(), rows_of(shards, pieces(shards, 27)))
    assert part.rows == 13 + 10 + 7


def test_several_saes_encode_each_batch_of_one_reading():
    """And each has the firings that it has alone."""
    rows = torch.randn(90, 12, generator=torch.Generator().manual_seed(2))
    saes = [random_sae("batch_topk", rescale, "centred") for rescale in (False, True)]
    read = []

    class Once(InMemory):
        def read(self, what: str) -> Iterator[Tensor]:
            read.append(what)
            return iter(self.batches)

    together = collect(saes, Once(rows.split(40)), 0.3)
    assert read == ["encode"]
    for sae, firings in zip(saes, together, strict=True):
        (alone,) = collect([sae], InMemory([rows]), 0.3)
        np.testing.assert_allclose(firings.matrix.toarray(), alone.matrix.toarray(), rtol=1e-5)
    assert (together[0].matrix != together[1].matrix).nnz > 0


def test_codes_are_activations_times_the_norms_of_their_directions():
    sae = random_sae("batch_topk", False, "centred")
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    expected = (sae.encode(x) * sae.W_dec.norm(dim=1) / sae.scale).detach()
    torch.testing.assert_close(latent_codes(sae, x).dense(), expected)


def test_the_floor_is_a_share_of_the_maximum_over_the_rows_that_are_read(tmp_path):
    """What is exactly at the floor is silent."""
    x = torch.tensor([[1.0, 4.0], [0.5, 2.0], [0.51, 2.1], [100.0, 0.0]])
    shards = given_shards(tmp_path, [x[:2]], [x[2:]])
    for tokens, fires in ((3, [[1, 1], [0, 0], [1, 1]]), (None, [[0, 1], [0, 0], [0, 1], [1, 0]])):
        np.testing.assert_array_equal(firings_of(identity(2), shards, tokens, 0.5).matrix.toarray() > 0, fires)


def test_where_nothing_fires_every_latent_has_a_place(tmp_path):
    firings = firings_of(identity(2), given_shards(tmp_path, [-torch.ones(5, 2)], [-torch.ones(9, 2)]), 9, 0.02)
    for same in (firings, firings.shuffled(0, 2)):
        assert (same.rows, same.d_sae, same.matrix.nnz) == (9, 2, 0)
        assert same.counts.tolist() == same.largest.tolist() == [0, 0]


def test_what_cannot_be_collected_is_one_line(tmp_path):
    shards = shards_of("rows", tmp_path)
    for tokens in (0, -5):
        with pytest.raises(ValueError, match=rf"^tokens={tokens} leaves no rows of [^\n]*$"):
            firings_of(identity(3), shards, tokens)
    with pytest.raises(ValueError, match=r"^this SAE has no threshold yet[^\n]*$"):
        firings_of(MatryoshkaSAE(3, 6, [6], 2), shards)


# Shuffled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 40, 100, 101, 10**6])
def test_a_shuffle_moves_every_latent_by_one_offset_within_each_block(block):
    dense = random_dense(100, 15, seed=3)
    firings = of_dense(dense)
    shuffled = firings.shuffled(1, block)
    moved = shuffled.matrix.toarray()
    assert is_in_order(shuffled)
    assert moved.shape == dense.shape
    assert shuffled.matrix.nnz == firings.matrix.nnz
    for start in range(0, 100, block):
        before, after = dense[start : start + block], moved[start : start + block]
        for j in range(15):  # so rates and activations are kept exactly
            assert any((np.roll(before[:, j], k) == after[:, j]).all() for k in range(len(before)))
    np.testing.assert_array_equal(firings.matrix.toarray(), dense)  # it is a copy


def test_a_shuffle_is_one_of_its_seed_and_blocks_have_offsets_of_their_own():
    firings = of_dense(random_dense(200, 10, seed=1))
    a, b, other = (firings.shuffled(seed, 50).matrix.toarray() for seed in (4, 4, 5))
    np.testing.assert_array_equal(a, b)
    assert (a != other).any()
    same = of_dense(np.tile(np.eye(50, 8), (4, 1))).shuffled(0, 50).matrix.toarray().reshape(4, 50, 8)
    offsets = (same.argmax(axis=1) - np.arange(8)) % 50  # of each latent in each block
    assert (offsets != offsets[0]).any()
    assert all(len(set(of_block)) > 1 for of_block in offsets.tolist())
    shifts = of_dense(np.eye(4)[:, [0] * 200]).shuffled(0, 4).matrix.toarray().argmax(axis=0)
    assert (np.bincount(shifts, minlength=4) > 25).all()  # by any number of rows
