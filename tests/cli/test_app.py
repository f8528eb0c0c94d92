"""The command line: what goes to stdout and stderr, exit codes, shared options, and a start without torch."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import pytest
import torch
import typer
from typer.testing import CliRunner

from arsp import errors
from arsp.cli.app import ALIASES, COMMANDS, ArspGroup, app, load_command
from arsp.cli.options import SHARED, CommandContext, CommonOptions, check_gates, command, parse_gate
from arsp.config import StrictModel
from arsp.runs import Run

PYTHON = [sys.executable, "-m", "arsp"]


class ToyConfig(StrictModel):
    seed: int = 0
    steps: int = 4
    """Number of steps."""
    device: str = "auto"


def toy_app(body: Any, **decoration: Any) -> typer.Typer:
    """An application with the command "toy", whose body is ``body(ctx, steps)``."""

    def toy(ctx: CommandContext, steps: Annotated[Optional[int], typer.Option(help="Steps")] = None) -> None:
        """Do a toy thing."""
        body(ctx, steps)

    return one_command(command(examples=["arsp toy --steps 2", "arsp toy '[bold]x[/bold]' steps=3"], **decoration)(toy))


def one_command(function: Any) -> typer.Typer:
    toy = typer.Typer(cls=ArspGroup)
    toy.callback()(lambda: None)
    toy.command("toy", epilog=function.spec.epilog)(function)
    toy.command("toy deep")(command(examples=["x"], overrides=False)(_deep))
    return toy


def _deep(ctx: CommandContext) -> None:
    sys.stdout.write("deep")


def run_toy(body: Any, *args: str, **decoration: Any) -> Any:
    return CliRunner().invoke(toy_app(body, **decoration), ["toy", *args])


# ----------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("args", [["--help"], ["env", "--help"], ["--version"]])
def test_help_does_not_import_heavy_packages(args: list[str]):
    code = (
        "import sys\nfrom arsp.cli.app import app\n"
        f"try: app({args!r}, prog_name='arsp')\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib', 'PIL', 'torch_fidelity'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_help_examples_and_the_common_options(name: str):
    function = load_command(COMMANDS[name])
    assert function.__doc__ and function.spec.examples
    assert all("arsp " in example for example in function.spec.examples), function.spec.examples
    result = CliRunner().invoke(app, [*name.split(), "--help"], terminal_width=140)
    assert result.exit_code == 0, result.output
    for option in ("--json", "--dry-run", "--quiet", "--verbose"):
        assert option in result.stdout


def test_aliases_stand_for_commands_of_the_table():
    assert set(ALIASES.values()) <= set(COMMANDS)
    assert "Usage: arsp evaluate" in CliRunner().invoke(app, ["eval", "--help"], prog_name="arsp").stdout


def test_unknown_command_and_option_are_usage_errors():
    for args in (["smaple"], ["env", "--devise", "cpu"]):
        done = subprocess.run([*PYTHON, *args], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, ""), args
        assert "Traceback" not in done.stderr
        assert "No such" in done.stderr


def test_two_word_commands_are_found_beside_the_plain_one():
    toy = toy_app(lambda ctx, steps: ctx.emit({}, f"plain {ctx.opts.seed}"))
    assert CliRunner().invoke(toy, ["toy", "deep"]).stdout == "deep"
    assert CliRunner().invoke(toy, ["toy", "--seed", "1"]).stdout == "plain 1\n"


# --------------------------------------------------------------------------------------------------------------- options


def test_options_reach_the_context_with_their_defaults():
    seen = {}
    body = lambda ctx, steps: seen.update(opts=ctx.opts, given=ctx.given, steps=steps)
    result = run_toy(body, "--steps", "3", "--threads", "2", "a.b=1", "c=2")
    assert result.exit_code == 0, result.output
    assert seen["opts"] == CommonOptions(threads=2, overrides=["a.b=1", "c=2"])
    assert "threads" in seen["given"] and "seed" not in seen["given"]
    assert seen["steps"] == 3


def test_a_command_takes_only_the_shared_options_it_names():
    assert run_toy(lambda ctx, steps: None, "--seed", "1", shared=("device",)).exit_code == 2
    assert run_toy(lambda ctx, steps: None, "--device", "cpu", shared=("device",)).exit_code == 0
    assert run_toy(lambda ctx, steps: None, "a=1", overrides=False).exit_code == 2


@pytest.mark.parametrize("args", [["a=1"], ["-c", "x.yaml"], ["--print-config"]])
def test_configuration_for_a_command_that_has_none_is_refused(args: list[str]):
    result = run_toy(lambda ctx, steps: ctx.emit({}, "done"), *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no configuration" in result.stderr


def test_the_shared_options_are_these_and_adding_one_is_a_decision():
    assert " ".join(SHARED) == (
        "device dtype batch_size seed threads kernels config out resume fail_if print_config dry_run json quiet verbose traceback"
    )
    assert set(SHARED) == set(CommonOptions.__dataclass_fields__) - {"overrides"}


def test_overrides_may_follow_a_commands_own_arguments(tmp_path: Path):
    seen: dict[str, Any] = {}

    def with_target(ctx: CommandContext, target: Annotated[Optional[str], typer.Argument()] = None) -> None:
        """Take one."""
        seen.update(target=target, overrides=ctx.opts.overrides)

    def with_paths(ctx: CommandContext, paths: Annotated[Optional[list[Path]], typer.Argument()] = None) -> None:
        """Take many."""
        seen.update(target=[str(path) for path in paths], overrides=ctx.opts.overrides)

    one, many = (one_command(command(examples=["x"])(function)) for function in (with_target, with_paths))
    odd = tmp_path / "a=b"
    odd.write_text("")
    for application, args, target, overrides in [
        (one, ["run", "seed=1", "x.y=2"], "run", ["seed=1", "x.y=2"]),
        (one, ["seed=1", "x.y=2"], None, ["seed=1", "x.y=2"]),
        (one, [str(odd)], str(odd), []),
        (many, ["r1", "seed=1", "r2"], ["r1", "r2"], ["seed=1"]),
        (many, ["-"], ["-"], []),
    ]:
        result = CliRunner().invoke(application, ["toy", *args])
        assert result.exit_code == 0, result.output
        assert seen == {"target": target, "overrides": overrides}


@pytest.mark.parametrize(
    "args",
    [
        ["--dtype", "float33"], ["--kernels", "gpu"], ["--device", "tpu"], ["--threads", "0"], ["--batch-size", "-1"], ["--seed", "-1"],
        ["-q", "-v"], ["--fail-if", "fid"], ["--fail-if", "fid>nan"], ["--steps", "x"], ["nonsense"],
    ],
)  # fmt: skip
def test_bad_option_values_are_usage_errors_before_any_work(args: list[str]):
    result = run_toy(lambda ctx, steps: ctx.resolve(ToyConfig, {"steps": steps}) and pytest.fail("the work started"), *args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""


# ---------------------------------------------------------------------------------------------------------------- config


def test_shared_options_enter_the_configuration_and_come_back_from_it(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("seed: 5\nsteps: 6\n")
    seen = []
    for args in (["-c", str(tmp_path / "c.yaml")], ["-c", str(tmp_path / "c.yaml"), "--seed", "0"], ["--steps", "8", "seed=9"]):
        run_toy(lambda ctx, steps: seen.append((ctx.resolve(ToyConfig, {"steps": steps}), ctx.opts.seed)), *args)
    assert [(config.seed, config.steps, seed) for config, seed in seen] == [(5, 6, 5), (0, 6, 0), (9, 8, 9)]


def test_print_config_is_runnable_yaml_and_nothing_runs(tmp_path: Path):
    body = lambda ctx, steps: ctx.resolve(ToyConfig, {"steps": steps}) and pytest.fail("the work started")
    result = run_toy(body, "--print-config", "steps=7")
    assert result.exit_code == 0
    (tmp_path / "c.yaml").write_text(result.stdout)
    assert run_toy(body, "--print-config", "-c", str(tmp_path / "c.yaml")).stdout == result.stdout
    assert "steps: 7" in result.stdout


def test_unknown_configuration_key_exits_3_with_the_nearest():
    result = run_toy(lambda ctx, steps: ctx.resolve(ToyConfig, {}), "step=3")
    assert result.exit_code == 3
    assert result.stderr == "error: unknown key 'step'\nhint: Did you mean: steps? Keys: seed, steps, device.\n"


@pytest.mark.parametrize("plan", ["do it", {"do": 1}, ToyConfig()])
def test_dry_run_prints_the_plan_and_stops(plan: Any):
    for args in (["--dry-run"], ["-n", "--json"]):
        result = run_toy(lambda ctx, steps: (ctx.plan(plan), pytest.fail("the work started")), *args)
        assert result.exit_code == 0 and result.stdout, result.output
    assert "plan" in json.loads(result.stdout)
    assert run_toy(lambda ctx, steps: ctx.plan(plan)).stdout == ""


# ---------------------------------------------------------------------------------------------------------------- output


def record(**metrics: float) -> dict[str, Any]:
    with Run.open("toy", "x", {}) as run:
        for name, value in metrics.items():
            run.add_metric(name, value)
        run.set_cost(passes=3, latency_ms={"p50": 7.0, "p95": None})
    return run.record


def test_json_is_one_document_on_stdout_and_logs_are_on_stderr():
    def body(ctx: CommandContext, steps: int) -> None:
        ctx.log("working")
        with ctx.progress(2, "count") as advance:
            advance()
        ctx.emit(record(fid=float("nan")))

    result = run_toy(body, "--json")
    assert json.loads(result.stdout, parse_constant=pytest.fail)["metrics"][0]["value"] is None
    assert result.stderr == "working\n"


def test_table_shows_metrics_costs_and_place():
    result = run_toy(lambda ctx, steps: ctx.emit(record(fid=1.5)))
    for text in ("fid", "1.5", "latency_ms.p50", "ok: "):
        assert text in result.stdout
    assert run_toy(lambda ctx, steps: ctx.emit(record(), "[bold]mine[/bold]")).stdout == "[bold]mine[/bold]\n"


def test_quiet_and_verbose_choose_what_is_said():
    def body(ctx: CommandContext, steps: int) -> None:
        for level in ("info", "warning", "debug"):
            ctx.log(level, level)

    assert run_toy(body).stderr == "info\nwarning: warning\n"
    assert run_toy(body, "-q").stderr == "warning: warning\n"
    assert run_toy(body, "-v").stderr == "info\nwarning: warning\ndebug\n"


def test_examples_stand_at_the_end_of_help_one_a_line_and_unchanged():
    result = CliRunner().invoke(toy_app(lambda ctx, steps: None), ["toy", "--help"], terminal_width=100)
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[-3:] == ["Examples:", "arsp toy --steps 2", "arsp toy '[bold]x[/bold]' steps=3"]


# ----------------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("fid>12", True), ("fid>12.5", False), ("fid>=12.5", True), ("fid<12.5", False), ("fid <= 12.5", True), ("fid==12.5", True),
        ("fid!=12.5", False), ("passes>2", True), ("latency_ms.p50>1e1", False), ("nothing>0", True),
    ],
)  # fmt: skip
def test_a_gate_exits_7_after_the_result_is_printed(text: str, fails: bool):
    result = run_toy(lambda ctx, steps: ctx.emit(record(fid=12.5, nothing=float("nan"))), "--json", "--fail-if", text)
    assert result.exit_code == (7 if fails else 0), result.output
    assert json.loads(result.stdout)["status"] == "ok"


def test_any_value_of_a_repeated_metric_can_fail_a_gate():
    with pytest.raises(errors.GateError, match="fid>2"):
        check_gates([parse_gate("fid>2")], {"metrics": [{"name": "fid", "value": 1.0}, {"name": "fid", "value": 3.0}]})


def test_a_gate_on_an_unknown_metric_names_the_nearest():
    result = run_toy(lambda ctx, steps: ctx.emit(record(class_accuracy=1.0)), "--fail-if", "class_acuracy<0.6")
    assert result.exit_code == 2
    assert "Did you mean: class_accuracy?" in result.stderr


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.ConfigError("wrong", "do this"), 3, "error: wrong\nhint: do this\n"),
        (errors.InputError("gone"), 4, "error: gone\n"),
        (errors.ResourceError("full"), 5, "error: full\n"),
        (errors.NumericalError("nan"), 6, "error: nan\n"),
        (errors.LockedError("held"), 8, "error: held\n"),
        (errors.Interrupted("stopped", 143), 143, "error: stopped\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.png"), 4, "error: x.png: No such file or directory\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "error: no space left on the device\n"),
        (torch.OutOfMemoryError("tried to allocate"), 5, "error: out of memory: tried to allocate\nhint: try a smaller --batch-size\n"),
        (ZeroDivisionError("division"), 1, "error: ZeroDivisionError: division\nhint: this is a bug; run again with --traceback\n"),
    ],
)
def test_each_kind_of_error_has_its_exit_code_and_no_traceback(error: BaseException, code: int, message: str):
    def body(ctx: CommandContext, steps: int) -> None:
        raise error

    result = run_toy(body)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", message)
    assert "Traceback (most recent call last)" in run_toy(body, "--traceback").stderr


def test_an_absent_cuda_device_is_a_resource_error():
    result = run_toy(lambda ctx, steps: ctx.setup_torch(), "--device", "cuda:99")
    assert result.exit_code == 5
    assert "--device cuda:99" in result.stderr


def test_device_threads_type_and_kernels_are_applied():
    before = torch.get_num_threads()
    try:
        blocks = [json.loads(CliRunner().invoke(app, ["env", "--json", "--kernels", name]).stdout) for name in ("reference", "auto")]
        assert {row["backend"] for row in blocks[0]["kernels"]} == {"reference"}
        assert "--kernels reference" not in str(blocks[1]["kernels"])
        seen = []
        body = lambda ctx, steps: seen.append((ctx.setup_torch(), torch.get_num_threads(), ctx.torch_dtype()))
        run_toy(body, "--device", "cpu", "--threads", "1")
        assert seen == [(torch.device("cpu"), 1, torch.float32)]
    finally:
        torch.set_num_threads(before)


WAIT = """
import time
from arsp.cli.options import CommandContext, command
import typer
app = typer.Typer()
@app.callback()
def root(): pass
def wait(ctx: CommandContext):
    "Wait."
    ctx.log("ready")
    time.sleep(60)
app.command()(command(examples=["x"])(wait))
app(["wait"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_with_their_exit_code(number: int, code: int):
    child = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background jobs ignore it
    )
    assert child.stderr.readline() == "ready\n"
    time.sleep(0.05)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_is_not_an_error():
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {' '.join(PYTHON)} env --json | head -c 1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------------------- env


def test_env_is_valid_json_with_versions_and_operators(runs_dir: Path):
    done = subprocess.run([*PYTHON, "env", "--json", "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    block = json.loads(done.stdout)
    assert (block["device"], block["torch"], block["runs"]) == ("cpu", torch.__version__.partition("+")[0], str(runs_dir.resolve()))
    assert all(set(row) >= {"op", "backend", "reason"} for row in block["kernels"])
    assert block["packages"]["torchvision"]


def test_env_table_shows_the_same(runs_dir: Path):
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    for text in ("arsp", "torch", "package", "torchvision"):
        assert text in result.stdout
    assert "operators" in CliRunner().invoke(app, ["env", "--dry-run"]).stdout
