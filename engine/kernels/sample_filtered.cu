// Choice of the next token where logits are adjusted before, or where only some tokens may be drawn.
//
// CPU: Sampler::sample of sampler.rs, whose order of operations it keeps.
//
// It comes behind argmax_logprob (sample.cu) and reads its token, logprob and bad.
//
//   logits  f32 [p][n][vocab]: the parts are added, and the rows that are chosen here adjusted in place
//   banned  int [n_banned] or null, ban int [n] or null: as for argmax_logprob
//   token   int [n], logprob f32 [n]: the likeliest token; bad int [n]: the row is left alone
//   wishes  Wish [gridDim.x]: the rows, and what is wanted of each
//   entries Entry []: tokens whose logits are adjusted, each once a row; what they were replaces `bias`
//   drawn   int [n], drawn_logprob f32 [n]: the choice, and its log-probability before anything was adjusted
//
// A token weighs exp((logit - largest) / temperature) in units of 2^-44, as an integer: sums do not depend on their order,
// so that equal logits give equal choices. What weighs less than half a unit is never drawn; a vocabulary of 2^19 cannot
// overflow.
//
// The tokens that are kept are always the heaviest, the lowest ids among equals: all above some logit, and the first few of
// those at it. So top_k, top_p and the draw itself are one search for a logit, three bits in each pass over the row.
//
// Launch: block (512), grid (rows that are chosen here).
#include "common.cuh"

typedef unsigned long long u64;

constexpr int THREADS = 512;
constexpr int BLOCK_WARPS = THREADS / WARP;
// The largest weight.
constexpr float ONE = 17592186044416.0f;

struct Wish {
    double at; // random, below 1
    int row;
    int begin, end; // entries
    float repetition, frequency, presence;
    float temperature; // 0: the largest logit
    float top_p, min_p;
    int top_k;   // below the size of the vocabulary; 0: all
    int ordered; // whether `at` runs over tokens from the heaviest on, or over ids
};

struct Entry {
    int id;
    float bias;
    int count; // in the answer; below 0: neither there nor in the prompt
};

// Tokens above `key`, and the first `ties` of those at it.
struct Kept {
    unsigned key;
    u64 ties;
};

// A key, and what the tokens above it count for.
struct Found {
    unsigned key;
    u64 above;
};

// Larger logits have larger keys.
__device__ __forceinline__ unsigned key_of(float x) {
    unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

template <int N> __device__ __forceinline__ void block_totals(u64 (&x)[N]) {
    __shared__ u64 sums[N][BLOCK_WARPS];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
        for (int d = WARP / 2; d > 0; d /= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], d);
    }
    __syncthreads();
    if (lane == 0)
        for (int i = 0; i < N; i++) sums[i][warp] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = 0;
        for (int w = 0; w < BLOCK_WARPS; w++) x[i] += sums[i][w];
    }
}

struct Row {
    const float* values;
    int vocab;
    float top, temperature;

    // Weights below `least` of the largest count for nothing.
    __device__ __forceinline__ u64 weight(float value, float least) const {
        float weight = expf((value - top) / temperature);
        return weight >= least ? __float2ull_rn(weight * ONE) : 0;
    }

    template <bool COUNT> __device__ __forceinline__ u64 size(float value, float least) const {
        if constexpr (COUNT) return 1;
        else return weight(value, least);
    }

    // What the kept tokens weigh.
    __device__ u64 total(Kept kept, float least) const {
        u64 sum[1] = {0};
        for (int id = threadIdx.x; id < vocab; id += THREADS)
            if (key_of(values[id]) > kept.key) sum[0] += weight(values[id], least);
        block_totals(sum);
        return kept.ties > 0 ? sum[0] + kept.ties * weight(value_of(kept.key), least) : sum[0];
    }

    // The largest key such that the kept tokens from it on count for `goal`, which all of them do.
    template <bool COUNT> __device__ Found search(Kept kept, u64 goal, float least) const {
        Found found = {0, 0};
        for (int shift = 30; shift >= 0; shift -= 3) {
            // What the tokens from the key base + (j + 1) << shift on count for.
            u64 from[7] = {0, 0, 0, 0, 0, 0, 0};
            unsigned base = found.key;
#pragma unroll 4
            for (int id = threadIdx.x; id < vocab; id += THREADS) {
                unsigned key = key_of(values[id]);
                if (key <= kept.key || key < base || (key - base) >> shift == 0) continue;
                unsigned digit = (key - base) >> shift;
                u64 size = this->size<COUNT>(values[id], least);
#pragma unroll
                for (int j = 0; j < 7; j++) from[j] += digit > j ? size : 0;
            }
            block_totals(from);
            u64 ties = kept.ties > 0 ? kept.ties * size<COUNT>(value_of(kept.key), least) : 0;
            int digits = shift == 30 ? 3 : 7;
            bool going = true;
#pragma unroll
            for (int j = 0; j < 7; j++) {
                unsigned key = base + ((unsigned)(j + 1) << shift);
                u64 sum = from[j] + (kept.key >= key ? ties : 0);
                if (going && j < digits) {
                    going = sum >= goal;
                    if (going) found.key = key;
                    else found.above = sum;
                }
            }
        }
        return found;
    }

    // The kept tokens from the heaviest on, until they weigh `goal`.
    __device__ Kept heaviest(Kept kept, u64 goal, float least) const {
        Found found = search<false>(kept, goal, least);
        u64 each = weight(value_of(found.key), least);
        return {found.key, each > 0 ? (goal - found.above + each - 1) / each : 1};
    }

