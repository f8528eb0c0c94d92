"""From run records to one table: a row per stack, a column per (metric, image count, protocol, reference).

Nothing is computed anew here. Values that were measured differently never share a column, a speed-up is given only when
both times come from the same kind of command, machine and batch size, and the two honesty bits of a record
(``comparable``, ``simulated``) follow each value as a footnote mark.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from arsp.errors import InputError

Record = dict[str, Any]

# name -> (title, higher is better, digits after the point)
METRICS: dict[str, tuple[str, bool, int]] = {
    "fid": ("FID", False, 2),
    "kid": ("KID", False, 4),
    "is": ("IS", True, 2),
    "precision": ("Precision", True, 3),
    "recall": ("Recall", True, 3),
    "class_accuracy": ("Class accuracy", True, 3),
    "color_accuracy": ("Colour accuracy", True, 3),
    "f_score": ("F-score", True, 3),
    "render_error": ("Render error", False, 4),
}
POSITION_METRIC = "accuracy_by_position"
DECODING_TITLES = {  # of modes of the verify family; neither quality nor cost
    "acceptance": "Accepted drafts", "single_token_share": "Passes with a single token", "identical": "Images as by plain sampling",
}  # fmt: skip
_IN_COST_COLUMNS = ("passes", "tokens_per_pass", "latency_ms", "ar_latency_ms", "speedup")  # metrics of a paired record
PLAIN = "plain-"  # begins the kinds of a paired record's artifacts that belong to plain sampling
NOT_COMPARABLE = "†"
SIMULATED = "‡"
MISSING = "–"
ROLES = ("teacher", "accelerated", "student", "control", "reference")  # order of the rows
_ROLE_WORDS = (  # first match wins; words of the stack's name and sampler
    ("control", {"naive", "mode", "skip", "control"}),
    ("reference", {"real", "reconstruction", "reconstructions", "recon", "dataset"}),
    ("student", {"dd1", "dd2", "student", "distilled"}),
    ("accelerated", {"sjd", "gsd", "spectr", "rsd", "lantern", "litevar", "code", "w8a8", "w4a8", "kv", "sparse", "speculative"}),
)
_TIMING_COMMANDS = ("bench", "speculate", "sample", "evaluate")  # where a latency is taken from, best first
_COMPARABLE_NOTE = (
    "Comparable inside this report only, not with published numbers: measured with a small feature network or with too few images."
)
_SIMULATED_NOTE = "the arithmetic of the method is imitated, so time and memory are not those of a real implementation."
_COLUMN_NOTE = "n is the number of images behind a value. Values with different n, protocol or reference stand in columns of their own."
_INTERVAL_NOTE = "Small print under a value of the page (low and high in the CSV) is its 95 % interval over resampled images."
_PAIRED_NOTE = (
    "A speed-up with an interval was measured against plain sampling of the same images in turn: median over batches, 95 % interval over "
    "resampled batches."
)
_EXACTNESS_NOTE = "Exact: images follow the law of plain sampling. Bounded and lossy: they follow another one."
_MEMORY_KEYS = ("weight_bytes", "kv_bytes", "peak_mem_bytes")
_MACHINE_KEYS = ("machine", "hostname", "host", "cpu", "gpu", "device", "threads", "dtype")


@dataclass(frozen=True)
class Column:
    """What makes two values of a metric the same measurement."""

    name: str
    n: int | None = None
    protocol: str | None = None
    reference_sha256: str | None = None

    @property
    def title(self) -> str:
        return METRICS[self.name][0] if self.name in METRICS else DECODING_TITLES.get(self.name, self.name)

    @property
    def higher_is_better(self) -> bool | None:
        """None for a metric whose direction is not known."""
        return METRICS[self.name][1] if self.name in METRICS else None

    @property
    def arrow(self) -> str:
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    @property
    def details(self) -> list[str]:
        """Image count and protocol, in words; a protocol that starts with the metric it belongs to loses that part."""
        count = [f"n = {self.n}"] if self.n is not None else []
        head, _, rest = (self.protocol or "").partition("/")
        protocol = rest if rest and head in (self.name, "prc") else self.protocol
        return count + ([protocol] if protocol else [])


@dataclass
class Stack:
    """All that the given records say about one stack of methods."""

    name: str
    label: str
    role: str
    records: list[Record] = field(default_factory=list)
    metrics: dict[Column, Record] = field(default_factory=dict)
    curves: dict[str, list[Record]] = field(default_factory=dict)
    cost: Record = field(default_factory=dict)
    timing: Record | None = None  # the record that the latency was taken from

    @property
    def passes(self) -> float | None:
        """Network passes for an image."""
        return number(self.cost.get("passes"))

    @property
    def simulated(self) -> bool:
        return bool(self.cost.get("simulated"))

    @property
    def exactness(self) -> str | None:
        """What a mode of the verify family promises: exact, bounded(...) or lossy."""
        described = [(record.get("stack") or {}).get("verify") for record in self.records]
        return next((str(verify["exactness"]) for verify in described if isinstance(verify, dict) and verify.get("exactness")), None)

    @property
    def decoding(self) -> Record | None:
        """Of such a mode: how many tokens its passes committed, where drafts stood."""
        report = self.cost.get("verify")
        return report if isinstance(report, dict) and isinstance(report.get("committed"), dict) else None

    @property
    def paired_speedup(self) -> Record | None:
        """The metric of a run that took turns with plain sampling, where the latency was taken from that run."""
        if (self.timing or {}).get("command") != "speculate":
            return None
        return next((metric for metric in self.timing.get("metrics") or [] if metric["name"] == "speedup"), None)

    @property
    def ms_per_image(self) -> float | None:
        """Milliseconds for an image: from the throughput, else the median latency over the batch size."""
        cost = (self.timing or {}).get("cost") or {}
        rate = number(cost.get("images_per_s"))
        if rate is not None and rate > 0:
            return 1000.0 / rate
        latency = number((cost.get("latency_ms") or {}).get("p50"))
        return latency / (timing_batch(self) or 1) if latency is not None and latency > 0 else None

    def value(self, column: Column) -> float | None:
        metric = self.metrics.get(column)
        return number(metric["value"]) if metric else None


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | str | None = None
    best: bool = False
    marks: str = ""
    interval: str = ""

    def __str__(self) -> str:
        return self.text + self.marks


@dataclass
class MetricTable:
    """Stacks in reading order with one formatted cell under each heading: (title, details) of speed, metrics, then memory."""

    stacks: list[Stack]
    columns: list[Column]
    headings: list[tuple[str, list[str]]]
    rows: list[list[Cell]]
    footnotes: list[tuple[str, str]]
    shared_details: list[str]  # image count and protocol where all metric columns agree on them: said once
    baseline: Stack | None


def number(value: Any) -> float | None:
    """The finite number in a JSON value, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


