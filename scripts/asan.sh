#!/usr/bin/env bash
# Tests under AddressSanitizer: reads and writes beyond their memory, and memory used after it was freed.
# Needs a nightly toolchain (rustup toolchain install nightly). Tests of other crates: scripts/asan.sh -p still-model --lib
set -euo pipefail
cd "$(dirname "$0")/.."

cargo +nightly --version >/dev/null 2>&1 || {
  echo "error: there is no nightly toolchain" >&2
  echo "hint: rustup toolchain install nightly" >&2
  exit 1
}
target=$(rustc +nightly -vV | sed -n 's/^host: //p')
packages=("$@")
if [ ${#packages[@]} -eq 0 ]; then
  packages=(-p still-threads -p still-compute -p still-quant -p still-attention)
fi
# Doctests are left out: they would link without the sanitizer.
# Proc macros and build scripts are not instrumented because a target is given. Leaks are not looked for: thread pools live to the end.
ASAN_OPTIONS=detect_leaks=0 RUSTFLAGS="-Zsanitizer=address" \
  cargo +nightly test --release --locked --tests --target "$target" --target-dir "${CARGO_TARGET_DIR:-target/asan}" "${packages[@]}"
