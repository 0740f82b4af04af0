#!/usr/bin/env bash
# The main job, end to end: installs what is missing, builds, ingests the documents in examples/, answers
# a question about them. A second run finds every chunk cached.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scripts/setup.sh
# shellcheck source=scripts/env.sh
. scripts/env.sh
export PATH="$PATH:$HOME/.cargo/bin"
# The workspace as a whole, as the tests build it: shared dependencies are then compiled once.
cargo build --release --locked --workspace
exec "$CARGO_TARGET_DIR/release/quire" "$@" demo
