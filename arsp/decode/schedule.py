"""The step schedule of a next-scale model: one row a scale. Two models in one image (CoDe, arXiv 2411.17787), windows and guidance
sharing (LiteVAR, arXiv 2411.17178), precision and depth are columns of it, and a schedule of default cells is the plain sampler."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from arsp.config import StrictModel
from arsp.errors import ConfigError, InputError
from arsp.models.attention import DensePolicy
from arsp.models.var import VAR

SHARES = ("none", "map", "output")


class ScaleRow(StrictModel):
    """How one scale is made."""

    model: str = Field("", description="zoo name or bundle (default: the stack's model)")
    depth: int | None = Field(None, ge=1, description="run only the first blocks; may not grow from scale to scale")
    attention: str = Field("dense", description="dense, or litevar=PROFILE")
    cfg: Annotated[Literal["full", "shared", "off"], BeforeValidator(lambda value: "off" if value is False else value)] = Field(
        "full", description="shared: the null half takes over the attention maps; off: no null half (from here to the last scale)"
    )  # YAML reads a bare off as false
    precision: Literal["float32", "bfloat16"] | None = Field(None, description="of weights and activations (default: the stack's)")


@dataclass(frozen=True)
class ScaleStep:
    """A row with its model and policy loaded. ``owner`` tells models apart: one owner may come in two precisions."""

    model: VAR
    owner: str = ""
    policy: Any = DensePolicy()
    depth: int | None = None
    guided: bool = True
    shared: bool = False

    def share(self, layer: int, scale: int) -> str:
        """What the guidance halves share: the policy's choice, at least the map where the row says so."""
        found = self.policy.share(layer, scale)
        return "map" if self.shared and found == "none" else found

    def savings(self, scale: int) -> tuple:
        """Two scales with equal savings can be run in one pass."""
        shares = tuple(self.share(layer, scale) for layer in range(self.model.config.depth))
        return id(self.policy), self.depth, self.guided, shares


def plain_steps(model: VAR) -> list[ScaleStep]:
    """One model for every scale, nothing saved."""
    return [ScaleStep(model)] * model.config.num_scales


def parse_collab(text: str, num_scales: int) -> tuple[str, str, int]:
    """``BIG:SMALL@N`` -> (big, small, N): the big model makes scales 0 .. N-1. ConfigError unless 1 <= N < K."""
    match = re.fullmatch(r"(.+?):(.+)@(\d+)", text)
    if not match:
        raise ConfigError(f"--collab '{text}': expected BIG:SMALL@N.", "For example --collab var:var-small@4")
    big, small, count = match.group(1), match.group(2), int(match.group(3))
    if not 1 <= count < num_scales:
        raise ConfigError(f"--collab {text}: the big model makes the first N scales, 1 <= N <= {num_scales - 1}.")
    return big, small, count


def parse_scales(text: str | int, num_scales: int) -> range:
    """``a-b`` or ``a`` -> scales a .. b. ConfigError when they are not scales of the model."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(text))
    first, last = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (1, 0)
    if not 0 <= first <= last < num_scales:
        raise ConfigError(f"scales '{text}': expected a or a-b within 0-{num_scales - 1}.")
    return range(first, last + 1)


def load_schedule(path: str, num_scales: int) -> list[ScaleRow]:
    """Rows of a YAML list of ``{scales: a-b, model: ..., depth: ..., attention: ..., cfg: ..., precision: ...}``; scales that no entry
    names keep the defaults. InputError: no such file or no list; ConfigError: a scale named twice, an unknown key or value."""
    import yaml
    from pydantic import ValidationError

    try:
        entries = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"schedule {path} cannot be read: {str(error).splitlines()[0]}", "Give a YAML file.") from error
    example = "For example: - {scales: 4-5, model: var-small}"
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) and "scales" in entry for entry in entries):
        raise InputError(f"schedule {path}: expected a list of entries with 'scales'.", example)
    rows: dict[int, ScaleRow] = {}
    for entry in entries:
        try:
            row = ScaleRow(**{str(key): value for key, value in entry.items() if key != "scales"})
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"schedule {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}", example) from error
        for scale in parse_scales(entry["scales"], num_scales):
            if scale in rows:
                raise ConfigError(f"schedule {path}: scale {scale} is named twice.")
            rows[scale] = row
    return [rows.get(scale, ScaleRow()) for scale in range(num_scales)]


def check_rows(rows: list[ScaleRow]) -> None:
    """ConfigError when what a later row reads was not computed by an earlier one."""
    for k, (before, row) in enumerate(zip(rows, rows[1:], strict=False), start=1):
        same = before.model == row.model
        if before.cfg == "off" and row.cfg != "off":
            raise ConfigError(
                f"schedule: scale {k} has cfg {row.cfg} behind cfg off: the null half cannot come back, its keys are missing."
            )
        if same and before.cfg == "shared" and row.cfg == "full":
            raise ConfigError(f"schedule: scale {k} has cfg full behind cfg shared: the null half's keys were not stored.")
        if same and before.depth is not None and (row.depth is None or row.depth > before.depth):
            raise ConfigError(
                f"schedule: scale {k} is deeper than scale {k - 1}: the keys of the blocks behind {before.depth} are missing."
            )
    models = [row.model for k, row in enumerate(rows) if k == 0 or row.model != rows[k - 1].model]
    if len(models) != len(set(models)):
        named = ", ".join(model or "the stack's model" for model in models)
        raise ConfigError(f"schedule: a model comes back ({named}); each may take over once, its cache is freed behind it.")


def describe_rows(rows: list[ScaleRow], sides: tuple[int, ...], dtype: str, model: str) -> list[dict[str, Any]]:
    """The schedule as records and ``--dry-run`` print it; ``dtype`` and ``model`` fill the cells left at their default."""
    return [
        {
            "scale": k,
            "side": side,
            **row.model_dump(),
            "model": row.model or model,
            "precision": row.precision or dtype.removeprefix("torch."),
        }
        for k, (row, side) in enumerate(zip(rows, sides, strict=True))
    ]
