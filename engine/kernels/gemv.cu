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
//   R = 1, 2, 4, 8: the most rows that fit (n <= R). gemv_f32w_*: f32 weights, any n, one row a blockIdx.y.
//
// Each warp owns consecutive outputs and streams their rows of weights, ROWS at a time, through a ring of its own in
// shared memory. A lane reads back only what it copied itself, so the ring needs no barrier. The ring is filled before
// `pdl_wait`: while the previous kernel drains and x is fetched, memory stays busy.
// An output is summed in the same order whatever n is: a row does not depend on its neighbours.
//
// Launch: block (256), grid (any; one block a multiprocessor is meant), dynamic shared memory
//   ring + 4 * n * (inputs rounded up to 1024), or less when that does not fit: x then passes in slices.
//   ring = 73728 bytes; at least ring + 4096 * n.
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
// Elements of a weight in 16 bytes, and of one row in a step: 16 bytes a lane.
constexpr int VECTOR = 8;
constexpr int STEP = WARP * VECTOR;
constexpr int RING_BYTES = 73728;
// Slices of x are multiples of this many elements: a float4 a thread.
constexpr int SLICE = 4 * THREADS;

enum Kind { NORM, ADD, SWIGLU };

// Weight rows that a warp streams side by side for N rows of x: more rows share the loads of x.
template <int N> constexpr int ROWS_OF = N <= 2 ? 2 : 4;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ unsigned dynamic_shared_bytes() {
    unsigned bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

// Writes one output of one row from its sums (`up`: of the second half of swiglu's rows).
template <int KIND>
__device__ __forceinline__ void finish(float sum, float up, const float* bias, float* y, int output, int outputs) {
    if (bias != nullptr) sum += bias[output];
    if (KIND == NORM) *y = sum;
    if (KIND == ADD) *y += sum;
    if (KIND == SWIGLU) {
        if (bias != nullptr) up += bias[outputs + output];
        *y = silu(sum) * up;
    }
}

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
    if (lane == 0) finish<KIND>(sum, up, bias, y + output, output, outputs);
}

// The rows of weights of one warp, copied step by step into its ring.
template <int KIND, int ROWS> struct Stream {
    static constexpr int PER = KIND == SWIGLU ? ROWS / 2 : ROWS; // Outputs side by side.
    static constexpr int STAGES = RING_BYTES / (WARPS * ROWS * STEP * 2);
    const bf16* w;
    unsigned long long policy;
    unsigned ring; // This lane's 16 bytes of the first row of the first stage.
    int inputs, outputs, end;
    int output, k, stage; // Of the next copy.

    __device__ __forceinline__ long long row(int output, int r) const {
        return output + r % PER + (KIND == SWIGLU && r >= PER ? (long long)outputs : 0);
    }

    __device__ __forceinline__ void issue() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (output + r % PER < end && k < inputs) {
                copy_async_16(ring + (stage * ROWS + r) * (STEP * 2), w + row(output, r) * inputs + k, policy);
            }
        }
        copy_async_commit();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        k += STEP;
        if (k - (int)(threadIdx.x % WARP) * VECTOR >= inputs) {
            k = threadIdx.x % WARP * VECTOR;
            output += PER;
        }
    }
};

// x[from .. from + slice] of all rows into shared memory, times norm_w; adds this thread's squares to `squares`.
// Element k lies so that lane l's 8 elements of a step are two float4 that the lanes of a warp read without conflict.
template <int N>
__device__ __forceinline__ void load_x(const float* x, const float* norm_w, float4* xs, int n, int inputs, int from,
                                       int slice, float (&squares)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i >= n) break;
        const float4* row = (const float4*)(x + (long long)i * inputs + from);
        int present = min(slice, inputs - from) / 4;
#pragma unroll 4
        for (int q = threadIdx.x; q < present; q += THREADS) {
            float4 v = row[q];
            squares[i] = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares[i]))));
            if (norm_w != nullptr) {
                float4 s = ((const float4*)(norm_w + from))[q];
                v = make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w);
            }
            xs[i * (slice / 4) + q / 64 * 64 + q % 2 * 32 + q % 64 / 2] = v;
        }
    }
}