# ---------------------------------------------------------------- records -> stacks


def check_record(record: Any, source: str) -> Record:
    """``record`` when its parts have the types a report reads; InputError naming the part otherwise."""
    hint = "A record is the run.json of a run directory, or what a command prints with --json."
    if not isinstance(record, dict):
        raise InputError(f"{source}: a record is a JSON object, found {type(record).__name__}.", hint)
    wanted = dict.fromkeys(("stack", "cost", "environment", "config", "curves", "plain"), dict) | dict.fromkeys(
        ("metrics", "artifacts", "parents"), list
    )
    for key, kind in wanted.items():
        if record.get(key) is not None and not isinstance(record[key], kind):
            raise InputError(f"{source}: '{key}' of the record is {type(record[key]).__name__}, expected {kind.__name__}.", hint)
    for key, required in (("metrics", "name"), ("artifacts", "path")):
        for item in record.get(key) or []:
            if not isinstance(item, dict) or not isinstance(item.get(required), str):
                raise InputError(f"{source}: an entry of '{key}' has no '{required}': {str(item)[:80]}", hint)
    latency = (record.get("cost") or {}).get("latency_ms")
    if latency is not None and not isinstance(latency, dict):
        raise InputError(f"{source}: 'cost.latency_ms' is {type(latency).__name__}, expected an object with p50 and p95.", hint)
    if record.get("plain"):
        check_record(record["plain"], f"{source}, 'plain'")
    for name, points in (record.get("curves") or {}).items():
        if not isinstance(points, list) or not all(isinstance(point, dict) and {"x", "y"} <= point.keys() for point in points):
            raise InputError(f"{source}: curve '{name}' is no list of {{x, y}} points.", hint)
    if not {"command", "stack", "metrics", "artifacts"} & record.keys():
        raise InputError(f"{source}: this JSON object is no record (keys: {', '.join(sorted(record)[:6]) or 'none'}).", hint)
    return record


