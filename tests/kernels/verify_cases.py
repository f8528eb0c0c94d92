"""What the tests of verify, keyed_argmax and draw_residual share: logits, keys, laws, and when two draws are the same."""

import math

import torch

from arsp.kernels import reference
from arsp.rng import Purpose, keyed_uniform


def draw(rows, codes, seed=0, ties=False, removed=0.2):
    """Logits with some codes at -inf; with ``ties`` they are multiples of log 2, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, codes, generator=generator)
    if ties:
        logits = logits.round().clamp(-6, 6) * math.log(2)
    gone = torch.rand(rows, codes, generator=generator) < removed
    gone[:, 0] = False
    return logits.masked_fill(gone, -torch.inf)


def key(rows, seed=0):
    """(seed, ids, positions, purpose, stream), every word used to its last bit."""
    generator = torch.Generator().manual_seed(seed)
    ids, positions = (torch.randint(1 << 32, (rows,), generator=generator) for _ in range(2))
    return -(2**62) + 12345 * seed, ids, positions, int(Purpose.ACCEPT), (1 << 24) - 1 - seed


def same_codes(found, wanted, log_w, arguments, what):
    """Equal but where two codes tie within 1e-5: logarithms differ in their last bits."""
    seed, ids, positions, purpose, stream = arguments
    scores = log_w - torch.log(-torch.log(keyed_uniform(seed, ids, positions, purpose, log_w.shape[1], stream)))
    for row in (found != wanted).nonzero().flatten().tolist():
        gap = (scores[row, found[row]] - scores[row, wanted[row]]).abs().item()
        assert gap < 1e-5, f"{what}, row {row}: {found[row]} instead of {wanted[row]}, gap {gap:.1e}"


def laws(rows, codes, law, seed, dtype=torch.float32, guided=False):
    """Filtered laws as draw_residual takes them."""
    logits, uncond, where = draw(rows, codes, seed).to(dtype), None, None
    if guided:
        uncond = draw(rows, codes, seed + 1, removed=0).to(dtype)
        where = torch.arange(rows) % 3 > 0
    found = reference.verify(logits, torch.full((rows,), -1), *law, *key(rows), uncond, 1.7, False, where)
    temperature = max(law[0], 1e-5) if law[0] else 1.0
    return [logits, uncond, where, *found[2:]], [1.7 if guided else 1.0, 0.0, temperature]


def residual_call(codes, law=(1.0, 0, 1.0), rows=27, dtype=torch.float32, guided=False, seed=0):
    """Draws against recorded laws, certain, uniform and prior ones, some of them not needed, in an order of their own. Certain drafts are
    the likeliest codes and priors are near the laws, so that it matters which they are."""
    p, q = laws(rows, codes, law, codes + seed, dtype, guided), laws(4, codes, (1.0, 0, 1.0), codes + seed + 2)
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(rows, generator=generator)
    sources = torch.tensor([0, 3, 2, -1, -1, -2, -3, -3, 1]).repeat(rows // 9)
    drafts = reference.log_law(*p, at).argmax(-1)
    steep = reference.log_law(*p, at[6:9]).mul(0.9).softmax(-1)
    at[1] = at[4] = -1
    return (*p, at, *q, sources, drafts, steep, torch.arange(rows) % 3, *key(rows, seed))


def residual_weights(call):
    """max(0, p - q) in float64 where it has mass, else p; and how far float32 may be off."""
    p, p_how, at, q, q_how, sources, drafts, prior, places = call[:9]
    dense, codes = reference.log_law(p, p_how, at.clamp_min(0)).double().exp(), p[0].shape[1]
    recorded = reference.log_law(q, q_how, sources.clamp_min(0)).double().exp()
    other = torch.where(sources[:, None] == -2, 1 / codes, torch.nn.functional.one_hot(drafts, codes).double())
    q_rows = torch.where(sources[:, None] >= 0, recorded, torch.where(sources[:, None] == -3, prior[places].double(), other))
    rest = (dense - q_rows).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) < 1e-12, dense, rest), 4e-7 * (dense + q_rows)


def same_residual_draws(found, call, what):
    """The codes of the largest scores; another one only where rounding leaves open which it is."""
    (weights, off), at, (seed, ids, positions, purpose, stream) = residual_weights(call), call[2], call[9:]
    noise = -torch.log(-torch.log(keyed_uniform(seed, ids, positions, purpose, weights.shape[1], stream).double()))
    most, least = ((weights + sign * off).clamp_min(0).log() + noise for sign in (1, -1))
    for row in range(len(at)):
        if at[row] < 0:
            assert found[row] == 0, f"{what}, row {row} needs no draw"
            continue
        gap = least[row].max() - most[row, found[row]]
        assert gap < 1e-5, f"{what}, row {row}: {found[row]} instead of {least[row].argmax()}, gap {gap:.1e}"