// Adds one step of weights times x to the sums. `xs`: this lane's first float4 of the step.
template <int N, int ROWS>
__device__ __forceinline__ void multiply(unsigned weights, const float4* xs, int slice, int n, float (&sums)[ROWS][N]) {
    float w[ROWS][VECTOR];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        unsigned p[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(p[0]), "=r"(p[1]), "=r"(p[2]), "=r"(p[3])
                     : "r"(weights + r * (STEP * 2))
                     : "memory");
#pragma unroll
        for (int j = 0; j < 4; j++) {
            w[r][2 * j] = low_f32(p[j]);
            w[r][2 * j + 1] = high_f32(p[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i >= n) break;
        float4 a = xs[i * (slice / 4)], b = xs[i * (slice / 4) + 32];
        float v[VECTOR] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int j = 0; j < VECTOR; j++) sums[r][i] = fmaf(w[r][j], v[j], sums[r][i]);
        }
    }
}

// Reduces the sums of a warp and writes its outputs: lane r * N + i those of row i.
template <int KIND, int N, int ROWS>
__device__ __forceinline__ void finish_pass(const float (&sums)[ROWS][N], float scale, const float* bias,
                                            float* y, int n, int output, int end, int outputs) {
    constexpr int PER = Stream<KIND, ROWS>::PER;
    int lane = threadIdx.x % WARP, r = lane / N, i = lane % N;
    float sum = 0.0f, up = 0.0f;
#pragma unroll
    for (int s = 0; s < ROWS; s++) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            float total = warp_sum(sums[s][j]);
            if (lane == s % PER * N + j) (s < PER ? sum : up) = total;
        }
    }
    if (r < PER && i < n && output + r < end) {
        finish<KIND>(sum * scale, up * scale, bias, y + (long long)i * outputs + output + r, output + r, outputs);
    }
}

// RMSNorm's factor of row lane % N from all threads' squares; 1 without a norm. A barrier.
template <int N>
__device__ __forceinline__ float norm_scale(const float (&squares)[N], bool norm, float eps, int inputs,
                                            float* partial) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float sum = warp_sum(squares[i]);
        if (lane == 0) partial[i * WARPS + warp] = sum;
    }
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < WARPS; j++) sum += partial[lane % N * WARPS + j];
    return norm ? 1.0f / sqrtf(sum / inputs + eps) : 1.0f;
}

