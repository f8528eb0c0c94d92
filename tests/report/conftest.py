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
