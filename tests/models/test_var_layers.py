"""Linear layers of a VAR are modules of their own: a quantised one can take the place of any of them."""

from __future__ import annotations

import pytest
import tiny_var
import torch
from torch import Tensor, nn

from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.decode.schedule import ScaleStep
from arsp.models.attention import Linear
from arsp.models.var import VAR
from arsp.protocols import Request
from arsp.testing.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = ("ffn.fc1", "ffn.fc2", "attn.mat_qkv", "attn.proj", "ada_lin.1")


class Integers(nn.Module):
    """Weights in 16-bit integers with one step a row: no attribute ``weight``, nothing that the model could read but its result."""

    def __init__(self, layer: Linear):
        super().__init__()
        self.step_N1 = layer.weight.abs().amax(1, keepdim=True) / 32767
        self.integers_NK = (layer.weight / self.step_N1).round().to(torch.int16)
        self.offset, self.calls = layer.bias, 0

    def forward(
        self, x: Tensor, gelu: bool = False, outputs: slice | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self.calls += 1
        y = nn.functional.linear(x, self.integers_NK * self.step_N1, self.offset)
        y = y if outputs is None else y[..., outputs] + bias
        y = nn.functional.gelu(y, approximate="tanh") if gelu else y
        return y if residual is None else residual + gain * y


def replaced(model: VAR, names: tuple[str, ...]) -> list[Integers]:
    """Put integers in the place of these layers of every block, found by their qualified names."""
    made = []
    for name in [f"blocks.{i}.{name}" for i in range(model.config.depth) for name in names]:
        parent, _, leaf = name.rpartition(".")
        made.append(Integers(model.get_submodule(name)))
        setattr(model.get_submodule(parent), leaf, made[-1])
    return made


def logits_of(model: VAR, shared: bool) -> Tensor:
    tokenizer = tiny_var.tokenizer_model()
    steps = [ScaleStep(model, shared=shared)] * len(tiny_var.SIDES)
    decoder = NextScaleDecoder(model, tokenizer.quantize, RampGuidance(1.5, len(tiny_var.SIDES)), steps)
    codes = torch.randint(16, (2, 21), generator=torch.Generator().manual_seed(0))
    return decoder.teacher_forced(Request(torch.arange(2), 0, labels_B=torch.tensor([0, 2])), codes)


@pytest.mark.parametrize("shared", [False, True], ids=["full", "map shared"])
@pytest.mark.parametrize("names", [(name,) for name in LAYERS] + [LAYERS], ids=lambda names: "+".join(names))
def test_a_layer_that_stands_in_is_used(names, shared):
    model = tiny_var.var_model()
    expected = logits_of(model, shared)
    layers = replaced(model, names)
    found = logits_of(model, shared)
    assert all(layer.calls for layer in layers), "a layer was passed by"
    assert_close(found, expected, abs_tol=5e-3, what="logits")
    assert not torch.equal(found, expected), "the rounding of the weights must be seen"


def test_the_type_of_activations_is_that_of_the_model_not_of_a_layer():
    model = tiny_var.var_model().to(torch.bfloat16)
    replaced(model, ("ffn.fc1",))
    for block in model.blocks:
        block.ffn.fc1.register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    seen: list[torch.dtype] = []
    logits_of(model, False)
    assert set(seen) == {torch.bfloat16} == {model.dtype}
