"""Trees of drafts: several guesses a position, checked in one pass, each code seeing its own ancestors.

Where all guesses of a group are rejected the code comes from what is left of the law, so the output is exact for every rule here but
LANTERN's. After a pass the cache entries of the accepted path move to the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from arsp.decode.accept import LanternRule, residual
from arsp.decode.drafts import Initialiser, Tape
from arsp.decode.filters import LogitsPipeline
from arsp.decode.jacobi import Advance, Redraw
from arsp.decode.law import Law
from arsp.protocols import Decoder, Nodes, Request
from arsp.rng import Purpose, keyed_gumbel, keyed_uniform


@dataclass(frozen=True)
class TreeShape:
    """Nodes in level order. ``parents``: node -> parent, -1 for children of the root (the last known code)."""

    parents: tuple[int, ...]
    depths: tuple[int, ...] = field(init=False)  # 1 for children of the root

    def __post_init__(self) -> None:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        object.__setattr__(self, "depths", tuple(depths))

    @staticmethod
    def branching(widths: Sequence[int]) -> TreeShape:
        """Every node of level d has ``widths[d]`` children."""
        parents, level = [], [-1]
        for width in widths:
            parents += [node for node in level for _ in range(width)]
            level = list(range(len(parents) - len(level) * width, len(parents)))
        return TreeShape(tuple(parents))

    @staticmethod
    def chains(num: int, depth: int) -> TreeShape:
        """``num`` chains from the root."""
        return TreeShape(tuple(-1 if level == 0 else (level - 1) * num + chain for level in range(depth) for chain in range(num)))

    @staticmethod
    def proactive(width: int, levels: int, length: int) -> TreeShape:
        """A tree of ``levels`` levels, the root's included, whose first leaf goes on as a chain to depth ``length`` (arXiv 2603.18599)."""
        parents = list(TreeShape.branching([width] * (levels - 1)).parents)
        last = len(parents) - width ** (levels - 1) if levels > 1 else -1
        for _ in range(length - (levels - 1)):
            parents.append(last)
            last = len(parents) - 1
        return TreeShape(tuple(parents))

    @cached_property
    def depth(self) -> int:
        return max(self.depths)

    def children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def level(self, depth: int) -> list[int]:
        return [node for node, own in enumerate(self.depths) if own == depth]

    @cached_property
    def spine(self) -> list[int]:
        """The first child of the first child and so on."""
        nodes, children = [], self.children(-1)
        while children:
            nodes.append(children[0])
            children = self.children(children[0])
        return nodes

    @cached_property
    def child_table(self) -> Tensor:
        """``(1 + nodes, widest)``: children of the root and of every node as indices into the codes of a pass (root 0, node i at i + 1),
        -1 where there are fewer."""
        groups = [self.children(node) for node in range(-1, len(self.parents))]
        widest = max(len(group) for group in groups)
        return torch.tensor([[child + 1 for child in group] + [-1] * (widest - len(group)) for group in groups])

    @cached_property
    def ancestors(self) -> Tensor:
        """Boolean ``(nodes, nodes)``: column is the row itself or above it."""
        table = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                table[node] |= table[parent]
        return table


def place(shape: TreeShape, tape: Tape, nodes: Sequence[int]) -> Nodes:
    """Where these nodes stand in cache and sequence: node i behind the known codes of its row."""
    known = tape.known_B[:, None]
    device = known.device
    index, depths = torch.tensor(nodes, device=device), torch.tensor([shape.depths[node] for node in nodes], device=device)
    slots = torch.arange(int(known.max()) + len(shape.parents), device=device)
    behind = slots - known  # which node a slot holds, by row
    above = shape.ancestors.to(device)[index]
    inside = (behind >= 0) & (behind < len(shape.parents))
    sees = above[:, behind.clamp(0, len(shape.parents) - 1)].transpose(0, 1) & inside[:, None]
    return Nodes(known + index, (known - 1 + depths).clamp_max(tape.length - 1), sees | (behind < 0)[:, None])


