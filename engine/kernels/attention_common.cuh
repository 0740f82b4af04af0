// Device helpers of the attention kernels: bf16 conversions, warp tiles of the matrix unit, asynchronous
// copies, reductions and programmatic dependent launch. Needs no CUDA header: NVRTC alone compiles it.
//
// bf16 numbers are their bits in an `unsigned short`; two of them packed in 32 bits hold the element with the
// lower index in the lower half. A warp's lane is `4 * g + t` (g = 0..7, t = 0..3) in the layouts of the matrix
// unit (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A (16 x 16): a0 = [g][2t, 2t+1], a1 = [g+8][2t, 2t+1], a2 = [g][2t+8, 2t+9], a3 = [g+8][2t+8, 2t+9]
//   B (16 x 8):  b0 = [2t, 2t+1][g], b1 = [2t+8, 2t+9][g]
//   C (16 x 8):  c0, c1 = [g][2t, 2t+1], c2, c3 = [g+8][2t, 2t+1]
#ifndef QUIRE_ATTENTION_COMMON_CUH
#define QUIRE_ATTENTION_COMMON_CUH

#define DEVICE static __device__ __forceinline__

constexpr int PAGE = 64;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// Where a running maximum starts: below every score, yet finite, so that differences from it are never NaN.
constexpr float LOWEST = -1e30f;

DEVICE float minus_infinity() { return __int_as_float(0xff800000); }

// 2^x with a relative error of about 2^-22; 2^-inf = 0.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounds two numbers to bf16.
DEVICE unsigned pack_bf16(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float low_bf16(unsigned packed) { return __uint_as_float(packed << 16); }
DEVICE float high_bf16(unsigned packed) { return __uint_as_float(packed & 0xffff0000u); }

// Splits two numbers into hi + lo, which together keep 16 bits of each.
DEVICE void split_bf16(float x0, float x1, unsigned &hi, unsigned &lo) {
    hi = pack_bf16(x0, x1);
    lo = pack_bf16(x0 - low_bf16(hi), x1 - high_bf16(hi));
}

DEVICE unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// C += A B.
DEVICE void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lanes 8i..8i+7 give the shared addresses of the rows of matrix i.
DEVICE void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same, each matrix transposed.
DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Starts a copy of 16 bytes to shared memory, or of zeros where `there` is false (the source is not read then).
DEVICE void copy_async(unsigned to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `LEFT` of this thread's latest groups are under way.
template <int LEFT> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Reductions over the four lanes that share a row of C.
DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Reductions over a warp.
DEVICE float warp_sum(float x) {
    for (int d = 16; d > 0; d /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, d);
    }
    return x;
}

DEVICE float warp_max(float x) {
    for (int d = 16; d > 0; d /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, d));
    }
    return x;
}

// Adds to a counter. What this block's threads wrote before a barrier is seen by whoever adds later, and its threads
// see after a barrier what those who added earlier wrote.
DEVICE unsigned add_acquire_release(unsigned *counter, unsigned x) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
    return before;
}

// Programmatic dependent launch: waits until the kernels before this one have finished and their writes are seen.
DEVICE void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start its prologue once every block has come here.
DEVICE void pdl_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
