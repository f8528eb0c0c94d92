import pytest
import torch
from safetensors.torch import save_file

from arsp.errors import InputError
from arsp.metrics import features
from arsp.metrics.features import FeatNet, extract, load_featnet, weights_sha256


@pytest.fixture
def net():
    torch.manual_seed(0)
    return FeatNet().eval()


def images(n, seed=0):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_network_has_the_published_size():
    count = sum(p.numel() for p in FeatNet().parameters())
    assert count == 387_643, f"{count} parameters; the specification says 388 k"


def test_outputs_have_the_documented_shapes(net):
    out = net(images(3))
    shapes = {key: tuple(value.shape) for key, value in out.items()}
    assert shapes == {"features": (3, 64), "shape": (3, 10), "color": (3, 8), "bg": (3, 6), "pos": (3, 3)}, shapes
    assert out["features"].min() < 0, "features are taken before the ReLU, so some must be negative"


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)])
def test_wrong_dtype_or_size_is_refused_with_the_expected_shape(net, bad):
    with pytest.raises(InputError, match="uint8"):
        net(bad)


def test_extraction_does_not_depend_on_the_batch_size(net):
    x = images(7)
    whole, parts = extract(net, x, 7)["features"], extract(net, x, 2)["features"]
    worst = (whole - parts).abs().max().item()
    assert worst < 1e-4, f"max difference {worst} between batch sizes 7 and 2"


def test_saved_weights_load_to_the_same_network_and_hash(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "f.safetensors")
    loaded = load_featnet(tmp_path / "f.safetensors")
    assert weights_sha256(loaded) == weights_sha256(net)
    assert torch.equal(loaded(images(2))["features"], net(images(2))["features"])
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters()), "the metric's network is frozen"


def test_the_hash_changes_with_one_weight(net):
    before = weights_sha256(net)
    with torch.no_grad():
        net.shape.bias[0] += 1e-3
    assert weights_sha256(net) != before


def test_missing_truncated_and_foreign_weights_are_input_errors(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "whole.safetensors")
    raw = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    save_file({"other": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name in ("none", "cut", "foreign"):
        with pytest.raises(InputError, match="shapes-cnn-v1") as caught:
            load_featnet(tmp_path / f"{name}.safetensors")
        assert caught.value.hint, f"{name}: no hint given"


@pytest.mark.skipif(not features.PACKAGED_WEIGHTS.is_file(), reason="the packaged weights are not trained yet")
def test_packaged_network_recognises_the_embedded_set():
    from arsp.data.shapes import draw

    x, truth = draw(500, 7)
    out = extract(load_featnet(), x)
    for key in ("shape", "color", "bg"):
        accuracy = (out[key].argmax(1) == truth[key]).float().mean().item()
        assert accuracy >= 0.99, f"{key} accuracy {accuracy:.3f} on 500 real images (measured 1.000)"
