"""The ``arsp`` command: a table of commands, each one thin function in its own file. Nothing here imports torch."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from arsp import __version__
from arsp.cli.options import report_error

# command -> "module:function". "bench exact" is chosen by its two words beside the plain "bench"; "models ls" has no plain "models", so
# that word becomes a group.
COMMANDS = {
    "train": "arsp.cli.train:train",
    "distill": "arsp.cli.distill:distill",
    "sparsify": "arsp.cli.sparsify:sparsify",
    "quantize": "arsp.cli.quantize:quantize",
    "sample": "arsp.cli.sample:sample",
    "speculate": "arsp.cli.speculate:speculate",
    "evaluate": "arsp.cli.evaluate:evaluate",
    "bench": "arsp.cli.bench:bench",
    "bench cost": "arsp.cli.bench_cost:cost",
    "bench exact": "arsp.cli.bench_exact:exact",
    "bench kernels": "arsp.cli.bench:kernels",
    "bench loop": "arsp.cli.bench_loop:loop",
    "report": "arsp.cli.report:report",
    "models ls": "arsp.cli.models:ls",
    "models info": "arsp.cli.models:info",
    "models verify": "arsp.cli.models:verify",
    "env": "arsp.cli.env:env",
}
ALIASES = {"eval": "evaluate"}
GROUP_HELP = {"models": "List, describe and check the models that arsp knows by name."}


class ArspGroup(TyperGroup):
    """A group that also finds commands of two words and aliases."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ALIASES:
            args = [ALIASES[args[0]], *args[1:]]
        words = " ".join(args[:2])
        if len(args) >= 2 and words in self.commands:
            return words, self.commands[words], args[2:]
        return super().resolve_command(ctx, args)


def load_command(target: str) -> Any:
    """The function behind ``"module:function"``."""
    module_name, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"arsp {__version__}")
        raise typer.Exit(0)


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop")] = False,
) -> None:
    """Accelerate image autoregressive models: distil them into a few passes, verify guesses, make each pass cheaper.

    Everything runs without arguments on an embedded tiny model, on any machine: arsp sample --num 8
    """


def build() -> typer.Typer:
    """The application with every command of the table."""
    settings: dict[str, Any] = {
        "no_args_is_help": True, "rich_markup_mode": "rich", "pretty_exceptions_enable": False, "add_completion": False,
        "context_settings": {"help_option_names": ["--help", "-h"]},
    }  # fmt: skip
    root = typer.Typer(cls=ArspGroup, **settings)
    root.callback()(_root)
    groups: dict[str, typer.Typer] = {}
    for name, target in COMMANDS.items():
        head, _, tail = name.partition(" ")
        function = load_command(target)
        if not tail or head in COMMANDS:
            root.command(name, epilog=function.spec.epilog)(function)
            continue
        if head not in groups:
            groups[head] = typer.Typer(**settings)
            root.add_typer(groups[head], name=head, help=GROUP_HELP[head])
        groups[head].command(tail, epilog=function.spec.epilog)(function)
    return root


app = build()


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="arsp")
    except KeyboardInterrupt as error:  # before or after a command's own handling
        raise SystemExit(report_error(error, False)) from None
