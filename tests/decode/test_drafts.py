"""Drafts: what each initialiser guesses and which law it records, at row starts and in chains; draft models; the two views of a law."""

import pytest
import torch
from tabular_models import table_decoder

from arsp.decode.ar import ARGenerator
from arsp.decode.drafts import INITIALISERS, ONE_HOT, PRIOR, UNIFORM, DraftModel, Initialiser, NGrams, Tape
from arsp.decode.filters import LogitsPipeline
from arsp.decode.law import Law
from arsp.errors import ConfigError
from arsp.protocols import Request
from arsp.rng import Purpose, keyed_uniform

V, LENGTH, WIDTH = 7, 12, 4


def prior_table(classes=3, seed=0):
    return torch.softmax(torch.randn(classes, LENGTH, V, generator=torch.Generator().manual_seed(seed)), -1)


def tape_of(rows=5, known=0, seed=3, prior=True, labels=True):
    """Tapes whose first ``known`` codes are known; a number or one for each row."""
    request = Request(torch.arange(rows), seed, labels_B=torch.arange(rows) % 3 if labels else None)
    tape = Tape.of(request, LENGTH, V, prior_table() if prior else None)
    tape.known_B = tape.drafted_B = torch.as_tensor(known).expand(rows).clone()
    tape.codes_BL = torch.randint(0, V, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return tape


def with_laws(tape, first, num, seed=1):
    """Drafts of ``num`` positions from ``first`` on, with laws of their own."""
    tape.laws = Law.of_weights(torch.randn(len(tape), num, V, generator=torch.Generator().manual_seed(seed)))
    tape.source_BL[:, first : first + num] = torch.arange(num)
    tape.drafted_B = torch.full_like(tape.known_B, first + num)
    return tape


def fill(name, tape, stop, purpose=Purpose.INIT):
    start = torch.maximum(tape.known_B, tape.drafted_B)
    Initialiser(name, WIDTH, purpose).fill(tape, torch.as_tensor(stop).expand(len(tape)))
    return start


def uniform_guess(tape, row, position, purpose=Purpose.INIT):
    """What "random" means: the code of the largest uniform keyed by the position."""
    return int(keyed_uniform(tape.request.seed, tape.ids_B[row], torch.tensor(position), purpose, V).argmax())


# -- the law of a draft -----------------------------------------------------------------------------------------------------


def test_both_views_of_a_recorded_law_agree_for_every_kind():
    tape = with_laws(tape_of(known=2), 4, 3)
    tape.source_BL[:, [2, 3, 7, 8]] = torch.tensor([ONE_HOT, UNIFORM, PRIOR, UNIFORM])
    positions = torch.arange(2, 9).expand(5, 7)
    dense = tape.q(torch.arange(5), positions)
    assert torch.allclose(dense.sum(-1), torch.ones(5, 7), atol=1e-6)
    single = tape.log_q(positions, torch.arange(V).expand(5, 7, V)).exp()
    torch.testing.assert_close(single, dense, rtol=1e-6, atol=1e-7)
    assert torch.equal(dense[:, 0], torch.nn.functional.one_hot(tape.codes_BL[:, 2], V).float())
    assert (dense[:, 1] == 1 / V).all() and torch.equal(dense[:, 5], prior_table()[torch.arange(5) % 3, 7])
    torch.testing.assert_close(dense[:, 2:5], tape.laws.log_probs().exp())


def test_laws_of_some_rows_and_of_a_smaller_batch_are_the_same_laws():
    tape = with_laws(tape_of(known=2), 4, 3)
    tape.source_BL[:, 7] = PRIOR
    rows, positions = torch.tensor([3, 0, 3]), torch.tensor([[4, 7], [6, 5], [7, 5]])
    dense = tape.q(torch.arange(5), torch.arange(LENGTH).expand(5, LENGTH))
    assert torch.equal(tape.q(rows, positions), dense[rows[:, None], positions])
    part = tape.select(torch.tensor([4, 1]))
    assert torch.equal(part.q(torch.arange(2), torch.arange(LENGTH).expand(2, LENGTH)), dense[[4, 1]])
    assert part.rows_B.tolist() == part.ids_B.tolist() == [4, 1] and torch.equal(part.codes_BL, tape.codes_BL[[4, 1]])


def test_a_prior_without_labels_is_that_of_the_first_class_and_is_stored_once():
    tape = tape_of(labels=False)
    tape.source_BL[:] = PRIOR
    q = tape.q(torch.arange(5), torch.arange(LENGTH).expand(5, LENGTH))
    assert torch.equal(q, prior_table()[:1].expand(5, -1, -1))
    assert tape.prior_YLV.data_ptr() == tape.select(torch.tensor([0, 1])).prior_YLV.data_ptr() and tape.state_bytes == 0


def test_the_state_of_a_row_is_its_laws():
    tape = with_laws(tape_of(), 0, 3)
    assert tape.state_bytes == 3 * (4 * V + 16)


# -- initialisers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in INITIALISERS if name != "ngram"])
def test_only_new_positions_are_filled_and_rows_may_stand_apart(name):
    tape = tape_of(known=torch.tensor([1, 4, 4, 6, 9]))
    before, sources = tape.codes_BL.clone(), tape.source_BL.clone()
    stop = torch.tensor([5, 4, 7, 11, 12])
    start = fill(name, tape, stop)
    places = torch.arange(LENGTH)
    new = (places >= start[:, None]) & (places < stop[:, None])
    assert torch.equal(tape.codes_BL[~new], before[~new]) and torch.equal(tape.source_BL[~new], sources[~new])
    assert torch.equal(tape.drafted_B, torch.maximum(start, stop))
    again = tape.codes_BL.clone()
    fill(name, tape, stop)
    assert torch.equal(tape.codes_BL, again), "drafts that are there stay"


@pytest.mark.parametrize(("name", "kind"), [("random_uniform", UNIFORM), ("random_onehot", ONE_HOT)])
def test_random_guesses_are_keyed_by_position(name, kind):
    for purpose in (Purpose.INIT, Purpose.TOKEN):
        tape = tape_of(known=3)
        fill(name, tape, 8, purpose)
        expected = [[uniform_guess(tape, row, position, purpose) for position in range(3, 8)] for row in range(5)]
        assert tape.codes_BL[:, 3:8].tolist() == expected and (tape.source_BL[:, 3:8] == kind).all()


def test_guesses_from_the_prior_record_it():
    """20 000 rows: total variation 0.03 to the frequencies of the first position would need luck of less than 1e-6."""
    num = 20_000
    tape = Tape.of(Request(torch.arange(num), 0, labels_B=torch.full((num,), 2)), LENGTH, V, prior_table())
    fill("prior", tape, 2)
    frequencies = torch.bincount(tape.codes_BL[:, 1], minlength=V) / num
    assert 0.5 * (frequencies - prior_table()[2, 1]).abs().sum() < 0.03 and (tape.source_BL[:, :2] == PRIOR).all()


def test_the_left_neighbour_is_repeated_along_its_row_only():
    tape = tape_of(known=torch.tensor([0, 2, 3, 4, 7]))
    codes = tape.codes_BL.clone()
    fill("repeat_left", tape, 10)
    for row, known in enumerate([0, 2, 3, 4, 7]):
        for position in range(known, 10):
            start = position - position % WIDTH
            if known > start:  # a code of this row is known: the last one is repeated
                expected, kind = codes[row, known - 1], ONE_HOT
            else:  # a row that begins with a guess repeats that guess
                expected, kind = uniform_guess(tape, row, start), UNIFORM if position == start else ONE_HOT
            assert tape.codes_BL[row, position] == expected and tape.source_BL[row, position] == kind, (row, position)


def test_a_draft_to_the_left_is_repeated_with_its_present_value():
    tape = with_laws(tape_of(known=1), 1, 2)
    fill("repeat_left", tape, 6)
    assert torch.equal(tape.codes_BL[:, 3], tape.codes_BL[:, 2]) and (tape.source_BL[:, 3] == ONE_HOT).all()
    assert (tape.source_BL[:, 4] == UNIFORM).all() and torch.equal(tape.codes_BL[:, 5], tape.codes_BL[:, 4])


def test_the_upper_neighbour_is_repeated_down_its_column():
    tape = tape_of(known=torch.tensor([0, 2, 4, 6, 9]))
    codes = tape.codes_BL.clone()
    fill("repeat_above", tape, 12)
    for row, known in enumerate([0, 2, 4, 6, 9]):
        for position in range(known, 12):
            above = position
            while above >= known:
                above -= WIDTH
            if above >= 0:
                expected, kind = codes[row, above], ONE_HOT
            else:
                expected, kind = uniform_guess(tape, row, position % WIDTH), UNIFORM if position < WIDTH else ONE_HOT
            assert tape.codes_BL[row, position] == expected and tape.source_BL[row, position] == kind, (row, position)


def test_the_law_to_the_left_is_the_last_one_of_the_pass():
    tape = with_laws(tape_of(rows=20_000, known=1, prior=False, labels=False), 1, 3)
    tape.laws = tape.laws.select(torch.zeros(20_000, dtype=torch.int64))
    fill("left_law", tape, 6)
    assert (tape.source_BL[:, 4:6] == 2).all() and tape.codes_BL[:, 4].ne(tape.codes_BL[:, 5]).any()
    frequencies = torch.bincount(tape.codes_BL[:, 5], minlength=V) / 20_000
    assert 0.5 * (frequencies - tape.laws.log_probs()[0, 2].exp()).abs().sum() < 0.03
    start = tape_of(prior=False)
    fill("left_law", start, 2)
    assert (start.source_BL[:, :2] == UNIFORM).all(), "no law yet"


def test_an_unknown_initialiser_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        Initialiser("repeat_letf", WIDTH)
    assert "repeat_left" in caught.value.hint


# -- n-grams ----------------------------------------------------------------------------------------------------------------


def test_what_was_most_frequent_behind_a_run_is_guessed():
    """Runs of three, the start of the sequence included; ties go to the smaller code."""
    sampled = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4], [5, 5, 5, 6], [5, 5, 5, 1]])
    tape = Tape.of(Request(torch.arange(3), 0), 4, V)
    tape.codes_BL[:, :3] = torch.tensor([[0, 1, 2], [5, 5, 5], [6, 6, 6]])
    tape.known_B = tape.drafted_B = torch.full((3,), 3)
    Initialiser("ngram", 2, ngrams=NGrams.count(sampled, V)).fill(tape, torch.full((3,), 4))
    assert tape.codes_BL[:, 3].tolist() == [4, 1, uniform_guess(tape, 2, 3)]
    assert tape.source_BL[:, 3].tolist() == [ONE_HOT, ONE_HOT, UNIFORM], "a run that was never seen is left as it is"


