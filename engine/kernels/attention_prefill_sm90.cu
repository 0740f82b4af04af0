// The prefill of attention_prefill.cu on Hopper's warpgroup matrix instructions: same entry points, same arguments
// (see there), another launch shape. Compile this file for sm_90a, the other one for every other card.
//
// CPU: attention::dense::attend.
// Only: sm_90a
//
// Launch: grid (kv_heads * ceil(n * group / ROWS), parts), ROWS = 192 with and without split; block of THREADS = 512;
// dynamic shared memory 1536 * DIM bytes.
//
// Three warpgroups have 64 rows each. Scores of the next page are computed while the values of this one are added and
// while the softmax runs (FlashAttention-3, arXiv 2407.08608, section 3). A fourth warpgroup copies pages to a ring.

#include "attention_prefill_common.cuh"

constexpr int WARPGROUPS = 3;
// One warpgroup more feeds the ring. It gives its registers to the others.
constexpr int THREADS = 128 * WARPGROUPS + 128;
constexpr int ROWS = 64 * WARPGROUPS;

// Tiles in shared memory are panels of 64 columns: rows of 128 bytes, whose 16-byte chunks are exchanged as the
// matrix unit's 128-byte swizzle wants it.
constexpr int PANEL_BYTES = 64 * 128;

