// The instructions that the kernels use beside plain C++. The tests replace this file by one for the
// CPU that does the same; nothing else differs there.
//
// There are no headers: NVRTC then needs no include path.

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks_per_multiprocessor) \
    extern "C" __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)

// 16 bytes, moved by one load or store.
struct __align__(16) Vector {
    unsigned x, y, z, w;
};

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index_x() { return blockIdx.x; }
DEVICE int block_index_y() { return blockIdx.y; }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// The dynamic shared memory of the block.
DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

DEVICE float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned float_to_bits(float value) { return __float_as_uint(value); }

// Bytes of (low, high), numbered 0 to 7, picked by the four nibbles of `selector`.
DEVICE unsigned byte_permute(unsigned low, unsigned high, unsigned selector) {
    return __byte_perm(low, high, selector);
}

DEVICE float f16_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Two values, each rounded to the nearest float16; `low` in the low half.
DEVICE unsigned pack_f16(float low, float high) {
    unsigned packed;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    unsigned short halves[2];
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(halves[0]) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(halves[1]) : "f"(high));
    packed = halves[0] | (unsigned)halves[1] << 16;
#endif
    return packed;
}

// Two values, each rounded to the nearest bfloat16; `low` in the low half.
DEVICE unsigned pack_bf16(float low, float high) {
    unsigned packed = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    __trap();  // No variant for these devices has bfloat16.
#endif
    return packed;
}

DEVICE float shuffle_xor(float value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of
// matrix l / 8, and gets columns 2(l % 4) and 2(l % 4) + 1 of row l / 4 of each matrix.
DEVICE void load_matrices(unsigned matrices[4], const char* row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

// c += a b for a 16x16 (row-major), b 16x8 (column-major) and c 16x8 in float32, spread over the
// lanes of a warp as PTX has it for mma.m16n8k16.
DEVICE void multiply_add_f16(float c[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

DEVICE void multiply_add_bf16(float c[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();  // No variant for these devices has bfloat16.
#endif
}