def test_a_run_of_guesses_continues_from_the_guesses_before_it():
    sampled = torch.tensor([[3, 1, 4, 1, 5]]).repeat(4, 1)
    tape = Tape.of(Request(torch.arange(2), 0), 5, V)
    Initialiser("ngram", 5, ngrams=NGrams.count(sampled, V)).fill(tape, torch.tensor([4, 2]))
    assert tape.codes_BL[0, :4].tolist() == [3, 1, 4, 1] and tape.codes_BL[1, :2].tolist() == [3, 1]
    assert tape.source_BL[1, 2:].tolist() == [ONE_HOT] * 3 and tape.codes_BL[1, 2:].eq(0).all(), "untouched behind the stop"


# -- draft models -----------------------------------------------------------------------------------------------------------


def drafted(purpose, known, stop, passes=0, seed=4):
    """Two rows of 2 x 3 codes of 3, drafted up to ``stop`` by a small model."""
    decoder = table_decoder()
    tape = Tape.of(Request(torch.arange(2), seed), 6, 3)
    tape.codes_BL = torch.randint(0, 3, (2, 6), generator=torch.Generator().manual_seed(seed))
    model = DraftModel(decoder, LogitsPipeline(temperature=0.8), purpose)
    model.begin(tape.request)
    if passes:  # what earlier passes have fed
        model.decoder.step(model.state, tape.codes_BL[:, :5])
    tape.known_B = tape.drafted_B = torch.tensor(known)
    tape.passes = passes
    model.fill(tape, torch.tensor(stop))
    return decoder, tape, model