    // The first id up to which sizes sum up to `goal`; -1 if they do not.
    template <typename F> __device__ int pick(u64 goal, F size) const {
        __shared__ u64 sums[BLOCK_WARPS];
        __shared__ int found;
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        int run = (vocab + BLOCK_WARPS - 1) / BLOCK_WARPS, begin = warp * run, end = min(vocab, begin + run);
        u64 sum = 0, before = 0;
        for (int id = begin + lane; id < end; id += WARP) sum += size(values[id]);
#pragma unroll
        for (int d = WARP / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (lane == 0) sums[warp] = sum;
        if (threadIdx.x == 0) found = -1;
        __syncthreads();
        for (int w = 0; w < warp; w++) before += sums[w];
        if (before < goal && before + sum >= goal) {
            for (int base = begin; base < end; base += WARP) {
                int id = base + lane;
                u64 upto = id < end ? size(values[id]) : 0;
#pragma unroll
                for (int d = 1; d < WARP; d *= 2) {
                    u64 below = __shfl_up_sync(0xffffffffu, upto, d);
                    if (lane >= d) upto += below;
                }
                unsigned reached = __ballot_sync(0xffffffffu, before + upto >= goal);
                if (reached != 0) {
                    if (lane == 0) found = base + __ffs(reached) - 1;
                    break;
                }
                before += __shfl_sync(0xffffffffu, upto, WARP - 1);
            }
        }
        __syncthreads();
        return found;
    }
};

__device__ __forceinline__ bool is_banned(int id, const int* banned, int n_banned) {
    for (int i = 0; i < n_banned; i++)
        if (banned[i] == id) return true;
    return false;
}

// The largest value and, among equals, its lowest id.
__device__ int largest(const float* values, int vocab, float* top) {
    __shared__ u64 bests[BLOCK_WARPS];
    u64 best = 0;
    for (int id = threadIdx.x; id < vocab; id += THREADS) {
        u64 one = (u64)key_of(values[id]) << 32 | (0xffffffffu - (unsigned)id);
        best = one > best ? one : best;
    }
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) {
        u64 other = __shfl_xor_sync(0xffffffffu, best, d);
        best = other > best ? other : best;
    }
    if (threadIdx.x % WARP == 0) bests[threadIdx.x / WARP] = best;
    __syncthreads();
    for (int w = 0; w < BLOCK_WARPS; w++) best = bests[w] > best ? bests[w] : best;
    *top = value_of((unsigned)(best >> 32));
    return (int)(0xffffffffu - (unsigned)best);
}

// A token of the row, as wished.
__device__ int choose(const float* values, int vocab, const Wish& wish) {
    Row row = {values, vocab, 0.0f, wish.temperature};
    int id = largest(values, vocab, &row.top);
    if (wish.temperature == 0.0f || row.top == -INFINITY_F) return id;
    Kept kept = {0, 0};
    if (wish.top_k > 0) {
        Found found = row.search<true>(kept, wish.top_k, 0.0f);
        kept = {found.key, wish.top_k - found.above};
    }
    if (wish.top_p < 1.0f) {
        u64 all = row.total(kept, 0.0f);
        u64 goal = (u64)ceil((double)all * (double)wish.top_p);
        kept = row.heaviest(kept, min(max(goal, 1ull), all), 0.0f);
    }
    u64 all = row.total(kept, wish.min_p), goal = min((u64)((double)all * wish.at) + 1, all);
    if (wish.ordered == 0) return row.pick(goal, [&](float value) { return row.weight(value, wish.min_p); });
    Kept last = row.heaviest(kept, goal, wish.min_p);
    return row.pick(last.ties, [&](float value) -> u64 { return key_of(value) == last.key ? 1 : 0; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample_filtered(float* logits, int p, int n, int vocab, const int* banned, int n_banned, const int* ban,
                    const int* token, const float* logprob, const int* bad, const Wish* wishes, Entry* entries,
                    int* drawn, float* drawn_logprob) {
    __shared__ float raw;
    pdl_launch();
    pdl_wait();
    const Wish wish = wishes[blockIdx.x];
    long long row = wish.row, all = (long long)n * vocab;
    if (bad[row] != 0) return;
    if (ban != nullptr && ban[row] == 0) n_banned = 0;
    float* values = logits + row * vocab;
    auto sum = [&](int id) {
        float sum = 0.0f;
        for (int j = 0; j < p; j++) sum += values[j * all + id];
        return sum;
    };
    float log_sum = sum(token[row]) - logprob[row];
    __syncthreads();
    for (int id = threadIdx.x; id < vocab; id += THREADS)
        values[id] = is_banned(id, banned, n_banned) ? -INFINITY_F : sum(id);
    __syncthreads();
    for (int i = wish.begin + threadIdx.x; i < wish.end; i += THREADS) {
        Entry entry = entries[i];
        float before = values[entry.id], after = before + entry.bias;
        if (entry.count >= 0) after = after > 0.0f ? after / wish.repetition : after * wish.repetition;
        if (entry.count > 0) after -= __fadd_rn(__fmul_rn(wish.frequency, (float)entry.count), wish.presence);
        values[entry.id] = after;
        entries[i].bias = before;
    }
    __syncthreads();
    int id = max(choose(values, vocab, wish), 0);
    if (threadIdx.x == 0) raw = values[id];
    __syncthreads();
    for (int i = wish.begin + threadIdx.x; i < wish.end; i += THREADS)
        if (entries[i].id == id) raw = entries[i].bias;
    __syncthreads();
    if (threadIdx.x == 0) drawn[row] = id, drawn_logprob[row] = raw - log_sum;
}
