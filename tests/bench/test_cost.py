"""The cost model against numbers that were derived independently of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from arsp import kernels
from arsp.bench import cost
from arsp.decode.decoder import RasterDecoder
from arsp.decode.guidance import Guidance
from arsp.models.llamagen import GPT, VARIANTS, GPTConfig
from arsp.protocols import Request
from arsp.zoo.load import module_bytes

TINY = GPTConfig(dim=32, n_layer=3, n_head=4, vocab_size=48, block_size=16, num_classes=5, multiple_of=32)


@pytest.mark.parametrize(
    "name, extra, megabytes",
    [("GPT-B", {}, 390.1), ("GPT-L", {}, 1300.4), ("GPT-XL", {}, 3009.8), ("GPT-XXL", {}, 5537.1), ("GPT-3B", {}, 12164.1)],
)
def test_weights_read_per_step_are_those_of_the_published_sizes(name, extra, megabytes):
    got = cost.decode_weight_bytes(GPTConfig(**VARIANTS[name], **extra)) / 1e6
    assert abs(got - megabytes) < 0.06, f"{name}: {got:.2f} MB, expected {megabytes}"


def test_cache_bytes_are_those_of_the_published_sizes():
    assert cost.kv_bytes(GPTConfig(**VARIANTS["GPT-B"]), 1) == 73_728
    assert cost.kv_bytes(GPTConfig(**VARIANTS["GPT-XL"]), 1, dtype=torch.bfloat16) == 184_320


def test_counted_macs_equal_what_torch_counts_while_the_decoder_runs(monkeypatch):
    monkeypatch.setattr(kernels, "_applies", lambda *tensors: False)  # torch counts its own operators
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    model.init_weights()
    decoder = RasterDecoder(model, Guidance(2.0))
    request = Request(torch.arange(1), 0, torch.tensor([3]))
    linear_macs = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda layer, given, out: linear_macs.append(out.numel() * layer.in_features))
    with FlopCounterMode(display=False) as counter:
        state, codes = decoder.start(request), None
        for _ in range(TINY.block_size):
            decoder.step(state, codes)
            codes = torch.tensor([[7]])
    flops = counter.get_flop_counts()["Global"]
    attention = sum(num for op, num in flops.items() if "attention" in str(op)) // 2  # counts linear layers only outside inference mode
    counted, expected = attention + sum(linear_macs), cost.decode_macs(TINY, rows=2)
    assert counted == expected, f"counted {counted} MACs while decoding ({attention} in attention), the model says {expected}"
    assert state.peak_kv_bytes == cost.kv_bytes(TINY, TINY.cls_token_num + TINY.block_size - 1, rows=2)


def test_module_bytes_counts_shared_storage_once():
    layer = torch.nn.Linear(8, 4)
    twice = torch.nn.ModuleList([layer, layer])
    twice.append(torch.nn.Linear(8, 4))
    twice[2].weight = layer.weight
    assert module_bytes(twice) == 4 * (32 + 4 + 4)


def test_roofline_is_the_slower_of_memory_and_arithmetic():
    roof = cost.Roofline(bytes_per_s=10.0, macs_per_s=100.0)
    assert roof.seconds(20, 100) == 2.0
    assert roof.seconds(20, 1000) == 10.0


def test_measured_roofline_is_positive():
    roof = cost.measure_roofline(megabytes=1, size=32, repeats=1)
    assert roof.bytes_per_s > 0 and roof.macs_per_s > 0
