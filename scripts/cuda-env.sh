#!/usr/bin/env bash
# Prints the exports that a build with `--features cuda` is made with:
#
#   eval "$(scripts/cuda-env.sh)" && cargo build --release --features cuda
#
# Where `nvcc` is not on the PATH, a toolkit comes from some 700 MB of wheels, fetched once through pip, without root and
# without a GPU. What it makes lies in a folder (the argument, else ~/.cache/still/cuda-13.0).
#
# NVCC becomes nvcc-lean.sh, which leaves out kernels of candle that nothing here calls.
#
# CUDA_COMPUTE_CAP says which GPU candle's own kernels are compiled for (90: H100; 80: A100; 89: RTX 40). Ours are
# compiled for all.
set -euo pipefail

cuda=13.0
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/still/cuda-$cuda}
here=$(cd "$(dirname "$0")" && pwd)

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

# An installed toolkit, if there is one. The lean compiler of an earlier run is not one.
installed=$(type -ap nvcc | grep -vxF "$dir/lean/bin/nvcc" | head -n 1 || true)
if [ -n "$installed" ]; then
  home=$(dirname "$(dirname "$(readlink -f "$installed")")")
else
  home=$dir/site/nvidia/cu13
fi

if [ ! -d "$home" ]; then
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

# A toolkit's folder as build scripts look for one: include and lib64 are the toolkit's, nvcc is not.
mkdir -p "$dir/lean/bin"
ln -sfn "$home/include" "$dir/lean/include"
ln -sfn "$home/lib64" "$dir/lean/lib64"
install -m 755 "$here/nvcc-lean.sh" "$dir/lean/bin/nvcc"

# No RUSTFLAGS: they would replace those of a .cargo/config.toml.
cat <<END
export CUDA_HOME='$home' CUDA_PATH='$home' CUDA_COMPUTE_CAP='${CUDA_COMPUTE_CAP:-90}'
export NVCC='$dir/lean/bin/nvcc' STILL_NVCC='$home/bin/nvcc'
export PATH='$home/bin':"\$PATH"
export LIBRARY_PATH='$home/lib64:$home/lib64/stubs'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export LD_LIBRARY_PATH='$home/lib64'"\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
END
