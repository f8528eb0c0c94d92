"""Samples that a model is looked at on, and what is kept of the inputs of its layers."""

import pytest
import tiny_quant
import torch

from arsp.decode.ar import ARGenerator
from arsp.errors import ConfigError, InputError, NumericalError
from arsp.protocols import Request
from arsp.quant.balance import ChannelRange
from arsp.quant.calibrate import Samples, image_samples, observe, own_samples
from arsp.quant.install import linear_layers, sites
from arsp.quant.transform import choose_layers
from arsp.testing.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = {"llamagen": "layers.1.attention.wqkv", "var": "blocks.1.attn.mat_qkv"}
SITE = {"llamagen": "layers.1.attention_norm", "var": "blocks.1.norm1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_quant.load(kind, folder) for kind in tiny_quant.KINDS}


def family(kind):
    return kind.partition("-")[0]


def inputs_of(samples, name):
    """What enters a layer, pass by pass, all positions."""
    seen = []
    layer = samples.model.module.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    list(samples.logits(samples.model.module))
    hook.remove()
    return seen


# -- samples ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_a_teacher_is_looked_at_on_the_codes_it_draws(models, kind):
    model = models[kind]
    guidance, pipeline = tiny_quant.rule(model)
    told = []
    samples = own_samples(model, guidance, pipeline, num=5, batch_size=2, seed=7, callback=told.append)
    assert told == [2, 2, 1] and [request.batch_size for request, _ in samples.batches] == told
    labels = torch.cat([request.labels_B for request, _ in samples.batches])
    assert labels.tolist() == [0, 1, 2, 0, 1]  # classes in turn
    drawn = ARGenerator(model.decoder(guidance), pipeline).generate(Request(torch.arange(5), 7, labels_B=labels)).codes_BL
    assert torch.equal(torch.cat([codes_BL for _, codes_BL in samples.batches]), drawn)
    other = own_samples(model, guidance, pipeline, num=5, batch_size=5, seed=8)
    assert not torch.equal(other.batches[0][1], drawn)


@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_logits_are_the_guided_ones_of_every_position(models, kind):
    model = models[kind]
    samples = tiny_quant.samples(model, num=3, batch_size=2)
    logits = list(samples.logits(model.module))
    L, V = model.source.layout.num_tokens, model.source.config["vocab_size"]
    assert [tuple(part.shape) for part in logits] == [(2, L, V), (1, L, V)]
    again = list(samples.logits(model.module))
    assert all(torch.equal(a, b) for a, b in zip(logits, again, strict=True))
    guidance, _ = tiny_quant.rule(model)
    if model.source.kind == "teacher":
        expected = model.decoder(guidance).teacher_forced(*samples.batches[0])
        assert torch.equal(logits[0], expected)


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_images_become_codes_of_the_classes_in_turn(models, kind):
    model = models[kind]
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = image_samples(model, tiny_quant.rule(model)[0], images, batch_size=2)
    assert [request.labels_B.tolist() for request, _ in samples.batches] == [[0, 1], [2]]
    codes_BL = model.tokenizer.encode(images.float() / 127.5 - 1)
    assert torch.equal(torch.cat([part for _, part in samples.batches]), codes_BL)


def test_images_that_a_model_cannot_be_looked_at_on_are_refused(models):
    model, images = models["llamagen"], torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    guidance = tiny_quant.rule(model)[0]
    with pytest.raises(InputError, match="empty"):
        image_samples(model, guidance, images[:0], batch_size=2)
    with pytest.raises(ConfigError, match="16x16 make 64 codes, .* has 16"):
        image_samples(model, guidance, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), batch_size=2)
    with pytest.raises(ConfigError, match="its own noise"):
        image_samples(models["llamagen-student"], guidance, images, batch_size=2)


# -- statistics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_moments_are_those_of_all_positions_but_the_conditions(models, kind):
    """The first position of a raster teacher and of a student is the class. A next-scale teacher has no position of its own for it."""
    samples = tiny_quant.samples(models[kind])
    module = models[kind].module
    name, site = LAYER[family(kind)], SITE[family(kind)]
    seen = observe(samples, sites(module, linear_layers(module)))[site].moments
    first = 0 if kind == "var" else 1
    x_MK = torch.cat([x_RnK[:, first:].flatten(0, 1) for x_RnK in inputs_of(samples, name)]).double()
    assert seen.num_rows == len(x_MK)
    error = float((seen.gram_KK - x_MK.T @ x_MK).norm() / seen.gram_KK.norm())
    assert error < 1e-6, f"second moments differ by {error:.1e}"
    assert_close(seen.mean_abs_K, x_MK.abs().mean(0), abs_tol=0, rel_tol=1e-5, what="mean magnitudes")