template <int KIND, int N>
__device__ __forceinline__ void gemv(const float* x, const float* norm_w, float eps, const bf16* w, const float* bias,
                                     float* y, int n, int inputs, int outputs) {
    constexpr int ROWS = ROWS_OF<N>;
    typedef Stream<KIND, ROWS> Weights;
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float partial[N * WARPS];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    long long warps = (long long)gridDim.x * WARPS, index = (long long)blockIdx.x * WARPS + warp;
    pdl_launch();
    if (inputs % VECTOR != 0) {
        pdl_wait();
        for (int o = index; o < outputs; o += warps)
            for (int i = 0; i < n; i++)
                dot_plain<KIND>(x + (long long)i * inputs, norm_w, eps, w, bias, y + (long long)i * outputs, inputs,
                                outputs, o);
        return;
    }
    int begin = index * outputs / warps, end = (index + 1) * outputs / warps;
    unsigned ring = shared_address(shared) + warp * Weights::STAGES * ROWS * STEP * 2 + lane * 16;
    Weights stream = {w, evict_first(), ring, inputs, outputs, end, begin, lane * VECTOR, 0};
#pragma unroll 1
    for (int s = 0; s < Weights::STAGES - 1; s++) stream.issue();
    if (norm_w != nullptr)
        for (int k = threadIdx.x * 32; k < inputs; k += THREADS * 32) prefetch_l2(norm_w + k);
    pdl_wait();

    float4* xs = (float4*)(shared + RING_BYTES);
    int room = (dynamic_shared_bytes() - RING_BYTES) / (4 * n) / SLICE * SLICE;
    int slice = min((inputs + SLICE - 1) / SLICE * SLICE, room);
    int most = (outputs + warps - 1) / warps;
    int passes = (most + Weights::PER - 1) / Weights::PER, stage = 0;
    float squares[N] = {}, scale = 1.0f;
    for (int pass = 0; pass < passes; pass++) {
        int output = begin + pass * Weights::PER;
        float sums[ROWS][N] = {};
        for (int from = 0; from < inputs; from += slice) {
            if (pass == 0 || slice < inputs) {
                float ignored[N];
                if (pass + from > 0) __syncthreads();
                if (pass == 0) load_x<N>(x, norm_w, xs, n, inputs, from, slice, squares);
                else load_x<N>(x, norm_w, xs, n, inputs, from, slice, ignored);
                if (pass == 0 && from + slice >= inputs)
                    scale = norm_scale<N>(squares, norm_w != nullptr, eps, inputs, partial);
                else __syncthreads();
            }
            if (output >= end) continue;
            int stop = min(slice, inputs - from);
#pragma unroll 1
            for (int k = 0; k < stop; k += STEP) {
                copy_async_wait<Weights::STAGES - 2>();
                if (k + lane * VECTOR < stop)
                    multiply<N, ROWS>(ring + stage * ROWS * STEP * 2, xs + k / 4 + lane, slice, n, sums);
                stage = stage + 1 == Weights::STAGES ? 0 : stage + 1;
                stream.issue();
            }
        }
        if (output < end) finish_pass<KIND, N, ROWS>(sums, scale, bias, y, n, output, end, outputs);
    }
}

#define GEMV(R)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                          \
        gemv_norm_r##R(const float* x, const float* norm_w, float eps, const bf16* w, const float* bias, float* y,    \
                       int n, int inputs, int outputs) {                                                               \
        gemv<NORM, R>(x, norm_w, eps, w, bias, y, n, inputs, outputs);                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                          \
        gemv_add_r##R(const float* x, const bf16* w, const float* bias, float* y, int n, int inputs, int outputs) {   \
        gemv<ADD, R>(x, nullptr, 0.0f, w, bias, y, n, inputs, outputs);                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                          \
        gemv_swiglu_r##R(const float* x, const float* norm_w, float eps, const bf16* w, const float* bias, float* y,  \
                         int n, int inputs, int width) {                                                               \
        gemv<SWIGLU, R>(x, norm_w, eps, w, bias, y, n, inputs, width);                                                \
    }

GEMV(1)
GEMV(2)
GEMV(4)
GEMV(8)

// One warp an output, one row a blockIdx.y.
template <int KIND>
__device__ __forceinline__ void gemv_f32w(const float* x, const float* norm_w, float eps, const float* w,
                                          const float* bias, float* y, int inputs, int outputs) {
    pdl_launch();
    pdl_wait();
    int o = blockIdx.x * WARPS + threadIdx.x / WARP;
    long long i = blockIdx.y;
    if (o < outputs) dot_plain<KIND>(x + i * inputs, norm_w, eps, w, bias, y + i * outputs, inputs, outputs, o);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gemv_f32w_norm(const float* x, const float* norm_w, float eps, const float* w, const float* bias, float* y, int n,
                   int inputs, int outputs) {
    gemv_f32w<NORM>(x, norm_w, eps, w, bias, y, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(THREADS) gemv_f32w_add(const float* x, const float* w, const float* bias,
                                                                    float* y, int n, int inputs, int outputs) {
    gemv_f32w<ADD>(x, nullptr, 0.0f, w, bias, y, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gemv_f32w_swiglu(const float* x, const float* norm_w, float eps, const float* w, const float* bias, float* y, int n,
                     int inputs, int width) {
    gemv_f32w<SWIGLU>(x, norm_w, eps, w, bias, y, inputs, width);
}
