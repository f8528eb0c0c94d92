import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arsp.data import shapes
from arsp.data.images import save_npz, save_png_dir
from arsp.errors import ConfigError, InputError, ResourceError
from arsp.metrics import attributes, fidelity, reference
from arsp.metrics.features import FEATNET_NAME, PACKAGED_WEIGHTS, FeatNet, extract, load_featnet, weights_sha256
from arsp.metrics.fidelity import FeatureSource, FidelityOptions, frechet_distance, measure
from arsp.metrics.reference import Reference, load_reference

N, M = 160, 200
PLAIN = FidelityOptions(bootstrap=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    net = FeatNet()
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(net.state_dict(), path)
    return FeatureSource(FEATNET_NAME, path, weights_sha256(net))


@pytest.fixture(scope="module")
def real():
    return reference._with_images("real", shapes.draw(M, 1)[0])


@pytest.fixture(scope="module")
def samples():
    return shapes.draw(N, 2)[0]


def by_name(entries):
    return {entry["name"]: entry for entry in entries}


def relative(a, b):
    return abs(a - b) / abs(b)


def test_library_and_own_float64_formula_agree(source, real, samples):
    net = load_featnet(source.weights)
    own = frechet_distance(extract(net, samples)["features"], extract(net, real.images_N3HW)["features"])
    library = by_name(measure(samples, real, ["fid"], source, options=PLAIN))["fid"]["value"]
    assert relative(library, own) < 1e-4, f"torch-fidelity {library}, own formula {own}, relative difference {relative(library, own):.2e}"
    quick = fidelity.quick_frechet(samples, real, net)
    assert relative(quick, own) < 1e-9, f"quick_frechet {quick}, frechet_distance {own}"


def test_frechet_distance_matches_the_closed_form_of_diagonal_gaussians():
    mu_a, mu_b = np.array([1.0, 2.0, 0.0]), np.array([0.0, 2.0, 3.0])
    var_a, var_b = np.array([1.0, 4.0, 0.0]), np.array([4.0, 4.0, 9.0])
    expected = 10.0 + ((np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
    value = fidelity.frechet_from_statistics(mu_a, np.diag(var_a), mu_b, np.diag(var_b))
    assert abs(value - expected) < 1e-9, f"{value} instead of {expected}"


def test_distance_to_itself_is_zero_and_it_is_symmetric():
    x, y = np.random.default_rng(0).normal(size=(2, 300, 8))
    assert abs(frechet_distance(x, x)) < 1e-9
    assert relative(frechet_distance(x, y + 1), frechet_distance(y + 1, x)) < 1e-9


def test_all_metrics_come_with_count_protocol_and_reference_hash(source, real, samples):
    notices, seen = [], []
    entries = measure(samples, real, ["fid", "kid", "is", "prc"], source, notice=notices.append, advance=seen.append)
    assert [e["name"] for e in entries] == ["fid", "kid", "is", "precision", "recall", "f_score"]
    assert all(e["n"] == N and e["features_sha256"] == source.sha256 for e in entries)
    assert [e["protocol"] for e in entries[:3]] == ["fid/shapes-cnn-v1/64", "kid/shapes-cnn-v1/64n", "is/shapes-cnn-v1/logits"]
    assert not any(e["comparable"] for e in entries), "embedded features are never comparable with published numbers"
    named = by_name(entries)
    assert named["fid"]["reference_sha256"] == real.images_sha256 and named["is"]["reference_sha256"] is None
    assert named["kid"]["subset_size"] == N and "160" in " ".join(notices), f"the adapted subset size must be said: {notices}"
    assert abs(named["kid"]["value"]) < 1, f"KID {named['kid']['value']} on scaled features should be near zero for real images"
    assert sum(seen) == N + M, f"progress counted {sum(seen)} of {N + M} images"


def test_values_do_not_depend_on_the_order_of_files_or_the_batch_size(source, real, samples):
    first = by_name(measure(samples, real, ["fid", "prc"], source, options=PLAIN))
    second = by_name(measure(samples.flip(0), real, ["fid", "prc"], source, options=PLAIN, batch_size=13))
    for name in first:
        a, b = first[name]["value"], second[name]["value"]
        assert abs(a - b) <= 1e-4 * max(1, abs(a)), f"{name}: {a} against {b}"


def test_inception_score_of_class_sorted_files_equals_that_of_mixed_ones(source, real, monkeypatch):
    x, attrs = shapes.draw(N, 3)
    monkeypatch.setattr(fidelity, "IS_SPLIT_SIZE", N // 4)
    by_class = x[attrs["shape"].argsort()]
    scores = [
        by_name(measure(images, real, ["is"], source, options=FidelityOptions(seed=s)))["is"] for s in (0, 1) for images in (by_class, x)
    ]
    assert all(score["splits"] == 4 for score in scores)
    values = [score["value"] for score in scores]
    assert max(values) - min(values) < 0.05 * min(values), f"IS over two file orders and two seeds: {values}"


def test_permutation_is_keyed_and_complete():
    a, b = fidelity.keyed_permutation(1000, 5), fidelity.keyed_permutation(1000, 5)
    assert torch.equal(a, b) and a.sort().values.tolist() == list(range(1000))
    assert not torch.equal(a, fidelity.keyed_permutation(1000, 6))


def test_bootstrap_interval_holds_the_value_and_shrinks_with_more_images(source, real):
    widths = []
    for n in (60, 480):
        fid = by_name(measure(shapes.draw(n, 4)[0], real, ["fid"], source, options=FidelityOptions(bootstrap=40)))["fid"]
        low, high = fid["ci95"]
        assert low <= fid["value"] <= high, f"{fid['value']} outside [{low}, {high}]"
        widths.append(high - low)
    assert widths[1] < widths[0], f"interval of 480 images {widths[1]}, of 60 images {widths[0]}"


def test_toy_values_rank_noise_far_behind_real_images(source, real, samples):
    noise = torch.randint(0, 256, samples.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    near, far = (by_name(measure(x, real, ["fid", "prc"], source, options=PLAIN)) for x in (samples, noise))
    assert far["fid"]["value"] > 5 * near["fid"]["value"], f"noise {far['fid']['value']}, real {near['fid']['value']}"
    assert far["precision"]["value"] < near["precision"]["value"]


def test_stored_statistics_give_the_same_distance_as_their_images(source, real, samples, tmp_path):
    mu, sigma = fidelity.gaussian(extract(load_featnet(source.weights), real.images_N3HW)["features"])
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    stored = load_reference(str(tmp_path / "stats.npz"))
    a = by_name(measure(samples, stored, ["fid"], source, options=PLAIN))["fid"]
    b = by_name(measure(samples, real, ["fid"], source, options=PLAIN))["fid"]
    assert relative(a["value"], b["value"]) < 1e-4, f"{a['value']} from statistics, {b['value']} from images"
    assert a["reference_sha256"] == stored.statistics_sha256 and a["reference_n"] is None
    with pytest.raises(InputError, match="kid needs reference images"):
        measure(samples, stored, ["fid", "kid"], source)


def test_statistics_of_other_features_are_refused(source, samples):
    foreign = Reference("adm.npz", mu_D=np.zeros(2048), sigma_DD=np.eye(2048), statistics_sha256="0")
    with pytest.raises(InputError, match="2048"):
        measure(samples, foreign, ["fid"], source, options=PLAIN)


@pytest.mark.parametrize(("num", "metrics", "words"), [(0, ["fid"], "at least 2"), (1, ["is"], "at least 2"), (3, ["prc"], "more than 3")])
def test_too_few_images_are_refused(source, real, samples, num, metrics, words):
    with pytest.raises(InputError, match=words):
        measure(samples[:num], real, metrics, source)


def test_images_and_reference_of_different_sizes_are_refused(source, real):
    with pytest.raises(InputError, match="16x16"):
        fidelity.check_sizes(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), real)


def test_reference_hash_is_the_same_for_folder_and_npz(tmp_path, samples):
    save_png_dir(samples[:4], tmp_path / "d")
    save_npz(samples[:4], tmp_path / "x.npz")
    a, b = load_reference(str(tmp_path / "d")), load_reference(str(tmp_path / "x.npz"))
    assert a.images_sha256 == b.images_sha256 == reference.images_sha256(samples[:4])


def test_bad_references_name_the_problem(tmp_path):
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    save_npz(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "one.npz")
    words = {
        "half": "expected mu",
        "shape": "expected mu",
        "nan": "NaN",
        "none": "neither arr_0",
        "one": "at least 2",
        "gone": "does not exist",
    }
    for name, expected in words.items():
        with pytest.raises(InputError, match=expected):
            load_reference(str(tmp_path / f"{name}.npz"))
    with pytest.raises(ConfigError) as caught:
        load_reference("shapes23")
    assert "shapes32" in caught.value.hint, caught.value.hint


def test_missing_and_foreign_inception_weights_name_the_expected_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    for given in (None, "none.pth", "other.pth", "text.pth"):
        with pytest.raises(InputError) as caught:
            fidelity.resolve_features("inception", (256, 256), None if given is None else tmp_path / given)
        assert fidelity.INCEPTION_FILE in caught.value.message + caught.value.hint, f"{given}: {caught.value.message}"


def test_auto_features_follow_the_image_size(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="weights-inception"):
        fidelity.resolve_features("auto", (256, 256))
    with pytest.raises(InputError, match="reads 32x32"):
        fidelity.resolve_features(FEATNET_NAME, (256, 256))


def test_unimportable_library_is_a_resource_error_with_the_command(monkeypatch):
    def refuse(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(fidelity.importlib, "import_module", refuse)
    fidelity.torch_fidelity.cache_clear()
    with pytest.raises(ResourceError, match="No module named 'torch_fidelity'") as caught:
        fidelity.torch_fidelity()
    assert "pip install" in caught.value.hint
    fidelity.torch_fidelity.cache_clear()


def test_missing_torchvision_operators_are_declared_and_the_import_repeated(monkeypatch):
    true_import, calls = fidelity.importlib.import_module, []

    def fail_once(name):
        calls.append(name)
        if len(calls) == 1:
            raise RuntimeError("operator torchvision::nms does not exist")
        return true_import(name)

    defined = []
    monkeypatch.setattr(fidelity, "_define_operator", defined.append)
    monkeypatch.setattr(fidelity, "_forget_modules", lambda: None)
    monkeypatch.setattr(fidelity.importlib, "import_module", fail_once)
    fidelity.torch_fidelity.cache_clear()
    assert hasattr(fidelity.torch_fidelity(), "calculate_metrics")
    assert defined == ["nms"] and calls[:2] == ["torch_fidelity", "torch_fidelity"], (defined, calls)


def test_redrawing_true_attributes_is_exact_and_every_mask_has_pixels():
    attrs = shapes.select(shapes.all_attributes(), torch.arange(0, 74_400, 61))
    solid = (shapes.coverage(attrs) > attributes.SOLID_COVERAGE).sum((1, 2))
    assert solid.min() > 0, "a shape without a solid pixel has no measurable colour"
    x = shapes.render(attrs).float()
    color_ok, error = attributes.shows_color(x, attrs), attributes.redraw_error(x, attrs)
    assert color_ok.all() and error.max() == 0, f"{int((~color_ok).sum())} colours missed, worst error {error.max()}"


def test_wrong_colour_claims_are_found():
    x, attrs = shapes.draw(200, 5)
    wrong = attrs | {"color": (attrs["color"] + 1) % 8}
    assert not attributes.shows_color(x.float(), wrong).any() and attributes.redraw_error(x.float(), wrong).min() > 0


@pytest.mark.parametrize("variant", shapes.VARIANTS)
def test_true_positions_survive_snapping_with_noise(variant):
    attrs = shapes.attributes(500, 6, variant)
    r = torch.tensor(shapes.RADII)[attrs["ri"]]
    noise = 0.04 * (2 * torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) - 1)
    pos = torch.stack((attrs["cx"] / 16 - 1, attrs["cy"] / 16 - 1, r / 8 - 1), 1) + noise
    ri, near = attributes.snap_position(pos, variant)
    centre = near[:, :, 0]
    wrong = [int((a != b).sum()) for a, b in ((ri, attrs["ri"]), (centre[:, 0], attrs["cx"]), (centre[:, 1], attrs["cy"]))]
    assert wrong == [0, 0, 0], f"radius, x, y snapped elsewhere in {wrong} of 500"


def test_a_network_that_snaps_to_the_neighbouring_cell_is_corrected_by_redrawing(monkeypatch):
    x, attrs = shapes.draw(100, 9)
    r = torch.tensor(shapes.RADII)[attrs["ri"]]
    pos = torch.stack(((attrs["cx"] + 1.5) / 16 - 1, (attrs["cy"] - 1.5) / 16 - 1, r / 8 - 1), 1)
    eye = {key: torch.nn.functional.one_hot(attrs[key], 10).float() for key in ("shape", "color", "bg")}
    monkeypatch.setattr(attributes, "extract", lambda net, images, batch_size: eye | {"pos": pos})
    seen, error = attributes.predict_attributes(None, x, "shapes32")
    assert error.max() == 0 and all(torch.equal(seen[key], attrs[key]) for key in attrs), {
        key: int((seen[key] != attrs[key]).sum()) for key in attrs
    }


def test_attribute_entries_need_matching_labels_and_size(source):
    net = load_featnet(source.weights)
    x = shapes.draw(6, 1)[0]
    assert [e["name"] for e in attributes.measure_attributes(x, None, net)] == ["color_accuracy", "render_error"]
    with pytest.raises(InputError, match="5 labels for 6 images"):
        attributes.measure_attributes(x, [0] * 5, net)
    with pytest.raises(InputError, match="embedded set"):
        attributes.measure_attributes(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None, net)


@pytest.mark.skipif(not PACKAGED_WEIGHTS.is_file(), reason="the packaged weights are not trained yet")
def test_real_images_have_nearly_perfect_attributes():
    x, attrs = shapes.draw(300, 8)
    values = {e["name"]: e["value"] for e in attributes.measure_attributes(x, attrs["shape"].tolist(), load_featnet())}
    assert values["class_accuracy"] >= 0.99 and values["color_accuracy"] >= 0.99 and values["render_error"] < 0.02, values
