// The gated activation of the MLP.
//
// CPU: Cpu::swiglu.
//
//   gate_up   f32, or for swiglu_bf16 bf16, [p][n][2 * width]: the parts are added; gate, then up
//   bias      f32 [2 * width] or null
//   out_f32   f32 [n][width] or null: silu(gate) * up
//   out_split bf16 [parts_out][n][width] or null: the same as hi, or hi and lo
//
// Shazeer, arXiv 2002.05202. Arrays aligned to 16 bytes where width is a multiple of 4.
// Launch: block (256), grid (ceil(width / 1024), min(n, 65535)).
#include "common.cuh"

// As the one for f32.
template <int V> __device__ __forceinline__ void add_vector(float (&v)[V], const bf16* p) {
    if constexpr (V == 4) {
        uint2 x = *(const uint2*)p;
        v[0] += low_f32(x.x), v[1] += high_f32(x.x), v[2] += low_f32(x.y), v[3] += high_f32(x.y);
    } else {
        v[0] += load_f32(p);
    }
}

template <int V, typename T>
__device__ __forceinline__ void swiglu_row(const T* gate_up, int p, const float* bias, float* out_f32,
                                           bf16* out_split, int parts_out, int n, int width) {
    long long all = (long long)n * width;
    for (long long i = blockIdx.y; i < n; i += gridDim.y) {
        for (int k = (blockIdx.x * 256 + threadIdx.x) * V; k < width; k += gridDim.x * 256 * V) {
            float gate[V] = {}, up[V] = {};
            for (int j = 0; j < p; j++) {
                const T* row = gate_up + (j * (long long)n + i) * 2 * width;
                add_vector(gate, row + k);
                add_vector(up, row + width + k);
            }
            if (bias != nullptr) {
                add_vector(gate, bias + k);
                add_vector(up, bias + width + k);
            }
#pragma unroll
            for (int j = 0; j < V; j++) gate[j] = gate[j] / (1.0f + expf(-gate[j])) * up[j];
            if (out_f32 != nullptr) store_vector(out_f32 + i * width + k, gate);
            if (out_split != nullptr) store_split(out_split, i * width + k, all, parts_out, gate);
        }
    }
}

#define SWIGLU(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        NAME(const T* gate_up, int p, const float* bias, float* out_f32, bf16* out_split, int parts_out, int n,        \
             int width) {                                                                                              \
        pdl_launch();                                                                                                  \
        pdl_wait();                                                                                                    \
        if (width % 4 == 0) swiglu_row<4>(gate_up, p, bias, out_f32, out_split, parts_out, n, width);                  \
        else swiglu_row<1>(gate_up, p, bias, out_f32, out_split, parts_out, n, width);                                 \
    }

SWIGLU(swiglu, float)
SWIGLU(swiglu_bf16, bf16)
