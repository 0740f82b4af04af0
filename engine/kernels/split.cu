// An f32 matrix as the bf16 inputs of a matrix product.
//
// CPU: split_rows of backend/cpu/amx.rs.
//
//   x   f32 [n][width]
//   out bf16 [parts][n][width]: hi = bf16(x) and, with two parts, lo = bf16(x - hi)
//
// Launch: block (256), grid (any; ceil(n * width / 1024) is meant).
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) split(const float* x, bf16* out, int parts, int n, int width) {
    pdl_launch();
    pdl_wait();
    long long all = (long long)n * width;
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < all; i += gridDim.x * 256LL)
        store_split(out, i, all, parts, x[i]);
}
