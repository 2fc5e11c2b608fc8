#!/usr/bin/env bash
# Runs a command as on a CPU with AVX2 and no AVX-512, AVX-VNNI or AMX:
#
#   scripts/without-avx512.sh target/release/still bench model --model demo
#   scripts/without-avx512.sh cargo test --release --locked -p still-quant
#
# Linux on x86-64, a C compiler, and a CPU that lets `cpuid` be answered for it (`cpuid_fault` in /proc/cpuinfo).
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: $0 COMMAND…" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
library=$here/../target/without_avx512.so
if [ ! "$library" -nt "$here/without_avx512.c" ]; then
  mkdir -p "$(dirname "$library")"
  "${CC:-cc}" -O1 -Wall -Wextra -shared -fPIC -o "$library.$$" "$here/without_avx512.c"
  mv "$library.$$" "$library"
fi
LD_PRELOAD=$library${LD_PRELOAD:+:$LD_PRELOAD} exec "$@"
