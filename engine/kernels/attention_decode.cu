// Attention of one query token a row over its paged bf16 KV: the decode step of a batch.
//
// CPU: attention::dense::attend with one token a row, AttentionState::merge.
//
// Equals `attention::dense::attend` with one token a row (engine/src/attention/dense.rs), merged as
// `AttentionState::merge` does.
//
//   q          f32 [rows][heads][DIM], rotated
//   kv         bf16 [pages][2 (K, V)][kv_heads][64 tokens][DIM]
//   page_table i32 [rows][table_stride], entry j of a row holds positions first + 64 j .. first + 64 j + 63
//   first, start, end, pos  i32 [rows]: position of entry 0 (a multiple of 64), positions present start..end,
//              position of the query. It sees max(start, pos + 1 - window) .. min(end, pos + 1); window 0 = no window
//   scale      softmax scale
//   out        f32 [rows][heads][DIM]; 0 where a row sees nothing
//   lse        f32 [rows][heads], natural logarithm; -inf where a row sees nothing
//   scratch    f32, gridDim.x * 16 * (DIM + 2) numbers, aligned to 16 bytes, contents irrelevant
//   counters   u32, rows * kv_heads * ceil(group / 8) numbers, 0 before the first launch; a launch leaves them 0
//
// Launch: any grid is right; one block an SM is meant. Of 132 blocks 128 take a share (an even number in each of the card's
// clusters of SMs is fastest). Block of THREADS = 32 * WARPS = 256; dynamic shared memory 16384 * WARPS = 131072 bytes.
//
// An item is a (row, KV head, block of at most 8 query heads); its keys are cut into tiles of 128. The tiles of all
// items form one line that is shared equally among the blocks of the grid, computed here because lengths change
// between replays of a captured graph (stream-K for attention: LeanAttention, arXiv 2405.10480). What a block has of
// an item that others share goes to scratch; whoever comes last merges it all. So a block writes at most two partial
// states: of the item in which its share begins and of the one in which it ends.
//
// page_table, first, start, end, pos and the KV before `pos` are read before the kernels ahead of this one have ended: none of
// these may write them. Only the KV at `pos`, the queries and what is written wait (`pdl_wait`). So the memory is busy while
// the queries are still made, and the three reads that hang on each other (lengths, page, keys) are over by then.
//
// Each warp reads its own 16 keys of every tile through its own ring of asynchronous copies: the main loop has no
// barrier. The 8 heads' queries are split into bf16 hi + lo, rows 0-7 and 8-15 of the matrix unit's 16; so are the
// weights. Products with bf16 keys and values are then exact to about 2^-16, at no extra matrix instruction.

#include "attention_common.cuh"

// Fewer for cards with less shared memory a block.
#ifndef DECODE_WARPS
#define DECODE_WARPS 8
#endif

constexpr int WARPS = DECODE_WARPS;
constexpr int THREADS = 32 * WARPS;
// Shared memory a warp: its ring.
constexpr int RING_BYTES = 16384;
// Keys a warp takes at a time, and a block.
constexpr int STEP = 16;
constexpr int TILE = STEP * WARPS;
// Query heads of an item: hi and lo parts of so many fill the 16 rows of the matrix unit.
constexpr int HEADS = 8;

template <int DIM> struct Layout {
    static constexpr int ROW_BYTES = DIM * 2;
    static constexpr int CHUNKS = DIM / 8;                   // of 16 bytes a key
    static constexpr int STAGE_BYTES = 2 * STEP * ROW_BYTES; // K, then V
    static constexpr int STAGES = RING_BYTES / STAGE_BYTES;
    static constexpr int STATE_ROW = DIM + 8;                // floats a head; padded against bank conflicts
    static_assert((HEADS * STATE_ROW + 2 * HEADS) * 4 <= STAGE_BYTES, "a warp's state fits one of its stages");
};

struct Problem {
    const float *q;
    const unsigned short *kv;
    const int *page_table;
    int table_stride;
    const int *first, *start, *end, *pos;
    int rows, heads, kv_heads, window;
    float scale;
    float *out, *lse, *scratch;
    unsigned *counters;
    int group, head_blocks; // query heads a KV head, and blocks of 8 of them
    int blocks;             // items a row
};

