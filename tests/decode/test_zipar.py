"""ZipAR: plain sampling at full window, the promised passes, and exactly the conditioning it describes."""

import pytest
import torch
from tabular_models import guided_decoder, table_decoder

from arsp.decode.ar import ARGenerator
from arsp.decode.decoder import RasterDecoder
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.decode.zipar import ZipARGenerator
from arsp.metrics.exact import chi_square, count_sequences
from arsp.models.llamagen import GPT, GPTConfig
from arsp.protocols import Request


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=40, block_size=16, num_classes=5, multiple_of=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def request(num=6, seed=1):
    return Request(torch.arange(num), seed, labels_B=torch.arange(num) % 5)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), Guidance(2.0, 5)], ids=["off", "guided", "interval"])
def test_a_window_of_a_row_is_plain_sampling(gpt, guidance):
    decoder, pipeline = RasterDecoder(gpt, guidance), LogitsPipeline(0.9, 20, 0.95)
    expected = ARGenerator(decoder, pipeline).generate(request()).codes_BL
    assert torch.equal(ZipARGenerator(decoder, pipeline, 4).generate(request()).codes_BL, expected)


@pytest.mark.parametrize("decoder", [table_decoder(), guided_decoder(interval=1), table_decoder(3, (3, 2)), table_decoder(4, (1, 4))],
                         ids=["2x3", "guided", "3x2", "1x4"])  # fmt: skip
def test_a_window_of_a_row_is_plain_sampling_of_tables(decoder):
    expected = ARGenerator(decoder).generate(request(200)).codes_BL
    width = decoder.layout.grid[1]
    assert torch.equal(ZipARGenerator(decoder, LogitsPipeline(), width).generate(request(200)).codes_BL, expected)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_it_takes_the_passes_it_promises(gpt, window):
    """width + (rows - 1) window, of 4 x 4 codes."""
    generator, made = ZipARGenerator(RasterDecoder(gpt), LogitsPipeline(), window), []
    generation = generator.generate(request(), made.append)
    passes = 4 + 3 * window
    assert len(made) == generation.stats["passes"] == passes and sum(made) == 16
    assert generation.stats["tokens_per_pass"] == pytest.approx(16 / passes)
    report = generator.statistics.report((4, 4))
    assert report["images"] == 6 and report["passes_per_image"] == passes and report["acceptance"] is None
    assert sum(int(number) * count for number, count in report["committed"].items()) == 6 * 16
    assert generator.exactness == "lossy"


@pytest.mark.parametrize("window", [1, 2, 3])
def test_stand_ins_are_replaced_by_the_real_codes(gpt, window):
    """What the cache holds at the end: every code but the last one, which predicts nothing."""

    class Spy(RasterDecoder):
        def step(self, state, codes_Bn, nodes=None):
            if nodes is not None:
                fed.scatter_(1, nodes.slots_Bn, codes_Bn)
            return super().step(state, codes_Bn, nodes)

    fed = torch.full((6, 16), -1)
    codes = ZipARGenerator(Spy(gpt), LogitsPipeline(), window).generate(request()).codes_BL
    assert torch.equal(fed[:, :-1], codes[:, :-1])


def test_a_sequence_does_not_depend_on_its_batch(gpt):
    generator = ZipARGenerator(RasterDecoder(gpt, Guidance(2.0)), LogitsPipeline(), 2)
    together = generator.generate(request()).codes_BL
    assert torch.equal(torch.cat([generator.generate(request().rows(slice(i, i + 2))).codes_BL for i in (0, 2, 4)]), together)
    assert not torch.equal(together, ZipARGenerator(RasterDecoder(gpt, Guidance(2.0)), LogitsPipeline(), 4).generate(request()).codes_BL)


@pytest.mark.parametrize(("grid", "stood_in"), [((2, 2), {2: (0, 0)}), ((2, 3), {3: (0, 1, 1)}), ((3, 2), {2: (0, 0), 4: (0, 1, 2, 2)})],
                         ids=["2x2", "2x3", "3x2"])  # fmt: skip
def test_the_law_is_the_one_it_describes(grid, stood_in):
    """Rows start one code early: a row's first code sees, for the last code of the row above, the newest one there; every later code sees
    the real ones. 60 000 sequences against this joint, chi-square p > 1e-4."""
    decoder, V = table_decoder(3, grid, scale=1.6), 3
    L = grid[0] * grid[1]
    codes = torch.cartesian_prod(*[torch.arange(V)] * L)
    joint = torch.ones(len(codes), dtype=torch.float64)
    for position in range(L):
        context = codes[:, list(stood_in.get(position, range(position)))]
        index = (context * V ** torch.arange(position - 1, -1, -1)).sum(1)
        joint *= decoder.tables[position][index, codes[:, position]]
    assert abs(joint.sum().item() - 1) < 1e-12
    made = ZipARGenerator(decoder, LogitsPipeline(), grid[1] - 1).generate(Request(torch.arange(60_000), 3)).codes_BL
    counts = count_sequences(made, V)
    assert chi_square(counts, joint)[2] > 1e-4 and chi_square(counts, decoder.joint)[2] < 1e-4
