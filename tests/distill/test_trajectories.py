import json

import pytest
import tiny_models
import tiny_var
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from arsp.decode.decoder import RasterDecoder
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.distill import trajectories
from arsp.distill.flow import FlowSettings
from arsp.distill.trajectories import TrajectoryRule, generate_shards, load_shards
from arsp.errors import InputError, Interrupted
from arsp.rng import keyed_labels

RULE = TrajectoryRule(5, 3, 1.5, -1, LogitsPipeline(top_p=0.95), FlowSettings(steps=16))
BOOK = tiny_models.vq_model().codebook_VE.detach()
VAR_BOOK = tiny_var.tokenizer_model().codebook_VE


@pytest.fixture
def decoder():
    return RasterDecoder(tiny_models.gpt_model(), Guidance(1.5))


def make(folder, decoder, rule=RULE, num=20, shard_size=8, batch_size=4, teacher="t", book=BOOK, **more):
    return generate_shards(
        folder, decoder, book, rule, teacher_sha256=teacher, num=num, shard_size=shard_size, batch_size=batch_size, **more
    )


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path, **tensors):
    """Another content under the old metadata."""
    save_file({**load_file(path), **tensors}, path, metadata=metadata(path))


def test_shards_cover_the_samples_and_name_what_decided_them(tmp_path, decoder):
    done = []
    paths = make(tmp_path, decoder, progress=done.append)
    assert [p.name for p in paths] == [f"shard-{i:08d}-{n}.safetensors" for i, n in ((0, 8), (8, 8), (16, 4))]
    assert sum(done) == 20
    everything = load_shards(paths, 4)
    assert everything.sample_ids_N.tolist() == list(range(20)) and everything.seed == 5
    assert torch.equal(everything.labels_N.long(), keyed_labels(5, torch.arange(20), 3))
    assert everything.tokens_NL.dtype == torch.int16 and 0 <= everything.tokens_NL.min() and everything.tokens_NL.max() < 16
    assert {"teacher_sha256", "codebook_sha256", "seed", "rule", "content_sha256"} <= metadata(paths[0]).keys()


def test_codes_do_not_depend_on_batches_or_shards(tmp_path, decoder):
    a = load_shards(make(tmp_path / "a", decoder, batch_size=1, shard_size=20), 4)
    b = load_shards(make(tmp_path / "b", decoder, batch_size=7, shard_size=13), 4)
    differ = int((a.tokens_NL != b.tokens_NL).sum())
    assert differ == 0, f"{differ} of {a.tokens_NL.numel()} codes depend on the batch size"


def test_the_noise_is_regenerated_and_not_stored(tmp_path, decoder):
    everything = load_shards(make(tmp_path, decoder), 4)
    codes, labels, noise = everything.batch(torch.tensor([3, 17]))
    assert codes.shape == (2, 16) and noise.shape == (2, 16, 4) and codes.dtype == labels.dtype == torch.int64
    part = everything.rows(slice(17, None))
    assert len(part) == 3 and torch.equal(part.batch(torch.tensor([0]))[2][0], noise[1])


def test_the_first_codes_alone_come_with_the_same_noise(tmp_path, decoder):
    everything, rows = load_shards(make(tmp_path, decoder), 4), torch.tensor([3, 17])
    for short, whole in zip(everything.first_codes(5).batch(rows), everything.batch(rows), strict=True):
        assert torch.equal(short, whole if whole.ndim == 1 else whole[:, :5])


