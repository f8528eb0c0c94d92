"""Trees of drafts: shapes, where nodes stand and what they see, caches after a pass, and the rules that choose among siblings."""

import pytest
import torch
from tabular_models import table_decoder

from arsp.decode.accept import residual
from arsp.decode.decoder import RasterDecoder
from arsp.decode.drafts import ONE_HOT, UNIFORM, Initialiser, Tape
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.decode.jacobi import JacobiGenerator
from arsp.decode.law import Law
from arsp.decode.trees import (
    DraftTree,
    LanternTree,
    Proactive,
    Sequential,
    TreeShape,
    Walk,
    WithoutReplacement,
    commit,
    feed_tree,
    place,
    siblings,
)
from arsp.metrics.exact import chi_square, disturbed
from arsp.models.llamagen import GPT, GPTConfig
from arsp.protocols import Request
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close

# -- shapes -----------------------------------------------------------------------------------------------------------------


def test_a_branching_tree_is_in_level_order():
    shape = TreeShape.branching([2, 3, 1])
    assert shape.parents == (-1, -1, 0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7) and shape.depth == 3
    assert shape.level(1) == [0, 1] and shape.level(2) == [2, 3, 4, 5, 6, 7] and shape.children(1) == [5, 6, 7]
    assert shape.spine == [0, 2, 8]
    assert shape.child_table[0].tolist() == [1, 2, -1] and shape.child_table[1].tolist() == [3, 4, 5]
    assert shape.child_table[3].tolist() == [9, -1, -1] and shape.child_table[-1].tolist() == [-1, -1, -1]


def test_ancestors_are_the_way_to_the_root():
    for shape in (TreeShape.branching([2, 2]), TreeShape.chains(3, 4), TreeShape.proactive(3, 3, 6)):
        for node, row in enumerate(shape.ancestors.tolist()):
            path, at = {node}, shape.parents[node]
            while at >= 0:
                path.add(at)
                at = shape.parents[at]
            assert {i for i, above in enumerate(row) if above} == path and len(path) == shape.depths[node]


def test_chains_start_at_the_root_and_do_not_touch():
    shape = TreeShape.chains(3, 4)
    assert len(shape.parents) == 12 and shape.depth == 4 and shape.spine == [0, 3, 6, 9]
    assert all(shape.depths[node] == 1 + node // 3 for node in range(12)) and shape.children(5) == [8]


@pytest.mark.parametrize(("width", "levels", "length"), [(3, 3, 16), (2, 2, 2), (4, 3, 3), (2, 1, 5), (3, 4, 3)])
def test_a_proactive_tree_goes_on_as_a_chain_on_its_first_branch(width, levels, length):
    """(K^D - 1) / (K - 1) nodes of the tree, the root among them, then one chain to the length of the window."""
    shape = TreeShape.proactive(width, levels, length)
    inside = (width**levels - 1) // (width - 1) - 1
    assert len(shape.parents) == inside + length - (levels - 1) and shape.depth == length == len(shape.spine)
    assert all(len(shape.level(depth)) == (width**depth if depth < levels else 1) for depth in range(1, length + 1))


def test_nodes_stand_behind_the_known_codes_of_their_row():
    shape, tape = TreeShape.branching([2, 1]), Tape.of(Request(torch.arange(2), 0), 6, 5)
    tape.known_B = torch.tensor([1, 4])
    nodes = place(shape, tape, range(4))
    assert nodes.slots_Bn.tolist() == [[1, 2, 3, 4], [4, 5, 6, 7]]
    assert nodes.positions_Bn.tolist() == [[1, 1, 2, 2], [4, 4, 5, 5]]
    assert [[i for i, seen in enumerate(row) if seen] for row in nodes.visible_BnT[0].tolist()] == [[0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]
    assert [i for i, seen in enumerate(nodes.visible_BnT[1, 3].tolist()) if seen] == [0, 1, 2, 3, 5, 7]


def test_nodes_behind_the_end_stand_at_the_last_position():
    tape = Tape.of(Request(torch.arange(1), 0), 4, 5)
    tape.known_B = torch.tensor([3])
    assert place(TreeShape.branching([1, 1, 1]), tape, range(3)).positions_Bn.tolist() == [[3, 3, 3]]


# -- caches -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=40, block_size=16, num_classes=5, multiple_of=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def text_model():
    torch.manual_seed(1)
    config = GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=40, block_size=16, model_type="t2i", cls_token_num=6, caption_dim=12,
                       multiple_of=16)  # fmt: skip
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


CLASSES = Request(torch.arange(3), 5, labels_B=torch.tensor([0, 3, 1]))
CAPTIONS = Request(
    torch.arange(3), 5, captions_BPE=torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(2)),
    caption_mask_BP=torch.arange(6) >= torch.tensor([[0], [4], [2]]),
)  # fmt: skip


