"""The deterministic map of distilled decoding: a noise vector and a categorical law over codebook vectors -> one code.

Rectified flow between N(0, I) at t = 1 and ``sum_j p_j delta(c_j)`` at t = 0 (arXiv 2412.17153; arXiv 2510.21003, section 3.2.1
and appendix C.1), on the path ``x_t = (1 - t) x_0 + t e``:

    log w_j = log p_j + ((1-t)/t^2) <x, c_j> - ((1-t)^2 / (2 t^2)) |c_j|^2     posterior over codes, w = softmax(log w)
    m = sum_j w_j c_j                    posterior mean        dx/dt = (x - m)/t         velocity

Integrated from t = 1 down to ``t_end``; the code is ``argmax w``. Removed codes (log p = -inf) are legal. Codes that share
one vector are merged for the integration; the likeliest of them (lowest id on ties) is returned.

Shapes: N rows (independent problems), V codes, U distinct codebook vectors, E codebook width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arsp.decode.ar import Callback, decode_blocks
from arsp.decode.filters import LogitsPipeline
from arsp.errors import ConfigError, InputError, NumericalError
from arsp.kernels import flow_map as integrate_on_device
from arsp.kernels import integrates_flow
from arsp.kernels.reference import multistep_weight
from arsp.protocols import Decoder, Generation, Request
from arsp.rng import keyed_normal

SOLVERS = ("2m", "euler", "midpoint", "adaptive")
NoiseFn = Callable[[Tensor], Tensor]  # positions_m -> noise_BmE of the request's rows
_CHUNK_ELEMENTS = {"cpu": 1 << 18}  # rows x codes in flight: fits a core's cache on CPU
_CHUNK_ELEMENTS_DEVICE = 1 << 26
_MAX_ADAPTIVE_STEPS = 20_000


@dataclass(frozen=True)
class FlowSettings:
    """How the flow is integrated. ``steps``: grid intervals, uniform in t from 1 to ``t_end`` (midpoint: two evaluations each).

    ``early_stop``: a row stops once its largest posterior weight is decisive (see :func:`stop_weights`); 1 disables it.
    ``scale``: constant that multiplies the codebook in the map (:func:`codebook_scale`). ``dtype``: precision of the integration
    ("float32" or "float64"; ``adaptive`` always uses float64). ``tolerance``: of the adaptive solver, relative to 1 + max|x|.
    """

    solver: str = "2m"
    steps: int = 64
    t_end: float = 0.02
    early_stop: float = 0.95
    scale: float = 1.0
    dtype: str = "float32"
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"flow.solver: unknown solver {self.solver!r}.", hint=f"use one of: {', '.join(SOLVERS)}")
        if self.dtype not in ("float32", "float64"):
            raise ConfigError(f"flow.dtype: {self.dtype!r}; the posterior has terms in 1/t^2 and needs float32 or float64.")
        for name, valid, expected in (
            ("steps", self.steps >= 1 and self.steps == int(self.steps), "an integer >= 1"),
            ("t_end", 0 < self.t_end < 1, "in (0, 1)"),
            ("early_stop", 0.5 < self.early_stop <= 1, "in (0.5, 1] (1 disables it)"),
            ("scale", 0 < self.scale < math.inf, "a finite number > 0"),
            ("tolerance", 0 < self.tolerance < 1, "in (0, 1)"),
        ):
            if not valid:
                raise ConfigError(f"flow.{name}: {getattr(self, name)!r} is not {expected}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float64 if self.solver == "adaptive" or self.dtype == "float64" else torch.float32


@dataclass(frozen=True)
class FlowCodebook:
    """A codebook made ready for the map; build it once with :func:`prepare_codebook` when mapping many tokens."""

    vectors_EU: Tensor  # distinct vectors, scaled; transposed because (E, U) x (U, N) is the faster product by far
    augmented_FU: Tensor  # (E + 1, U): vectors and their squared lengths, so that log w is one addmm
    group_V: Tensor | None  # index of each code's vector; None when all vectors are distinct
    settings: FlowSettings

    def merge(self, logp_NV: Tensor) -> Tensor:
        """Log-probabilities of the distinct vectors."""
        if self.group_V is None:
            return logp_NV
        mass_NU = logp_NV.new_zeros(logp_NV.shape[0], self.vectors_EU.shape[1])
        return mass_NU.index_add_(1, self.group_V, logp_NV.exp()).log()

    def split(self, group_N: Tensor, logp_NV: Tensor) -> Tensor:
        """The likeliest code (lowest id on ties) of each row's vector."""
        if self.group_V is None:
            return group_N
        return logp_NV.masked_fill(self.group_V != group_N[:, None], -torch.inf).argmax(dim=1)