template <int DIM> struct Layout {
    static constexpr int CHUNKS = DIM / 8;                     // of 16 bytes a row
    static constexpr int BLOCK_BYTES = DIM / 64 * PANEL_BYTES; // 64 rows
    static constexpr int STAGE_BYTES = 2 * BLOCK_BYTES;        // a page of K and one of V
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
template <int LEFT> DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Makes what ordinary and asynchronous copies wrote to shared memory visible to the matrix unit.
DEVICE void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void barrier_init(unsigned barrier, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void barrier_arrive(unsigned barrier) {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(barrier) : "memory");
}
// Waits for the end of the phase of this parity.
DEVICE void barrier_wait(unsigned barrier, unsigned parity) {
    asm volatile("{ .reg .pred p;\n"
                 "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra AGAIN; }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
// Barrier `id` among `count` threads.
DEVICE void named_sync(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
DEVICE void named_arrive(int id, int count) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory"); }

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

// A warpgroup's queries to shared memory as bf16, zeros past the last row.
template <int DIM, int SPLIT> DEVICE void load_queries(const Problem &p, const Rows<ROWS> &rows, char *to) {
    using L = Layout<DIM>;
    constexpr int QUADS = DIM / 4;
    int thread = threadIdx.x % 128, first = threadIdx.x / 128 * 64;
#pragma unroll 4
    for (int i = 0; i < 64 * QUADS / 128; ++i) {
        int row = (i * 128 + thread) / QUADS, quad = thread % QUADS;
        float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
        if (rows.there(p, first + row)) {
            x = *reinterpret_cast<const float4 *>(p.q + rows.state(p, first + row) * DIM + quad * 4);
        }
        uint2 hi, lo;
        split_bf16(x.x, x.y, hi.x, lo.x);
        split_bf16(x.z, x.w, hi.y, lo.y);
        char *at = to + L::offset(row, quad / 2) + quad % 2 * 8;
        *reinterpret_cast<uint2 *>(at) = hi;
        if (SPLIT) {
            *reinterpret_cast<uint2 *>(at + WARPGROUPS * L::BLOCK_BYTES) = lo;
        }
    }
}

// The ring of pages: a barrier a stage says that its page is there, another that nobody needs it any more.
template <int DIM, int SPLIT> struct Ring {
    using L = Layout<DIM>;
    static constexpr int STAGES = SPLIT ? 3 : 4;
    // Pages whose copies are under way beside the one that is started. A page is needed until the scores of the
    // next one are done, so more would wait for each other.
    static constexpr int AHEAD = STAGES - 2;
    unsigned pages, barriers;

    __device__ unsigned page(int i) const { return pages + i % STAGES * L::STAGE_BYTES; }
    __device__ unsigned full(int i) const { return barriers + i % STAGES * 8; }
    __device__ unsigned empty(int i) const { return barriers + (STAGES + i % STAGES) * 8; }
    // For so many warpgroups that have rows.
    __device__ void init(int active) const {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full(i), 128);
            barrier_init(empty(i), 4 * active);
        }
    }
    // Waits for the i-th page.
    __device__ void await(int i) const { barrier_wait(full(i), i / STAGES % 2); }
    // The warp needs the i-th page no more.
    __device__ void release(int i) const {
        if (threadIdx.x % 32 == 0) {
            barrier_arrive(empty(i));
        }
    }

    // Starts the copies of page-table entry `tile` of a KV head; positions that are not present become zeros.
    __device__ void load(const Problem &p, int kv_head, int page, int tile, unsigned to) const {
        constexpr int AT_ONCE = 128 / L::CHUNKS; // rows
        int thread = threadIdx.x % 128, row = thread / L::CHUNKS;
        const unsigned short *k = p.kv + ((long long)page * 2 * p.kv_heads + kv_head) * PAGE * DIM + thread * 8;
        const unsigned short *v = k + (long long)p.kv_heads * PAGE * DIM;
        unsigned at = to + L::offset(row, thread % L::CHUNKS);
        int from = p.start - p.first - tile * PAGE - row, end = p.end - p.first - tile * PAGE - row;
#pragma unroll
        for (int i = 0; i < PAGE; i += AT_ONCE) {
            bool there = i >= from && i < end;
            copy_async(at + i * 128, k + i * DIM, there);
            copy_async(at + L::BLOCK_BYTES + i * 128, v + i * DIM, there);
        }
    }

    // What the feeding warpgroup does.
    __device__ void feed(const Problem &p, const Span &span, int kv_head) const {
        int count = span.last - span.tile;
        int page_id = count > 0 ? p.page_table[span.tile] : 0;
        for (int i = 0; i < count + AHEAD; ++i) {
            if (i < count) {
                barrier_wait(empty(i), i / STAGES % 2 ^ 1);
                load(p, kv_head, page_id, span.tile + i, page(i));
                page_id = i + 1 < count ? p.page_table[span.tile + i + 1] : 0;
            }
            copy_commit();
            if (i >= AHEAD) {
                copy_wait<AHEAD>();
                fence_for_wgmma();
                barrier_arrive(full(i - AHEAD));
            }
        }
    }
};

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

// The `active` warpgroups take turns in starting products, so that the softmax of one runs beside the products of
// others (FlashAttention-3, section 3.1). Barrier 1 + w lets warpgroup w start. Where products outweigh the softmax,
// turns cost more than they bring: `ON` says.
template <bool ON> struct Turns {
    int mine, active;
    __device__ void open() const {
        if (ON && active > 1 && mine == active - 1) {
            named_arrive(1, 256);
        }
    }
    __device__ void await() const {
        if (ON && active > 1) {
            named_sync(1 + mine, 256);
        }
    }
    // `more`: another turn will be waited for.
    __device__ void pass(bool more) const {
        if (ON && active > 1 && (more || mine < active - 1)) {
            named_arrive(mine + 1 < active ? 2 + mine : 1, 256);
        }
    }
};

// What a warpgroup does.
template <int DIM, int SPLIT>
DEVICE void attend(const Problem &p, const Span &span, const Rows<ROWS> &rows, const Ring<DIM, SPLIT> &ring,
                   const Turns<DIM == 128 && !SPLIT> &turns, unsigned queries, const Keys *limits) {
    using L = Layout<DIM>;
    Tile<DIM, SPLIT> t;
    t.open();
    int count = span.last - span.tile;
    if (count > 0) {
        float scale = p.scale * LOG2_E;
        turns.open();
        ring.await(0);
        turns.await();
        wgmma_fence();
        t.start_scores(queries, ring.page(0));
        turns.pass(true);
        wgmma_wait<0>();
        hold(t.s);
        if (span.masked(span.tile)) {
            t.mask(limits, span.tile * PAGE);
        }
        t.soften(scale);
        t.turn();
        for (int i = 1; i < count; ++i) {
            ring.await(i);
            turns.await();
            hold(t.o);
            wgmma_fence();
            t.start_scores(queries, ring.page(i));
            t.start_values(ring.page(i - 1) + L::BLOCK_BYTES);
            turns.pass(true);
            wgmma_wait<1>();
            hold(t.s);
            if (span.masked(span.tile + i)) {
                t.mask(limits, (span.tile + i) * PAGE);
            }
            t.soften(scale);
            wgmma_wait<0>();
            hold(t.o);
            ring.release(i - 1);
            t.turn();
        }
        turns.await();
        hold(t.o);
        wgmma_fence();
        t.start_values(ring.page(count - 1) + L::BLOCK_BYTES);
        turns.pass(false);
        wgmma_wait<0>();
        hold(t.o);
    }
    t.write(p, rows);
}

template <int DIM, int SPLIT> DEVICE void prefill(const Problem &p) {
    using L = Layout<DIM>;
    extern __shared__ __align__(1024) char shared[];
    __shared__ Keys limits[ROWS];
    __shared__ unsigned long long barriers[2 * Ring<DIM, SPLIT>::STAGES];
    pdl_wait();
    pdl_launch();
    auto rows = Rows<ROWS>::of_block(p);
    if (!rows.there(p, 0)) {
        return;
    }
    Span span = Span::of_block(p, rows);
    unsigned base = shared_address(shared);
    Ring<DIM, SPLIT> ring = {base + (1 + SPLIT) * WARPGROUPS * L::BLOCK_BYTES, shared_address(barriers)};
    int active = min(WARPGROUPS, (p.n * p.group - rows.first + 63) / 64);
    if (threadIdx.x == 0) {
        ring.init(active);
        fence_for_wgmma();
    }
    __syncthreads();
    int warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        ring.feed(p, span, rows.kv_head);
    } else if (warpgroup < active) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        if (threadIdx.x % 128 < 64) {
            int row = warpgroup * 64 + threadIdx.x % 128;
            limits[row] = rows.keys(p, row);
        }
        load_queries<DIM, SPLIT>(p, rows, shared + warpgroup * L::BLOCK_BYTES);
        fence_for_wgmma();
        named_sync(1 + WARPGROUPS + warpgroup, 128);
        Turns<DIM == 128 && !SPLIT> turns = {warpgroup, active};
        attend<DIM, SPLIT>(p, span, rows, ring, turns, base + warpgroup * L::BLOCK_BYTES, limits);
    }
}

PREFILL_ENTRY(attention_prefill_d64, 64, THREADS, 1)
PREFILL_ENTRY(attention_prefill_d128, 128, THREADS, 1)
