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
// RMSNorm: Zhang & Sennrich 2019, eq. 4. Launch: grid (n), block (a multiple of 32 up to 1024).
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(1024)
    add_norm(float* x, const float* parts, int p, const float* bias, const float* w, float eps, float* out_f32,
             bf16* out_split, int parts_out, const int* rows, int n, int width) {
    __shared__ float scratch[WARP];
    long long i = blockIdx.x, all = (long long)n * width;
    pdl_launch();
    pdl_wait();
    float* row = x + (rows != nullptr ? (long long)rows[i] : i) * width;
    float squares = 0.0f;
    for (int k = threadIdx.x; k < width; k += blockDim.x) {
        float v = row[k];
        if (rows == nullptr) {
            if (parts != nullptr)
                for (int j = 0; j < p; j++) v += parts[j * all + i * width + k];
            if (bias != nullptr) v += bias[k];
            row[k] = v;
        }
        squares = fmaf(v, v, squares);
    }
    if (out_f32 == nullptr && out_split == nullptr) return;
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    // Each thread reads back what it wrote itself.
    for (int k = threadIdx.x; k < width; k += blockDim.x) {
        float v = row[k] * scale * w[k];
        if (out_f32 != nullptr) out_f32[i * width + k] = v;
        if (out_split != nullptr) store_split(out_split, i * width + k, all, parts_out, v);
    }
}
