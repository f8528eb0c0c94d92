"""Small records as the commands write them."""

import pytest


def make_record(name="llamagen", *, fid=None, passes=None, ms=None, command="evaluate", **more):
    """A record of schema 1 with a FID (n = 100) and a latency at batch size 1."""
    metric = {"name": "fid", "value": fid, "n": 100, "protocol": "shapes-cnn-v1", "reference_sha256": "a" * 64, "comparable": False}
    record = {
        "schema": 1,
        "id": f"{command}-{name}",
        "command": command,
        "argv": ["arsp", command, "--model", name],
        "status": "ok",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "config": {"model": name},
        "stack": {"name": name, "model": name},
        "environment": {"cpu": "one cpu", "threads": 2, "device": "cpu"},
        "seed": 0,
        "metrics": [] if fid is None else [metric],
        "cost": {"passes": passes, "latency_ms": None if ms is None else {"p50": ms, "p95": ms}, "batch_size": 1, "simulated": False},
        "artifacts": [],
        "run_dir": None,
        "parents": [],
    }
    return record | more


@pytest.fixture
def record():
    return make_record


def make_paired(mode="mc", *, exactness="exact", grid=2, artifacts=(), **more):
    """A record of ``arsp speculate``: plain sampling takes 30 ms an image, the mode 20 ms, its speed-up was measured as 1.4."""
    counts = {"committed": {"1": 6, "3": 2}, "tokens_per_pass": 1.5, "acceptance": 0.4, "acceptance_map": [[0.25, 1.0], [0.5, None]]}
    timed = {"latency_ms": {"p50": 20.0, "p95": 21.0}, "images_per_s": 50.0, "tokens_per_pass": 1.5, "passes": 2.7}
    plain = {"latency_ms": {"p50": 30.0, "p95": 31.0}, "images_per_s": 1000 / 30, "tokens_per_pass": 1.0, "passes": 4.0}
    described = {"model": "llamagen", "sampler": "ar", "grid": [grid, grid]}
    metric = {"n": 4, "protocol": None, "reference_sha256": None, "comparable": True}
    metrics = [metric | {"name": name, "value": value} for name, value in
               {"passes": 2.7, "tokens_per_pass": 1.5, "acceptance": 0.4, "single_token_share": 0.75, "latency_ms": 20.0,
                "ar_latency_ms": 30.0}.items()]  # fmt: skip
    metrics += [metric | {"name": "speedup", "value": 1.4, "ci95": [1.3, 1.5]}]
    return make_record(
        f"llamagen {mode}", command="speculate", config={"batch_size": 1}, metrics=metrics, cost={**timed, "verify": counts},
        stack=described | {"name": f"llamagen {mode}", "sampler": mode, "verify": {"window": 4, "exactness": exactness}},
        plain={"stack": described | {"name": "llamagen"}, "cost": plain}, artifacts=list(artifacts),
    ) | more  # fmt: skip


@pytest.fixture
def paired():
    return make_paired
