"""``arsp bench``: latency, throughput and memory of stacks; ``arsp bench kernels``: each operator against torch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, get_args

import typer
from pydantic import Field

from arsp.cli.options import DTYPES, CommandContext, command, make_table
from arsp.config import StrictModel
from arsp.errors import ConfigError, UsageError, nearest

if TYPE_CHECKING:
    from arsp.bench.compare import Contender
    from arsp.bench.timing import Timing


class BenchConfig(StrictModel):
    """What ``arsp bench`` measures and how often."""

    stacks: list[str] = Field(default=["llamagen"], min_length=1, description="NAME[,key=value...]: a model, StackConfig values, dtype")
    compare: bool = Field(False, description="interleave the stacks in one process and give ratios to the first")
    baseline: Literal["eager"] | None = Field(None, description="eager: the first stack's weights in a plain loop of the official kind")
    random_weights: bool = Field(False, description="no checkpoints; codes only where there is no tokenizer")
    parts: bool = Field(False, description="also split the time by part of the model (VAR)")
    decode: bool = Field(True, description="include the tokenizer's decoder (not with a baseline of a GPT: that compares codes)")
    num: int | None = Field(None, ge=1, description="images a timed call (default: one batch)")
    batch_size: int = Field(1, ge=1, description="images at a time")
    repeats: int = Field(5, ge=1, description="timed rounds")
    warmup: int = Field(1, ge=0, description="untimed rounds before them")
    seed: int = Field(0, ge=0)
    device: str = "auto"
    dtype: str = "float32"
    threads: int | None = Field(None, ge=1)
    kernels: Literal["auto", "reference", "cpu", "cuda"] = "auto"


@command(
    examples=[
        "arsp bench",
        "arsp bench --compare llamagen llamagen-dd1 llamagen-dd1,student_steps=2 --batch-size 32",
        "arsp bench llamagen-b-256 --random-weights --baseline eager --threads 2",
        "arsp bench var-d16,dtype=bfloat16,decoder_dtype=bfloat16 --random-weights --baseline eager --parts --threads 2",
        "arsp bench --compare var-d16 var-d16,apply=litevar=r1 var-d16,share=map --random-weights",
        "arsp bench --compare llamagen llamagen-dd1 --json --fail-if 'speedup<2'",
    ],
    shared=("device", "dtype", "batch_size", "seed", "threads", "kernels", "config", "out", "fail_if", "print_config"),
    schema=BenchConfig,
)
def bench(
    ctx: CommandContext,
    stacks: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[STACK]...", help="NAME or NAME,key=value,... e.g. llamagen,cfg=2,dtype=bfloat16 (default: llamagen)"),
    ] = None,
    model: Annotated[Optional[list[str]], typer.Option(help="A stack, like the argument; may be repeated")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Interleave all stacks and print ratios to the first")] = False,
    baseline: Annotated[Optional[str], typer.Option(help="eager: against a plain loop of the official kind on the same weights")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Need no checkpoint (cost only)")] = False,
    parts: Annotated[bool, typer.Option("--parts", help="Also split the time by part of the model, in rounds of its own (VAR)")] = False,
    decode: Annotated[Optional[bool], typer.Option("--decode/--no-decode", help="Include decoding codes to pixels (default: yes)")] = None,
    num: Annotated[Optional[int], typer.Option(help="Images a timed call (default: one batch)")] = None,
    repeats: Annotated[Optional[int], typer.Option(help="Timed rounds (default: 5)")] = None,
    warmup: Annotated[Optional[int], typer.Option(help="Untimed rounds before them (default: 1)")] = None,
) -> None:
    """Measure latency, throughput and memory of stacks: medians after warm-up, the device synchronised around each call.

    With --compare or --baseline all take turns in one process and each ratio is a median over rounds with a 95 % interval.
    """
    given = [*(stacks or []), *(model or [])]
    named = {
        "stacks": given or None, "compare": compare or None, "baseline": baseline, "random_weights": random_weights or None,
        "parts": parts or None, "decode": decode, "num": num, "repeats": repeats, "warmup": warmup,
    }  # fmt: skip
    config = ctx.resolve(BenchConfig, named)
    if config.compare and len(config.stacks) < 2 and config.baseline is None:
        raise UsageError("--compare needs two stacks or more.", "For example: arsp bench --compare llamagen llamagen-dd1")
    from arsp import stack as stack_module

    recipes = [parse_stack(text, config.random_weights, config.dtype) for text in config.stacks]
    for recipe, _ in recipes:
        stack_module.check(recipe)
    stacks_plan = [{**recipe.model_dump(exclude_none=True), "dtype": dtype} for recipe, dtype in recipes]
    ctx.plan({**config.model_dump(), "stacks": stacks_plan})
    record = run_bench(ctx, config, recipes)
    ctx.emit(record, bench_table(record))


def parse_stack(text: str, random_weights: bool, dtype: str) -> tuple[Any, str]:
    """``NAME[,key=value...]`` -> StackConfig and computation type (``dtype`` unless a part says otherwise). UsageError: a part that is
    not ``key=value``, an unknown type; ConfigError: an unknown key."""
    import yaml

    from arsp.config import resolve_config
    from arsp.stack import StackConfig

    name, *parts = text.split(",")
    named: dict[str, Any] = {"model": name, "random_weights": True if random_weights else None}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"stack '{text}': '{part}' is not key=value.", "Write for example llamagen,cfg=2,top_p=0.9")
        named[key] = yaml.safe_load(value)
    dtype = named.pop("dtype", dtype)
    if dtype not in DTYPES:
        raise UsageError(f"stack '{text}': unknown dtype '{dtype}'.", nearest(str(dtype), DTYPES))
    return resolve_config(StackConfig, files=[], named=named, overrides=[]), dtype


def run_bench(ctx: CommandContext, config: BenchConfig, recipes: list[tuple[Any, str]]) -> dict[str, Any]:
    """Load, measure, and complete the record."""
    from arsp.bench import timing
    from arsp.bench.parts import measure_parts
    from arsp.runs import Run, stop_signals

    device = ctx.setup_torch()
    contenders = load(ctx, config, recipes, device)
    with Run.open("bench", recipes[0][0].model, config, ctx.opts.out, resume=False) as run, stop_signals():  # a timing is never reused
        run.record["environment"]["device"] = str(device)
        together = config.compare or config.baseline is not None
        groups = [contenders] if together else [[contender] for contender in contenders]
        timings: dict[str, Timing] = {}
        calls = config.repeats + config.warmup + 1 + config.repeats * config.parts
        with ctx.progress(calls * len(contenders), "bench") as advance:
            for group in groups:
                work = {contender.name: contender.work for contender in group}
                timings |= timing.measure(work, repeats=config.repeats, warmup=config.warmup, device=device, progress=advance)
            if config.parts:
                work = {contender.name: (contender.work, contender.parts) for contender in contenders}
                run.record["parts"] = measure_parts(work, repeats=config.repeats, device=device, tick=advance)
        fill_record(run, config, contenders, timings, together)
    return run.record


def load(ctx: CommandContext, config: BenchConfig, recipes: list[tuple[Any, str]], device: Any) -> list[Contender]:
    """The contenders in order; the baseline first, because ratios are to the first. ConfigError: a setting of the tokenizer's decoder
    where it does not run."""
    import torch

    from arsp.bench.compare import eager_contender, stack_contender
    from arsp.stack import build, decoder_options

    num = config.num or config.batch_size
    contenders: list[Contender] = []
    built = []
    for text, (recipe, dtype) in zip(config.stacks, recipes, strict=True):
        stack = build(recipe, device, getattr(torch, dtype), ctx.log)
        if stack.model.source.origin == "embedded":
            ctx.log(f"{stack.model.name}: embedded tiny model ({stack.model.source.card['about']})")
        codes_only = config.baseline is not None and stack.model.source.layout.is_raster
        decode = config.decode and not codes_only and stack.model.tokenizer is not None
        if decoder_options(recipe) and not decode:
            settings = ", ".join(f"decoder_{name}" for name in decoder_options(recipe))
            raise ConfigError(
                f"{settings}: no effect on {text}, of which only codes are made here.", "Drop them, --no-decode or --baseline."
            )
        if config.decode and not decode:
            ctx.log(f"{stack.name}: codes only, without decoding to pixels")
        name = unused(text if "," in text else stack.name, [other.name for other in contenders])
        contenders.append(stack_contender(name, stack, num=num, batch_size=config.batch_size, seed=config.seed, decode=decode))
        built.append((stack, decode))
    if config.baseline == "eager":
        stack, decode = built[0]
        contenders.insert(0, eager_contender(stack, num=num, batch_size=config.batch_size, seed=config.seed, decode=decode))
    unknown = [contender.name for contender in contenders if config.parts and not contender.parts]
    if unknown:
        raise ConfigError(f"--parts: the time of {', '.join(unknown)} cannot be split.", "Use it with var and its official sizes.")
    return contenders


def unused(name: str, taken: list[str]) -> str:
    """``name``, or ``name #2`` and so on where it is taken."""
    names = [name, *(f"{name} #{i}" for i in range(2, len(taken) + 2))]
    return next(candidate for candidate in names if candidate not in taken)


