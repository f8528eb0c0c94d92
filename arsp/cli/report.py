"""``arsp report``: records in, one self-contained HTML page, a PNG, a CSV and a Markdown table out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from arsp.cli.options import CommandContext, command
from arsp.errors import InputError, ResourceError, UsageError

FORMATS = ("html", "png", "csv", "md")
_KINDS = {"html": "html", "png": "plot", "csv": "csv", "md": "markdown"}
_HINT = "Give a run directory, its run.json, or - with the output of a command that ran with --json."


@dataclass(frozen=True)
class Source:
    """One record and where it was read."""

    record: dict[str, Any]
    where: str


@command(
    examples=[
        "arsp sample --num 8 --json | arsp eval - --metric fid --json | arsp report - --html r.html",
        "arsp report runs/* --html r.html --png r.png --csv r.csv --md r.md",
        "arsp report runs/ --title 'One-step students' --out report",
    ],
    overrides=False,
    shared=("out", "fail_if"),
)
def report(
    ctx: CommandContext,
    records: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[RECORD|RUN_DIR|-]...", help="Records, run directories, a folder of runs, or - (default: the newest run)"),
    ] = None,
    html: Annotated[Optional[Path], typer.Option("--html", help="Self-contained page (default: report.html)")] = None,
    png: Annotated[Optional[Path], typer.Option("--png", help="One picture: grids, metric bars, quality over cost")] = None,
    csv: Annotated[Optional[Path], typer.Option("--csv", help="Table with full-precision values")] = None,
    md: Annotated[Optional[Path], typer.Option("--md", help="Table in Markdown")] = None,
    title: Annotated[str, typer.Option("--title", help="Heading of the report")] = "arsp report",
) -> None:
    """Compare runs: sample grids side by side, one metric table, quality over latency, training curves.

    One row for each stack of methods. Values that were measured differently never share a column.

    With --out DIR, report.html, report.png, report.csv and report.md are written there.
    """
    targets = output_paths(ctx.opts.out, {"html": html, "png": png, "csv": csv, "md": md})
    sources = read_sources(records or [])
    if not records:
        ctx.log(f"no record named: reporting on the newest run, {sources[0].where}")
    ctx.plan({"records": [source.where for source in sources], "writes": [str(path) for path in targets.values()], "title": title})
    check_writable(targets)

    from arsp.report.html import build_report, render_html, render_png
    from arsp.report.tables import check_record, to_csv, to_markdown, to_text

    checked = [check_record(source.record, source.where) for source in sources]
    built = build_report(with_parents(checked), title, warn=lambda text: ctx.log(text, "warning"))
    makers: dict[str, Callable[[], bytes]] = {
        "html": lambda: render_html(built).encode(),
        "png": lambda: render_png(built),
        "csv": lambda: to_csv(built.table).encode(),
        "md": lambda: to_markdown(built.table).encode(),
    }
    write_all({targets[kind]: makers[kind]() for kind in targets})
    for path in targets.values():
        ctx.log(f"wrote {path}")
    ctx.emit(report_record(built, targets), to_text(built.table))


def output_paths(out: Path | None, named: dict[str, Path | None]) -> dict[str, Path]:
    """Format -> file: those named, all four in ``--out``, or report.html here. Raises UsageError when two are the same file."""
    targets = {kind: path for kind, path in named.items() if path is not None}
    if out is not None:
        targets = {kind: targets.get(kind, out / f"report.{kind}") for kind in FORMATS}
    targets = targets or {"html": Path("report.html")}
    if len({path.absolute() for path in targets.values()}) < len(targets):
        raise UsageError(f"two outputs name the same file: {', '.join(f'--{kind} {path}' for kind, path in targets.items())}")
    return targets


# ---------------------------------------------------------------- reading


def read_sources(names: list[str]) -> list[Source]:
    """The records behind the arguments, each once. InputError: missing, corrupt, not a record, no run there."""
    from arsp.runs import latest_run, runs_root

    if not names:
        newest = latest_run(lambda record: bool(record.get("metrics") or record.get("artifacts")) and record.get("command") != "report")
        if newest is None:
            raise InputError(f"there is no finished run under {runs_root()} to report on.", "Run: arsp sample --num 8, or name a record.")
        return [Source(newest, str(newest.get("run_dir")))]
    if names.count("-") > 1:
        raise UsageError("'-' (stdin) can be given once.")
    sources: list[Source] = []
    seen: set[str] = set()
    for name in names:
        for source in _read_stdin() if name == "-" else _read_path(Path(name)):
            identity = source.record.get("id")
            if identity is None or identity not in seen:
                sources.append(source)
            seen.add(identity)
    return sources


def _read_path(path: Path) -> list[Source]:
    from arsp.runs import RECORD_NAME, read_record

    if not path.exists():
        raise InputError(f"{path} does not exist.", _HINT)
    if path.is_dir() and not (path / RECORD_NAME).exists():
        runs = sorted(inner.parent for inner in path.glob(f"*/{RECORD_NAME}"))
        if not runs:
            raise InputError(f"{path} holds no run (no {RECORD_NAME} in it or one level below).", _HINT)
    else:
        runs = [path]
    return [Source(_at_home(read_record(run), run), str(run)) for run in runs]


def _at_home(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record of a run directory that was moved looks for its artifacts where it lies now."""
    from arsp.runs import RECORD_NAME

    home = path if path.is_dir() else path.parent if path.name == RECORD_NAME else None
    return record if home is None else record | {"run_dir": str(home.resolve())}


