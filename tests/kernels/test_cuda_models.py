"""Whole embedded models with every op on the emulated device: the same images as with the CPU kernels."""

import pytest
import torch
from cuda_emulation import Target

from arsp.kernels import cuda, ops
from arsp.quant.linear import QuantisedSwiGLU
from arsp.stack import StackConfig, build

STACKS = [  # share of equal codes, and ops that must be reached; a code of 8 bits that rounds the other way can change a later draw
    ({"model": "llamagen", "apply": "w4a8"}, 1.0, {"verify", "w4a8_linear", "w4a8_swiglu", "rms_norm_quantize", "quantize_per_token"}),
    ({"model": "llamagen", "sampler": "seeded"}, 1.0, {"verify", "keyed_argmax"}),
    ({"model": "var", "apply": "w4a8"}, 0.8, {"verify", "w4a8_linear", "w8a8_linear", "modulate_quantize", "quantize_per_token"}),
]


@pytest.mark.parametrize(("options", "share", "reached"), STACKS, ids=[" ".join(map(str, stack[0].values())) for stack in STACKS])
def test_images_of_an_embedded_model_are_those_of_the_cpu_kernels(options, share, reached, monkeypatch):
    monkeypatch.setattr(QuantisedSwiGLU, "gated", ("cuda", "cpu"))
    stack = build(StackConfig(**options))
    request = stack.request(torch.arange(2), 7, torch.arange(2))
    wanted = stack.generator.generate(request).codes_BL
    logits = stack.generator.decoder.teacher_forced(request, wanted)
    target, used = Target(0), set()

    def run(name):
        def call(*arguments):
            used.add(name)
            return target(name, *arguments)

        return call

    for name in cuda.LAUNCHERS:
        monkeypatch.setattr(ops, name, run(name))
    equal = (stack.generator.generate(request).codes_BL == wanted).double().mean().item()
    assert equal >= share, f"{equal:.3f} of the codes are those of the CPU"
    assert reached <= used, f"only {used} ran"
    # single codes of 8 bits round the other way behind another exponential; W4A8 itself is several times as far from the model
    apart = (stack.generator.decoder.teacher_forced(request, wanted) - logits).norm() / logits.norm()
    assert apart < 0.03, f"logits of the same codes are {apart:.4f} of their size away"
