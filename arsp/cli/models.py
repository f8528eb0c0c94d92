"""``arsp models``: the models known by name, what is in them, and whether their files are intact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from arsp.cli.options import CommandContext, command, make_table
from arsp.errors import InputError


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
    """Describe a model: sizes, parameters, bytes by part, formats, sampling rule, training, published and measured figures."""
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
    quantised = card.get("quantization")
    sizes = {"parameters": parameters, "bytes_bf16": 2 * parameters}
    return {
        "name": source.name,
        "about": card.get("about"),
        "family": source.family.name,
        "kind": source.kind,
        "origin": source.origin,
        "path": None if source.path is None else str(source.path),
        **(sizes if quantised is None else quantised_facts(source, quantised, sizes)),
        "bytes_by_part": bytes_by_part(source.path / MODEL) if MODEL in files and source.kind in ("teacher", "student") else None,
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


def quantised_facts(source: Any, block: Any, base_sizes: dict[str, int]) -> dict[str, Any]:
    """Of a quantised bundle: how many layers have which format, and the model it was made from, which is not what is stored."""
    from arsp.quant.store import check

    ours, formats = check(block, source.name)["arsp"], {}
    for group in block.get("config_groups", {}).values():
        weights = group["weights"]
        size = f"g{weights['group_size']}" if "group_size" in weights else ""
        formats[f"W{weights['num_bits']}{size}A8"] = len(group["targets"])
    if simulated := ours.get("simulated"):
        for bits in simulated["bits"].values():
            formats[f"W{bits}A8 simulated"] = formats.get(f"W{bits}A8 simulated", 0) + 1
    return {
        "recipe": (ours.get("recipe") or {}).get("name"),
        "simulated": simulated and simulated["kind"],
        "formats": formats,
        "layers_kept": len(block.get("ignore", [])),
        "base": {**(ours.get("base") or {}), **base_sizes},
    }


MODEL = "model.safetensors"
PARTS = ("codes", "scales", "zero_points", "balancing", "embeddings", "blocks", "head")
LEAVES = {  # last part of a tensor's name in a quantised layer -> part
    "weight_packed": "codes", "weight_shape": "codes", "weight_scale": "scales", "input_scale": "scales",
    "weight_zero_point": "zero_points", "input_smooth": "balancing", "rotation_sign": "balancing",
}  # fmt: skip


def bytes_by_part(file: Path) -> dict[str, int]:
    """Stored bytes of a model: of quantised layers codes, scales, zero points and balancing, of everything else embeddings, blocks and
    head. Reads the header of the file, no weight. InputError when it has none."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        sizes = [(_part_of(key, entry["dtype"]), _length(*entry["data_offsets"])) for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise InputError(f"{file} is not a readable weights file.", "Make or copy the bundle again.") from error
    return {part: total for part in PARTS if (total := sum(size for own, size in sizes if own == part))}


def _length(start: int, stop: int) -> int:
    return stop - start


def _part_of(key: str, dtype: str) -> str:
    leaf = key.rpartition(".")[2]
    if leaf in LEAVES:
        return LEAVES[leaf]
    if dtype == "I8":
        return "codes"
    if "embed" in key or key.startswith(("pos_", "class_emb")):
        return "embeddings"
    return "blocks" if key.startswith(("layers.", "blocks.")) else "head"


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