def test_the_condition_decides_no_range(models, monkeypatch):
    """A class vector a thousand times as large as a code's changes nothing that is kept of the inputs of the first layer."""
    model = models["llamagen"]
    samples, layer = tiny_quant.samples(model), {"layers.0.attention_norm": ["layers.0.attention.wqkv"]}
    before = observe(samples, layer)["layers.0.attention_norm"]
    table = model.module.cls_embedding.embedding_table.weight
    monkeypatch.setattr(table, "data", torch.cat((table.data[:, :1] * 1000, table.data[:, 1:]), 1))
    after = observe(samples, layer)["layers.0.attention_norm"]
    assert torch.equal(before.moments.gram_KK, after.moments.gram_KK) and torch.equal(before.largest_K(), after.largest_K())


def expected_of(rows):
    """Range and peak by hand of the rows of one step, batch by batch."""
    seen = ChannelRange()
    for x_RnK in rows:
        seen.update(x_RnK)
    return seen.range_K, torch.stack([x_RnK.abs().amax((0, 1)) for x_RnK in rows]).amax(0)


def test_ranges_of_a_raster_are_moving_averages_over_the_batches(models):
    samples = tiny_quant.samples(models["llamagen"], num=6)
    range_K, peak_K = expected_of([x_RnK[:, 1:] for x_RnK in inputs_of(samples, LAYER["llamagen"])])
    found = observe(samples, {SITE["llamagen"]: [LAYER["llamagen"]]})[SITE["llamagen"]]
    assert len(found.ranges) == 1 and torch.equal(found.largest_K(), range_K)
    assert torch.equal(found.peaks_SK, peak_K[None])


@pytest.mark.parametrize("kind", ["var", "var-student"])
def test_scales_of_a_next_scale_model_are_looked_at_apart(models, kind):
    """A teacher runs one scale a pass, a student all of them behind the class."""
    samples = tiny_quant.samples(models[kind])
    passes = inputs_of(samples, LAYER["var"])
    if kind == "var":
        assert [x_RnK.shape[1] for x_RnK in passes] == [1, 4, 16, 1, 4, 16]
        steps = [[x_RnK for x_RnK in passes if x_RnK.shape[1] == length] for length in (1, 4, 16)]
    else:
        assert [x_RnK.shape[1] for x_RnK in passes] == [22, 22]
        steps = [[x_RnK[:, part] for x_RnK in passes] for part in (slice(1, 2), slice(2, 6), slice(6, 22))]
    found = observe(samples, {SITE["var"]: [LAYER["var"]]})[SITE["var"]]
    wanted = [expected_of(rows) for rows in steps]
    for seen, (range_K, _) in zip(found.ranges, wanted, strict=True):
        assert torch.equal(seen.range_K, range_K)
    assert torch.equal(found.peaks_SK, torch.stack([peak_K for _, peak_K in wanted]))
    assert torch.equal(found.largest_K(), torch.stack([range_K for range_K, _ in wanted]).amax(0))


@pytest.mark.parametrize("kind", tiny_quant.KINDS)
def test_every_layer_of_a_model_can_be_looked_at(models, kind):
    """Also those that recipes keep: some of them see no position in a pass, or one vector a row."""
    model = models[kind]
    formats = choose_layers(model.module, tiny_quant.recipe("vidit-q", layers={"keep": []}))
    assert formats.keys() == linear_layers(model.module).keys()
    found = observe(tiny_quant.samples(model), sites(model.module, formats))
    assert found.keys() == sites(model.module, formats).keys()
    for site, seen in found.items():
        assert seen.moments.num_rows > 0 and bool(seen.largest_K().isfinite().all()), site


def test_hooks_are_taken_off_again_and_progress_is_told(models):
    samples, told = tiny_quant.samples(models["var"], num=3), []
    observe(samples, {SITE["var"]: [LAYER["var"]]}, callback=told.append)
    assert told == [2, 1]
    assert not models["var"].module.get_submodule(LAYER["var"])._forward_pre_hooks


def test_an_empty_set_and_inputs_that_are_not_finite_are_refused(models, monkeypatch):
    model = models["llamagen"]
    with pytest.raises(InputError, match="calibration set is empty"):
        observe(Samples(model, tiny_quant.rule(model)[0]), {SITE["llamagen"]: [LAYER["llamagen"]]})
    samples = tiny_quant.samples(model)
    layer = model.module.get_submodule("layers.0.attention.wo")
    monkeypatch.setattr(layer, "forward", lambda x, residual: torch.full_like(residual, torch.nan))
    with pytest.raises(NumericalError, match="layers.1.attention_norm"):
        observe(samples, {SITE["llamagen"]: [LAYER["llamagen"]]})
    assert not model.module.get_submodule(LAYER["llamagen"])._forward_pre_hooks
