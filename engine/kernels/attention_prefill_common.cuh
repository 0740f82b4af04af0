// What the prefill kernels share: their arguments, which keys a token sees, and how rows are packed into blocks.
#ifndef QUIRE_ATTENTION_PREFILL_COMMON_CUH
#define QUIRE_ATTENTION_PREFILL_COMMON_CUH

#include "attention_common.cuh"

struct Problem {
    const float *q;
    const int *pos;
    const unsigned short *kv;
    const int *page_table;
    int first, start, end, n, heads, kv_heads, window;
    float scale;
    float *out, *lse; // of this block's share of the keys
    int group;
};

// Keys that a token sees, counted from `first`.
struct Keys {
    int begin, end;
};

DEVICE Keys visible(const Problem &p, int token) {
    int pos = p.pos[token];
    int begin = max(p.start, p.window > 0 ? pos + 1 - p.window : 0), end = min(p.end, pos + 1);
    return {begin - p.first, end - p.first};
}

// The rows of a block: (token, head of the group) pairs of one KV head, `COUNT` of them from `first` on.
template <int COUNT> struct Rows {
    int first, kv_head;
    // The last tokens come first: they see most.
    static __device__ Rows of_block(const Problem &p) {
        int block = gridDim.x - 1 - blockIdx.x;
        return {block / p.kv_heads * COUNT, block % p.kv_heads};
    }
    __device__ bool there(const Problem &p, int row) const { return first + row < p.n * p.group; }
    __device__ int token(const Problem &p, int row) const { return (first + row) / p.group; }
    __device__ int last_token(const Problem &p) const { return token(p, min(COUNT, p.n * p.group - first) - 1); }
    // Index of the row's state in `[n][heads]`.
    __device__ long long state(const Problem &p, int row) const {
        int at = first + row;
        return (long long)(at / p.group) * p.heads + kv_head * p.group + at % p.group;
    }
    // Keys that the row sees; none past the last row.
    __device__ Keys keys(const Problem &p, int row) const {
        return there(p, row) ? visible(p, token(p, row)) : Keys{0, 0};
    }
};

// Page-table entries that a block attends, and the keys that all of its rows see: entries inside need no mask.
struct Span {
    int tile, last;
    Keys all;
    // The share of part blockIdx.y of gridDim.y.
    template <int COUNT> static __device__ Span of_block(const Problem &p, const Rows<COUNT> &rows) {
        Keys early = visible(p, rows.token(p, 0)), late = visible(p, rows.last_token(p));
        int begin = early.begin / PAGE, tiles = max((late.end + PAGE - 1) / PAGE - begin, 0);
        int part = blockIdx.y, parts = gridDim.y;
        auto cut = [&](int i) { return begin + (int)((long long)tiles * i / parts); };
        return {cut(part), cut(part + 1), {late.begin, early.end}};
    }
    __device__ bool masked(int at) const { return at * PAGE < all.begin || (at + 1) * PAGE > all.end; }
};

#define PREFILL_ENTRY(NAME, DIM, THREADS, BLOCKS)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                     \
        NAME(const float *q, const int *pos, const unsigned short *kv, const int *page_table, int first, int start,   \
             int end, int n, int heads, int kv_heads, int window, float scale, int split, float *out, float *lse) {   \
        long long part = (long long)blockIdx.y * n * heads;                                                           \
        Problem p = {q,      pos,   kv,    page_table,       first,      start,           end, n, heads, kv_heads,    \
                     window, scale, out + part * DIM, lse + part, heads / kv_heads};                                  \
        if (split) {                                                                                                  \
            prefill<DIM, 1>(p);                                                                                       \
        } else {                                                                                                      \
            prefill<DIM, 0>(p);                                                                                       \
        }                                                                                                             \
    }

#endif
