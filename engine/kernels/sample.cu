// The likeliest next token with its log-probability.
//
// CPU: largest and log_sum_exp of sampler.rs.
//
//   logits  f32 [p][n][vocab]: the parts are added
//   banned  int [n_banned] or null: ids that are not chosen (they count in the softmax); at most 64 are meant
//   ban     int [n] or null: the rows that `banned` holds for; null: all
//   token   int [n]: id of the largest logit, the lowest among equals
//   logprob f32 [n]: its natural log-probability under the softmax of all logits
//   bad     int [n]: 1 if a logit is NaN or plus infinity, or all that may be chosen are minus infinity
//   scratch float4 [n][gridDim.x]
//   counter unsigned [n]: zero before the first launch; left at zero
//
// Every block reduces a part of a row; the last one of the row to finish combines them in a fixed order.
// Launch: block (256), grid (blocks a row, n); 128 blocks a row are meant for a large vocabulary and one row.
#include "common.cuh"

// A part of a row: the best allowed logit and its id, and the sum of exp(logit - peak). A NaN sum marks a bad part.
struct Part {
    float best;
    int id;
    float peak, sum;

    __device__ __forceinline__ void choose(float value, int other) {
        if (other >= 0 && (id < 0 || value > best || (value == best && other < id))) best = value, id = other;
    }

    __device__ __forceinline__ void add(const Part& other) {
        choose(other.best, other.id);
        float top = fmaxf(peak, other.peak);
        if (top == -INFINITY_F) { // Nothing, or NaN from either.
            sum += other.sum;
            return;
        }
        sum = sum * expf(peak - top) + other.sum * expf(other.peak - top);
        peak = top;
    }
};

__device__ __forceinline__ Part shuffle(const Part& x, int mask) {
    return {__shfl_xor_sync(0xffffffffu, x.best, mask), __shfl_xor_sync(0xffffffffu, x.id, mask),
            __shfl_xor_sync(0xffffffffu, x.peak, mask), __shfl_xor_sync(0xffffffffu, x.sum, mask)};
}

// Combines the parts of all threads; thread 0 has the result.
__device__ __forceinline__ Part block_part(Part x) {
    __shared__ Part warps[8];
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) x.add(shuffle(x, i));
    __syncthreads();
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < 8; i++) x.add(warps[i]);
    return x;
}

__device__ __forceinline__ bool allowed(int id, const int* banned, int n_banned) {
    for (int i = 0; i < n_banned; i++)
        if (banned[i] == id) return false;
    return true;
}

extern "C" __global__ void __launch_bounds__(256)
    argmax_logprob(const float* logits, int p, int n, int vocab, const int* banned, int n_banned, const int* ban,
                   int* token, float* logprob, int* bad, float4* scratch, unsigned* counter) {
    __shared__ bool last;
    pdl_launch();
    pdl_wait();
    long long row = blockIdx.y, all = (long long)n * vocab;
    if (ban != nullptr && ban[row] == 0) n_banned = 0;
    const Part none = {-INFINITY_F, -1, -INFINITY_F, 0.0f};
    Part mine = none;
    for (int id = blockIdx.x * 256 + threadIdx.x; id < vocab; id += gridDim.x * 256) {
        float value = 0.0f;
        for (int j = 0; j < p; j++) value += logits[j * all + row * vocab + id];
        bool broken = !(value < INFINITY_F);
        float weight = broken ? NAN_F : value == -INFINITY_F ? 0.0f : 1.0f;
        Part one = {value, allowed(id, banned, n_banned) ? id : -1, broken ? -INFINITY_F : value, weight};
        mine.add(one);
    }
    mine = block_part(mine);
    if (threadIdx.x == 0) {
        scratch[row * gridDim.x + blockIdx.x] = make_float4(mine.best, __int_as_float(mine.id), mine.peak, mine.sum);
        __threadfence();
        last = atomicAdd(counter + row, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    mine = none;
    for (int i = threadIdx.x; i < gridDim.x; i += 256) {
        float4 v = __ldcg(scratch + row * gridDim.x + i);
        mine.add({v.x, __float_as_int(v.y), v.z, v.w});
    }
    mine = block_part(mine);
    if (threadIdx.x == 0) {
        bool broken = !(mine.sum > 0.0f) || mine.best == -INFINITY_F;
        token[row] = max(mine.id, 0);
        logprob[row] = broken ? NAN_F : mine.best - mine.peak - logf(mine.sum);
        bad[row] = broken;
        counter[row] = 0;
    }
}