def test_short_trajectories_are_the_first_codes_of_further_samples(tmp_path):
    make_var = lambda name, **more: load_shards(  # noqa: E731
        generate_shards(tmp_path / name, tiny_var.decoder(), VAR_BOOK, RULE, teacher_sha256="t", **more), 4
    )
    whole = make_var("whole", num=20)
    short = make_var("short", num=8, first_id=12, length=5, shard_size=3)
    assert short.sample_ids_N.tolist() == list(range(12, 20)) and torch.equal(short.tokens_NL, whole.tokens_NL[12:, :5])
    both = whole.rows(slice(0, 12)).first_codes(5).joined(short)
    for a, b in zip(both.batch(torch.arange(20)), whole.first_codes(5).batch(torch.arange(20)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="another length"):
        make_var("short", num=8, first_id=12, length=1, shard_size=3)


def test_the_order_of_the_codes_is_part_of_the_rule(tmp_path, decoder):
    next_scale = generate_shards(tmp_path / "v", tiny_var.decoder(), VAR_BOOK, RULE, teacher_sha256="t", num=6)
    orders = [json.loads(metadata(path)["rule"])["order"] for path in (make(tmp_path / "r", decoder)[0], next_scale[0])]
    assert orders == ["raster", "next-scale"]


def test_codes_of_scales_do_not_depend_on_batches_or_shards(tmp_path):
    a, b = (
        load_shards(generate_shards(tmp_path / str(n), tiny_var.decoder(), VAR_BOOK, RULE, teacher_sha256="t", num=20, batch_size=n), 4)
        for n in (3, 20)
    )
    differ = int((a.tokens_NL != b.tokens_NL).sum())
    assert a.tokens_NL.shape == (20, 21) and differ == 0, f"{differ} codes depend on the batch size"


@pytest.mark.parametrize("stop_at", [0, 3, 4])
def test_a_stopped_generation_continues_to_the_same_content(tmp_path, decoder, monkeypatch, stop_at):
    whole = make(tmp_path / "whole", decoder)
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == stop_at + 1:
            raise Interrupted("stopped", 143)

    monkeypatch.setattr(trajectories, "check_stop", stop)
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", decoder)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    assert len(kept) == stop_at // 2 and all(p.suffix == ".safetensors" for p in kept)
    parts = make(tmp_path / "parts", decoder)
    assert [metadata(p) for p in parts] == [metadata(p) for p in whole]  # with a hash of the tensors
    assert torch.equal(load_shards(parts, 4).tokens_NL, load_shards(whole, 4).tokens_NL)
    assert all(p.stat().st_mtime_ns == at for p, at in kept.items())


OTHERS = {
    "teacher_sha256": {"teacher": "another"},
    "codebook_sha256": {"book": BOOK.roll(1, dims=0)},
    "seed": {"rule": TrajectoryRule(6, *list(vars(RULE).values())[1:])},
    "rule": {"rule": TrajectoryRule(5, 3, 2.0, -1, RULE.pipeline, RULE.flow)},
    "num_classes": {"rule": TrajectoryRule(5, 2, 1.5, -1, RULE.pipeline, RULE.flow)},
}


@pytest.mark.parametrize("key", OTHERS)
def test_shards_of_another_rule_are_refused(tmp_path, decoder, key):
    make(tmp_path, decoder)
    with pytest.raises(InputError, match=f"another {key}") as caught:
        make(tmp_path, decoder, **OTHERS[key])
    assert "--out" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"nothing", b"\xff" * 50])
def test_a_shard_that_is_none_is_refused_when_met_and_when_read(tmp_path, decoder, content):
    paths = make(tmp_path, decoder)
    paths[1].write_bytes(content)
    for act in (lambda: make(tmp_path, decoder), lambda: load_shards(paths, 4)):
        with pytest.raises(InputError, match=paths[1].name) as caught:
            act()
        assert f"Delete {paths[1]}" in caught.value.hint


def test_a_truncated_shard_is_refused(tmp_path, decoder):
    paths = make(tmp_path, decoder)
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(InputError, match="cannot be read"):
        load_shards(paths, 4)


def test_a_flipped_bit_in_a_shard_is_noticed_before_any_work(tmp_path, decoder, monkeypatch):
    paths = make(tmp_path, decoder)
    content = bytearray(paths[2].read_bytes())
    content[-3] ^= 4
    paths[2].write_bytes(content)
    paths[0].unlink()
    monkeypatch.setattr(trajectories, "sample_through_map", lambda *a: pytest.fail("sampled"))
    with pytest.raises(InputError, match="damaged"):
        make(tmp_path, decoder)
    with pytest.raises(InputError, match="damaged"):
        load_shards(paths[1:], 4)


def test_tensors_that_were_changed_are_noticed(tmp_path, decoder):
    paths = make(tmp_path, decoder)
    rewrite(paths[0], tokens=load_file(paths[0])["tokens"].roll(1, 0))
    with pytest.raises(InputError, match="damaged"):
        load_shards(paths, 4)


def test_noise_of_another_generator_is_noticed(tmp_path, decoder, monkeypatch):
    paths = make(tmp_path, decoder)
    real = trajectories.request_noise
    monkeypatch.setattr(trajectories, "request_noise", lambda *a: real(*a) + 1e-3)
    with pytest.raises(InputError, match="noise regenerated here differs"):
        load_shards(paths, 4)


def test_a_failing_write_leaves_no_shard(tmp_path, decoder, monkeypatch):
    monkeypatch.setattr(trajectories, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        make(tmp_path / "s", decoder)
    assert list((tmp_path / "s").iterdir()) == []