def _read_stdin() -> list[Source]:
    """One record, a JSON array of records, or several JSON documents one after another."""
    text = sys.stdin.read()
    if not text.strip():
        raise InputError("standard input is empty, expected a record.", "The command before the pipe failed, or lacks --json.")
    decoder = json.JSONDecoder()
    found: list[Any] = []
    position = 0
    while text[position:].strip():
        position += len(text[position:]) - len(text[position:].lstrip())
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise InputError(f"standard input is not JSON: {error}", _HINT) from None
        found += value if isinstance(value, list) else [value]
    if not found:
        raise InputError("standard input holds an empty list of records.", _HINT)
    return [Source(_is_record(record, f"record {i} of standard input"), f"stdin:{i}") for i, record in enumerate(found, 1)]


def _is_record(data: Any, where: str) -> dict[str, Any]:
    from arsp.runs import SCHEMA

    if not isinstance(data, dict) or "command" not in data or "schema" not in data:
        raise InputError(f"{where} is not an arsp record (no 'schema' and 'command').", _HINT)
    if data["schema"] != SCHEMA:
        raise InputError(f"{where} has record schema {data['schema']!r}, this arsp reads {SCHEMA}.", "Use the arsp version that wrote it.")
    return data


def with_parents(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before each record, the run of the same stack that it was made from (its pictures and its times), when it is found among the runs."""
    from arsp.report.tables import check_record, stack_name
    from arsp.runs import latest_run

    known = {record.get("id") for record in records}
    complete: list[dict[str, Any]] = []
    for record in records:
        wanted = set(map(str, record.get("parents") or [])) - known
        if wanted:
            name = stack_name(record)
            parent = latest_run(lambda other, wanted=wanted, name=name: other.get("id") in wanted and stack_name(other) == name)
            if parent is not None:
                complete.append(check_record(parent, str(parent.get("run_dir"))))
                known.add(parent["id"])
        complete.append(record)
    return complete


# ---------------------------------------------------------------- writing


def check_writable(targets: dict[str, Path]) -> None:
    """ResourceError before any work when an output cannot be written."""
    import os

    for kind, path in targets.items():
        if path.is_dir():
            raise UsageError(f"--{kind} {path} is a directory.", f"Name a file, e.g. {path / f'report.{kind}'}.")
        home = path.absolute().parent
        while not home.exists():
            home = home.parent
        if not home.is_dir() or not os.access(home, os.W_OK):
            raise ResourceError(f"cannot write {path}: {home} is no writable directory.", "Choose another place.")


def write_all(contents: dict[Path, bytes]) -> None:
    """Write each file atomically. ResourceError when one cannot be written."""
    from arsp.runs import atomic_file

    for path, data in contents.items():
        try:
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise ResourceError(f"cannot write {path}: {error.strerror or error}", "Choose another place.") from None


def report_record(built: Any, targets: dict[str, Path]) -> dict[str, Any]:
    """The record of the report itself: its files, the records it was made from, and every metric with its stack."""
    from arsp.runs import new_record, now, sha256_file

    parents = [record["id"] for record in built.records if isinstance(record.get("id"), str)]
    record = new_record("report", {"title": built.title, "records": parents, "writes": {kind: str(path) for kind, path in targets.items()}})
    record["stack"] = {"name": "report"}
    record["parents"] = parents
    record["metrics"] = [metric | {"stack": stack.label} for stack in built.stacks for metric in stack.metrics.values()]
    record["notes"] = built.notes
    for kind, path in targets.items():
        full = path.resolve()
        record["artifacts"].append({"path": str(full), "kind": _KINDS[kind], "sha256": sha256_file(full), "bytes": full.stat().st_size})
    return record | {"status": "ok", "finished": now()}
