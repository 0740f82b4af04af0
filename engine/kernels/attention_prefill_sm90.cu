// The prefill of attention_prefill.cu on Hopper's warpgroup matrix instructions: same entry points, same arguments
// (see there), another launch shape. Compile this file for sm_90a, the other one for every other card.
//
// Launch: grid (kv_heads * ceil(n * group / ROWS), parts), ROWS = 64 * WARPGROUPS = 192 with and without split; block
// of THREADS = 384; dynamic shared memory 1536 * DIM bytes.
//
// A warpgroup has 64 rows. Scores of the next page are computed while the values of this one are added and while the
// softmax runs (FlashAttention-3, arXiv 2407.08608, algorithm 2), which the three warpgroups of a block do at
// different times. Pages come through a ring of asynchronous copies that all threads feed.

#include "attention_prefill_common.cuh"

#ifndef PREFILL_WARPGROUPS
#define PREFILL_WARPGROUPS 3
#endif

constexpr int WARPGROUPS = PREFILL_WARPGROUPS;
constexpr int THREADS = 128 * WARPGROUPS;
constexpr int ROWS = 64 * WARPGROUPS;
constexpr int STAGES = 3;

// Tiles in shared memory are panels of 64 columns: rows of 128 bytes, whose 16-byte chunks are exchanged as the
// matrix unit's 128-byte swizzle wants it.
constexpr int PANEL_BYTES = 64 * 128;

template <int DIM> struct Layout {
    static constexpr int CHUNKS = DIM / 8;                    // of 16 bytes a row
    static constexpr int BLOCK_BYTES = DIM / 64 * PANEL_BYTES; // 64 rows
    // The queries of each warpgroup, with a split then what is below bf16; the stages of a page of K and one of V.
    static constexpr int KV = 2 * WARPGROUPS * BLOCK_BYTES;
    static __device__ __forceinline__ unsigned offset(int row, int chunk) {
        return chunk / 8 * PANEL_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
    }
};

// Shared memory matrix descriptor (PTX ISA, "Matrix Descriptor Format"): 128-byte swizzle, 8 rows are 1024 bytes,
// panels `PANEL_BYTES` apart.
DEVICE unsigned long long descriptor(unsigned address) {
    return (unsigned long long)(address >> 4 & 0x3fff) | (unsigned long long)(PANEL_BYTES >> 4) << 16 |
           (unsigned long long)(1024 >> 4) << 32 | 1ull << 62;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// Makes what ordinary and asynchronous copies wrote to shared memory visible to the matrix unit.
DEVICE void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the compiler from moving uses of accumulators across a wait.
template <int N> DEVICE void hold(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])::"memory");
    }
}

#define F4(x, i) "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])
#define F16(x, i) F4(x, i), F4(x, i + 1), F4(x, i + 2), F4(x, i + 3)
#define F32(x, i) F16(x, i), F16(x, i + 4)

// s (64 x 64) = or += a (64 x 16, rows of queries) b (16 x 64, rows of keys).
DEVICE void wgmma_scores(float (&s)[8][4], unsigned long long a, unsigned long long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
                 "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
                 : F32(s, 0)
                 : "l"(a), "l"(b), "r"(add));
}

