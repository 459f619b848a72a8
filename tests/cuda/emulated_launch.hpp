// Launches the kernels that stand before this file.
namespace emulation {

inline const Arguments* arguments;

struct Entry {
    const char* name;
    void (*run)();
    int threads;
};

#define GEMV_ENTRY(TOKENS, BYTES) \
    {"gemv_" #TOKENS, [] { gemv_##TOKENS(*arguments); }, GEMV_WARPS * WARP},
#define GEMM_ENTRY(TILE_M, TILE_N, WARPS_M, WARPS_N, BYTES)                           \
    {"gemm_" #TILE_M "x" #TILE_N, [] { gemm_##TILE_M##x##TILE_N(*arguments); },       \
     WARPS_M * WARPS_N * WARP},

const Entry ENTRIES[] = {
    {"decode", [] { decode(*arguments); }, DECODE_WARPS * WARP},
    GEMV_VARIANTS(GEMV_ENTRY) GEMM_VARIANTS(GEMM_ENTRY)
};

// Memory that ends at a page that may not be touched.
inline char* guarded(size_t bytes) {
    const size_t page = 4096, whole = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    mprotect((char*)memory + whole, page, PROT_NONE);
    return (char*)memory + whole - bytes;
}

inline void release(char* memory, size_t bytes) {
    const size_t page = 4096, whole = (bytes + page - 1) / page * page;
    munmap(memory + bytes - whole, whole + page);
}

}  // namespace emulation

// Runs a kernel over a grid. Returns null, or what went wrong.
extern "C" const char* emulated_launch(
    const char* name, int grid_x, int grid_y, int threads, int shared_bytes,
    const Arguments* arguments, int order
) {
    using namespace emulation;
    const Entry* found = nullptr;
    for (const Entry& entry : ENTRIES) {
        if (std::strcmp(entry.name, name) == 0) found = &entry;
    }
    if (!found) return "there is no such kernel";
    if (found->threads != threads) return "the kernel is made for another number of threads";
    emulation::arguments = arguments;
    block.entry = found->run;
    block.fibres = std::vector<Fibre>(threads);
    block.warps = std::vector<Warp>(threads / LANES);
    block.shared_bytes = shared_bytes;
    block.shared = guarded(shared_bytes);
    const auto stacks = std::make_unique<char[]>(threads * STACK);
    const char* failure = nullptr;
    for (block.y = 0; block.y < grid_y && !failure; block.y++) {
        for (block.x = 0; block.x < grid_x && !failure; block.x++) {
            failure = run_block(order, stacks.get());
        }
    }
    release(block.shared, shared_bytes);
    return failure;
}
