#!/usr/bin/env bash
# Builds the Python wheel, installs it into a clean environment, and runs its tests there, README's example among them:
#
#   scripts/wheel.sh [OPTIONS OF MATURIN...]
#
# Leaves it in target/wheel/dist. It runs with glibc 2.28 and newer, whatever the machine has: zig links it. The profile and the
# target folder are those of `cargo build --release`. After a build of the whole workspace (`cargo test --workspace`) pyo3, numpy and
# the module itself are all that is compiled; after one of the command alone, crates whose features Python's change (candle among
# them) are once more. Needs Rust and Python's pip.
#
# With `--features cuda` it needs a CUDA toolkit too (scripts/cuda-env.sh), links with the machine's own glibc, and tests the wheel
# where there is a GPU's driver alone, without which nothing loads it.
set -euo pipefail
cd "$(dirname "$0")/.."

glibc=2.28
wheel=$PWD/target/wheel
tools=$wheel/tools
rm -rf "$wheel/dist" "$wheel/env"
mkdir -p "$wheel"
"$tools/bin/maturin" --version 2>/dev/null | grep -q " 1.16.0$" || {
  python3 -m venv --clear "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check maturin==1.16.0 ziglang==0.17.1
}

link=()
audit=(--compatibility linux)
if [ "$(uname -sm)" = "Linux x86_64" ]; then
  # Cargo would compile every crate again for `maturin build --zig`, because that names a target. A linker is of the last step alone.
  cat > "$wheel/cc" <<EOF
#!/bin/sh
PATH=$tools/bin:\$PATH exec $tools/bin/maturin zig cc -- -target x86_64-linux-gnu.$glibc "\$@"
EOF
  chmod +x "$wheel/cc"
  link=(-C "linker=$wheel/cc")
  audit=(--compatibility "manylinux_${glibc/./_}" --auditwheel check)
fi
case " $* " in
*cuda*)
  # Which libraries of CUDA a wheel may name, manylinux does not know. They are looked for where PyTorch's wheels have them, next to
  # this package, and on LD_LIBRARY_PATH.
  link=(-C 'link-arg=-Wl,-rpath,$ORIGIN/../nvidia/cu13/lib')
  audit=(--compatibility linux --auditwheel skip)
  ;;
esac
"$tools/bin/maturin" build --release --locked --manifest-path crates/still-python/Cargo.toml --out "$wheel/dist" \
  "${audit[@]}" "$@" -- "${link[@]}"
ls -l "$wheel/dist"
case " $* " in
*cuda*) ldconfig -p | grep -q libcuda.so.1 || { echo "wheel.sh: not tested, as there is no driver of a GPU here" >&2; exit; } ;;
esac

python3 -m venv "$wheel/env"
"$wheel/env/bin/pip" install --quiet --disable-pip-version-check pytest==9.2.0 mypy==2.4.1 typing_extensions==4.16.0 "$wheel"/dist/*.whl
# Where other modules have taken what room there is for static variables of threads, a module that has such ones cannot be loaded.
if [ "$(uname -s)" = Linux ] && readelf -d "$wheel"/env/lib/python*/site-packages/still/_still*.so | grep STATIC_TLS > /dev/null; then
  echo "wheel.sh: the module has static variables of threads (STATIC_TLS)" >&2
  exit 1
fi
# Away from the sources, which would be imported in its place.
(
  cd "$wheel/env"
  bin/python -m pytest -q -p no:cacheprovider "$OLDPWD/crates/still-python/tests"
  bin/python -m mypy.stubtest --mypy-config-file "$OLDPWD/crates/still-python/pyproject.toml" \
    --allowlist "$OLDPWD/crates/still-python/tests/stubtest_allowlist.txt" --ignore-unused-allowlist still
)