// Keys that a row sees, counted from its `first`.
struct Keys {
    int begin, end;
    __device__ int first_tile() const { return begin / TILE; }
    __device__ int tiles() const { return end > begin ? (end + TILE - 1) / TILE - begin / TILE : 0; }
};

DEVICE Keys visible(const Problem &p, int row) {
    int pos = p.pos[row], first = p.first[row];
    int begin = max(p.start[row], p.window > 0 ? pos + 1 - p.window : 0);
    int end = min(p.end[row], pos + 1);
    return end > begin ? Keys{begin - first, end - first} : Keys{0, 0};
}

// The line of tiles and how it is shared: the first `longer` blocks take `share` + 1 tiles, the others `share`.
struct Shares {
    unsigned share, longer;
    __device__ unsigned begin(unsigned block) const { return block * share + min(block, longer); }
    __device__ unsigned owner(unsigned tile) const {
        unsigned cut = longer * (share + 1);
        return tile < cut ? tile / (share + 1) : longer + (tile - cut) / share;
    }
};

// A tile of an item.
struct Cursor {
    int row, block;
    Keys keys;
    int tile, last; // `last` is one past the item's last tile

    __device__ void open() {
        tile = keys.first_tile();
        last = tile + keys.tiles();
    }
    // To the next tile; there must be one.
    __device__ void next(const Problem &p) {
        if (++tile < last) {
            return;
        }
        if (++block == p.blocks) {
            block = 0;
            do {
                keys = visible(p, ++row);
            } while (keys.tiles() == 0);
        }
        open();
    }
};

DEVICE unsigned warp_inclusive_sum(unsigned x) {
    int lane = threadIdx.x % 32;
    for (int d = 1; d < 32; d *= 2) {
        unsigned below = __shfl_up_sync(ALL_LANES, x, d);
        x += lane >= d ? below : 0;
    }
    return x;
}

// Tiles of one item of `row`, 0 past the last row.
DEVICE unsigned row_tiles(const Problem &p, int row) { return row < p.rows ? visible(p, row).tiles() : 0; }

// Tiles of the whole line. Every warp counts by itself: no barrier.
DEVICE unsigned count_tiles(const Problem &p) {
    unsigned sum = 0;
    for (int row = threadIdx.x % 32; row < p.rows; row += 32) {
        sum += row_tiles(p, row);
    }
    for (int d = 16; d > 0; d /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, d);
    }
    return sum * p.blocks;
}

// Finds the tile at `at` of the line.
DEVICE Cursor find(const Problem &p, unsigned at) {
    unsigned before = 0;
    int base = 0;
    for (;; base += 32) {
        unsigned through = before + p.blocks * warp_inclusive_sum(row_tiles(p, base + threadIdx.x % 32));
        unsigned past = __ballot_sync(ALL_LANES, through > at);
        if (past != 0) {
            int lane = __ffs(past) - 1;
            unsigned previous = __shfl_sync(ALL_LANES, through, max(lane - 1, 0));
            before = lane > 0 ? previous : before;
            base += lane;
            break;
        }
        before = __shfl_sync(ALL_LANES, through, 31);
    }
    Cursor c;
    c.row = base;
    c.keys = visible(p, base);
    unsigned tiles = c.keys.tiles();
    c.block = (at - before) / tiles;
    c.open();
    c.tile += (at - before) % tiles;
    return c;
}

// Writes the empty state of the rows that see nothing; they are spread over the grid.
template <int DIM> DEVICE void write_empty_rows(const Problem &p) {
    for (int row = blockIdx.x; row < p.rows; row += gridDim.x) {
        if (visible(p, row).tiles() > 0) {
            continue;
        }
        float *out = p.out + (long long)row * p.heads * DIM;
        for (int i = threadIdx.x; i < p.heads * DIM; i += THREADS) {
            out[i] = 0.0f;
        }
        for (int h = threadIdx.x; h < p.heads; h += THREADS) {
            p.lse[row * p.heads + h] = minus_infinity();
        }
    }
}