def following(decoder, request, row, codes):
    """Logits of what follows these codes of a row, fed one behind another to a state of its own."""
    one = request.rows(slice(row, row + 1))
    return decoder.step(decoder.start(one), torch.tensor([codes]) if codes else None)[0, -1]


def check_tree(decoder, request, tape, shape, codes, logits, what):
    for row in range(len(tape)):
        known = tape.codes_BL[row, : tape.known_B[row]].tolist()
        assert_close(logits[row, 0], following(decoder, request, row, known), abs_tol=1e-5, what=f"{what}, row {row}, root")
        for node in range(len(shape.parents)):
            path = codes[row][shape.ancestors[node]].tolist()
            if len(known) + len(path) < tape.length:
                expected = following(decoder, request, row, known + path)
                assert_close(logits[row, 1 + node], expected, abs_tol=1e-5, what=f"{what}, row {row}, node {node}")


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), Guidance(2.0, 3)], ids=["off", "guided", "interval"])
@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("shape", [TreeShape.branching([2, 2, 1]), TreeShape.chains(3, 3), TreeShape.proactive(2, 3, 5)],
                         ids=["branching", "chains", "proactive"])  # fmt: skip
def test_a_tree_in_one_pass_gives_the_logits_of_plain_steps(gpt, guidance, condition, shape):
    """The first pass with the condition, then passes of rows that kept paths of different lengths: 1e-5, both guidance halves."""
    decoder = RasterDecoder(gpt if condition == "class" else text_model(), guidance)
    request = CLASSES if condition == "class" else CAPTIONS
    generator = torch.Generator().manual_seed(7)
    tape = Tape.of(request, 16, 40, spare=shape.depth)
    state = decoder.start(request, 15 + len(shape.parents))
    number = 0
    while int(tape.known_B.max()) < 10:
        codes = torch.randint(0, 40, (3, len(shape.parents)), generator=generator)
        logits = feed_tree(decoder, state, tape, shape, codes)
        check_tree(decoder, request, tape, shape, codes, logits, f"pass {number}")
        leaves = torch.tensor([len(shape.parents) - 1, shape.spine[-1], shape.level(2)[-1]]).roll(number).tolist()
        count = torch.tensor([shape.depths[leaves[0]], number % 2, shape.depths[leaves[2]]])
        paths = torch.full((3, shape.depth), -1)
        for row, leaf in enumerate(leaves):
            paths[row, : count[row]] = shape.ancestors[leaf].nonzero().flatten()[: count[row]]
        before, final = tape.known_B.clone(), torch.randint(0, 40, (3,), generator=generator)
        commit([(decoder, state)], tape, shape, codes, Walk(paths, count, final))
        assert torch.equal(tape.known_B, before + count + 1) and torch.equal(state.lengths_B, before + count)
        for row in range(3):
            kept = codes[row, paths[row, : count[row]]].tolist()
            assert tape.codes_BL[row, before[row] : tape.known_B[row]].tolist() == [*kept, final[row]]
        number += 1
    logits = decoder.step(state, tape.codes_BL.gather(1, tape.known_B[:, None] - 1))
    for row in range(3):
        expected = following(decoder, request, row, tape.codes_BL[row, : tape.known_B[row]].tolist())
        assert_close(logits[row, 0], expected, abs_tol=1e-5, what=f"a plain step, row {row}")


def test_rows_of_a_tree_state_can_be_selected(gpt):
    decoder, shape = RasterDecoder(gpt, Guidance(2.0)), TreeShape.branching([2, 1])
    tape, state = Tape.of(CLASSES, 16, 40, spare=2), decoder.start(CLASSES, 15 + 4)
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    feed_tree(decoder, state, tape, shape, codes)
    paths = torch.tensor([[1, 3], [0, 2], [0, -1]])
    commit([(decoder, state)], tape, shape, codes, Walk(paths, torch.tensor([2, 2, 1]), torch.tensor([20, 21, 22])))
    rows = torch.tensor([2, 0])
    part, kept, request = tape.select(rows), decoder.select(state, rows), CLASSES.rows(rows)
    logits = feed_tree(decoder, kept, part, shape, codes[:2])
    check_tree(decoder, request, part, shape, codes[:2], logits, "selected")


