// An f32 matrix as the bf16 inputs of a matrix product.
//
// CPU: split_rows of backend/cpu/amx.rs.
//
//   x   f32 [n][width]
//   out bf16 [parts][n][width]: hi = bf16(x) and, with two parts, lo = bf16(x - hi)
//
// Arrays aligned to 16 bytes. Launch: block (256), grid (any; ceil(n * width / 1024) is meant).
#include "common.cuh"

template <int V> __device__ __forceinline__ void split_all(const float* x, bf16* out, int parts, long long all) {
    for (long long i = (blockIdx.x * 256LL + threadIdx.x) * V; i < all; i += gridDim.x * 256LL * V) {
        float v[V];
        load_vector(v, x + i);
        store_split(out, i, all, parts, v);
    }
}

extern "C" __global__ void __launch_bounds__(256) split(const float* x, bf16* out, int parts, int n, int width) {
    pdl_launch();
    pdl_wait();
    long long all = (long long)n * width;
    if (all % 4 == 0) split_all<4>(x, out, parts, all);
    else split_all<1>(x, out, parts, all);
}
