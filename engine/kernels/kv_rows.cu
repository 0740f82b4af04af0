// Moves rows of KV between plain arrays and the pages of one sequence in one layer.
//
// CPU: Transformer::write_kv (write_rows), Page::read (read_rows), Page::clone (copy_page).
//
//   keys, values f32 [n][kv_heads][dim]: write_rows takes keys not rotated, read_rows gives them as stored, rotated
//   cos, sin     f32 [positions][dim / 2]
//   pos          int [n], below 0: the row is left out
//   page_table   int []: the sequence's pages; first: position of slot 0 of the first
//   kv           [pages][2][kv_heads][64][dim] of bf16 or f32
//   from         position of the first row to read
//   src, dst     int [count]: pages to copy from and to; page_bytes: 2 * kv_heads * 64 * dim * size, a multiple of 16
//
// One warp a head; dim even, at most 256. Launch: block (256), grid (ceil(kv_heads / 8), min(n, 65535));
// copy_page: block (256), grid (ceil(page_bytes / 16384), count).
#include "rotate.cuh"

__device__ __forceinline__ int warp_head() { return blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; }

template <typename T>
__device__ __forceinline__ void write_rows(const float* keys, const float* values, const float* cos, const float* sin,
                                           const int* pos, const int* page_table, int first, T* kv, int n,
                                           int kv_heads, int dim) {
    pdl_launch();
    pdl_wait();
    int head = warp_head();
    if (head >= kv_heads) return;
    for (long long i = blockIdx.y; i < n; i += gridDim.y) {
        long long position = pos[i];
        if (position < 0) continue;
        Head key = {}, value = {};
        key.add(keys + (i * kv_heads + head) * dim, dim);
        value.add(values + (i * kv_heads + head) * dim, dim);
        key.rotate(cos + position * (dim / 2), sin + position * (dim / 2), dim);
        key.store(kv + kv_offset(page_table, first, position, false, head, kv_heads, dim), dim);
        value.store(kv + kv_offset(page_table, first, position, true, head, kv_heads, dim), dim);
    }
}

template <typename T>
__device__ __forceinline__ void read_rows(const T* kv, const int* page_table, int first, int from, int n, int kv_heads,
                                          int dim, float* keys, float* values) {
    pdl_launch();
    pdl_wait();
    int head = warp_head();
    if (head >= kv_heads) return;
    for (long long i = blockIdx.y; i < n; i += gridDim.y) {
        Head key = {}, value = {};
        key.add(kv + kv_offset(page_table, first, from + i, false, head, kv_heads, dim), dim);
        value.add(kv + kv_offset(page_table, first, from + i, true, head, kv_heads, dim), dim);
        key.store(keys + (i * kv_heads + head) * dim, dim);
        value.store(values + (i * kv_heads + head) * dim, dim);
    }
}

#define KV_ROWS(SUFFIX, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        write_rows_##SUFFIX(const float* keys, const float* values, const float* cos, const float* sin,                \
                            const int* pos, const int* page_table, int first, void* kv, int n, int kv_heads,           \
                            int dim) {                                                                                 \
        write_rows(keys, values, cos, sin, pos, page_table, first, (T*)kv, n, kv_heads, dim);                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        read_rows_##SUFFIX(const void* kv, const int* page_table, int first, int from, int n, int kv_heads, int dim,   \
                           float* keys, float* values) {                                                               \
        read_rows((const T*)kv, page_table, first, from, n, kv_heads, dim, keys, values);                              \
    }

KV_ROWS(bf16, bf16)
KV_ROWS(f32, float)

extern "C" __global__ void __launch_bounds__(256)
    copy_page(void* kv, const int* src, const int* dst, int count, long long page_bytes) {
    pdl_launch();
    pdl_wait();
    const uint4* from = (const uint4*)((const char*)kv + src[blockIdx.y] * page_bytes);
    uint4* to = (uint4*)((char*)kv + dst[blockIdx.y] * page_bytes);
    long long vectors = page_bytes / 16;
    for (long long i = blockIdx.x * 256 + threadIdx.x; i < vectors; i += (long long)gridDim.x * 256) to[i] = from[i];
}
