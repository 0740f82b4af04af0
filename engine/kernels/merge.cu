// Merges attention over other tokens into a state.
//
// CPU: merge_row of attention/state.rs.
//
//   out f32 [rows][dim], lse f32 [rows]: updated (rows: queries times heads)
//   other_out, other_lse: likewise, over a disjoint set of tokens
//
// FlashAttention-2 (arXiv 2307.08691), section 3.1. Launch: block (256), grid (ceil(rows / 8)); a warp a row.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    merge(float* out, float* lse, const float* other_out, const float* other_lse, int rows, int dim) {
    pdl_launch();
    pdl_wait();
    long long row = blockIdx.x * 8LL + threadIdx.x / WARP;
    if (row >= rows) return;
    int lane = threadIdx.x % WARP;
    float mine = lse[row], theirs = other_lse[row];
    if (theirs == -INFINITY_F) return;
    float peak = fmaxf(mine, theirs);
    float a = expf(mine - peak), b = expf(theirs - peak), sum = a + b;
    // An empty state has no part in the result, whatever its `out` holds.
    bool empty = mine == -INFINITY_F;
    for (int d = lane; d < dim; d += WARP) {
        float other = other_out[row * dim + d];
        out[row * dim + d] = empty ? other : (out[row * dim + d] * a + other * b) / sum;
    }
    __syncwarp();
    if (lane == 0) lse[row] = empty ? theirs : peak + logf(sum);
}
