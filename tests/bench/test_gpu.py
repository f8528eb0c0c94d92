"""What must hold on a CUDA device; ``make gpu-check`` runs these."""

import pytest
import torch

from arsp import kernels
from arsp.bench.timing import measure, peak_memory
from arsp.decode.decoder import RasterDecoder
from arsp.decode.guidance import Guidance
from arsp.models.llamagen import GPT, GPTConfig
from arsp.protocols import Request
from arsp.rng import Purpose, keyed_words

pytestmark = pytest.mark.gpu

TINY = GPTConfig(dim=32, n_layer=2, n_head=4, vocab_size=48, block_size=16, num_classes=5, multiple_of=32)


def test_random_words_on_the_gpu_are_those_of_the_cpu():
    ids, positions = torch.arange(5), torch.tensor(7)
    words = keyed_words(3, ids, positions, Purpose.TOKEN, 1000)
    assert torch.equal(keyed_words(3, ids.cuda(), positions.cuda(), Purpose.TOKEN, 1000).cpu(), words)


def test_float32_logits_of_the_decoder_agree_with_the_cpu():
    torch.manual_seed(0)
    model = GPT(TINY).eval().requires_grad_(False)
    model.init_weights()
    model.output.weight.normal_(0.0, 0.3)
    codes, logits = torch.randint(48, (2, 15)), {}
    for device in ("cpu", "cuda"):
        decoder = RasterDecoder(model.to(device), Guidance(2.0))
        state = decoder.start(Request(torch.arange(2, device=device), 0, torch.tensor([1, 4], device=device)))
        steps = [decoder.step(state, None)] + [decoder.step(state, codes[:, i : i + 1].to(device)) for i in range(15)]
        logits[device] = torch.cat(steps, dim=1).cpu()
    gap = (logits["cuda"] - logits["cpu"]).abs().max().item()
    assert gap < 1e-4, f"guided logits differ by {gap:.2e}"


def test_kernels_leave_cuda_tensors_to_torch():
    x, weight = torch.randn(2, 40, device="cuda"), torch.randn(5, 40, device="cuda")
    assert torch.equal(kernels.small_linear(x, weight), torch.nn.functional.linear(x, weight))


def test_peak_memory_is_that_of_the_allocator():
    before = torch.cuda.memory_allocated()
    seen = peak_memory(lambda: torch.empty(64 << 20, dtype=torch.uint8, device="cuda"), "cuda")
    assert seen - before == 64 << 20, f"{(seen - before) / 2**20:.1f} MiB for a tensor of 64 MiB"


def test_timing_waits_for_the_device():
    a = torch.randn(4096, 4096, device="cuda")

    def work():
        for _ in range(20):
            torch.mm(a, a)

    timing = measure({"mm": work}, repeats=3, device="cuda", memory=False)["mm"]
    flops_per_s = 20 * 2 * 4096**3 / (timing.median_ms / 1e3)
    assert flops_per_s < 5e15, f"{flops_per_s:.1e} float32 operations a second: the clock was read before the work was done"