// This warp's copies ahead of its computation.
template <int DIM> struct Fetcher {
    using L = Layout<DIM>;
    Cursor at;
    int page; // of the warp's keys at `at`
    unsigned left;

    __device__ int key() const { return at.tile * TILE + (int)(threadIdx.x / 32) * STEP; }

    // Whether the warp's next keys were there before this step, whose tokens are the last.
    __device__ bool settled() const { return key() + STEP < at.keys.end; }

    // The page is read one tile ahead of its use.
    __device__ void read_page(const Problem &p) {
        bool there = key() < at.keys.end && key() + STEP > at.keys.begin;
        page = there ? p.page_table[(long long)at.row * p.table_stride + key() / PAGE] : 0;
    }

    // Starts the copies of the warp's keys of one tile, if one is left. 32 lanes copy 512 bytes in a row.
    __device__ void fetch(const Problem &p, unsigned stage) {
        if (left > 0) {
            int lane = threadIdx.x % 32, row = lane / L::CHUNKS;
            long long head = (long long)page * 2 * p.kv_heads + at.block / p.head_blocks;
            const unsigned short *k = p.kv + (head * PAGE + key() % PAGE) * DIM + lane * 8;
            const unsigned short *v = k + (long long)p.kv_heads * PAGE * DIM;
            int from = at.keys.begin - key(), to = at.keys.end - key();
            constexpr int ROWS = 32 / L::CHUNKS;
#pragma unroll
            for (int i = 0; i < STEP / ROWS; ++i) {
                int r = i * ROWS + row;
                unsigned chunk = (lane % L::CHUNKS) ^ (r % 8);
                unsigned to_address = stage + r * L::ROW_BYTES + chunk * 16;
                bool there = r >= from && r < to;
                copy_async(to_address, k + i * 256, there);
                copy_async(to_address + STEP * L::ROW_BYTES, v + i * 256, there);
            }
            if (--left > 0) {
                at.next(p);
                read_page(p);
            }
        }
        copy_commit();
    }
};

// A lane's part of an item's queries: head g, dimensions 2t, 2t+1, 2t+8, 2t+9 of each sixteen.
template <int DIM> struct Query {
    float2 x[DIM / 16][2];

    __device__ void read(const Problem &p, const Cursor &c) {
        int lane = threadIdx.x % 32, head = c.block % p.head_blocks * HEADS + lane / 4;
        const float *from = p.q + ((long long)c.row * p.heads + c.block / p.head_blocks * p.group + head) * DIM;
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                x[k][half] = {0.0f, 0.0f};
                if (head < p.group) {
                    x[k][half] = *reinterpret_cast<const float2 *>(from + k * 16 + half * 8 + lane % 4 * 2);
                }
            }
        }
    }
};

// One warp's attention of an item's heads over the keys it has seen. Lane 4g + t holds head g.
template <int DIM> struct State {
    using L = Layout<DIM>;
    unsigned q[DIM / 16][4];
    float o[DIM / 8][4];
    float max, sum; // `max` in units of log2; `sum` is this lane's share

    // Scales to log2, splits into hi + lo.
    __device__ void open(const Query<DIM> &query, float scale) {
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
            split_bf16(query.x[k][0].x * scale, query.x[k][0].y * scale, q[k][0], q[k][1]);
            split_bf16(query.x[k][1].x * scale, query.x[k][1].y * scale, q[k][2], q[k][3]);
        }
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
            o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
        }
        max = LOWEST;
        sum = 0.0f;
    }

    // Scores of keys 2t, 2t+1, 2t+8, 2t+9 of the stage.
    __device__ void scores(unsigned stage, float (&s)[4]) const {
        int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
        unsigned address = stage + row * L::ROW_BYTES + ((lane / 8 % 2) ^ (row % 8)) * 16;
        // Two chains of products for each eight keys, for the latency.
        float c[2][2][4] = {};
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
            unsigned b[4];
            ldmatrix_x4(b, address ^ (k * 32));
            mma_bf16(c[0][k % 2], q[k], b[0], b[1]);
            mma_bf16(c[1][k % 2], q[k], b[2], b[3]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            s[2 * n] = (c[n][0][0] + c[n][1][0]) + (c[n][0][2] + c[n][1][2]);
            s[2 * n + 1] = (c[n][0][1] + c[n][1][1]) + (c[n][0][3] + c[n][1][3]);
        }
    }

    // Raises the running maximum to cover `s`. Rare after the first tiles.
    __device__ void raise(float top) {
        float higher = fmaxf(max, quad_max(top));
        float factor = exp2_approx(max - higher);
        max = higher;
        sum *= factor;
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
            o[n][0] *= factor, o[n][1] *= factor, o[n][2] *= factor, o[n][3] *= factor;
        }
    }

    // Attends the stage's keys, of which `begin..end` are seen.
    __device__ void attend(unsigned stage, int begin, int end) {
        int lane = threadIdx.x % 32;
        float s[4];
        scores(stage, s);
        if (begin > 0 || end < STEP) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
                s[i] = key >= begin && key < end ? s[i] : minus_infinity();
            }
        }
        float top = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
        if (__any_sync(ALL_LANES, top > max)) {
            raise(top);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[i] = exp2_approx(s[i] - max);
        }
        sum += (s[0] + s[1]) + (s[2] + s[3]);
        unsigned a[4];
        split_bf16(s[0], s[1], a[0], a[1]);
        split_bf16(s[2], s[3], a[2], a[3]);
        int row = lane / 8 % 2 * 8 + lane % 8;
        unsigned address = stage + (STEP + row) * L::ROW_BYTES + ((lane / 16) ^ (row % 8)) * 16;
