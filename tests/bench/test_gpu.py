"""What must hold on a CUDA device; ``make gpu-check`` runs these."""

import pytest
import tiny_var
import torch

from arsp import kernels
from arsp.bench.timing import measure, peak_memory
from arsp.decode.decoder import RasterDecoder
from arsp.decode.guidance import Guidance, RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.models.llamagen import GPT, GPTConfig
from arsp.protocols import Request
from arsp.rng import Purpose, keyed_words
from arsp.tokenizers.fast_decode import prepare_decoder
from arsp.tokenizers.pixels import to_uint8

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


def test_windows_on_the_gpu_are_those_of_the_cpu_reference():
    sides, s = (1, 2, 3, 4, 6), 4
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 2, n, 16, generator=generator) for rows, n in ((1, 36), (1, 66), (2, 66)))
    windows = torch.tensor([[-1, 0, 1, 1, 1], [1, 1, 2, 0, 2]], dtype=torch.int32)
    expected = kernels.reference.windowed_scale_attention(q, k, v, windows, sides, s)
    found = kernels.windowed_scale_attention(*(x.cuda() for x in (q, k, v, windows)), sides, s).cpu()
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_float32_logits_of_a_var_agree_with_the_cpu(cfg):
    codes, logits = torch.randint(16, (2, 21), generator=torch.Generator().manual_seed(0)), {}
    for device in ("cpu", "cuda"):
        model, quantizer = tiny_var.var_model().to(device), tiny_var.tokenizer_model().quantize.to(device)
        asked = Request(torch.arange(2, device=device), 0, torch.tensor([1, 2], device=device))
        logits[device] = NextScaleDecoder(model, quantizer, RampGuidance(cfg, 3)).teacher_forced(asked, codes.to(device)).cpu()
    gap = (logits["cuda"] - logits["cpu"]).abs().max().item()
    assert gap < 1e-4 * (1 + logits["cpu"].abs().max().item()), f"guided logits differ by {gap:.2e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_images_of_the_prepared_decoder_agree_with_the_cpu(dtype):
    codes = torch.randint(16, (3, 21), generator=torch.Generator().manual_seed(0))
    images = {}
    with torch.inference_mode():
        for device, kind in (("cpu", "float32"), ("cuda", dtype)):
            decoder = prepare_decoder(tiny_var.tokenizer_model().to(device), dtype=kind, chunk=2)
            images[device] = to_uint8(decoder.decode_codes(codes.to(device))).int().cpu()
    gap = (images["cuda"] - images["cpu"]).abs().max()
    assert gap <= {"float32": 1, "bfloat16": 6, "float16": 3}[dtype], f"images differ by {gap} levels"


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