def stack_name(record: Record) -> str:
    """The canonical variant name; for a record without one the model, else the command."""
    stack, config = record.get("stack") or {}, record.get("config") or {}
    for name in (stack.get("name"), stack.get("model"), config.get("model"), record.get("command")):
        if isinstance(name, str) and name:
            return name
    return "unnamed"


def stack_role(record: Record) -> str:
    """``stack.role`` when the record says it, else read off the stack's name, sampler and kind."""
    stack = record.get("stack") or {}
    if stack.get("role") in ROLES:
        return stack["role"]
    if stack.get("verify"):
        return "accelerated"
    words = set(re.split(r"[^a-z0-9]+", f"{stack_name(record)} {stack.get('sampler') or ''}".lower()))
    role = next((role for role, known in _ROLE_WORDS if words & known), "teacher")
    return "student" if role == "teacher" and stack.get("kind") == "student" else role


def collect(records: Iterable[Record]) -> list[Stack]:
    """Records -> stacks in reading order: teacher, accelerated, students (by passes, most first), controls, references.

    Records of one stack (same name, no contradiction in its description or in a measured value) share a row; a second
    run that measured something else for the same name gets its own row with a telling label.
    """
    stacks: list[Stack] = []
    for record in (part for whole in records for part in split_pair(whole)):
        home = next((stack for stack in stacks if _belongs(stack, record)), None)
        if home is None:
            name = stack_name(record)
            home = Stack(name, name, stack_role(record))
            stacks.append(home)
        _absorb(home, record)
    _make_labels_unique(stacks)
    return sorted(stacks, key=lambda stack: (ROLES.index(stack.role), -(stack.passes if stack.passes is not None else -1)))


def split_pair(record: Record) -> list[Record]:
    """A record that was measured beside plain sampling as two, plain sampling first; any other one as it is."""
    plain = record.get("plain")
    if not isinstance(plain, dict):
        return [record]
    shared = {key: record.get(key) for key in ("schema", "command", "environment", "config", "run_dir")}
    artifacts = [a | {"kind": a["kind"].removeprefix(PLAIN)} for a in record.get("artifacts") or [] if _is_plain(a)]
    rest = [artifact for artifact in record.get("artifacts") or [] if not _is_plain(artifact)]
    part = {**shared, "part_of": record.get("id"), "stack": plain.get("stack"), "cost": plain.get("cost"), "artifacts": artifacts}
    return [part, record | {"artifacts": rest}]


def _is_plain(artifact: Record) -> bool:
    return str(artifact.get("kind")).startswith(PLAIN)


def _belongs(stack: Stack, record: Record) -> bool:
    if stack.name != stack_name(record):
        return False
    described = record.get("stack") or {}
    for other in stack.records:
        known = other.get("stack") or {}
        if any(described[key] != known[key] for key in described.keys() & known.keys()):
            return False
    values = {column: metric.get("value") for column, metric in _table_metrics(record)}
    return all(stack.metrics[column].get("value") == value for column, value in values.items() if column in stack.metrics)


