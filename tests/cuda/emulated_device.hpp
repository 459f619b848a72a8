// Runs the kernels on the CPU: this file stands for birkhoff/cuda/kernels/device.cuh, and the rest of
// the source is compiled as it is.
//
// Each CUDA thread is a fibre. One runs until it meets others: at a barrier of the thread block, or
// at an instruction of the whole warp. Then the next runs, in one of several orders. So what is read
// before it was written is found, if no barrier forces the order; what depends on the order of
// single loads and stores within a stretch without barriers is not.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#define DEVICE inline
#define KERNEL(threads, blocks_per_multiprocessor) extern "C" void
#define __constant__ static const

struct alignas(16) Vector {
    unsigned x, y, z, w;
};

namespace emulation {

constexpr int LANES = 32;
constexpr size_t STACK = 64 << 10;

enum Instruction { NONE, SYNC_WARP, SHUFFLE, LOAD_MATRICES, MULTIPLY_ADD };

// A point that `size` fibres must reach before any goes on.
struct Barrier {
    int size = 0, arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    Barrier barrier;
    // What lanes give to an instruction, and what they get. Two of each: a lane may be one
    // instruction ahead of one that still reads.
    Instruction instruction[2][LANES];
    const char* address[2][LANES];
    unsigned operands[2][LANES][6];
    float results[2][LANES][4];
};

struct Fibre {
    ucontext_t context;
    int index = 0;
    bool done = false;
};

struct ThreadBlock {
    int x = 0, y = 0;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    Barrier barrier;
    Fibre* current = nullptr;
    ucontext_t scheduler;
    const char* failure = nullptr;
    unsigned long long progress = 0;
    void (*entry)() = nullptr;
};

inline ThreadBlock block;

inline void yield() { swapcontext(&block.current->context, &block.scheduler); }

// A fibre that has failed never goes on.
[[noreturn]] inline void fail(const char* failure) {
    if (!block.failure) block.failure = failure;
    for (;;) yield();
}

template <class Last>
void meet(Barrier& barrier, Last&& last) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
        last();
        barrier.arrived = 0;
        barrier.generation++;
        block.progress++;
    }
    while (barrier.generation == generation) yield();
}

inline int lane() { return block.current->index % LANES; }
inline Warp& warp() { return block.warps[block.current->index / LANES]; }
inline int parity() { return warp().barrier.generation % 2; }

// All lanes of the warp at one instruction; the last computes for all.
template <class Last>
void together(Instruction instruction, Last&& last) {
    Warp& warp = emulation::warp();
    const int half = parity();
    warp.instruction[half][lane()] = instruction;
    meet(warp.barrier, [&] {
        for (Instruction other : warp.instruction[half]) {
            if (other != instruction) fail("the lanes of a warp are at different instructions");
        }
        last();
    });
}

inline void run_fibre() {
    block.entry();
    block.current->done = true;
    block.progress++;
    for (;;) yield();
}

// Orders of the fibres: 0 ascending, 1 descending, others at random and new in every round.
inline const char* run_block(int order, char* stacks) {
    const int threads = (int)block.fibres.size();
    block.failure = nullptr;
    block.barrier = Barrier{threads};
    for (Warp& warp : block.warps) warp.barrier = Barrier{LANES};
    // Reads of what was not written give NaN.
    std::memset(block.shared, 0xff, block.shared_bytes);
    std::vector<int> turns(threads);
    for (int i = 0; i < threads; i++) {
        Fibre& fibre = block.fibres[i];
        fibre.index = i;
        fibre.done = false;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = stacks + i * STACK;
        fibre.context.uc_stack.ss_size = STACK;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, run_fibre, 0);
        turns[i] = order == 1 ? threads - 1 - i : i;
    }
    for (unsigned random = 0x9e3779b9u ^ (unsigned)order;;) {
        for (int i = threads - 1; i > 0 && order > 1; i--) {
            random ^= random << 13, random ^= random >> 17, random ^= random << 5;
            std::swap(turns[i], turns[random % (i + 1)]);
        }
        const unsigned long long before = block.progress;
        int left = 0;
        for (int turn : turns) {
            block.current = &block.fibres[turn];
            if (block.current->done) continue;
            left++;
            swapcontext(&block.scheduler, &block.current->context);
            if (block.failure) return block.failure;
        }
        if (left == 0) return nullptr;
        if (block.progress == before) return "threads wait for each other for ever";
    }
}

inline float f16_to_float(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return (float)value;
}