def fill_record(run: Any, config: BenchConfig, contenders: list[Contender], timings: dict[str, Timing], together: bool) -> None:
    """Metrics per stack, ratios to the first, the machine's ceiling; the cost block is of the first stack but the baseline."""
    from arsp.bench.cost import measure_roofline
    from arsp.bench.timing import speedup

    roof = measure_roofline(run.record["environment"]["device"])
    first, entries = contenders[0], []
    protocol = f"batch {config.batch_size}, median of {config.repeats} rounds" + (", interleaved" if together else "")
    for contender in contenders:
        timing = timings[contender.name]
        block = contender.measured(timing)
        if "moved_bytes_per_batch" in block and contender.stack["dtype"] == "float32":
            block["ceiling_ms"] = 1e3 * roof.seconds(block["moved_bytes_per_batch"], block["macs"] * min(contender.num, config.batch_size))
        entries.append({"name": contender.name, "stack": contender.stack, "cost": block, "seconds": list(timing.seconds)})
        run.add_metric("latency_ms", block["latency_ms"]["p50"], n=config.repeats, protocol=protocol, stack=contender.name)
        run.add_metric("images_per_s", block["images_per_s"], n=config.repeats, protocol=protocol, stack=contender.name)
        if together and contender is not first:
            ratio = speedup(timing, timings[first.name])
            more = {"stack": contender.name, "low": ratio.low, "high": ratio.high}
            run.add_metric("speedup", ratio.value, n=config.repeats, protocol=f"against {first.name}, {protocol}", **more)
    for name, lines in run.record.get("parts", {}).items():
        for line in lines:
            more = {"stack": name, "part": line["part"], "share": line["share"]}
            run.add_metric("part_ms", line["ms"], n=config.repeats, protocol=f"exclusive wall clock of a call, {protocol}", **more)
    run.record["stacks"] = entries
    run.record["roofline"] = {"bytes_per_s": roof.bytes_per_s, "float32_macs_per_s": roof.macs_per_s}
    main = entries[1 if config.baseline else 0]
    run.record["stack"] = main["stack"]
    run.set_cost(**main["cost"])


