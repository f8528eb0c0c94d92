"""Known-wrong ways of bookkeeping, each a small change of the real thing: the comparison that passes every exact mode rejects them all.

Same function and threshold as ``test_exact_modes.py`` (p <= 1e-4 is a failure); where a mutant differs from something exact by one
choice, that passes beside it.
"""

import pytest
import torch
from tabular_models import table_decoder

import arsp.decode.jacobi
import arsp.decode.trees
from arsp.decode.accept import ExactRule, GroupRule, residual
from arsp.decode.drafts import ONE_HOT, UNIFORM, Initialiser, Tape
from arsp.decode.filters import LogitsPipeline
from arsp.decode.jacobi import Chain, JacobiGenerator, Redraw
from arsp.decode.law import Law
from arsp.decode.trees import Proactive, Walk
from arsp.metrics.exact import mode_generator, run_exact
from arsp.rng import Purpose, keyed_uniform
from arsp.testing.tabular import TabularDecoder, random_tables

NUM = 60_000
ALL = LogitsPipeline()


@pytest.fixture
def decoder():
    return TabularDecoder(random_tables(5, 4, seed=7, scale=1.5), grid=(2, 2))


def chain(decoder, *, init=None, rule=None, redraw=None, kind=Chain, window=3):
    init = init or Initialiser("random_uniform", decoder.layout.grid[1])
    return JacobiGenerator(decoder, kind(ALL, init, rule or ExactRule(), redraw or Redraw()), window)


def verdict(generator, decoder, num=NUM):
    """The comparison of ``test_exact_modes.py``."""
    (report,) = run_exact(generator, decoder, num=num, seeds=(0,))
    return report


def rows_of(tape):
    return torch.arange(len(tape), device=tape.codes_BL.device)


# -- redraws ----------------------------------------------------------------------------------------------------------------


class OldLawRecorded(Redraw):
    """Maximal coupling that keeps the old law for the drafts it keeps."""

    def __call__(self, law, drawn_Bm, ratio_Bm, tape, positions_Bm):
        codes, law = super().__call__(law, drawn_Bm, ratio_Bm, tape, positions_Bm)
        old = positions_Bm < tape.drafted_B[:, None]
        uniform = keyed_uniform(tape.request.seed, tape.ids_B[:, None], positions_Bm, Purpose.COUPLE, 1, tape.passes)[..., 0]
        kept = (old & (uniform < ratio_Bm)).unsqueeze(-1)
        return codes, Law.of_weights(torch.where(kept, tape.q(rows_of(tape), positions_Bm).log(), law.log_probs()))


class AcceptElseFresh(Redraw):
    """A rejected draft is replaced by a fresh one from p instead of the residual, p recorded."""

    def __call__(self, law, drawn_Bm, ratio_Bm, tape, positions_Bm):
        drafts, old = tape.codes_BL.gather(1, positions_Bm), positions_Bm < tape.drafted_B[:, None]
        uniform = keyed_uniform(tape.request.seed, tape.ids_B[:, None], positions_Bm, Purpose.COUPLE, 1, tape.passes)[..., 0]
        return torch.where(old & (uniform < ratio_Bm), drafts, drawn_Bm), law


# -- laws of first guesses --------------------------------------------------------------------------------------------------


class CopiesAsUniform(Initialiser):
    """Copied codes, certain guesses, recorded as drawn from all codes alike."""

    def _guess(self, tape, positions, start_B1):
        codes, source = super()._guess(tape, positions, start_B1)
        return codes, torch.full_like(source, UNIFORM)


class HalfUniform(Tape):
    """Tested against one of the two laws, one-hot and uniform, replaced by the residual of the other."""

    tested, replaced = UNIFORM, ONE_HOT

    def log_q(self, positions_Bm, codes_BmK):
        return self._mixed(self.tested, super().log_q, positions_Bm, codes_BmK)

    def recorded(self, rows_r, positions_rm):
        return self._mixed(self.replaced, super().recorded, rows_r, positions_rm)

    def _mixed(self, kind, law, *arguments):
        recorded, self.source_BL = self.source_BL, torch.where(self.source_BL < 0, kind, self.source_BL)
        found, self.source_BL = law(*arguments), recorded
        return found

    def select(self, rows):
        return type(self)(**vars(super().select(rows)))


class HalfOneHot(HalfUniform):
    tested, replaced = ONE_HOT, UNIFORM


class MixedUp(Chain):
    """Uniform guesses on such a tape."""

    tape = HalfUniform

    def begin(self, request, length, vocab_size):
        return self.tape(**vars(super().begin(request, length, vocab_size)))


class MixedUpOtherwise(MixedUp):
    tape = HalfOneHot


# -- synchronised batches ---------------------------------------------------------------------------------------------------


class InStep(Chain):
    """Pairs of rows advance by the smaller number of the two; what a row had more is tested again, with fresh noise, against p."""

    against_old = False

    def advance(self, decoder, state, tape, window):
        m = min(window, tape.length - 1 - int(tape.known_B.min()))
        base = tape.known_B.clamp_max(tape.length - 1 - m)
        self.drafter.fill(tape, base + m)
        positions = base[:, None] + torch.arange(m + 1)
        old = tape.q(rows_of(tape), positions)
        tape.uniform_BL = keyed_uniform(
            tape.request.seed, tape.ids_B[:, None], torch.arange(tape.length), Purpose.ACCEPT, 1, tape.passes
        ).squeeze(-1)  # fmt: skip
        before, advance = tape.known_B, super().advance(decoder, state, tape, window)
        least = tape.known_B.view(-1, 2).min(1).values.repeat_interleave(2)
        if self.against_old and m:
            accepted = (positions < (before + advance.accepted_B)[:, None]).unsqueeze(-1)
            tape.laws = Law.of_weights(torch.where(accepted[:, 1:], old[:, 1:].log(), tape.laws.log_probs()))
        tape.known_B = least
        return advance


