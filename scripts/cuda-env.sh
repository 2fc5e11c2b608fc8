#!/usr/bin/env bash
# Makes what `--features cuda` is built with, without root and without a GPU, and prints the exports that use it:
#
#   eval "$(scripts/cuda-env.sh)" && cargo build --release --features cuda
#
# The first run fetches some 700 MB of wheels through pip into a folder (the argument, else ~/.cache/still/cuda-13.0);
# later runs only print. Where a CUDA toolkit is installed, this script is not needed.
#
# CUDA_COMPUTE_CAP says which GPU candle's own kernels are compiled for (90: H100; 80: A100; 89: RTX 40). Ours are
# compiled for all.
set -euo pipefail

cuda=13.0
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/still/cuda-$cuda}
home=$dir/site/nvidia/cu13

say() { echo "cuda-env: $*" >&2; }
need() { command -v "$1" >/dev/null || { say "error: $1 is not installed; hint: $2"; exit 1; }; }

# Unversioned names, which linkers look for; wheels have only `libX.so.N`.
name_libraries() {
  local lib so
  for lib in cublas cublasLt cudart curand nvrtc; do
    so=$(find "$1/lib" -name "lib$lib.so.[0-9]*" | sort | head -n 1)
    [ -n "$so" ] || { say "error: the wheels have no lib$lib"; exit 1; }
    ln -sf "$(basename "$so")" "$1/lib/lib$lib.so"
  done
  ln -sfn lib "$1/lib64"
}

# The driver's library belongs to the driver. Linking needs its names alone: each answers "unknown error" (999), and on a
# machine with a GPU the loader finds the driver's own libcuda.so.1, not this one.
make_driver_stub() {
  mkdir -p "$1/lib/stubs"
  grep -ohE '\bcu[A-Z][A-Za-z0-9_]*\b' "$1/include/cuda.h" | sort -u |
    awk '{ print "int " $1 "(void) { return 999; }"; if (!/_v[0-9]+$/) print "int " $1 "_v2(void) { return 999; }" }' |
    sort -u |
    cc -x c -w -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$1/lib/stubs/libcuda.so" -
}

if [ ! -d "$dir/site" ]; then
  need python3 "any Python 3 with pip will do"
  need cc "nvcc compiles through a C++ compiler, gcc for example"
  mkdir -p "$dir"
  new=$(mktemp -d "$dir/new.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  say "fetching the CUDA $cuda toolkit into $dir"
  # One version throughout: parts newer than nvcc break it.
  python3 -m pip install --quiet --disable-pip-version-check --target "$new/site" \
    "cuda-toolkit[nvcc,cudart,cccl,cublas,curand,nvrtc]==$cuda.2" \
    "nvidia-cuda-crt==$cuda.88" "nvidia-nvvm==$cuda.88" >&2
  name_libraries "$new/site/nvidia/cu13"
  make_driver_stub "$new/site/nvidia/cu13"
  mv "$new/site" "$dir/site"
fi

# No RUSTFLAGS: they would replace those of a .cargo/config.toml.
cat <<EOF
export CUDA_HOME='$home' CUDA_PATH='$home' CUDA_COMPUTE_CAP='${CUDA_COMPUTE_CAP:-90}'
export PATH='$home/bin':"\$PATH"
export LIBRARY_PATH='$home/lib:$home/lib/stubs'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export LD_LIBRARY_PATH='$home/lib'"\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
EOF
