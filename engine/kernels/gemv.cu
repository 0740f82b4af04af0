// Linear layers of decode: up to 8 rows of activations times a matrix of weights that is read once.
//
// CPU: Linear::forward, with rms_norm before it and swiglu or the residual after it.
//
//   x      f32 [n][inputs]
//   norm_w f32 [inputs] or null: x is replaced by rmsnorm(x) * norm_w (eps)
//   w      bf16 [outputs][inputs], 16-byte aligned; swiglu: [2 * width][inputs], gate rows before up rows
//   bias   f32 [outputs] or null; swiglu: [2 * width]
//   y      f32 [n][outputs]; swiglu: [n][width]
//
//   gemv_norm_rR    y = w norm(x) + bias
//   gemv_add_rR     y += w x + bias
//   gemv_swiglu_rR  y = silu(gate) * up, [gate; up] = w norm(x) + bias
//   R = 1, 2, 4, 8: the most rows that fit (n <= R)
//   gemv_f32w_norm, _add, _swiglu: the same with f32 weights, for any n
//
// A block owns consecutive outputs and reads their weights once, in order: DRAM serves sequential streams of whole rows
// best. Its warps share each row: warp w takes every eighth step (256 elements) from step w on. ROWS rows side by side
// share the loads of x. Each lane copies 16 bytes a row and step into a ring of its own in shared memory and reads back
// only what it copied itself, so neither the ring nor x needs a barrier. The ring is filled before `pdl_wait`: memory
// stays busy while the previous kernel drains and x is fetched.
// An output is summed in the same order whatever n is: a row does not depend on its neighbours.
//
// Launch: block (256), grid (any; one block a multiprocessor is meant), dynamic shared memory
//   want = ring + 8192 * n * ceil(inputs / 2048) bytes, ring = 49152 (R = 1, 2, 4) or 65536 (R = 8)
//   at least 118784, at most 212992. (Never below ring + 16384 * n: a device with less shared memory takes fewer rows.)
// Where x does not fit it passes in slices. With the lower bound only one block fits on a multiprocessor: two of them, on one
// where attention's block has left early, would leave another without work.
// Every kernel of the graph needs the same (largest) carve-out of shared memory, or they do not overlap.
// gemv_f32w_*: block (256), grid (ceil(outputs / 8), min(n, 65535)).
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
// Elements of a weight in 16 bytes, and of one row in a step: 16 bytes a lane.
constexpr int VECTOR = 8;
constexpr int STEP = WARP * VECTOR;
// Elements of a row that a block takes at once.
constexpr int SWEEP = WARPS * STEP;
// Sweeps after which the lanes' sums are added up: the same for every number of rows and slices.
constexpr int QUANTUM = 2;

enum Kind { NORM, ADD, SWIGLU };

// Sums of an output: swiglu's has a gate and an up.
template <int KIND> constexpr int HALVES = KIND == SWIGLU ? 2 : 1;
// Outputs whose sums are combined at once.
template <int KIND> constexpr int BATCH = 32 / HALVES<KIND>;

