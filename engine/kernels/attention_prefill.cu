// Attention of many query tokens of one sequence over its paged bf16 KV.
//
// CPU: attention::dense::attend.
// Spills: attention_prefill_d128 for sm_100a
//
// Equals `attention::dense::attend` (engine/src/attention/dense.rs); blocked online softmax as in FlashAttention-2
// (arXiv 2307.08691, algorithm 1), with the query heads of a KV head packed into the rows of a tile.
//
//   q          f32 [n][heads][DIM], rotated
//   pos        i32 [n], ascending, gaps allowed: token i sees max(start, pos + 1 - window) .. min(end, pos + 1);
//              window 0 = no window
//   kv         bf16 [pages][2 (K, V)][kv_heads][64 tokens][DIM]
//   page_table i32, entry j holds positions first + 64 j .. first + 64 j + 63; first is a multiple of 64
//   scale      softmax scale, above 0
//   split      0: queries and weights rounded to bf16. 1: each as bf16 hi + lo, products then exact to about 2^-16
//              at twice the matrix instructions
//   out        f32 [n][heads][DIM]; 0 where a token sees nothing
//   lse        f32 [n][heads], natural logarithm; -inf where a token sees nothing
//
// Launch: grid (kv_heads * ceil(n * group / R), parts) with R = 128 rows a block, 64 with split; block of
// THREADS = 128; dynamic shared memory 768 * DIM bytes.
//
// With parts above 1 the keys of each block are shared among `parts` blocks, for few tokens over many keys. Part y
// writes its own state, at out + y * n * heads * DIM and lse + y * n * heads: attention_merge makes them one.
//
// A row is a (token, head of the group) pair. A warp multiplies two planes of 16 rows: different rows, or hi and lo
// of the same ones. So either kind loads keys and values from shared memory once for 32 rows of the matrix unit.

#include "attention_prefill_common.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int PLANE = 16 * WARPS; // rows

template <int DIM> struct Layout {
    static constexpr int ROW_BYTES = DIM * 2;
    static constexpr int CHUNKS = DIM / 8; // of 16 bytes a row
    static constexpr int BLOCK_BYTES = 64 * ROW_BYTES;
    // Two planes of queries, then two stages of a page of K and one of V.
    static constexpr int Q = 0;
    static constexpr int KV = 2 * BLOCK_BYTES;
    // Where 16 bytes of a row lie: spread over the banks for eight rows at once.
    static __device__ __forceinline__ unsigned offset(int row, int chunk) {
        return row * ROW_BYTES + (chunk ^ (row % 8)) * 16;
    }
};

template <int SPLIT> using BlockRows = Rows<SPLIT ? PLANE : 2 * PLANE>;

// Queries to shared memory as bf16, zeros past the last row.
template <int DIM, int SPLIT> DEVICE void load_queries(const Problem &p, const BlockRows<SPLIT> &rows, char *shared) {
    using L = Layout<DIM>;
    constexpr int QUADS = DIM / 4, ROWS = SPLIT ? PLANE : 2 * PLANE;
#pragma unroll 4
    for (int i = 0; i < ROWS * QUADS / THREADS; ++i) {
        int row = (i * THREADS + threadIdx.x) / QUADS, quad = threadIdx.x % QUADS;
        float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
        if (rows.there(p, row)) {
            x = *reinterpret_cast<const float4 *>(p.q + rows.state(p, row) * DIM + quad * 4);
        }
        uint2 hi, lo;
        split_bf16(x.x, x.y, hi.x, lo.x);
        split_bf16(x.z, x.w, hi.y, lo.y);
        // Plane 1 follows plane 0, so without a split rows simply go on.
        char *to = shared + L::Q + L::offset(row, quad / 2) + quad % 2 * 8;
        *reinterpret_cast<uint2 *>(to) = hi;
        if (SPLIT) {
            *reinterpret_cast<uint2 *>(to + L::BLOCK_BYTES) = lo;
        }
    }
}

