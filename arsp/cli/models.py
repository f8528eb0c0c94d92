"""``arsp models``: the models known by name, what is in them, and whether their files are intact."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from arsp.cli.options import CommandContext, command, make_table


@command(examples=["arsp models ls", "arsp models ls --json"], shared=())
def ls(ctx: CommandContext) -> None:
    """List every model known by name and whether its weights are on this machine."""
    from arsp.zoo.load import card_names, cards, resolve

    rows = []
    for name in card_names():
        source = resolve(name)
        here = "embedded" if source.origin == "embedded" else "here" if source.path else "not here"
        rows.append(
            {"name": name, "kind": source.kind, "tokens": source.layout.num_tokens, "weights": here, "about": cards()[name]["about"]}
        )
    ctx.plan({"models": [row["name"] for row in rows]})
    ctx.emit({"models": rows}, make_table(None, ("name", "kind", "tokens", "weights", "about"), [tuple(row.values()) for row in rows]))


@command(
    examples=["arsp models info llamagen", "arsp models info llamagen-b-256 --json", "arsp models info runs/distill-llamagen-1a2b3c4d"],
    shared=(),
)
def info(ctx: CommandContext, name: Annotated[str, typer.Argument(help="Zoo name, bundle, run directory, or official file")]) -> None:
    """Describe a model: sizes, parameters, bytes, sampling rule, training, published and measured figures."""
    ctx.plan({"info": name})
    details = describe(name)
    rows = [(key, value if isinstance(value, (int, float, str)) else _short(value)) for key, value in details.items() if value is not None]
    ctx.emit(details, make_table(None, ("field", "value"), [(key, str(value)) for key, value in rows]))


@command(examples=["arsp models verify llamagen"], shared=())
def verify(ctx: CommandContext, name: Annotated[str, typer.Argument(help="Zoo name, bundle, or official file")]) -> None:
    """Check the SHA-256 of every weights file of a model; exit code 4 when one is missing or damaged."""
    from arsp.zoo.load import verify as verify_files

    ctx.plan({"verify": name})
    files = verify_files(name)
    record = {"model": name, "files": [{"file": file, "sha256": digest} for file, digest in files], "ok": True}
    ctx.emit(record, make_table(None, ("file", "sha256"), files))


def describe(name: str) -> dict[str, Any]:
    """The facts of a model as one flat mapping; parameters are counted on the meta device, no weight is read."""
    import torch

    from arsp.zoo.load import resolve

    source = resolve(name)
    with torch.device("meta"):
        if source.kind == "features":
            from arsp.metrics.features import FeatNet

            module = FeatNet()
        elif source.kind == "tokenizer":
            module = source.family.build_tokenizer(source.config)
        elif source.kind == "profile":
            module = torch.nn.Module()  # windows of another model: nothing to compute with
        elif source.kind == "student":
            module = source.family.build_student(source.config, source.card["code_dim"])
        else:
            module = source.family.build(source.config)
    parameters = sum(p.numel() for p in module.parameters())
    files = (
        {}
        if source.path is None or not source.path.is_dir()
        else {f.name: f.stat().st_size for f in sorted(source.path.glob("*.safetensors"))}
    )
    card = source.card
    return {
        "name": source.name,
        "about": card.get("about"),
        "family": source.family.name,
        "kind": source.kind,
        "origin": source.origin,
        "path": None if source.path is None else str(source.path),
        "parameters": parameters,
        "bytes_bf16": 2 * parameters,
        "files": files or None,
        "config": source.config,
        "sampling": card.get("sampling"),
        "known": card.get("known"),
        "teacher": card.get("teacher"),
        "dataset": card.get("dataset"),
        "training": card.get("training"),
        "measured": card.get("measured"),
        "published": card.get("published"),
        "parents": card.get("parents"),
    }


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
