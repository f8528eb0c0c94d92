"""The modes of the verify family by name: what each promises, which options it takes, and how it is put together."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from arsp.config import StrictModel
from arsp.decode.accept import ExactRule, GroupRule, LanternRule
from arsp.decode.drafts import INITIALISERS, DraftModel, Initialiser, NGrams
from arsp.decode.filters import LogitsPipeline
from arsp.decode.jacobi import Chain, JacobiGenerator, Redraw
from arsp.decode.trees import DraftTree, LanternTree, Proactive, Sequential, TreeShape, WithoutReplacement
from arsp.decode.zipar import ZipARGenerator
from arsp.errors import ConfigError, nearest
from arsp.protocols import Decoder, Generator, Layout
from arsp.rng import Purpose
from arsp.tokenizers.geometry import CodebookGeometry


class VerifyConfig(StrictModel):
    """Options of the verify family; None: the mode's own default. A mode refuses the options that it has no use for."""

    window: int | Literal["auto"] | None = Field(None, description="drafts a pass, or auto: what the measured times and acceptance favour")
    init: str | None = Field(None, description=f"first guesses: {', '.join(INITIALISERS)}")
    draft_model: str | None = Field(None, description="smaller model of the same tokenizer that makes the drafts")
    coupling: Literal["maximal", "gumbel"] | None = Field(None, description="of redrawn drafts (mc)")
    width: int | None = Field(None, ge=2, le=16, description="siblings in the tree (pac) or independent drafts (kseq)")
    levels: int | None = Field(None, ge=2, le=8, description="levels of the tree (pac)")
    branches: str | None = Field(None, pattern=r"^\d+(,\d+)*$", description="drafts by depth, e.g. 3,2,1 (rsd; lantern with a draft model)")
    gain: float | None = Field(None, gt=0, le=100, description="exponent of rising probabilities (vp)")
    tau: float | None = Field(None, gt=0, allow_inf_nan=False, description="a draft whose ratio is above it is kept (reuse)")
    delta: float | None = Field(
        None, description="mass that a draft may borrow (lantern); above 1: lambda, it may grow to so many times its own (lantern++)"
    )
    distance: float | None = Field(None, gt=0, description="squared embedding distance within a group (gsd)")
    near: int | None = Field(None, ge=1, description="codes that may lend: 1000, at most a sixteenth of all (lantern)")


@dataclass
class Parts:
    """What a mode is put together from. ``draft`` and ``prior`` are there where the options ask for them."""

    decoder: Decoder
    pipeline: LogitsPipeline
    codebook_VE: Tensor | None = None
    embedding_VC: Tensor | None = None
    draft: Decoder | None = None
    prior_YLV: Tensor | None = None
    ngrams: NGrams | None = None
    planner: Callable[[Any], Any] | None = None  # request -> WindowPlanner, of window auto


@dataclass(frozen=True)
class Mode:
    """``exactness``: exact, bounded(delta) or lossy. ``options``: those it takes beside the window; ``defaults`` of them."""

    name: str
    exactness: str
    summary: str
    options: frozenset[str]
    defaults: dict[str, Any]
    make: Callable[[Parts, VerifyConfig], Any] = field(repr=False)
    needs_draft: bool = False
    window: str = "drafts"  # what it means: drafts a pass, codes of a row (zipar), nothing (rsd: the branches say it)


def _drafter(parts: Parts, options: VerifyConfig, purpose: Purpose) -> Any:
    if parts.draft is not None:
        return DraftModel(parts.draft, parts.pipeline, Purpose.TOKEN if purpose == Purpose.TOKEN else Purpose.DRAFT)
    return _initialiser(parts, options, purpose)


def _initialiser(parts: Parts, options: VerifyConfig, purpose: Purpose = Purpose.INIT) -> Initialiser:
    return Initialiser(options.init, parts.decoder.layout.grid[1], purpose, parts.ngrams)


def _chain(rule: Callable[[Parts, VerifyConfig], Any], redraw: Callable[[VerifyConfig], Redraw]) -> Callable[[Parts, VerifyConfig], Chain]:
    def make(parts: Parts, options: VerifyConfig) -> Chain:
        drafter = _drafter(parts, options, Purpose.INIT)
        return Chain(parts.pipeline, drafter, rule(parts, options), None if parts.draft else redraw(options), parts.prior_YLV)

    return make


def _seeded(parts: Parts, options: VerifyConfig) -> Chain:
    return Chain(parts.pipeline, _drafter(parts, options, Purpose.TOKEN), prior_YLV=parts.prior_YLV)


def _exact(parts: Parts, options: VerifyConfig) -> ExactRule:
    return ExactRule()


