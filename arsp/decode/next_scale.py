"""The next-scale Decoder: a VAR bound to its tokenizer's quantiser and its guidance (arXiv 2404.02905, section 3).

The bridge between codes and the model's input, the running sum ``f_hat`` of all scales, lives in the state: samplers see
integers. Every pass feeds whole scales; scale s sees the scales up to itself, so no mask is ever needed. The keys and values of
the last scale would be read by nobody and are not stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from arsp.decode.guidance import Logits, RampGuidance
from arsp.decode.schedule import ScaleStep, plain_steps
from arsp.errors import ConfigError, UsageError
from arsp.models.attention import AttentionContext, KVCache
from arsp.models.var import VAR, Conditioning
from arsp.protocols import Capabilities, Layout, Request
from arsp.tokenizers.var_vqvae import MultiScaleQuantizer


@dataclass
class ScaleState:
    """``known`` scales have codes; ``maps[k]`` is the input of scale k (scale 0 has none); ``consumed`` scales are in the cache."""

    labels_B: Tensor
    f_hat_BEhw: Tensor
    maps: list[Tensor] = field(default_factory=list)
    known: int = 0
    step: ScaleStep | None = None  # whose model's conditioning and cache these are
    cond: Conditioning | None = None
    cache: KVCache | None = None
    consumed: int = 0
    passes: int = 0
    peak_kv_bytes: int = 0
    last_kv_bytes: int = 0  # the peak since the present model took over

    @property
    def batch_size(self) -> int:
        return len(self.labels_B)


class NextScaleDecoder:
    """Implements :class:`arsp.protocols.Decoder` for one VAR, or for a schedule that gives each scale its own model and savings.

    ``steps``: one :class:`arsp.decode.schedule.ScaleStep` a scale (default: ``model`` everywhere, nothing saved). Where the model
    changes, the next one takes over ``f_hat`` and the maps so far, and the cache of the former is freed (arXiv 2411.17787).
    ``cache_last``: store the last scale too, as the official code does; it changes nothing but the bytes.
    """

    def __init__(
        self,
        model: VAR,
        quantizer: MultiScaleQuantizer,
        guidance: RampGuidance | None = None,
        steps: list[ScaleStep] | None = None,
        cache_last: bool = False,
    ):
        config = model.config
        self.quantizer, self.cache_last = quantizer, cache_last
        self.guidance = guidance or RampGuidance(0.0, config.num_scales)
        self.steps = steps or plain_steps(model)
        self.layout = Layout.next_scale(config.patch_nums)
        self.vocab_size = config.vocab_size
        self.capabilities = Capabilities(order="next-scale", codebook=True)
        if quantizer.patch_nums != config.patch_nums:
            raise ConfigError(f"the model makes scales {list(config.patch_nums)}, its tokenizer {list(quantizer.patch_nums)}.")

    @property
    def model(self) -> VAR:
        """The model of the last scale."""
        return self.steps[-1].model

    # -- the protocol ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def start(self, request: Request, capacity: int | None = None) -> ScaleState:
        """An empty state. ConfigError when the request has no class labels."""
        if request.labels_B is None:
            raise ConfigError("this model is class-conditional: the request carries no labels.", "Give --class.")
        return ScaleState(request.labels_B.to(self.quantizer.embedding.weight.device), self.quantizer.start(request.batch_size))

    @torch.inference_mode()
    def step(self, state: ScaleState, codes_Bn: Tensor | None, vectors_BnE: Tensor | None = None) -> Tensor:
        """Add the codes of the next whole scales (None: none yet) -> guided float32 logits ``(B, n_k, V)`` of the scale behind them.

        ``vectors_BnE`` stand in for the codebook vectors of the codes.
        """
        return self.step_apart(state, codes_Bn, vectors_BnE).float()

    @torch.inference_mode()
    def step_apart(self, state: ScaleState, codes_Bn: Tensor | None, vectors_BnE: Tensor | None = None) -> Logits:
        """:meth:`step` before the halves of guidance are combined (:class:`arsp.decode.guidance.Guided`), in the type of the model."""
        return self.apart(self.step_raw(state, codes_Bn, vectors_BnE), state.known)

    def step_raw(self, state: ScaleState, codes_Bn: Tensor | None, vectors_BnE: Tensor | None = None) -> Tensor:
        """:meth:`step_apart` as one tensor: the conditional rows, then the unconditional ones of a guided scale."""
        if codes_Bn is not None:
            self._add(state, self.quantizer.embedding(codes_Bn).float() if vectors_BnE is None else vectors_BnE)
        if state.known >= len(self.steps):
            raise UsageError(f"step: all {len(self.steps)} scales have their codes.")
        return self._predict(state, state.known)

    def apart(self, logits_RnV: Tensor, scale: int) -> Logits:
        """What :meth:`step_raw` gave for a scale as logits of B rows."""
        return self.guidance.halves(*logits_RnV.chunk(2), scale) if self._guided(self.steps[scale]) else logits_RnV

    def rewind(self, state: ScaleState, lengths_B: Tensor) -> None:
        """Not offered: forgetting a scale would have to recompute ``f_hat`` (capability ``rewind`` is False)."""
        raise UsageError("a next-scale state cannot be rewound.")

    def select(self, state: ScaleState, rows: Tensor) -> ScaleState:
        """A state of these rows only (both guidance halves)."""
        B = state.batch_size
        both = torch.cat((rows, rows + B)) if state.cond is not None and len(state.cond.class_RC) == 2 * B else rows
        return replace(
            state,
            labels_B=state.labels_B[rows],
            f_hat_BEhw=state.f_hat_BEhw[rows],
            maps=[x[rows] for x in state.maps],
            cond=None if state.cond is None else state.cond.rows(both),
            cache=None if state.cache is None else state.cache.select(rows, B),
        )

    @torch.inference_mode()
    def teacher_forced(self, request: Request, codes_BL: Tensor) -> Tensor:
        """Guided float32 ``logits_BLV`` of all positions, scale by scale."""
        state = self.start(request)
        self._add(state, self.quantizer.embedding(codes_BL[:, : self.layout.ends[-2]]).float())
        return torch.cat([self.apart(self._predict(state, scale), scale).float() for scale in range(len(self.steps))], dim=1)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _add(self, state: ScaleState, vectors_BnE: Tensor) -> None:
        """Sum the vectors of the next scales into ``f_hat`` and keep the maps that the scales behind them start from."""
        quantizer, done = self.quantizer, self.layout.ends
        offset = done[state.known - 1] if state.known else 0
        stop = offset + vectors_BnE.shape[1]
        if stop not in done:
            raise UsageError(f"step: {vectors_BnE.shape[1]} codes behind {offset} are no whole scales (they end at {list(done)}).")
        while state.known < len(done) and done[state.known] <= stop:
            k, end = state.known, done[state.known]
            state.f_hat_BEhw = state.f_hat_BEhw + quantizer.contribution(vectors_BnE[:, : end - offset], k)
            state.maps.append(quantizer.next_map(state.f_hat_BEhw, k).flatten(2).transpose(1, 2))
            vectors_BnE, offset = vectors_BnE[:, end - offset :], end
            state.known += 1

    def _predict(self, state: ScaleState, scale: int) -> Tensor:
        """Run what the model of ``scale`` has not seen yet, up to this scale, and return the scale's logits of both halves."""
        step = self.steps[scale]
        if state.step is None or state.step.model is not step.model:
            self._hand_over(state, step)
        for first, last in self._runs(state, scale):
            h = self._pass(state, first, last)
        return step.model.raw_logits(h[:, -len(self.layout.blocks[scale]) :], state.cond)

    def _guided(self, step: ScaleStep) -> bool:
        return self.guidance.active and step.guided

    def _hand_over(self, state: ScaleState, step: ScaleStep) -> None:
        """Continue with the model of ``step``. The same model in another precision keeps the cache; another one starts an empty
        cache, and the former is freed first."""
        same = state.step is not None and state.step.owner == step.owner
        model, B = step.model, state.batch_size
        state.step = step
        state.cond = model.conditioning(state.labels_B, null=self._guided(step))
        if same:
            state.cache = state.cache.to(model.dtype)
            return
        state.cache, state.consumed, state.last_kv_bytes = None, 0, 0
        config, full = model.config, len(state.cond.class_RC)
        last = max(k for k, other in enumerate(self.steps) if other.owner == step.owner)
        stored = range(last + 1 if self.cache_last or last < len(self.steps) - 1 else last)
        kinds = [{self._rule(step, k).share(layer, k) if full > B else "none" for k in stored} for layer in range(config.depth)]
        state.cache = KVCache(
            config.depth, full, config.num_heads, sum(len(self.layout.blocks[k]) for k in stored), config.head_dim,
            dtype=model.dtype, device=state.f_hat_BEhw.device,
            key_rows=[full if "none" in kind else B for kind in kinds],
            value_rows=[full if kind - {"output"} else B for kind in kinds],
        )  # fmt: skip

    def _rule(self, step: ScaleStep, scale: int) -> ScaleStep:
        """What ``scale`` is run by while ``step`` is current: its own row, or the current one where another model made the scale."""
        return self.steps[scale] if self.steps[scale].owner == step.owner else step

    def _runs(self, state: ScaleState, scale: int) -> list[tuple[int, int]]:
        """The scales up to ``scale`` that are not consumed, as runs that one pass can take: the same savings in every layer."""
        savings = lambda k: self._rule(state.step, k).savings(k)  # noqa: E731
        runs = [(state.consumed, state.consumed)]
        for k in range(state.consumed + 1, scale + 1):
            if savings(k) == savings(k - 1):
                runs[-1] = (runs[-1][0], k)
            else:
                runs.append((k, k))
        return runs

    def _pass(self, state: ScaleState, first: int, last: int) -> Tensor:
        """Run scales first .. last through the current model: hidden states ``(R, n, C)``, rows of both halves while guided."""
        rule, model, B = self._rule(state.step, last), state.step.model, state.batch_size
        if len(state.cond.class_RC) == 2 * B and not self._guided(rule):
            state.cond = state.cond.rows(slice(0, B))  # the null half ends here: no later scale is guided
        maps = state.maps[max(first, 1) - 1 : last]
        empty = state.f_hat_BEhw.new_zeros(B, 0, self.quantizer.embedding.weight.shape[1])
        h = model.embed(torch.cat((empty, *maps), dim=1), state.cond.class_RC, first, last)
        start, halves = sum(len(self.layout.blocks[k]) for k in range(first)), len(state.cond.class_RC) // B
        ctx = AttentionContext(
            total=start + h.shape[1], cache=state.cache, start=start, scale=model.config.attention_scale, scales=(first, last),
            sides=model.config.patch_nums, keep=self.cache_last or last < len(self.steps) - 1,
            shares=[rule.share(layer, last) for layer in range(model.config.depth)] if halves == 2 else (),
        )  # fmt: skip
        h = model.backbone(h, state.cond, ctx, rule.policy, rule.depth)
        state.consumed = last + 1
        state.passes += 1
        state.last_kv_bytes = max(state.last_kv_bytes, state.cache.bytes(min(ctx.total, state.cache.capacity)))
        state.peak_kv_bytes = max(state.peak_kv_bytes, state.last_kv_bytes)
        return h
