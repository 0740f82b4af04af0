// Writes cached rows of KV from where they lie to the pages of one sequence in one layer, rotating the keys.
//
// CPU: Transformer::write_kv.
//
//   from         rows of [kv_heads][dim] of bf16 or f32, keys not rotated
//   cos, sin     f32 [positions][dim / 2]
//   pos          int [n], below 0: the row is left out
//   at, apart    int [n]: number of the row of `from` with the keys, and how far behind it the row with the values is. The rows of a
//                chunk are [layers][2 (K, V)][tokens], so that `apart` is the chunk's number of tokens.
//   layer        of `from`: counted from the layer that `at` points to
//   page_table   int []: the sequence's pages; first: position of slot 0 of the first
//   kv           [pages][2][kv_heads][64][dim] of the same format
//
// One warp a head; dim even, at most 256. Launch: block (256), grid (ceil(kv_heads / 8), min(n, 65535)).
#include "rotate.cuh"

__device__ __forceinline__ int warp_head() { return blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; }

template <typename T>
__device__ __forceinline__ void write_rows(const T* from, const float* cos, const float* sin, const int* pos,
                                           const int* at, const int* apart, int layer, const int* page_table,
                                           int first, T* kv, int n, int kv_heads, int dim) {
    pdl_launch();
    pdl_wait();
    int head = warp_head();
    if (head >= kv_heads) return;
    for (long long i = blockIdx.y; i < n; i += gridDim.y) {
        long long position = pos[i];
        if (position < 0) continue;
        long long row = at[i] + 2LL * layer * apart[i];
        Head key = {}, value = {};
        key.add(from + (row * kv_heads + head) * dim, dim);
        value.add(from + ((row + apart[i]) * kv_heads + head) * dim, dim);
        key.rotate(cos + position * (dim / 2), sin + position * (dim / 2), dim);
        key.store(kv + kv_offset(page_table, first, position, false, head, kv_heads, dim), dim);
        value.store(kv + kv_offset(page_table, first, position, true, head, kv_heads, dim), dim);
    }
}

#define KV_ROWS(SUFFIX, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        write_rows_##SUFFIX(const void* from, const float* cos, const float* sin, const int* pos, const int* at,       \
                            const int* apart, int layer, const int* page_table, int first, void* kv, int n,            \
                            int kv_heads, int dim) {                                                                   \
        write_rows((const T*)from, cos, sin, pos, at, apart, layer, page_table, first, (T*)kv, n, kv_heads, dim);      \
    }

KV_ROWS(bf16, bf16)
KV_ROWS(f32, float)
