"""The table of modes: what each takes, what is refused before anything is built, and that it keeps the word it gives."""

import pytest
import torch
from tabular_models import table_decoder

from arsp.cli.speculate import SpeculateConfig
from arsp.decode.drafts import DraftModel
from arsp.decode.modes import MODES, Parts, VerifyConfig, build_mode, settle
from arsp.decode.trees import DraftTree
from arsp.errors import ConfigError
from arsp.metrics.exact import mode_generator
from arsp.protocols import Layout, Request
from arsp.stack import StackConfig, build

IMAGE = Layout.raster(16, 16)
SMALL = {"draft_model": "smaller"}


def settled(name, layout=IMAGE, **given):
    return settle(name, VerifyConfig(**given), layout)


@pytest.mark.parametrize("name", MODES)
def test_every_mode_has_defaults_among_its_options_and_claims_one_of_three_things(name):
    mode = MODES[name]
    assert mode.exactness in ("exact", "bounded(delta)", "lossy")
    assert mode.options <= set(VerifyConfig.model_fields) - {"window"} and set(mode.defaults) <= mode.options | {"window"}
    options = settled(name, **(SMALL if mode.needs_draft else {}))
    assert all(getattr(options, key) == value for key, value in mode.defaults.items())
    assert {key for key, value in options if value is not None} <= mode.options | {"window"}


def test_the_default_is_exact():
    assert MODES[SpeculateConfig().stack["sampler"]].exactness == "exact"


@pytest.mark.parametrize("name", MODES)
def test_a_generator_says_what_its_mode_says(name):
    exactness = mode_generator(name, table_decoder()).exactness
    assert exactness.split("(")[0] == MODES[name].exactness.split("(")[0]
    if name.startswith("lantern"):
        for delta in (0.25, 3.0) if name == "lantern" else (3.0,):
            claimed = mode_generator(name, table_decoder(), delta=delta).exactness
            assert claimed == ("bounded(0.25)" if delta <= 1 else "bounded(2 p)")


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (4, 4)])
@pytest.mark.parametrize("name", MODES)
def test_defaults_fit_small_images(name, grid):
    decoder = table_decoder(2, grid)
    options = settled(name, decoder.layout, **(SMALL if MODES[name].needs_draft else {}))
    parts = Parts(decoder, torch.nn.Identity(), torch.randn(2, 3), torch.randn(2, 3), decoder if MODES[name].needs_draft else None)
    assert build_mode(name, parts, options) is not None
    codes = mode_generator(name, decoder).generate(Request(torch.arange(5), 0)).codes_BL
    assert codes.shape == (5, grid[0] * grid[1])


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("sdj", {}, "unknown mode"),
        ("sjd", {"coupling": "gumbel"}, "--coupling: no effect in mode sjd"),
        ("seeded", {"delta": 0.1, "tau": 0.5}, "--tau, --delta: no effect"),
        ("rsd", SMALL | {"window": 4}, "--window: no effect in mode rsd"),
        ("zipar", {"init": "prior"}, "--init: no effect in mode zipar"),
        ("draft-model", {}, "needs a smaller model"),
        ("kseq", {}, "needs a smaller model"),
        ("rsd", {}, "needs a smaller model"),
        ("seeded", SMALL | {"init": "prior"}, "both make the drafts"),
        ("gsd", SMALL | {"init": "prior"}, "both make the drafts"),
        ("lantern", SMALL | {"window": 4}, "the tree's depth is that of --branches"),
        ("lantern", {"branches": "2,2"}, "only a draft model draws a tree"),
        ("seeded", {"window": 0}, "expected 1 to 256"),
        ("seeded", {"window": -3}, "expected 1 to 256"),
        ("sjd", {"window": 257}, "expected 1 to 256, the codes of an image"),
        ("zipar", {"window": 17}, "expected 1 to 16, the codes of a row"),
        ("pac", {"window": "auto"}, "--window auto"),
        ("zipar", {"window": "auto"}, "--window auto"),
        ("kseq", SMALL | {"window": "auto"}, "--window auto"),
        ("seeded", SMALL | {"window": "auto"}, "--window auto"),
        ("sjd", {"init": "repeat_lft"}, "unknown initialiser"),
        ("rsd", SMALL | {"branches": "0"}, "--branches 0"),
        ("rsd", SMALL | {"branches": "3,0,2"}, "--branches 3,0,2"),
        ("rsd", SMALL | {"branches": "17"}, "--branches 17"),
        ("rsd", SMALL | {"branches": "16,16"}, "256 nodes"),
        ("rsd", SMALL | {"branches": ",".join(["16"] * 20)}, "256 nodes"),
        ("rsd", SMALL | {"branches": ",".join(["1"] * 256)}, "fewer levels than codes"),
        ("pac", {"width": 16, "levels": 8}, "more than 256 nodes"),
        ("lantern", {"delta": 0.0}, "not in (0, inf)"),
        ("lantern", {"delta": -1.0}, "not in (0, inf)"),
        ("lantern", {"delta": float("inf")}, "not in (0, inf)"),
        ("lantern", {"delta": float("nan")}, "not in (0, inf)"),
        ("lantern++", {"delta": 1.0}, "above 1"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_with_the_reason(name, given, said):
    with pytest.raises(ConfigError) as caught:
        settled(name, **given)
    assert said in caught.value.message and caught.value.hint, caught.value


@pytest.mark.parametrize(
    "given", [{"coupling": "both"}, {"width": 1}, {"levels": 1}, {"branches": "2;2"}, {"gain": 0}, {"tau": -1}, {"near": 0}, {"windw": 3}],
    ids=str,
)  # fmt: skip
def test_values_of_the_wrong_kind_are_refused_by_the_schema(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        VerifyConfig(**given)


def test_limits_are_inclusive():
    assert settled("sjd", window=256).window == 256 and settled("zipar", window=16).window == 16
    assert settled("rsd", **SMALL, branches="16,15").branches == "16,15"
    assert settled("lantern", delta=1.0).delta == 1.0 and settled("pac", width=16, levels=8, window=1).levels == 8


def test_a_draft_model_takes_the_place_of_first_guesses():
    options = settled("seeded", **SMALL)
    assert options.init is None and options.window == 16
    tree = settled("lantern", **SMALL)
    assert tree.init is None and tree.window is None and tree.branches == "3,2,1,1"
    assert isinstance(mode_generator("seeded", table_decoder(), **SMALL).method.drafter, DraftModel)
    assert isinstance(mode_generator("lantern", table_decoder(), **SMALL).method, DraftTree)


def test_settled_options_settle_to_themselves():
    for name, mode in MODES.items():
        options = settled(name, **(SMALL if mode.needs_draft else {}))
        assert settle(name, options, IMAGE) == options, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", list(MODES))
def test_every_mode_makes_images_of_the_embedded_teacher(name, device):
    """And the seeded one those of plain sampling."""
    options = {"draft_model": "llamagen-small"} if MODES[name].needs_draft else {}
    stack = build(StackConfig(model="llamagen", sampler=name, verify=options), device)
    request = stack.request(torch.arange(4), 3, torch.arange(4))
    codes = stack.generator.generate(request).codes_BL
    assert codes.shape == (4, 16) and codes.device.type == device and 0 <= int(codes.min()) <= int(codes.max()) < 256
    if name == "seeded":
        plain = build(StackConfig(model="llamagen"), device).generator.generate(request).codes_BL
        assert torch.equal(codes, plain)
