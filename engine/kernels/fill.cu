// Random numbers for benchmarks.
//
// CPU: no counterpart (benchmarks draw their inputs on the device).
//
//   out  bf16 [n]: uniform in [-scale, scale), a function of seed and index alone
//
// Generator: the finaliser of SplitMix64 (Steele et al. 2014) over a counter.
// Launch: block (256), any grid.
#include "common.cuh"

__device__ __forceinline__ unsigned long long mix(unsigned long long z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

extern "C" __global__ void __launch_bounds__(256)
    fill_random_bf16(bf16* out, long long n, unsigned long long seed, float scale) {
    pdl_launch();
    pdl_wait();
    unsigned long long start = mix(seed);
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < n; i += gridDim.x * 256LL) {
        unsigned long long bits = mix(start + (i + 1) * 0x9e3779b97f4a7c15ull);
        // 24 bits: every value of [-1, 1) in steps of 2^-23.
        float unit = (float)(int)(bits >> 40) * (1.0f / 8388608.0f) - 1.0f;
        out[i] = f32_to_bf16(unit * scale);
    }
}