// o (64 x 64) += a (64 x 16, in registers) b (16 x 64, rows of values).
DEVICE void wgmma_values(float (&o)[8][4], const unsigned (&a)[4], unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
                 "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : F32(o, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same for 128 columns of values.
DEVICE void wgmma_values(float (&o)[16][4], const unsigned (&a)[4], unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
                 "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
                 "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
                 "%62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : F32(o, 0), F32(o, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Queries to shared memory as bf16, zeros past the last row.
template <int DIM, int SPLIT> DEVICE void load_queries(const Problem &p, const Rows<ROWS> &rows, char *shared) {
    using L = Layout<DIM>;
    constexpr int QUADS = DIM / 4;
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
        char *to = shared + row / 64 * L::BLOCK_BYTES + L::offset(row % 64, quad / 2) + quad % 2 * 8;
        *reinterpret_cast<uint2 *>(to) = hi;
        if (SPLIT) {
            *reinterpret_cast<uint2 *>(to + WARPGROUPS * L::BLOCK_BYTES) = lo;
        }
    }
}

// Starts the copies of page-table entry `tile` of one KV head; positions that are not present become zeros.
template <int DIM> DEVICE void load_keys(const Problem &p, int kv_head, int page, int tile, unsigned to) {
    using L = Layout<DIM>;
    const unsigned short *k = p.kv + ((long long)page * 2 * p.kv_heads + kv_head) * PAGE * DIM;
    const unsigned short *v = k + (long long)p.kv_heads * PAGE * DIM;
    int from = p.start - p.first - tile * PAGE, end = p.end - p.first - tile * PAGE;
    for (int i = threadIdx.x; i < PAGE * L::CHUNKS; i += THREADS) {
        int row = i / L::CHUNKS;
        unsigned at = to + L::offset(row, i % L::CHUNKS);
        bool there = row >= from && row < end;
        copy_async(at, k + i * 8, there);
        copy_async(at + L::BLOCK_BYTES, v + i * 8, there);
    }
}

// What a warpgroup holds of its 64 rows; a lane has rows g and g + 8 of its warp's 16.
template <int DIM, int SPLIT> struct Tile {
    using L = Layout<DIM>;
    float o[DIM / 8][4];
    float s[PAGE / 8][4];
    unsigned weights[PAGE / 16][1 + SPLIT][4];
    float max[2], sum[2], factor[2];

    __device__ void open() {
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
            o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
        }
        max[0] = max[1] = LOWEST;
        sum[0] = sum[1] = 0.0f;
    }

    // Starts the scores of the 64 keys at `keys`, unscaled.
    __device__ void start_scores(unsigned queries, unsigned keys) {
#pragma unroll
        for (int part = 0; part <= SPLIT; ++part) {
#pragma unroll
            for (int k = 0; k < DIM / 16; ++k) {
                unsigned at = k / 4 * PANEL_BYTES + k % 4 * 32;
                wgmma_scores(s, descriptor(queries + part * WARPGROUPS * L::BLOCK_BYTES + at), descriptor(keys + at),
                             part + k > 0);
            }
        }
        wgmma_commit();
    }

    // Starts adding the values at `values`, weighted.
    __device__ void start_values(unsigned values) {
#pragma unroll
        for (int k = 0; k < PAGE / 16; ++k) {
#pragma unroll
            for (int part = 0; part <= SPLIT; ++part) {
                wgmma_values(o, weights[k][part], descriptor(values + k * 16 * 128));
            }
        }
        wgmma_commit();
    }

    // Hides keys that a row does not see. `limits` are the visible keys of the block's rows, `key` the page's first.
    __device__ void mask(const Keys *limits, int key) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Keys seen = limits[threadIdx.x / 32 * 16 + half * 8 + lane / 4];
            int begin = seen.begin - key - lane % 4 * 2, end = seen.end - key - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < PAGE / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float &x = s[n][2 * half + i];
                    x = n * 8 + i >= begin && n * 8 + i < end ? x : minus_infinity();
                }
            }
        }
    }

    // Turns scores into weights relative to the running maxima; `scale` to units of log2. Leaves in `factor` what
    // earlier values must be multiplied with.
    __device__ void soften(float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
            for (int n = 1; n < PAGE / 8; ++n) {
                x = fmaxf(x, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            }
            float higher = fmaxf(max[half], quad_max(x));
            factor[half] = exp2_approx((max[half] - higher) * scale);
            max[half] = higher;
            float base = -higher * scale, total = 0.0f;
#pragma unroll
            for (int n = 0; n < PAGE / 8; ++n) {
                float &a = s[n][2 * half], &b = s[n][2 * half + 1];
                a = exp2_approx(fmaf(a, scale, base));
                b = exp2_approx(fmaf(b, scale, base));
                total += a + b;
            }
            sum[half] = sum[half] * factor[half] + total;
        }
    }

    // Makes the weights an operand and lets earlier values follow the new maxima.
    __device__ void turn() {
        if (__any_sync(ALL_LANES, factor[0] < 1.0f || factor[1] < 1.0f)) {
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
                o[n][0] *= factor[0], o[n][1] *= factor[0], o[n][2] *= factor[1], o[n][3] *= factor[1];
            }
        }
