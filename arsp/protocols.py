"""The seams of arsp: what flows between model, decoder, sampler, tokenizer and everything downstream. No logic here.

Shape legend of the whole project (suffix of tensor names):
``B`` batch, ``S`` steps, ``L`` tokens in the sequence, ``l``/``n``/``m`` tokens in one pass, ``C`` model width, ``H`` heads,
``D`` head width, ``V`` vocabulary, ``E`` codebook width, ``h w`` latent grid, ``P`` conditioning prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # torch is never imported by `arsp --help`
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Ordered partition of the L token positions into generation steps, plus the latent grid.

    ``blocks[s]`` holds the token positions made by step s: raster = L blocks of one position, next-scale = one block a scale.
    What a position may see follows from it: all positions of earlier blocks (and, inside a block, nothing but itself
    before it is known).
    """

    grid: tuple[int, int]
    blocks: tuple[tuple[int, ...], ...]

    @staticmethod
    def raster(height: int, width: int) -> Layout:
        return Layout((height, width), tuple((i,) for i in range(height * width)))

    @staticmethod
    def next_scale(sides: tuple[int, ...]) -> Layout:
        ends = [0, *itertools.accumulate(side * side for side in sides)]
        return Layout((sides[-1], sides[-1]), tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends)))

    @property
    def num_tokens(self) -> int:
        return sum(len(block) for block in self.blocks)

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of tokens known after each step."""
        return tuple(itertools.accumulate(len(block) for block in self.blocks))

    @property
    def is_raster(self) -> bool:
        return all(block == (i,) for i, block in enumerate(self.blocks))

    @property
    def order(self) -> str:
        """``raster`` or ``next-scale``, as :class:`Capabilities` name it."""
        return "raster" if self.is_raster else "next-scale"


@dataclass(frozen=True)
class Capabilities:
    """What a model offers, or what a method needs. Compared in ``arsp.stack`` before any weight is loaded."""

    order: str  # "raster" | "next-scale"
    conditions: frozenset[str] = frozenset({"class"})  # subset of {"class", "text"}
    rewind: bool = False  # Decoder.rewind works
    codebook: bool = False  # tokens are rows of a codebook of vectors
    teacher: bool = True  # an autoregressive model (False: a distilled few-step student)


@dataclass(frozen=True)
class Request:
    """What to generate: one row per image. Image i depends on ``(seed, sample_ids[i])`` and its condition only."""

    sample_ids_B: Tensor  # int64
    seed: int
    labels_B: Tensor | None = None  # int64, class-conditional
    captions_BPE: Tensor | None = None  # float, text-conditional: left-padded encoder features
    caption_mask_BP: Tensor | None = None  # bool, True = real caption token

    @property
    def batch_size(self) -> int:
        return int(self.sample_ids_B.shape[0])

    def rows(self, index: Any) -> Request:
        """The request of a subset of rows (slice or index tensor)."""
        pick = lambda x: None if x is None else x[index]  # noqa: E731
        return replace(
            self, sample_ids_B=self.sample_ids_B[index], labels_B=pick(self.labels_B),
            captions_BPE=pick(self.captions_BPE), caption_mask_BP=pick(self.caption_mask_BP),
        )  # fmt: skip


@dataclass
class Generation:
    """What a Generator returns: codes, optionally the continuous embeddings to decode instead, and counters."""

    codes_BL: Tensor  # int64
    embeddings_BLE: Tensor | None = None  # set by few-step students whose tail stays continuous
    stats: dict[str, float] = field(default_factory=dict)  # passes, teacher_passes, kv_bytes, ...


@dataclass(frozen=True)
class Nodes:
    """Where the codes of a pass stand when they do not follow one another: the nodes of a tree, or several rows of an image at once.

    Slots and positions count codes, the condition before them not included. ``visible_BnT``: the slots that each code sees, itself
    included.
    """

    slots_Bn: Tensor  # int64, where keys and values are stored
    positions_Bn: Tensor  # int64, which position of the sequence the code stands at
    visible_BnT: Tensor  # bool


@runtime_checkable
class Decoder(Protocol):
    """An autoregressive model bound to its guidance; the only thing a sampler sees. All logits are *guided*, float32."""

    layout: Layout
    capabilities: Capabilities
    vocab_size: int

    def start(self, request: Request, capacity: int | None = None) -> Any:
        """A State with ``lengths_B == 0``; ``capacity`` = most tokens that will be fed (default: all but the last)."""

    def step(self, state: Any, codes_Bn: Tensor | None) -> Tensor:
        """Feed n known tokens a row and return ``logits_BmV`` of the positions that became predictable: raster gives m = n, one more
        on the first pass, which feeds the condition too (None: nothing else); next-scale gives the whole next scale. A decoder that
        rewinds also takes ``nodes``: tokens that do not follow one another."""

    def rewind(self, state: Any, lengths_B: Tensor) -> None:
        """Forget every token of row b at positions >= ``lengths_B[b]``. They may lie on the CPU, as may the rows of :meth:`select`: then no
        decoder has to read them from the device."""

    def keep(self, state: Any, slots_Bk: Tensor, start_B: Tensor, count_B: Tensor) -> None:
        """After a pass with nodes (of a decoder that rewinds): the tokens at the first ``count_B[b]`` of these slots become positions
        ``start_B[b]`` and on, and everything else behind ``start_B`` is forgotten."""

    def select(self, state: Any, rows: Tensor) -> Any:
        """Keep only these rows (batch compaction)."""

    def teacher_forced(self, request: Request, codes_BL: Tensor) -> Tensor:
        """``logits_BLV``: position i predicted from the true tokens before it."""


@runtime_checkable
class Generator(Protocol):
    """Anything that turns a Request into codes: a sampler bound to a Decoder, or a distilled student."""

    capabilities: Capabilities

    def generate(self, request: Request, callback: Callable[[int], None] | None = None) -> Generation: ...


@runtime_checkable
class Tokenizer(Protocol):
    """Codes <-> pixels. ``codebook_VE`` is what the decoder network sees for each code (already normalised)."""

    grid: tuple[int, int]
    codebook_VE: Tensor

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> ``codes_BL`` int64."""

    def decode_codes(self, codes_BL: Tensor) -> Tensor:
        """``codes_BL`` -> pixels about [-1, 1], not clamped."""

    def decode_embeddings(self, embeddings_BLE: Tensor) -> Tensor:
        """Continuous latent vectors -> pixels about [-1, 1], not clamped."""


