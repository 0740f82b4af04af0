// CPU: AttentionState::merge.
//
// Merges attention over disjoint sets of tokens: `AttentionState::merge` (engine/src/attention/state.rs) of `parts`
// states at once.
//
//   outs f32 [parts][rows][dim], lses f32 [parts][rows]: the states; dim a multiple of 4
//   out  f32 [rows][dim], lse f32 [rows]: their union; 0 and -inf where all are empty
//
// Launch: grid ceil(rows / 4), block of THREADS = 128, no dynamic shared memory. A warp merges one row.

#include "attention_common.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_merge(const float *outs, const float *lses, int parts, int rows, int dim, float *out, float *lse) {
    pdl_wait();
    pdl_launch();
    int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) {
        return;
    }
    float max = LOWEST, sum = 0.0f;
    for (int part = lane; part < parts; part += 32) {
        max = fmaxf(max, lses[(long long)part * rows + row]);
    }
    max = warp_max(max);
    for (int part = lane; part < parts; part += 32) {
        sum += exp2_approx((lses[(long long)part * rows + row] - max) * LOG2_E);
    }
    sum = warp_sum(sum);
    float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int d = lane * 4; d < dim; d += 128) {
        float4 all = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
        for (int part = 0; part < parts; ++part) {
            long long at = (long long)part * rows + row;
            float weight = exp2_approx((lses[at] - max) * LOG2_E) * scale;
            float4 x = *reinterpret_cast<const float4 *>(outs + at * dim + d);
            all.x += x.x * weight, all.y += x.y * weight, all.z += x.z * weight, all.w += x.w * weight;
        }
        *reinterpret_cast<float4 *>(out + (long long)row * dim + d) = all;
    }
    if (lane == 0) {
        lse[row] = sum > 0.0f ? max + log2f(sum) * LN_2 : minus_infinity();
    }
}
