// One head in the registers of a warp, and where it lies in a KV page.
#pragma once
#include "common.cuh"

// Largest head dimension: each lane holds up to four pairs.
constexpr int HEAD_PAIRS = 4;

// Offset in elements of (position, head) in the pages: `value` selects V.
__device__ __forceinline__ long long kv_offset(const int* table, int first, int position, bool value, int head,
                                               int kv_heads, int dim) {
    int at = position - first;
    long long page = table[at / PAGE];
    return (((page * 2 + value) * kv_heads + head) * PAGE + at % PAGE) * dim;
}

// Lane l holds the pairs l, l + 32, ... : elements i and i + dim / 2. What lies beyond the head is zero.
struct Head {
    float a[HEAD_PAIRS], b[HEAD_PAIRS];

    template <typename F> __device__ __forceinline__ void each(int dim, F f) {
#pragma unroll
        for (int j = 0; j < HEAD_PAIRS; j++) {
            int i = threadIdx.x % WARP + j * WARP;
            if (i < dim / 2) f(i, i + dim / 2, a[j], b[j]);
        }
    }

    template <typename T> __device__ __forceinline__ void add(const T* from, int dim) {
        each(dim, [&](int i, int j, float& x, float& y) { x += load_f32(from + i), y += load_f32(from + j); });
    }

    template <typename T> __device__ __forceinline__ void store(T* to, int dim) {
        each(dim, [&](int i, int j, float& x, float& y) { store_f32(to + i, x), store_f32(to + j, y); });
    }

    template <typename T> __device__ __forceinline__ void round() {
#pragma unroll
        for (int j = 0; j < HEAD_PAIRS; j++) a[j] = round_to<T>(a[j]), b[j] = round_to<T>(b[j]);
    }

    // RMSNorm over the head.
    __device__ __forceinline__ void norm(const float* weight, float eps, int dim) {
        float squares = 0.0f;
        each(dim, [&](int, int, float& x, float& y) { squares = fmaf(x, x, fmaf(y, y, squares)); });
        float scale = 1.0f / sqrtf(warp_sum(squares) / dim + eps);
        each(dim, [&](int i, int j, float& x, float& y) { x = x * scale * weight[i], y = y * scale * weight[j]; });
    }

    // Products are rounded before they are added, as on the CPU: keys are then equal to the bit.
    __device__ __forceinline__ void rotate(const float* cos, const float* sin, int dim) {
        each(dim, [&](int i, int, float& x, float& y) {
            float c = cos[i], s = sin[i], x0 = x, y0 = y;
            x = __fsub_rn(__fmul_rn(x0, c), __fmul_rn(y0, s));
            y = __fadd_rn(__fmul_rn(y0, c), __fmul_rn(x0, s));
        });
    }

    // Undoes `rotate`.
    __device__ __forceinline__ void rotate_back(const float* cos, const float* sin, int dim) {
        each(dim, [&](int i, int, float& x, float& y) {
            float c = cos[i], s = sin[i], x0 = x, y0 = y;
            x = __fadd_rn(__fmul_rn(x0, c), __fmul_rn(y0, s));
            y = __fsub_rn(__fmul_rn(y0, c), __fmul_rn(x0, s));
        });
    }
};