# -- siblings ---------------------------------------------------------------------------------------------------------------


def random_law(codes, seed, zeros=0):
    p = torch.softmax(1.2 * torch.randn(codes, generator=torch.Generator().manual_seed(seed)), -1)
    p[:zeros] = 0
    return p / p.sum()


def drawn(q, num, how, rows, seed=0):
    ids = torch.arange(rows)
    return siblings(q.log().expand(rows, -1), num, seed, ids, torch.zeros_like(ids), 3, how)


def test_siblings_without_replacement_differ_and_the_first_follows_the_law():
    """20 000 rows of 5 codes, chi-square p > 1e-4 for the first and, given the first, for the second; the seed is fixed."""
    q = random_law(5, 1)
    codes = drawn(q, 3, "without", 20_000)
    assert all((codes[:, a] != codes[:, b]).all() for a, b in ((0, 1), (0, 2), (1, 2)))
    assert chi_square(torch.bincount(codes[:, 0], minlength=5), q.double())[2] > 1e-4
    after = codes[codes[:, 0] == 2, 1]
    rest = q.clone()
    rest[2] = 0
    assert chi_square(torch.bincount(after, minlength=5), rest.double())[2] > 1e-4


def test_where_the_law_runs_out_of_codes_there_are_fewer_siblings():
    q = torch.tensor([0.0, 0.5, 0.0, 0.5])
    codes = drawn(q, 3, "without", 50)
    assert (codes[:, :2].sort(1).values == torch.tensor([1, 3])).all() and (codes[:, 2] == -1).all()
    assert (drawn(q, 6, "without", 5)[:, 2:] == -1).all(), "more than there are codes"


def test_independent_siblings_repeat_and_the_best_are_no_draws():
    q = random_law(4, 2)
    codes = drawn(q, 2, "independent", 20_000)
    pairs = torch.bincount(4 * codes[:, 0] + codes[:, 1], minlength=16)
    assert chi_square(pairs, (q[:, None] * q).flatten().double())[2] > 1e-4
    assert (drawn(q, 3, "top", 4) == q.topk(3).indices).all()


# -- rules ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize(("rule", "how"), [(WithoutReplacement(), "without"), (Sequential(), "independent")], ids=["without", "sequential"])
@pytest.mark.parametrize("zeros", [(0, 0), (2, 0), (0, 2), (3, 2)], ids=str)
def test_a_group_of_siblings_gives_the_target_law(rule, how, num, zeros):
    """40 000 groups of 5 codes, chi-square p > 1e-4 (32 cases: false alarm 0.3 %, the seed is fixed); codes missing in p, q or both."""
    rows, p, q = 40_000, random_law(5, 3, zeros[0]), random_law(5, 4, zeros[1]).flip(0)
    codes = drawn(q, num, how, rows, seed=num)
    uniform = torch.rand(rows, num, generator=torch.Generator().manual_seed(5))
    chosen, rest = rule.choose(p.expand(rows, -1), q.expand(rows, -1), codes.clamp_min(0), codes >= 0, uniform)
    other = torch.multinomial(rest, 1, generator=torch.Generator().manual_seed(6)).squeeze(1)
    out = torch.where(chosen >= 0, codes.gather(1, chosen.clamp_min(0)[:, None]).squeeze(1), other)
    assert torch.allclose(rest.sum(1), torch.ones(rows), atol=1e-5)
    assert chi_square(torch.bincount(out, minlength=5), p.double())[2] > 1e-4, torch.bincount(out, minlength=5) / rows - p


@pytest.mark.parametrize("rule", [WithoutReplacement(), Sequential()], ids=["without", "sequential"])
def test_siblings_from_the_target_itself_stand_at_once(rule):
    p = random_law(6, 7)
    codes = drawn(p, 3, rule.siblings, 500)
    uniform = torch.rand(500, 3, generator=torch.Generator().manual_seed(8)).clamp(max=1 - 1e-4)
    chosen, _ = rule.choose(p.expand(500, -1), p.expand(500, -1), codes, codes >= 0, uniform)
    assert (chosen == 0).all()


def test_a_group_without_valid_siblings_leaves_the_law_as_it_is():
    p, q, codes = random_law(6, 7).expand(4, -1), random_law(6, 8).expand(4, -1), torch.zeros(4, 2, dtype=torch.int64)
    none = torch.zeros(4, 2, dtype=torch.bool)
    for rule in (WithoutReplacement(), Sequential(), LanternTree(torch.zeros(6, 2, dtype=torch.int64), 0.1, 1)):
        chosen, rest = rule.choose(p, q, codes, none, torch.zeros(4, 2))
        assert (chosen == -1).all()
        torch.testing.assert_close(rest, p)


