"""The objective of DD1: what the student is shown and asked, what is reported about it, and where it starts from."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arsp.decode.few_step import nearest_codes, request_noise
from arsp.distill.dd1 import DD1Config, DD1Task, trajectory_point
from arsp.distill.trajectories import Trajectories
from arsp.models.llamagen import GPT, GPTConfig
from arsp.models.student import LlamaGenStudent
from arsp.protocols import Request
from arsp.testing.tolerance import assert_close, assert_same
from arsp.train.loop import OptimConfig, fit

L, V, E, CLASSES = 9, 7, 4, 3
BOOK = torch.randn(V, E, generator=torch.Generator().manual_seed(5))
CONFIG = GPTConfig(
    dim=32, n_layer=2, n_head=2, vocab_size=V, block_size=L, num_classes=CLASSES, multiple_of=16,
    token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0,
)  # fmt: skip


class Constant(nn.Module):
    """Student stub: the same logits and vectors for every row; what it was shown is kept."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.logits, self.vectors = (nn.Parameter(torch.randn(L, width, generator=generator)) for width in (V, E))
        self.shown = []

    def forward(self, labels_B, x_BLE, known_B):
        self.shown.append((labels_B, x_BLE, known_B))
        return self.logits.expand(len(labels_B), -1, -1), self.vectors.expand(len(labels_B), -1, -1)


class NearestCode(nn.Module):
    """Solves :func:`nearest_code_set`, whose codes are the codebook rows nearest to the noise."""

    def forward(self, labels_B, x_BLE, known_B):
        return -100 * torch.cdist(x_BLE, BOOK.expand(len(x_BLE), -1, -1)), BOOK[nearest_codes(x_BLE, BOOK)]


def nearest_code_set(n):
    ids = torch.arange(n)
    codes = nearest_codes(request_noise(Request(ids, 3), L, E), BOOK)
    return Trajectories(codes.to(torch.int16), (ids % CLASSES).to(torch.int16), ids, 3, E)


def task_of(student, config=None, n=40):
    return DD1Task(student, BOOK, config or DD1Config(known=(0,)), nearest_code_set(n), nearest_code_set(n))


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the input --------------------------------------------------------------------------------------------------------------


def test_a_trajectory_point_holds_known_codes_and_the_original_noise_behind():
    codes, noise = torch.randint(V, (4, L), generator=draw()), torch.randn(4, L, E, generator=draw(1))
    known = torch.tensor([0, 3, L - 1, L])
    point = trajectory_point(codes, noise, known, BOOK)
    for row, count in enumerate(known.tolist()):
        assert torch.equal(point[row, :count], BOOK[codes[row, :count]]), f"row with {count} known codes"
        assert torch.equal(point[row, count:], noise[row, count:]), f"row with {count} known codes"


def test_a_batch_mixes_the_trained_counts_and_pairs_noise_with_its_own_codes():
    student = Constant()
    task_of(student, DD1Config(known=(0, 4))).loss(0, 256, draw())
    labels, x, known = student.shown[0]
    assert 90 < int((known == 0).sum()) < 166 and set(known.tolist()) == {0, 4}, "two counts, equally likely (5 standard deviations)"
    assert set(labels.tolist()) == set(range(CLASSES))
    again = nearest_codes(x, BOOK)  # of noise and of codebook vectors alike: the codes of the trajectory
    everything = {tuple(row) for row in nearest_code_set(40).tokens_NL.tolist()}
    assert all(tuple(row) in everything for row in again.tolist()), "noise and codes of different samples were paired"


def test_the_same_generator_gives_the_same_batch():
    task = task_of(Constant())
    assert torch.equal(task.loss(0, 16, draw(4))["loss"], task.loss(9, 16, draw(4))["loss"])


def test_short_updates_train_the_first_codes_only():
    class Shown(Constant):
        def forward(self, labels_B, x_BLE, known_B):
            logits, vectors = super().forward(labels_B, x_BLE, known_B)
            return logits[:, : x_BLE.shape[1]], vectors[:, : x_BLE.shape[1]]

    student = Shown()
    task, lengths = task_of(student, DD1Config(known=(0, 4), short=0.5, short_codes=6)), []
    for seed in range(60):
        task.loss(seed, 8, draw(seed))
        lengths.append(student.shown[-1][1].shape[1])
    assert set(lengths) == {6, L} and 10 < lengths.count(6) < 50, "half of 60 (5 standard deviations)"
    task.loss(0, 8, draw(lengths.index(6)))["loss"].backward()
    size = student.logits.grad.abs().sum(-1)
    assert (size[:6] > 0).any() and not size[6:].any()


