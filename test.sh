#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lints, docs, tests. CI runs exactly this.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scripts/setup.sh
# shellcheck source=scripts/env.sh
. scripts/env.sh
export PATH="$PATH:$HOME/.cargo/bin"

# Tests drive the server with the public openai client and compare with the hub's own library, and NVRTC compiles the CUDA
# kernels without a GPU: in an environment of their own, brought up to date when the requirements change.
venv=$QUIRE_CACHE/test-venv
if ! cmp -s scripts/requirements-test.txt "$venv/requirements-test.txt"; then
    python3 -m venv "$venv" 2>/dev/null || {
        echo "[test] error: python3 with venv is missing; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
    "$venv/bin/pip" install -q -r scripts/requirements-test.txt
    cp scripts/requirements-test.txt "$venv/"
fi
export QUIRE_TEST_PYTHON=$venv/bin/python
# Where there is Node, its openai client drives the server too.
if command -v npm >/dev/null; then
    export QUIRE_TEST_NODE=$QUIRE_CACHE/test-node
    [ -d "$QUIRE_TEST_NODE/node_modules/openai" ] ||
        npm install --prefix "$QUIRE_TEST_NODE" --no-audit --no-fund --silent openai
fi

step() { printf '\n[test] %s\n' "$*"; }
step format
cargo fmt --all --check
step kernels
"$venv/bin/python" scripts/kernels.py
step lints
cargo clippy --release --locked --workspace --all-targets -- -D warnings
# The bindings to faiss, which is not built for this: that takes longer than everything else.
cargo clippy --release --locked -p ann-index --features faiss-api --all-targets -- -D warnings
step documentation
RUSTDOCFLAGS='-D warnings' cargo doc --release --locked --workspace --no-deps --quiet
step build
cargo build --release --locked --workspace
step tests
log=$CARGO_TARGET_DIR/tests.log
cargo test --release --locked --workspace | tee "$log"
step faults
# Every fault of the list has a test, and it has just passed. Those of a GPU were ignored here.
"$CARGO_TARGET_DIR/release/quire-bench" faults --log "$log" --allow-ignored --no-records