// Rows of weights side by side for N rows of x, and the bytes of the ring that they pass through.
template <int N> constexpr int ROWS_OF = N == 8 ? 8 : 4;
template <int N> constexpr int RING_BYTES = N == 8 ? 65536 : 49152;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ unsigned dynamic_shared_bytes() {
    unsigned bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

// What is added to the sums of one output, read ahead of them: the bias, and for ADD what y holds.
template <int KIND> struct Base {
    float sum = 0.0f, up = 0.0f;

    __device__ __forceinline__ Base() {}
    __device__ __forceinline__ Base(const float* bias, const float* y, int output, int outputs) {
        if (bias != nullptr) {
            sum = bias[output];
            if (KIND == SWIGLU) up = bias[outputs + output];
        }
        if (KIND == ADD) sum += *y;
    }

    // Writes the output from its sums (`more`: over the up row of swiglu).
    __device__ __forceinline__ void finish(float total, float more, float* y) const {
        *y = KIND == SWIGLU ? silu(sum + total) * (up + more) : sum + total;
    }
};

// One output of one row by one warp, element by element: f32 weights, and rows that are no multiple of 16 bytes.
template <int KIND, typename Weight>
__device__ void dot_plain(const float* x, const float* norm_w, float eps, const Weight* w, const float* bias, float* y,
                          int inputs, int outputs, int output) {
    int lane = threadIdx.x % WARP;
    const Weight* row = w + (long long)output * inputs;
    const Weight* up_row = row + (long long)outputs * inputs;
    float sum = 0.0f, up = 0.0f, squares = 0.0f;
    for (int k = lane; k < inputs; k += WARP) {
        float v = x[k];
        squares = fmaf(v, v, squares);
        if (norm_w != nullptr) v *= norm_w[k];
        sum = fmaf(load_f32(row + k), v, sum);
        if (KIND == SWIGLU) up = fmaf(load_f32(up_row + k), v, up);
    }
    sum = warp_sum(sum);
    if (KIND == SWIGLU) up = warp_sum(up);
    if (norm_w != nullptr) {
        float scale = 1.0f / sqrtf(warp_sum(squares) / inputs + eps);
        sum *= scale;
        up *= scale;
    }
    if (lane == 0) Base<KIND>(bias, y + output, output, outputs).finish(sum, up, y + output);
}

// Where a block is in its weights: batches of outputs, in each the slices of x, in each groups of PER outputs, in each
// the sweeps of a row.
template <int KIND, int ROWS> struct Walk {
    static constexpr int PER = ROWS / HALVES<KIND>; // Outputs side by side.
    int end, sweeps, slice;         // Outputs of the block; sweeps of a row and of a slice.
    int batch, from, output, sweep; // Where it is.

    __device__ __forceinline__ bool more() const { return batch < end; }
    __device__ __forceinline__ int batch_end() const { return min(batch + BATCH<KIND>, end); }
    __device__ __forceinline__ int slice_end() const { return min(from + slice, sweeps); }

    __device__ __forceinline__ void next() {
        if (++sweep < slice_end()) return;
        sweep = from;
        output += PER;
        if (output < batch_end()) return;
        from = slice_end();
        if (from == sweeps) {
            from = 0;
            batch += BATCH<KIND>;
        }
        sweep = from;
        output = batch;
    }
};

// The weights of one warp, copied ahead of their use into its ring.
template <int KIND, int N> struct Stream {
    static constexpr int ROWS = ROWS_OF<N>;
    static constexpr int PER = ROWS / HALVES<KIND>;
    static constexpr int STAGES = RING_BYTES<N> / (WARPS * ROWS * STEP * 2);
    const bf16* w; // At this lane's elements of the first sweep.
    int left;      // Elements of a row from there on.
    int inputs, outputs;
    unsigned long long policy;
    unsigned ring; // This lane's 16 bytes of the first row of the first stage.
    int stage;
    Walk<KIND, ROWS> at; // The next copy.

    __device__ __forceinline__ void issue() {
        if (at.more() && at.sweep * SWEEP < left) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                int output = at.output + r % PER;
                long long row = output + (KIND == SWIGLU && r >= PER ? (long long)outputs : 0);
                if (output < at.end)
                    copy_async_16(ring + (stage * ROWS + r) * (STEP * 2), w + row * inputs + at.sweep * SWEEP, policy);
            }
        }
        copy_async_commit();
        at.next();
    }

    // Waits for the oldest stage, reads it and refills it. The read is issued before the copy that overwrites it.
    __device__ __forceinline__ void take(uint4 (&weights)[ROWS]) {
        copy_async_wait<STAGES - 1>();
#pragma unroll
        for (int r = 0; r < ROWS; r++) weights[r] = load_shared_16(ring + (stage * ROWS + r) * (STEP * 2));
        issue();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
};

// This lane's elements of x in some sweeps of all rows into shared memory, times norm_w. Adds their squares.
// The loads of several sweeps and rows are under way together.
template <int KIND, int N>
__device__ __forceinline__ void load_x(const float* x, const float* norm_w, float4* xs, int n, int inputs, int from,
                                       int to, int slice, float (&squares)[N]) {
    constexpr int AHEAD = KIND == ADD ? (N < 8 ? 8 / N : 1) : (N < 4 ? 4 / N : 1);
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int start = from; start < to; start += AHEAD) {
        float4 v[AHEAD][N][2], g[AHEAD][2];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int k = (start + a) * SWEEP + threadIdx.x * VECTOR;
            bool present = start + a < to && k < inputs;
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int i = 0; i < N; i++)
                    v[a][i][h] = present && i < n ? ((const float4*)(x + (long long)i * inputs + k))[h] : zero;
                if (KIND != ADD) g[a][h] = present && norm_w != nullptr ? ((const float4*)(norm_w + k))[h] : zero;
            }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (start + a >= to) break;
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (i >= n) break;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float4 u = v[a][i][h], scale = g[a][h];
                    if (KIND != ADD && norm_w != nullptr) {
                        squares[i] = fmaf(u.x, u.x, fmaf(u.y, u.y, squares[i]));
                        squares[i] = fmaf(u.z, u.z, fmaf(u.w, u.w, squares[i]));
                        u = make_float4(u.x * scale.x, u.y * scale.y, u.z * scale.z, u.w * scale.w);
                    }
                    xs[(i * slice + start + a - from) * (2 * THREADS) + h * WARP] = u;
                }
            }
        }
    }
}

