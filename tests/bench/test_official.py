"""The baseline loop must compute the same model: teacher-forced logits, and the law it draws from."""

import torch

from arsp.bench import official
from arsp.bench.cost import kv_bytes
from arsp.models.llamagen import GPT, GPTConfig

TINY = GPTConfig(dim=32, n_layer=2, n_head=4, vocab_size=48, block_size=16, num_classes=5, multiple_of=32)


def tiny_model():
    generator = torch.Generator().manual_seed(0)
    model = GPT(TINY).eval().requires_grad_(False)
    model.init_weights(generator)
    model.output.weight.normal_(0.0, 0.3, generator=generator)
    return model


def test_logits_over_all_slots_with_a_mask_equal_the_uncached_model():
    model, labels = tiny_model(), torch.tensor([3, 5])
    codes = torch.randint(48, (2, 15), generator=torch.Generator().manual_seed(1))
    expected = model(codes, labels)
    slots = official.rounded_slots(17)
    caches = [official.OfficialCache(*(torch.zeros(2, 4, slots, 8) for _ in range(2))) for _ in range(2)]
    mask = torch.tril(torch.ones(slots, slots, dtype=torch.bool))
    inputs = torch.cat((model.cls_embedding(labels), model.tok_embeddings(codes)), dim=1)
    for p in range(16):
        got = official.forward(model, inputs[:, p : p + 1], torch.tensor([p]), model.rope_table("cpu"), mask, caches)
        gap = (got[:, 0] - expected[:, p]).abs().max().item()
        assert gap < 1e-5, f"position {p}: logits differ by {gap:.2e}"


def test_sampling_gives_codes_of_the_model_and_repeats_with_its_generator():
    model, labels = tiny_model(), torch.tensor([0, 4, 2])
    draws = [official.sample_official(model, labels, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0].shape == (3, 16) and int(draws[0].min()) >= 0 and int(draws[0].max()) < 48
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_guided_greedy_codes_equal_those_of_the_decoder():
    from arsp.decode.ar import sample_ar
    from arsp.decode.decoder import RasterDecoder
    from arsp.decode.filters import LogitsPipeline
    from arsp.decode.guidance import Guidance
    from arsp.protocols import Request

    model, labels = tiny_model(), torch.tensor([0, 4])
    greedy = official.sample_official(model, labels, cfg_scale=2.0, temperature=0.0)
    ours = sample_ar(RasterDecoder(model, Guidance(2.0)), Request(torch.arange(2), 0, labels), pipeline=LogitsPipeline(temperature=0.0))
    assert torch.equal(greedy, ours.codes_BL), "with temperature 0 nothing is random"


def test_cache_of_the_baseline_is_the_full_length_rounded_up():
    model = tiny_model()
    assert official.rounded_slots(17) == 24 and official.rounded_slots(24) == 24
    assert official.cache_bytes(model, batch_size=3) == kv_bytes(TINY, 24, rows=6)