#pragma unroll
        for (int n = 0; n < DIM / 16; ++n) {
            unsigned b[4];
            ldmatrix_x4_trans(b, address ^ (n * 32));
            mma_bf16(o[2 * n], a, b[0], b[1]);
            mma_bf16(o[2 * n + 1], a, b[2], b[3]);
        }
    }

    // Leaves the state in shared memory: `[8][STATE_ROW]` weighted values, then `[8][2]` maximum and sum.
    __device__ void leave(float *to) const {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
            float2 x = {o[n][0] + o[n][2], o[n][1] + o[n][3]};
            *reinterpret_cast<float2 *>(to + g * L::STATE_ROW + n * 8 + t * 2) = x;
        }
        float total = quad_sum(sum);
        if (t == 0) {
            to[HEADS * L::STATE_ROW + 2 * g] = max;
            to[HEADS * L::STATE_ROW + 2 * g + 1] = total;
        }
    }
};

// Four dimensions of one head, and what they were weighted with.
struct Part {
    float4 x;
    float max, sum;
    __device__ void add(float4 y, float weight, float weighted_sum) {
        x.x += y.x * weight, x.y += y.y * weight, x.z += y.z * weight, x.w += y.w * weight;
        sum += weighted_sum * weight;
    }
};

template <int DIM> DEVICE void write_out(const Problem &p, int row, int head, int quad, const Part &part) {
    long long to = (long long)row * p.heads + head;
    float scale = 1.0f / part.sum;
    float4 x = {part.x.x * scale, part.x.y * scale, part.x.z * scale, part.x.w * scale};
    *reinterpret_cast<float4 *>(p.out + to * DIM + quad * 4) = x;
    if (quad == 0) {
        p.lse[to] = (part.max + log2f(part.sum)) * LN_2;
    }
}

// Scratch of a block's state `slot` (0: of the item its share begins in, 1: of the item it ends in).
template <int DIM> DEVICE float *slot_values(const Problem &p, unsigned block, int slot) {
    return p.scratch + (long long)(block * 2 + slot) * HEADS * DIM;
}

template <int DIM> DEVICE float2 *slot_weights(const Problem &p, unsigned block, int slot) {
    float *after = p.scratch + (long long)gridDim.x * 2 * HEADS * DIM;
    return reinterpret_cast<float2 *>(after) + (block * 2 + slot) * HEADS;
}

// Counts this block's arrival at an item that `blocks` share. True for the last one, which sees what all have left.
DEVICE bool arrive(unsigned *counter, unsigned blocks) {
    __shared__ unsigned before;
    __syncthreads();
    if (threadIdx.x == 0) {
        before = add_acquire_release(counter, 1);
        if (before == blocks - 1) {
            *counter = 0;
        }
    }
    __syncthreads();
    return before == blocks - 1;
}

// Merges the states that the warps of this block have left in their stages: four dimensions of one head.
template <int DIM> DEVICE Part merge_warps(const char *shared, int stage, int head, int quad) {
    using L = Layout<DIM>;
    Part all = {{0.0f, 0.0f, 0.0f, 0.0f}, LOWEST, 0.0f};
    const float *states = reinterpret_cast<const float *>(shared + stage * L::STAGE_BYTES);
    constexpr int NEXT = RING_BYTES / 4;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        all.max = fmaxf(all.max, states[w * NEXT + HEADS * L::STATE_ROW + 2 * head]);
    }
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        const float *weights = states + w * NEXT + HEADS * L::STATE_ROW + 2 * head;
        float4 x = *reinterpret_cast<const float4 *>(states + w * NEXT + head * L::STATE_ROW + quad * 4);
        all.add(x, exp2_approx(weights[0] - all.max), weights[1]);
    }
    return all;
}