// Adds a step of ROWS rows of weights times x to the sums. `xs`: this lane's first float4 of the sweep.
template <int N, int ROWS>
__device__ __forceinline__ void multiply(const uint4 (&weights)[ROWS], const float4* xs, int slice, int n,
                                         float (&sums)[ROWS * N]) {
    float w[ROWS][VECTOR];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        unsigned pairs[4] = {weights[r].x, weights[r].y, weights[r].z, weights[r].w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            w[r][2 * j] = low_f32(pairs[j]);
            w[r][2 * j + 1] = high_f32(pairs[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i >= n) break;
        float4 a = xs[i * slice * (2 * THREADS)], b = xs[i * slice * (2 * THREADS) + WARP];
        float v[VECTOR] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int j = 0; j < VECTOR; j++) sums[r * N + i] = fmaf(w[r][j], v[j], sums[r * N + i]);
        }
    }
}

// Sums each of COUNT values over the warp. Lane l gets value l / (32 / COUNT): each round halves the values that a lane
// holds, while there are several. The order of additions does not depend on COUNT.
template <int COUNT, int MASK = WARP / 2> __device__ __forceinline__ float transpose_sum(const float* v) {
    if constexpr (MASK == 0) {
        return v[0];
    } else if constexpr (COUNT == 1) {
        float sum[1] = {v[0] + __shfl_xor_sync(0xffffffffu, v[0], MASK)};
        return transpose_sum<1, MASK / 2>(sum);
    } else {
        float half[COUNT / 2];
        bool upper = threadIdx.x & MASK;
#pragma unroll
        for (int j = 0; j < COUNT / 2; j++) {
            float keep = upper ? v[j + COUNT / 2] : v[j], give = upper ? v[j] : v[j + COUNT / 2];
            half[j] = keep + __shfl_xor_sync(0xffffffffu, give, MASK);
        }
        return transpose_sum<COUNT / 2, MASK / 2>(half);
    }
}

// What the warps of a block have summed: of each output, row of x and warp. Twice: one barrier a batch is enough.
template <int KIND, int N> struct Partials {
    float sums[2][BATCH<KIND>][HALVES<KIND>][N][WARPS];
    float squares[N][WARPS];

    // Adds a warp's sums for the outputs from `output` on, of `outputs`; the `first` ones replace what was there.
    template <int ROWS>
    __device__ __forceinline__ void add(const float (&lanes)[ROWS * N], int turn, int output, int outputs, bool first) {
        constexpr int PER = ROWS / HALVES<KIND>;
        constexpr int EACH = ROWS * N < WARP ? ROWS * N : WARP; // Sums that are added up at once; lanes to each: SHARE.
        constexpr int SHARE = WARP / EACH;
        int lane = threadIdx.x % WARP;
#pragma unroll
        for (int c = 0; c < ROWS * N; c += EACH) {
            float sum = transpose_sum<EACH>(&lanes[c]);
            int at = c + lane / SHARE, r = at / N, o = output + r % PER;
            if (lane % SHARE == 0 && o < outputs) {
                float& slot = sums[turn][o][r / PER][at % N][threadIdx.x / WARP];
                slot = first ? sum : slot + sum;
            }
        }
    }

    __device__ __forceinline__ float sum(const float (&of)[WARPS]) const {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += of[w];
        return total;
    }
};

