"""Run directories, records, atomic writes and stop signals: what makes "run the same command again" continue it.

A run directory holds ``run.json`` (the record) and whatever the command produces. Its name contains the hash of the resolved
configuration, so the same command finds it again; an OS lock keeps two processes from sharing it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import arsp
from arsp.config import config_hash, to_dict
from arsp.errors import EXIT_SIGINT, EXIT_SIGTERM, InputError, Interrupted, LockedError, ResourceError

SCHEMA = 1
RECORD_NAME = "run.json"
LOCK_NAME = ".lock"
COST_KEYS = (
    "passes", "tokens_per_pass", "latency_ms", "images_per_s", "peak_mem_bytes", "weight_bytes", "kv_bytes", "macs", "simulated",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- files


def cache_root() -> Path:
    """``$ARSP_CACHE`` or ``~/.cache/arsp``: downloaded checkpoints and derived statistics."""
    return Path(os.environ.get("ARSP_CACHE") or Path.home() / ".cache" / "arsp")


def sha256_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes. Raises InputError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()


def sha256_tree(folder: str | Path) -> tuple[str, int]:
    """(SHA-256 over the sorted relative names and hashes of all files below ``folder``, their total bytes)."""
    digest, total = hashlib.sha256(), 0
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
        total += path.stat().st_size
    return digest.hexdigest(), total


def _temporary(path: Path) -> Path:
    """A fresh name next to ``path``, which ``_remove_temporaries`` knows."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot create {path.parent}: {error.strerror or error}") from None
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left half-written below a run directory that this process holds."""
    for path in list(folder.rglob(".*.tmp")):
        if re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}\.tmp", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same directory; it becomes ``path`` on success and vanishes on any error.

    ``flush``: force it to disk first (not worth its time for thousands of pictures that can be made again).
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        if flush:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory next to ``path``; on success it takes the place of ``path``, on any error it vanishes.

    A directory that is already there is moved aside first and removed last.
    """
    path = Path(path)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file_path in temporary.rglob("*"):
            if file_path.is_file():
                with open(file_path, "rb") as file:
                    os.fsync(file.fileno())
        if path.exists():
            aside = _temporary(path)
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def jsonable(value: Any) -> Any:
    """Plain JSON values: NaN and infinities become None, paths text, tuples and sets lists, array scalars numbers."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if hasattr(value, "tolist"):  # numpy and torch arrays and scalars
        return jsonable(value.tolist())
    if hasattr(value, "model_dump"):
        return jsonable(value.model_dump(mode="json"))
    return str(value)


def to_json(value: Any, indent: int | None = 1) -> str:
    """One valid JSON document (never NaN)."""
    return json.dumps(jsonable(value), indent=indent, allow_nan=False, ensure_ascii=False)


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as JSON, atomically; NaN and infinities become null."""
    with atomic_file(path) as temporary:
        temporary.write_text(to_json(obj) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- records


def now() -> str:
    """The time in UTC, ISO 8601 to the millisecond (sorts as text)."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def git_commit() -> str | None:
    """Commit of the checkout that arsp runs from ("-dirty" appended when tracked files differ); None when it is installed."""
    root = Path(arsp.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=30).returncode != 0
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Installed version of a distribution without importing it, None when absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str | None = None) -> dict[str, Any]:
    """Where a number was measured. Never imports torch: threads, GPU name and what "auto" means are there once something else has."""
    torch = sys.modules.get("torch")
    if device in (None, "auto") and hasattr(torch, "cuda"):
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    block: dict[str, Any] = {
        "arsp": arsp.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads() if hasattr(torch, "get_num_threads") else None,
        "device": device,
    }
    if device and device.startswith("cuda") and torch is not None:
        block["gpu"] = torch.cuda.get_device_name(device)
        block["cuda"] = torch.version.cuda
    return block


def new_record(command: str, config: Mapping[str, Any] | Any) -> dict[str, Any]:
    """A record of schema 1 with everything known before the work starts; ``config`` is a dict or a schema instance."""
    plain = jsonable(to_dict(config))
    digest = config_hash(plain)
    return {
        "schema": SCHEMA,
        "id": f"{command}-{digest[:8]}-{secrets.token_hex(4)}",
        "command": command,
        "argv": ["arsp", *sys.argv[1:]],
        "status": "running",
        "started": now(),
        "finished": None,
        "config": plain,
        "config_sha256": digest,
        "stack": {},
        "environment": environment(plain.get("device")),
        "seed": plain.get("seed"),
        "metrics": [],
        "cost": {key: False if key == "simulated" else None for key in COST_KEYS},
        "artifacts": [],
        "run_dir": None,
        "parents": [],
    }


def _check_record(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or "schema" not in data or "command" not in data:
        hint = "records are the run.json of a run, or the output of --json"
        raise InputError(f"{where} is not an arsp record (no 'schema' and 'command')", hint)
    if data["schema"] != SCHEMA:
        raise InputError(f"{where} has record schema {data['schema']!r}, this arsp reads {SCHEMA}", "use the arsp version that wrote it")
    return data


def read_record(source: str | Path, stdin: TextIO | None = None) -> dict[str, Any]:
    """The record in a JSON file, in a run directory, or on stdin (``-``). Raises InputError: missing, corrupt, not a record."""
    where, path = str(source), Path(source)
    if where == "-":
        where, text = "standard input", (stdin or sys.stdin).read()
        if not text.strip():
            raise InputError("standard input is empty, expected a record", "the command before the pipe failed, or lacks --json")
    else:
        path = path / RECORD_NAME if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"no record at {path}", f"finished runs lie under {runs_root()}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read a record from {path}: {getattr(error, 'strerror', None) or 'not text'}") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not a JSON record: {error}", "commands write one with --json") from None
    return _check_record(data, where)


def runs_root() -> Path:
    """Where runs go: $ARSP_RUNS, else ./runs."""
    return Path(os.environ.get("ARSP_RUNS") or "runs")


def latest_run(predicate: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The record under ``runs_root()`` that finished last among those that satisfy ``predicate``; unreadable ones are passed over."""
    newest = None
    for path in runs_root().glob(f"*/{RECORD_NAME}"):
        with contextlib.suppress(InputError):
            record = read_record(path)
            later = newest is None or str(record.get("finished") or "") > str(newest.get("finished") or "")
            if record.get("finished") and later and predicate(record):
                newest = record
    return newest


# ----------------------------------------------------------------------------------------------------------------- runs


class Run:
    """A run directory held by this process: its path, its record, and the lock.

    Use as a context manager: an exception marks the record "interrupted" or "failed" (with the message), a normal exit "ok".
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: TextIO):
        self.path = path
        self.record = record
        self._lock: TextIO | None = lock

    @classmethod
    def open(cls, command: str, name: str, config: Mapping[str, Any] | Any, out: Path | None = None, *, resume: bool = True) -> Run:
        """Create or re-enter the run directory of this configuration.

        Args:
            name: readable part of the directory's name. config: resolved configuration (dict or schema instance).
            out: the directory; None = ``runs_root()/command-name-hash8``.
            resume: False empties an existing run of this configuration first.

        Raises:
            LockedError: a live process holds the directory, or it belongs to another configuration.
            InputError: ``out`` is a file, or a directory with contents that are not a run. ResourceError: cannot be created.
        """
        record = new_record(command, config)
        safe_name = re.sub(r"[^\w.+-]+", "-", name).strip("-") or "run"
        path = Path(out) if out is not None else runs_root() / f"{command}-{safe_name}-{record['config_sha256'][:8]}"
        _check_usable(path)
        lock = _acquire(path)
        try:
            run = cls(path.resolve(), record, lock)
            run._enter_existing(resume)
            run.record["run_dir"] = str(run.path)
            if not run.finished:
                run.save()
        except BaseException:
            lock.close()
            raise
        return run

    def _enter_existing(self, resume: bool) -> None:
        if not (self.path / RECORD_NAME).exists():
            return
        old = read_record(self.path)
        if old.get("config_sha256") != self.record["config_sha256"] or old["command"] != self.record["command"]:
            raise LockedError(
                f"{self.path} holds a '{old['command']}' run of another configuration ({_first_difference(old, self.record)})",
                "choose another --out, or delete that directory",
            )
        if not resume:
            for child in self.path.iterdir():
                if child.name != LOCK_NAME:
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
            return
        if old["status"] != "ok":
            _remove_temporaries(self.path)
            old.update(status="running", finished=None, environment=self.record["environment"], argv=self.record["argv"])
            old.pop("error", None)
        self.record = old

    @property
    def finished(self) -> bool:
        """Whether this configuration has already been run to its end here."""
        return self.record["status"] == "ok"

    def add_metric(
        self, name: str, value: float, n: int | None = None, protocol: str | None = None, reference_sha256: str | None = None,
        comparable: bool = True, **more: Any,
    ) -> None:  # fmt: skip
        """Record a metric. One of the same name, protocol and text fields in ``more`` is replaced: a resumed run does not repeat itself."""
        entry = {"name": name, "value": value, "n": n, "protocol": protocol, "reference_sha256": reference_sha256, "comparable": comparable}
        entry = jsonable({**entry, **more})
        identity = {"name": name, "protocol": protocol, **{key: text for key, text in more.items() if isinstance(text, str)}}
        kept = [m for m in self.record["metrics"] if any(m.get(key) != value for key, value in identity.items())]
        self.record["metrics"] = [*kept, entry]

    def set_cost(self, **values: Any) -> None:
        """Fill in the cost block (see ``COST_KEYS``; further keys are allowed)."""
        self.record["cost"].update(jsonable(values))

    def add_artifact(self, path: str | Path, kind: str, **more: Any) -> dict[str, Any]:
        """Record a file or directory with its SHA-256 and size; paths inside the run directory are stored relative to it."""
        path = Path(path)
        full = (path if path.is_absolute() or path.exists() else self.path / path).resolve()
        if not full.exists():
            raise InputError(f"artifact {full} does not exist")
        digest, size = sha256_tree(full) if full.is_dir() else (sha256_file(full), full.stat().st_size)
        shown = full.relative_to(self.path).as_posix() if full.is_relative_to(self.path) else str(full)
        entry = {"path": shown, "kind": kind, "sha256": digest, "bytes": size, **jsonable(more)}
        self.record["artifacts"] = [*(a for a in self.record["artifacts"] if a["path"] != shown), entry]
        return entry

    def save(self) -> None:
        """Write ``run.json`` atomically."""
        write_json(self.path / RECORD_NAME, self.record)

    def finish(self, status: str = "ok") -> None:
        """Set the end time, the status and the final environment block, and save."""
        device = self.record["environment"].get("device")
        self.record.update(status=status, finished=now(), environment=environment(device))
        self.save()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self.record["status"] == "running":
                if error is not None:
                    self.record["error"] = str(error) or type(error).__name__
                stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
                self.finish("ok" if error is None else "interrupted" if stopped else "failed")
        finally:
            self.close()


def _check_usable(path: Path) -> None:
    if path.is_file():
        raise InputError(f"{path} is a file, expected a directory for the run")
    if path.is_dir() and not (path / RECORD_NAME).exists() and any(p.name != LOCK_NAME for p in path.iterdir()):
        raise InputError(f"{path} is not empty and is not an arsp run", "choose another --out")


def _acquire(path: Path) -> TextIO:
    """The open, locked lock file of a run directory; the system releases it when the process ends, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / LOCK_NAME, "a+")  # noqa: SIM115 - held for the run's life
    except OSError as error:
        raise ResourceError(f"cannot create the run directory {path}: {error.strerror or error}", "choose another --out") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise LockedError(f"{path} is in use by {holder}", "wait for it, stop it, or choose another --out") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if old["command"] != new["command"]:
        return f"this is '{new['command']}'"
    before, after = _flatten(old.get("config", {})), _flatten(new["config"])
    for key in [*after, *before]:
        if before.get(key) != after.get(key):
            return f"{key}: {before.get(key)!r} there, {after.get(key)!r} here"
    return "different hash"


# -------------------------------------------------------------------------------------------------------------- signals


class _Stop:
    """The signal that asked for a stop while ``stop_signals`` is active."""

    requested: int | None = None
    depth = 0


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _Stop.requested is not None and number == signal.SIGINT:
        raise KeyboardInterrupt
    _Stop.requested = number


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a request that ``check_stop`` honours at a safe point; a second SIGINT stops at once.

    May be nested; does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _Stop.depth == 0:
        _Stop.requested = None
    previous = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    _Stop.depth += 1
    try:
        yield
    finally:
        _Stop.depth -= 1
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_requested() -> bool:
    """Whether SIGINT or SIGTERM has arrived inside ``stop_signals``."""
    return _Stop.depth > 0 and _Stop.requested is not None


def check_stop() -> None:
    """Raise Interrupted (exit code 130 or 143) when a stop was asked for. Call it where state on disk is complete."""
    if stop_requested():
        name, code = ("SIGTERM", EXIT_SIGTERM) if _Stop.requested == signal.SIGTERM else ("SIGINT", EXIT_SIGINT)
        raise Interrupted(f"stopped by {name}", code, "run the same command again; trainings and samples go on where they stopped")
