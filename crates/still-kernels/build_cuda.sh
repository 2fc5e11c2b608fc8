#!/usr/bin/env bash
# Compiles the kernels into one shared library: build_cuda.sh OUT.so [gencode…] (default: sm_90a). Needs nvcc on PATH.
set -euo pipefail
out=$1; shift
here=$(cd "$(dirname "$0")/src/cuda" && pwd)
arch=("$@"); [ ${#arch[@]} -gt 0 ] || arch=(-gencode=arch=compute_90a,code=sm_90a)
objects=$(mktemp -d); trap 'rm -rf "$objects"' EXIT
pids=()
for source in "$here"/*.cu; do
  nvcc -O3 -std=c++17 --expt-relaxed-constexpr --extended-lambda -Xcompiler -fPIC -Xptxas -v "${arch[@]}" -c "$source" \
    -o "$objects/$(basename "$source").o" >"$objects/$(basename "$source").log" 2>&1 & pids+=($!)
done
failed=0; for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
cat "$objects"/*.log
[ $failed = 0 ]
nvcc -shared "${arch[@]}" "$objects"/*.o -o "$out"
