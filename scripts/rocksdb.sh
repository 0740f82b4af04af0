#!/usr/bin/env bash
# Compiles RocksDB, as the crate librocksdb-sys carries it, into the archive that is named. Several sources are compiled as one, as
# RocksDB's own `make unity.a` does: most of the time goes into headers, and that is half of it. Otherwise the flags are those of
# the crate's build script, on Linux for x86_64, with -O2 instead of -O3.
# Usage: rocksdb.sh ARCHIVE
set -euo pipefail
archive=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Sources that are compiled as one. More take more memory: ten take 1.2 GB.
together=10

where=$(cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu | python3 -c '
import json, os, sys
found = {p["name"]: os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"]}
print(found["librocksdb-sys"], found["lz4-sys"] + "/liblz4/lib", found["zstd-sys"] + "/zstd/lib")')
read -r crate lz4 zstd <<< "$where"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$crate/rocksdb"
# The crate has a build_version.cc of its own.
{ grep -v util/build_version.cc ../rocksdb_lib_sources.txt; echo ../build_version.cc; } | split -l "$together" - "$work/part."
for part in "$work"/part.??; do sed 's/.*/#include "&"/' "$part" > "$part.cc"; done
flags="-std=c++20 -O2 -fPIC -w -ffunction-sections -fdata-sections -include cstdint -DNDEBUG -DHAVE_ALIGNED_NEW -DHAVE_UINT128_EXTENSION
    -DLZ4=1 -DZSTD=1 -DOS_LINUX -DROCKSDB_PLATFORM_POSIX -DROCKSDB_LIB_IO_POSIX -DROCKSDB_SCHED_GETCPU_PRESENT
    -DROCKSDB_AUXV_GETAUXVAL_PRESENT -DROCKSDB_FALLOCATE_PRESENT -DROCKSDB_RANGESYNC_PRESENT
    -Iinclude -I. -Ithird-party/gtest-1.8.1/fused-src -I.. -I$lz4 -I$zstd"
# shellcheck disable=SC2086
printf '%s\n' "$work"/part.??.cc | xargs -P "$(nproc)" -I{} g++ $flags -c {} -o {}.o
ar crs "$work/librocksdb.a" "$work"/*.o
# Renamed into place, so that a killed build leaves nothing that looks finished.
mkdir -p "$(dirname "$archive")"
mv "$work/librocksdb.a" "$archive.part"
mv "$archive.part" "$archive"