def test_rho_balances_the_two_sides_and_is_one_for_one_sibling():
    """1 - (1 - b)^k = rho b with b = sum min(p / rho, q), to 1e-9."""
    p = torch.stack([random_law(9, seed) for seed in range(30)])
    q = torch.stack([random_law(9, 100 + seed) for seed in range(30)])
    for num in (1, 2, 4, 16):
        k = torch.full((30, 1), num, dtype=torch.float64)
        rho = Sequential.rho(p, q, k)
        beta = torch.minimum(p.double() / rho, q.double()).sum(1, keepdim=True)
        worst = (1 - (1 - beta) ** k - rho * beta).abs().max().item()
        assert worst < 1e-9 and (rho >= 1).all() and (rho <= num).all(), f"k {num}: {worst}"
        assert num > 1 or (rho == 1).all()


def test_more_siblings_are_accepted_more_often():
    p, q, rows = random_law(8, 20), random_law(8, 21), 20_000
    for rule in (WithoutReplacement(), Sequential()):
        shares = []
        for num in (1, 2, 4):
            codes = drawn(q, num, rule.siblings, rows)
            uniform = torch.rand(rows, num, generator=torch.Generator().manual_seed(9))
            chosen, _ = rule.choose(p.expand(rows, -1), q.expand(rows, -1), codes, codes >= 0, uniform)
            shares.append((chosen >= 0).float().mean().item())
        assert shares[0] == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.015), "one sibling: 1 - TV(p, q)"
        assert shares[0] < shares[1] < shares[2], shares


# -- LANTERN's trees, recorded ----------------------------------------------------------------------------------------------

LANTERN = [
    pytest.param(case, *numbers, id=f"{case}-{'.'.join(map(str, numbers))}")
    for case in find_cases(kind="lantern")
    for numbers in sorted({tuple(map(int, key.split(".")[1:3])) for key in case.io if key.startswith("tree.")})
]


@pytest.mark.golden
@pytest.mark.parametrize(("case", "delta", "number"), LANTERN)
def test_a_recorded_tree_is_walked_as_recorded(case, delta, number):
    """Level by level through ``choose``: path and accepted drafts exact, the law of the next code to 1e-5. Uniforms are consumed in order,
    one for each new candidate that is tried."""
    tree = {name: case.io[f"tree.{delta}.{number}.{name}"] for name in ("logits", "candidates", "uniforms", "out", "sample_p")}
    lenders, candidates = case.config["k"], tree["candidates"]
    rule = LanternTree(case.io["nearest"][:, : lenders + 1], case.config["deltas"][delta], lenders)
    alive, best, accepted, used, law = torch.ones(len(candidates), dtype=torch.bool), 0, 0, 0, None
    for level in range(1, candidates.shape[1]):
        codes = candidates[:, level]
        valid = alive & (codes >= 0)
        if not valid.any():
            break
        p = torch.softmax(tree["logits"][best, level - 1], -1)
        new = torch.tensor([bool(valid[i]) and codes[i] not in codes[:i][valid[:i]] for i in range(len(codes))])
        uniform = torch.full(codes.shape, torch.nan).masked_scatter(new, tree["uniforms"][used : used + int(new.sum())])
        chosen, rest = rule.choose(p[None], torch.zeros_like(p)[None], codes.clamp_min(0)[None], valid[None], uniform[None])
        if chosen < 0:
            law = rest[0]
            break
        used, best, accepted = used + int(new[: int(chosen) + 1].sum()), int(chosen), level
        alive = alive & (codes == codes[best])
    law = torch.softmax(tree["logits"][best, accepted], -1) if law is None else law
    assert [best, accepted] == tree["out"].tolist()
    worst = (law - tree["sample_p"]).abs().max().item()
    assert worst < 1e-5, f"law of the next code: {worst:.1e}"


def test_a_repeated_sibling_is_tried_once():
    """And one that is not there repeats nothing."""
    p, near = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[1], [2], [0]])
    rule = LanternTree(near, 0.01, 1)
    codes, uniform = torch.tensor([[0, 0, 1]]), torch.tensor([[0.9, 0.0, 0.9]])
    chosen, rest = rule.choose(p, p, codes, torch.tensor([[True, True, True]]), uniform)
    assert chosen == -1 and rest[0].tolist() == [0.0, 0.0, 1.0], "0, then 1, are taken away; 0 a second time is skipped"
    chosen, _ = rule.choose(p, p, codes, torch.tensor([[False, True, True]]), uniform)
    assert chosen == 1