def _absorb(stack: Stack, record: Record) -> None:
    stack.records.append(record)
    stack.metrics.update(_table_metrics(record))
    stack.curves.update(record.get("curves") or {})
    positions = _positions_from_metrics(record)
    if positions:
        stack.curves.setdefault(POSITION_METRIC, positions)
    cost = record.get("cost") or {}
    simulated = stack.simulated or bool(cost.get("simulated"))
    stack.cost.update({key: value for key, value in cost.items() if value is not None})
    stack.cost["simulated"] = simulated
    has_timing = number(cost.get("images_per_s")) or number((cost.get("latency_ms") or {}).get("p50")) is not None
    if has_timing and (stack.timing is None or _timing_rank(record) <= _timing_rank(stack.timing)):
        stack.timing = record


def _timing_rank(record: Record) -> int:
    command = record.get("command")
    return _TIMING_COMMANDS.index(command) if command in _TIMING_COMMANDS else len(_TIMING_COMMANDS)


def _table_metrics(record: Record) -> list[tuple[Column, Record]]:
    elsewhere = (POSITION_METRIC, *(_IN_COST_COLUMNS if record.get("command") == "speculate" else ()))
    metrics = [metric for metric in record.get("metrics") or [] if metric["name"] not in elsewhere]
    return [(_column_of(metric), {"value": None} | metric) for metric in metrics]


def _column_of(metric: Record) -> Column:
    n, protocol, reference = metric.get("n"), metric.get("protocol"), metric.get("reference_sha256")
    return Column(
        metric["name"],
        int(n) if number(n) is not None else None,
        str(protocol) if protocol else None,
        str(reference) if reference else None,
    )


def _positions_from_metrics(record: Record) -> list[Record]:
    """Accuracy by position given as metrics: one with a list as value, or one for each position."""
    found = [metric for metric in record.get("metrics") or [] if metric["name"] == POSITION_METRIC]
    if len(found) == 1 and isinstance(found[0].get("value"), list):
        return [{"x": index, "y": value} for index, value in enumerate(found[0]["value"])]
    return [{"x": metric.get("position", index), "y": metric.get("value")} for index, metric in enumerate(found)]


def _make_labels_unique(stacks: Sequence[Stack]) -> None:
    """Stacks of one name are told apart by the first of these that differs: model, weights, number in the report."""
    for name in {stack.name for stack in stacks}:
        twins = [stack for stack in stacks if stack.name == name]
        if len(twins) == 1:
            continue
        described = [twin.records[0].get("stack") or {} for twin in twins]
        models = [str(stack.get("model") or "").rstrip("/").rsplit("/", 1)[-1] for stack in described]
        weights = [str(stack.get("weights_sha256") or "")[:8] for stack in described]
        numbers = [f"#{index + 1}" for index in range(len(twins))]
        chosen = next(texts for texts in (models, weights, numbers) if len(set(texts)) == len(texts) and all(texts))
        for twin, text in zip(twins, chosen, strict=True):
            twin.label = f"{name} ({text})"


# ---------------------------------------------------------------- stacks -> table


def metric_table(stacks: Sequence[Stack]) -> MetricTable:
    """The table every output shows: passes, time and memory first, then the metrics in their usual order."""
    baseline = find_baseline(stacks)
    columns = metric_columns(stacks)
    shared = [text for text in columns[0].details if all(text in column.details for column in columns)] if len(columns) > 1 else []
    speed, memory = _cost_columns(stacks, baseline)
    headings = [(title, []) for title in speed]
    headings += [(f"{column.title} {column.arrow}".strip(), [text for text in column.details if text not in shared]) for column in columns]
    headings += [(title, []) for title in memory]
    cells = [*speed.values(), *(_metric_cells(stacks, column) for column in columns), *memory.values()]
    rows = [[column[index] for column in cells] for index in range(len(stacks))]
    return MetricTable(list(stacks), columns, headings, rows, _footnotes(stacks, columns), shared, baseline)


def find_baseline(stacks: Sequence[Stack]) -> Stack | None:
    """The first plain autoregressive teacher."""
    return next((stack for stack in stacks if stack.role == "teacher"), None)


def metric_columns(stacks: Sequence[Stack]) -> list[Column]:
    names = list(METRICS)
    columns = {column for stack in stacks for column in stack.metrics}

    def order(column: Column) -> tuple:
        rank = names.index(column.name) if column.name in names else len(names)
        return rank, column.name, -(column.n or 0), column.protocol or "", column.reference_sha256 or ""

    return sorted(columns, key=order)


