"""Passes with fixed tensors give the logits of the plain decoder: played on the CPU, captured on a GPU."""

import pytest
import tiny_var
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from arsp import kernels, stack
from arsp.decode import graphed
from arsp.decode.ar import sample_ar
from arsp.decode.decoder import RasterDecoder
from arsp.decode.filters import LogitsPipeline
from arsp.decode.graphed import CudaGraph, GraphedDecoder, GraphedScales, GraphedStudent
from arsp.decode.guidance import Guidance, RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.errors import ConfigError
from arsp.models.llamagen import GPT, GPTConfig
from arsp.protocols import Request
from arsp.testing.tolerance import assert_close

CONFIG = GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=40, block_size=16, num_classes=5, multiple_of=16)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Captured(TorchDispatchMode):
    """Refuses what a captured stream refuses: the host waiting for values or shapes, and tensors made from numbers of the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_place = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        by_mask = by_place and any(x is not None and x.dtype == torch.bool for x in args[1])
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags) and not by_place
        assert not (by_mask or waits or function.overloadpacket == torch.ops.aten.lift_fresh), f"{function} inside a graph"
        return function(*args, **(kwargs or {}))


class Played:
    """What CudaGraph promises, on the CPU: fixed inputs, one result that the next call overwrites."""

    made = 0

    def __init__(self, work, inputs, warm=False):
        self.work, self.inputs, self.result = work, tuple(x.clone() for x in inputs), None
        if not warm:
            work(*self.inputs)
        Played.made += 1

    def __call__(self, *inputs):
        for fixed, given in zip(self.inputs, inputs, strict=True):
            fixed.copy_(given)
        with Captured():
            found = self.work(*self.inputs)
        if self.result is None:
            self.result = found
        for fixed, new in zip(*((x if isinstance(x, tuple) else (x,)) for x in (self.result, found)), strict=True):
            fixed.copy_(new)
        return self.result


def make(device, guidance, monkeypatch):
    """Both decoders on a device, with rounds of 4 slots."""
    monkeypatch.setattr(graphed, "SLOTS", 4)
    Played.made = 0
    torch.manual_seed(0)
    model = GPT(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(device)
    return RasterDecoder(model, guidance), GraphedDecoder(model, guidance, capture=Played if device == "cpu" else CudaGraph)


@pytest.fixture
def request_backend():
    """Chooses kernels for one test."""
    yield kernels.set_backend
    kernels.set_backend("auto")


def request(device, num=3):
    return Request(torch.arange(num, device=device), 5, labels_B=torch.arange(num, device=device) % 5)


def codes(device, num=3):
    return torch.randint(40, (num, 16), generator=torch.Generator().manual_seed(1)).to(device)


@DEVICES
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), Guidance(2.0, 3)], ids=str)
def test_one_or_many_codes_a_pass_give_the_logits_of_the_plain_decoder(device, guidance, monkeypatch):
    plain, ours = make(device, guidance, monkeypatch)
    tokens = codes(device)
    expected = plain.teacher_forced(request(device), tokens)
    for widths in ([1] * 15, [4, 1, 7, 3]):
        state, at = ours.start(request(device)), 0
        parts = [ours.step(state, None)]
        for width in widths:
            parts.append(ours.step(state, tokens[:, at : at + width]))
            at += width
        assert_close(torch.cat(parts, 1), expected, abs_tol=2e-4, what=f"logits for widths {widths}")
        assert state.lengths_B.tolist() == [15] * 3 and state.passes == 1 + len(widths)
        del state


@DEVICES
def test_rows_at_different_lengths_and_rewinds(device, monkeypatch):
    plain, ours = make(device, Guidance(2.0), monkeypatch)
    tokens = codes(device)
    expected = plain.teacher_forced(request(device), tokens)
    state = ours.start(request(device))
    ours.step(state, None)
    ours.step(state, tokens[:, :9])
    lengths = torch.tensor([2, 9, 5], device=device)
    ours.rewind(state, lengths)
    for _ in range(2):
        at = state.lengths_B.tolist()
        got = ours.step(state, torch.stack([tokens[b, n : n + 3] for b, n in enumerate(at)]))
        for b, n in enumerate(at):
            assert_close(got[b], expected[b, n + 1 : n + 4], abs_tol=2e-4, what=f"row {b} at length {n}")
    kept = ours.select(state, torch.tensor([0], device=device))
    assert_close(ours.step(kept, tokens[:1, 8:9]), expected[:1, 9:10], abs_tol=2e-4, what="a selected row, without graphs")


@DEVICES
def test_in_bfloat16_one_graph_of_a_width_serves_all_lengths(device, monkeypatch):
    plain, ours = make(device, Guidance(2.0), monkeypatch)
    plain.model.bfloat16()
    tokens, states = codes(device), []
    for decoder in (plain, ours):
        state = decoder.start(request(device))
        logits = [decoder.step(state, None), decoder.step(state, tokens[:, :9])]
        for lengths in ([9, 2, 5], [12, 0, 3], [3, 3, 3]):
            decoder.rewind(state, torch.tensor(lengths, device=device))
            logits.append(decoder.step(state, torch.stack([tokens[b, n : n + 3] for b, n in enumerate(lengths)])))
        states.append((state, torch.cat(logits, 1)))
    assert_close(states[1][1], states[0][1], abs_tol=2e-2, what="logits")
    if kernels.reads_lengths(ours._cache.k[0], 3):
        assert {key[0] for key in ours._graphs} == {9, 3} and len(ours._graphs) == 2


@DEVICES
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_images_are_those_of_the_plain_decoder_and_graphs_are_kept(device, backend, monkeypatch, request_backend):
    request_backend(backend)
    plain, ours = make(device, Guidance(2.0), monkeypatch)
    pipeline = LogitsPipeline(top_k=20)
    wanted = sample_ar(plain, request(device), pipeline=pipeline)
    for _ in range(3):
        found = sample_ar(ours, request(device), pipeline=pipeline)
        assert torch.equal(found.codes_BL, wanted.codes_BL) and found.stats == wanted.stats
    graphs = 1 if kernels.reads_lengths(ours._cache.k[0], 1) else 4
    assert backend == "auto" or graphs == 4
    assert len(ours._graphs) == graphs, "one, or one for every 4 slots"
    other = sample_ar(ours, request(device, 2), pipeline=pipeline)
    assert torch.equal(other.codes_BL, wanted.codes_BL[:2]) and len(ours._graphs) == graphs, "another batch has graphs of its own"


@DEVICES
def test_a_second_state_does_not_disturb_the_first(device, monkeypatch):
    plain, ours = make(device, Guidance(2.0), monkeypatch)
    tokens = codes(device)
    expected = plain.teacher_forced(request(device), tokens)
    first, second = ours.start(request(device)), ours.start(request(device))
    assert first.cache is not second.cache
    for state, fed in ((first, tokens), (second, tokens.flip(1))):
        ours.step(state, None)
        ours.step(state, fed[:, :5])
    kept = ours.step(first, tokens[:, 5:6])
    ours.step(first, tokens[:, 6:7])
    assert_close(kept, expected[:, 6:7], abs_tol=2e-4, what="logits after the next pass")
    del first, second, state
    assert ours.start(request(device)).cache is ours._cache


def scales(device, cfg):
    """Both next-scale decoders of the tiny VAR."""
    model, quantizer = tiny_var.var_model().to(device), tiny_var.tokenizer_model().quantize.to(device)
    plain = NextScaleDecoder(model, quantizer, RampGuidance(cfg, 3))
    return plain, GraphedScales(plain, capture=Played if device == "cpu" else CudaGraph)


@DEVICES
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_images_of_a_var_are_those_of_the_plain_decoder_and_graphs_are_kept(device, cfg):
    Played.made = 0
    plain, ours = scales(device, cfg)
    for num in (3, 2):
        for seed in range(3):
            labels = (torch.arange(num, device=device) + seed) % 3
            asked = Request(torch.arange(num, device=device), seed, labels_B=labels)
            wanted, found = sample_ar(plain, asked, pipeline=LogitsPipeline()), sample_ar(ours, asked, pipeline=LogitsPipeline())
            assert torch.equal(found.codes_BL, wanted.codes_BL) and found.stats == wanted.stats, f"{num} rows, image {seed}"
        assert len(ours._graphs) == 3
    assert device == "cuda" or Played.made == 6, "three scales of two batch sizes"


@DEVICES
def test_what_is_not_fed_scale_by_scale_runs_without_graphs(device):
    plain, ours = scales(device, 1.5)
    asked = Request(torch.arange(2, device=device), 0, labels_B=torch.arange(2, device=device))
    codes = torch.randint(16, (2, 21), generator=torch.Generator().manual_seed(0)).to(device)
    expected = plain.teacher_forced(asked, codes)
    for _ in range(2):
        state = ours.start(asked)
        assert_close(ours.step(state, codes[:, :5]), expected[:, 5:], abs_tol=1e-4, what="two scales at once")
        del state
    ours.step(ours.start(asked), None)  # left in the middle
    for _ in range(3):
        first, second, parts = ours.start(asked), ours.start(asked), []
        for fed in (None, codes[:, :1], codes[:, 1:5]):
            parts.append(ours.step(first, fed))
            assert_close(ours.step(second, fed), parts[-1], abs_tol=1e-4, what="a second state")
        assert_close(torch.cat(parts, 1), expected, abs_tol=1e-4, what="scale by scale")
        del first, second


@DEVICES
def test_a_student_gives_the_same_codes_and_vectors(device):
    built = stack.build(stack.StackConfig(model="llamagen-dd1", student_steps=2), device)
    student = built.model.module
    ours = GraphedStudent(student, torch.device(device), capture=Played if device == "cpu" else CudaGraph)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        results = []
        for num, known in ((2, 0), (2, 5), (3, 5)):
            x = torch.randn(num, 16, student.code_dim, generator=generator).to(device)
            inputs = (torch.arange(num, device=device), x, torch.full((num,), known, device=device))
            results.append((ours(*inputs), student(*inputs)))
    for found, wanted in results:
        for ours_, plain in zip(found, wanted, strict=True):
            assert_close(ours_, plain, abs_tol=1e-4, what="logits or vectors, after all passes")


def test_graphs_need_a_gpu_and_codes():
    for model in ("llamagen", "var", "llamagen-dd1"):
        with pytest.raises(ConfigError, match="CUDA graphs: the model is on cpu"):
            stack.build(stack.StackConfig(model=model, graphs=True))
    with pytest.raises(ConfigError, match="vectors in place"):
        stack.check(stack.StackConfig(model="var", more_smooth=True, graphs=True))


@DEVICES
@pytest.mark.parametrize(
    "options",
    [
        {"model": "llamagen", "apply": ["w4a8"]},
        {"model": "var", "apply": ["w8a8"]},
        {"model": "var", "apply": ["litevar"]},
        {"model": "var", "share": "map"},
        {"model": "var-dd1"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_stacks_can_be_captured_and_make_the_same_codes(device, options):
    plain = stack.build(stack.StackConfig(**options), device)
    capture = Played if device == "cpu" else CudaGraph
    asked, generator = plain.request(torch.arange(2), 3, torch.tensor([1, 7])), plain.generator
    wanted = generator.generate(asked).codes_BL
    if options["model"] == "var-dd1":
        generator.student = GraphedStudent(generator.student, torch.device(device), capture)
    elif options["model"] == "var":
        generator.decoder = GraphedScales(generator.decoder, capture)
    else:
        decoder = generator.decoder
        generator.decoder = GraphedDecoder(decoder.model, decoder.guidance, decoder.policy, capture)
    for _ in range(2):
        assert (generator.generate(asked).codes_BL == wanted).float().mean() > 0.97, "a rounding may move a near tie, no more"