def bench_table(record: dict[str, Any]) -> Any:
    """One line a stack; with --parts one line a part below."""
    from rich.console import Group

    ratios = {metric["stack"]: metric for metric in record["metrics"] if metric["name"] == "speedup"}
    columns = ["stack", "p50 ms", "p95 ms", "images/s", "passes", "peak MB", "weights MB", "cache MB"]
    columns += ["ceiling ms"] if any("ceiling_ms" in entry["cost"] for entry in record["stacks"]) else []
    columns += ["attention run, %"] if any("attention" in entry["cost"] for entry in record["stacks"]) else []
    columns += ["behind hand-over MB"] if any("last_bytes" in entry["cost"] for entry in record["stacks"]) else []
    columns += ["speed-up to the first"] if ratios else []
    rows = []
    for entry in record["stacks"]:
        cost, ratio = entry["cost"], ratios.get(entry["name"])
        megabytes = [None if cost.get(key) is None else cost[key] / 1e6 for key in ("peak_mem_bytes", "weight_bytes", "kv_bytes")]
        row = [entry["name"], cost["latency_ms"]["p50"], cost["latency_ms"]["p95"], cost["images_per_s"], cost.get("passes"), *megabytes]
        row += [cost.get("ceiling_ms")] if "ceiling ms" in columns else []
        if "attention run, %" in columns:
            row += [100 * attention_run(cost)]
        if "behind hand-over MB" in columns:
            row += [cost["last_bytes"] / 1e6 if "last_bytes" in cost else None]
        if ratios:
            row += [f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "1"]
        rows.append(row)
    environment, config = record["environment"], record["config"]
    where = environment["cpu"] if environment["device"] == "cpu" else environment.get("gpu")
    title = f"{where}, {environment['threads']} threads, {config['dtype']}, batch {config['batch_size']}"
    table = make_table(title, columns, rows)
    return Group(table, parts_table(record["parts"])) if "parts" in record else table


