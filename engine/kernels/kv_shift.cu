// Correction of cached rows in the pages of one sequence: the mean change of the rows that were recomputed is added to those
// that stay. Keys are rotated back before they are added up, and the shift is rotated to each row's position.
//
// CPU: blend::correct, HostSides::sums, Shift::of and HostSides::apply.
//
//   cos, sin   f32 [positions][dim / 2]
//   page_table int []: the sequence's pages; first: position of slot 0 of the first
//   kv         [pages][2 (K, V)][kv_heads][64][dim] of bf16 or f32; dim even, at most 256
//   sums, shift  f32 [groups][2 (K, V)][kv_heads][dim]
//
// kv_sums: sums of the rows at `pos` by group, of which group g has rows ends[g - 1] .. ends[g] - 1.
//   Launch: block (256), grid (groups, 2 * kv_heads).
// kv_shifts: the shift of each group from its sums before and after, where m rows of all groups have changed by the mean d and
//   the group's own n rows by the sum s: (s + prior d) / (n + prior); with by_chunk 0, d. To `deviation`, f32
//   [2 * kv_heads][2], go |d|^2 and |mean after|^2 of each head. `shift` may be `before`.
//   Launch: block (256), grid (2 * kv_heads).
// kv_shift: adds the shifts of their groups to the n rows at `pos`.
//   Launch: block (256), grid (ceil(kv_heads / 8), min(n, 65535)).
#include "rotate.cuh"

constexpr int WARPS = 8;
constexpr int MAX_DIM = 256;

// The row at `position`: side 0 its key as it was before rotation, side 1 its value.
template <typename T>
__device__ __forceinline__ void add_row(Head& sum, const float* cos, const float* sin, const int* page_table,
                                        int first, const T* kv, int position, int side, int head, int kv_heads,
                                        int dim) {
    Head row = {};
    row.add(kv + kv_offset(page_table, first, position, side == 1, head, kv_heads, dim), dim);
    if (side == 0) row.rotate_back(cos + (long long)position * (dim / 2), sin + (long long)position * (dim / 2), dim);
#pragma unroll
    for (int j = 0; j < HEAD_PAIRS; j++) sum.a[j] += row.a[j], sum.b[j] += row.b[j];
}

template <typename T>
__device__ __forceinline__ void kv_sums(const float* cos, const float* sin, const int* pos, const int* ends,
                                        const int* page_table, int first, const T* kv, int kv_heads, int dim,
                                        float* sums) {
    __shared__ float parts[WARPS][MAX_DIM];
    pdl_launch();
    pdl_wait();
    int group = blockIdx.x, side = blockIdx.y / kv_heads, head = blockIdx.y % kv_heads, warp = threadIdx.x / WARP;
    Head sum = {};
    int begin = group == 0 ? 0 : ends[group - 1];
    for (int i = begin + warp; i < ends[group]; i += WARPS) {
        add_row(sum, cos, sin, page_table, first, kv, pos[i], side, head, kv_heads, dim);
    }
    sum.store(parts[warp], dim);
    __syncthreads();
    if (threadIdx.x >= dim) return;
    float x = 0.0f;
    for (int w = 0; w < WARPS; w++) x += parts[w][threadIdx.x];
    sums[((long long)group * 2 * kv_heads + blockIdx.y) * dim + threadIdx.x] = x;
}

extern "C" __global__ void __launch_bounds__(256)
    kv_shifts(const float* before, const float* after, const int* ends, int groups, int by_chunk, float prior,
              int kv_heads, int dim, float* shift, float* deviation) {
    __shared__ float scratch[WARP];
    pdl_launch();
    pdl_wait();
    long long stride = 2LL * kv_heads * dim, at = (long long)blockIdx.x * dim + threadIdx.x;
    bool here = threadIdx.x < dim;
    float change = 0.0f, now = 0.0f;
    for (int g = 0; g < groups && here; g++) change += after[g * stride + at] - before[g * stride + at], now += after[g * stride + at];
    float count = ends[groups - 1], mean = change / count;
    now /= count;
    for (int g = 0; g < groups && here; g++) {
        float own = by_chunk ? ends[g] - (g == 0 ? 0 : ends[g - 1]) : 0.0f;
        float sum = own > 0.0f ? after[g * stride + at] - before[g * stride + at] : 0.0f;
        shift[g * stride + at] = (sum + prior * mean) / (own + prior);
    }
    float changed = block_sum(mean * mean, scratch), size = block_sum(now * now, scratch);
    if (threadIdx.x == 0) deviation[2 * blockIdx.x] = changed, deviation[2 * blockIdx.x + 1] = size;
}

template <typename T>
__device__ __forceinline__ void kv_shift(const float* cos, const float* sin, const int* pos, const int* group_of,
                                         const int* page_table, int first, T* kv, int n, int kv_heads, int dim,
                                         const float* shift) {
    pdl_launch();
    pdl_wait();
    int head = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (head >= kv_heads) return;
    for (long long i = blockIdx.y; i < n; i += gridDim.y) {
        long long position = pos[i];
        const float* added = shift + ((long long)group_of[i] * 2 * kv_heads + head) * dim;
        T* key = kv + kv_offset(page_table, first, position, false, head, kv_heads, dim);
        T* value = kv + kv_offset(page_table, first, position, true, head, kv_heads, dim);
        Head x = {};
        x.add(added, dim);
        x.rotate(cos + position * (dim / 2), sin + position * (dim / 2), dim);
        x.add(key, dim);
        x.store(key, dim);
        Head y = {};
        y.add(added + (long long)kv_heads * dim, dim);
        y.add(value, dim);
        y.store(value, dim);
    }
}

#define KV_SHIFT(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        kv_sums_##SUFFIX(const float* cos, const float* sin, const int* pos, const int* ends, const int* page_table,   \
                         int first, const void* kv, int kv_heads, int dim, float* sums) {                              \
        kv_sums(cos, sin, pos, ends, page_table, first, (const T*)kv, kv_heads, dim, sums);                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        kv_shift_##SUFFIX(const float* cos, const float* sin, const int* pos, const int* group_of,                     \
                          const int* page_table, int first, void* kv, int n, int kv_heads, int dim,                    \
                          const float* shift) {                                                                        \
        kv_shift(cos, sin, pos, group_of, page_table, first, (T*)kv, n, kv_heads, dim, shift);                         \
    }

KV_SHIFT(bf16, bf16)
KV_SHIFT(f32, float)