// Starts the copies of page-table entry `tile` of one KV head; positions that are not present become zeros.
template <int DIM> DEVICE void load_keys(const Problem &p, int kv_head, int page, int tile, unsigned to) {
    using L = Layout<DIM>;
    constexpr int ROWS = THREADS / L::CHUNKS; // a round
    int row = threadIdx.x / L::CHUNKS, chunk = threadIdx.x % L::CHUNKS;
    const unsigned short *k = p.kv + ((long long)page * 2 * p.kv_heads + kv_head) * PAGE * DIM + threadIdx.x * 8;
    const unsigned short *v = k + (long long)p.kv_heads * PAGE * DIM;
    unsigned at = to + L::offset(row, chunk);
    int from = p.start - p.first - tile * PAGE - row, end = p.end - p.first - tile * PAGE - row;
#pragma unroll
    for (int i = 0; i < PAGE; i += ROWS) {
        bool there = i >= from && i < end;
        copy_async(at + i * L::ROW_BYTES, k + i * DIM, there);
        copy_async(at + L::BLOCK_BYTES + i * L::ROW_BYTES, v + i * DIM, there);
    }
}

// What a warp holds of its rows; a lane has rows g and g + 8 of each plane that is of different rows.
template <int DIM, int SPLIT> struct Tile {
    using L = Layout<DIM>;
    static constexpr int PLANES = SPLIT ? 1 : 2;
    float o[PLANES][DIM / 8][4];
    float s[PLANES][PAGE / 8][4];
    float max[PLANES][2], sum[PLANES][2];

    __device__ void open() {
#pragma unroll
        for (int m = 0; m < PLANES; ++m) {
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
                o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.0f;
            }
            max[m][0] = max[m][1] = LOWEST;
            sum[m][0] = sum[m][1] = 0.0f;
        }
    }

    // Scores of the 64 keys at `keys`, unscaled.
    __device__ void scores(unsigned queries, unsigned keys) {
        int lane = threadIdx.x % 32;
        unsigned a_at = queries + L::offset(threadIdx.x / 32 * 16 + lane % 16, lane / 16);
        unsigned b_at = keys + L::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int m = 0; m < PLANES; ++m) {
#pragma unroll
            for (int n = 0; n < PAGE / 8; ++n) {
                s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
            unsigned a[2][4];
            ldmatrix_x4(a[0], a_at ^ (k * 32));
            ldmatrix_x4(a[1], (a_at ^ (k * 32)) + L::BLOCK_BYTES);
#pragma unroll
            for (int n = 0; n < PAGE / 16; ++n) {
                unsigned b[4];
                ldmatrix_x4(b, (b_at ^ (k * 32)) + n * 16 * L::ROW_BYTES);
#pragma unroll
                for (int plane = 0; plane < 2; ++plane) {
                    mma_bf16(s[plane % PLANES][2 * n], a[plane], b[0], b[1]);
                    mma_bf16(s[plane % PLANES][2 * n + 1], a[plane], b[2], b[3]);
                }
            }
        }
    }

    // Hides keys that a row does not see. `limits` are the rows' visible keys, `key` the first key.
    __device__ void mask(const Keys *limits, int key) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < PLANES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Keys seen = limits[m * PLANE + threadIdx.x / 32 * 16 + half * 8 + lane / 4];
                int begin = seen.begin - key - lane % 4 * 2, end = seen.end - key - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < PAGE / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float &x = s[m][n][2 * half + i];
                        x = n * 8 + i >= begin && n * 8 + i < end ? x : minus_infinity();
                    }
                }
            }
        }
    }

    // Turns scores into weights relative to the running maxima; `scale` to units of log2.
    __device__ void soften(float scale) {
        float top[PLANES][2];
        bool higher = false;
#pragma unroll
        for (int m = 0; m < PLANES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
                for (int n = 1; n < PAGE / 8; ++n) {
                    x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                }
                top[m][half] = x;
                higher |= x > max[m][half];
            }
        }
        if (__any_sync(ALL_LANES, higher)) {
            raise(top, scale);
        }
