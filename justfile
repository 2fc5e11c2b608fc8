# `just` lists the recipes. just itself: `pip install rust-just` or `cargo install just`.

_list:
    @just --list --unsorted

# What CI runs: format, spelling, lints, docs, tests
[group('check')]
ci:
    .ci/run

# Tests of the whole workspace, or of a part: `just test -p still-model --test parity`
[group('check')]
test *ARGS="--workspace":
    cargo test --release --locked {{ ARGS }}

# The same as on a CPU with AVX2 and no AVX-512
[group('check')]
test-avx2 *ARGS="--workspace":
    scripts/without-avx512.sh cargo test --release --locked {{ ARGS }}

# The way of the README's first page with the student that ships, on terminals of 80 and 200 columns; half an hour and more
[group('check')]
first-hour *ARGS:
    scripts/first_hour.sh {{ ARGS }}

# Students in transformers (`pip install torch transformers peft pytest safetensors`); `--golden DIR`, `--still BINARY`
[group('check')]
test-transformers *ARGS:
    python3 -m pytest -q -p no:cacheprovider crates/still-model/python/tests {{ ARGS }}

# The Python wheel, in target/wheel/dist, installed into a clean environment and tested there
[group('check')]
wheel *ARGS:
    scripts/wheel.sh {{ ARGS }}

# Documentation, with warnings as errors; `just docs --open` shows it
[group('check')]
docs *ARGS:
    RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps {{ ARGS }}

# Lints of the Rust code of the feature `cuda`; no toolkit, no GPU
[group('check')]
lint-cuda:
    scripts/check-cuda.sh

# The command without the server and Parquet
[group('check')]
lean:
    scripts/lean.sh

# Spelling (`pip install typos`)
[group('check')]
typos:
    typos

# Licenses, bans and sources of dependencies (`cargo install --locked cargo-deny`)
[group('check')]
deny:
    cargo deny --locked check licenses bans sources

# Whether every crate can be packaged
[group('check')]
package:
    cargo package --locked --workspace --no-verify --allow-dirty

# Every order in which a decode step's threads can meet
[group('threads and memory')]
loom:
    RUSTFLAGS="--cfg loom" cargo test --release --locked -p still-threads --tests --target-dir target/loom

# AddressSanitizer; needs a nightly toolchain. Other crates: `just asan -p still-model --lib`
[group('threads and memory')]
asan *ARGS:
    scripts/asan.sh {{ ARGS }}

# Fuzz the server's request bodies: `just fuzz-bodies 10 1`
[group('threads and memory')]
fuzz-bodies minutes="10" seed="1":
    cargo test --release --locked -p still-serve --test fuzz_bodies -- --minutes {{ minutes }} --seed {{ seed }}

# Fuzz the files of a server's states: `just fuzz-states 10 1`
[group('threads and memory')]
fuzz-states minutes="10" seed="1":
    cargo test --release --locked -p still-serve --test fuzz_states -- --minutes {{ minutes }} --seed {{ seed }}

# Fuzz every file format; one: `just fuzz 20000 1 --target gguf`; one case again: `just fuzz 1 1234 --target gguf`
[group('threads and memory')]
fuzz runs="20000" seed="1" *ARGS:
    cargo test --release --locked -p still-cli --test fuzz -- --runs {{ runs }} --seed {{ seed }} {{ ARGS }}

# Tests of the operator, models and training on a GPU; without a toolkit, run `eval "$(scripts/cuda-env.sh)"` first
[group('gpu')]
test-gpu *ARGS:
    cargo test --release --locked --workspace --features still-cli/cuda --test cuda --test cuda_dense --test cuda_weights --test cuda_state --test cuda_steps --test cuda_saved --test cuda_variants --test cuda_training {{ ARGS }}
    cargo test --release --locked -p still-eval --features cuda --lib device_tests

# The kernels as one library, without Rust
[group('gpu')]
kernels lib="target/libstill.so" *GENCODE:
    mkdir -p "$(dirname "{{ lib }}")"
    bash crates/still-kernels/build_cuda.sh "{{ lib }}" {{ GENCODE }}

# Compare the kernels with float64 (check) or PyTorch's attention (bench); needs PyTorch
[group('gpu')]
check-kernels what="check" lib="target/libstill.so": (kernels lib)
    python3 crates/still-kernels/tests/check.py "{{ lib }}" {{ what }}

# The operator's kernels under compute-sanitizer: `memcheck` or `racecheck`; needs PyTorch
[group('gpu')]
sanitize-kernels tool="memcheck" lib="target/libstill.so": (kernels lib)
    compute-sanitizer --tool {{ tool }} --kernel-regex kns=still python3 crates/still-kernels/tests/sanitize.py "{{ lib }}"

# One GPU test under compute-sanitizer: `just sanitize racecheck TEST_BINARY TEST`
[group('gpu')]
sanitize tool binary test:
    compute-sanitizer --tool {{ tool }} --kernel-name kns=still --force-synchronization-limit 32 "{{ binary }}" --exact {{ test }} --test-threads 1

# Benches of the operator on the CPU; a group: `just bench-operator "train on 1024"`
[group('measure')]
[positional-arguments]
bench-operator *ARGS:
    cargo bench --locked -p still-attention --bench operator -- "$@"

# Benches of products with quantized matrices
[group('measure')]
[positional-arguments]
bench-quant *ARGS:
    cargo bench --locked -p still-quant --bench product -- "$@"

# llama.cpp and `still` in turn on one GGUF (`pip install llama-cpp-python`)
[group('measure')]
peer-llama-cpp model *ARGS:
    cargo build --release --locked
    python3 benches/beside_llama_cpp.py "{{ model }}" {{ ARGS }}

# transformers' decode steps on a GPU, the peer of `still bench model --device cuda`
[group('measure')]
peer-transformers *CONTEXTS:
    python3 benches/hf_decode.py {{ CONTEXTS }}

# Whether a penalty keeps greedy answers from repeating themselves, and what it costs in facts
[group('measure')]
repetition MODELS="demo" PENALTIES="1,1.1":
    cargo build --release --locked
    python3 benches/repetition.py "{{ MODELS }}" "{{ PENALTIES }}"

# Prefill in transformers on CPU cores, in 9 minutes: the student that ships with our kernels and without, and its teacher
[group('measure')]
peer-prefill *ARGS:
    python3 benches/hf_prefill.py {{ ARGS }}

# PyTorch's dense attention, and transformers' prefill and compiled decode steps, the peers of dense variants on a GPU
[group('measure')]
peer-dense *ARGS:
    python3 benches/torch_dense.py {{ ARGS }}

# PyTorch's LoRA steps on a GPU, the peer of `still bench train --device cuda`
[group('measure')]
peer-lora *CONTEXTS:
    python3 benches/torch_lora.py {{ CONTEXTS }}

# The operator as an op of PyTorch, compared with `still bench attention` on a GPU; needs a wheel with CUDA
[group('measure')]
bench-torch-op *ARGS:
    python3 benches/torch_op.py --still target/release/still -- {{ ARGS }}

# The README's plot, from recorded runs (`pip install matplotlib`)
[group('measure')]
plot FOLDER="benches/results/2026-11-30-h200/table":
    python3 benches/table/report.py "{{ FOLDER }}" --images docs/images --markdown target/table.md

# A stripped binary of a tagged commit in target/dist, with its SHA-256; `just release cuda` for GPUs
[group('release')]
release *FEATURE:
    scripts/release.sh {{ FEATURE }}
