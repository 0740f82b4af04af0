// CPU: attention::dense::attend.
//
// Attention in plain f32 arithmetic for every shape: the fallback of the tuned kernels and their reference on the
// device. Equals `attention::dense::attend` (engine/src/attention/dense.rs).
//
//   q          f32 [n][heads][head_dim], rotated; head_dim a multiple of 16 up to 256
//   pos        i32 [n], position of each query, in any order
//   row_of     i32 [n], the row of the tables that a query belongs to
//   kv         bf16 or f32 [pages][2 (K, V)][kv_heads][64 tokens][head_dim]
//   page_table i32 [rows][table_stride], entry j of a row holds positions first + 64 j .. first + 64 j + 63
//   first, start, end  i32 [rows]: position of entry 0 (a multiple of 64), positions present start..end. A query
//              sees max(start, pos + 1 - window) .. min(end, pos + 1); window 0 = no window
//   scale      softmax scale
//   out        f32 [n][heads][head_dim]; 0 where a query sees nothing
//   lse        f32 [n][heads], natural logarithm; -inf where a query sees nothing
//
// Launch: grid n * heads, block of THREADS = 256, no dynamic shared memory.
//
// A block is one query of one head. Each warp takes every eighth run of 32 keys: the lanes share a key's dimensions
// for its score, then the lanes hold the 32 scores, then again share the dimensions for the values.

#include "attention_common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int MAX_DIM = 256;
// A lane has EACH dimensions, 32 apart, of AT_ONCE keys at a time: EACH is 2, 4 or 8, enough for head_dim.
template <int EACH> constexpr int AT_ONCE = 32 / EACH;

DEVICE float load(const unsigned short *p) { return __uint_as_float((unsigned)*p << 16); }
DEVICE float load(const float *p) { return *p; }

// One warp's attention; the lane has dimensions lane, lane + 32, ...
template <int EACH> struct State {
    float o[EACH];
    float max, sum; // `max` in units of log2; `sum` is this lane's share
};

// Reads rows key..key + AT_ONCE of `count` rows of `dim`, all before the first is used. Past the last row and the last
// dimension others are read again, whose weights are 0: a condition would make each read wait for the one before.
template <typename E, int EACH>
DEVICE void load_rows(const E *from, int key, int count, int dim, float (&x)[AT_ONCE<EACH>][EACH]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int a = 0; a < AT_ONCE<EACH>; ++a) {
        const E *row = from + min(key + a, count - 1) * dim;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            x[a][i] = load(row + min(i * 32 + lane, dim - 1));
        }
    }
}

// Attends `count` (at most 32) keys, whose K and V rows begin at `k` and `v`.
template <typename E, int EACH>
DEVICE void attend(State<EACH> &s, const float (&q)[EACH], const E *k, const E *v, int count, int dim) {
    int lane = threadIdx.x % 32;
    float score = minus_infinity();
    float x[AT_ONCE<EACH>][EACH];
    for (int key = 0; key < count; key += AT_ONCE<EACH>) {
        load_rows(k, key, count, dim, x);
#pragma unroll
        for (int a = 0; a < AT_ONCE<EACH>; ++a) {
            float y = 0.0f;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                y = fmaf(q[i], x[a][i], y);
            }
            y = warp_sum(y);
            score = lane == key + a && key + a < count ? y : score;
        }
    }
    float higher = fmaxf(s.max, warp_max(score)), factor = exp2_approx(s.max - higher);
    float weight = exp2_approx(score - higher);
    s.max = higher;
    s.sum = s.sum * factor + weight;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        s.o[i] *= factor;
    }
    for (int key = 0; key < count; key += AT_ONCE<EACH>) {
        load_rows(v, key, count, dim, x);
#pragma unroll
        for (int a = 0; a < AT_ONCE<EACH>; ++a) {
            float w = __shfl_sync(ALL_LANES, weight, key + a);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                s.o[i] = fmaf(w, x[a][i], s.o[i]);
            }
        }
    }
}

// Merges the warps' states and writes the query's.
template <int EACH> DEVICE void write(const State<EACH> &s, int dim, float *out, float *lse) {
    __shared__ float values[WARPS][MAX_DIM];
    __shared__ float maxima[WARPS], sums[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float total = warp_sum(s.sum);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        values[warp][i * 32 + lane] = s.o[i];
    }
    if (lane == 0) {
        maxima[warp] = s.max;
        sums[warp] = total;
    }
    __syncthreads();
    float max = LOWEST, sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) {
        max = fmaxf(max, maxima[w]);
    }
    for (int w = 0; w < WARPS; ++w) {
        sum += sums[w] * exp2_approx(maxima[w] - max);
    }
    float share = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int d = threadIdx.x; d < dim; d += THREADS) {
        float x = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            x += values[w][d] * exp2_approx(maxima[w] - max);
        }
        out[d] = x * share;
    }
    if (threadIdx.x == 0) {
        *lse = sum > 0.0f ? (max + log2f(sum)) * LN_2 : minus_infinity();
    }
}

template <typename E, int EACH>
DEVICE void attention(int dim, const float *q, const int *pos, const int *row_of, const E *kv, const int *page_table,
                      int table_stride, const int *first, const int *start, const int *end, int heads, int kv_heads,
                      int window, float scale, float *out, float *lse) {
    int query = blockIdx.x / heads, head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    int lane = threadIdx.x % 32, row = row_of[query], at = pos[query];
    int from = max(start[row], window > 0 ? at + 1 - window : 0) - first[row], to = min(end[row], at + 1) - first[row];
    float x[EACH];
    State<EACH> s = {};
    s.max = LOWEST;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int d = i * 32 + lane;
        x[i] = d < dim ? q[(long long)blockIdx.x * dim + d] * (scale * LOG2_E) : 0.0f;
    }
    // Runs of 32 slots, cut at what is visible; a run lies in one page.
    for (int run = from - from % 32 + (int)(threadIdx.x / 32) * 32; run < to; run += THREADS) {
        int key = max(run, from), count = min(run + 32, to) - key;
        long long page = page_table[(long long)row * table_stride + key / PAGE];
        const E *k = kv + ((page * 2 * kv_heads + kv_head) * PAGE + key % PAGE) * dim;
        attend(s, x, k, k + (long long)kv_heads * PAGE * dim, count, dim);
    }
    write(s, dim, out + (long long)blockIdx.x * dim, lse + blockIdx.x);
}

// Picks EACH.
template <typename E, typename... Args> DEVICE void attention_of_width(int dim, Args... args) {
    pdl_wait();
    pdl_launch();
    if (dim <= 64) {
        attention<E, 2>(dim, args...);
    } else if (dim <= 128) {
        attention<E, 4>(dim, args...);
    } else {
        attention<E, 8>(dim, args...);
    }
}

#define ANY_ENTRY(NAME, ELEMENT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(const float *q, const int *pos, const int *row_of, const void *kv, const int *page_table,                \
             int table_stride, const int *first, const int *start, const int *end, int n, int heads, int kv_heads,    \
             int head_dim, int window, float scale, float *out, float *lse) {                                         \
        attention_of_width<ELEMENT>(head_dim, q, pos, row_of, static_cast<const ELEMENT *>(kv), page_table,           \
                                    table_stride, first, start, end, heads, kv_heads, window, scale, out, lse);       \
    }

ANY_ENTRY(attention_any_bf16, unsigned short)
ANY_ENTRY(attention_any_f32, float)
