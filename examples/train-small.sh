#!/usr/bin/env bash
# Trains configs/small.toml on a GPU (nine minutes on an H100 or H200) and packs the result: this made models/small.
#
# usage: examples/train-small.sh [TARGET]        (default: runs/small, packed into runs/small-packed)
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-runs/small}
cargo build --release --bins
target/release/ett-train run --config configs/small.toml --device cuda --out "$target"
target/release/ett export model "$target" --out "$target-packed"
echo "$target-packed can be used like a run: target/release/ett eval --run $target-packed"