class InStepOldLaw(InStep):
    """The same against the law that the draft had before it was accepted."""

    against_old = True


# -- trees ------------------------------------------------------------------------------------------------------------------


class SiblingsOfTheResidual(Proactive):
    """Siblings come from max(0, p - q) of the last pass, and p is recorded."""

    before = None

    def begin(self, request, length, vocab_size):
        self.before = None
        return super().begin(request, length, vocab_size)

    def select(self, rows):
        self.before = self.before[rows]

    def _draw(self, tape, every):
        recorded = tape.laws
        if recorded is not None:
            tape.laws = Law.of_weights(residual(recorded.log_probs().exp(), self.before).log())
        codes = super()._draw(tape, every)
        tape.laws = recorded
        self.before = tape.q(every, tape.known_B[:, None] + torch.arange(1, self.window + 1))
        return codes


def uniform_bonus(real):
    """After a whole path has stood, the next code comes from all codes alike."""

    def walk(rule, shape, law, codes_Bn, q_of, tape, **more):
        done = real(rule, shape, law, codes_Bn, q_of, tape, **more)
        flat = torch.zeros(len(tape), 1, tape.vocab_size)
        any_code = tape.draw(flat, (tape.known_B + done.count_B)[:, None], Purpose.RESAMPLE).squeeze(1)
        return Walk(done.nodes_BD, done.count_B, torch.where(done.count_B == shape.depth, any_code, done.final_B))

    return walk


def proactive(decoder, kind=Proactive, window=3):
    return JacobiGenerator(decoder, kind(ALL, window, Initialiser("random_uniform", 2), width=2, levels=2), window)


# -- the verdicts -----------------------------------------------------------------------------------------------------------

MUTANTS = {
    "old law recorded": lambda decoder: chain(decoder, redraw=OldLawRecorded("maximal")),
    "accept else fresh": lambda decoder: chain(decoder, redraw=AcceptElseFresh()),
    "one-hot as uniform": lambda decoder: chain(decoder, init=CopiesAsUniform("repeat_left", 2)),
    "uniform test, one-hot residual": lambda decoder: chain(decoder, kind=MixedUp),
    "one-hot test, uniform residual": lambda decoder: chain(decoder, kind=MixedUpOtherwise),
    "in step, old law": lambda decoder: chain(decoder, kind=InStepOldLaw),
    "siblings of the residual": lambda decoder: proactive(decoder, SiblingsOfTheResidual),
    "reuse": lambda decoder: mode_generator("reuse", decoder),
    "group": lambda decoder: chain(decoder, rule=GroupRule(torch.zeros(5, 2), half_window=1, p_distance=1.0)),
    "lantern": lambda decoder: mode_generator("lantern", decoder),
    "lantern++": lambda decoder: mode_generator("lantern++", decoder),
    "lantern, tree": lambda decoder: mode_generator("lantern", decoder, draft_model="disturbed"),
    "zipar": lambda decoder: mode_generator("zipar", decoder, window=1),
}

EXACT = {
    "new law recorded": lambda decoder: chain(decoder, redraw=Redraw("maximal")),
    "one-hot": lambda decoder: chain(decoder, init=Initialiser("repeat_left", 2)),
    "uniform as one-hot": lambda decoder: chain(decoder, init=Initialiser("random_onehot", 2)),
    "in step, new law": lambda decoder: chain(decoder, kind=InStep),
    "siblings of the law": proactive,
    "group of one": lambda decoder: chain(decoder, rule=GroupRule(100 * torch.eye(5), half_window=1)),
    "row by row": lambda decoder: mode_generator("zipar", decoder, window=2),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_sampler_is_caught(name, decoder):
    report = verdict(MUTANTS[name](decoder), decoder)
    assert not report.passed and report.tv > 1.1 * report.tv_floor, f"{name} was not caught: {report}"


@pytest.mark.parametrize("name", EXACT)
def test_its_right_counterpart_passes(name, decoder):
    report = verdict(EXACT[name](decoder), decoder)
    assert report.passed, f"{name}: {report}"


def test_a_residual_that_is_tempered_again_is_caught(decoder, monkeypatch):
    """The released loop passes log(residual) through the processors again; here a temperature of 0.7."""

    def tempered(law, tape, rows_r, index_rm, positions_rm, purpose, stream=0):
        p = law.at(rows_r, index_rm).log_probs().exp()
        return tape.draw(residual(p, tape.q(rows_r, positions_rm)).log() / 0.7, positions_rm, purpose, stream, rows_r)

    monkeypatch.setattr(arsp.decode.jacobi, "resample", tempered)
    report = verdict(chain(decoder), decoder)
    assert not report.passed, report


def test_a_bonus_from_no_law_is_caught(monkeypatch):
    """Windows of two on six codes, so that whole paths stand often."""
    decoder = table_decoder()
    assert verdict(proactive(decoder, window=2), decoder).passed
    monkeypatch.setattr(arsp.decode.trees, "walk", uniform_bonus(arsp.decode.trees.walk))
    report = verdict(proactive(decoder, window=2), decoder)
    assert not report.passed, report
