"""Comparisons whose failure message tells the numbers."""

from __future__ import annotations

from torch import Tensor


def assert_close(got: Tensor, expected: Tensor, *, abs_tol: float, rel_tol: float = 0.0, what: str = "tensor") -> None:
    """``|got - expected| <= abs_tol + rel_tol |expected|`` everywhere; equal shapes are required."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel() == 0:
        return
    difference = (got.double() - expected.double()).abs()
    excess = difference - (abs_tol + rel_tol * expected.double().abs())
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: max error {float(difference.max()):.3g}, mean {float(difference.mean()):.3g}, allowed {abs_tol:.3g} + {rel_tol:.3g} |x|; "
        f"worst at {worst}: {float(got.flatten()[worst]):.6g} instead of {float(expected.flatten()[worst]):.6g}"
    )


def assert_same(got: Tensor, expected: Tensor, what: str = "ids") -> None:
    """Exactly equal integers."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    wrong = got.long() != expected.long()
    assert not bool(wrong.any()), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {wrong.nonzero()[0].tolist()}"
