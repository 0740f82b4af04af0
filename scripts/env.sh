# Source this: build output and the RocksDB that setup.sh built lie outside the clone.
quire_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export QUIRE_CACHE=${QUIRE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/quire}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$QUIRE_CACHE/target}
quire_rocksdb=$(awk '/^name = "librocksdb-sys"$/ { getline; gsub(/version = |"/, ""); print; exit }' "$quire_root/Cargo.lock")
export ROCKSDB_LIB_DIR=$QUIRE_CACHE/rocksdb/$quire_rocksdb
export ROCKSDB_STATIC=1
unset quire_root quire_rocksdb
