"""The two tasks of the VAR family: what each update touches, what the codebook is fitted to, and continued trainings."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import tiny_var
import torch
import torch.nn.functional as F

from arsp.data import shapes
from arsp.errors import NumericalError
from arsp.tokenizers.pixels import to_pixels
from arsp.train.loop import OptimConfig, _groups, fit
from arsp.train.tasks import ScaleTeacherTask, ScaleTokenizerTask

pytestmark = pytest.mark.usefixtures("one_thread")
K, ENDS, L = 3, (1, 5, 21), 21
CONFIG, VQ = tiny_var.CONFIG, tiny_var.VQ
OPTIM = OptimConfig(steps=12, batch_size=8, lr=5e-3, warmup=2, eval_every=100, checkpoint_every=5, autocast="off")


@pytest.fixture(scope="module")
def pool():
    return shapes.draw(48, 3)[0][:, :, ::4, ::4].contiguous()


@pytest.fixture(scope="module")
def codes():
    return torch.randint(16, (30, L), generator=torch.Generator().manual_seed(2))


LABELS = torch.arange(30) % 3


def teacher_task(codes, model=None, **options) -> ScaleTeacherTask:
    model = (model or tiny_var.var_model()).train().requires_grad_(True)
    return ScaleTeacherTask(model, tiny_var.tokenizer_model().quantize, codes, LABELS, (codes[:7], LABELS[:7]), **options)


def tokenizer_task(pool, **options) -> ScaleTokenizerTask:
    options = {"total_steps": 100, **options}
    return ScaleTokenizerTask(tiny_var.tokenizer_model().train().requires_grad_(True), pool, pool[:5], **options)


def step_of(task, step=0, batch=8, seed=4):
    return task.loss(step, batch, torch.Generator().manual_seed(seed))


@torch.no_grad()
def losses_of(task, **options):
    return {key: float(value) for key, value in step_of(task, **options).items()}


def weights_of(task):
    return {key: value.detach().clone() for key, value in task.trained.state_dict().items()}


# -- teacher: which positions are trained -----------------------------------------------------------------------------------


def touched(task) -> tuple[list[int], list[int]]:
    """Positions and levels whose embeddings got a gradient."""
    task.zero_grad(set_to_none=True)
    step_of(task)["loss"].backward()
    rows = lambda grad: grad.reshape(-1, grad.shape[-1]).abs().sum(-1).nonzero().flatten().tolist()  # noqa: E731
    return rows(task.trained.pos_1LC.grad), rows(task.trained.lvl_embed.weight.grad)


@pytest.mark.parametrize("num", [1, 2])
def test_a_short_update_touches_the_first_scales_only(codes, num):
    assert touched(teacher_task(codes, short=1.0, short_scales=num)) == (list(range(ENDS[num - 1])), list(range(num)))
    assert touched(teacher_task(codes, short=0.0, short_scales=num)) == (list(range(L)), list(range(K)))


def test_short_updates_come_at_the_asked_rate(codes):
    task, lengths = teacher_task(codes, short=0.3, short_scales=2), []
    task.trained.head.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    with torch.no_grad():
        for seed in range(400):
            step_of(task, batch=1, seed=seed)
    assert set(lengths) == {5, 21}
    share = lengths.count(5) / len(lengths)
    assert abs(share - 0.3) < 0.14, f"{share:.2f} of the updates were short, asked 0.3"  # binomial: 6 standard deviations


@pytest.mark.parametrize("scales", [(0, 1), (1, 1), (1, 2), (2, 2), (0, 2)])
def test_the_loss_is_that_of_the_named_scales(codes, scales):
    task = teacher_task(codes, tiny_var.var_model(replace(CONFIG, cond_drop_rate=0.0)), scales=scales)
    seen = []
    task.trained.head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        found = step_of(task)["loss"]
        rows = torch.randint(len(codes), (8,), generator=torch.Generator().manual_seed(4))
        quantizer = tiny_var.tokenizer_model().quantize
        logits = task.trained(LABELS[rows], quantizer.inputs(codes[rows]))
    own = CONFIG.scale_slice(*scales)
    expected = F.cross_entropy(logits[:, own].flatten(0, 1), codes[rows][:, own].flatten())
    assert abs(found - expected) < 1e-5, f"{float(found):.6f}, expected {float(expected):.6f}"
    assert seen[0] == ENDS[scales[1]], "the sequence ends at the last trained scale"
    assert touched(task)[0] == list(range(ENDS[scales[1]])), "earlier scales are read"


def test_figures_of_the_named_scales_are_means_of_their_positions(codes):
    whole = teacher_task(codes)
    last = teacher_task(codes, whole.trained, scales=(2, 2))
    with torch.no_grad():
        every, only = whole.evaluate(whole.trained), last.evaluate(last.trained)
    assert set(only) == {"nats_per_token", "nats_per_image", "nats_scale_2"}
    assert only["nats_scale_2"] == pytest.approx(every["nats_scale_2"], rel=1e-5) == pytest.approx(only["nats_per_token"], rel=1e-5)
    sizes = [end - start for start, end in zip((0, *ENDS), ENDS, strict=False)]
    total = sum(size * every[f"nats_scale_{k}"] for k, size in enumerate(sizes))
    assert every["nats_per_image"] == pytest.approx(total, rel=1e-5) == pytest.approx(L * every["nats_per_token"], rel=1e-5)


def test_classes_are_dropped_at_the_asked_rate_and_never_in_figures(codes):
    task, seen = teacher_task(codes), []
    task.trained.class_emb.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        step_of(task, batch=3000)
        dropped = float((seen.pop() == CONFIG.num_classes).float().mean())
        assert abs(dropped - 0.1) < 0.033, f"{dropped:.3f} of the classes were dropped, asked 0.1"  # 6 standard deviations
        task.evaluate(task.trained)
    assert torch.equal(torch.cat(seen), LABELS[:7])


def test_the_expert_weighs_in_as_asked(codes):
    expert = tiny_var.var_model(seed=7).requires_grad_(False)
    made = {weight: losses_of(teacher_task(codes, expert=expert, weight=weight)) for weight in (0.0, 0.25, 1.0)}
    ce, kl = made[0.25]["ce"], made[0.25]["kl"]
    assert kl > 0.05 and made[0.25]["loss"] == pytest.approx(0.25 * kl + 0.75 * ce, rel=1e-5)
    assert made[0.0]["loss"] == made[0.0]["ce"] and made[1.0]["loss"] == made[1.0]["kl"]
    own = teacher_task(codes, expert=tiny_var.var_model().requires_grad_(False), weight=1.0)
    assert abs(losses_of(own)["loss"]) < 1e-5, "a model that equals its expert has nothing to learn from it"


def test_the_expert_is_matched_from_its_first_scale_on(codes):
    expert = tiny_var.var_model(seed=7).requires_grad_(False)
    plain, matched = losses_of(teacher_task(codes))["loss"], losses_of(teacher_task(codes, expert=expert, weight=1.0))
    last = CONFIG.num_scales - 1
    fine = losses_of(teacher_task(codes, expert=expert, weight=1.0, scales=(last, last)))["kl"]
    coarse = losses_of(teacher_task(codes, scales=(0, last - 1)))["loss"]
    mixed = losses_of(teacher_task(codes, expert=expert, weight=1.0, expert_from=last))["loss"]
    share = CONFIG.patch_nums[-1] ** 2 / sum(pn * pn for pn in CONFIG.patch_nums)
    assert mixed == pytest.approx(share * fine + (1 - share) * coarse, rel=1e-4)
    assert mixed not in (plain, matched["loss"])


def test_tables_gains_and_the_attention_scale_are_not_decayed(codes):
    for config in (CONFIG, replace(CONFIG, shared_aln=True)):
        task = teacher_task(codes, tiny_var.var_model(config))
        decayed, plain = (set(map(id, group["params"])) for group in _groups(task.optimised, 0.05, task.no_decay))
        names = {id(parameter): name for name, parameter in task.trained.named_parameters()}
        assert len(decayed) + len(plain) == len(names) and not decayed & plain
        free = {names[i] for i in plain}
        assert {"pos_start", "pos_1LC", "lvl_embed.weight", "blocks.0.attn.scale_mul_1H11", "head.bias"} <= free
        assert ("blocks.0.ada_gss" in free) == config.shared_aln
        for i in decayed:
            assert names[i].endswith("weight") and "lvl_embed" not in names[i], f"{names[i]} is decayed"
        assert {"word_embed.weight", "class_emb.weight", "blocks.1.attn.mat_qkv.weight", "head.weight"} <= {names[i] for i in decayed}


# -- tokenizer: what the codebook is fitted to ------------------------------------------------------------------------------


def test_the_codebook_is_fitted_at_its_steps_only(pool):
    task, seen = tokenizer_task(pool), []
    task._refit = seen.append
    for step in range(100):
        step_of(task, step, batch=1)
    assert seen == [2, 10, 25, 45, 60, 75]


@torch.no_grad()
def test_a_share_of_the_codebook_goes_to_the_first_scale_and_the_rest_evenly(pool):
    task = tokenizer_task(pool, first_share=0.5)
    quantizer, before = task.trained.quantize, task.trained.quantize.embedding.weight.clone()
    task._refit(3)
    book = quantizer.embedding.weight
    assert (book != before).any(-1).all(), "every row is fitted"
    rest = task.trained.latents(to_pixels(pool)).float()
    for k, rows in enumerate((slice(0, 8), slice(8, 12), slice(12, 16))):
        pn = quantizer.patch_nums[k]
        z = F.interpolate(rest, size=(pn, pn), mode="area").flatten(2).transpose(1, 2)
        nearest = torch.cdist(z, book[rows]).argmin(-1)
        for row, code in enumerate(book[rows]):  # a fixed point of k-means: each centre is the mean of what is nearest to it
            own = z[nearest == row]
            assert len(own) and (own.mean(0) - code).norm() < 0.35 * z.flatten(0, 1).std(0).norm(), f"scale {k}, row {row}"
        rest = rest - quantizer.contribution(book[rows][nearest], k)
    other = tokenizer_task(pool, first_share=0.5)
    other._refit(3)
    assert torch.equal(other.trained.quantize.embedding.weight, book), "the same step gives the same codebook"


@torch.no_grad()
def test_a_fitted_codebook_is_nearer_to_what_it_quantises(pool):
    task = tokenizer_task(pool)
    error = lambda: float(  # noqa: E731
        (task.trained.quantize.encode(latents)[1][-1] - latents).square().mean()
    )
    latents = task.trained.latents(to_pixels(pool)).float()
    before = error()
    task._refit(1)
    assert error() < 0.8 * before, f"squared error of the latents {before:.4f} -> {error():.4f}"


def test_the_gradient_passes_the_rounding_and_reaches_every_part(pool):
    task = tokenizer_task(pool, truncate=0.5)
    losses = step_of(task, 1)
    assert {"loss", "l1", "mse", "thumbnail_mse", "place_mse"} == set(losses)
    losses["loss"].backward()
    idle = [name for name, p in task.optimised.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    unused = [f"0.quantize.quant_resi.qresi_ls.1.{part}" for part in ("weight", "bias")]  # of three scales, none takes the second phi
    assert idle == unused, f"no gradient: {idle}"


@torch.no_grad()
def test_the_straight_through_sums_are_those_of_the_quantiser(pool):
    task = tokenizer_task(pool)
    latents = task.trained.latents(to_pixels(pool)).float()
    codes, maps = task.trained.quantize.encode(latents)
    sums, first = task._straight_through(latents, codes)
    for k, (found, expected) in enumerate(zip(sums, maps, strict=True)):
        assert (found - expected).abs().max() < 1e-5, f"scale {k}: {(found - expected).abs().max():.2e}"
    assert torch.allclose(first[:, 0], latents.mean((2, 3)), atol=1e-6)


def test_a_batch_of_one_image_has_a_finite_loss(pool):
    assert all(map(math.isfinite, losses_of(tokenizer_task(pool), batch=1).values()))


@pytest.mark.parametrize(("share", "expected"), [(0.0, {2}), (1.0, {0, 1})])
def test_rows_are_decoded_from_all_scales_or_from_fewer(pool, share, expected):
    task, seen = tokenizer_task(pool, truncate=share), []
    real = task._straight_through

    def recorded(latents, codes):
        sums, first = real(latents, codes)
        seen.append(sums)
        return sums, first

    task._straight_through = recorded
    decoded = []
    task.trained.post_quant_conv.register_forward_pre_hook(lambda module, args: decoded.append(args[0]))
    with torch.no_grad():
        step_of(task, 1, batch=40)
    (sums,), (given,) = seen, decoded
    used = {k for row in range(40) for k in range(K) if torch.equal(given[row], sums[k][row])}
    assert used == expected


def test_helpers_are_trained_and_checkpointed_but_not_exported(pool, tmp_path):
    task = tokenizer_task(pool, total_steps=12)
    before = copy.deepcopy(task.state_dict())
    fit(task, OPTIM, tmp_path)
    after = task.state_dict()
    for part in ("painter.0.weight", "locator.weight", "trained.encoder.conv_in.weight", "trained.quantize.embedding.weight"):
        assert not torch.equal(before[part], after[part]), f"{part} did not change"
    assert task.trained.state_dict().keys() == tiny_var.tokenizer_model().state_dict().keys()


# -- continued and failing trainings ----------------------------------------------------------------------------------------


class Dies(Exception):
    pass


def dying(task, step):
    """The same task, whose loss of one step is never computed."""
    real = task.loss

    def loss(at, *arguments):
        if at == step:
            raise Dies
        return real(at, *arguments)

    task.loss = loss
    return task


@pytest.mark.parametrize("kind", ["teacher", "tokenizer"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_continued_training_ends_in_the_same_weights(pool, codes, tmp_path, kind, ema):
    """Short updates and stochastic depth in the teacher, refits of the codebook (steps 1, 3, 5, 7, 9 of 12) in the tokenizer."""
    config = OPTIM.model_copy(update={"ema": ema})
    deep = replace(CONFIG, drop_path_rate=0.3)
    make = {
        "teacher": lambda: teacher_task(codes, tiny_var.var_model(deep), short=0.5, short_scales=2),
        "tokenizer": lambda: tokenizer_task(pool, total_steps=12, truncate=0.5),
    }[kind]
    whole = make()
    fit(whole, config, tmp_path / "whole")
    for step in (8, 11):
        with pytest.raises(Dies):
            fit(dying(make(), step), config, tmp_path / "parts")
    parts = make()
    assert fit(parts, config, tmp_path / "parts")["step"] == 12
    for key, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(parts)[key]), f"{key} differs by {(value - weights_of(parts)[key]).abs().max():.2e}"


def test_a_diverged_update_stops_before_it_and_keeps_the_checkpoint(codes, tmp_path):
    task = teacher_task(codes)
    real = task.loss
    task.loss = lambda step, *rest: {"loss": real(step, *rest)["loss"] * (math.nan if step == 7 else 1.0)}
    with pytest.raises(NumericalError, match="step 7"):
        fit(task, OPTIM, tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["00000005"]
    assert all(torch.isfinite(value).all() for value in weights_of(task).values())


def test_a_teacher_learns_the_codes_of_its_classes(codes, tmp_path):
    same = codes[:3][LABELS]  # one image a class
    task = teacher_task(same)
    state = fit(task, OPTIM.model_copy(update={"steps": 60, "eval_every": 30, "lr": 1e-2}), tmp_path)
    first, last = (point["nats_per_token"] for point in state["history"])
    assert last < min(first, 0.7), f"nats a code {first:.2f} -> {last:.2f}, uniform codes have {math.log(16):.2f}"
