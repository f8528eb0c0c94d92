import pytest
import tiny_models
import torch

from arsp.data import shapes
from arsp.tokenizers.llamagen_vq import VQModel
from arsp.train.loop import OptimConfig, fit
from arsp.train.tasks import FeatureTask, TeacherTask, TokenizerTask, tokenise


def images(num=40):
    return torch.randint(0, 256, (num, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_a_tokenizer_learns_and_its_unused_codes_are_reseeded(tmp_path):
    pool = shapes.draw(64, 3)[0][:, :, ::4, ::4].contiguous()
    task = TokenizerTask(VQModel(tiny_models.VQ), pool, pool, total_steps=80)
    with torch.no_grad():
        task.trained.quantize.embedding.weight[8:] = task.trained.quantize.embedding.weight[0]  # eight dead codes
    state = fit(task, OptimConfig(steps=60, batch_size=16, lr=2e-3, warmup=5, eval_every=30, autocast="off"), tmp_path)
    first, last = state["history"]
    assert last["mse"] < 0.7 * first["mse"], f"mse {first['mse']} -> {last['mse']}"
    assert last["codes_used"] > 8, f"{last['codes_used']} codes are used"


def test_a_teacher_learns_codes_and_forgets_classes_at_the_asked_rate(tmp_path):
    codes = torch.arange(16).repeat(30, 1)
    labels = torch.arange(30) % 3
    task = TeacherTask(tiny_models.GPT_CONFIG, codes, labels, (codes[:5], labels[:5]))
    seen = []
    task.trained.cls_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    state = fit(task, OptimConfig(steps=40, batch_size=50, lr=1e-2, warmup=5, eval_every=40, autocast="off"), tmp_path)
    assert state["history"][-1]["nats_per_token"] < 1.0 < torch.log(torch.tensor(16.0))
    dropped = torch.cat(seen[:40]).eq(3).float().mean()
    # binomial over 2000 draws at 0.1: 6 standard deviations are 0.04 (false alarm 2e-9)
    assert abs(dropped - 0.1) < 0.04, f"{dropped:.3f} of the classes were dropped, asked 0.1"


def test_codes_of_images_do_not_depend_on_the_batch(monkeypatch):
    vq = tiny_models.vq_model()
    pool = images(300)
    progress = []
    codes = tokenise(vq, pool, progress.append)
    assert codes.shape == (300, 16) and progress == [256, 44]
    assert torch.equal(codes[250:260], tokenise(vq, pool[250:260]))


def test_features_learn_shapes(tmp_path):
    task = FeatureTask("shapes32-coarse")
    state = fit(task, OptimConfig(steps=2, batch_size=8, eval_every=1, autocast="off"), tmp_path)
    assert {"shape_accuracy", "color_accuracy", "bg_accuracy", "position_error_px"} <= state["history"][-1].keys()


def counting_teacher():
    codes, labels = torch.arange(16).repeat(9, 1), torch.arange(9) % 3
    return TeacherTask(tiny_models.GPT_CONFIG, codes, labels, (codes[:1], labels[:1]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make", [FeatureTask, lambda: TokenizerTask(VQModel(tiny_models.VQ), images(), images(), total_steps=60), counting_teacher]
)
def test_every_task_trains_on_a_gpu(make, tmp_path):
    state = fit(make(), OptimConfig(steps=35, batch_size=8, eval_every=35), tmp_path, device="cuda")
    assert state["history"][-1]["loss"] > 0
