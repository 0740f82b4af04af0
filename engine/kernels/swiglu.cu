// The gated activation of the MLP.
//
// CPU: Cpu::swiglu.
//
//   gate_up   f32 [p][n][2 * width]: the parts are added; gate, then up
//   bias      f32 [2 * width] or null
//   out_f32   f32 [n][width] or null: silu(gate) * up
//   out_split bf16 [parts_out][n][width] or null: the same as hi, or hi and lo
//
// Shazeer, arXiv 2002.05202. Launch: block (256), grid (ceil(width / 1024), n).
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    swiglu(const float* gate_up, int p, const float* bias, float* out_f32, bf16* out_split, int parts_out, int n,
           int width) {
    pdl_launch();
    pdl_wait();
    long long i = blockIdx.y, all = (long long)n * width;
    for (int k = blockIdx.x * 256 + threadIdx.x; k < width; k += gridDim.x * 256) {
        float gate = 0.0f, up = 0.0f;
        for (int j = 0; j < p; j++) {
            const float* row = gate_up + (j * (long long)n + i) * 2 * width;
            gate += row[k];
            up += row[width + k];
        }
        if (bias != nullptr) {
            gate += bias[k];
            up += bias[width + k];
        }
        float v = gate / (1.0f + expf(-gate)) * up;
        if (out_f32 != nullptr) out_f32[i * width + k] = v;
        if (out_split != nullptr) store_split(out_split, i * width + k, all, parts_out, v);
    }
}
