// Shared pieces of the CUDA kernels. Includes no CUDA header: NVRTC may run where no toolkit is installed.
#pragma once

// The bits of a bfloat16.
typedef unsigned short bf16;

constexpr int WARP = 32;
// Tokens of a KV page.
constexpr int PAGE = 64;

#define INFINITY_F __int_as_float(0x7f800000)
#define NAN_F __int_as_float(0x7fffffff)

// --- bf16 ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ float bf16_to_f32(bf16 bits) { return __uint_as_float((unsigned)bits << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 f32_to_bf16(float x) {
    bf16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ float round_bf16(float x) { return bf16_to_f32(f32_to_bf16(x)); }

// The two numbers in 32 bits: the lower half first.
__device__ __forceinline__ float low_f32(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_f32(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// What KV and weights are stored as: `load` and `store` convert, `round` is both.
__device__ __forceinline__ float load_f32(const bf16* p) { return bf16_to_f32(*p); }
__device__ __forceinline__ float load_f32(const float* p) { return *p; }
__device__ __forceinline__ void store_f32(bf16* p, float x) { *p = f32_to_bf16(x); }
__device__ __forceinline__ void store_f32(float* p, float x) { *p = x; }
template <typename T> __device__ __forceinline__ float round_to(float x);
template <> __device__ __forceinline__ float round_to<bf16>(float x) { return round_bf16(x); }
template <> __device__ __forceinline__ float round_to<float>(float x) { return x; }

// --- vectors: V = 4 numbers in one access of an aligned array, or V = 1 ----------------------------------------

template <int V> __device__ __forceinline__ void load_vector(float (&v)[V], const float* p) {
    if constexpr (V == 4) {
        float4 x = *(const float4*)p;
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    } else {
        v[0] = *p;
    }
}

template <int V> __device__ __forceinline__ void add_vector(float (&v)[V], const float* p) {
    float x[V];
    load_vector(x, p);
#pragma unroll
    for (int i = 0; i < V; i++) v[i] += x[i];
}

template <int V> __device__ __forceinline__ void store_vector(float* p, const float (&v)[V]) {
    if constexpr (V == 4) *(float4*)p = make_float4(v[0], v[1], v[2], v[3]);
    else *p = v[0];
}

template <int V> __device__ __forceinline__ void store_vector_bf16(bf16* p, const float (&v)[V]) {
    if constexpr (V == 4) {
        *(ushort4*)p = make_ushort4(f32_to_bf16(v[0]), f32_to_bf16(v[1]), f32_to_bf16(v[2]), f32_to_bf16(v[3]));
    } else {
        *p = f32_to_bf16(v[0]);
    }
}

// Writes v at `at` as hi = bf16(v) and, with two parts, lo = bf16(v - hi) at `at + stride`.
template <int V>
__device__ __forceinline__ void store_split(bf16* out, long long at, long long stride, int parts, const float (&v)[V]) {
    store_vector_bf16(out + at, v);
    if (parts < 2) return;
    float low[V];
#pragma unroll
    for (int i = 0; i < V; i++) low[i] = v[i] - round_bf16(v[i]);
    store_vector_bf16(out + at + stride, low);
}

// --- reductions ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

// Sum over a block of up to 1024 threads, in all of them. `scratch`: 32 floats of shared memory.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < (blockDim.x + WARP - 1) / WARP ? scratch[lane] : 0.0f);
}

// --- asynchronous copies and the order of kernels -----------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// For data that is read once: the first to leave the L2.
__device__ __forceinline__ unsigned long long evict_first() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint4 load_shared_16(unsigned from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

// Starts a copy of 16 bytes from global to shared memory, past the L1.
__device__ __forceinline__ void copy_async_16(unsigned to, const void* from, unsigned long long policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `LEFT` of this thread's groups are unfinished.
template <int LEFT> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Programmatic dependent launch. Every kernel calls `pdl_wait` in all blocks, also in those without work: that is what
// makes "the previous kernel is finished" mean that all kernels before it are, too.
// Waits until the preceding kernel has finished and its writes are visible.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start as soon as all blocks have called this.
__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