def prepare_codebook(codebook_VE: Tensor, settings: FlowSettings | None = None) -> FlowCodebook:
    """Scale the codebook, merge equal vectors and precompute squared lengths, in the precision of ``settings``."""
    settings = settings or FlowSettings()
    if codebook_VE.ndim != 2 or not torch.isfinite(codebook_VE).all():
        raise InputError(f"codebook: expected a finite (V, E) matrix, got shape {tuple(codebook_VE.shape)}.")
    vectors, group_V = torch.unique(codebook_VE, dim=0, return_inverse=True)
    if vectors.shape[0] == codebook_VE.shape[0]:
        vectors, group_V = codebook_VE, None
    vectors = vectors.to(settings.torch_dtype) * settings.scale
    augmented = torch.cat((vectors, vectors.square().sum(dim=1, keepdim=True)), dim=1).t().contiguous()
    return FlowCodebook(vectors.t().contiguous(), augmented, group_V, settings)


def codebook_scale(codebook_VE: Tensor) -> float:
    """The constant to put in ``FlowSettings.scale``: 1, or 1/rms when the per-dimension rms lies outside [0.05, 20]."""
    rms = codebook_VE.double().square().mean().sqrt().item()
    return 1.0 if 0.05 <= rms <= 20 or rms == 0 else 1.0 / rms


