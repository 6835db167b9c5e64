"""What the benchmark of a training step counts and runs again."""

import torch
from torch.nn import functional

from tests.benchmarks.train_step import MatrixProducts


def test_products_forward_and_backward_are_counted_from_their_shapes() -> None:
    """(3, 4) · (4, 5): 2·3·4·5 operations forward, and as many for each factor's gradient; sums are no products."""
    left, right = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    products = MatrixProducts.of(lambda: torch.autograd.backward((left @ right + 1).sum()))
    assert products.flops == 3 * 2 * 3 * 4 * 5


def test_the_cpus_attention_is_counted_too() -> None:
    """B 2, H 3, T 5, D 8: two products forward; five backward, since the weights are computed anew."""
    query = torch.randn(2, 3, 5, 8, requires_grad=True)
    attend = functional.scaled_dot_product_attention
    products = MatrixProducts.of(lambda: torch.autograd.backward(attend(query, query, query, is_causal=True).sum()))
    assert products.flops == (2 + 5) * 2 * (2 * 3 * 5 * 5 * 8)


def test_what_runs_again_leaves_the_recorded_tensors_alone() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    products = MatrixProducts.of(lambda: torch.autograd.backward((torch.ones(2, 4) @ weight.T).sum()))
    assert weight.grad is not None
    before = weight.grad.clone()
    products.run()
    assert torch.equal(weight.grad, before)
    assert torch.equal(weight, torch.ones(4, 4))
