#!/usr/bin/env bash
# Type-checks and lints the Rust code of the feature `cuda`, tests included. Needs no CUDA toolkit and no GPU: an `nvcc` that
# compiles nothing stands in, since nothing is linked. Kernels themselves are compiled by scripts/cuda-env.sh's.
set -euo pipefail
cd "$(dirname "$0")/.."

home=$PWD/target/no-cuda
mkdir -p "$home"/{bin,include,lib64}
cat > "$home/bin/nvcc" <<'EOF'
#!/usr/bin/env bash
# Says that it is CUDA 13.0's, and leaves an empty file where an output was asked for.
[ "${1:-}" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; }
while [ $# -gt 0 ]; do
  case $1 in
    -o) : > "$2"; shift ;;
    --output-directory) folder=$2; shift ;;
    *.cu) sources+=("$1") ;;
  esac
  shift
done
for source in "${sources[@]}"; do
  [ -z "${folder:-}" ] || : > "$folder/$(basename "$source" .cu).ptx"
done
EOF
chmod +x "$home/bin/nvcc"
touch "$home/include/cuda.h"

export CUDA_HOME=$home CUDA_PATH=$home CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000 NVCC=$home/bin/nvcc PATH=$home/bin:$PATH
exec cargo clippy --release --locked --workspace --features still-python/cuda --all-targets --target-dir target/check-cuda -- -D warnings
