// The attention that some queries pay to each key, once the log-sum-exp of all that each sees is known: the softmax weights
// themselves, summed over queries and heads.
//
// CPU: attention::paid::add_paid.
//
//   q          f32 [n][heads][dim], rotated; dim a multiple of 16 up to 256
//   lse        f32 [n][heads], natural logarithm, of everything that a query sees
//   pos        int [n]
//   page_table int []: the sequence's pages; first: position of slot 0 of the first
//   kv         [pages][2 (K, V)][kv_heads][64][dim] of bf16 or f32
//   keys       positions 0 .. keys - 1 are looked at. A query sees pos + 1 - window .. pos; window 0 = no window
//   scale      softmax scale
//   last       f32 [kv_heads][keys] or null: the last query's weights are added, summed over the heads of a group
//   all        f32 [kv_heads][keys]: every query's
//
// Launch: block (256), grid (ceil(keys / 64), kv_heads).
//
// A block has the 64 keys of a page and one group of heads, whose query rows (tokens times heads of the group) it takes 32 at a
// time, and both in slices of 32 dimensions. A thread has 4 keys and 2 rows.
//
// CPU: attention::within::add_within (attention_within).
//
// What each query pays to some keys, from the log-sum-exp of these and that of all keys, summed over heads:
//
//   within, all  f32 [n][heads], natural logarithms; -inf in `within` where a query sees none of the keys
//   paid         f32 [n], added to
//
// Launch: block (256), grid (ceil(n / 8)). A warp takes a token.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int ROWS = 32;
constexpr int SLICE = 32;
// Rows of shared memory: as many floats, and four more so that neighbours lie in other banks.
constexpr int STRIDE = SLICE + 4;
// Keys and rows of a thread; the others are 16 apart.
constexpr int KEYS_EACH = PAGE / 16, ROWS_EACH = ROWS / 16;
constexpr float LOG2_E = 1.4426950408889634f;

struct Paid {
    const float *q, *lse;
    const int *pos, *page_table;
    int first, n, heads, kv_heads, dim, keys, window;
    float scale;
    float *last, *all;
};

// Adds a slice's products to the scores.
__device__ __forceinline__ void multiply(const float (&k)[PAGE][STRIDE], const float (&q)[ROWS][STRIDE], int width,
                                         float (&scores)[ROWS_EACH][KEYS_EACH]) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int d = 0; d < width; d += 4) {
        float4 a[ROWS_EACH], b[KEYS_EACH];
#pragma unroll
        for (int i = 0; i < ROWS_EACH; i++) a[i] = *(const float4*)&q[y + 16 * i][d];
#pragma unroll
        for (int j = 0; j < KEYS_EACH; j++) b[j] = *(const float4*)&k[x + 16 * j][d];
#pragma unroll
        for (int i = 0; i < ROWS_EACH; i++) {
#pragma unroll
            for (int j = 0; j < KEYS_EACH; j++) {
                float sum = fmaf(a[i].x, b[j].x, fmaf(a[i].y, b[j].y, scores[i][j]));
                scores[i][j] = fmaf(a[i].z, b[j].z, fmaf(a[i].w, b[j].w, sum));
            }
        }
    }
}

template <typename T> __device__ __forceinline__ void paid(const Paid& a, const T* kv) {
    __shared__ __align__(16) float k[PAGE][STRIDE], q[ROWS][STRIDE];
    __shared__ float sums[2][16][PAGE];
    pdl_launch();
    pdl_wait();
    int head = blockIdx.y, group = a.heads / a.kv_heads, rows = a.n * group, begin = blockIdx.x * PAGE;
    // Runs begin at a page, so that the block's keys lie in one.
    const T* keys = kv + ((long long)a.page_table[(begin - a.first) / PAGE] * 2 * a.kv_heads + head) * PAGE * a.dim;
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float all[KEYS_EACH] = {}, last[KEYS_EACH] = {};
    for (int from = 0; from < rows; from += ROWS) {
        float scores[ROWS_EACH][KEYS_EACH] = {};
        for (int d = 0; d < a.dim; d += SLICE) {
            int width = min(SLICE, a.dim - d);
            __syncthreads();
            for (int i = threadIdx.x; i < PAGE * width; i += THREADS) {
                k[i / width][i % width] = load_f32(keys + (long long)(i / width) * a.dim + d + i % width);
            }
            for (int i = threadIdx.x; i < ROWS * width; i += THREADS) {
                int row = min(from + i / width, rows - 1);
                long long at = (long long)(row / group) * a.heads + head * group + row % group;
                q[i / width][i % width] = a.q[at * a.dim + d + i % width];
            }
            __syncthreads();
            multiply(k, q, width, scores);
        }
#pragma unroll
        for (int i = 0; i < ROWS_EACH; i++) {
            int row = from + y + 16 * i;
            if (row >= rows) continue;
            int token = row / group, position = a.pos[token];
            float lse = a.lse[(long long)token * a.heads + head * group + row % group];
#pragma unroll
            for (int j = 0; j < KEYS_EACH; j++) {
                int key = begin + x + 16 * j;
                bool seen = key <= position && (a.window == 0 || key > position - a.window);
                float weight = seen ? exp2f((scores[i][j] * a.scale - lse) * LOG2_E) : 0.0f;
                all[j] += weight;
                last[j] += token == a.n - 1 ? weight : 0.0f;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < KEYS_EACH; j++) sums[0][y][x + 16 * j] = all[j], sums[1][y][x + 16 * j] = last[j];
    __syncthreads();
    if (threadIdx.x >= 2 * PAGE) return;
    int side = threadIdx.x / PAGE, key = threadIdx.x % PAGE;
    float* out = side == 0 ? a.all : a.last;
    if (out == nullptr || begin + key >= a.keys) return;
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) sum += sums[side][i][key];
    out[(long long)head * a.keys + begin + key] += sum;
}

#define PAID(NAME, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(const float* q, const float* lse, const int* pos, const int* page_table, int first, const void* kv,     \
             int n, int heads, int kv_heads, int dim, int keys, int window, float scale, float* last, float* all) {    \
        paid<T>({q, lse, pos, page_table, first, n, heads, kv_heads, dim, keys, window, scale, last, all},             \
                (const T*)kv);                                                                                         \
    }

PAID(attention_paid_bf16, bf16)
PAID(attention_paid_f32, float)

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_within(const float* within, const float* all, int n, int heads, float* paid) {
    pdl_launch();
    pdl_wait();
    int lane = threadIdx.x % WARP, token = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (token >= n) return;
    float sum = 0.0f;
    for (int head = lane; head < heads; head += WARP) {
        long long at = (long long)token * heads + head;
        sum += exp2f((within[at] - all[at]) * LOG2_E);
    }
    sum = warp_sum(sum);
    if (lane == 0) paid[token] += sum;
}
