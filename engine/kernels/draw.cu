// Choice of the next token where it is drawn, or where logits are adjusted before.
//
// CPU: Sampler::sample of sampler.rs, whose order of operations it keeps.
//
// It comes behind argmax_logprob (sample.cu) and reads its token, logprob and bad.
//
//   logits  f32 [p][n][vocab]: the parts are added, and the rows that are chosen here adjusted in place
//   banned  int [n_banned] or null, ban int [n] or null: as for argmax_logprob
//   token   int [n], logprob f32 [n]: the likeliest token; bad int [n]: the row is left alone
//   wishes  Wish [rows that are chosen here]: the rows, and what is wanted of each
//   entries Entry []: tokens whose logits are adjusted, each once a row; what they were replaces `bias`
//   drawn   int [n], drawn_logprob f32 [n]: the choice, and its log-probability before anything was adjusted;
//           token -1: adjusted, all logits are minus infinity
//
// A token weighs exp((logit - largest) / temperature) in units of 2^-44, as an integer: sums do not depend on their order,
// so that equal logits give equal choices. What weighs less than half a unit is never drawn; a vocabulary of 2^19 cannot
// overflow. Weights are computed in f32: what is lighter than min_p by less than its rounding, 6e-8 of the largest, is kept.
//
// The tokens that are kept are always the heaviest, the lowest ids among equals: all above some logit, and the first few of
// those at it. So top_k, top_p and the draw itself are one search for a logit: eight parts in each pass over the row, first
// ever smaller towards the largest logit, then alike. Only what lies in the part that is being divided is weighed again.
//
// draw_cluster: a cluster of 8 blocks shares a row, each with a run of ids (Hopper and later).
// draw: one block a row, on every card.
// Launch: block (512), grid (rows that are chosen here, times 8 for clusters).
#include "common.cuh"

typedef unsigned long long u64;

constexpr int THREADS = 512;
constexpr int BLOCK_WARPS = THREADS / WARP;
constexpr unsigned ALL_LANES = 0xffffffffu;
// Parts in a pass; a lane looks at part `lane % PARTS`. At most as many blocks share a row.
constexpr int PARTS = 8;
// The largest weight.
constexpr float ONE = 17592186044416.0f;
// exp(-32) is less than half a unit. To count tokens it is a first guess.
constexpr float FARTHEST = 32.0f;
constexpr float LARGEST = 3.402823466e38f;

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

// Larger logits have larger keys.
__device__ __forceinline__ unsigned key_of(float x) {
    unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Sum {
    __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a + b; }
};
struct Larger {
    __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};

template <typename Op> __device__ __forceinline__ u64 reduce_warp(u64 x, Op op) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, d));
    return x;
}

// --- the blocks that share a row --------------------------------------------------------------------------------