#pragma unroll
        for (int m = 0; m < PLANES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float base = -max[m][half] * scale, total = 0.0f;
#pragma unroll
                for (int n = 0; n < PAGE / 8; ++n) {
                    float &x = s[m][n][2 * half], &y = s[m][n][2 * half + 1];
                    x = exp2_approx(fmaf(x, scale, base));
                    y = exp2_approx(fmaf(y, scale, base));
                    total += x + y;
                }
                sum[m][half] += total;
            }
        }
    }

    // Raises the running maxima to cover `top`.
    __device__ void raise(const float (&top)[PLANES][2], float scale) {
#pragma unroll
        for (int m = 0; m < PLANES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float higher = fmaxf(max[m][half], quad_max(top[m][half]));
                float factor = exp2_approx((max[m][half] - higher) * scale);
                max[m][half] = higher;
                sum[m][half] *= factor;
#pragma unroll
                for (int n = 0; n < DIM / 8; ++n) {
                    o[m][n][2 * half] *= factor;
                    o[m][n][2 * half + 1] *= factor;
                }
            }
        }
    }

    // Adds the values at `values`, weighted.
    __device__ void add_values(unsigned values) {
        int lane = threadIdx.x % 32;
        unsigned b_at = values + L::offset(lane / 8 % 2 * 8 + lane % 8, lane / 16);
#pragma unroll
        for (int k = 0; k < PAGE / 16; ++k) {
            unsigned a[2][4];
#pragma unroll
            for (int m = 0; m < PLANES; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float x = s[m][2 * k + i / 2][i % 2 * 2], y = s[m][2 * k + i / 2][i % 2 * 2 + 1];
                    if (SPLIT) {
                        split_bf16(x, y, a[0][i], a[1][i]);
                    } else {
                        a[m][i] = pack_bf16(x, y);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < DIM / 16; ++n) {
                unsigned b[4];
                ldmatrix_x4_trans(b, (b_at ^ (n * 32)) + k * 16 * L::ROW_BYTES);
#pragma unroll
                for (int plane = 0; plane < 2; ++plane) {
                    mma_bf16(o[plane % PLANES][2 * n], a[plane], b[0], b[1]);
                    mma_bf16(o[plane % PLANES][2 * n + 1], a[plane], b[2], b[3]);
                }
            }
        }
    }

    __device__ void write(const Problem &p, const BlockRows<SPLIT> &rows) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < PLANES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = m * PLANE + threadIdx.x / 32 * 16 + half * 8 + lane / 4;
                float total = quad_sum(sum[m][half]);
                if (!rows.there(p, row)) {
                    continue;
                }
                long long to = rows.state(p, row);
                float share = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
                for (int n = 0; n < DIM / 8; ++n) {
                    float2 x = {o[m][n][2 * half] * share, o[m][n][2 * half + 1] * share};
                    *reinterpret_cast<float2 *>(p.out + to * DIM + n * 8 + lane % 4 * 2) = x;
                }
                if (lane % 4 == 0) {
                    p.lse[to] = total > 0.0f ? max[m][half] * p.scale + log2f(total) * LN_2 : minus_infinity();
                }
            }
        }
    }
};

template <int DIM, int SPLIT> DEVICE void prefill(const Problem &p) {
    using L = Layout<DIM>;
    extern __shared__ __align__(1024) char shared[];
    __shared__ Keys limits[2 * PLANE];
    pdl_wait();
    pdl_launch();
    auto rows = BlockRows<SPLIT>::of_block(p);
    if (!rows.there(p, 0)) {
        return;
    }
    Span span = Span::of_block(p, rows);
    unsigned base = shared_address(shared);
    int tile = span.tile, next_page = tile + 1 < span.last ? p.page_table[tile + 1] : 0;
    if (tile < span.last) {
        load_keys<DIM>(p, rows.kv_head, p.page_table[tile], tile, base + L::KV);
    }
    copy_commit();
    limits[threadIdx.x] = rows.keys(p, threadIdx.x);
    load_queries<DIM, SPLIT>(p, rows, shared);

    Tile<DIM, SPLIT> t;
    t.open();
    float scale = p.scale * LOG2_E;
    for (int stage = 0; tile < span.last; ++tile, stage ^= 1) {
        copy_wait<0>();
        // Now all have their keys, and none still reads the other stage.
        __syncthreads();
        if (tile + 1 < span.last) {
            load_keys<DIM>(p, rows.kv_head, next_page, tile + 1, base + L::KV + (stage ^ 1) * 2 * L::BLOCK_BYTES);
            next_page = tile + 2 < span.last ? p.page_table[tile + 2] : 0;
        }
        copy_commit();
        unsigned keys = base + L::KV + stage * 2 * L::BLOCK_BYTES;
        t.scores(base + L::Q, keys);
        if (span.masked(tile)) {
            t.mask(limits, tile * PAGE);
        }
        t.soften(scale);
        t.add_values(keys + L::BLOCK_BYTES);
    }
    t.write(p, rows);
}

PREFILL_ENTRY(attention_prefill_d64, 64, THREADS, 2)
PREFILL_ENTRY(attention_prefill_d128, 128, THREADS, 2)
