#!/usr/bin/env bash
# Fetches easy-VQA (Victor Zhou, MIT; 4,000 + 1,000 pictures of one coloured shape, 48,248 questions) as
# a pinned PyPI package and converts it to two folder data sets, TARGET/train and TARGET/test.
#
# usage: examples/fetch-easy-vqa.sh [TARGET]        (default: data/easy-vqa)
set -euo pipefail

target=${1:-data/easy-vqa}
here=$(cd "$(dirname "$0")" && pwd)
package=easy-vqa==1.0
sha256=fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f

if [ -f "$target/train/metadata.jsonl" ] && [ -f "$target/test/metadata.jsonl" ]; then
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
python3 "$here/layout_easy_vqa.py" --sha256 "$sha256" "$work"/easy_vqa-1.0-*.whl "$target"
