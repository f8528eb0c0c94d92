"""What a quantisation does, as a strict configuration, and the recipes known by name. Reads no weights."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from arsp.config import StrictModel
from arsp.errors import ConfigError, nearest

KEPT = (  # read by a table look-up, a few numbers wide, or run once an image
    "tok_embeddings", "word_embed", "cls_embedding.*", "head_nm.*", "final_layer_conti.*", "layerwise_n_d_embed.*",
)  # fmt: skip
HEADS = {"output": (8, -1), "head": (8, -1)}  # what is wrong here is wrong in every code's probability
GROUP_SIZES = (-1, 32, 64, 128)


def _group(size: int) -> int:
    if size not in GROUP_SIZES:
        raise ValueError("group sizes are 32, 64, 128, or -1 for one scale per output")
    return size


GroupSize = Annotated[int, AfterValidator(_group)]


class WeightConfig(StrictModel):
    """Codes of the weights."""

    bits: Literal[4, 8] = Field(4, description="4: asymmetric, by group; 8: symmetric, one scale an output")
    group_size: GroupSize = Field(64, description="inputs that share a scale at 4 bits: 32, 64, 128, or -1 for all of them")
    rounding: Literal["nearest", "gptq", "awq"] = Field("nearest", description="gptq (arXiv 2210.17323), awq (arXiv 2306.00978)")
    search: Literal["min_max", "mse"] = Field("min_max", description="range of a group: its extremes, or the one of least squared error")
    damp: float = Field(0.01, gt=0, description="gptq: share of the mean of the diagonal that is added to it")
    act_order: bool = Field(False, description="gptq: columns of large inputs first")


class ActivationConfig(StrictModel):
    """Codes of what enters a layer, always 8 bits."""

    scales: Literal["dynamic", "static"] = Field(
        "dynamic", description="dynamic: of every token; static: of every scale of a next-scale model, from calibration"
    )
    shift_gelu: bool = Field(True, description="values behind a GELU in unsigned codes above -0.17 (not where they are balanced)")


class BalanceConfig(StrictModel):
    """Outliers of the inputs are moved out of the way before both sides are quantised (arXiv 2406.02540, 2404.00456)."""

    alpha: float | None = Field(None, ge=0, le=1, description="exponent of the inputs' ranges in the channel scales (None: no scaling)")
    rotate: bool = Field(False, description="block Hadamard rotation of the inputs, behind the scaling")
    layers: list[str] = Field(["*"], description="patterns of the layers that are balanced")


class LayerConfig(StrictModel):
    """Which linear layers, by patterns of their qualified names."""

    only: list[str] = Field(["*"], min_length=1, description="patterns of the layers to quantise")
    keep: list[str] = Field(list(KEPT), description="patterns of the layers that stay as they are")
    formats: dict[str, tuple[Literal[4, 8], GroupSize]] = Field(
        HEADS, description="other formats, pattern: [bits, group size]; the first that fits counts"
    )


class CalibrationConfig(StrictModel):
    """What the model runs on while it is looked at."""

    num: int = Field(64, ge=1, description="samples; the model's own, classes in turn, unless a source is given")
    batch_size: int = Field(16, ge=1)
    seed: int = Field(2_000_003, ge=0, description="not the default of other commands, so these samples are not evaluated")
    source: str | None = Field(None, description="folder of images to use in their place (of a teacher)")
    check: int = Field(128, ge=1, description="further samples for the comparison with the unquantised model")


class BudgetConfig(StrictModel):
    """Mixed precision: the bits of each layer by an integer programme (MixDQ, arXiv 2405.17873)."""

    size: str | None = Field(None, description="0.3x (of the layers' bytes in 16 bits, or of their time), 40MB, or 2ms; None: no mixing")
    of: Literal["bytes", "latency"] = "bytes"
    rows: int = Field(2, ge=1, description="rows of a pass where the budget is a latency")
    choices: list[tuple[Literal[4, 8], GroupSize]] = Field([(4, 128), (4, 32), (8, -1)], min_length=2, description="(bits, group size)")
    score: Literal["kl", "sqnr", "decoupled"] = Field(
        "kl", description="what a layer costs in quality; decoupled: sqnr of attention, kl of feed-forward layers, split by a sweep"
    )
    sweep: int = Field(10, ge=1, description="decoupled: ratios of mean bits that are tried")

    @model_validator(mode="after")
    def _size_and_kind_agree(self) -> BudgetConfig:
        if self.size is not None:
            parse_budget(self.size, self.of)
        return self


class Recipe(StrictModel):
    """All of a quantisation but the model."""

    weights: WeightConfig = WeightConfig()
    activations: ActivationConfig = ActivationConfig()
    balance: BalanceConfig = BalanceConfig()
    layers: LayerConfig = LayerConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    budget: BudgetConfig = BudgetConfig()
    simulate: Literal["litevar", "tensor"] | None = Field(
        None, description="round in floating point, nothing gets smaller or faster: litevar (arXiv 2411.17178), tensor (one scale a tensor)"
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        if self.activations.scales == "static" and self.balance.rotate:
            raise ValueError("activations.scales static: the range of a rotated input is not known from that of its channels")
        if self.weights.rounding == "awq" and self.balance.alpha is not None:
            raise ValueError("weights.rounding awq finds channel scales of its own: drop balance.alpha")
        plain = self.weights.rounding == "nearest" and self.balance == BalanceConfig() and self.activations == ActivationConfig()
        if self.simulate and not (plain and self.budget.size is None):
            raise ValueError(f"simulate: {self.simulate} rounds to nearest, without balancing, static scales or a budget")
        return self

    @property
    def needs_inputs(self) -> bool:
        """Whether the codes depend on what enters the layers."""
        return self.weights.rounding != "nearest" or self.balance.alpha is not None or self.activations.scales == "static"


_ROTATED = {"balance": {"rotate": True}}
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"weights": {"bits": 8}, **_ROTATED},
    "w4a8": {"weights": {"search": "mse"}, **_ROTATED},
    "w4a8-gptq": {"weights": {"rounding": "gptq", "search": "mse", "act_order": True}, **_ROTATED},
    "w4a8-awq": {"weights": {"rounding": "awq"}},
    "vidit-q": {"balance": {"alpha": 0.3, "rotate": True}},
    "mixdq": {"weights": {"search": "mse"}, "budget": {"size": "0.3x", "score": "decoupled"}, **_ROTATED},
    "litevar": {"simulate": "litevar", "layers": {"keep": [*KEPT, "*.fc2"], "formats": {}}},
}


def recipe_card(name: str) -> dict[str, Any]:
    """The values of a recipe. ConfigError for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe '{name}'.", nearest(name, RECIPES))
    return RECIPES[name]


def parse_budget(text: str, of: str) -> tuple[float, str]:
    """``0.3x`` -> (0.3, "x"), ``40MB`` -> (4e7, "bytes"), ``2ms`` -> (2000, "us"). ValueError for anything else, or of another kind."""
    units = {"x": (1, "x"), "KB": (1e3, "bytes"), "MB": (1e6, "bytes"), "GB": (1e9, "bytes"), "us": (1, "us"), "ms": (1e3, "us")}
    found = re.fullmatch(rf"\s*(\d+(?:\.\d*)?|\.\d+)\s*({'|'.join(units)})\s*", text)
    factor, unit = units[found[2]] if found else (0, "")
    if not found or float(found[1]) <= 0 or unit not in ("x", {"bytes": "bytes", "latency": "us"}[of]):
        kinds = "0.3x, 500KB, 40MB or 2GB" if of == "bytes" else "0.5x, 800us or 2ms"
        raise ValueError(f"a budget of {of} is written {kinds}, not '{text}'")
    return float(found[1]) * factor, unit


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a qualified name fits one of the patterns (``*`` also across dots)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
