// Queries, keys and values of new tokens: head norms, rotation, and the write into the KV pages.
//
// CPU: Transformer::qkv and Transformer::write_kv.
//
//   qkv        f32 [p][n][(heads + 2 * kv_heads) * dim]: the parts are added; queries, then keys, then values
//   bias       f32 [(heads + 2 * kv_heads) * dim] or null
//   q_norm     f32 [dim] or null, k_norm likewise: RMSNorm over each head (eps)
//   cos, sin   f32 [positions][dim / 2]
//   pos        int [n]; below 0: a row of padding, for which q_out is zeros and nothing else is written
//   row_of     int [n]: row of page_table and first
//   page_table int [rows][table_stride] or null: then no page is written (kv, row_of and first are not read)
//   first      int [rows]: position of slot 0 of the row's first page
//   kv         [pages][2][kv_heads][64][dim] of bf16 or f32
//   q_out      f32 [n][heads][dim], rotated
//   keys_out   f32 [n][kv_heads][dim] or null: not rotated, rounded to the KV format
//   values_out f32 [n][kv_heads][dim] or null: rounded to the KV format
//
// Keys are rounded before and after rotation, as a cached chunk's are. Rotary embedding (arXiv 2104.09864) with pairs
// (i, i + dim / 2). One warp a head. dim: even, at most 256.
// Launch: block (256), grid (ceil((heads + 2 * kv_heads) / 8), min(n, 65535)).
#include "rotate.cuh"

struct Rope {
    const float *qkv, *bias, *q_norm, *k_norm, *cos, *sin;
    const int *pos, *row_of, *page_table, *first;
    void* kv;
    float *q_out, *keys_out, *values_out;
    float eps;
    int p, table_stride, n, heads, kv_heads, dim;
};

// One head of row i.
template <typename T> __device__ __forceinline__ void append_head(const Rope& a, int head, long long i) {
    int width = (a.heads + 2 * a.kv_heads) * a.dim, position = a.pos[i];
    bool query = head < a.heads, key = !query && head < a.heads + a.kv_heads;
    Head x = {};
    if (position >= 0) {
        for (int j = 0; j < a.p; j++) x.add(a.qkv + (j * (long long)a.n + i) * width + head * a.dim, a.dim);
        if (a.bias != nullptr) x.add(a.bias + head * a.dim, a.dim);
        const float* norm = query ? a.q_norm : key ? a.k_norm : nullptr;
        if (norm != nullptr) x.norm(norm, a.eps, a.dim);
    }
    const float* cos = a.cos + (long long)max(position, 0) * (a.dim / 2);
    const float* sin = a.sin + (long long)max(position, 0) * (a.dim / 2);
    if (query) {
        x.rotate(cos, sin, a.dim);
        x.store(a.q_out + (i * a.heads + head) * a.dim, a.dim);
        return;
    }
    if (position < 0) return;
    int h = head - a.heads - (key ? 0 : a.kv_heads);
    x.template round<T>();
    float* out = key ? a.keys_out : a.values_out;
    if (out != nullptr) x.store(out + (i * a.kv_heads + h) * a.dim, a.dim);
    if (a.page_table == nullptr) return;
    if (key) x.rotate(cos, sin, a.dim);
    int row = a.row_of[i];
    const int* table = a.page_table + (long long)row * a.table_stride;
    x.store((T*)a.kv + kv_offset(table, a.first[row], position, !key, h, a.kv_heads, a.dim), a.dim);
}

template <typename T> __device__ __forceinline__ void rope_append(const Rope& a) {
    pdl_launch();
    pdl_wait();
    int head = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (head >= a.heads + 2 * a.kv_heads) return;
    for (int i = blockIdx.y; i < a.n; i += gridDim.y) append_head<T>(a, head, i);
}

#define ROPE_APPEND(NAME, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        NAME(const float* qkv, int p, const float* bias, const float* q_norm, const float* k_norm, float eps,         \
             const float* cos, const float* sin, const int* pos, const int* row_of, const int* page_table,            \
             int table_stride, const int* first, void* kv, int n, int heads, int kv_heads, int dim, float* q_out,     \
             float* keys_out, float* values_out) {                                                                     \
        rope_append<T>({qkv,  bias,  q_norm,   k_norm,     cos, sin, pos,          row_of, page_table, first,         \
                        kv,   q_out, keys_out, values_out, eps, p,   table_stride, n,      heads,      kv_heads,      \
                        dim});                                                                                         \
    }

ROPE_APPEND(rope_append_bf16, bf16)
ROPE_APPEND(rope_append_f32, float)