def test_where_everything_is_taken_away_every_code_is_as_likely():
    rule = LanternTree(torch.tensor([[1], [0]]), 1.0, 1)
    chosen, rest = rule.choose(
        torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([[1.1]])
    )
    assert chosen == -1 and rest[0].tolist() == [0.5, 0.5]


# -- SJD-PAC ----------------------------------------------------------------------------------------------------------------


def test_siblings_come_from_the_recorded_law_without_the_draft():
    """First guesses: without replacement from the uniform law. Later ones: never the draft itself, and in proportion to q."""
    num, method = 20_000, Proactive(LogitsPipeline(), 3, Initialiser("random_uniform", 3), width=3, levels=2)
    tape = method.begin(Request(torch.arange(num), 0), 6, 5)
    every = torch.arange(num)
    first = method._draw(tape, every)
    assert (first[:, :3].sort(1).values.diff(dim=1) > 0).all() and (tape.source_BL[:, :3] == UNIFORM).all()
    assert torch.equal(first[:, method.shape.spine], tape.codes_BL[:, :3])
    q = random_law(5, 30)
    tape.laws, tape.passes = Law.of_weights(q.log().expand(num, 3, 5)), 1
    tape.source_BL[:, :3] = torch.arange(3)
    codes = method._draw(tape, every)
    for draft in range(5):
        rows = codes[:, 0] == draft
        rest = q.clone()
        rest[draft] = 0
        assert chi_square(torch.bincount(codes[rows, 1], minlength=5), rest.double())[2] > 1e-4, draft


def test_a_certain_draft_has_no_siblings():
    method = Proactive(LogitsPipeline(), 2, Initialiser("random_onehot", 3), width=3, levels=2)
    tape = method.begin(Request(torch.arange(9), 0), 6, 5)
    codes = method._draw(tape, torch.arange(9))
    assert (tape.source_BL[:, :2] == ONE_HOT).all() and (codes[:, 1:3] == -1).all()


def test_the_tree_finds_more_than_the_chain():
    """Codes a pass of 2000 sequences: a tree of the same drafts accepts at least as many."""
    decoder, codes = table_decoder(), {}
    for width in (1, 3):
        method = Proactive(LogitsPipeline(), 4, Initialiser("random_uniform", 3), width=max(2, width), levels=1 if width == 1 else 3)
        generator = JacobiGenerator(decoder, method, 4)
        generator.generate(Request(torch.arange(2000), 0))
        codes[width] = generator.statistics.report((2, 3))["tokens_per_pass"]
    assert codes[3] > 1.1 * codes[1], codes


def test_both_models_hold_the_codes_of_the_accepted_path():
    """After a pass of a draft tree, the next law of both models is that of the known codes."""
    decoder, request = table_decoder(), Request(torch.arange(300), 0)
    small = disturbed(decoder)
    method = DraftTree(LogitsPipeline(), small, TreeShape.branching([2, 2]), WithoutReplacement())
    tape = method.begin(request, 6, 3)
    state = decoder.start(request, 5 + method.slots)
    method.advance(decoder, state, tape, 0)
    assert len(tape.known_B.unique()) == 3, "rows are ragged"
    for model, own in ((decoder, state), (small, method.state)):
        assert torch.equal(own.lengths_B, tape.known_B - 1)
        logits = model.step(own, tape.codes_BL.gather(1, tape.known_B[:, None] - 1))[:, 0]
        expected = model.teacher_forced(request, tape.codes_BL[:, :6])[torch.arange(300), tape.known_B]
        assert torch.equal(logits, expected)


def test_residuals_of_groups_are_those_of_single_drafts():
    """One sibling: the rule is the ordinary one."""
    p, q = random_law(7, 40)[None], random_law(7, 41)[None]
    for rule in (WithoutReplacement(), Sequential()):
        chosen, rest = rule.choose(p, q, torch.tensor([[3]]), torch.tensor([[True]]), torch.tensor([[1.0 - 1e-6]]))
        if p[0, 3] < q[0, 3]:
            assert chosen == -1
        torch.testing.assert_close(rest if chosen < 0 else residual(p, q), residual(p, q), rtol=1e-4, atol=1e-6)
