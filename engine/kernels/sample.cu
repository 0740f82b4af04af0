// Choice of the next token with its log-probability: the likeliest, or one drawn from the softmax.
//
// CPU: largest, log_sum_exp and Sampler::draw of sampler.rs.
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
//
// draw comes behind argmax_logprob and reads its token, logprob and bad; bad rows are left alone:
//
//   temperature f32 [n]: above 0
//   at          double [n]: below 1; below 0: nothing is drawn for the row
//   drawn       int [n], drawn_logprob f32 [n]: the first token, in the order of ids, up to which the weights
//               exp((logit - largest) / temperature) sum up to more than `at` of their total
//
// Launch: block (1024), grid (n).
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

__device__ __forceinline__ double warp_total(double x) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

// Each warp sums a run of ids; the one that `at` falls into goes over its run again.
extern "C" __global__ void __launch_bounds__(1024)
    draw(const float* logits, int p, int n, int vocab, const int* banned, int n_banned, const int* ban,
         const int* token, const float* logprob, const int* bad, const float* temperature, const double* at,
         int* drawn, float* drawn_logprob) {
    __shared__ double sums[32];
    pdl_launch();
    pdl_wait();
    long long row = blockIdx.x, all = (long long)n * vocab;
    if (at[row] < 0.0 || bad[row] != 0) return;
    if (ban != nullptr && ban[row] == 0) n_banned = 0;
    auto value = [&](int id) {
        float sum = 0.0f;
        for (int j = 0; j < p; j++) sum += logits[j * all + row * vocab + id];
        return sum;
    };
    float top = value(token[row]);
    double divisor = temperature[row];
    auto weight = [&](int id) { return allowed(id, banned, n_banned) ? exp((double)(value(id) - top) / divisor) : 0.0; };
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int run = (vocab + 31) / 32, begin = warp * run, end = min(vocab, begin + run);
    double sum = 0.0;
    for (int id = begin + lane; id < end; id += WARP) sum += weight(id);
    sum = warp_total(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    double total = 0.0, before = 0.0;
    for (int i = 0; i < 32; i++) {
        if (i == warp) before = total;
        total += sums[i];
    }
    double goal = at[row] * total;
    if (!(before <= goal && goal < before + sums[warp])) return;
    // Rounding may leave nothing beyond the goal: then the last one with a weight.
    int found = -1, last = -1;
    for (int base = begin; base < end && found < 0; base += WARP) {
        int id = base + lane;
        double mine = id < end ? weight(id) : 0.0, upto = mine;
#pragma unroll
        for (int i = 1; i < WARP; i *= 2) {
            double other = __shfl_up_sync(0xffffffffu, upto, i);
            if (lane >= i) upto += other;
        }
        unsigned beyond = __ballot_sync(0xffffffffu, mine > 0.0 && before + upto > goal);
        unsigned heavy = __ballot_sync(0xffffffffu, mine > 0.0);
        if (beyond != 0) found = base + __ffs(beyond) - 1;
        if (heavy != 0) last = base + 31 - __clz(heavy);
        before += __shfl_sync(0xffffffffu, upto, WARP - 1);
    }
    if (lane == 0) {
        int id = found >= 0 ? found : last;
        drawn[row] = id;
        drawn_logprob[row] = value(id) - (top - logprob[row]);
    }
}
