// Adds what a linear layer computed to the residual stream and normalises the result.
//
// CPU: Cpu::rms_norm, after the residual addition of Linear::forward.
//
//   x         f32 [n][width], updated: x += sum of parts + bias
//   parts     f32 [p][n][width] or null
//   bias      f32 [width] or null
//   w         f32 [width] (not read when there is no output)
//   out_f32   f32 [n][width] or null: rmsnorm(x) * w
//   out_split bf16 [parts_out][n][width] or null: the same as hi, or hi and lo
//   rows      int [n] or null: row i is x[rows[i]] and x is not updated; parts and bias must then be null
//
// RMSNorm: Zhang & Sennrich 2019, eq. 4. Arrays aligned to 16 bytes where width is a multiple of 4.
// Launch: grid (n), block (a multiple of 32 up to 1024; width / 16 is meant for many rows, width / 4 for few).
#include "common.cuh"

template <int V>
__device__ __forceinline__ void add_norm_row(float* row, const float* parts, int p, const float* bias, const float* w,
                                             float eps, float* out_f32, bf16* out_split, int parts_out, bool update,
                                             long long all, int width) {
    __shared__ float scratch[WARP];
    long long at = (long long)blockIdx.x * width;
    float squares = 0.0f;
    for (int k = threadIdx.x * V; k < width; k += blockDim.x * V) {
        float v[V];
        load_vector(v, row + k);
        if (update) {
            if (parts != nullptr)
                for (int j = 0; j < p; j++) add_vector(v, parts + j * all + at + k);
            if (bias != nullptr) add_vector(v, bias + k);
            store_vector(row + k, v);
        }
#pragma unroll
        for (int i = 0; i < V; i++) squares = fmaf(v[i], v[i], squares);
    }
    if (out_f32 == nullptr && out_split == nullptr) return;
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    // Each thread reads back what it wrote itself.
    for (int k = threadIdx.x * V; k < width; k += blockDim.x * V) {
        float v[V], g[V];
        load_vector(v, row + k);
        load_vector(g, w + k);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = v[i] * scale * g[i];
        if (out_f32 != nullptr) store_vector(out_f32 + at + k, v);
        if (out_split != nullptr) store_split(out_split, at + k, all, parts_out, v);
    }
}

extern "C" __global__ void __launch_bounds__(1024)
    add_norm(float* x, const float* parts, int p, const float* bias, const float* w, float eps, float* out_f32,
             bf16* out_split, int parts_out, const int* rows, int n, int width) {
    pdl_launch();
    pdl_wait();
    bool update = rows == nullptr;
    float* row = x + (long long)(update ? blockIdx.x : rows[blockIdx.x]) * width;
    long long all = (long long)n * width;
    if (width % 4 == 0)
        add_norm_row<4>(row, parts, p, bias, w, eps, out_f32, out_split, parts_out, update, all, width);
    else
        add_norm_row<1>(row, parts, p, bias, w, eps, out_f32, out_split, parts_out, update, all, width);
}
