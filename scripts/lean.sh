#!/usr/bin/env bash
# Lints `still` without the features that it has by default (the server, Parquet), and tests what it says in their place. Most of it
# is compiled already, by whoever built the command.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo clippy --release --locked --package still-cli --no-default-features -- -D warnings
cargo test --release --locked --package still-cli --no-default-features --test it left_out