def feed_tree(decoder: Decoder, state: Any, tape: Tape, shape: TreeShape, codes_Bn: Tensor) -> Tensor:
    """One pass over the last known code (the condition, at first) and all nodes: logits ``(B, 1 + nodes, V)`` of what follows each."""
    nodes = place(shape, tape, range(len(shape.parents)))
    if tape.passes:
        root = tape.known_B[:, None] - 1
        slots = torch.arange(nodes.visible_BnT.shape[-1], device=root.device)
        nodes = Nodes(
            torch.cat((root, nodes.slots_Bn), 1), torch.cat((root, nodes.positions_Bn), 1),
            torch.cat(((slots <= root)[:, None], nodes.visible_BnT), 1),
        )  # fmt: skip
        codes_Bn = torch.cat((tape.codes_BL.gather(1, root), codes_Bn), 1)
    return decoder.step(state, codes_Bn, nodes)


class WithoutReplacement:
    """Recursive rejection: siblings drawn without replacement from q are tried in turn, each against what the former have left over."""

    exactness, siblings = "exact", "without"

    def choose(self, p_BV: Tensor, q_BV: Tensor, codes_BK: Tensor, valid_BK: Tensor, uniform_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the accepted sibling (-1: none) and the law ``(B, V)`` of the code otherwise."""
        chosen = torch.full_like(codes_BK[:, 0], -1)
        for k in range(codes_BK.shape[1]):
            code = codes_BK[:, k : k + 1]
            p, q = p_BV.gather(1, code).squeeze(1), q_BV.gather(1, code).squeeze(1)
            trying = valid_BK[:, k] & (chosen < 0) & (q > 0)
            taken = trying & (uniform_BK[:, k] * q < p)
            chosen = torch.where(taken, k, chosen)
            failed = (trying & ~taken)[:, None]
            p_BV = torch.where(failed, residual(p_BV, q_BV), p_BV)
            rest = q_BV.scatter(1, code, 0.0)
            q_BV = torch.where(failed, rest / rest.sum(1, keepdim=True).clamp_min(1e-38), q_BV)
        return chosen, p_BV


class Sequential:
    """k-sequential selection of SpecTr (arXiv 2310.15141): independent siblings, each accepted with probability min(1, p / (rho q))."""

    exactness, siblings = "exact", "independent"

    def choose(self, p_BV: Tensor, q_BV: Tensor, codes_BK: Tensor, valid_BK: Tensor, uniform_BK: Tensor) -> tuple[Tensor, Tensor]:
        num = valid_BK.sum(1, keepdim=True).double()
        rho = self.rho(p_BV, q_BV, num)
        common = torch.minimum(p_BV / rho, q_BV)
        beta = common.sum(1, keepdim=True)
        accepted = 1 - (1 - beta) ** num
        p, q = p_BV.gather(1, codes_BK), q_BV.gather(1, codes_BK)
        taken = valid_BK & (uniform_BK * rho * q < p)
        chosen = torch.where(taken.any(1), taken.to(torch.int8).argmax(1), -1)
        rest = (p_BV - common * accepted / beta.clamp_min(1e-38)).clamp_min(0)
        mass = rest.sum(1, keepdim=True)
        return chosen, torch.where(mass > 1e-12, rest / mass.clamp_min(1e-12), p_BV).float()

    @staticmethod
    def rho(p_BV: Tensor, q_BV: Tensor, num_B1: Tensor) -> Tensor:
        """The rho in [1, k] with ``1 - (1 - b)^k = rho b``, ``b = sum min(p / rho, q)``, by bisection: ``(B, 1)`` float64."""
        p, q = p_BV.double(), q_BV.double()
        low, high = torch.ones_like(num_B1), num_B1.clamp_min(1)
        for _ in range(40):
            middle = (low + high) / 2
            beta = torch.minimum(p / middle, q).sum(1, keepdim=True)
            above = 1 - (1 - beta) ** num_B1 > middle * beta
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return high  # on this side no code is accepted more often than p allows


class LanternTree(LanternRule):
    """The dynamic-tree rule of LANTERN: a sibling is accepted with its relaxed probability; a rejected one is removed, with its K nearest
    codes where any of them lent. ``lenders``: how many of the K may. Siblings are the drafter's likeliest codes, not draws.

    note: the release removes one more than may lend.
    """

    siblings = "top"

    def __init__(self, nearest_VK: Tensor, bound: float, lenders: int):
        super().__init__(nearest_VK, bound)
        self.lenders = lenders

    def choose(self, p_BV: Tensor, q_BV: Tensor, codes_BK: Tensor, valid_BK: Tensor, uniform_BK: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.full_like(codes_BK[:, 0], -1)
        for k in range(codes_BK.shape[1]):
            code = codes_BK[:, k : k + 1]
            near = self.nearest[code.squeeze(1)].long()
            p = p_BV.gather(1, code).squeeze(1)
            added, count = self.borrowed(p, p_BV.gather(1, near[:, : self.lenders]))
            repeated = ((codes_BK[:, :k] == code) & valid_BK[:, :k]).any(1)
            trying = valid_BK[:, k] & (chosen < 0) & ~repeated
            taken = trying & (uniform_BK[:, k] <= p + added)
            chosen = torch.where(taken, k, chosen)
            rest = p_BV.scatter(1, code, 0.0)
            rest = torch.where((count > 0)[:, None], rest.scatter(1, near, 0.0), rest)
            mass = rest.sum(1, keepdim=True)
            rest = torch.where(mass > 0, rest / mass.clamp_min(1e-38), 1.0 / rest.shape[1])
            p_BV = torch.where((trying & ~taken)[:, None], rest, p_BV)
        return chosen, p_BV


@dataclass(frozen=True)
class Walk:
    """The accepted path of each row: ``nodes_BD`` (-1 behind its end), how many, and the code behind it."""

    nodes_BD: Tensor
    count_B: Tensor
    final_B: Tensor


def walk(rule: Any, shape: TreeShape, law: Law, codes_Bn: Tensor, q_of: Any, tape: Tape, *, equal_paths: bool = False) -> Walk:
    """Down the tree from the root, one group of siblings a level. ``q_of(at_B, depth)``: dense law ``(B, V)`` that the children of the
    node at index ``at_B`` of the pass were drawn from. ``equal_paths``: nodes with the codes of the path are the path."""
    device, every = codes_Bn.device, torch.arange(len(tape), device=codes_Bn.device)
    table = shape.child_table.to(device)
    room_B = tape.length - 1 - tape.known_B  # no draft is needed for the last position
    at_B, going, count = torch.zeros_like(every), torch.ones_like(every, dtype=torch.bool), torch.zeros_like(every)
    alive = torch.zeros(len(tape), 1 + len(shape.parents), dtype=torch.bool, device=device)
    alive[:, 0] = True
    final, path = law.at(every, at_B[:, None]).log_probs().squeeze(1).exp(), []
    for depth in range(1, shape.depth + 1):
        if equal_paths:
            kids = torch.tensor([node + 1 for node in shape.level(depth)], device=device).expand(len(tape), -1)
            parents = torch.tensor([shape.parents[node] + 1 for node in shape.level(depth)], device=device)
            valid = alive[:, parents]
        else:
            kids = table[at_B]
            valid = kids >= 0
        codes = codes_Bn.gather(1, (kids - 1).clamp_min(0))
        valid = valid & (codes >= 0)
        going = going & valid.any(1) & (count < room_B)
        if not bool(going.any()):
            break
        positions = (tape.known_B + depth - 1)[:, None]
        uniform = keyed_uniform(tape.request.seed, tape.ids_B, positions.squeeze(1), Purpose.ACCEPT, kids.shape[1])
        chosen, rest = rule.choose(final, q_of(at_B, depth), codes.clamp_min(0), valid, uniform)
        final = torch.where(going[:, None], rest, final)
        going = going & (chosen >= 0)
        picked = chosen.clamp_min(0)[:, None]
        at_B = torch.where(going, kids.gather(1, picked).squeeze(1), at_B)
        if equal_paths:
            alive[:, kids[0]] = valid & (codes == codes.gather(1, picked))
        path.append(torch.where(going, at_B - 1, -1))
        count = count + going.to(count.dtype)
        final = torch.where(going[:, None], law.at(every, at_B[:, None]).log_probs().squeeze(1).exp(), final)
    nodes = torch.stack(path, 1) if path else at_B.new_zeros(len(tape), 0)
    final = tape.draw(final.log()[:, None], (tape.known_B + count)[:, None], Purpose.RESAMPLE).squeeze(1)
    return Walk(nodes, count, final)


def commit(states: Sequence[tuple[Decoder, Any]], tape: Tape, shape: TreeShape, codes_Bn: Tensor, done: Walk) -> Advance:
    """Write path and final code, move the cache entries of the path behind the known ones."""
    nodes = done.nodes_BD.clamp_min(0)
    start = tape.known_B
    tested = torch.minimum(tape.length - 1 - start, torch.full_like(start, shape.depth))
    if nodes.shape[1]:
        positions = start[:, None] + torch.arange(nodes.shape[1], device=nodes.device)
        tape.codes_BL = tape.codes_BL.scatter(1, positions, codes_Bn.gather(1, nodes))
    for model, state in states:
        model.keep(state, start[:, None] + nodes, start, done.count_B)
    tape.codes_BL = tape.codes_BL.scatter(1, (start + done.count_B)[:, None], done.final_B[:, None])
    tape.known_B = start + done.count_B + 1
    tape.passes += 1
    return Advance(tested, done.count_B)


def siblings(log_q_BV: Tensor, num: int, seed: int, ids_B: Tensor, positions_B: Tensor, stream: int, how: str = "without") -> Tensor:
    """``num`` codes a row, ``(B, num)``: ``independent`` draws, draws ``without`` replacement or the ``top`` ones; -1 where q runs out."""
    V = log_q_BV.shape[-1]
    if how == "independent":
        noise = torch.stack([keyed_gumbel(seed, ids_B, positions_B, V, Purpose.SIBLING, stream * num + i) for i in range(num)], 1)
        return (log_q_BV[:, None] + noise).argmax(-1)
    noisy = log_q_BV if how == "top" else log_q_BV + keyed_gumbel(seed, ids_B, positions_B, V, Purpose.SIBLING, stream)
    best = noisy.topk(min(num, V), dim=-1)
    codes = torch.where(best.values > -torch.inf, best.indices, -1)
    return torch.nn.functional.pad(codes, (0, num - codes.shape[1]), value=-1)


class DraftTree:
    """A smaller model with the same codes draws a tree level by level. The rule says how siblings have to be drawn (``rule.siblings``):
    independently (:class:`Sequential`, on chains), without replacement (:class:`WithoutReplacement`), the best (:class:`LanternTree`)."""

    def __init__(self, pipeline: LogitsPipeline, decoder: Decoder, shape: TreeShape, rule: Any):
        self.pipeline, self.decoder, self.shape, self.rule = pipeline, decoder, shape, rule
        self.exactness, self.slots, self.state, self.draft_passes = rule.exactness, len(shape.parents), None, 0

    def begin(self, request: Request, length: int, vocab_size: int) -> Tape:
        self.state = self.decoder.start(request, length - 1 + self.slots)
        return Tape.of(request, length, vocab_size, spare=self.shape.depth)

    def select(self, rows: Tensor) -> None:
        self.state = self.decoder.select(self.state, rows)

    def advance(self, decoder: Decoder, state: Any, tape: Tape, window: int) -> Advance:
        """The small model's levels, then one pass of the large one."""
        codes, q = self._draw(tape)
        logits = feed_tree(decoder, state, tape, self.shape, codes.clamp_min(0))
        law = self.pipeline.law(logits)
        every = torch.arange(len(tape), device=codes.device)
        done = walk(
            self.rule, self.shape, law, codes, lambda at, depth: q[every, at], tape, equal_paths=self.rule.siblings == "independent"
        )
        return commit([(decoder, state), (self.decoder, self.state)], tape, self.shape, codes, done)

    def _draw(self, tape: Tape) -> tuple[Tensor, Tensor]:
        """Codes ``(B, nodes)`` and the laws ``(B, 1 + nodes, V)`` that the children of root and nodes were drawn from."""
        shape, device = self.shape, tape.codes_BL.device
        codes = torch.zeros(len(tape), len(shape.parents), dtype=torch.int64, device=device)
        log_q = torch.zeros(len(tape), 1 + len(shape.parents), tape.vocab_size, device=device)
        root = None if tape.passes == 0 else tape.codes_BL.gather(1, tape.known_B[:, None] - 1)
        log_q[:, :1] = self.pipeline(self.decoder.step(self.state, root))
        for depth in range(1, shape.depth + 1):
            for parent in [-1] if depth == 1 else shape.level(depth - 1):
                children = shape.children(parent)
                if children:
                    stream = tape.passes * (1 + len(shape.parents)) + parent + 1
                    at = tape.known_B + depth - 1
                    drawn = siblings(
                        log_q[:, parent + 1], len(children), tape.request.seed, tape.ids_B, at, stream, self.rule.siblings
                    )  # fmt: skip
                    codes[:, children] = drawn
            level = shape.level(depth)
            fed = self.decoder.step(self.state, codes[:, level].clamp_min(0), place(shape, tape, level))
            log_q[:, [node + 1 for node in level]] = self.pipeline(fed)
        self.draft_passes += shape.depth + 1
        return codes, log_q.exp()


class Proactive:
    """SJD-PAC (arXiv 2603.18599): Jacobi drafts that are continued by maximal coupling, and behind the last known code a small tree.

    The tree's first branch holds the window's drafts; their siblings come from the law recorded for the position, without the draft.
    note: the release draws them from the residual and, when all drafts stand, the next code from no law at all; both are biased.
    """

    exactness = "exact"

    def __init__(
        self, pipeline: LogitsPipeline, window: int, initialiser: Initialiser, width: int = 3, levels: int = 3,
        prior_YLV: Tensor | None = None,
    ):  # fmt: skip
        self.pipeline, self.window, self.initialiser, self.prior = pipeline, window, initialiser, prior_YLV
        self.shape = TreeShape.proactive(width, min(levels, window + 1), window)
        self.rule, self.redraw, self.slots = WithoutReplacement(), Redraw("maximal"), len(self.shape.parents)

    def begin(self, request: Request, length: int, vocab_size: int) -> Tape:
        return Tape.of(request, length, vocab_size, self.prior, spare=self.window + 1)

    def select(self, rows: Tensor) -> None:
        pass

    def advance(self, decoder: Decoder, state: Any, tape: Tape, window: int) -> Advance:
        """One pass over tree and chain."""
        every = torch.arange(len(tape), device=tape.codes_BL.device)
        codes = self._draw(tape, every)
        logits = feed_tree(decoder, state, tape, self.shape, codes.clamp_min(0))
        nodes_at = tape.known_B[:, None] + torch.tensor([0, *self.shape.depths], device=every.device)
        drafts = tape.codes_BL.gather(1, nodes_at.clamp_max(tape.codes_BL.shape[1] - 1))
        law, drawn, log_p = self.pipeline.verify(
            logits, drafts, tape.request.seed, tape.ids_B, nodes_at, Purpose.DRAFT, tape.passes + 1
        )  # fmt: skip
        q_of = lambda at, depth: tape.q(every, (tape.known_B + depth - 1)[:, None]).squeeze(1)  # noqa: E731
        done = walk(self.rule, self.shape, law, codes, q_of, tape)
        spine = torch.tensor([0, *(node + 1 for node in self.shape.spine)], device=every.device)
        positions = nodes_at[:, spine]
        chain = Law(law.logits_BmV[:, spine], law.lse_Bm[:, spine], law.threshold_Bm[:, spine], law.last_Bm[:, spine], law.temperature)
        ratio = (
            (log_p[:, spine] - tape.log_q(positions, drafts[:, spine].unsqueeze(-1)).squeeze(-1)).exp().nan_to_num(0.0, posinf=torch.inf)
        )
        new, recorded = self.redraw(chain, drawn[:, spine], ratio, tape, positions)
        advance = commit([(decoder, state)], tape, self.shape, codes, done)
        offsets = torch.arange(self.window, device=every.device).expand(len(tape), -1)
        behind = positions >= tape.known_B[:, None]
        tape.codes_BL = tape.codes_BL.scatter(1, positions, torch.where(behind, new, tape.codes_BL.gather(1, positions)))
        tape.source_BL = tape.source_BL.scatter(1, positions[:, 1:], offsets)
        tape.laws, tape.drafted_B = recorded.behind_first(), positions[:, -1] + 1
        return advance

    def _draw(self, tape: Tape, every: Tensor) -> Tensor:
        """Codes ``(B, nodes)``: the window's drafts along the spine, siblings elsewhere."""
        shape, spine = self.shape, self.shape.spine
        self.initialiser.fill(tape, tape.known_B + self.window)
        codes = torch.zeros(len(tape), len(shape.parents), dtype=torch.int64, device=every.device)
        codes[:, spine] = tape.codes_BL.gather(1, tape.known_B[:, None] + torch.arange(len(spine), device=every.device))
        for parent in range(-1, len(shape.parents)):
            children = shape.children(parent)
            others = [child for child in children if child not in spine]
            if others:
                at = tape.known_B + shape.depths[children[0]] - 1
                q = tape.q(every, at[:, None]).squeeze(1)
                if len(others) < len(children):
                    q = q.scatter(1, codes[:, children[0]][:, None], 0.0)
                stream = tape.passes * (1 + len(shape.parents)) + parent + 1
                codes[:, others] = siblings(q.log(), len(others), tape.request.seed, tape.ids_B, at, stream)
        return codes