def test_short_updates_read_the_short_trajectories_too():
    class Shown(Constant):
        def forward(self, labels_B, x_BLE, known_B):
            logits, vectors = super().forward(labels_B, x_BLE, known_B)
            return logits[:, :6], vectors[:, :6]

    short = nearest_code_set(40).first_codes(6)
    short.labels_N = torch.full_like(short.labels_N, 9)  # a label that no whole trajectory has
    student, config = Shown(), DD1Config(known=(0, 4), short=1.0, short_codes=6)
    DD1Task(student, BOOK, config, nearest_code_set(40), nearest_code_set(4), short).loss(0, 256, draw())
    share = (student.shown[-1][0] == 9).float().mean()
    assert 0.3 < share < 0.7, f"half of 256 rows (6 standard deviations), found {share:.2f}"


# -- the loss ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [0, 4, 8])
def test_positions_that_are_known_do_not_enter_the_loss(known):
    student = Constant()
    task_of(student, DD1Config(known=(known,))).loss(0, 64, draw())["loss"].backward()
    for name, gradient in (("logits", student.logits.grad), ("vectors", student.vectors.grad)):
        size = gradient.abs().sum(-1)
        assert (size[:known] == 0).all() and (size[known:] > 0).all(), f"{name}: gradient by position {size.tolist()}"


def test_the_loss_is_the_stated_sum_over_unknown_positions():
    student, config = Constant(), DD1Config(known=(2,), ce=0.7, vec=3.0)
    task = task_of(student, config)
    losses = task.loss(0, 64, draw())
    codes = nearest_codes(student.shown[0][1], BOOK)[:, 2:]
    log_p = F.log_softmax(student.logits, -1)[2:].expand(64, -1, -1)
    ce = -log_p.gather(-1, codes.unsqueeze(-1)).mean()
    vec = ((student.vectors[2:] - BOOK[codes]) ** 2).sum(-1).mean() / E
    for name, expected in (("ce", ce), ("vec", vec), ("loss", 0.7 * ce + 3.0 * vec)):
        assert math.isclose(losses[name].item(), expected.item(), rel_tol=1e-5), (name, losses[name].item(), expected.item())


# -- the report -------------------------------------------------------------------------------------------------------------


def test_a_student_that_uses_its_noise_is_right_and_lost_when_the_noise_is_shuffled():
    figures = task_of(NearestCode(), DD1Config(known=(0, 4))).evaluate(NearestCode())
    assert figures["heldout_accuracy"] == figures["heldout_accuracy_t4"] == 1.0, figures
    assert figures["heldout_ce"] < 0.1 and figures["heldout_ce_t4"] < 0.1, figures
    assert figures["heldout_ce_shuffled_noise"] > 20 * figures["heldout_ce"], figures


def test_a_student_without_noise_is_not_hurt_by_shuffling():
    figures = task_of(Constant()).evaluate(Constant())
    assert math.isclose(figures["heldout_ce_shuffled_noise"], figures["heldout_ce"], rel_tol=1e-6), figures


def test_held_out_figures_are_means_over_samples_and_positions():
    """1100 samples: several batches of unequal size."""
    student, held_out = Constant(), nearest_code_set(1100)
    task = DD1Task(student, BOOK, DD1Config(known=(0, 4)), nearest_code_set(8), held_out)
    codes, log_p = held_out.tokens_NL.long(), F.log_softmax(student.logits, -1).expand(1100, -1, -1)
    nats, hits = -log_p.gather(-1, codes.unsqueeze(-1))[..., 0], (student.logits.argmax(-1) == codes).float()
    figures = task.evaluate(student)
    for suffix, first in (("", 0), ("_t4", 4)):
        for name, expected in (("ce", nats[:, first:].mean()), ("accuracy", hits[:, first:].mean())):
            found = figures[f"heldout_{name}{suffix}"]
            assert math.isclose(found, expected.item(), rel_tol=1e-4), (name + suffix, found, expected.item())
    assert_close(torch.tensor(task.accuracy_by_position(student)), hits.mean(0), abs_tol=1e-5, what="accuracy by position")


def test_a_probe_adds_figures_of_the_module_it_is_given():
    task = task_of(Constant())
    task.probe = lambda module: {"probe": module.logits.sum().item()}
    other = Constant()
    other.logits.data.fill_(1.0)
    assert task.evaluate(other)["probe"] == L * V


# -- the start and the end --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if name.startswith(("tok_embeddings", "cls_embedding")):
            nn.init.normal_(parameter, std=1.0)
    return model


def copied(teacher, book):
    student = LlamaGenStudent(CONFIG, book.shape[1]).eval()
    student.init_from_teacher(teacher, book, draw())
    return student


