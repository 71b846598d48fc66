#!/usr/bin/env python3
"""Makes pictures to measure the reading of data with; needs numpy and Pillow.

usage: make.py OUT [N]

Writes into OUT, the same bytes every time with one version of Pillow:

  jpeg, png, webp   N pictures (default 200) of 512 x 512: JPEG of quality 90, PNG, lossy WebP of quality 85
  large, camera     N/8 JPEGs of 2048 x 1536 and 4000 x 3000, quality 90
  files             20,000 JPEGs of 512 x 512 in one folder, which are hard links to the N different ones
  shards            100,000 samples in 100 tar shards: JPEGs of 96 x 96 with a caption and a question

The pictures are smooth waves with noise and boxes, so that their files have the sizes of photographs. Each folder has a
metadata.jsonl with captions.
"""

import io
import json
import multiprocessing
import os
import sys
import tarfile

import numpy as np
from PIL import Image, ImageFilter

KINDS = {
    "jpeg": ("jpg", (512, 512), {"quality": 90}, 1),
    "png": ("png", (512, 512), {}, 1),
    "webp": ("webp", (512, 512), {"quality": 85}, 1),
    "large": ("jpg", (1536, 2048), {"quality": 90}, 8),
    "camera": ("jpg", (3000, 4000), {"quality": 90}, 8),
}


def picture(seed, height, width):
    """A picture of waves, noise at two scales, and boxes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(height, width)
    pixels = np.zeros((height, width, 3), np.float32)
    for c in range(3):
        for _ in range(4):
            a, b, phase = rng.uniform(1, 12), rng.uniform(1, 12), rng.uniform(0, 6)
            pixels[..., c] += rng.uniform(10, 40) * np.sin(a * x * 6 + b * y * 6 + phase)
        coarse = rng.normal(0, 8, (height // 4 + 1, width // 4 + 1))
        pixels[..., c] += coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
        pixels[..., c] += rng.normal(0, 4, (height, width)) + 128
    for _ in range(12):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        bottom, right = top + rng.integers(10, height // 3), left + rng.integers(10, width // 3)
        pixels[top:bottom, left:right] += rng.normal(0, 40, 3)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.7))


def write(job):
    path, seed, size, options = job
    picture(seed, *size).save(path, **options)


def metadata(folder, names):
    with open(f"{folder}/metadata.jsonl", "w") as file:
        for i, name in enumerate(names):
            file.write(json.dumps({"file_name": name, "text": f"waves and boxes, number {i}"}) + "\n")


def main():
    out, n = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200
    jobs = []
    for kind, (ending, size, options, share) in KINDS.items():
        os.makedirs(f"{out}/{kind}")
        names = [f"{i:05}.{ending}" for i in range(max(n // share, 1))]
        metadata(f"{out}/{kind}", names)
        jobs += [(f"{out}/{kind}/{name}", i, size, options) for i, name in enumerate(names)]
    with multiprocessing.Pool() as pool:
        pool.map(write, jobs, chunksize=4)

    os.makedirs(f"{out}/files")
    names = [f"{i:05}.jpg" for i in range(20_000)]
    for i, name in enumerate(names):
        os.link(f"{out}/jpeg/{i % n:05}.jpg", f"{out}/files/{name}")
    metadata(f"{out}/files", names)

    os.makedirs(f"{out}/shards")
    small = []
    for i in range(min(n, 50)):
        file = io.BytesIO()
        Image.open(f"{out}/jpeg/{i:05}.jpg").resize((96, 96)).save(file, "JPEG")
        small.append(file.getvalue())
    for shard in range(100):
        with tarfile.open(f"{out}/shards/train-{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for k in range(1000):
                key = f"{shard * 1000 + k:08}"
                texts = {"qa": [["which number?", str(k)]], "prompt": f"draw number {k}"}
                members = [
                    (f"{key}.jpg", small[k % len(small)]),
                    (f"{key}.txt", f"waves and boxes, number {k} of shard {shard}".encode()),
                    (f"{key}.json", json.dumps(texts).encode()),
                ]
                for name, data in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    main()
