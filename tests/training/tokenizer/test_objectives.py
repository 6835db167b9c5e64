"""Every loss term: its value, its gradient derived by hand, and who gets none."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.tokenizer.methods import Similarity
from training.tokenizer.objectives import (
    CodeClusters,
    contrastive,
    diversity,
    load_balanced,
    quantisation,
    uniformity,
)

DOT: Similarity = "dot"
COSINE: Similarity = "cosine"
ALL = torch.tensor([True, True, True])


def leaf(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def gradient(of: Tensor) -> Tensor:
    assert of.grad is not None
    return of.grad


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), atol=1e-9)


def random_leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


# -- quantisation


def test_the_quantisation_loss_by_hand():
    """r - e = (1, 0), (-2, 3): squares 1 + 0 + 4 + 9 = 14 over n = 4 elements is 3.5, and μ = 0.25 adds a quarter."""
    residual, code = leaf((1, 2), (3, 4)), leaf((0, 2), (5, 1))
    assert quantisation(residual, code, 0.25, learns_codes=True).item() == pytest.approx(3.5 * 1.25)
    assert quantisation(residual, code, 0.25, learns_codes=False).item() == pytest.approx(3.5 * 0.25)


def test_quantisation_pulls_the_residual_by_commitment_and_the_code_by_one():
    """L = Σ(e - sg r)²/n + μ Σ(sg e - r)²/n over n = 4 elements: dL/dr = 2μ(r - e)/n and dL/de = 2(e - r)/n.

    With r - e = (1, 0), (-2, 3) and μ = 0.25: dL/dr = (r - e)/8, dL/de = (e - r)/2.
    """
    residual, code = leaf((1, 2), (3, 4)), leaf((0, 2), (5, 1))
    torch.autograd.backward(quantisation(residual, code, 0.25, learns_codes=True))
    assert close(gradient(residual), torch.tensor([[0.125, 0], [-0.25, 0.375]]))
    assert close(gradient(code), torch.tensor([[-0.5, 0], [1, -1.5]]))


def test_quantisation_of_codes_that_do_not_learn_leaves_the_codebook_alone():
    """Only μ Σ(sg e - r)²/n is left: dL/dr = 2μ(r - e)/n as before, dL/de none."""
    residual, code = leaf((1, 2), (3, 4)), leaf((0, 2), (5, 1))
    torch.autograd.backward(quantisation(residual, code, 0.25, learns_codes=False))
    assert close(gradient(residual), torch.tensor([[0.125, 0], [-0.25, 0.375]]))
    assert code.grad is None


# -- contrastive


def test_the_dot_product_alignment_by_hand():
    """a = (1, 0), c₀ = (ln 3, 5), c₁ = (0, 1): logits ln 3 and 0, so p = (¾, ¼). It is one of the two anchors of
    the batch (the other is some other process's), so with its positive c₀ its part of the mean is L = -½ ln ¾.

    dL/da = ½(Σ p_j c_j - c₀) = ½ · ¼(c₁ - c₀) = ⅛(-ln 3, -4). dL/dc_j = ½(p_j - 1[j = 0]) a.
    """
    anchor, candidates = leaf((1, 0)), leaf((math.log(3), 5), (0, 1))
    loss = contrastive(anchor, candidates, torch.tensor([0]), ALL[:2], DOT, 1.0)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(-math.log(0.75) / 2)
    assert close(gradient(anchor), torch.tensor([[-math.log(3) / 8, -0.5]], dtype=torch.float64))
    assert close(gradient(candidates), torch.tensor([[-0.125, 0], [0.125, 0]]))


def test_the_published_dot_product_has_no_temperature():
    anchors, candidates = random_leaf(3, 4), random_leaf(3, 4, seed=1)
    warm, cold = (contrastive(anchors, candidates, torch.arange(3), ALL, DOT, heat) for heat in (1.0, 0.1))
    assert warm.item() == cold.item()


def test_the_cosine_alignment_by_hand():
    """a = (2, 0), c₀ = (5, 0), c₁ = (0, 3) at temperature T = 1/ln 3: cosines 1 and 0, logits ln 3 and 0, p = (¾, ¼).
    One of the batch's two anchors: L = -½ ln ¾, and half of each gradient that follows.

    With â = a/‖a‖: dL/dâ = (Σ p_j ĉ_j - ĉ₀)/T = ln 3 · ¼(ĉ₁ - ĉ₀) = ln 3 · (-¼, ¼). Through the normalisation it is
    (I - ââᵀ)/‖a‖ of that: the part along â = (1, 0) goes, the rest is over 2: (0, ln 3 / 8).
    dL/dĉ_j = (p_j - 1[j = 0]) â/T: for c₀ along ĉ₀, which goes; for c₁ ¼ ln 3 · (1, 0), all across ĉ₁, over ‖c₁‖.
    """
    anchor, candidates = leaf((2, 0)), leaf((5, 0), (0, 3))
    loss = contrastive(anchor, candidates, torch.tensor([0]), ALL[:2], COSINE, 1 / math.log(3))
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(-math.log(0.75) / 2)
    assert close(gradient(anchor), torch.tensor([[0, math.log(3) / 16]], dtype=torch.float64))
    assert close(gradient(candidates), torch.tensor([[0, 0], [math.log(3) / 24, 0]], dtype=torch.float64))


def test_cosine_alignment_is_blind_to_lengths():
    anchors, candidates = random_leaf(3, 4), random_leaf(3, 4, seed=1)
    plain = contrastive(anchors, candidates, torch.arange(3), ALL, COSINE, 0.1)
    scaled = contrastive(7 * anchors, 0.2 * candidates, torch.arange(3), ALL, COSINE, 0.1)
    assert scaled.item() == pytest.approx(plain.item())


@pytest.mark.parametrize("similarity", [DOT, COSINE])
def test_the_parts_of_all_anchors_add_up_to_the_mean(similarity: Similarity):
    anchors, candidates = random_leaf(3, 4), random_leaf(3, 4, seed=1)
    alone = [
        contrastive(anchors[row : row + 1], candidates, torch.tensor([row]), ALL, similarity, 0.5) for row in range(3)
    ]
    together = contrastive(anchors, candidates, torch.arange(3), ALL, similarity, 0.5)
    assert together.item() == pytest.approx(torch.stack(alone).sum().item())


@pytest.mark.parametrize("similarity", [DOT, COSINE])
def test_an_unusable_candidate_is_as_good_as_absent(similarity: Similarity):
    anchors, candidates = random_leaf(3, 4), random_leaf(3, 4, seed=1)
    usable = torch.tensor([True, False, True])
    masked = contrastive(anchors, candidates, torch.arange(3), usable, similarity, 0.5)
    torch.autograd.backward(masked)
    seen = (gradient(anchors).clone(), gradient(candidates).clone())
    anchors.grad = candidates.grad = None
    absent = contrastive(anchors[[0, 2]], candidates[[0, 2]], torch.tensor([0, 1]), ALL[:2], similarity, 0.5)
    torch.autograd.backward(absent)
    assert masked.item() == pytest.approx(absent.item())
    assert close(seen[0], gradient(anchors))
    assert close(seen[1], gradient(candidates))
    assert (seen[0][1] == 0).all()  # its own positive is unusable: the anchor is left out
    assert (seen[1][1] == 0).all()


@pytest.mark.parametrize("similarity", [DOT, COSINE])
def test_without_a_usable_anchor_the_loss_and_its_gradient_are_zero(similarity: Similarity):
    anchors, candidates = random_leaf(3, 4), random_leaf(3, 4, seed=1)
    loss = contrastive(anchors, candidates, torch.arange(3), ~ALL, similarity, 0.5)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert (gradient(anchors) == 0).all()


def test_a_share_of_a_batch_takes_its_negatives_from_all_of_it():
    """Two processes with two anchors each of four candidates: their losses add up to the loss of the whole.

    Also where one has fewer usable anchors than the other.
    """
    anchors, candidates, usable = random_leaf(4, 3), random_leaf(4, 3, seed=1), torch.tensor([True, True, False, True])
    whole = contrastive(anchors, candidates, torch.arange(4), usable, COSINE, 0.3)
    halves = [
        contrastive(anchors[part], candidates, torch.arange(4)[part], usable, COSINE, 0.3)
        for part in (slice(2), slice(2, 4))
    ]
    assert whole.item() == pytest.approx(torch.stack(halves).sum().item())


@pytest.mark.parametrize("similarity", [DOT, COSINE])
def test_the_gradient_of_alignment_is_that_of_finite_differences(similarity: Similarity):
    usable = torch.tensor([True, True, False, True])

    def loss(anchors: Tensor, candidates: Tensor) -> Tensor:
        return contrastive(anchors, candidates, torch.tensor([1, 2, 3]), usable, similarity, 0.4)

    assert torch.autograd.gradcheck(loss, (random_leaf(3, 5), random_leaf(4, 5, seed=1)))


# -- clusters of codes


def labels_without_singletons() -> st.SearchStrategy[list[int]]:
    """Each of up to five clusters has two to six codes, in any order."""
    sizes = st.lists(st.integers(2, 6), min_size=1, max_size=5)
    return sizes.flatmap(
        lambda sizes: st.permutations([label for label, size in enumerate(sizes) for _ in range(size)])
    )


@given(labels_without_singletons())
def test_companions_are_all_other_codes_of_the_cluster_equally_often_and_never_the_code_itself(labels):
    """60 evenly spaced numbers in [0, 1) are shared evenly by 1, 2, 3, 4 or 5 companions."""
    clusters = CodeClusters.of(torch.tensor(labels))
    uniform = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    for code, label in enumerate(labels):
        drawn = clusters.companions(torch.full((60,), code), uniform).tolist()
        others = [other for other, its in enumerate(labels) if its == label and other != code]
        assert {other: drawn.count(other) for other in drawn} == dict.fromkeys(others, 60 // len(others))


@given(labels_without_singletons(), st.sampled_from([0.0, 1.0 - 2**-53, 1.0]))
def test_the_ends_of_the_unit_interval_still_name_a_companion(labels, uniform):
    """A number that float32 rounds up to 1 must not fall out of the cluster."""
    clusters, codes = CodeClusters.of(torch.tensor(labels)), torch.arange(len(labels))
    drawn = clusters.companions(codes, torch.full((len(labels),), uniform, dtype=torch.float64))
    assert (drawn != codes).all()
    assert [labels[code] for code in drawn.tolist()] == labels


def test_a_cluster_of_one_code_is_refused():
    with pytest.raises(ValueError, match=r"clusters of codes have sizes \[2, 1\]"):
        CodeClusters.of(torch.tensor([0, 1, 0]))


def test_cluster_numbers_may_have_gaps():
    clusters = CodeClusters.of(torch.tensor([4, 1, 4, 1]))
    assert clusters.companions(torch.arange(4), torch.full((4,), 0.3)).tolist() == [2, 3, 0, 1]


# -- diversity


def test_the_diversity_loss_and_its_gradient_by_hand():
    """Code c = 0 with e₀ = (1, 0), e₁ = (ln 3, 2), e₂ = (0, 7), companion 1: logits over j ≠ 0 are ln 3 and 0.

    p = (-, ¾, ¼), L = -ln ¾. dL/de_j = (p_j - 1[j = 1]) e₀ for j ≠ 0: (-¼, 0) and (¼, 0). As the one asked for,
    dL/de₀ = Σ_{j≠0} p_j e_j - e₁ = ¼(e₂ - e₁) = ¼(-ln 3, 5); its product with itself is no candidate and adds nothing.
    """
    codebook = leaf((1, 0), (math.log(3), 2), (0, 7))
    loss = diversity(codebook, torch.tensor([0]), torch.tensor([1]))
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(-math.log(0.75))
    expected = torch.tensor([[-math.log(3) / 4, 1.25], [-0.25, 0], [0.25, 0]], dtype=torch.float64)
    assert close(gradient(codebook), expected)


def test_the_length_of_a_code_does_not_count_against_itself():
    """With a huge e_c the product e_c · e_c would take all the probability, were it a candidate."""
    codebook = torch.tensor([[100.0, 0.0], [0.01, 0.0], [0.01, 0.0]])
    assert diversity(codebook, torch.tensor([0]), torch.tensor([1])).item() == pytest.approx(math.log(2))


def test_the_gradient_of_diversity_is_that_of_finite_differences():
    codes, companions = torch.tensor([0, 3, 3, 1]), torch.tensor([2, 1, 0, 4])
    assert torch.autograd.gradcheck(lambda codebook: diversity(codebook, codes, companions), (random_leaf(5, 3),))


def test_two_codes_are_each_others_only_choice():
    codebook = random_leaf(2, 3)
    loss = diversity(codebook, torch.tensor([0, 1]), torch.tensor([1, 0]))
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert (gradient(codebook) == 0).all()


# -- uniformity


def test_codes_nearer_than_the_threshold_repel_each_other_by_hand():
    """K = 3, δ = 7; e₀ = (0, 0) and e₁ = (3, 4) at distance d = 5, e₂ beyond reach. Both orders of the pair count.

    L = 2(δ - d)²/(K(K - 1)) = 2·4/6. dL/de₁ = -4(δ - d)/(K(K - 1)) · (e₁ - e₀)/d = -8/6 · (0.6, 0.8), and the
    opposite for e₀.
    """
    codebook = leaf((0, 0), (3, 4), (100, 0))
    loss = uniformity(codebook, 7.0)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(8 / 6)
    assert close(gradient(codebook), torch.tensor([[0.8, 3.2 / 3], [-0.8, -3.2 / 3], [0, 0]], dtype=torch.float64))


def test_uniformity_is_the_mean_over_ordered_pairs_of_different_codes():
    codebook, threshold = random_leaf(6, 3), 2.0
    pairs = [
        max(0.0, threshold - float((codebook[i] - codebook[j]).norm().detach())) ** 2
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert uniformity(codebook, threshold).item() == pytest.approx(sum(pairs) / len(pairs))


def test_identical_codes_have_no_direction_to_part_in_and_no_nan():
    """d = 0: the loss is δ² of the one pair of two codes, the gradient 0 by convention."""
    codebook = leaf((1, 2), (1, 2))
    loss = uniformity(codebook, 0.5)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(0.25)
    assert (gradient(codebook) == 0).all()


def test_codes_farther_apart_than_the_threshold_are_left_alone():
    codebook = leaf((0, 0), (3, 4))
    loss = uniformity(codebook, 5.0)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert (gradient(codebook) == 0).all()


def test_the_gradient_of_uniformity_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(lambda codebook: uniformity(codebook, 2.0), (random_leaf(6, 3),))


# -- load balance


def test_load_balanced_distances_by_hand():
    """Counts 0, 1, 5 have mean 2: log((n + 1)/3) = ln ⅓, ln ⅔, ln 2. With g = 0.1: factors 1 - 0.1099, 1 - 0.0405,
    1 + 0.0693, all within ρ = 0.2.
    """
    counts = torch.tensor([0.0, 1.0, 5.0])
    balanced = load_balanced(torch.full((2, 3), 10.0), counts, 0.1, 0.2)
    expected = [10 * (1 + 0.1 * math.log(ratio)) for ratio in (1 / 3, 2 / 3, 2)]
    assert balanced.tolist() == [pytest.approx(expected)] * 2


def test_load_balance_is_clipped_on_both_sides():
    """Mean 250: 1 + ln(1/251) and 1 + ln(1001/251) = 2.38 are beyond 1 ± 0.2."""
    counts = torch.tensor([0.0, 0.0, 0.0, 1000.0])
    balanced = load_balanced(torch.ones(1, 4), counts, 1.0, 0.2)
    assert balanced.tolist() == [pytest.approx([0.8, 0.8, 0.8, 1.2])]


@given(st.floats(0, 1e6), st.floats(0, 0.99))
def test_codes_in_even_use_keep_their_distances(count, strength):
    distances = torch.tensor([[3.0, 1.0, 2.0]])
    assert torch.allclose(load_balanced(distances, torch.full((3,), count), strength, 0.2), distances)