def speedup(stack: Stack, baseline: Stack | None) -> float | None:
    """Baseline time over this stack's time; None unless both were timed by the same command, machine and (known) batch size. Where the
    stack took turns with plain sampling, the ratio measured then."""
    if stack.paired_speedup is not None:
        return number(stack.paired_speedup.get("value"))
    if baseline is None or stack is baseline or not stack.ms_per_image or not baseline.ms_per_image:
        return None
    here, there = stack.timing or {}, baseline.timing or {}
    same_command = here.get("command") == there.get("command")
    same_batch = timing_batch(stack) is not None and timing_batch(stack) == timing_batch(baseline)
    if not same_command or not same_batch or not _same_machine(here, there):
        return None
    return baseline.ms_per_image / stack.ms_per_image


def timing_batch(stack: Stack) -> int | None:
    """Batch size that the time was measured at."""
    record = stack.timing or {}
    for source in (record.get("cost") or {}, record.get("config") or {}):
        batch = number(source.get("batch_size"))
        if batch:
            return int(batch)
    return None


def _same_machine(one: Record, other: Record) -> bool:
    here, there = one.get("environment") or {}, other.get("environment") or {}
    return all(here.get(key) == there.get(key) for key in _MACHINE_KEYS)


def _best(stacks: Sequence[Stack], column: Column) -> float | None:
    values = [stack.value(column) for stack in stacks if stack.role != "reference"]
    known = [value for value in values if value is not None]
    if column.higher_is_better is None or len(known) < 2:
        return None
    return max(known) if column.higher_is_better else min(known)


def _metric_cells(stacks: Sequence[Stack], column: Column) -> list[Cell]:
    best = _best(stacks, column)
    return [_metric_cell(stack, column, best) for stack in stacks]


def _metric_cell(stack: Stack, column: Column, best: float | None) -> Cell:
    metric, value = stack.metrics.get(column), stack.value(column)
    if metric is None or value is None:
        return Cell(MISSING)
    spread = number(metric.get("std"))
    text = format_value(column.name, value)
    is_best = best is not None and stack.role != "reference" and text == format_value(column.name, best)
    text += f" ± {format_value(column.name, spread)}" if spread is not None else ""
    low, high = _interval(metric)
    interval = "" if low is None or high is None else f"{format_value(column.name, low)} to {format_value(column.name, high)}"
    return Cell(text, value, is_best, NOT_COMPARABLE if metric.get("comparable") is False else "", interval)


def _interval(metric: Record) -> tuple[float | None, float | None]:
    """The 95 % interval of a value, where it was measured."""
    bounds = metric.get("ci95")
    return (number(bounds[0]), number(bounds[1])) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)


def _cost_columns(stacks: Sequence[Stack], baseline: Stack | None) -> tuple[dict[str, list[Cell]], dict[str, list[Cell]]]:
    """Title -> cells of the speed columns and of the memory columns that at least one stack has a value for."""
    marks = [SIMULATED if stack.simulated else "" for stack in stacks]

    def filled(columns: dict[str, list[Cell]]) -> dict[str, list[Cell]]:
        return {title: cells for title, cells in columns.items() if any(cell.value is not None for cell in cells)}

    speed = {
        "Exactness": [Cell(stack.exactness or MISSING, stack.exactness) for stack in stacks],
        "Passes": [_plain(stack.passes) for stack in stacks],
        "Tokens/pass": [_plain(number(stack.cost.get("tokens_per_pass")) if stack.role == "accelerated" else None) for stack in stacks],
        "ms/image": [_plain(stack.ms_per_image, mark) for stack, mark in zip(stacks, marks, strict=True)],
        "Speed-up": [_speedup_cell(stack, baseline, mark) for stack, mark in zip(stacks, marks, strict=True)],
    }
    memory = {
        title: [_bytes(number(stack.cost.get(key)), mark) for stack, mark in zip(stacks, marks, strict=True)]
        for title, key in zip(("Weights", "Cache", "Peak memory"), _MEMORY_KEYS, strict=True)
    }
    return filled(speed), filled(memory)


