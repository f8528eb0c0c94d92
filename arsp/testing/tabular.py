"""A Decoder whose joint law can be written down: conditional tables p(x_i | x_<i) behind the ordinary protocol.

Any sampler runs on it unchanged and can be compared with the exact joint (``arsp.metrics.exact``). Public: authors of samplers
test theirs with it. The row of ``tables[i]`` for the context ``x_0..x_{i-1}`` is ``sum_k x_k V^(i-1-k)``; the joint is indexed alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arsp.errors import InputError
from arsp.protocols import Capabilities, Layout, Nodes, Request

_MAX_JOINT = 1 << 24


@dataclass
class TabularState:
    """Codes fed so far (row b holds ``lengths_B[b]`` of them) and how many a row may hold."""

    codes_BT: Tensor
    lengths_B: Tensor
    started: bool = False

    @property
    def capacity(self) -> int:
        return self.codes_BT.shape[1]


class TabularDecoder:
    """Raster decoder over L tokens of V codes from tables ``(V^i, V)``; rows may stand at different lengths and rewind.

    ``codebook_VE``: optional vectors of the codes, for flow maps and students. ``grid``: rows and columns (default: one row).
    Conditions of the request are ignored.
    """

    def __init__(self, tables: Sequence[Tensor], codebook_VE: Tensor | None = None, grid: tuple[int, int] | None = None):
        self.vocab_size = int(tables[0].shape[-1])
        for i, table in enumerate(tables):
            if tuple(table.shape) != (self.vocab_size**i, self.vocab_size):
                raise InputError(f"table {i}: shape {tuple(table.shape)}, expected {(self.vocab_size**i, self.vocab_size)}.")
        if self.vocab_size ** len(tables) > _MAX_JOINT:
            raise InputError(f"{self.vocab_size}^{len(tables)} sequences are too many to enumerate (limit {_MAX_JOINT}).")
        self.tables = [table.double() for table in tables]
        self.codebook_VE = codebook_VE
        self.layout = Layout.raster(*(grid or (1, len(tables))))
        if self.layout.num_tokens != len(tables):
            raise InputError(f"{len(tables)} tables do not fill a grid of {self.layout.grid}.")
        self.capabilities = Capabilities(order="raster", rewind=True, codebook=codebook_VE is not None)
        self._logits = [table.log().float() for table in self.tables]

    @property
    def joint(self) -> Tensor:
        """Exact probabilities of all ``V^L`` sequences, float64, sequence ``x`` at :func:`sequence_ids`."""
        joint = torch.ones(1, dtype=torch.float64)
        for table in self.tables:
            joint = (joint[:, None] * table).flatten()
        return joint

    @property
    def marginals(self) -> list[Tensor]:
        """The law ``(V,)`` of each position by itself, float64."""
        cube = self.joint.view((self.vocab_size,) * len(self.tables))
        return [cube.sum(dim=[k for k in range(cube.ndim) if k != i]) for i in range(cube.ndim)]

    @property
    def product_of_marginals(self) -> Tensor:
        """Joint law of independent draws from each position's marginal: what one step without noise can reach at best."""
        product = torch.ones(1, dtype=torch.float64)
        for marginal in self.marginals:
            product = (product[:, None] * marginal).flatten()
        return product

    def start(self, request: Request, capacity: int | None = None) -> TabularState:
        """Empty rows; ``capacity`` may exceed L (windows that look past the end get uniform laws there)."""
        device = request.sample_ids_B.device
        size = (request.batch_size, len(self.tables) - 1 if capacity is None else capacity)
        lengths_B = torch.zeros(request.batch_size, dtype=torch.int64, device=device)
        return TabularState(torch.zeros(size, dtype=torch.int64, device=device), lengths_B)

    def step(self, state: TabularState, codes_Bn: Tensor | None, nodes: Nodes | None = None) -> Tensor:
        """Append ``codes_Bn`` to each row at its own length, or put them where ``nodes`` say; logits of the position that follows each of
        them, on the first pass of position 0 before these."""
        columns = [] if state.started else [self._law_after(state.codes_BT, state.lengths_B)]
        state.started = True
        if nodes is not None:
            self._room(state, nodes.visible_BnT.shape[-1])
            state.codes_BT.scatter_(1, nodes.slots_Bn, codes_Bn)
            for node in range(codes_Bn.shape[1]):
                seen = nodes.visible_BnT[:, node]
                order = (~seen).to(torch.int64).sort(dim=1, stable=True).indices  # visible slots first, in order
                columns.append(self._law_after(state.codes_BT.gather(1, order), seen.sum(1)))
            return torch.stack(columns, dim=1)
        for code_B in codes_Bn.unbind(dim=1) if codes_Bn is not None else ():
            self._room(state, int(state.lengths_B.max()) + 1)
            state.codes_BT.scatter_(1, state.lengths_B[:, None], code_B[:, None])
            state.lengths_B = state.lengths_B + 1
            columns.append(self._law_after(state.codes_BT, state.lengths_B))
        return torch.stack(columns, dim=1)

    def _room(self, state: TabularState, tokens: int) -> None:
        if tokens > state.capacity:
            raise InputError(f"step: more than {state.capacity} tokens fed.", hint="give start() a larger capacity")

    def keep(self, state: TabularState, slots_Bk: Tensor, start_B: Tensor, count_B: Tensor) -> None:
        """The codes at the first ``count_B`` of these slots follow the first ``start_B`` codes of each row."""
        target = start_B[:, None] + torch.arange(slots_Bk.shape[1], device=slots_Bk.device)
        state.codes_BT.scatter_(1, target, state.codes_BT.gather(1, slots_Bk))
        state.lengths_B = start_B + count_B

    def rewind(self, state: TabularState, lengths_B: Tensor) -> None:
        """Forget the codes of row b at positions >= ``lengths_B[b]``."""
        state.lengths_B = torch.minimum(state.lengths_B, lengths_B.to(state.lengths_B))

    def select(self, state: TabularState, rows: Tensor) -> TabularState:
        """The state of a subset of rows."""
        return TabularState(state.codes_BT[rows], state.lengths_B[rows], state.started)

    def teacher_forced(self, request: Request, codes_BL: Tensor) -> Tensor:
        """``logits_BLV`` of every position given the true codes before it."""
        lengths = torch.zeros_like(codes_BL[:, 0])
        return torch.stack([self._law_after(codes_BL, lengths + i) for i in range(codes_BL.shape[1])], dim=1)

    def _law_after(self, codes_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Log-probabilities ``(B, V)`` of the token at position ``lengths_B``; uniform past the end."""
        logits = torch.zeros(len(lengths_B), self.vocab_size, device=codes_BT.device)
        for length in lengths_B.unique().tolist():
            if length < len(self.tables):
                rows = lengths_B == length
                context = sequence_ids(codes_BT[rows, :length], self.vocab_size)
                logits[rows] = self._logits[length].to(codes_BT.device)[context]
        return logits


def sequence_ids(codes_BL: Tensor, vocab_size: int) -> Tensor:
    """Index of each row in the joint: base-V number with the first code most significant."""
    index_B = torch.zeros(codes_BL.shape[0], dtype=torch.int64, device=codes_BL.device)
    for code_B in codes_BL.unbind(dim=1):
        index_B = index_B * vocab_size + code_B
    return index_B


def random_tables(vocab_size: int, length: int, seed: int, scale: float) -> list[Tensor]:
    """Softmax of Gaussian logits with standard deviation ``scale``, float64; a larger scale gives stronger dependence."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(vocab_size**i, vocab_size) for i in range(length)]
    return [torch.softmax(scale * torch.randn(size, dtype=torch.float64, generator=generator), dim=-1) for size in sizes]


def network_tables(vocab_size: int, length: int, seed: int, scale: float, width: int = 16) -> list[Tensor]:
    """Tables of random two-layer networks of the one-hot context: dependent like random tables, but sharing structure."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)
    tables = []
    for i in range(length):
        contexts = torch.arange(vocab_size**i)[:, None] // vocab_size ** torch.arange(i - 1, -1, -1) % vocab_size
        one_hot = torch.nn.functional.one_hot(contexts, vocab_size).double().flatten(1)
        hidden = torch.tanh(one_hot @ draw(vocab_size * i, width) + draw(width))
        tables.append(torch.softmax(scale / width**0.5 * (hidden @ draw(width, vocab_size)), dim=-1))
    return tables


def toy_teacher() -> TabularDecoder:
    """The enumerable teacher for distillation: 4 tokens, 8 codes of width 4 (std 0.7), 4096 sequences.

    Joint entropy 2.06 nats; independent draws from the marginals have total variation 0.51 to the joint.
    """
    codebook_VE = 0.7 * torch.randn(8, 4, generator=torch.Generator().manual_seed(2412))
    return TabularDecoder(network_tables(8, 4, seed=148, scale=6.0), codebook_VE, grid=(2, 2))
