"""The floor under the embedded models: Frechet distance of real images and of tokenizer reconstructions to the reference, as JSON.

python benchmarks/reconstruction.py > benchmarks/embedded/reconstruction.json
"""

from __future__ import annotations

import json

import torch

from arsp.data import shapes
from arsp.metrics.features import FEATNET_NAME, extract, load_featnet, weights_sha256
from arsp.metrics.fidelity import frechet_distance
from arsp.tokenizers.pixels import to_pixels, to_uint8
from arsp.zoo.load import load_tokenizer

VARIANT, TOKENIZERS, SEED = "shapes32-coarse", ("shapes-vq16", "shapes-msvq"), 7


@torch.inference_mode()
def main() -> None:
    net = load_featnet()
    tokenizers = {name: load_tokenizer(name) for name in TOKENIZERS}
    reference = extract(net, shapes.draw(10_000, 999, VARIANT)[0])["features"]
    rows = []
    for num in (1000, 5000):
        images, attributes = shapes.draw(num, SEED, VARIANT)
        rows.append({"n": num, "images": "real", "fid": frechet_distance(extract(net, images)["features"], reference)})
        pixels = [to_pixels(part) for part in images.split(256)]
        for name, tokenizer in tokenizers.items():
            decoded = [tokenizer.decode_codes(tokenizer.encode(part)) for part in pixels]
            mse = torch.cat([(a - b).square().flatten(1).mean(1) for a, b in zip(decoded, pixels, strict=True)])
            found = extract(net, torch.cat([to_uint8(part) for part in decoded]))
            rows.append(
                {
                    "n": num,
                    "images": f"reconstructions of {name}",
                    "fid": frechet_distance(found["features"], reference),
                    "class_accuracy": float((found["shape"].argmax(-1) == attributes["shape"]).float().mean()),
                    "psnr_db": float(10 * torch.log10(4 / mse).mean()),
                }
            )
    record = {"set": VARIANT, "seed": SEED, "features": FEATNET_NAME, "features_sha256": weights_sha256(net), "rows": rows}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