def _footnotes(stacks: Sequence[Stack], columns: Sequence[Column]) -> list[tuple[str, str]]:
    notes: list[tuple[str, str]] = []
    if any(metric.get("comparable") is False for stack in stacks for metric in stack.metrics.values()):
        notes.append((NOT_COMPARABLE, _COMPARABLE_NOTE))
    simulated = [stack.label for stack in stacks if stack.simulated]
    if simulated:
        notes.append((SIMULATED, f"Simulated ({', '.join(simulated)}): {_SIMULATED_NOTE}"))
    if any(stack.ms_per_image for stack in stacks):
        notes.append(("", _timing_note(stacks)))
    if any(column.n is not None for column in columns):
        notes.append(("", _COLUMN_NOTE))
    if any(_interval(metric)[0] is not None for stack in stacks for metric in stack.metrics.values()):
        notes.append(("", _INTERVAL_NOTE))
    if any(stack.exactness for stack in stacks):
        notes.append(("", _EXACTNESS_NOTE))
    if any(stack.paired_speedup for stack in stacks):
        notes.append(("", _PAIRED_NOTE))
    hashes: dict[str, list[str]] = {}
    for column in columns:
        if column.reference_sha256 and column.title not in hashes.setdefault(column.reference_sha256, []):
            hashes[column.reference_sha256].append(column.title)
    if hashes:
        listed = "; ".join(f"{', '.join(titles)} {digest[:16]}" for digest, titles in hashes.items())
        notes.append(("", f"Reference statistics (SHA-256): {listed}."))
    return notes


def _timing_note(stacks: Sequence[Stack]) -> str:
    timed = [stack for stack in stacks if stack.timing]
    ways = sorted({f"'{(stack.timing or {}).get('command')}' at {_batch_words(stack)}" for stack in timed})
    baseline = find_baseline(stacks)
    without = [stack.label for stack in timed if stack is not baseline and speedup(stack, baseline) is None]
    text = f"Times were measured by {', '.join(ways)}."
    if baseline is not None and without:
        same = f"by the same command, on the same machine and at the same batch size as {baseline.label}"
        text += f" No speed-up is given for {', '.join(without)}: not timed {same}."
    return text


def _batch_words(stack: Stack) -> str:
    batch = timing_batch(stack)
    return f"batch size {batch}" if batch else "an unrecorded batch size"


# ---------------------------------------------------------------- formats


def format_value(name: str, value: float) -> str:
    """A metric's value with the digits that are worth reading."""
    if name not in METRICS:
        return f"{value:.4g}"
    digits = METRICS[name][2]
    return f"{value:.1f}" if digits == 2 and abs(value) >= 100 else f"{value:.{digits}f}"


def _plain(value: float | None, marks: str = "") -> Cell:
    if value is None:
        return Cell(MISSING)
    text = f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.3g}"
    return Cell(text, value, marks=marks)


def _times(value: float | None, marks: str) -> Cell:
    return Cell(MISSING) if value is None else Cell(f"{value:.1f}x" if value < 100 else f"{value:.0f}x", value, marks=marks)


def _speedup_cell(stack: Stack, baseline: Stack | None, marks: str) -> Cell:
    """With its interval where it has one: speed-ups of decoding are small, and so are the differences between them."""
    cell = _times(speedup(stack, baseline), marks)
    return cell if stack.paired_speedup is None else Cell(speedup_text(stack), cell.value, marks=marks)


def speedup_text(stack: Stack) -> str:
    """``1.52x [1.40, 1.61]`` of a stack that took turns with plain sampling; without the interval where too few batches were timed."""
    metric = stack.paired_speedup or {}
    value, (low, high) = number(metric.get("value")), _interval(metric)
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return MISSING if value is None else f"{value:.2f}x{interval}"


def _bytes(value: float | None, marks: str) -> Cell:
    if value is None:
        return Cell(MISSING)
    amount = value
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return Cell(f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}", value, marks=marks)