class Drafter(Protocol):
    """Plug point of the verify family: guesses codes and records the law they were drawn from. ``begin(request)`` and ``select(rows)``
    are called where they exist."""

    def fill(self, tape: Any, stop_B: Tensor) -> None:
        """Drafts for every position of :class:`arsp.decode.drafts.Tape` up to ``stop_B``."""


class AcceptanceRule(Protocol):
    """Plug point of the verify family: how likely a draft is to stand."""

    exactness: str  # "exact" | "bounded(delta)" | "lossy"

    def ratio(self, law: Any, log_p_Bm: Tensor, tape: Any, positions_Bm: Tensor, drafts_Bm: Tensor) -> Tensor:
        """What the uniform number of each draft has to be below, ``(B, m)``; ``law`` is the target, ``log_p_Bm`` that of the drafts."""


class Transform(Protocol):
    """Module tree in, module tree out (quantisation, head compression, checkpoint merging)."""

    name: str

    def apply(self, model: Any) -> Any: ...


class ComputePolicy(Protocol):
    """What every attention layer calls. Dense attention is the default; windows, sharing and cache compression are others."""

    simulated: bool  # True when saved work is only masked, not skipped

    def attend(self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, layer: int, ctx: Any) -> Tensor:
        """Store the new keys and values where ``ctx`` says and return the attention output ``(B, H, n, D)``."""