def posterior(x_NE: Tensor, t: float | Tensor, logp_NV: Tensor, codebook_VE: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised ``log_w_NV`` and posterior mean ``E[x_0 | x_t]`` ``(N, E)``, in the dtype of ``x``; t a number or ``(N,)``."""
    augmented = torch.cat((codebook_VE, codebook_VE.square().sum(dim=1, keepdim=True)), dim=1).to(x_NE).t()
    with _full_precision(x_NE):
        log_w = torch.log_softmax(torch.addmm(logp_NV.to(x_NE), _features(x_NE, t), augmented), dim=1)
        return log_w, log_w.exp() @ codebook_VE.to(x_NE)


def velocity(x_NE: Tensor, mean_NE: Tensor, t: float | Tensor) -> Tensor:
    """dx/dt of the flow, ``(x - m)/t``."""
    return (x_NE - mean_NE) / _column(t)


def score(x_NE: Tensor, mean_NE: Tensor, t: float | Tensor) -> Tensor:
    """Gradient of the log-density of x_t, ``((1-t) m - x)/t^2``."""
    t = _column(t)
    return ((1 - t) * mean_NE - x_NE) / (t * t)


def stop_weights(logp_NV: Tensor, early_stop: float) -> Tensor:
    """The posterior weight ``(N,)`` at which a row may stop: evidence counts relative to the prior.

    A weight of 0.95 settles a code only if the flow has *moved* there: when the law itself gives a code 0.97, every row
    starts above 0.95 and stopping at once would return that code always. So the posterior odds must exceed
    ``early_stop/(1 - early_stop)`` times ``max(1, odds of the likeliest code)``. For laws without a code above 1/2 this is the
    plain rule ``max w > early_stop``. One-hot laws stop at once.
    """
    if early_stop >= 1:
        return torch.full_like(logp_NV[:, 0], 2.0)  # never reached
    best_N = logp_NV.amax(dim=1)
    inverse_odds_N = (-torch.expm1(best_N) / best_N.exp()).clamp(0, 1)
    return 1 / (1 + inverse_odds_N * (1 - early_stop) / early_stop)


@torch.no_grad()
def flow_map(
    logp_NV: Tensor, noise_NE: Tensor, codebook: Tensor | FlowCodebook, settings: FlowSettings | None = None
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Map each row's noise to a code: ``(codes_N int64, info)``.

    ``codebook``: ``(V, E)`` or a prepared one (then its settings hold). ``info``: ``nfe`` (mean posterior evaluations a row),
    ``stop_t_N``, ``weight_N`` (posterior weight of the chosen vector there) and ``state_NE`` (x there, in the scaled space).
    Rows are processed in chunks of bounded memory. NumericalError for NaN or for a row without any possible code.
    """
    book = codebook if isinstance(codebook, FlowCodebook) else prepare_codebook(codebook, settings)
    _check_shapes(logp_NV, noise_NE, book)
    chunk = max(1, _CHUNK_ELEMENTS.get(logp_NV.device.type, _CHUNK_ELEMENTS_DEVICE) // logp_NV.shape[1])
    dtype, parts = book.settings.torch_dtype, []
    with _full_precision(noise_NE):
        for logp, noise in zip(logp_NV.split(chunk), noise_NE.split(chunk), strict=True):
            parts.append(_map_chunk(logp.to(dtype), noise.to(dtype), book))
    if not parts:
        parts.append(_Rows(logp_NV.to(dtype), noise_NE.to(dtype), book).outcome())
    codes, stop_t, weight, nfe, state = (torch.cat(field) for field in zip(*parts, strict=True))
    return codes, {"nfe": nfe.mean().item() if len(nfe) else 0.0, "stop_t_N": stop_t, "weight_N": weight, "state_NE": state}


def keyed_noise(request: Request, dim: int) -> NoiseFn:
    """Noise tokens e_i ~ N(0, I_dim) of a request's rows, a pure function of (seed, sample id, position)."""
    return lambda positions_m: keyed_normal(request.seed, request.sample_ids_B[:, None], positions_m[None, :], dim)


def sample_through_map(
    decoder: Decoder,
    request: Request,
    noise_fn: NoiseFn,
    pipeline: LogitsPipeline,
    codebook: Tensor | FlowCodebook,
    settings: FlowSettings | None = None,
    callback: Callback | None = None,
    stop: int | None = None,
) -> Generation:
    """Autoregressive sampling in which each code is ``flow_map(law, noise token)``: the trajectory of distilled decoding.

    Same loop as ``sample_ar``. ``stop``: blocks that begin at or behind this position are left at 0. The stats add ``flow_nfe``, the
    mean number of posterior evaluations a token.
    """
    book = codebook if isinstance(codebook, FlowCodebook) else prepare_codebook(codebook, settings)
    evaluations = []

    def choose(logits_BmV: Tensor, pipeline: LogitsPipeline, positions_m: Tensor) -> Tensor:
        log_p_BmV = pipeline(logits_BmV)
        noise_BmE = noise_fn(positions_m)
        codes_N, info = flow_map(log_p_BmV.flatten(0, 1), noise_BmE.flatten(0, 1), book)
        evaluations.append(info["nfe"] * len(positions_m))
        return codes_N.view(log_p_BmV.shape[:2])

    generation = decode_blocks(decoder, request, choose, pipeline, callback, stop=stop)
    generation.stats["flow_nfe"] = sum(evaluations) / (generation.stats["passes"] * generation.stats["tokens_per_pass"])
    return generation


class _Rows:
    """The rows of a chunk that are still being integrated, and the results of those that are not."""

    def __init__(self, logp_NV: Tensor, noise_NE: Tensor, book: FlowCodebook):
        normaliser_N = logp_NV.logsumexp(dim=1, keepdim=True)
        if not (torch.isfinite(normaliser_N).all() and torch.isfinite(noise_NE).all()):
            raise NumericalError("flow map: NaN, infinite noise, or a law without any possible code.", hint="check the teacher's logits")
        self.book, self.logp_NV, self.x = book, logp_NV, noise_NE
        self.logp = book.merge(logp_NV - normaliser_N)
        self.stop_at = stop_weights(self.logp, book.settings.early_stop)
        num = noise_NE.shape[0]
        self.index = torch.arange(num, device=noise_NE.device)  # chunk row of each live row
        self.finished = torch.zeros(num, dtype=torch.bool, device=noise_NE.device)
        self.group, self.stop_t = torch.zeros_like(self.index), noise_NE.new_zeros(num)
        self.weight, self.nfe, self.state = noise_NE.new_zeros(num), noise_NE.new_zeros(num), noise_NE.clone()
        self._scratch = torch.empty_like(self.logp), torch.empty_like(self.logp)

    def evaluate(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Posterior weights and mean of the live rows. The weights live in a buffer that the next call overwrites."""
        self.nfe[self.index] += 1
        log_w, w = (buffer[: len(x)] for buffer in self._scratch)
        torch.addmm(self.logp, _features(x, t), self.book.augmented_FU, out=log_w)
        torch.softmax(log_w, dim=1, out=w)
        return w, (self.book.vectors_EU @ w.t()).t()

    def settle(self, w: Tensor, x: Tensor, t: float | Tensor, candidates: Tensor | None = None) -> None:
        """Record the rows whose weight is decisive (or all ``candidates``) and that were not recorded before."""
        best = w.amax(dim=1)
        new = best >= self.stop_at if candidates is None else candidates | (best >= self.stop_at)
        rows = (new & ~self.finished).nonzero()[:, 0]
        if len(rows):
            target = self.index[rows]
            self.group[target] = w[rows].argmax(dim=1)
            self.weight[target], self.state[target] = best[rows], x[rows]
            self.stop_t[target] = t[rows] if isinstance(t, Tensor) else t
            self.finished[rows] = True

    def compact(self, *per_row: Tensor) -> tuple[Tensor, ...]:
        """Drop finished rows once they are more than a quarter; returns the given per-row tensors, compacted alike."""
        num_finished = int(self.finished.sum())
        if num_finished < len(self.finished) and 4 * num_finished <= len(self.finished):
            return per_row
        keep = (~self.finished).nonzero()[:, 0]
        self.logp, self.stop_at, self.index = self.logp[keep], self.stop_at[keep], self.index[keep]
        self.finished = self.finished[keep]
        return tuple(value[keep] for value in per_row)

    def outcome(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.book.split(self.group, self.logp_NV), self.stop_t, self.weight, self.nfe, self.state


def _map_chunk(logp_NV: Tensor, noise_NE: Tensor, book: FlowCodebook) -> tuple[Tensor, ...]:
    rows, settings = _Rows(logp_NV, noise_NE, book), book.settings
    if settings.solver != "adaptive" and integrates_flow(rows.logp, noise_NE):
        at = (rows.stop_at, settings.solver, settings.steps, settings.t_end)
        rows.group, rows.stop_t, rows.weight, rows.nfe, rows.state = integrate_on_device(rows.logp, noise_NE, book.vectors_EU.t(), *at)
        return rows.outcome()
    (_integrate_adaptive if settings.solver == "adaptive" else _integrate_grid)(rows, settings)
    return rows.outcome()


def _integrate_grid(rows: _Rows, settings: FlowSettings) -> None:
    """euler, midpoint and 2m on a uniform grid in t: every row stands at the same t."""
    grid = [1 + (settings.t_end - 1) * i / settings.steps for i in range(settings.steps + 1)]
    x, previous = rows.x, None
    for i, t in enumerate(grid):
        w, mean = rows.evaluate(x, t)
        last = i == settings.steps
        rows.settle(w, x, t, torch.ones_like(rows.finished) if last else None)
        if last:
            return
        x, mean, previous = rows.compact(x, mean, mean if previous is None else previous)
        if not len(x):
            return
        if settings.solver == "midpoint":
            middle = (t + grid[i + 1]) / 2
            x_middle = mean + (middle / t) * (x - mean)
            x = x + (grid[i + 1] - t) * velocity(x_middle, rows.evaluate(x_middle, middle)[1], middle)
        else:
            slope = multistep_weight(grid, i) if settings.solver == "2m" else 0.0
            target = mean if slope == 0 else mean + slope * (mean - previous)
            x = target + (grid[i + 1] / t) * (x - target)
        previous = mean


_DP_TIMES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)  # Dormand and Prince (1980), 5(4), first same as last
_DP_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_DP_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _integrate_adaptive(rows: _Rows, settings: FlowSettings) -> None:
    """Dormand-Prince 5(4) in a = -log t, where dx/da = m - x is regular; every row has its own step size."""
    end, x = -math.log(settings.t_end), rows.x
    age = x.new_zeros(x.shape[0])
    step = torch.full_like(age, 0.02)
    w, mean = rows.evaluate(x, torch.exp(-age))
    rows.settle(w, x, torch.exp(-age))
    slope = mean - x
    for _ in range(_MAX_ADAPTIVE_STEPS):
        x, age, step, slope = rows.compact(x, age, step, slope)
        if not len(x):
            return
        step = torch.minimum(step, end - age)
        slopes, trial = [slope], x
        for time, weights in zip(_DP_TIMES[1:], _DP_STAGES, strict=True):
            trial = x + step[:, None] * sum(a * k for a, k in zip(weights, slopes, strict=True))
            w, mean = rows.evaluate(trial, torch.exp(-(age + time * step)))
            slopes.append(mean - trial)
        error = step[:, None] * sum(e * k for e, k in zip(_DP_ERROR, slopes, strict=True))
        bound = settings.tolerance * (1 + torch.maximum(x, trial).abs().amax(dim=1))
        ratio = error.abs().amax(dim=1) / bound
        accepted = ratio <= 1
        age = torch.where(accepted, age + step, age)
        x = torch.where(accepted[:, None], trial, x)
        slope = torch.where(accepted[:, None], slopes[-1], slope)
        arrived = age >= end * (1 - 1e-12)
        w[~accepted] = 0  # a rejected trial settles nothing
        rows.settle(w, x, torch.exp(-age), arrived & accepted)
        step = step * (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)
    raise NumericalError(f"flow map: the adaptive solver did not arrive within {_MAX_ADAPTIVE_STEPS} steps.")


def _features(x_NE: Tensor, t: float | Tensor) -> Tensor:
    """``(N, E + 1)`` such that ``features @ [c, |c|^2]`` is the part of log w that depends on x and t."""
    t = _column(t)
    inner, square = (1 - t) / (t * t), -((1 - t) ** 2) / (2 * t * t)
    column = square.to(x_NE).expand(len(x_NE), 1) if isinstance(square, Tensor) else x_NE.new_full((len(x_NE), 1), square)
    return torch.cat((inner * x_NE, column), dim=1)


def _column(t: float | Tensor) -> float | Tensor:
    return t[:, None] if isinstance(t, Tensor) and t.ndim == 1 else t


@contextlib.contextmanager
def _full_precision(like: Tensor) -> Iterator[None]:
    """No autocast and no TF32: both would destroy log w, whose terms grow as 1/t^2."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(like.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_shapes(logp_NV: Tensor, noise_NE: Tensor, book: FlowCodebook) -> None:
    num_codes = book.vectors_EU.shape[1] if book.group_V is None else book.group_V.shape[0]
    expected = ((noise_NE.shape[0], num_codes), (logp_NV.shape[0], book.vectors_EU.shape[0]))
    if (tuple(logp_NV.shape), tuple(noise_NE.shape)) != expected:
        raise InputError(
            f"flow map: logp {tuple(logp_NV.shape)} and noise {tuple(noise_NE.shape)} do not fit a codebook of {num_codes} x "
            f"{book.vectors_EU.shape[0]}; expected (N, {num_codes}) and (N, {book.vectors_EU.shape[0]})."
        )
