"""What all commands share: the decorator that adds the common options, the context a command works with, and error reporting.

stdout carries the result only (a table, or one JSON document with ``--json``); everything else goes to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import os
import re
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
from pydantic import BaseModel, ValidationError

from arsp import errors
from arsp.config import Schema, config_error, resolve_config, to_yaml
from arsp.errors import ArspError, ConfigError, GateError, InputError, Interrupted, ResourceError, UsageError, nearest

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

DTYPES = ("float32", "bfloat16", "float16", "float64")
KERNELS = ("auto", "reference", "cpu", "cuda")
_PANEL = "Shared options"


def _option(kind: Any, flag: str, help_text: str) -> Any:
    return Annotated[kind, typer.Option(*flag.split(), help=help_text, rich_help_panel=_PANEL)]


# name -> annotation. The option is None (or empty) on the command line when not given; CommonOptions holds the defaults.
SHARED: dict[str, Any] = {
    "device": _option(Optional[str], "--device", "auto, cpu, cuda or cuda:INDEX (default: auto)"),
    "dtype": _option(Optional[str], "--dtype", f"Computation type: {', '.join(DTYPES)} (default: float32)"),
    "batch_size": _option(Optional[int], "--batch-size", "Images at a time (default: chosen by the command)"),
    "seed": _option(Optional[int], "--seed", "Image i depends on (seed, i) only (default: 0)"),
    "threads": _option(Optional[int], "--threads", "CPU threads (default: as torch chooses)"),
    "kernels": _option(Optional[str], "--kernels", f"Back end of the custom operators: {', '.join(KERNELS)} (default: auto)"),
    "config": _option(Optional[list[Path]], "--config -c", "YAML configuration file; may be repeated, later ones win"),
    "out": _option(Optional[Path], "--out -o", "Where the result goes (default: a directory under $ARSP_RUNS or ./runs)"),
    "resume": _option(bool, "--resume/--no-resume", "Continue an unfinished run of the same configuration, or start it over"),
    "fail_if": _option(Optional[list[str]], "--fail-if", "Exit with code 7 when this holds of the result, e.g. 'fid>12'; may be repeated"),
    "print_config": _option(bool, "--print-config", "Print the resolved configuration as runnable YAML and stop"),
    "dry_run": _option(bool, "--dry-run -n", "Print what would be done and stop"),
    "json": _option(bool, "--json", "Print one JSON document instead of a table"),
    "quiet": _option(bool, "--quiet -q", "Warnings and errors only"),
    "verbose": _option(bool, "--verbose -v", "Say more"),
    "traceback": _option(bool, "--traceback", "Show the Python traceback of an error"),
}
ALWAYS = ("dry_run", "json", "quiet", "verbose", "traceback")  # every command takes these


@dataclass
class CommonOptions:
    """Values of the shared options; after ``CommandContext.resolve`` those that are part of the schema hold its values."""

    device: str = "auto"
    dtype: str = "float32"
    batch_size: int | None = None
    seed: int = 0
    threads: int | None = None
    kernels: str = "auto"
    config: list[Path] = dataclasses.field(default_factory=list)
    out: Path | None = None
    resume: bool = True
    fail_if: list[str] = dataclasses.field(default_factory=list)
    print_config: bool = False
    dry_run: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    traceback: bool = False
    overrides: list[str] = dataclasses.field(default_factory=list)


CONFIGURABLE = ("device", "dtype", "batch_size", "seed", "threads", "kernels")  # also keys of a schema that has them


# ---------------------------------------------------------------------------------------------------------------- gates


@dataclass(frozen=True)
class Gate:
    """A parsed ``--fail-if`` condition."""

    text: str
    name: str
    operator: str
    bound: float

    def holds(self, value: float) -> bool:
        below, equal = value < self.bound, value == self.bound
        return {
            "<": below, "<=": below or equal, ">": not (below or equal), ">=": not below, "==": equal, "!=": not equal,
        }[self.operator]  # fmt: skip


def parse_gate(text: str) -> Gate:
    """``name OP number`` with OP one of ``< <= > >= == !=``. Raises UsageError."""
    found = re.fullmatch(r"\s*([^<>=!\s]+)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*", text)
    with contextlib.suppress(ValueError):
        if found and (bound := float(found[3])) == bound:
            return Gate(text.strip(), found[1], found[2], bound)
    raise UsageError(f"--fail-if '{text}' is not a condition", "write NAME OP NUMBER with OP one of < <= > >= == !=, e.g. 'fid>12'")


def gate_values(record: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Everything of a record that a gate may name: metrics, and cost entries (``images_per_s``, ``latency_ms.p50``)."""
    values: dict[str, list[float | None]] = {}
    for metric in record.get("metrics", []):
        values.setdefault(metric["name"], []).append(metric["value"])
    for key, value in record.get("cost", {}).items():
        entries = {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {key: value}
        for name, entry in entries.items():
            if isinstance(entry, (int, float)) and not isinstance(entry, bool):
                values.setdefault(name, []).append(entry)
    return values


def check_gates(gates: Sequence[Gate], record: Mapping[str, Any]) -> None:
    """Raises GateError when a condition holds of any value of its name (or the value is missing), UsageError on an unknown name."""
    values = gate_values(record)
    for gate in gates:
        if gate.name not in values:
            raise UsageError(f"--fail-if '{gate.text}': this result has no '{gate.name}'", nearest(gate.name, values))
    failed = []
    for gate in gates:
        for value in values[gate.name]:
            if value is None or value != value:
                failed.append(f"{gate.text} cannot be judged: {gate.name} has no finite value")
            elif gate.holds(value):
                failed.append(f"{gate.text} ({gate.name} = {value:.6g})")
    if failed:
        raise GateError(f"gate failed: {'; '.join(failed)}")


# -------------------------------------------------------------------------------------------------------------- context


class CommandContext:
    """What a command works with: its shared options, and the only ways to print, to configure and to get a device."""

    def __init__(self, command: str, opts: CommonOptions, given: frozenset[str]):
        self.command = command
        self.opts = opts
        self.given = given  # shared options that stood on the command line
        self.gates = [parse_gate(text) for text in opts.fail_if]
        self._resolved = False
        _check_options(opts)

    def resolve(self, schema: type[Schema], named: Mapping[str, Any], card: Mapping[str, Any] | None = None) -> Schema:
        """The configuration from card, ``-c`` files, named options and overrides; with ``--print-config`` prints it and exits.

        Shared options that were given count as named options where the schema has a key of that name, and take the
        schema's resolved value otherwise.
        """
        self._resolved = True
        shared = {key: getattr(self.opts, key) for key in CONFIGURABLE if key in schema.model_fields and key in self.given}
        config = resolve_config(schema, files=self.opts.config, named={**shared, **named}, overrides=self.opts.overrides, card=card)
        for key in CONFIGURABLE:
            if key in schema.model_fields:
                setattr(self.opts, key, getattr(config, key))
        _check_options(self.opts)
        if self.opts.print_config:
            _write_stdout(to_yaml(config))
            raise typer.Exit(0)
        return config

    def _refuse_unused(self) -> None:
        """What is accepted has an effect: a command that resolves no configuration refuses to be given one."""
        given = [*self.opts.overrides, *(f"-c {path}" for path in self.opts.config)]
        given += ["--print-config"] if self.opts.print_config else []
        if given and not self._resolved:
            raise UsageError(f"this command has no configuration: {', '.join(given)} would have no effect", "see --help for its options")

    def plan(self, plan: str | BaseModel | Mapping[str, Any]) -> None:
        """Call once everything is checked and before the work: with ``--dry-run`` prints the plan on stdout and exits 0."""
        self._refuse_unused()
        if not self.opts.dry_run:
            return
        from arsp.runs import to_json

        if self.opts.json:
            _write_stdout(to_json({"plan": plan}) + "\n")
        elif isinstance(plan, BaseModel):
            _write_stdout(to_yaml(plan))
        else:
            _write_stdout(plan.rstrip("\n") + "\n" if isinstance(plan, str) else to_json(plan) + "\n")
        raise typer.Exit(0)

    def log(self, text: str, level: str = "info") -> None:
        """One message on stderr; level "info" (silent with -q, and on ranks other than 0), "debug" (only with -v) or "warning"."""
        wanted = {"info": not self.opts.quiet, "debug": self.opts.verbose, "warning": True}[level]
        if wanted and os.environ.get("RANK", "0") == "0":
            _print_stderr(f"warning: {text}" if level == "warning" else text)

    @contextlib.contextmanager
    def progress(self, total: int | None, description: str) -> Iterator[Callable[..., None]]:
        """Yield ``advance(n=1)``: a bar on a terminal, otherwise a line every ten seconds; nothing with -q."""
        if self.opts.quiet or os.environ.get("RANK", "0") != "0":
            yield lambda n=1: None
        elif sys.stderr.isatty():
            with _bar(total, description) as advance:
                yield advance
        else:
            yield _line_progress(total, description, self.log)

    def emit(self, record: Mapping[str, Any], table: RenderableType | str | None = None) -> None:
        """Print the result (``record`` as JSON, or ``table``; by default a table of its metrics and costs), then judge the gates.

        Raises:
            GateError: a ``--fail-if`` condition holds. UsageError: it names a metric that the record does not have.
        """
        from arsp.runs import to_json

        self._refuse_unused()
        if self.opts.json:
            _write_stdout(to_json(record) + "\n")
        elif isinstance(table, str):
            _write_stdout(table.rstrip("\n") + "\n")
        else:
            _print_table(record_table(record) if table is None else table)
        check_gates(self.gates, record)

    def setup_torch(self) -> torch.device:
        """Apply --threads and --kernels and return the device. Raises ResourceError when a device or a kernel is not there."""
        import torch

        from arsp import kernels

        if self.opts.threads:
            torch.set_num_threads(self.opts.threads)
        kernels.set_backend(self.opts.kernels)
        wanted = self.opts.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted.startswith("cuda"):
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            index = int(wanted.partition(":")[2] or 0)
            if index >= count:
                have = f"this machine has {count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device is available"
                raise ResourceError(f"--device {wanted}: {have}", "use --device cpu or --device auto")
            wanted = f"cuda:{index}"
        self.log(f"device {wanted}, {torch.get_num_threads()} threads, kernels {self.opts.kernels}", "debug")
        return torch.device(wanted)

    def torch_dtype(self) -> torch.dtype:
        """The torch type of --dtype."""
        import torch

        return getattr(torch, self.opts.dtype)


def _check_options(opts: CommonOptions) -> None:
    if opts.quiet and opts.verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    if opts.dtype not in DTYPES:
        raise UsageError(f"unknown --dtype '{opts.dtype}'", nearest(opts.dtype, DTYPES))
    if opts.kernels not in KERNELS:
        raise UsageError(f"unknown --kernels '{opts.kernels}'", nearest(opts.kernels, KERNELS))
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", opts.device):
        raise UsageError(f"unknown --device '{opts.device}'", "use auto, cpu, cuda or cuda:INDEX")
    for name in ("threads", "batch_size"):
        value = getattr(opts, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= opts.seed < 2**64:
        raise UsageError(f"--seed must be between 0 and 2^64 - 1, got {opts.seed}")


# ------------------------------------------------------------------------------------------------------------- printing


def _write_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_stderr(text: str) -> None:
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def _print_table(table: RenderableType) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140  # a pipe has no width: do not cut columns at 80
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def number(value: Any) -> str:
    """A table cell: four significant digits, thousands separated, "-" for nothing."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def make_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> RenderableType:
    """A rich table; columns whose cells are all numbers are right-aligned, nothing in a cell is read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = all(row[index] is None or isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(number(cell)) for cell in row))
    return table


def record_table(record: Mapping[str, Any]) -> RenderableType:
    """The default view of a record: its metrics, its known costs, and where it lies."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    if record.get("metrics"):
        no = lambda m: "" if m.get("comparable", True) else "no"
        rows = [(m["name"], m["value"], m.get("n"), m.get("protocol") or "", no(m)) for m in record["metrics"]]
        parts.append(make_table(None, ("metric", "value", "n", "protocol", "comparable"), rows))
    cost = {**record.get("cost", {})}
    simulated = cost.pop("simulated", False)
    for key in [key for key, value in cost.items() if isinstance(value, Mapping)]:
        cost.update({f"{key}.{inner}": value for inner, value in cost.pop(key).items()})
    known = [(key, value) for key, value in cost.items() if isinstance(value, (int, float, str))]
    if known:
        parts.append(make_table(None, ("cost" + (" (simulated)" if simulated else ""), "value"), known))
    if record.get("run_dir"):
        parts.append(Text(f"{record.get('status', '')}: {record['run_dir']}"))
    return Group(*parts)


@contextlib.contextmanager
def _bar(total: int | None, description: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n=1: bar.advance(task, n)


def _line_progress(total: int | None, description: str, log: Callable[[str], None], every_s: float = 10.0) -> Callable[..., None]:
    done, shown_done, shown = 0, 0, time.monotonic()

    def advance(n: int = 1) -> None:
        nonlocal done, shown_done, shown
        done += n
        now = time.monotonic()
        if now - shown < every_s:
            if now - shown < 0.5:
                shown_done = done  # what a resumed run had already done says nothing about the speed
            return
        rate = (done - shown_done) / (now - shown)
        left = f", about {(total - done) / rate:.0f} s left" if total and rate > 0 else ""
        log(f"{description}: {done}{f'/{total}' if total else ''}{left}")
        shown, shown_done = now, done

    return advance


# --------------------------------------------------------------------------------------------------------------- errors

_CLICK_ERRORS = (typer.Exit, typer.Abort, *typer.BadParameter.__bases__)  # handled by typer itself


def to_arsp_error(error: BaseException) -> ArspError | None:
    """The expected failure behind an exception of another library; None when it is a bug."""
    if isinstance(error, ArspError):
        return error
    if isinstance(error, ValidationError):
        return ConfigError(config_error(error, BaseModel).message)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first_line = str(error).partition("\n")[0] or "allocation failed"
        return ResourceError(f"out of memory: {first_line}", "try a smaller --batch-size")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError("no space left on the device" + (f" for {error.filename}" if error.filename else ""))
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(f"{error.filename}: {error.strerror}")
    return None


def report_error(error: BaseException, show_traceback: bool) -> int:
    """Print an error on stderr the way all commands do and return its exit code."""
    if show_traceback:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        _print_stderr("interrupted")
        return errors.EXIT_SIGINT
    known = to_arsp_error(error)
    if known is not None:
        _print_stderr(f"error: {known.message}")
        if known.hint:
            _print_stderr(f"hint: {known.hint}")
        return known.exit_code
    _print_stderr(f"error: {type(error).__name__}: {str(error) or 'no message'}")
    if not show_traceback:
        _print_stderr("hint: this is a bug; run again with --traceback")
    return errors.EXIT_BUG


def _on_sigterm(number: int, frame: Any) -> NoReturn:
    raise Interrupted("stopped by SIGTERM", errors.EXIT_SIGTERM)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Outside ``runs.stop_signals``, SIGTERM unwinds the stack like Ctrl-C, so that temporary files go and locks are released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# ------------------------------------------------------------------------------------------------------------ decorator


@dataclass(frozen=True)
class CommandSpec:
    """What ``@command`` knows about a function besides its signature."""

    examples: tuple[str, ...]
    schema: type[BaseModel] | None

    @property
    def epilog(self) -> str:
        """The end of ``--help``: one example a line (a blank line between keeps them apart), safe from markup."""
        from rich.markup import escape

        return "\n\n".join(["Examples:", *(escape(example) for example in self.examples)])


def _is_argument(parameter: inspect.Parameter) -> bool:
    metadata = typing.get_args(parameter.annotation)[1:] if typing.get_origin(parameter.annotation) is Annotated else ()
    return any(type(item).__name__ == "ArgumentInfo" for item in (*metadata, parameter.default))


def _is_override(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"[A-Za-z_][\w.]*=", value) is not None and not Path(value).exists()


def _take_overrides(values: dict[str, Any], positionals: Mapping[str, Any]) -> list[str]:
    """Remove ``key.path=value`` texts from a command's own positional values (they come first on the line) and return them."""
    taken: list[str] = []
    for name, default in positionals.items():
        value = values[name]
        if isinstance(value, (list, tuple)):
            taken += [str(item) for item in value if _is_override(str(item))]
            values[name] = [item for item in value if not _is_override(str(item))]
        elif value is not None and _is_override(str(value)):
            taken.append(str(value))
            values[name] = default
    return taken


def command(
    *, examples: Sequence[str], overrides: bool = True, shared: Sequence[str] | None = None, schema: type[BaseModel] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn ``fn(ctx, own options...)`` into a command with the shared options.

    Args:
        examples: copyable command lines for the end of ``--help``; the first runs without a download.
        overrides: accept trailing ``key.path=value``; they may also follow the command's own positional arguments.
        shared: names from ``SHARED`` that have an effect on this command (None: all); ``ALWAYS`` are added.
        schema: the command's configuration schema, for documentation.
    """
    taken = [name for name in SHARED if shared is None or name in shared or name in ALWAYS]
    unknown = set(shared or ()) - set(SHARED)
    if unknown:
        raise ValueError(f"not shared options: {sorted(unknown)}")

    def decorate(fn: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(fn, include_extras=True)
        own = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in list(inspect.signature(fn).parameters.values())[1:]]
        clash = {p.name for p in own} & {*taken, "overrides"}
        if clash:
            raise ValueError(f"{fn.__name__}: {sorted(clash)} are shared options; leave them out of shared=(...) to define your own")
        positionals = {p.name: p.default for p in own if _is_argument(p) and p.default is not inspect.Parameter.empty}
        parameters = [*own, *_shared_parameters(taken)]
        variadic = any(_is_argument(p) and "list" in str(p.annotation).lower() for p in own)
        if overrides and not variadic:
            parameters.append(_OVERRIDES)

        @functools.wraps(fn)
        def run(**values: Any) -> None:
            common = {name: values.pop(name) for name in taken}
            extra = [*(_take_overrides(values, positionals) if overrides else []), *(values.pop("overrides", None) or [])]
            _guarded(fn, common, extra, values)

        del run.__wrapped__
        run.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.spec = CommandSpec(tuple(examples), schema)
        return run

    return decorate


_OVERRIDES = inspect.Parameter(
    "overrides",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Configuration overrides; see --print-config for the keys")
    ],
)


def _shared_parameters(names: Sequence[str]) -> list[inspect.Parameter]:
    defaults = {"resume": True, **dict.fromkeys(("print_config", *ALWAYS), False)}
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, kind, default=defaults.get(name), annotation=SHARED[name]) for name in names]


def _guarded(fn: Callable[..., None], common: dict[str, Any], overrides: list[str], values: dict[str, Any]) -> None:
    """Run a command's body; every exception becomes a message on stderr and its exit code."""
    given = {name: value for name, value in common.items() if value is not None and value != []}
    try:
        with _sigterm_raises():
            ctx = CommandContext(fn.__name__, CommonOptions(**given, overrides=overrides), frozenset(given))
            fn(ctx, **values)
    except _CLICK_ERRORS:
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say, also at exit
        raise typer.Exit(errors.EXIT_OK) from None
    except (Exception, KeyboardInterrupt) as error:
        raise typer.Exit(report_error(error, common["traceback"])) from None
