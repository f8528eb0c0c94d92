"""Distilling a VAR: the whole method on 5 codes, and the command on a tiny bundle."""

from __future__ import annotations

import pytest
import tiny_var
import torch
from command_line import invoke

from arsp.decode.few_step import FewStep, StudentGenerator
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.distill.dd1 import DD1Config, DD1Task
from arsp.distill.flow import FlowSettings
from arsp.distill.pipeline import DistillConfig, check
from arsp.distill.trajectories import TrajectoryRule, generate_shards, load_shards
from arsp.errors import ConfigError
from arsp.models.var import VARConfig
from arsp.models.var_student import VARStudent
from arsp.protocols import Layout, Request
from arsp.train.loop import OptimConfig, fit
from arsp.zoo.load import resolve

PIPELINE = LogitsPipeline(top_p=0.95)


def test_a_student_learns_the_joint_law_of_two_scales(tmp_path, one_thread):
    """A random teacher of scales 1 and 2 over 8 codes: the student's argmax follows the map, uses its noise, and the pairs of
    (first code, second code) have the teacher's law, which independent positions miss."""
    sides, layout = (1, 2), Layout.next_scale((1, 2))
    vq = tiny_var.VQVAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=4, vocab_size=8, patch_nums=sides, share_quant_resi=1)
    tokenizer = tiny_var.tokenizer_model(vq)
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight, generator=torch.Generator().manual_seed(4))
    config = VARConfig(depth=2, embed_dim=32, num_heads=2, num_classes=2, vocab_size=8, code_dim=4, patch_nums=sides)
    teacher = tiny_var.var_model(config)
    decoder = NextScaleDecoder(teacher, tokenizer.quantize, RampGuidance(0.0, 2))
    rule = TrajectoryRule(5, 2, 0.0, -1, PIPELINE, FlowSettings(steps=32))
    book = tokenizer.codebook_VE
    everything = load_shards(generate_shards(tmp_path, decoder, book, rule, teacher_sha256="t", num=9000, shard_size=9000), 4)
    student = VARStudent(config, 4)
    student.init_from_teacher(teacher, book, torch.Generator().manual_seed(0))
    task = DD1Task(student, book, DD1Config(known=(0, 1)), everything.rows(slice(1000, None)), everything.rows(slice(0, 1000)))
    before = task.evaluate(student)
    optim = OptimConfig(
        steps=300, batch_size=128, lr=4e-3, warmup=20, weight_decay=0.0, ema=0.98, autocast="off", eval_every=300, checkpoint_every=300
    )
    after = fit(task, optim, tmp_path)["history"][-1]
    assert after["heldout_accuracy"] > 0.8 > before["heldout_accuracy"] + 0.2, (before, after)
    assert after["heldout_ce_shuffled_noise"] > 2 * after["heldout_ce"], after
    ids = torch.arange(20_000, 28_000)
    request = Request(ids, 5, labels_B=ids % 2)
    made = StudentGenerator(student, book, layout, FewStep()).generate(request).codes_BL
    drawn = torch.cat([everything.tokens_NL[everything.labels_N == label] for label in (0, 1)]).long()
    pairs = lambda codes: torch.bincount(codes[:, 0] * 8 + codes[:, 1], minlength=64) / len(codes)  # noqa: E731
    law = pairs(drawn)
    independent = law.view(8, 8).sum(1, keepdim=True) * law.view(8, 8).sum(0)
    distance, control = ((law - other).abs().sum() / 2 for other in (pairs(made), independent.flatten()))
    assert distance < 0.5 * control, f"total variation of the student {distance:.3f}, of independent positions {control:.3f}"


def test_distilling_and_sampling_a_tiny_var(tmp_path):
    teacher = tiny_var.teacher_bundle(tmp_path / "t")
    short = ["trajectories.held_out=4", "trajectories.batch_size=8", "probe_images=0", "optim.eval_every=2", "optim.warmup=1"]
    words = ["distill", "--teacher", teacher, "--trajectories", 16, "--steps", 2, "--batch-size", 4, "--out", tmp_path / "run"]
    result = invoke(*words, *short, "objective.short=0.5", "objective.short_codes=5", "trajectories.short=6")
    assert result.exit_code == 0, result.output
    source = resolve(str(tmp_path / "run"))
    assert (source.kind, source.family.name, source.card["known"]) == ("student", "var", [0, 1])
    for i, more in enumerate(([], ["--student-steps", 2], ["--teacher-range", "1-3"], ["--split", 5])):
        result = invoke("sample", "--model", tmp_path / "run", "--num", 2, "--out", tmp_path / f"images{i}", *more)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_step_at": 4}, r"ends of scales, \[0, 1, 5, 21\]"),
        ({"objective": {"known": (0,), "short": 0.5, "short_codes": 1}}, r"more than 1 and less than 21 codes at the end of a scale"),
        ({"trajectories": {"short": 8}}, r"no update would read them"),
        ({"objective": {"known": (0,), "short": 0.5, "short_codes": 21}}, r"here \[5\]"),
    ],
)
def test_counts_that_cut_a_scale_are_refused(tmp_path, options, message):
    source = resolve(str(tiny_var.teacher_bundle(tmp_path / "t")))
    with pytest.raises(ConfigError, match=message):
        check(DistillConfig(**options), source)


def test_the_second_step_of_a_var_stands_behind_half_of_its_scales(tmp_path):
    source = resolve(str(tiny_var.teacher_bundle(tmp_path / "t")))
    assert check(DistillConfig(), source).objective.known == (0, 1)
    assert check(DistillConfig(second_step_at=5), source).objective.known == (0, 5)