template <int SPLIT> __device__ __forceinline__ int block_rank() {
    unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
    if constexpr (SPLIT > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}

template <int SPLIT> __device__ __forceinline__ void sync_blocks() {
#if __CUDA_ARCH__ >= 900
    if constexpr (SPLIT > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

// Writes to what is `place` in the shared memory of another block, or of this one.
template <int SPLIT> __device__ __forceinline__ void store_to_block(u64* place, int rank, u64 value) {
#if __CUDA_ARCH__ >= 900
    if constexpr (SPLIT > 1) {
        asm volatile("{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                     "st.shared::cluster.u64 [there], %2;\n\t}" ::"r"(shared_address(place)),
                     "r"(rank), "l"(value)
                     : "memory");
        return;
    }
#endif
    *place = value;
}

template <int SPLIT> struct Shared {
    static_assert(SPLIT <= PARTS && BLOCK_WARPS <= WARP, "a lane stands for a block and for a warp");
    u64 warps[BLOCK_WARPS][PARTS];
    // Written by all blocks. Two, used in turn: who writes one again has been through a barrier behind its last reader.
    u64 blocks[2][SPLIT][PARTS];
};

// A run of a row's ids.
template <int SPLIT> struct Run {
    const float* values;
    int begin, end;
    Shared<SPLIT>& shared;
    float temperature;
    int turn = 0;
    float top = 0.0f;

    template <typename F> __device__ __forceinline__ void each(F f) const {
        constexpr int AT_ONCE = 8;
        for (int base = begin + threadIdx.x; base < end; base += THREADS * AT_ONCE) {
            float value[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) value[i] = base + i * THREADS < end ? values[base + i * THREADS] : 0.0f;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (base + i * THREADS < end) f(base + i * THREADS, value[i]);
        }
    }

    template <typename Op> __device__ __forceinline__ u64 reduce_rows(const u64 (*rows)[PARTS], int n, Op op) const {
        int lane = threadIdx.x % WARP;
        u64 x = 0;
        for (int row = lane / PARTS; row < n; row += WARP / PARTS) x = op(x, rows[row][lane % PARTS]);
#pragma unroll
        for (int d = PARTS; d < WARP; d *= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, d));
        return x;
    }

    // Of each part, what the warps of all blocks have together; a warp gives and gets part `lane % PARTS`.
    template <typename Op> __device__ u64 gather(u64 x, Op op) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        if (lane < PARTS) shared.warps[warp][lane] = x;
        __syncthreads();
        if (warp == 0) {
            x = reduce_rows(shared.warps, BLOCK_WARPS, op);
            u64* place = &shared.blocks[turn][block_rank<SPLIT>()][lane % PARTS];
            for (int rank = lane / PARTS; rank < SPLIT; rank += WARP / PARTS) store_to_block<SPLIT>(place, rank, x);
        }
        sync_blocks<SPLIT>();
        x = reduce_rows(shared.blocks[turn], SPLIT, op);
        turn ^= 1;
        return x;
    }

    // Weights below `least` of the largest count for nothing.
    __device__ __forceinline__ u64 weight(float value, float least) const {
        float weight = expf((value - top) / temperature);
        return weight >= least ? __float2ull_rn(weight * ONE) : 0;
    }

    template <bool COUNT> __device__ __forceinline__ u64 size(float value, float least) const {
        if constexpr (COUNT) return 1;
        else return weight(value, least);
    }

    // The largest logit, which is `top` from here on, and the lowest id among equals.
    __device__ int largest() {
        u64 best = 0;
        each([&](int id, float value) {
            u64 one = (u64)key_of(value) << 32 | (0xffffffffu - (unsigned)id);
            best = one > best ? one : best;
        });
        best = gather(reduce_warp(best, Larger()), Larger());
        top = value_of((unsigned)(best >> 32));
        return (int)(0xffffffffu - (unsigned)best);
    }

    // Keeps of the kept tokens the heaviest until they count for what `goal_of` makes of all they count for: at most that.
    template <bool COUNT, typename Goal> __device__ Kept heaviest(Kept kept, float least, Goal goal_of) {
        int lane = threadIdx.x % WARP;
        unsigned base = kept.key, end = key_of(top) + 1;
        float spread = FARTHEST;
        if constexpr (!COUNT) {
            base = max(base, key_of(top - FARTHEST * temperature));
            spread = top - value_of(base);
        }
        // What tokens from the key `end` on count for.
        u64 above = 0, goal = 0;
        for (int shift = -1;; shift = max(29 - __clz(end - base - 1), 0)) {
            unsigned from[PARTS];
            u64 sums[PARTS];
#pragma unroll
            for (int j = 0; j < PARTS; j++) {
                // Parts that would begin behind the end, or beyond all keys, are empty.
                unsigned step = (unsigned)j << max(shift, 0);
                from[j] = step < end - base ? base + step : end;
                if (shift < 0 && j > 0) from[j] = max(base, key_of(top - spread / (float)(1 << j)));
                sums[j] = 0;
            }
            unsigned first = max(base, kept.key + 1);
            each([&](int, float value) {
                unsigned key = key_of(value);
                if (key < first || key >= end) return;
                u64 size = this->size<COUNT>(value, least);
#pragma unroll
                for (int j = 0; j < PARTS; j++) sums[j] += key >= from[j] ? size : 0;
            });
            // Every lane's sum of its part over the warp: half of the parts leave a lane in each step.
            unsigned mine = from[0];
#pragma unroll
            for (int j = 1; j < PARTS; j++) mine = lane % PARTS == j ? from[j] : mine;
#pragma unroll
            for (int half = PARTS / 2; half > 0; half /= 2) {
                bool upper = (lane & half) != 0;
#pragma unroll
                for (int j = 0; j < half; j++) {
                    u64 other = __shfl_xor_sync(ALL_LANES, upper ? sums[j] : sums[j + half], half);
                    sums[j] = (upper ? sums[j + half] : sums[j]) + other;
                }
            }
#pragma unroll
            for (int d = PARTS; d < WARP; d *= 2) sums[0] += __shfl_xor_sync(ALL_LANES, sums[0], d);
            u64 sum = gather(sums[0], Sum());
            if (kept.ties > 0 && kept.key >= mine)
                sum += kept.ties * size<COUNT>(value_of(kept.key), least);
            if (shift < 0) goal = goal_of(__shfl_sync(ALL_LANES, sum, 0));
            unsigned reached = __ballot_sync(ALL_LANES, above + sum >= goal) & ((1u << PARTS) - 1);
            int last = 31 - __clz(reached | 1), next = min(last + 1, PARTS - 1);
            u64 beyond = __shfl_sync(ALL_LANES, sum, next);
            unsigned upto = __shfl_sync(ALL_LANES, mine, next);
            base = __shfl_sync(ALL_LANES, mine, last);
            if (next > last) above += beyond, end = upto;
            if (end - base <= 1) break;
        }
        // What lies above does not reach the goal, so that tokens at the key have a weight.
        u64 one = size<COUNT>(value_of(base), least);
        return {base, (goal - above + one - 1) / one};
    }

    // The first id up to which sizes sum up to what `goal_of` makes of their total; -1 in a block whose run it is not in.
    template <typename Goal, typename F> __device__ int pick(Goal goal_of, F size) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rank = block_rank<SPLIT>();
        u64 sum = 0;
        each([&](int, float value) { sum += size(value); });
        sum = reduce_warp(sum, Sum());
        sum = gather(lane % PARTS == rank ? sum : 0, Sum());
        u64 upto = up_to(sum, PARTS);
        u64 goal = goal_of(__shfl_sync(ALL_LANES, upto, PARTS - 1));
        u64 before = __shfl_sync(ALL_LANES, upto - sum, rank);
        if (goal <= before || goal > __shfl_sync(ALL_LANES, upto, rank)) return -1;
        // One warp's part of the run after the other, until it is one token.
        for (int from = begin, to = end;;) {
            int part = (to - from + BLOCK_WARPS - 1) / BLOCK_WARPS, last = min(to, from + (warp + 1) * part);
            sum = 0;
            for (int id = from + warp * part + lane; id < last; id += WARP) sum += size(values[id]);
            sum = reduce_warp(sum, Sum());
            __syncthreads();
            if (lane == 0) shared.warps[warp][0] = sum;
            __syncthreads();
            sum = lane < BLOCK_WARPS ? shared.warps[lane][0] : 0;
            upto = up_to(sum, WARP);
            int found = __ffs(__ballot_sync(ALL_LANES, before + upto >= goal)) - 1;
            before += __shfl_sync(ALL_LANES, upto - sum, found);
            from += found * part, to = min(to, from + part);
            if (part == 1) return from;
        }
    }

    // Sums over the lanes up to each, in groups of `width` lanes.
    __device__ __forceinline__ u64 up_to(u64 x, int width) const {
        int lane = threadIdx.x % WARP;
        for (int d = 1; d < width; d *= 2) {
            u64 below = __shfl_up_sync(ALL_LANES, x, d, width);
            if (lane % width >= d) x += below;
        }
        return x;
    }

    // A token of the row, as wished; -1 in a block whose run it is not in.
    __device__ int choose(const Wish& wish) {
        int id = largest();
        if (temperature == 0.0f || top == -INFINITY_F) return id >= begin && id < end ? id : -1;
        Kept kept = {0, 0};
        if (wish.top_k > 0) kept = heaviest<true>(kept, 0.0f, [&](u64) { return (u64)wish.top_k; });
        if (wish.top_p < 1.0f)
            kept = heaviest<false>(kept, 0.0f, [&](u64 all) {
                return min(max((u64)ceil((double)all * (double)wish.top_p), 1ull), all);
            });
        auto goal_of = [&](u64 all) { return min((u64)((double)all * wish.at) + 1, all); };
        if (wish.ordered == 0) return pick(goal_of, [&](float value) { return weight(value, wish.min_p); });
        Kept last = heaviest<false>(kept, wish.min_p, goal_of);
        return pick([&](u64) { return last.ties; },
                    [&](float value) -> u64 { return key_of(value) == last.key ? 1 : 0; });
    }
};