def test_all_shared_weights_come_from_the_teacher(teacher):
    weights, own = teacher.state_dict(), copied(teacher, BOOK).state_dict()
    shared = [name for name in weights if not name.startswith("tok_embeddings")]
    different = [name for name in shared if not torch.equal(own[name], weights[name])]
    assert not different, different
    new = {"tok_embeddings.weight", "tok_embeddings.bias", "n_d_embed.weight", "final_layer_conti.scale_shift_table"}
    assert own.keys() - set(shared) == new | {"final_layer_conti.linear.weight", "final_layer_conti.linear.bias"}
    assert own["n_d_embed.weight"].std() < 0.04 and own["final_layer_conti.linear.bias"].abs().max() == 0


def test_the_teacher_is_not_changed_by_training_the_copy(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = copied(teacher, BOOK)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    changed = [name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])]
    assert not changed, f"shared storage: {changed}"


@torch.no_grad()
def test_with_all_codes_known_the_student_starts_as_the_teacher(teacher):
    """A codebook as wide as the vocabulary can be mapped onto any embedding table: the student then predicts what follows."""
    book, codes = torch.eye(V), torch.randint(V, (20, L), generator=draw(2))
    labels = torch.arange(20) % CLASSES
    student = copied(teacher, book)
    assert_close(student.tok_embeddings(book), teacher.tok_embeddings.weight, abs_tol=0.1, what="embeddings of the codes")
    logits, _ = student(labels, book[codes], torch.full((20,), L))
    expected = teacher(codes, labels)[:, 1:]  # after code i the teacher speaks about code i + 1
    error = float((logits - expected).square().mean().sqrt() / expected.std())
    assert error < 0.1, f"relative difference of the logits {error:.3f}"


@torch.no_grad()
def test_a_narrow_codebook_gets_the_least_squares_fit(teacher):
    student = copied(teacher, BOOK)
    features = torch.cat((BOOK, torch.ones(V, 1)), 1).double()
    table = teacher.tok_embeddings.weight.double()
    best = (features @ torch.linalg.lstsq(features, table).solution - table).square().mean()
    found = (student.tok_embeddings(BOOK).double() - table).square().mean()
    assert best <= found < 1.02 * best, f"mean squared error {found:.4f}, least squares {best:.4f}"


def test_without_a_teacher_every_weight_is_drawn_from_the_generator():
    first, second, other = (LlamaGenStudent(CONFIG, E) for _ in range(3))
    for student, seed in ((first, 0), (second, 0), (other, 1)):
        student.init_weights(draw(seed))
    same = [name for name, value in first.state_dict().items() if not torch.equal(value, second.state_dict()[name])]
    assert not same, f"not decided by the generator: {same}"
    assert not torch.equal(first.n_d_embed.weight, other.n_d_embed.weight)
    logits, _ = first(torch.tensor([0, 1]), torch.zeros(2, L, E), torch.tensor([0, 3]))
    assert logits.abs().max() == 0, "the first prediction is uniform"


def test_the_exported_weights_are_the_moving_average_of_all_updates(tmp_path):
    student, decay = Constant(), 0.6
    average, raw = {k: v.detach().clone() for k, v in student.state_dict().items()}, []

    def follow(num):
        step = len(raw)
        raw.append({k: v.detach().clone() for k, v in student.state_dict().items()})
        keep = min(decay, (step + 1) / (step + 10))
        for name in average:
            average[name] = keep * average[name] + (1 - keep) * raw[-1][name]

    config = OptimConfig(steps=30, batch_size=16, lr=0.05, warmup=1, ema=decay, autocast="off", eval_every=100, checkpoint_every=100)
    fit(task_of(student), config, tmp_path, progress=follow)
    assert len(raw) == 30
    for name, value in student.state_dict().items():
        assert_close(value, average[name], abs_tol=1e-5, what=f"exported {name}")
        assert not torch.equal(value, raw[-1][name]), f"{name}: the last raw weights were exported"


def test_reported_figures_belong_to_the_exported_weights(tmp_path):
    student = Constant()
    task = task_of(student)
    config = OptimConfig(steps=10, batch_size=16, lr=0.05, warmup=1, ema=0.9, autocast="off", eval_every=5, checkpoint_every=100)
    state = fit(task, config, tmp_path)
    assert [point["step"] for point in state["history"]] == [5, 10]
    assert_close(torch.tensor(state["history"][-1]["heldout_ce"]), torch.tensor(task.evaluate(student)["heldout_ce"]), abs_tol=2e-6)


def test_labels_and_codes_of_the_training_set_are_read_as_integers():
    codes, labels, noise = nearest_code_set(5).batch(torch.tensor([4, 0]))
    assert codes.dtype == labels.dtype == torch.int64 and noise.shape == (2, L, E)
    assert_same(codes, nearest_codes(noise, BOOK))
