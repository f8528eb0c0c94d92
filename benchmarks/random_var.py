"""A VAR bundle with random weights, for timing sizes that were never released.

``python benchmarks/random_var.py OUT --depth 16 --pixels 512``, then ``arsp bench OUT``. Width and heads follow the depth as in the
released models; the tokenizer is the released one in its sizes, random too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arsp.models.var import VAR, VARConfig
from arsp.tokenizers.var_vqvae import PATCH_NUMS, VQVAE, VQVAEConfig
from arsp.zoo.bundle import save_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--pixels", type=int, choices=PATCH_NUMS, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)
    sides = PATCH_NUMS[args.pixels]
    config = VARConfig(depth=args.depth, embed_dim=64 * args.depth, num_heads=args.depth, patch_nums=sides)
    tokenizer = VQVAEConfig(patch_nums=sides)
    model = VAR(config)
    model.init_weights()
    save_bundle(
        args.out, family="var", kind="teacher", config=asdict(config), model=model.state_dict(), tokenizer={"config": asdict(tokenizer)},
        tokenizer_weights=VQVAE(tokenizer).state_dict(), sampling={"cfg": 1.5, "temperature": 1.0, "top_k": 900, "top_p": 0.96},
    )  # fmt: skip


if __name__ == "__main__":
    main()