template <int KIND, int N>
__device__ __forceinline__ void gemv(const float* x, const float* norm_w, float eps, const bf16* w, const float* bias,
                                     float* y, int n, int inputs, int outputs) {
    constexpr int ROWS = ROWS_OF<N>;
    constexpr int COUNT = BATCH<KIND>;
    typedef Stream<KIND, N> Weights;
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ Partials<KIND, N> partials;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    pdl_launch();
    if (inputs % VECTOR != 0) {
        pdl_wait();
        for (int o = blockIdx.x * WARPS + warp; o < outputs; o += gridDim.x * WARPS)
            for (int i = 0; i < n; i++)
                dot_plain<KIND>(x + (long long)i * inputs, norm_w, eps, w, bias, y + (long long)i * outputs, inputs,
                                outputs, o);
        return;
    }
    int begin = (long long)blockIdx.x * outputs / gridDim.x, end = (blockIdx.x + 1LL) * outputs / gridDim.x;
    int sweeps = (inputs + SWEEP - 1) / SWEEP, first = threadIdx.x * VECTOR;
    int slice = ((int)dynamic_shared_bytes() - RING_BYTES<N>) / (4 * n * SWEEP);
    slice = slice < sweeps ? slice / QUANTUM * QUANTUM : sweeps;
    if (slice < 1) __trap(); // Launched with less shared memory than x needs.
    unsigned ring = shared_address(shared) + warp * (Weights::STAGES * ROWS * STEP * 2) + lane * 16;
    Walk<KIND, ROWS> start = {end, sweeps, slice, begin, 0, begin, 0};
    Weights stream = {w + first, inputs - first, inputs, outputs, evict_first(), ring, 0, start};
#pragma unroll 1
    for (int s = 0; s < Weights::STAGES; s++) {
        stream.stage = s;
        stream.issue();
    }
    stream.stage = 0;
    if (norm_w != nullptr)
        for (int k = threadIdx.x * 32; k < inputs; k += THREADS * 32) prefetch_l2(norm_w + k);
    pdl_wait();

    float4* xs = (float4*)(shared + RING_BYTES<N>) + warp * (2 * WARP) + lane;
    float squares[N] = {};
    for (int batch = begin, turn = 0; batch < end; batch += COUNT, turn ^= 1) {
        int batch_end = min(batch + COUNT, end);
        int i = threadIdx.x / COUNT, mine = batch + threadIdx.x % COUNT;
        bool writes = i < n && mine < end;
        float* to_write = y + (long long)i * outputs + mine;
        Base<KIND> base;
        if (writes) base = Base<KIND>(bias, to_write, mine, outputs);
        for (int from = 0; from < sweeps; from += slice) {
            int to = min(from + slice, sweeps);
            if (batch == begin || slice < sweeps) load_x<KIND, N>(x, norm_w, xs, n, inputs, from, to, slice, squares);
            for (int output = batch; output < batch_end; output += Weights::PER) {
                for (int start = from; start < to; start += QUANTUM) {
                    float sums[ROWS * N] = {};
#pragma unroll 1
                    for (int s = start; s < min(start + QUANTUM, to); s++) {
                        uint4 weights[ROWS];
                        stream.take(weights);
                        if (s * SWEEP + first < inputs)
                            multiply<N, ROWS>(weights, xs + (s - from) * (2 * THREADS), slice, n, sums);
                    }
                    partials.template add<ROWS>(sums, turn, output - batch, batch_end - batch, start == 0);
                }
            }
        }
        if (batch == begin) {
#pragma unroll
            for (int i = 0; i < N; i++) {
                float sum = warp_sum(squares[i]);
                if (lane == 0) partials.squares[i][warp] = sum;
            }
        }
        __syncthreads();
        if (writes) {
            const auto& sums = partials.sums[turn][mine - batch];
            float scale = norm_w == nullptr ? 1.0f : 1.0f / sqrtf(partials.sum(partials.squares[i]) / inputs + eps);
            base.finish(partials.sum(sums[0][i]) * scale, partials.sum(sums[HALVES<KIND> - 1][i]) * scale, to_write);
        }
    }
}

#define GEMV(R, BLOCKS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        gemv_norm_r##R(const float* x, const float* norm_w, float eps, const bf16* w, const float* bias, float* y,     \
                       int n, int inputs, int outputs) {                                                               \
        gemv<NORM, R>(x, norm_w, eps, w, bias, y, n, inputs, outputs);                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        gemv_add_r##R(const float* x, const bf16* w, const float* bias, float* y, int n, int inputs, int outputs) {    \
        gemv<ADD, R>(x, nullptr, 0.0f, w, bias, y, n, inputs, outputs);                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        gemv_swiglu_r##R(const float* x, const float* norm_w, float eps, const bf16* w, const float* bias, float* y,   \
                         int n, int inputs, int width) {                                                               \
        gemv<SWIGLU, R>(x, norm_w, eps, w, bias, y, n, inputs, width);                                                 \
    }

// Two blocks of 1 to 4 rows share a multiprocessor: one drains, the next has its ring filled.
GEMV(1, 2)
GEMV(2, 2)
GEMV(4, 2)
GEMV(8, 1)

// One warp an output of one row.
template <int KIND>
__device__ __forceinline__ void gemv_f32w(const float* x, const float* norm_w, float eps, const float* w,
                                          const float* bias, float* y, int n, int inputs, int outputs) {
    pdl_launch();
    pdl_wait();
    int o = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (o >= outputs) return;
    for (long long i = blockIdx.y; i < n; i += gridDim.y)
        dot_plain<KIND>(x + i * inputs, norm_w, eps, w, bias, y + i * outputs, inputs, outputs, o);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gemv_f32w_norm(const float* x, const float* norm_w, float eps, const float* w, const float* bias, float* y, int n,
                   int inputs, int outputs) {
    gemv_f32w<NORM>(x, norm_w, eps, w, bias, y, n, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(THREADS) gemv_f32w_add(const float* x, const float* w, const float* bias,
                                                                    float* y, int n, int inputs, int outputs) {
    gemv_f32w<ADD>(x, nullptr, 0.0f, w, bias, y, n, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gemv_f32w_swiglu(const float* x, const float* norm_w, float eps, const float* w, const float* bias, float* y, int n,
                     int inputs, int width) {
    gemv_f32w<SWIGLU>(x, norm_w, eps, w, bias, y, n, inputs, width);
}