// A state in scratch, shared among the lanes of a warp: lane h has the weights of head h.
template <int DIM> struct Gathered {
    static constexpr int QUADS = DIM / 4, EACH = HEADS * QUADS / 32;
    float4 x[EACH];
    float max, sum;

    __device__ static int head(int i) { return (i * 32 + (int)(threadIdx.x % 32)) / QUADS; }
    __device__ void clear() {
        max = LOWEST;
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            x[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        }
    }
    // Reads the first `heads` heads of a block's state; past the first cache level, which may hold older contents.
    __device__ void read(const Problem &p, unsigned block, int slot, int heads) {
        int lane = threadIdx.x % 32;
        const float4 *values = reinterpret_cast<const float4 *>(slot_values<DIM>(p, block, slot));
        if (lane < heads) {
            float2 w = __ldcg(slot_weights<DIM>(p, block, slot) + lane);
            max = w.x, sum = w.y;
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (head(i) < heads) {
                x[i] = __ldcg(values + i * 32 + lane);
            }
        }
    }
    __device__ void merge(const Gathered &other) {
        float higher = fmaxf(max, other.max);
        float keep = exp2_approx(max - higher), take = exp2_approx(other.max - higher);
        max = higher;
        sum = sum * keep + other.sum * take;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            float k = __shfl_sync(ALL_LANES, keep, head(i)), t = __shfl_sync(ALL_LANES, take, head(i));
            x[i].x = x[i].x * k + other.x[i].x * t, x[i].y = x[i].y * k + other.x[i].y * t;
            x[i].z = x[i].z * k + other.x[i].z * t, x[i].w = x[i].w * k + other.x[i].w * t;
        }
    }
    // As `State::leave`.
    __device__ void leave(float *to) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            *reinterpret_cast<float4 *>(to + head(i) * Layout<DIM>::STATE_ROW + (i * 32 + lane) % QUADS * 4) = x[i];
        }
        if (lane < HEADS) {
            to[HEADS * Layout<DIM>::STATE_ROW + 2 * lane] = max;
            to[HEADS * Layout<DIM>::STATE_ROW + 2 * lane + 1] = sum;
        }
    }
};

// Merges the states of an item that every WARPS-th of the blocks `from..=to` left in scratch, into a state at `left`.
// Only the first block can have begun before the item: its `slot` is given.
template <int DIM>
DEVICE void gather_blocks(const Problem &p, unsigned from, unsigned to, int slot, int heads, float *left) {
    Gathered<DIM> all;
    all.clear();
    for (unsigned b = from + threadIdx.x / 32; b <= to; b += 2 * WARPS) {
        // Two at a time, for the latency.
        Gathered<DIM> one, two;
        one.clear();
        two.clear();
        one.read(p, b, b == from ? slot : 0, heads);
        if (b + WARPS <= to) {
            two.read(p, b + WARPS, 0, heads);
        }
        all.merge(one);
        all.merge(two);
    }
    all.leave(left);
}

// Ends a block's part of an item: merges its warps' states, then those of other blocks. `item` is where the item
// begins on the line; `stage` the stage that every warp has just used.
template <int DIM>
DEVICE void finish(const Problem &p, const Shares &shares, const Cursor &c, unsigned item, char *shared, int stage) {
    using L = Layout<DIM>;
    unsigned from = shares.owner(item), to = shares.owner(item + c.keys.tiles() - 1);
    int slot = shares.begin(blockIdx.x) < item ? 1 : 0;
    int first_head = c.block % p.head_blocks * HEADS, heads = min(HEADS, p.group - first_head);
    int base = c.block / p.head_blocks * p.group + first_head;
    __syncthreads();
    for (int e = threadIdx.x; e < heads * (DIM / 4); e += THREADS) {
        int head = e / (DIM / 4), quad = e % (DIM / 4);
        Part all = merge_warps<DIM>(shared, stage, head, quad);
        if (from == to) {
            write_out<DIM>(p, c.row, base + head, quad, all);
            continue;
        }
        *reinterpret_cast<float4 *>(slot_values<DIM>(p, blockIdx.x, slot) + head * DIM + quad * 4) = all.x;
        if (quad == 0) {
            slot_weights<DIM>(p, blockIdx.x, slot)[head] = {all.max, all.sum};
        }
    }
    if (from != to && arrive(p.counters + c.row * p.blocks + c.block, to - from + 1)) {
        char *left = shared + threadIdx.x / 32 * RING_BYTES + stage * L::STAGE_BYTES;
        slot = shares.begin(from) < item ? 1 : 0;
        gather_blocks<DIM>(p, from, to, slot, heads, reinterpret_cast<float *>(left));
        __syncthreads();
        for (int e = threadIdx.x; e < heads * (DIM / 4); e += THREADS) {
            int head = e / (DIM / 4), quad = e % (DIM / 4);
            write_out<DIM>(p, c.row, base + head, quad, merge_warps<DIM>(shared, stage, head, quad));
        }
    }
    // The stages are free again.
    __syncthreads();
}

