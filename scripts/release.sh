#!/usr/bin/env bash
# Builds `still`, strips it and packs it with its manual pages, completions and licenses:
#
#   scripts/release.sh [cuda]
#
# Writes target/dist/still-VERSION-TARGET[-cuda].tar.xz and its SHA-256. HEAD must be the tag vVERSION of Cargo.toml's version,
# with nothing changed. CONTRIBUTING.md has the whole process.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 1
}
for tool in cargo git strip tar xz sha256sum; do
  command -v "$tool" >/dev/null || fail "$tool is not installed" "install $tool"
done
features=()
case ${1:-} in
  "") ;;
  cuda) features=(--features cuda) ;;
  *) fail "unknown argument \"$1\"" "scripts/release.sh [cuda]" ;;
esac

version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
target=$(rustc -vV | sed -n 's/^host: //p')
[ -z "$(git status --porcelain)" ] || fail "the checkout has changes" "commit them, and tag the commit"
git tag --points-at HEAD | grep -qx "v$version" ||
  fail "HEAD is not tagged v$version" "git tag -a v$version, or correct the version in Cargo.toml"
grep -q "^## $version " CHANGELOG.md ||
  fail "CHANGELOG.md has no section of $version" "rename \"Unreleased\" to \"$version - DATE\""

cargo build --release --locked --package still-cli "${features[@]}"

built=${CARGO_TARGET_DIR:-target}/release/still
dist=target/dist
name=still-$version-$target${1:+-$1}
rm -rf "${dist:?}/$name"
mkdir -p "$dist/$name"/{man,completions}
strip -o "$dist/$name/still" "$built"
"$dist/$name/still" man --out "$dist/$name/man"
for shell in bash zsh fish; do
  "$dist/$name/still" completions "$shell" > "$dist/$name/completions/still.$shell"
done
cp README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT "$dist/$name"

# Alike whenever and by whomever it is packed: names in order, no owner, the commit's time.
tar --directory "$dist" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct)" --create "$name" |
  xz -9 --threads=0 > "$dist/$name.tar.xz.tmp"
mv "$dist/$name.tar.xz.tmp" "$dist/$name.tar.xz"
(cd "$dist" && sha256sum "$name.tar.xz" > "$name.tar.xz.sha256")
rm -rf "${dist:?}/$name"
ls -l "$dist/$name".tar.xz*
