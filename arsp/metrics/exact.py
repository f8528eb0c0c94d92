"""Is a sampler exact? Draw many sequences from an enumerable decoder and compare them with its joint law.

Protocol, on the enumerable decoders of ``arsp.testing.tabular``: N >= 200 000 sequences a seed, Pearson chi-square with all cells
expecting fewer than 10 merged into one, p > 1e-4 on every seed; the total variation to the joint is reported beside that of N
independent multinomial draws, which is what sampling noise alone gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from arsp.decode.ar import ARGenerator, Callback
from arsp.decode.drafts import NGrams
from arsp.decode.filters import LogitsPipeline
from arsp.decode.modes import MODES, Parts, VerifyConfig, build_mode, settle
from arsp.distill.flow import FlowSettings, keyed_noise, prepare_codebook, sample_through_map
from arsp.distill.tabular import TabularStudent
from arsp.errors import ConfigError, nearest
from arsp.protocols import Generation, Generator, Layout, Request
from arsp.registry import Registry
from arsp.testing.tabular import TabularDecoder, random_tables, sequence_ids

P_THRESHOLD = 1e-4  # an exact sampler fails one seed with this probability
MIN_EXPECTED = 10.0
BATCH_SIZE = 50_000


@dataclass(frozen=True)
class ExactReport:
    """One seed of one sampler. ``tv_floor``: total variation of as many multinomial draws from the true joint."""

    sampler: str
    exactness: str  # what the sampler claims: "exact", "bounded(delta)", "lossy" or "approximate"
    seed: int
    num: int
    tv: float
    tv_floor: float
    chi2: float
    df: int
    p: float

    @property
    def passed(self) -> bool:
        """The chi-square test does not reject at ``P_THRESHOLD``."""
        return self.p > P_THRESHOLD

    def row(self) -> dict[str, Any]:
        """All numbers and the verdict as a plain dictionary."""
        return {**asdict(self), "passed": self.passed}

    def metrics(self) -> list[dict[str, Any]]:
        """Entries of a record's ``metrics``: ``exact_tv`` and ``exact_p``, each with all numbers of this seed."""
        shared = {"n": self.num, "protocol": "enumerable-joint", "reference_sha256": None, "comparable": True, **self.row()}
        return [{"name": "exact_tv", "value": self.tv, **shared}, {"name": "exact_p", "value": self.p, **shared}]