def _lantern(parts: Parts, options: VerifyConfig) -> Any:
    tree = parts.draft is not None
    lenders = options.near or max(1, min(1000, len(parts.codebook_VE) // 16))
    near = CodebookGeometry(parts.codebook_VE).nearest(lenders + tree).to(parts.codebook_VE.device)
    if not tree:
        return Chain(parts.pipeline, _initialiser(parts, options), LanternRule(near, options.delta), Redraw(), parts.prior_YLV)
    return DraftTree(parts.pipeline, parts.draft, _branching(options), LanternTree(near, options.delta, lenders))


def _branching(options: VerifyConfig) -> TreeShape:
    return TreeShape.branching([int(width) for width in options.branches.split(",")])


def _pac(parts: Parts, options: VerifyConfig) -> Proactive:
    window = min(options.window, parts.decoder.layout.num_tokens - 1)
    return Proactive(parts.pipeline, window, _initialiser(parts, options), options.width, options.levels, parts.prior_YLV)


def _kseq(parts: Parts, options: VerifyConfig) -> DraftTree:
    window = min(options.window, parts.decoder.layout.num_tokens - 1)
    return DraftTree(parts.pipeline, parts.draft, TreeShape.chains(options.width, window), Sequential())


def _rsd(parts: Parts, options: VerifyConfig) -> DraftTree:
    return DraftTree(parts.pipeline, parts.draft, _branching(options), WithoutReplacement())


def _fresh(options: VerifyConfig) -> Redraw:
    return Redraw()


MOST_NODES = 256  # of a tree of drafts
_START = {"window": 16, "init": "random_uniform"}
_DRAFTED = {"window": 4}

MODES = {
    mode.name: mode
    for mode in (
        Mode("seeded", "exact", "fixed point of keyed draws: the codes of arsp sample for the same seed",
             frozenset({"init", "draft_model"}), _START, _seeded),
        Mode("sjd", "exact", "speculative Jacobi decoding (arXiv 2410.01699)",
             frozenset({"init"}), _START, _chain(_exact, _fresh)),
        Mode("mc", "exact", "redrawn drafts coupled to the old ones (MC-SJD, arXiv 2510.24211)",
             frozenset({"init", "coupling"}), _START | {"coupling": "maximal"}, _chain(_exact, lambda options: Redraw(options.coupling))),
        Mode("pac", "exact", "coupled drafts and a tree behind the last known code (SJD-PAC, arXiv 2603.18599)",
             frozenset({"init", "width", "levels"}), _START | {"width": 3, "levels": 3}, _pac),
        Mode("vp", "exact", "drafts from rising probabilities (after arXiv 2603.27115)",
             frozenset({"init", "gain"}), _START | {"gain": 1.0}, _chain(_exact, lambda options: Redraw("rising", gain=options.gain))),
        Mode("draft-model", "exact", "speculative decoding with a smaller model (arXiv 2211.17192)",
             frozenset({"draft_model"}), _DRAFTED, _chain(_exact, _fresh), needs_draft=True),
        Mode("kseq", "exact", "several independent drafts of a smaller model (SpecTr, arXiv 2310.15141)",
             frozenset({"draft_model", "width"}), _DRAFTED | {"width": 3}, _kseq, needs_draft=True),
        Mode("rsd", "exact", "a tree of a smaller model's drafts, recursive rejection without replacement",
             frozenset({"draft_model", "branches"}), {"branches": "3,2,1,1"}, _rsd, needs_draft=True, window=""),
        Mode("gsd", "lossy", "ratios of groups of codes (GSD, arXiv 2508.07747)",
             frozenset({"init", "draft_model", "distance"}), _START | {"distance": 0.5},
             _chain(lambda parts, options: GroupRule(parts.embedding_VC, e_distance=options.distance), _fresh)),
        Mode("lantern", "bounded(delta)", "drafts borrow probability of near codes (LANTERN, arXiv 2410.03355)",
             frozenset({"init", "draft_model", "branches", "delta", "near"}), _START | {"delta": 0.1}, _lantern),
        Mode("lantern++", "bounded(delta)", "the same, relative to the draft's own probability (arXiv 2502.06352)",
             frozenset({"init", "draft_model", "branches", "delta", "near"}), _START | {"delta": 2.0}, _lantern),
        Mode("reuse", "lossy", "likely drafts are kept as they are (after SJD++, arXiv 2512.07503)",
             frozenset({"init", "tau"}), _START | {"tau": 0.5}, _chain(_exact, lambda options: Redraw("reuse", tau=options.tau))),
        Mode("zipar", "lossy", "rows of the image in parallel (arXiv 2412.04062)",
             frozenset(), {"window": 2}, lambda parts, options: ZipARGenerator(parts.decoder, parts.pipeline, options.window),
             window="codes of a row"),
    )
}  # fmt: skip


def settle(name: str, given: VerifyConfig, layout: Layout) -> VerifyConfig:
    """The options of a mode with its defaults filled in. ConfigError: unknown mode, an option without use, a value out of range."""
    if name not in MODES:
        raise ConfigError(f"--mode {name}: unknown mode.", nearest(name, MODES))
    mode = MODES[name]
    takes = mode.options | ({"window"} if mode.window else set())
    useless = [option for option, value in given if value is not None and option not in takes]
    if useless:
        raise ConfigError(f"{_flags(useless)}: no effect in mode {name}.", f"It takes: {_flags(sorted(takes))}.")
    tree = given.draft_model is not None and "branches" in mode.options
    if given.draft_model is not None:
        if given.init is not None:
            raise ConfigError("--init and --draft-model both make the drafts.", "Drop one of the two.")
        if tree and given.window is not None:
            raise ConfigError("--window: with a draft model the tree's depth is that of --branches.", "Drop --window.")
    elif mode.needs_draft:
        raise ConfigError(f"--mode {name} needs a smaller model of the same tokenizer.", "For example --draft-model llamagen-small.")
    elif given.branches is not None:
        raise ConfigError("--branches: only a draft model draws a tree.", "Give --draft-model, or drop it.")
    defaults = dict(mode.defaults)
    if given.draft_model is not None:
        defaults |= {"init": None} | ({"branches": "3,2,1,1", "window": None} if tree else {})
    if defaults.get("window"):
        defaults["window"] = min(defaults["window"], _room(mode, layout)[0])
    if "branches" in defaults:  # on a small grid: the levels that there are drafts for
        defaults["branches"] = ",".join(defaults["branches"].split(",")[: max(1, layout.num_tokens - 1)])
    options = given.model_copy(update={key: value for key, value in defaults.items() if getattr(given, key) is None})
    _check(mode, options, layout)
    return options


def _check(mode: Mode, options: VerifyConfig, layout: Layout) -> None:
    if options.window == "auto":
        if options.draft_model or mode.name in ("pac", "kseq", "zipar"):
            raise ConfigError("--window auto: it plans windows of Jacobi drafts only, and here a tree or a draft model costs time too.",
                              "Give a number.")  # fmt: skip
    elif options.window is not None:
        most, unit = _room(mode, layout)
        if not 1 <= options.window <= most:
            raise ConfigError(f"--window {options.window}: expected 1 to {most}, the codes of {unit}.",
                              "Give a number in this range, or auto.")  # fmt: skip
    if options.init is not None:
        Initialiser(options.init, 1)
    if options.branches is not None:
        widths = [int(width) for width in options.branches.split(",")]
        if not 0 < _nodes(widths) <= MOST_NODES or max(widths) > 16 or len(widths) >= layout.num_tokens:
            raise ConfigError(
                f"--branches {options.branches}: expected 1 to 16 drafts a level, fewer levels than codes, {MOST_NODES} nodes in all.",
                "For example 3,2,1.",
            )
    if options.levels is not None and _nodes([options.width] * (min(options.levels, options.window + 1) - 1)) > MOST_NODES:
        raise ConfigError(
            f"--width {options.width} --levels {options.levels}: the tree has more than {MOST_NODES} nodes.", "Make one of them smaller."
        )
    if options.delta is not None:
        if not 0 < options.delta < float("inf"):
            raise ConfigError(f"--delta {options.delta}: not in (0, inf).", "Up to 1 it is LANTERN's delta, above 1 LANTERN++'s lambda.")
        if mode.name == "lantern++" and options.delta <= 1:
            raise ConfigError(f"--delta {options.delta}: lantern++ takes its lambda, above 1.", "Use --mode lantern for a bound up to 1.")


def _room(mode: Mode, layout: Layout) -> tuple[int, str]:
    """The widest window, and what has so many codes."""
    return (layout.grid[1], "a row") if mode.name == "zipar" else (layout.num_tokens, "an image")


def _nodes(widths: list[int]) -> int:
    """Of a tree with so many children a node by level; 0 where a level has none."""
    return sum(itertools.accumulate(widths, operator.mul)) if all(widths) else 0


def _flags(names: Any) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def build_mode(name: str, parts: Parts, options: VerifyConfig) -> Generator:
    """A Generator with ``exactness`` and ``statistics`` from settled options."""
    made = MODES[name].make(parts, options)
    if isinstance(made, ZipARGenerator):
        return made
    window = parts.planner if options.window == "auto" else options.window or 0
    return JacobiGenerator(parts.decoder, made, window)