def to_csv(table: MetricTable) -> str:
    """Full-precision values; after each metric its 95 % interval and whether it is comparable with published numbers."""
    header = ["stack", "role", "simulated", "exactness", "passes", "tokens_per_pass", "ms_per_image"]
    header += ["speedup", "speedup low", "speedup high", *_MEMORY_KEYS]
    for column in table.columns:
        reference = [f"reference {column.reference_sha256[:16]}"] if column.reference_sha256 else []
        details = [f"n = {column.n}" if column.n is not None else "", column.protocol or "", *reference]
        name = column.name + "".join(f" [{text}]" for text in details if text)
        header += [name, f"{name} low", f"{name} high", f"{name} comparable"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for stack in table.stacks:
        costs = [stack.passes, number(stack.cost.get("tokens_per_pass")), stack.ms_per_image, speedup(stack, table.baseline)]
        costs += [*_interval(stack.paired_speedup or {}), *(number(stack.cost.get(key)) for key in _MEMORY_KEYS)]
        row: list[Any] = [_spreadsheet_safe(stack.label), stack.role, str(stack.simulated).lower(), stack.exactness or ""]
        row += map(_csv_number, costs)
        for column in table.columns:
            metric = stack.metrics.get(column)
            comparable = "" if metric is None else str(metric.get("comparable") is not False).lower()
            row += [*map(_csv_number, (stack.value(column), *_interval(metric or {}))), comparable]
        writer.writerow(row)
    return text.getvalue()


def _csv_number(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _spreadsheet_safe(text: str) -> str:
    """A leading formula character is quoted, so that a spreadsheet shows the name instead of running it."""
    return f"'{text}" if text[:1] in "=+-@\t" else text


def to_markdown(table: MetricTable) -> str:
    """A pipe table with the footnotes under it."""
    header = ["stack", *map(_heading, table.headings)]
    lines = ["| " + " | ".join(map(_markdown_safe, header)) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    for stack, row in zip(table.stacks, table.rows, strict=True):
        values = [f"**{cell.text}**{cell.marks}" if cell.best else str(cell) for cell in row]
        name = _markdown_safe(stack.label) + (SIMULATED if stack.simulated else "")
        lines.append("| " + " | ".join([name, *values]) + " |")
    return "\n".join(lines) + "\n" + "".join(f"\n{_markdown_safe(note)}\n" for note in note_lines(table))


def _heading(heading: tuple[str, list[str]]) -> str:
    title, details = heading
    return f"{title} ({', '.join(details)})" if details else title


def note_lines(table: MetricTable) -> list[str]:
    """What all columns share, then the footnotes behind their marks."""
    shared = [f"All metrics: {', '.join(table.shared_details)}."] if table.shared_details else []
    return shared + [f"{mark} {text}".strip() for mark, text in table.footnotes]


def _markdown_safe(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split()))


def to_text(table: MetricTable, width: int = 100) -> str:
    """Aligned plain text. Columns that do not fit into ``width`` characters go on in a further block under the same stacks."""
    names = ["stack", *(stack.label + (SIMULATED if stack.simulated else "") for stack in table.stacks)]
    columns = [[_heading(heading), *(str(row[i]) + "*" * row[i].best for row in table.rows)] for i, heading in enumerate(table.headings)]
    margin = max(map(len, names))
    blocks: list[list[list[str]]] = [[]]
    used = margin
    for column in columns:
        size = max(map(len, column)) + 2
        if blocks[-1] and used + size > width:
            blocks.append([])
            used = margin
        blocks[-1].append(column)
        used += size
    texts = [_aligned(names, block, margin) for block in blocks]
    best = ["* best value of its column"] if any(cell.best for row in table.rows for cell in row) else []
    return "\n\n".join([*texts, "\n".join(best + note_lines(table))]).rstrip()


def _aligned(names: Sequence[str], columns: Sequence[Sequence[str]], margin: int) -> str:
    widths = [max(map(len, column)) for column in columns]
    rows = []
    for index, name in enumerate(names):
        cells = (column[index].rjust(size) for column, size in zip(columns, widths, strict=True))
        rows.append("  ".join([name.ljust(margin), *cells]).rstrip())
    return "\n".join(rows)


# ---------------------------------------------------------------- one paragraph


def summary(stacks: Sequence[Stack], table: MetricTable) -> str:
    """Sentences computed from the table, with no claim beyond it."""
    if len(stacks) == 1:
        sentences = [f"This report shows one stack of methods, {stacks[0].label}{_passes_words(stacks[0])}."]
    else:
        sentences = [f"This report shows {len(stacks)} stacks of methods{_baseline_words(table.baseline)}."]
    sentences += _quality_sentence(stacks, table) + _speed_sentence(stacks, table)
    return " ".join(sentences)


def _baseline_words(baseline: Stack | None) -> str:
    if baseline is None:
        return "; none of them is a plain autoregressive baseline"
    return f"; the baseline is {baseline.label}{_passes_words(baseline)}"


def _passes_words(stack: Stack) -> str:
    return "" if stack.passes is None else f" ({_plain(stack.passes)} {'pass' if stack.passes == 1 else 'passes'} an image)"


def _quality_sentence(stacks: Sequence[Stack], table: MetricTable) -> list[str]:
    column = next((column for column in table.columns if column.higher_is_better is not None), None)
    if column is None:
        return ["No quality metric was measured."]
    ranked = [stack for stack in stacks if stack.role != "reference" and stack.value(column) is not None]
    if not ranked:
        return []
    ranked.sort(key=lambda stack: stack.value(column), reverse=bool(column.higher_is_better))
    superlative = "highest" if column.higher_is_better else "lowest"
    detail = f" ({', '.join(column.details)})" if column.details else ""
    best = ranked[0]
    if len(ranked) == 1:
        return [f"{best.label} has {column.title} {format_value(column.name, best.value(column))}{detail}."]
    text = f"Best quality: {best.label} with the {superlative} {column.title}, {format_value(column.name, best.value(column))}{detail}"
    follower = next((stack for stack in ranked if stack.role in ("student", "accelerated")), None)
    if best is table.baseline and follower is not None:
        text += f"; the closest other method is {follower.label} with {format_value(column.name, follower.value(column))}"
    return [text + "."]


def _speed_sentence(stacks: Sequence[Stack], table: MetricTable) -> list[str]:
    baseline = table.baseline
    methods = [stack for stack in stacks if stack.role in ("student", "accelerated") and not stack.simulated]
    gains = [(gain, stack) for stack in methods if (gain := speedup(stack, baseline)) is not None]
    if not methods or baseline is None:
        return []
    if gains:
        highest = max(gain for gain, _ in gains)
        gain, fastest = next(pair for pair in _by_quality(gains, table) if pair[0] >= 0.99 * highest)
        times = f"{fastest.ms_per_image:.3g} against {baseline.ms_per_image:.3g} ms an image at {_batch_words(fastest)}"
        verb = "Biggest measured speed-up" if gain >= 1 else "No measured speed-up; the fastest method"
        return [f"{verb}: {fastest.label}, {_times(gain, '')} the speed of {baseline.label} ({times})."]
    counted = [stack for stack in methods if stack.passes is not None]
    if not counted or baseline.passes is None:
        return ["No speed-up was measured."]
    fewest = min(counted, key=lambda stack: stack.passes)
    return [f"No speed-up was measured; {fewest.label} needs {_plain(fewest.passes)} instead of {_plain(baseline.passes)} passes an image."]


def _by_quality(gains: Sequence[tuple[float, Stack]], table: MetricTable) -> list[tuple[float, Stack]]:
    """(speed-up, stack) pairs with the better first metric first, so that the better of two equally fast stacks is named."""
    column = next((column for column in table.columns if column.higher_is_better is not None), None)

    def loss(pair: tuple[float, Stack]) -> float:
        value = pair[1].value(column) if column else None
        return math.inf if value is None else -value if column.higher_is_better else value

    return sorted(gains, key=loss)
