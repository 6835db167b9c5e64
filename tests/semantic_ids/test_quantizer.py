"""The quantiser against a per-item reference, and new items against everything already taken."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.codes import SidError, SidSpace
from semantic_ids.quantizer import DenseLayer, ResidualQuantizer, squared_distances
from semantic_ids.trie import SidTrie, UnknownPrefixError
from tests.semantic_ids.factories import eighths, is_mapped, random_codes, random_mlp_quantizer, random_quantizer

# One dimension, two levels: tens, then units.
TENS_AND_UNITS = ResidualQuantizer(
    mean=np.array([100.0], np.float32),
    scale=np.array([2.0], np.float32),
    codebooks=np.array([[[0.0], [10.0], [20.0]], [[-1.0], [0.0], [2.0]]], np.float32),
)


WIDTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
"""Of the vectors, hidden layers and the latent; one alone: no layers."""


def raw(*standardised: float) -> np.ndarray:
    """Vectors that `TENS_AND_UNITS` standardises to these values."""
    return (np.array(standardised, np.float32)[:, None] * 2) + 100


def trie_of(*sids: tuple[int, ...], space: SidSpace = TENS_AND_UNITS.space) -> SidTrie:
    return SidTrie.build(space, np.array(sids))


def random_vectors(num_items: int, dimension: int, seed: int) -> np.ndarray:
    return eighths(np.random.default_rng(seed).normal(size=(num_items, dimension)))


def latent_of(quantizer: ResidualQuantizer, vector: np.ndarray) -> np.ndarray:
    """The latent of one item, in float64."""
    latent: np.ndarray = (vector.astype(np.float64) - quantizer.mean) / quantizer.scale
    for number, layer in enumerate(quantizer.layers):
        latent = layer.weight @ (np.maximum(latent, 0) if number else latent) + layer.bias
    return latent


def by_distance(residual: np.ndarray, codebook: np.ndarray) -> list[int]:
    """Codes from the nearest on, the lower one of equals first."""
    return sorted(range(len(codebook)), key=lambda code: float(((residual - codebook[code]) ** 2).sum()))


def encoded_one_by_one(quantizer: ResidualQuantizer, vectors: np.ndarray) -> list[list[int]]:
    sids = []
    for vector in vectors:
        residual, sid = latent_of(quantizer, vector), []
        for codebook in quantizer.codebooks:
            sid.append(by_distance(residual, codebook)[0])
            residual = residual - codebook[sid[-1]]
        sids.append(sid)
    return sids


def assigned_one_by_one(quantizer: ResidualQuantizer, vectors: np.ndarray, taken: SidTrie) -> list[list[int]]:
    """Every candidate in the order of its distance, walked in the trie, until one is free; `SidError` if none is."""
    given: list[list[int]] = []
    for vector in vectors:
        residual, above = latent_of(quantizer, vector), []
        for codebook in quantizer.codebooks[:-2]:
            above.append(by_distance(residual, codebook)[0])
            residual = residual - codebook[above[-1]]
        given.append(
            next(
                (sid for sid in candidates(quantizer, residual, above) if is_free(taken, sid) and sid not in given), []
            )
        )
        if not given[-1]:
            raise SidError("none is free")
    return given


def candidates(quantizer: ResidualQuantizer, residual: np.ndarray, above: list[int]) -> Iterator[list[int]]:
    *parents, last = quantizer.codebooks[-2:]
    if not parents:
        yield from ([code] for code in by_distance(residual, last))
    for codebook in parents:
        for parent in by_distance(residual, codebook):
            yield from ([*above, parent, code] for code in by_distance(residual - codebook[parent], last))


def is_free(taken: SidTrie, sid: list[int]) -> bool:
    try:
        taken.walk(sid)
    except UnknownPrefixError:
        return True
    return False


def test_encode_takes_the_nearest_code_and_passes_on_what_is_left():
    """11.5: tens 10 (code 1), 1.5 left, units 2 (code 2). 19: tens 20 (2), -1 left (0). -7: tens 0 (0), -1 (0)."""
    assert TENS_AND_UNITS.encode(raw(11.5, 19, -7)).tolist() == [[1, 2], [2, 0], [0, 0]]


@given(st.integers(1, 5), st.sampled_from([2, 3, 16]), WIDTHS, st.integers(0, 20), st.integers(0, 10_000))
def test_encode_equals_the_reference_item_by_item(
    num_levels: int, codebook_size: int, widths: list[int], num_items: int, seed: int
):
    quantizer = random_mlp_quantizer(SidSpace(num_levels, codebook_size), widths, seed)
    vectors = random_vectors(num_items, widths[0], seed + 1)
    codes = quantizer.encode(vectors)
    assert codes.shape == (num_items, num_levels)
    assert codes.dtype == np.uint16
    assert codes.tolist() == encoded_one_by_one(quantizer, vectors)


def test_the_latent_is_standardised_then_relu_between_layers_and_none_behind_the_last():
    """(6, 3) is (2, -1) standardised; layer 0 gives (2-1, -2) → ReLU (1, 0); layer 1 gives -3·1 + 7·0 + 0.5."""
    layers = (
        DenseLayer(np.array([[1, 1], [-1, 0]], np.float32), np.zeros(2, np.float32)),
        DenseLayer(np.array([[-3, 7]], np.float32), np.array([0.5], np.float32)),
    )
    quantizer = ResidualQuantizer(
        mean=np.array([2, 4], np.float32),
        scale=np.array([2, 1], np.float32),
        codebooks=np.array([[[0], [-2]], [[0], [-1]]], np.float32),
        layers=layers,
    )
    vectors = np.array([[6, 3]], np.float32)
    assert quantizer.latents(vectors).tolist() == [[-2.5]]
    assert quantizer.encode(vectors).tolist() == [[1, 0]]
    assert quantizer.last_residuals(vectors, np.array([[1, 0]], np.uint16)).tolist() == [[-0.5]]


def test_the_layers_of_a_torch_encoder_give_its_latents():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    linears = [torch.nn.Linear(into, out) for into, out in ((24, 64), (64, 16), (16, 8))]
    encoder = torch.nn.Sequential(linears[0], torch.nn.ReLU(), linears[1], torch.nn.ReLU(), linears[2])
    inputs = torch.randn(300, 24)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (encoder(inputs) - inputs[:, :8]).square().mean().backward()
        optimizer.step()
    layers = tuple(DenseLayer(linear.weight.detach().numpy(), linear.bias.detach().numpy()) for linear in linears)
    codebooks = np.zeros((1, 2, 8), np.float32)
    quantizer = ResidualQuantizer(np.zeros(24, np.float32), np.ones(24, np.float32), codebooks, layers)
    np.testing.assert_allclose(quantizer.latents(inputs.numpy()), encoder(inputs).detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("codebook_size", [2, 5, 37, 256])
def test_equal_codes_are_a_tie_that_the_lowest_wins(codebook_size: int):
    """Every code stands there twice. Their products with a vector may differ in the last bit, by the BLAS kernel."""
    generator = np.random.default_rng(codebook_size)
    once = generator.normal(size=(3, codebook_size, 32))
    codebooks = np.concatenate([once, once], axis=1).astype(np.float32)
    quantizer = ResidualQuantizer(np.zeros(32, np.float32), np.ones(32, np.float32), codebooks)
    assert quantizer.encode(generator.normal(size=(1000, 32))).max() < codebook_size


def test_a_far_vector_still_has_a_nearest_code():
    """A million away from codes one apart: a tie is what rounding cannot tell apart, no more."""
    assert TENS_AND_UNITS.encode(raw(-1e6, 1e6)).tolist() == [[0, 0], [2, 2]]


@pytest.mark.parametrize("bounds", [[1], [255, 257], [256, 512, 513], list(range(1, 600, 37))])
def test_codes_do_not_depend_on_what_is_encoded_together(bounds: list[int]):
    quantizer, vectors = random_mlp_quantizer(seed=3), random_vectors(600, 4, seed=3)
    parts = np.split(vectors, bounds)
    assert np.array_equal(np.concatenate([quantizer.encode(part) for part in parts]), quantizer.encode(vectors))
    assert np.array_equal(np.concatenate([quantizer.latents(part) for part in parts]), quantizer.latents(vectors))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i2", "<u8"])
def test_vectors_may_be_mapped_and_of_any_real_type(tmp_path: Path, dtype: str):
    quantizer = random_mlp_quantizer()
    vectors = np.random.default_rng(0).integers(0, 9, (300, 4))
    np.save(tmp_path / "vectors.npy", vectors.astype(dtype))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert quantizer.encode(mapped).tolist() == encoded_one_by_one(quantizer, vectors)
    assert quantizer.latents(mapped).dtype == np.float32


@pytest.mark.parametrize("dtype", ["c8", "?", "O", "U3"])
def test_vectors_of_other_types_are_refused(dtype: str):
    with pytest.raises(SidError, match="takes real numbers"):
        TENS_AND_UNITS.encode(np.zeros((2, 1), dtype))


def test_encoding_needs_memory_for_its_codes_and_one_block(tmp_path: Path):
    """100,000 x 64 in float64 are 51 MB, their float32 copy 26 MB; the codes 0.6 MB, a block a few times 64 KiB."""
    vectors = np.memmap(tmp_path / "vectors", np.float64, "w+", shape=(100_000, 64))
    vectors[:] = np.random.default_rng(0).normal(size=vectors.shape)
    quantizer = random_mlp_quantizer(widths=(64, 64, 32))
    quantizer.encode(vectors[:1])
    tracemalloc.start()
    try:
        codes = quantizer.encode(vectors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - codes.nbytes < 1_500_000


def test_squared_distances_are_those_of_pythagoras():
    """(0,0) and (3,4) are 5 apart, (1,1) and (3,4) √13."""
    distances = squared_distances(np.array([[0, 0], [1, 1]], np.float32), np.array([[3, 4], [1, 1]], np.float32))
    assert distances.tolist() == [[25, 2], [13, 0]]


def test_vectors_of_another_width_are_refused():
    with pytest.raises(SidError, match=r"\(2, 3\); this quantiser takes \(N, 1\)"):
        TENS_AND_UNITS.encode(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("method", ["encode", "latents", "assign_new"])
def test_a_value_that_is_not_finite_is_refused_by_its_row(value: float, method: str):
    """Row 700 is in the third block; 1e39 is finite in float64 only."""
    quantizer = random_mlp_quantizer()
    vectors = np.zeros((900, 4))
    vectors[700, 2] = value
    vectors[800] = value
    more = (SidTrie.build(quantizer.space, np.zeros((1, 3), np.int64)),) if method == "assign_new" else ()
    with pytest.raises(SidError, match="vector 700 holds a value that is not finite"):
        getattr(quantizer, method)(vectors, *more)


def one_wide(*weights: float) -> ResidualQuantizer:
    """One dimension through layers of one weight each."""
    layers = tuple(DenseLayer(np.array([[weight]], np.float32), np.zeros(1, np.float32)) for weight in weights)
    one = np.ones(1, np.float32)
    return ResidualQuantizer(one - 1, one, np.array([[[0.0], [1.0]]], np.float32), layers)


@pytest.mark.parametrize(
    ("weights", "value", "reason"),
    [
        ((), 1e19, "its latent is too large"),
        ((1e30,), 1e30, "its latent is too large"),
        ((1e30, -1.0, 1.0), 1e30, "overflows in layer 0 of the encoder"),  # -inf, and behind the ReLU 0
        ((1.0, 1e30, 1e-30), 1e30, "overflows in layer 1 of the encoder"),
    ],
)
def test_a_latent_that_overflows_is_refused_by_its_row(weights: tuple[float, ...], value: float, reason: str):
    vectors = np.zeros((300, 1), np.float32)
    vectors[260] = value
    with pytest.raises(SidError, match=f"vector 260 .*{reason}"):
        one_wide(*weights).encode(vectors)


def test_a_new_item_whose_sid_is_free_gets_the_nearest_one():
    assert TENS_AND_UNITS.assign_new(raw(11.5), trie_of((0, 0))).tolist() == [[1, 2]]


def test_a_taken_sid_passes_on_to_the_next_nearest_last_code():
    """11.5 leaves 1.5: units 2, 0 and -1 are 0.5, 1.5 and 2.5 away."""
    assert TENS_AND_UNITS.assign_new(raw(11.5), trie_of((1, 2))).tolist() == [[1, 1]]
    assert TENS_AND_UNITS.assign_new(raw(11.5), trie_of((1, 2), (1, 1))).tolist() == [[1, 0]]


def test_a_full_prefix_passes_on_to_the_next_nearest_one():
    """11.5 under the full 10: 20 is 8.5 away, 0 is 11.5 away; under 20 it leaves -8.5, nearest unit -1."""
    full = [(1, 0), (1, 1), (1, 2)]
    assert TENS_AND_UNITS.assign_new(raw(11.5), trie_of(*full)).tolist() == [[2, 0]]


def test_equal_new_items_get_different_sids_in_their_order():
    new = TENS_AND_UNITS.assign_new(raw(11.5, 11.5, 11.5, 11.5), trie_of((0, 0)))
    assert new.tolist() == [[1, 2], [1, 1], [1, 0], [2, 0]]


def test_a_full_space_raises_and_says_what_to_do():
    everything = [(tens, unit) for tens in range(3) for unit in range(3)]
    with pytest.raises(SidError, match="train a larger codebook"):
        TENS_AND_UNITS.assign_new(raw(11.5), trie_of(*everything))
    with pytest.raises(SidError, match="no SID is free"):
        TENS_AND_UNITS.assign_new(raw(1, 2), trie_of(*everything[1:]))  # the second finds nothing any more


@given(st.integers(1, 4), st.integers(2, 6), WIDTHS, st.floats(0, 1), st.integers(0, 40), st.integers(0, 10_000))
def test_new_sids_equal_those_of_walking_every_candidate(
    num_levels: int, codebook_size: int, widths: list[int], taken_share: float, num_new: int, seed: int
):
    space = SidSpace(num_levels, codebook_size)
    quantizer = random_mlp_quantizer(space, widths, seed)
    vectors = random_vectors(num_new, widths[0], seed + 1)
    trie = SidTrie.build(space, random_codes(space, 1 + int(taken_share * codebook_size**num_levels), seed))
    try:
        expected = assigned_one_by_one(quantizer, vectors, trie)
    except SidError:
        with pytest.raises(SidError, match="no SID is free under the prefix"):
            quantizer.assign_new(vectors, trie)
        return
    new = quantizer.assign_new(vectors, trie)
    assert new.tolist() == expected
    assert len({tuple(sid) for sid in new.tolist()}) == num_new
    assert all(is_free(trie, sid) for sid in new.tolist())


@pytest.mark.parametrize("first", [0, 1, 40, 79])
def test_assigning_in_two_goes_equals_assigning_in_one(first: int):
    space = SidSpace(3, 16)
    quantizer, vectors = random_mlp_quantizer(space, seed=5), np.repeat(random_vectors(20, 4, seed=5), 4, axis=0)
    taken = random_codes(space, 4000, seed=5)
    at_once = quantizer.assign_new(vectors, SidTrie.build(space, taken))
    before = quantizer.assign_new(vectors[:first], SidTrie.build(space, taken))
    after = quantizer.assign_new(vectors[first:], SidTrie.build(space, np.concatenate([taken, before])))
    assert np.concatenate([before, after]).tolist() == at_once.tolist()


def test_taken_sids_of_another_space_are_refused():
    with pytest.raises(SidError, match=r"num_levels=3.*this quantiser writes SidSpace\(num_levels=2"):
        TENS_AND_UNITS.assign_new(raw(1), trie_of((0, 0, 0), space=SidSpace(3, 3)))


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 12), st.integers(0, 10_000))
def test_new_sids_are_free_and_as_near_as_can_be(num_levels: int, num_taken: int, num_new: int, seed: int):
    space = SidSpace(num_levels, 4)
    quantizer = random_quantizer(space, 3, seed)
    taken = {tuple(sid) for sid in random_codes(space, num_taken, seed).tolist()}
    vectors = random_vectors(num_new, 3, seed + 1)
    nearest = encoded_one_by_one(quantizer, vectors)
    trie = trie_of(*taken, space=space)
    changeable = min(2, num_levels)  # the last two codes
    expected: list[tuple[int, ...]] = []
    for vector, sid in zip(vectors, nearest, strict=True):
        free = [
            candidate
            for candidate in np.ndindex(*[4] * num_levels)
            if list(candidate[: num_levels - changeable]) == sid[: num_levels - changeable]
            and candidate not in taken
            and candidate not in expected
        ]
        if not free:
            with pytest.raises(SidError, match="no SID is free"):
                quantizer.assign_new(vectors, trie)
            return
        expected.append(min(free, key=lambda candidate: residuals(quantizer, vector, candidate)[-changeable:]))
    new = [tuple(sid) for sid in quantizer.assign_new(vectors, trie).tolist()]
    assert new == expected
    assert len(set(new)) == len(new)
    assert not taken & set(new)


def residuals(quantizer: ResidualQuantizer, vector: np.ndarray, sid: tuple[int, ...]) -> list[tuple[float, int]]:
    """What is left after each level, squared, with the code that decides between equals."""
    rest, lengths = latent_of(quantizer, vector), []
    for level, code in enumerate(sid):
        rest = rest - quantizer.codebooks[level][code]
        lengths.append((float((rest**2).sum()), code))
    return lengths


def test_a_saved_quantiser_encodes_alike(tmp_path: Path):
    TENS_AND_UNITS.save(tmp_path / "quantizer")
    loaded = ResidualQuantizer.load(tmp_path / "quantizer")
    assert is_mapped(loaded.codebooks)
    assert loaded.space == TENS_AND_UNITS.space == SidSpace(2, 3)
    assert loaded.encode(raw(11.5, 19)).tolist() == [[1, 2], [2, 0]]


def test_layers_are_saved_and_mapped(tmp_path: Path):
    quantizer, vectors = (
        random_mlp_quantizer(widths=(4, 12, 6, 5, 4, 4, 4, 4, 4, 4, 4, 3)),
        random_vectors(50, 4, seed=1),
    )
    quantizer.save(tmp_path / "quantizer")
    loaded = ResidualQuantizer.load(tmp_path / "quantizer")
    assert [layer.weight.shape for layer in loaded.layers] == [layer.weight.shape for layer in quantizer.layers]
    assert all(is_mapped(array) for layer in loaded.layers for array in (layer.weight, layer.bias))
    assert np.array_equal(loaded.latents(vectors), quantizer.latents(vectors))
    assert np.array_equal(loaded.encode(vectors), quantizer.encode(vectors))


def array(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("mean", array(5), r"scale has shape \(4,\), not \(5\)"),
        ("mean", array(4, 1), r"mean has shape \(4, 1\), not \(any\)"),
        ("mean", np.array([0, 0, np.nan, 0], np.float32), "mean holds a value that is not finite"),
        ("mean", np.zeros(4), "mean is float64, not float32"),
        ("scale", array(3), r"scale has shape \(3,\), not \(4\)"),
        ("scale", np.array([1, 1, 0, 1], np.float32), "scale holds 0.0; standard deviations are above 0"),
        ("scale", -array(4), "scale holds -1.0"),
        ("scale", np.full(4, np.inf, np.float32), "scale holds a value that is not finite"),
        ("weight.0", array(6, 5), r"weight.0 has shape \(6, 5\), not \(any, 4\)"),
        ("weight.0", array(7, 4), r"bias.0 has shape \(6,\), not \(7\)"),
        ("weight.0", array(24), r"weight.0 has shape \(24,\), not \(any, 4\)"),
        ("weight.0", np.full((6, 4), np.inf, np.float32), "weight.0 holds a value that is not finite"),
        ("weight.0", np.ones((6, 4), np.float16), "weight.0 is float16, not float32"),
        ("bias.0", array(1), r"bias.0 has shape \(1,\), not \(6\)"),
        ("bias.0", np.full(6, np.nan, np.float32), "bias.0 holds a value that is not finite"),
        ("weight.1", array(3, 5), r"weight.1 has shape \(3, 5\), not \(any, 6\)"),
        ("codebooks", array(3, 8, 4), r"codebooks has shape \(3, 8, 4\), not \(any, any, 3\)"),
        ("codebooks", array(8, 3), r"codebooks has shape \(8, 3\)"),
        ("codebooks", array(9, 8, 3), "1 to 8 levels, not 9"),
        ("codebooks", array(3, 1, 3), "2 to 65536 codes, not 1"),
        ("codebooks", np.full((3, 8, 3), np.nan, np.float32), "codebooks holds a value that is not finite"),
        ("codebooks", np.full((3, 8, 3), 1e18, np.float32), r"codebooks holds a value beyond"),
    ],
)
def test_arrays_that_make_no_quantiser_are_refused_by_their_name(
    tmp_path: Path, name: str, content: np.ndarray, reason: str
):
    random_mlp_quantizer(widths=(4, 6, 3)).save(tmp_path)
    np.save(tmp_path / f"{name}.npy", content)
    with pytest.raises(SidError, match=reason):
        ResidualQuantizer.load(tmp_path)


@pytest.mark.parametrize("name", ["mean", "scale", "codebooks", "weight.0", "bias.0", "weight.1", "bias.1"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "not an array"])
def test_files_that_cannot_be_read_are_refused_by_their_name(tmp_path: Path, name: str, damage: str):
    random_mlp_quantizer(widths=(4, 6, 3)).save(tmp_path)
    path = tmp_path / f"{name}.npy"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-4], "not an array": b"x" * 200}[damage])
    with pytest.raises(SidError, match=f"the quantiser in {tmp_path} cannot be read: .*{name}"):
        ResidualQuantizer.load(tmp_path)


def test_a_quantiser_in_memory_is_held_to_the_same_rules():
    quantizer = random_mlp_quantizer(widths=(4, 6, 3))
    with pytest.raises(SidError, match=r"codebooks has shape \(3, 8, 3\), not \(any, any, 6\)"):
        replace(quantizer, layers=quantizer.layers[:1])