// Blocks that take a share: an even number in each of the card's clusters of SMs.
DEVICE unsigned working_blocks() { return gridDim.x < 8 ? gridDim.x : gridDim.x / 8 * 8; }

template <int DIM> DEVICE void decode(const Problem &p) {
    using L = Layout<DIM>;
    extern __shared__ __align__(1024) char shared[];
    // The next kernel's blocks are to find a block of this one on every SM, with or without work: where some SMs are empty
    // they take two, and a static division of work is then off by a factor of two (`gemv.cu`).
    pdl_launch();
    unsigned tiles = count_tiles(p);
    unsigned blocks = min(working_blocks(), tiles);
    if (blockIdx.x >= blocks) {
        pdl_wait();
        write_empty_rows<DIM>(p);
        return;
    }
    Shares shares = {tiles / blocks, tiles % blocks};
    unsigned begin = shares.begin(blockIdx.x), count = shares.begin(blockIdx.x + 1) - begin;
    int warp = threadIdx.x / 32;
    unsigned ring = shared_address(shared) + warp * RING_BYTES;

    Cursor c = find(p, begin);
    Fetcher<DIM> fetcher = {c, 0, count};
    fetcher.read_page(p);
    for (int s = 0; s < L::STAGES - 1; ++s) {
        if (!fetcher.settled()) {
            pdl_wait();
        }
        fetcher.fetch(p, ring + s * L::STAGE_BYTES);
    }
    pdl_wait();
    Query<DIM> query;
    query.read(p, c);
    write_empty_rows<DIM>(p);
    float scale = p.scale * LOG2_E;
    State<DIM> state;
    state.open(query, scale);
    for (unsigned i = 0, stage = 0, free = L::STAGES - 1; i < count; ++i) {
        copy_wait<L::STAGES - 2>();
        __syncwarp();
        fetcher.fetch(p, ring + free * L::STAGE_BYTES);
        int key = c.tile * TILE + warp * STEP;
        state.attend(ring + stage * L::STAGE_BYTES, c.keys.begin - key, c.keys.end - key);
        Cursor next = c;
        if (i + 1 < count) {
            next.next(p);
        }
        if (c.tile + 1 == c.last || i + 1 == count) {
            __syncwarp();
            state.leave(reinterpret_cast<float *>(shared + warp * RING_BYTES + stage * L::STAGE_BYTES));
            // On its way during the merge.
            query.read(p, next);
            finish<DIM>(p, shares, c, begin + i - (c.tile - c.keys.first_tile()), shared, stage);
            state.open(query, scale);
        }
        c = next;
        free = stage;
        stage = stage + 1 == L::STAGES ? 0 : stage + 1;
    }
}

#define DECODE_ENTRY(NAME, DIM)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                          \
        NAME(const float *q, const unsigned short *kv, const int *page_table, int table_stride, const int *first,     \
             const int *start, const int *end, const int *pos, int rows, int heads, int kv_heads, int window,         \
             float scale, float *out, float *lse, float *scratch, unsigned *counters) {                               \
        int group = heads / kv_heads, head_blocks = (group + HEADS - 1) / HEADS;                                      \
        decode<DIM>({q, kv, page_table, table_stride, first, start, end, pos, rows, heads, kv_heads, window, scale,   \
                     out, lse, scratch, counters, group, head_blocks, kv_heads * head_blocks});                       \
    }

DECODE_ENTRY(attention_decode_d64, 64)
DECODE_ENTRY(attention_decode_d128, 128)
