// The attention that some queries pay to each key, on the matrix unit: attention_paid.cu for bf16 KV and heads of 64 or 128, with
// the same arguments (see there).
//
// CPU: attention::paid::add_paid.
//
// Launch: block (256), grid (ceil(keys / 64), kv_heads).
//
// A block has the 64 keys of a page. A warp takes 16 query rows (tokens times heads of the group) at a time, split into hi + lo,
// which keeps 16 bits; a lane adds up what its rows pay to its 16 keys, and all lanes and warps are added up at the end.
#include "attention_common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

struct Paid {
    const float *q, *lse;
    const int *pos, *page_table;
    int first;
    const unsigned short *kv;
    int n, heads, kv_heads, keys, window;
    float scale;
    float *last, *all;
};

// Scores of a warp's 16 rows, of which a lane has those at `q[0]` and `q[1]`.
template <int DIM>
DEVICE void scores(const float *const (&q)[2], const unsigned short *keys, float (&s)[PAGE / 8][4]) {
    constexpr int ROW = DIM + 8;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k) {
        unsigned hi[4], lo[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 x = *reinterpret_cast<const float2 *>(q[i % 2] + k * 16 + i / 2 * 8 + 2 * t);
            split_bf16(x.x, x.y, hi[i], lo[i]);
        }
#pragma unroll
        for (int n = 0; n < PAGE / 8; ++n) {
            const unsigned short *b = keys + (n * 8 + g) * ROW + k * 16 + 2 * t;
            unsigned b0 = *reinterpret_cast<const unsigned *>(b), b1 = *reinterpret_cast<const unsigned *>(b + 8);
            mma_bf16(s[n], lo, b0, b1);
            mma_bf16(s[n], hi, b0, b1);
        }
    }
}

template <int DIM> DEVICE void paid(const Paid &p) {
    // Rows of keys are 16 bytes longer than they are, so that lanes read from different banks.
    constexpr int ROW = DIM + 8;
    __shared__ __align__(16) unsigned short keys[PAGE * ROW];
    __shared__ float sums[2][WARPS][PAGE];
    pdl_wait();
    pdl_launch();
    int head = blockIdx.y, group = p.heads / p.kv_heads, rows = p.n * group, begin = blockIdx.x * PAGE;
    // Runs begin at a page, so that the block's keys lie in one.
    int page = p.page_table[(begin - p.first) / PAGE];
    const unsigned short *from = p.kv + ((long long)page * 2 * p.kv_heads + head) * PAGE * DIM;
    for (int i = threadIdx.x; i < PAGE * DIM / 8; i += THREADS) {
        int key = i / (DIM / 8), chunk = i % (DIM / 8);
        copy_async(shared_address(keys + key * ROW + chunk * 8), from + key * DIM + chunk * 8, true);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float all[PAGE / 8][2] = {}, last[PAGE / 8][2] = {};
    for (int first = warp * 16; first < rows; first += WARPS * 16) {
        const float *q[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = min(first + g + 8 * half, rows - 1);
            q[half] = p.q + ((long long)(row / group) * p.heads + head * group + row % group) * DIM;
        }
        float s[PAGE / 8][4] = {};
        scores<DIM>(q, keys, s);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = first + g + 8 * half, token = row / group;
            if (row >= rows) {
                continue;
            }
            int position = p.pos[token];
            float lse = p.lse[(long long)token * p.heads + head * group + row % group];
#pragma unroll
            for (int n = 0; n < PAGE / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int key = begin + n * 8 + 2 * t + i;
                    bool seen = key <= position && (p.window == 0 || key > position - p.window);
                    float weight = seen ? exp2_approx((s[n][2 * half + i] * p.scale - lse) * LOG2_E) : 0.0f;
                    all[n][i] += weight;
                    last[n][i] += token == p.n - 1 ? weight : 0.0f;
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < PAGE / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int d = 4; d < 32; d *= 2) {
                all[n][i] += __shfl_xor_sync(ALL_LANES, all[n][i], d);
                last[n][i] += __shfl_xor_sync(ALL_LANES, last[n][i], d);
            }
            if (g == 0) {
                sums[0][warp][n * 8 + 2 * t + i] = all[n][i];
                sums[1][warp][n * 8 + 2 * t + i] = last[n][i];
            }
        }
    }
    __syncthreads();
    if (threadIdx.x >= 2 * PAGE) {
        return;
    }
    int side = threadIdx.x / PAGE, key = threadIdx.x % PAGE;
    float *out = side == 0 ? p.all : p.last;
    if (out == nullptr || begin + key >= p.keys) {
        return;
    }
    float sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) {
        sum += sums[side][w][key];
    }
    out[(long long)head * p.keys + begin + key] += sum;
}

#define PAID(NAME, DIM)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        NAME(const float *q, const float *lse, const int *pos, const int *page_table, int first, const void *kv,      \
             int n, int heads, int kv_heads, int dim, int keys, int window, float scale, float *last, float *all) {   \
        paid<DIM>({q, lse, pos, page_table, first, (const unsigned short *)kv, n, heads, kv_heads, keys, window,      \
                   scale, last, all});                                                                                \
    }

PAID(attention_paid_d64, 64)
PAID(attention_paid_d128, 128)
