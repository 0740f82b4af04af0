#!/usr/bin/env bash
# Installs what Quire needs to build, and builds RocksDB once into a cache folder.
# Idempotent: a second run takes a second. Source scripts/env.sh to use what it made.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=scripts/env.sh
. scripts/env.sh

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || say "note: only Linux on x86_64 is tested; this is $(uname -s) on $(uname -m)"

sudo=
[ "$(id -u)" = 0 ] || sudo='sudo -n'
can_apt() { command -v apt-get >/dev/null && { [ -z "$sudo" ] || $sudo true 2>/dev/null; }; }
apt_install() { $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }

# 1. System packages. clang's library reads RocksDB's C header; g++ compiles RocksDB; python3-venv
#    is for the tests of the HTTP API and of the CUDA kernels' compilation.
missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v python3 >/dev/null && python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return 0
    ldconfig -p 2>/dev/null | grep -q 'libclang' && return 0
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null
}
# The compiler's own headers (stddef.h) come in a separate package.
have_clang_headers() { compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stddef.h' >/dev/null || compgen -G '/usr/lib/clang/*/include/stddef.h' >/dev/null; }
if ! have_libclang || ! have_clang_headers; then missing+=(libclang1 libclang-common-dev); fi
if [ ${#missing[@]} -gt 0 ]; then
    if can_apt; then
        say "installing with apt: ${missing[*]}"
        $sudo apt-get update -qq
        # Debian and Ubuntu version the clang packages: take the newest there is.
        pick() { apt-cache search --names-only "^$1-[0-9]+$2\$" | awk '{print $1}' | sort -V | tail -n 1; }
        want=()
        for name in "${missing[@]}"; do
            case $name in
                libclang1) want+=("$(pick libclang1 '')") ;;
                libclang-common-dev) want+=("$(pick libclang-common '-dev')") ;;
                *) want+=("$name") ;;
            esac
        done
        apt_install "${want[@]}"
    else
        fail "these system packages are missing and cannot be installed from here: ${missing[*]} (libclang1 and libclang-common-dev carry a version in Debian and Ubuntu, for example libclang1-14). Install them, then run this again."
    fi
fi

# 2. The Rust toolchain.
if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH="$HOME/.cargo/bin:$PATH"; fi
if ! command -v cargo >/dev/null && can_apt; then
    $sudo apt-get update -qq
    if apt-cache policy rustup | grep -q 'Candidate: [0-9]'; then
        say "installing Rust with apt and rustup"
        apt_install rustup ca-certificates
        rustup toolchain install stable --profile minimal --component clippy --component rustfmt
        rustup default stable
    fi
fi
command -v cargo >/dev/null || fail "no Rust toolchain. Install one of version 1.90 or later (https://rustup.rs, or on Debian 13 and Ubuntu 24.04: 'apt install rustup && rustup default stable'), then run this again."
have=$(rustc --version | awk '{print $2}')
[ "$(printf '%s\n1.90.0\n' "$have" | sort -V | head -n 1)" = 1.90.0 ] || fail "rustc $have is too old: 1.90 or later is needed ('rustup update stable')."

# 3. RocksDB, once per version, outside the clone.
if [ ! -s "$ROCKSDB_LIB_DIR/librocksdb.a" ]; then
    say "building RocksDB once into $ROCKSDB_LIB_DIR (3 to 8 minutes on 2 cores)"
    scripts/rocksdb.sh "$ROCKSDB_LIB_DIR/librocksdb.a"
fi
say "ready"
