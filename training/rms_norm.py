"""RMS norms with half the passes over memory of transformers' own, of which a CPU's training step has many."""

from typing import Any

import torch
from torch import Tensor, nn


class RmsNorm(nn.RMSNorm):
    """What transformers' norms compute, (…, D) → (…, D) in float32, with the gradient written out."""

    def forward(self, x: Tensor) -> Tensor:
        """Each vector, scaled so that its mean square is 1, times the weights."""
        normed: Tensor = _RmsNorm.apply(x.float(), self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


def replace_norms(model: nn.Module) -> None:
    """Replace the norms of a Llama or Qwen3; the parameters and their names stay."""
    norm: Any
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if hasattr(norm, "variance_epsilon"):  # transformers' own name
                replaced = RmsNorm(len(norm.weight), norm.variance_epsilon)
                replaced.weight = norm.weight
                setattr(parent, name, replaced)


class _RmsNorm(torch.autograd.Function):
    """With x̂ = x / rms(x): y = w·x̂, dw = Σ g·x̂, dx = (g·w − x̂·mean(g·w·x̂)) / rms(x)."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # noqa: ANN401 - untyped torch
        width = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width).add_(epsilon).rsqrt_()
        context.save_for_backward(x, weight, scale)
        normed: Tensor = (x * scale).mul_(weight)
        return normed

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401 - untyped torch
        x, weight, scale = context.saved_tensors
        unit = x * scale
        of_weight = gradient * unit
        along = (of_weight @ weight.to(of_weight.dtype)).div_(-x.shape[-1])[..., None]
        of_x = (gradient * weight).addcmul_(unit, along).mul_(scale)
        return of_x, of_weight.flatten(0, -2).sum(dim=0), None