def test_drafts_of_a_model_have_its_filtered_law():
    decoder, tape, model = drafted(Purpose.DRAFT, [2, 3], [5, 5], passes=1)
    expected = LogitsPipeline(temperature=0.8)(decoder.teacher_forced(tape.request, tape.codes_BL))
    for row, known in enumerate([2, 3]):
        for position in range(known, 5):
            index = tape.source_BL[row, position]
            law = tape.laws.log_probs()[row, index]
            torch.testing.assert_close(law, expected[row, position], rtol=1e-5, atol=1e-6, msg=f"row {row}, position {position}")
    assert tape.drafted_B.tolist() == [5, 5] and model.passes == 3, "one pass a draft; the row with fewer follows its known codes"


def test_known_codes_are_never_drafted_over():
    before = torch.randint(0, 3, (2, 6), generator=torch.Generator().manual_seed(4))
    _, tape, _ = drafted(Purpose.DRAFT, [1, 4], [5, 5], passes=1)
    assert torch.equal(tape.codes_BL[1, :4], before[1, :4]) and tape.codes_BL[0, 0] == before[0, 0]


def test_with_the_noise_of_the_plain_sampler_the_drafts_are_its_codes():
    decoder, tape, _ = drafted(Purpose.TOKEN, [0, 0], [5, 5])
    expected = ARGenerator(decoder, LogitsPipeline(temperature=0.8)).generate(tape.request).codes_BL
    assert torch.equal(tape.codes_BL[:, :5], expected[:, :5]) and tape.laws is None and tape.state_bytes == 0


def test_nothing_to_draft_is_nothing_done():
    _, tape, model = drafted(Purpose.DRAFT, [5, 5], [5, 5], passes=1)
    assert model.passes == 0 and tape.laws is None