def attention_run(cost: dict[str, Any]) -> float:
    """Share of the query-key pairs of dense attention that were computed, over the models with windows; 1 without any."""
    reports = cost.get("attention")
    return sum(r["pairs"]["executed"] for r in reports) / sum(r["pairs"]["dense"] for r in reports) if reports else 1.0


def parts_table(parts: dict[str, list[dict[str, Any]]]) -> Any:
    """One line a part: milliseconds and share of a call for every stack."""
    columns = ["part", *(column for name in parts for column in (f"{name}, ms", "%"))]
    together = zip(*parts.values(), strict=True)
    rows = [[lines[0]["part"], *(cell for line in lines for cell in (line["ms"], 100 * line["share"]))] for lines in together]
    rows.append(["sum", *(cell for lines in parts.values() for cell in (sum(line["ms"] for line in lines), None))])
    return make_table("exclusive wall clock of a call, by part", columns, rows)


RowOp = Literal[
    "quantize_per_token", "rms_norm_quantize", "modulate_quantize", "swiglu_quantize", "gelu_quantize", "rms_norm", "apply_rope"
]  # fmt: skip
LayerOp = Literal["small_linear", "w8a8_linear", "w4a8_linear", RowOp]  # those that --rows is about
KernelOp = Literal[LayerOp, "windowed_scale_attention", "cached_attention", "keyed_argmax", "verify"]
LAYER_OPS = get_args(LayerOp)


class KernelBenchConfig(StrictModel):
    """What ``arsp bench kernels`` measures."""

    op: Literal["all", KernelOp] = "all"
    rows: list[int] | None = Field(None, min_length=1, description="rows of the input of layers")
    repeats: int = Field(9, ge=1, description="timed rounds")
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = Field(None, ge=1)

    @property
    def ops(self) -> tuple[str, ...]:
        return get_args(KernelOp) if self.op == "all" else (self.op,)