def count_sequences(codes_BL: Tensor, vocab_size: int) -> Tensor:
    """How often each of the ``V^L`` sequences occurs: float64 ``(V^L,)``, indexed like the joint."""
    num_sequences = vocab_size ** codes_BL.shape[1]
    return torch.bincount(sequence_ids(codes_BL, vocab_size), minlength=num_sequences).double()


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the L1 distance of two laws given as probabilities or counts (each normalised first)."""
    return 0.5 * (p.double() / p.sum() - q.double() / q.sum()).abs().sum().item()


def chi_square(counts: Tensor, joint: Tensor, min_expected: float = MIN_EXPECTED) -> tuple[float, int, float]:
    """Pearson's (chi-square, degrees of freedom, p) of counts against a law; cells expecting less are merged into one.

    A sequence of probability 0 that was drawn gives (inf, df, 0).
    """
    expected = joint.double() / joint.sum() * counts.sum()
    if counts[expected == 0].sum() > 0:
        return float("inf"), max(int((expected > 0).sum()) - 1, 1), 0.0
    small = expected < min_expected
    observed = torch.cat((counts[~small].double(), counts[small].sum(dim=0, keepdim=True).double()))
    expected = torch.cat((expected[~small], expected[small].sum(dim=0, keepdim=True)))
    used = expected > 0
    statistic = ((observed - expected)[used].square() / expected[used]).sum().item()
    df = int(used.sum()) - 1
    return statistic, df, float(stats.chi2.sf(statistic, df)) if df else 1.0


def run_exact(
    sampler: str | Generator,
    decoder: TabularDecoder | None = None,
    *,
    num: int = 200_000,
    seeds: Sequence[int] = (0, 1, 2),
    pipeline: LogitsPipeline | None = None,
    options: dict[str, Any] | None = None,
    batch_size: int = BATCH_SIZE,
    callback: Callback | None = None,
) -> list[ExactReport]:
    """Draw ``num`` sequences a seed and report each seed's distance to the joint.

    ``sampler``: a mode of the verify family (with ``options`` as for :func:`mode_options`), a name of :data:`SAMPLERS`, a registered
    sampler (called with the decoder), or any Generator bound to ``decoder`` (default: :func:`default_testbed`); a Generator's
    ``exactness`` attribute, where it has one, labels its reports. ``pipeline`` changes the law that is sampled *and* the joint it is
    compared with; a mode gets the pipeline itself, every other sampler tables that are filtered already.
    ``callback(number of sequences)`` is called after every batch. An exact sampler passes all three default seeds with
    probability 0.9997.
    """
    decoder = decoder or default_testbed()
    law = decoder if pipeline is None else filtered(decoder, pipeline)
    if sampler in MODES:
        name, exactness, make = sampler, "", lambda _: mode_generator(sampler, decoder, pipeline, **(options or {}))
    else:
        name, exactness, make = _resolve(sampler)
    return [_report(name, exactness, make(law), law, num, seed, batch_size, callback) for seed in seeds]


def default_testbed() -> TabularDecoder:
    """5 codes, 2 x 2 tokens: 625 sequences, with a random codebook of width 4."""
    return TabularDecoder(random_tables(5, 4, seed=7, scale=1.5), _codebook(5), grid=(2, 2))


def wide_testbed() -> TabularDecoder:
    """32 codes, 2 tokens: 1024 sequences, for rules that compare a code with many others."""
    return TabularDecoder(random_tables(32, 2, seed=9, scale=1.0), _codebook(32))


def _codebook(vocab_size: int) -> Tensor:
    return torch.randn(vocab_size, 4, generator=torch.Generator().manual_seed(5))


def filtered(decoder: TabularDecoder, pipeline: LogitsPipeline) -> TabularDecoder:
    """The same decoder with ``pipeline`` built into its tables: the law a sampler with that pipeline must reproduce."""
    tables = [pipeline(table.log()).double().exp() for table in decoder.tables]
    return TabularDecoder(tables, decoder.codebook_VE, decoder.layout.grid)


def mode_options(name: str, layout: Layout, given: dict[str, Any]) -> VerifyConfig:
    """Settled options of a mode on a grid of few codes: its own defaults, windows one short of all there is, a tree of 2 x 2.

    ``draft_model``: any name, it stands for :func:`disturbed`. ConfigError as :func:`arsp.decode.modes.settle`.
    """
    mode = MODES[name]
    given = {key: value for key, value in given.items() if value is not None}
    if mode.needs_draft:
        given.setdefault("draft_model", "disturbed")
    if "draft_model" in given and "branches" in mode.options:
        given.setdefault("branches", ",".join(["2"] * min(2, layout.num_tokens - 1)))
    elif "window" in mode.defaults:
        most = layout.grid[1] if name == "zipar" else layout.num_tokens
        given.setdefault("window", max(1, min(mode.defaults["window"], most - 1)))
    return settle(name, VerifyConfig(**given), layout)


def mode_generator(name: str, decoder: TabularDecoder, pipeline: LogitsPipeline | None = None, **given: Any) -> Generator:
    """A mode of the verify family on an enumerable decoder. What modes ask for beside it: a draft model (:func:`disturbed`), a prior
    (the marginals, one part in ten uniform), a codebook (a random one where the decoder has none) and an embedding (a quarter of it)."""
    options = mode_options(name, decoder.layout, given)
    codebook_VE = _codebook(decoder.vocab_size) if decoder.codebook_VE is None else decoder.codebook_VE
    prior_YLV = (0.9 * torch.stack(decoder.marginals) + 0.1 / decoder.vocab_size).float()[None]
    parts = Parts(decoder, pipeline or LogitsPipeline(), codebook_VE, codebook_VE / 4, prior_YLV=prior_YLV)
    if options.init == "ngram":
        ids = torch.arange(2000)
        parts.ngrams = NGrams.count(ARGenerator(decoder, parts.pipeline).generate(Request(ids, 77)).codes_BL, decoder.vocab_size)
    if options.draft_model:
        parts.draft = disturbed(decoder)
    return build_mode(name, parts, options)


def disturbed(decoder: TabularDecoder, scale: float = 0.7, seed: int = 11) -> TabularDecoder:
    """A draft model: the same tables with Gaussian noise of standard deviation ``scale`` on their logits."""
    generator = torch.Generator().manual_seed(seed)
    noisy = [table.log() + scale * torch.randn(table.shape, dtype=table.dtype, generator=generator) for table in decoder.tables]
    return TabularDecoder([torch.softmax(table, -1) for table in noisy], decoder.codebook_VE, decoder.layout.grid)


class FlowGenerator:
    """Autoregressive sampling through the flow map with keyed noise; its law is the decoder's up to the solver's error."""

    def __init__(self, decoder: TabularDecoder, settings: FlowSettings | None = None):
        if decoder.codebook_VE is None:
            raise ConfigError("sampler 'flow': the decoder has no codebook.", hint="give TabularDecoder a codebook_VE")
        self.decoder, self.capabilities = decoder, decoder.capabilities
        self.book = prepare_codebook(decoder.codebook_VE, settings)

    def generate(self, request: Request, callback: Callback | None = None) -> Generation:
        noise_fn = keyed_noise(request, self.decoder.codebook_VE.shape[1])
        return sample_through_map(self.decoder, request, noise_fn, LogitsPipeline(), self.book, callback=callback)


SAMPLERS: dict[str, tuple[str, Callable[[TabularDecoder], Generator]]] = {
    "ar": ("exact", ARGenerator),
    "ar-torch": ("exact", lambda decoder: ARGenerator(decoder, rng="torch")),
    "flow": ("approximate", FlowGenerator),
    "dd1": ("approximate", TabularStudent),
    "dd1-2step": ("approximate", lambda decoder: TabularStudent(decoder, steps=2)),
}


def check_samplers(names: Sequence[str], layout: Layout, options: dict[str, Any] | None = None) -> None:
    """ConfigError for the first name that is neither a mode, nor in :data:`SAMPLERS`, nor registered, and for options without use."""
    for name in names:
        if name in MODES:
            mode_options(name, layout, options or {})
        else:
            _resolve(name)
    if options and not set(names) & set(MODES):
        flags = ", ".join(f"--{key}" for key in options)
        raise ConfigError(f"{flags}: no effect, no sampler is a mode of the verify family.", hint=f"modes: {', '.join(MODES)}")


def _resolve(sampler: str | Generator) -> tuple[str, str, Callable[[TabularDecoder], Generator]]:
    if not isinstance(sampler, str):
        return type(sampler).__name__, "exact", lambda decoder: sampler
    if sampler in SAMPLERS:
        return (sampler, *SAMPLERS[sampler])
    plug_ins = Registry("samplers")
    if sampler not in plug_ins.names():
        known = {*MODES, *SAMPLERS, *plug_ins.names()}
        raise ConfigError(f"sampler: unknown name {sampler!r}.", hint=nearest(sampler, known))
    make = plug_ins.get(sampler)
    return sampler, getattr(make, "exactness", "exact"), make


def _report(
    name: str,
    exactness: str,
    generator: Generator,
    decoder: TabularDecoder,
    num: int,
    seed: int,
    batch_size: int,
    callback: Callback | None,
) -> ExactReport:
    joint = decoder.joint
    counts = torch.zeros_like(joint)
    for start in range(0, num, batch_size):
        request = Request(torch.arange(start, min(start + batch_size, num)), seed)
        counts += count_sequences(generator.generate(request).codes_BL, decoder.vocab_size)
        if callback:
            callback(request.batch_size)
    drawn = torch.multinomial(joint, num, replacement=True, generator=torch.Generator().manual_seed(seed))
    floor = total_variation(torch.bincount(drawn, minlength=len(joint)), joint)
    exactness = getattr(generator, "exactness", exactness)
    return ExactReport(name, exactness, seed, num, total_variation(counts, joint), floor, *chi_square(counts, joint))