__device__ __forceinline__ bool is_banned(int id, const int* banned, int n_banned) {
    for (int i = 0; i < n_banned; i++)
        if (banned[i] == id) return true;
    return false;
}

template <int SPLIT>
__device__ __forceinline__ void
draw_row(float* logits, int p, int n, int vocab, const int* banned, int n_banned, const int* ban, const int* token,
           const float* logprob, const int* bad, const Wish* wishes, Entry* entries, int* drawn,
           float* drawn_logprob) {
    __shared__ Shared<SPLIT> shared;
    __shared__ float raw;
    pdl_launch();
    pdl_wait();
    const Wish wish = wishes[blockIdx.x / SPLIT];
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
    // All have read that logit before its block adjusts it.
    sync_blocks<SPLIT>();
    int part = (vocab + SPLIT - 1) / SPLIT, begin = min(vocab, block_rank<SPLIT>() * part), end = min(vocab, begin + part);
#pragma unroll 4
    for (int id = begin + threadIdx.x; id < end; id += THREADS)
        values[id] = is_banned(id, banned, n_banned) ? -INFINITY_F : sum(id);
    __syncthreads();
    for (int i = wish.begin + threadIdx.x; i < wish.end; i += THREADS) {
        Entry entry = entries[i];
        if (entry.id < begin || entry.id >= end) continue;
        float before = values[entry.id], after = before + entry.bias;
        if (entry.count >= 0) after = after > 0.0f ? fminf(after / wish.repetition, LARGEST) : after * wish.repetition;
        if (entry.count > 0) after -= __fadd_rn(__fmul_rn(wish.frequency, (float)entry.count), wish.presence);
        values[entry.id] = after;
        entries[i].bias = before;
    }
    __syncthreads();
    Run<SPLIT> run = {values, begin, end, shared, wish.temperature};
    int id = run.choose(wish);
    if (id < 0) return;
    if (threadIdx.x == 0) raw = values[id];
    __syncthreads();
    for (int i = wish.begin + threadIdx.x; i < wish.end; i += THREADS)
        if (entries[i].id == id) raw = entries[i].bias;
    __syncthreads();
    if (threadIdx.x == 0) drawn[row] = run.top > -INFINITY_F ? id : -1, drawn_logprob[row] = raw - log_sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    draw(float* logits, int p, int n, int vocab, const int* banned, int n_banned, const int* ban, const int* token,
         const float* logprob, const int* bad, const Wish* wishes, Entry* entries, int* drawn, float* drawn_logprob) {
    draw_row<1>(logits, p, n, vocab, banned, n_banned, ban, token, logprob, bad, wishes, entries, drawn,
                drawn_logprob);
}

#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(THREADS)
    draw_cluster(float* logits, int p, int n, int vocab, const int* banned, int n_banned, const int* ban,
                 const int* token, const float* logprob, const int* bad, const Wish* wishes, Entry* entries,
                 int* drawn, float* drawn_logprob) {
    draw_row<8>(logits, p, n, vocab, banned, n_banned, ban, token, logprob, bad, wishes, entries, drawn,
                drawn_logprob);
}
#endif