@command(
    examples=[
        "arsp bench kernels --threads 1",
        "arsp bench kernels --op small_linear --rows 2 --dtype bfloat16 --json",
        "arsp bench kernels --op windowed_scale_attention --fail-if 'ratio<1.5'",
        "arsp bench kernels --op w4a8_linear --dtype bfloat16 --rows 1",
        "arsp bench kernels --op rms_norm_quantize --dtype bfloat16 --rows 2",
    ],
    shared=("dtype", "threads", "config", "out", "fail_if", "print_config"),
    schema=KernelBenchConfig,
)
def kernels(
    ctx: CommandContext,
    op: Annotated[
        Optional[str],
        typer.Option(
            help="small_linear (layers of LlamaGen GPT-B), windowed_scale_attention (VAR-d16), cached_attention (LlamaGen), keyed_argmax, "
            "verify (17 rows of 16384 codes), w8a8_linear, w4a8_linear (layers of LlamaGen-B and -XL, VAR-d16 and -d30), or by the widths "
            f"of these: {', '.join(get_args(RowOp))}; all (default)"
        ),
    ] = None,
    rows: Annotated[
        Optional[list[int]],
        typer.Option(min=1, help="Rows of the input of layers; repeatable (default: 1 2 4 8 16; quantised: 1 16)"),
    ] = None,
    repeats: Annotated[Optional[int], typer.Option(help="Timed rounds (default: 9)")] = None,
) -> None:
    """Time the compiled CPU operators against torch on the shapes of official models. A ratio above 1: the kernel is faster."""
    config = ctx.resolve(KernelBenchConfig, {"op": op, "rows": rows or None, "repeats": repeats})
    if rows and not set(config.ops) & set(LAYER_OPS):
        raise UsageError(f"--rows has no effect on {config.op}.", f"It counts the rows of {', '.join(LAYER_OPS)}.")
    ctx.plan(config)
    import torch
    from rich.console import Group

    from arsp import kernels as compiled
    from arsp.runs import Run, stop_signals

    ctx.opts.kernels, ctx.opts.device = "cpu", "cpu"
    ctx.setup_torch()
    compiled.set_backend("cpu")
    backends = [backend for backend in compiled.backends() if backend["op"] in config.ops]
    with Run.open("bench-kernels", config.op, config, ctx.opts.out, resume=False) as run, stop_signals():
        run.record["stack"] = {"name": "kernels", "backends": backends}
        lines = time_kernels(ctx, config)
        for name in config.ops:
            for line in lines[name]:
                what = f"{line['map']}, window {line['window']}" if "map" in line else line.get("layer") or line["law"]
                extra = {key: value for key, value in line.items() if key != "ratio"}
                run.add_metric("ratio", line["ratio"], n=config.repeats, protocol=f"{what}, {line['rows']} rows", op=name, **extra)
    where = f"{config.dtype}, {torch.get_num_threads()} threads"
    ctx.emit(run.record, Group(*(kernel_table(backend, lines[backend["op"]], where) for backend in backends)))


def time_kernels(ctx: CommandContext, config: KernelBenchConfig) -> dict[str, list[dict[str, Any]]]:
    """op -> its lines."""
    import torch

    from arsp.bench import kernels as timed
    from arsp.runs import check_stop

    dtype = getattr(torch, config.dtype)
    rows, few = config.rows or list(timed.ROWS), config.rows or list(timed.QUANTISED_ROWS)
    layers, widths = timed.QUANTISED_SHAPES, {columns for _, columns in timed.QUANTISED_SHAPES.values()}
    benches: dict[str, tuple[int, Any]] = {
        "small_linear": (len(timed.SHAPES) * len(rows), partial(timed.bench_small_linear, rows)),
        "windowed_scale_attention": (len(timed.MAPS), timed.bench_windowed_scale_attention),
        "keyed_argmax": (1, timed.bench_keyed_argmax),
        "verify": (len(timed.LAWS), timed.bench_verify),
        "cached_attention": (3, timed.bench_cached_attention),
        **{name: (len(widths) * len(few), partial(timed.bench_rows, name, few)) for name in get_args(RowOp)},
        "w8a8_linear": (len(layers) * len(few), partial(timed.bench_quantised_linear, 8, few)),
        "w4a8_linear": (len(layers) * len(few), partial(timed.bench_quantised_linear, 4, few)),
    }
    with ctx.progress(sum(benches[name][0] for name in config.ops), "shapes") as advance:

        def tick(n: int) -> None:
            advance(n)
            check_stop()

        return {name: benches[name][1](dtype, repeats=config.repeats, progress=tick) for name in config.ops}


def kernel_table(backend: dict[str, str], lines: list[dict[str, Any]], where: str) -> Any:
    """One line a shape: what was measured, both times, their ratio."""
    names = {"outputs": "N", "columns": "K", "kernel_us": "kernel us", "torch_us": "torch us", "weight_gb_per_s": "weights GB/s"}
    keys = [key for key in lines[0] if key not in ("low", "high")]
    cells = [[*(line[key] for key in keys), f"{line['low']:.2f} - {line['high']:.2f}"] for line in lines]
    return make_table(f"{backend['op']}, {where}; {backend['reason']}", [*(names.get(key, key) for key in keys), "95 % interval"], cells)
