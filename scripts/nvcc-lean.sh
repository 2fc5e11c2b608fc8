#!/usr/bin/env bash
# nvcc, which leaves out candle's kernels for quantized tensors and mixtures of experts. Nothing here calls them (our own are
# in still-kernels), candle has no feature that drops them, and they take most of the time of a build from nothing. A program
# that calls one all the same says so and aborts. scripts/cuda-env.sh puts this in nvcc's place; $STILL_NVCC is the compiler.
set -euo pipefail

source='' output='' folder=''
arguments=("$@")
while [ $# -gt 0 ]; do
  case $1 in
    -o) output=$2; shift ;;
    --output-directory) folder=$2; shift ;;
    *.cu) source=$1 ;;
  esac
  shift
done

# One function for each name that candle declares.
stubs() {
  echo '#include <stdio.h>'
  echo '#include <stdlib.h>'
  sed -nE 's/^ *pub fn (\w+)\(.*/\1/p' "$1" | while read -r name; do
    echo "void $name(void) { fputs(\"error: $name was left out of this build; hint: build with NVCC unset\\n\", stderr); abort(); }"
  done
}

case ${CARGO_PKG_NAME:-}/$(basename "$source") in
  candle-kernels/quantized.cu)
    empty=$(mktemp -d); trap 'rm -rf "$empty"' EXIT
    : > "$empty/quantized.cu"
    "$STILL_NVCC" --ptx --output-directory "$folder" "$empty/quantized.cu" ;;
  candle-kernels/moe_gguf.cu) stubs "$CARGO_MANIFEST_DIR/src/ffi.rs" | cc -c -fPIC -x c - -o "$output" ;;
  candle-kernels/moe_*.cu | candle-kernels/mmvq_gguf.cu | candle-kernels/mmq_*.cu) : | cc -c -fPIC -x c - -o "$output" ;;
  *) exec "$STILL_NVCC" "${arguments[@]}" ;;
esac