#pragma unroll
        for (int k = 0; k < PAGE / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float x = s[2 * k + i / 2][i % 2 * 2], y = s[2 * k + i / 2][i % 2 * 2 + 1];
                if (SPLIT) {
                    split_bf16(x, y, weights[k][0][i], weights[k][SPLIT][i]);
                } else {
                    weights[k][0][i] = pack_bf16(x, y);
                }
            }
        }
    }

    __device__ void write(const Problem &p, const Rows<ROWS> &rows) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = threadIdx.x / 32 * 16 + half * 8 + lane / 4;
            float total = quad_sum(sum[half]);
            if (!rows.there(p, row)) {
                continue;
            }
            long long to = rows.state(p, row);
            float share = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
                float2 x = {o[n][2 * half] * share, o[n][2 * half + 1] * share};
                *reinterpret_cast<float2 *>(p.out + to * DIM + n * 8 + lane % 4 * 2) = x;
            }
            if (lane % 4 == 0) {
                p.lse[to] = total > 0.0f ? max[half] * p.scale + log2f(total) * LN_2 : minus_infinity();
            }
        }
    }
};

// Feeds the ring; the page-table entry is read one page ahead of its use.
template <int DIM> struct Feeder {
    int tile, last, kv_head, page;
    unsigned ring;
    int stage;

    // Starts the copies of the next page, if there is one.
    __device__ void feed(const Problem &p) {
        if (tile < last) {
            load_keys<DIM>(p, kv_head, page, tile, ring + stage * 2 * Layout<DIM>::BLOCK_BYTES);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            if (++tile < last) {
                page = p.page_table[tile];
            }
        }
        copy_commit();
    }
};

// Waits until the page that comes after the one in use is there for all.
DEVICE void await_page() {
    copy_wait<STAGES - 3>();
    fence_for_wgmma();
    __syncthreads();
}

template <int DIM, int SPLIT> DEVICE void prefill(const Problem &p) {
    using L = Layout<DIM>;
    extern __shared__ __align__(1024) char shared[];
    __shared__ Keys limits[ROWS];
    pdl_wait();
    pdl_launch();
    auto rows = Rows<ROWS>::of_block(p);
    if (!rows.there(p, 0)) {
        return;
    }
    Span span = Span::of_block(p, rows);
    unsigned base = shared_address(shared), ring = base + L::KV;
    unsigned queries = base + threadIdx.x / 128 * L::BLOCK_BYTES;
    Feeder<DIM> feeder = {span.tile, span.last, rows.kv_head, 0, ring, 0};
    feeder.page = span.tile < span.last ? p.page_table[span.tile] : 0;
    feeder.feed(p);
    if (threadIdx.x < ROWS) {
        limits[threadIdx.x] = rows.keys(p, threadIdx.x);
    }
    load_queries<DIM, SPLIT>(p, rows, shared);
    Tile<DIM, SPLIT> t;
    t.open();
    if (span.tile < span.last) {
        float scale = p.scale * LOG2_E;
        await_page();
        feeder.feed(p);
        wgmma_fence();
        t.start_scores(queries, ring);
        wgmma_wait<0>();
        hold(t.s);
        if (span.masked(span.tile)) {
            t.mask(limits, span.tile * PAGE);
        }
        t.soften(scale);
        t.turn();
        unsigned keys = ring;
        for (int tile = span.tile + 1; tile < span.last; ++tile) {
            unsigned next = keys + 2 * L::BLOCK_BYTES;
            next = next == ring + STAGES * 2 * L::BLOCK_BYTES ? ring : next;
            await_page();
            feeder.feed(p);
            hold(t.o);
            wgmma_fence();
            t.start_scores(queries, next);
            t.start_values(keys + L::BLOCK_BYTES);
            wgmma_wait<1>();
            hold(t.s);
            if (span.masked(tile)) {
                t.mask(limits, tile * PAGE);
            }
            t.soften(scale);
            wgmma_wait<0>();
            hold(t.o);
            t.turn();
            keys = next;
        }
        hold(t.o);
        wgmma_fence();
        t.start_values(keys + L::BLOCK_BYTES);
        wgmma_wait<0>();
        hold(t.o);
    }
    t.write(p, rows);
}

PREFILL_ENTRY(attention_prefill_d64, 64, THREADS, 1)
PREFILL_ENTRY(attention_prefill_d128, 128, THREADS, 1)
