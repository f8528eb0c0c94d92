"""Shared by all tests: few threads, private run directories, and where the recorded official outputs are."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def runs_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh ``$ARSP_RUNS`` for every test (not below ``tmp_path``, which a test may use as an output directory)."""
    folder = tmp_path_factory.mktemp("runs")
    monkeypatch.setenv("ARSP_RUNS", str(folder))
    return folder


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Folder of recorded official outputs: $ARSP_GOLDEN, else tests/golden."""
    return Path(os.environ.get("ARSP_GOLDEN") or Path(__file__).parent / "golden")


@pytest.fixture
def one_thread():
    """Bit-exact comparisons hold for a fixed number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: processes that share the tests then end together."""
    items.sort(key=lambda item: ("test_the_demo" not in item.nodeid, "test_readme" not in item.nodeid))
