#!/usr/bin/env bash
# Makes an archive that runs on a bare Debian 12, Ubuntu 22.04 or later, without a compiler: the stripped program, the reference
# model, the examples, the README and all licences. `quire-bench` is not in it: its commands need the source tree (records,
# Python peers, a C compiler), and whoever has that builds both.
# Usage: release.sh [FOLDER]    (default: dist below the cache folder; the archive and its SHA-256 come there)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=scripts/env.sh
. scripts/env.sh
export PATH="$PATH:$HOME/.cargo/bin"
out=$(mkdir -p "${1:-$QUIRE_CACHE/dist}" && cd "${1:-$QUIRE_CACHE/dist}" && pwd)
fail() { printf '[release] error: %s\n' "$*" >&2; exit 1; }

[ -s "$ROCKSDB_LIB_DIR/librocksdb.a" ] || fail "RocksDB is not built: run scripts/setup.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# 1. The program. The linker takes the first libstdc++ on its way: in this folder there is a static one only.
mkdir "$work/static"
libstdcxx=$(g++ -print-file-name=libstdc++.a)
[ -f "$libstdcxx" ] || fail "no static libstdc++ (it comes with g++)"
ln -s "$libstdcxx" "$work/static/libstdc++.a"
# libstdc++ of Debian 12 draws random numbers by arc4random, which the C library of Ubuntu 22.04 lacks.
cat > "$work/arc4random.c" <<'END'
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/random.h>

uint32_t arc4random(void) {
    uint32_t number;
    ssize_t got;
    do got = getrandom(&number, sizeof number, 0);
    while (got < 0 && errno == EINTR);
    if (got != sizeof number) abort();
    return number;
}
END
cc -O2 -c "$work/arc4random.c" -o "$work/arc4random.o"
cargo rustc --release --locked -p quire --bin quire -- -L "native=$work/static" -C "link-arg=$work/arc4random.o"
program=$CARGO_TARGET_DIR/release/quire

# 2. What it needs of a system: the C library, its loader, and libgcc_s, on which Debian's and Ubuntu's C library depends.
needed=$(objdump -p "$program" | awk '$1 == "NEEDED" { print $2 }')
for library in $needed; do
    case $library in
        libc.so.* | libm.so.* | libdl.so.* | librt.so.* | libpthread.so.* | libgcc_s.so.* | ld-linux*.so.*) ;;
        *) fail "the program needs $library, which a bare system lacks" ;;
    esac
done
glibc=$(objdump -T "$program" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)
[ "$(printf '%s\nGLIBC_2.35\n' "$glibc" | sort -V | tail -n 1)" = GLIBC_2.35 ] ||
    fail "the program needs $glibc, Ubuntu 22.04 has 2.35: build on Debian 12 or an earlier system"

# 3. The archive.
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
name=quire-$version-x86_64-linux
tree=$work/$name
mkdir -p "$tree/bin" "$tree/share/quire/models"
install -m 755 "$program" "$tree/bin/quire"
strip "$tree/bin/quire"
cp -r eval/models/reference "$tree/share/quire/models/"
cp -r examples "$tree/share/quire/examples"
cp README.md LICENSE CHANGELOG.md "$tree/"
python3 scripts/licences.py > "$tree/THIRD-PARTY.txt"
chmod -R u=rwX,go=rX "$tree"
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct)" -cf - "$name" |
    gzip -9n > "$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" > "$name.tar.gz.sha256")
printf '%s: %s bytes; the program needs %s and %s\n' "$out/$name.tar.gz" "$(stat -c %s "$out/$name.tar.gz")" "$glibc" "$(echo $needed)"
