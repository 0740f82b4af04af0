// Rows of the embedding table.
//
// CPU: Transformer::embed.
//
//   tokens int [n]; below 0: a row of padding, zeros
//   table  bf16 or f32 [vocab][hidden]; embed_halves: bf16 high and low [vocab][hidden], whose sum the table is
//   x      f32 [n][hidden]
//
// Launch: block (256), grid (n).
#include "common.cuh"

template <typename T>
__device__ __forceinline__ void embed(const int* tokens, const T* table, float* x, int hidden) {
    pdl_launch();
    pdl_wait();
    long long i = blockIdx.x, token = tokens[i];
    for (int k = threadIdx.x; k < hidden; k += blockDim.x)
        x[i * hidden + k] = token < 0 ? 0.0f : load_f32(table + token * hidden + k);
}

extern "C" __global__ void __launch_bounds__(256)
    embed_bf16(const int* tokens, const void* table, float* x, int n, int hidden) {
    embed(tokens, (const bf16*)table, x, hidden);
}

extern "C" __global__ void __launch_bounds__(256)
    embed_f32(const int* tokens, const void* table, float* x, int n, int hidden) {
    embed(tokens, (const float*)table, x, hidden);
}

extern "C" __global__ void __launch_bounds__(256)
    embed_halves(const int* tokens, const void* high, const void* low, float* x, int n, int hidden) {
    pdl_launch();
    pdl_wait();
    long long i = blockIdx.x, token = tokens[i];
    for (int k = threadIdx.x; k < hidden; k += blockDim.x) {
        long long at = token * hidden + k;
        x[i * hidden + k] = token < 0 ? 0.0f : load_f32((const bf16*)high + at) + load_f32((const bf16*)low + at);
    }
}
