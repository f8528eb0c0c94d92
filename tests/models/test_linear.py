"""The linear layer is the product with its matrix whatever computes it: few rows, many rows, large layers with a GELU behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arsp.models import attention
from arsp.models.attention import Linear

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(dtype: torch.dtype, bias: bool, inputs: int = 512, outputs: int = 1024) -> Linear:
    torch.manual_seed(0)
    return Linear(inputs, outputs, bias=bias).to(dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 17, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_large_layers_equal_the_float64_product(dtype, rows, bias, gelu):
    module, x = layer(dtype, bias), torch.randn(2, rows, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = F.linear(x.double(), module.weight.double(), None if module.bias is None else module.bias.double())
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    found = module(x, gelu=gelu)
    assert found.dtype == dtype and found.shape == (2, rows, 1024)
    torch.testing.assert_close(
        found.double(), exact, atol=2e-5 if dtype == torch.float32 else 2e-2, rtol=1e-5 if dtype == torch.float32 else 2e-2
    )


@pytest.mark.parametrize("rows", [3, 60])
@torch.inference_mode()
def test_results_join_a_residual_as_torch_adds_them(rows):
    module, x = layer(torch.bfloat16, True), torch.randn(2, rows, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    residual, gain = torch.randn(2, rows, 1024), torch.randn(2, 1, 1024).bfloat16()
    assert torch.equal(module(x, residual=residual), residual + module(x))
    assert torch.equal(module(x, residual=residual, gain=gain), torch.addcmul(residual, gain, module(x)))


def test_who_computes(monkeypatch):
    large, small, x = layer(torch.float32, True), layer(torch.float32, True, 512, 512), torch.randn(40, 512)
    with torch.inference_mode():
        assert attention._onednn(x, large.weight) and not attention._onednn(x, small.weight)
    assert not attention._onednn(x, large.weight), "the weights want a gradient"
    large.requires_grad_(False)
    assert attention._onednn(x, large.weight) and not attention._onednn(x.requires_grad_(), large.weight)
    assert not attention._onednn(x.detach().double(), large.weight.double())


def test_gradients_pass_through_the_gelu():
    module, x = layer(torch.float32, True), torch.randn(40, 512)
    module(x, gelu=True).square().sum().backward()
    found = module.weight.grad.clone()
    module.weight.grad = None
    F.gelu(F.linear(x, module.weight, module.bias), approximate="tanh").square().sum().backward()
    torch.testing.assert_close(found, module.weight.grad)
