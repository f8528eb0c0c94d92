"""DD1 of a decoder whose joint law can be enumerated: the whole method in a minute of one CPU core, measured exactly.

The student is a small :class:`LlamaGenStudent` without a teacher network to start from. ``arsp bench exact --sampler dd1`` and
the tests train it; its total variation to the joint is the error of the method itself (flow map, objective, network).
"""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from arsp.decode.ar import Callback
from arsp.decode.few_step import FewStep, StudentGenerator
from arsp.decode.filters import LogitsPipeline
from arsp.distill.dd1 import DD1Config, DD1Task
from arsp.distill.flow import FlowSettings, keyed_noise, prepare_codebook, sample_through_map
from arsp.distill.trajectories import Trajectories
from arsp.errors import ConfigError
from arsp.models.llamagen import GPTConfig
from arsp.models.student import LlamaGenStudent
from arsp.protocols import Generation, Request
from arsp.testing.tabular import TabularDecoder
from arsp.train.loop import OptimConfig, fit

NUM, HELD_OUT, SEED = 60_000, 2_000, 20_241_217
NETWORK = dict(
    dim=64, n_layer=3, n_head=4, num_classes=1, multiple_of=32, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0
)  # fmt: skip
OPTIM = OptimConfig(
    steps=500, batch_size=512, lr=3e-3, warmup=30, weight_decay=0.0, ema=0.99, autocast="off", eval_every=250, checkpoint_every=500
)
_BATCH = 2_000  # larger ones leave the processor's cache


class TabularStudent:
    """One or two passes of the student trained on ``decoder``, as a Generator; the condition of the request is ignored."""

    exactness = "approximate"

    def __init__(self, decoder: TabularDecoder, steps: int = 1):
        task, _ = distil_tabular(decoder)
        settings = FewStep(task.config.known[:steps])
        self.student = StudentGenerator(task.trained, decoder.codebook_VE, decoder.layout, settings)
        self.capabilities = self.student.capabilities

    def generate(self, request: Request, callback: Callback | None = None) -> Generation:
        parts = [self.student.generate(Request(ids, request.seed, torch.zeros_like(ids))) for ids in request.sample_ids_B.split(_BATCH)]
        if callback:
            callback(self.student.layout.num_tokens)
        return Generation(torch.cat([part.codes_BL for part in parts]), stats=parts[0].stats)


@lru_cache(maxsize=1)
def distil_tabular(decoder: TabularDecoder) -> tuple[DD1Task, dict[str, Any]]:
    """Train one student for one pass and for two (the second at half of the codes); returns the task and the training state.

    ConfigError when the decoder has no codebook or its length is no square.
    """
    if decoder.codebook_VE is None:
        raise ConfigError("sampler 'dd1': the decoder has no codebook.", hint="give TabularDecoder a codebook_VE")
    num_tokens, (size, width) = decoder.layout.num_tokens, decoder.codebook_VE.shape
    student = LlamaGenStudent(GPTConfig(vocab_size=size, block_size=num_tokens, **NETWORK), width)
    student.init_weights(torch.Generator().manual_seed(OPTIM.seed))
    everything = tabular_trajectories(decoder)
    held_out, training = everything.rows(slice(0, HELD_OUT)), everything.rows(slice(HELD_OUT, None))
    task = DD1Task(student, decoder.codebook_VE, DD1Config(known=(0, num_tokens // 2)), training, held_out)
    with tempfile.TemporaryDirectory() as folder:
        return task, fit(task, OPTIM, Path(folder))


def tabular_trajectories(decoder: TabularDecoder) -> Trajectories:
    """Noise of sample ids 0 .. NUM and the codes that the flow map makes of it."""
    book, width, codes = prepare_codebook(decoder.codebook_VE, FlowSettings()), decoder.codebook_VE.shape[1], []
    for ids in torch.arange(NUM).split(20_000):
        request = Request(ids, SEED)
        codes.append(sample_through_map(decoder, request, keyed_noise(request, width), LogitsPipeline(), book).codes_BL)
    labels = torch.zeros(NUM, dtype=torch.int16)
    return Trajectories(torch.cat(codes).to(torch.int16), labels, torch.arange(NUM), SEED, width)
