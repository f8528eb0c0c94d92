"""The VAR student: what each position may see, how data and noise are told apart, and where it starts from."""

from __future__ import annotations

import pytest
import tiny_var
import torch

from arsp.errors import ConfigError
from arsp.models.attention import AttentionContext, DensePolicy
from arsp.models.var import VARConfig
from arsp.models.var_student import VARStudent
from arsp.testing.tolerance import assert_close

L, E, ENDS = 21, 4, (0, 1, 5, 21)
SCALE = [0, *[1] * 4, *[2] * 16]


@pytest.fixture(scope="module")
def student():
    return tiny_var.student_model()


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def run(student, x, known=0, labels=None):
    known = torch.full((len(x),), known) if isinstance(known, int) else torch.tensor(known)
    return student(torch.zeros(len(x), dtype=torch.int64) if labels is None else labels, x, known)


@torch.no_grad()
@pytest.mark.parametrize("known", [0, 1, 5])
def test_a_position_sees_lower_scales_and_itself_only(student, known):
    """Row i of the batch differs from the base in position i alone."""
    base = torch.randn(L, E, generator=draw())
    moved = base.expand(L, L, E).clone()
    moved[torch.arange(L), torch.arange(L)] += 1.0
    for name, out in zip(("logits", "vectors"), run(student, torch.cat((base[None], moved)), known), strict=True):
        differs = (out[1:] != out[:1]).any(-1)  # [what was moved, where it shows]
        for source in range(L):
            for target in range(L):
                expected = SCALE[source] < SCALE[target] or source == target
                assert bool(differs[source, target]) == expected, f"{name} at {target} and the token at {source}, {known} known"


@torch.no_grad()
def test_the_class_shows_everywhere(student):
    x = torch.randn(1, L, E, generator=draw()).expand(2, L, E)
    logits, vectors = run(student, x, labels=torch.tensor([0, 1]))
    assert (logits[0] != logits[1]).any(-1).all() and (vectors[0] != vectors[1]).any(-1).all()


@torch.no_grad()
def test_the_mark_of_data_and_noise_shows_from_its_scale_on(student):
    x = torch.randn(3, L, E, generator=draw())[:1].expand(3, L, E)
    logits, _ = run(student, x, [0, 1, 5])
    for row, known in ((1, 1), (2, 5)):
        changed = (logits[row] != logits[0]).any(-1)
        assert changed[:known].all(), "the mark of a known position does not reach its own output"
        assert changed[known:].all(), "later scales do not see that earlier codes are final"


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5])
def test_the_leading_scales_alone_give_the_same_outputs(student, length):
    x = torch.randn(4, L, E, generator=draw())
    for short, whole in zip(run(student, x[:, :length], 1), run(student, x, 1), strict=True):
        assert_close(short, whole[:, :length], abs_tol=1e-5, what=f"outputs of the first {length} positions")


@torch.no_grad()
def test_outputs_are_float32_whatever_the_weights(student):
    low = VARStudent(tiny_var.CONFIG, E)
    low.load_state_dict(student.state_dict())
    logits, vectors = run(low.eval().to(torch.bfloat16), torch.randn(2, L, E, generator=draw()).bfloat16())
    assert logits.dtype == vectors.dtype == torch.float32


def test_masked_attention_has_the_same_result_with_gradients():
    """With gradients on the CPU it runs in float32."""
    q, k, v = (torch.randn(1, 2, 6, 8, generator=draw(i)).bfloat16() for i in range(3))
    ctx = AttentionContext(total=6, mask=torch.ones(6, 6, dtype=torch.bool).tril()[None, None], scale=0.5)
    without = DensePolicy().attend(q, k, v, 0, ctx)
    trained = DensePolicy().attend(q.requires_grad_(), k, v, 0, ctx)
    assert trained.dtype == torch.bfloat16
    assert_close(trained.float(), without.float(), abs_tol=2e-2, what="attention")


def test_a_codebook_of_another_width_is_refused():
    with pytest.raises(ConfigError, match="widths must be equal"):
        VARStudent(tiny_var.CONFIG, 5)


def test_stochastic_depth_of_the_teacher_is_not_taken_over():
    config = VARConfig.from_dict({**tiny_var.plain(tiny_var.CONFIG), "drop_path_rate": 0.9})
    student = VARStudent(config, E).train()
    student.init_weights(draw())
    x = torch.randn(2, L, E, generator=draw())
    assert torch.equal(run(student, x)[1], run(student, x)[1])


# -- the start --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    teacher, student = tiny_var.var_model(), VARStudent(tiny_var.CONFIG, E).eval()
    student.init_from_teacher(teacher, tiny_var.tokenizer_model().codebook_VE, draw())
    return teacher, student


def test_all_weights_of_the_teacher_are_copied_the_class_table_whole(pair):
    given, own = (module.state_dict() for module in pair)
    shifted = {"lvl_embed.weight", "pos_1LC"}
    different = [name for name in given.keys() - shifted if not torch.equal(own[name], given[name])]
    assert not different, different
    new = {name.split(".")[0] for name in own.keys() - given.keys()}
    assert new == {"n_d_embed", "layerwise_n_d_embed", "final_layer_conti"}


def test_level_and_position_tables_get_one_row_in_front(pair):
    (level, position), (own_level, own_position) = ((m.lvl_embed.weight, m.pos_1LC[0]) for m in pair)
    for table, own in ((level, own_level), (position, own_position)):
        assert torch.equal(own[1:], table) and torch.equal(own[0], table[0])


@torch.no_grad()
def test_data_and_noise_start_alike_in_the_blocks(pair):
    _, student = pair
    assert all(not layer.weight.any() and not layer.bias.any() for layer in student.layerwise_n_d_embed)
    assert 0 < student.n_d_embed.weight.std() < 0.04


@torch.no_grad()
def test_the_class_position_starts_as_the_teachers_first_scale(pair):
    """Only position 0 is left of the sequence: the class alone, as in the teacher's first scale."""
    teacher, student = pair
    student.n_d_embed.weight.zero_()
    hidden = []
    hook = student.blocks[-1].register_forward_hook(lambda module, args, out: hidden.append(out))
    run(student, torch.randn(1, L, E, generator=draw()))
    hook.remove()
    cond = teacher.conditioning(torch.tensor([0]))
    ctx = AttentionContext(total=1, scale=teacher.config.attention_scale)
    expected = teacher.backbone(teacher.embed(torch.zeros(1, 0, E), cond.class_RC, 0, 0), cond, ctx)
    assert_close(hidden[0][:, :1], expected, abs_tol=1e-5, what="hidden state of the class position")


def test_without_a_teacher_every_weight_is_drawn_from_the_generator():
    first, second = VARStudent(tiny_var.CONFIG, E), VARStudent(tiny_var.CONFIG, E)
    for student in (first, second):
        student.init_weights(draw())
    same = [name for name, value in first.state_dict().items() if not torch.equal(value, second.state_dict()[name])]
    assert not same, f"not decided by the generator: {same}"
