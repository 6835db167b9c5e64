"""The written-out norms against transformers' own, value and gradient."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from training.rms_norm import RmsNorm, replace_norms

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 5, 16)])
def test_value_and_gradients_are_those_of_transformers(shape):
    torch.manual_seed(0)
    theirs, ours = LlamaRMSNorm(16, eps=1e-6), RmsNorm(16, eps=1e-6)
    torch.nn.init.normal_(theirs.weight)
    ours.weight = theirs.weight
    x = torch.randn(shape, requires_grad=True)
    along = torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x))
    inputs = (x, theirs.weight)
    expected = torch.autograd.grad((theirs(x) * along).sum(), inputs)
    for gradient, other in zip(torch.autograd.grad((ours(x) * along).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_half_precision_is_normed_in_single_precision():
    x = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    normed = RmsNorm(16, eps=1e-6)(x)
    assert normed.dtype == torch.float32
    (gradient,) = torch.autograd.grad(normed.square().sum(), x)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_every_norm_is_replaced_and_neither_names_nor_outputs_change(config):
    """A Llama has two a layer and the last one; a Qwen3 two more a layer, of queries and keys."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES)).train(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # with 1, layers make so much of a rounding that processors differ
    parameters, token_ids = dict(model.named_parameters()), torch.arange(11)[None]
    expected = model(token_ids).logits
    replace_norms(model)
    assert sum(isinstance(module, RmsNorm) for module in model.modules()) == (5 if config is LlamaConfig else 9)
    replaced = dict(model.named_parameters())
    assert replaced.keys() == parameters.keys()
    assert all(replaced[name] is parameter for name, parameter in parameters.items())
    torch.testing.assert_close(model(token_ids).logits, expected)