inline unsigned short float_to_f16(float value) {
    const _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

inline float bf16_to_float(unsigned short bits) {
    const unsigned wide = (unsigned)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline unsigned short float_to_bf16(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fff;
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// The fragments of mma.m16n8k16, as the PTX ISA numbers their elements.
template <float (*TO_FLOAT)(unsigned short)>
void multiply_add(float c[4], const unsigned a[4], const unsigned b[2]) {
    Warp& warp = emulation::warp();
    const int half = parity();
    unsigned* operands = warp.operands[half][lane()];
    for (int i = 0; i < 4; i++) operands[i] = a[i];
    for (int i = 0; i < 2; i++) operands[4 + i] = b[i];
    together(MULTIPLY_ADD, [&] {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < LANES; lane++) {
            const unsigned* operands = warp.operands[half][lane];
            const int group = lane / 4, pair = lane % 4 * 2;
            for (int i = 0; i < 8; i++) {
                const unsigned short bits = (unsigned short)(operands[i / 2] >> i % 2 * 16);
                left[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = TO_FLOAT(bits);
            }
            for (int i = 0; i < 4; i++) {
                const unsigned short bits = (unsigned short)(operands[4 + i / 2] >> i % 2 * 16);
                right[pair + i % 2 + i / 2 * 8][group] = TO_FLOAT(bits);
            }
        }
        for (int lane = 0; lane < LANES; lane++) {
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                float sum = 0.0f;
                for (int k = 0; k < 16; k++) sum += left[row][k] * right[k][column];
                warp.results[half][lane][i] = sum;
            }
        }
    });
    for (int i = 0; i < 4; i++) c[i] += warp.results[half][lane()][i];
}

}  // namespace emulation

DEVICE int thread_index() { return emulation::block.current->index; }
DEVICE int block_index_x() { return emulation::block.x; }
DEVICE int block_index_y() { return emulation::block.y; }
DEVICE int min(int a, int b) { return a < b ? a : b; }

DEVICE void sync_block() {
    emulation::meet(emulation::block.barrier, [] {});
}
DEVICE void sync_warp() {
    emulation::together(emulation::SYNC_WARP, [] {});
}

DEVICE char* shared_memory() { return emulation::block.shared; }

DEVICE float bits_to_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
DEVICE unsigned float_to_bits(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

DEVICE unsigned byte_permute(unsigned low, unsigned high, unsigned selector) {
    const std::uint64_t bytes = (std::uint64_t)high << 32 | low;
    unsigned permuted = 0;
    for (int i = 0; i < 4; i++) {
        permuted |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    }
    return permuted;
}

DEVICE float f16_to_float(unsigned short bits) { return emulation::f16_to_float(bits); }

DEVICE unsigned pack_f16(float low, float high) {
    return emulation::float_to_f16(low) | (unsigned)emulation::float_to_f16(high) << 16;
}
DEVICE unsigned pack_bf16(float low, float high) {
    return emulation::float_to_bf16(low) | (unsigned)emulation::float_to_bf16(high) << 16;
}

DEVICE float shuffle_xor(float value, int lane_mask) {
    emulation::Warp& warp = emulation::warp();
    const int half = emulation::parity();
    warp.results[half][emulation::lane()][0] = value;
    emulation::together(emulation::SHUFFLE, [] {});
    return warp.results[half][emulation::lane() ^ lane_mask][0];
}

DEVICE void load_matrices(unsigned matrices[4], const char* row) {
    emulation::Warp& warp = emulation::warp();
    const int half = emulation::parity(), lane = emulation::lane();
    const std::ptrdiff_t offset = row - emulation::block.shared;
    const std::ptrdiff_t end = (std::ptrdiff_t)emulation::block.shared_bytes;
    if (offset < 0 || offset % 16 != 0 || offset + 16 > end) {
        emulation::fail("ldmatrix outside of shared memory, or not aligned");
    }
    warp.address[half][lane] = row;
    // The last lane loads for all, so that no lane runs ahead and writes before another has read.
    emulation::together(emulation::LOAD_MATRICES, [&] {
        for (int to = 0; to < emulation::LANES; to++) {
            for (int i = 0; i < 4; i++) {
                const char* from = warp.address[half][i * 8 + to / 4] + to % 4 * 4;
                std::memcpy(&warp.operands[half][to][i], from, 4);
            }
        }
    });
    std::memcpy(matrices, warp.operands[half][lane], 16);
}

DEVICE void multiply_add_f16(float c[4], const unsigned a[4], const unsigned b[2]) {
    emulation::multiply_add<emulation::f16_to_float>(c, a, b);
}
DEVICE void multiply_add_bf16(float c[4], const unsigned a[4], const unsigned b[2]) {
    emulation::multiply_add<emulation::bf16_to_float>(c, a, b);
}
