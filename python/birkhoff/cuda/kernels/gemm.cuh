// y = x W^T + bias on tensor cores. A thread block computes a tile of TILE_M tokens and TILE_N
// outputs in steps of one block of 32 columns: x and the decoded weights of a step lie in shared
// memory, twice, so that the next step is loaded and decoded while this one is multiplied.
//
// float32 x is cut into PLANES bfloat16 planes, whose sum it is (exactly, for three), and multiplied
// with the values before scaling, which bfloat16 holds exactly; the scales of a group multiply the
// sums over its columns.

static constexpr int STEP = BLOCK;
static constexpr int STEPS_OF_GROUP = GROUP / STEP;
static constexpr int LINE = STEP * 2;  // bytes of a row of a tile in shared memory
static constexpr int CHUNK = 8;        // elements moved at once: 16 bytes of a line
static constexpr int CHUNKS = STEP / CHUNK;

// Byte offset of a chunk in a tile. Chunks of a line change places so that any eight lines that
// follow each other have the same chunk in different banks.
DEVICE int tile_offset(int line, int chunk) {
    return line * LINE + ((chunk ^ line / 2 % CHUNKS) << 4);
}

// 8 elements of x.
struct Chunk {
    static constexpr int SIZE = DTYPE == F32 ? 8 : 4;
    unsigned bits[SIZE];

    // From column `column` of a row of x, with zeros beyond the last column.
    DEVICE void load(const void* row, int column, const Arguments& arguments) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) bits[i] = 0;
        if (arguments.aligned) {
            if (column >= arguments.in_features) return;
            const Vector* from = (const Vector*)((const char*)row + (long long)column * SIZE / 2);
#pragma unroll
            for (int i = 0; i < SIZE; i += 4) {
                const Vector four = from[i / 4];
                bits[i] = four.x, bits[i + 1] = four.y, bits[i + 2] = four.z, bits[i + 3] = four.w;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            if (column + i >= arguments.in_features) continue;
            if constexpr (DTYPE == F32) {
                bits[i] = ((const unsigned*)row)[column + i];
            } else {
                bits[i / 2] |= (unsigned)((const unsigned short*)row)[column + i] << i % 2 * 16;
            }
        }
    }

    // To a tile, the planes `plane_bytes` apart.
    DEVICE void store(char* to, int plane_bytes) const {
        if constexpr (DTYPE == F32) {
            float rest[CHUNK];
#pragma unroll
            for (int i = 0; i < CHUNK; i++) rest[i] = bits_to_float(bits[i]);
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++) {
                unsigned packed[CHUNK / 2];
#pragma unroll
                for (int i = 0; i < CHUNK; i += 2) {
                    // Cut, the rest is exact and no plane can overflow; the last is rounded.
                    packed[i / 2] = plane + 1 < PLANES
                        ? byte_permute(float_to_bits(rest[i]), float_to_bits(rest[i + 1]), 0x7632u)
                        : pack_bf16(rest[i], rest[i + 1]);
                    rest[i] -= bits_to_float(packed[i / 2] << 16);
                    rest[i + 1] -= bits_to_float(packed[i / 2] & 0xffff0000u);
                }
                *(Vector*)(to + plane * plane_bytes) =
                    Vector{packed[0], packed[1], packed[2], packed[3]};
            }
        } else {
            *(Vector*)to = Vector{bits[0], bits[1], bits[2], bits[3]};
        }
    }
};

template <int TILE_M, int TILE_N, int WARPS_M, int WARPS_N>
struct Gemm {
    static constexpr int WARPS = WARPS_M * WARPS_N;
    static constexpr int THREADS = WARPS * WARP;
    // The part of the tile that a warp multiplies, in fragments of 16 tokens and 8 outputs.
    static constexpr int FRAGMENTS_M = TILE_M / WARPS_M / 16;
    static constexpr int FRAGMENTS_N = TILE_N / WARPS_N / 8;
    static constexpr int PLANE_BYTES = TILE_M * LINE;
    static constexpr int X_BYTES = PLANES * PLANE_BYTES;
    static constexpr int STAGE_BYTES = X_BYTES + TILE_N * LINE;
    static constexpr int SHARED_BYTES = TABLE_BYTES + 2 * STAGE_BYTES;
    // What a thread loads in a step: chunks of x, and streams of the strips of W.
    static constexpr int X_CHUNKS = TILE_M * CHUNKS / THREADS;
    static constexpr int STREAMS = TILE_N / STRIP / WARPS;
    static_assert(X_CHUNKS * THREADS == TILE_M * CHUNKS && STREAMS * WARPS * STRIP == TILE_N, "");
    static_assert(FRAGMENTS_N % 2 == 0, "");

    typedef float Sums[FRAGMENTS_M][FRAGMENTS_N][4];

    static DEVICE void clear(Sums& sums) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; m++) {
#pragma unroll
            for (int n = 0; n < FRAGMENTS_N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
            }
        }
    }

    // Puts the decoded weights of a stream to their line of the tile of W.
    static DEVICE void store_weights(char* tile, int line, int stream, const float weight[STREAM]) {
        unsigned packed[STREAM / 2];
#pragma unroll
        for (int i = 0; i < STREAM; i += 2) {
            packed[i / 2] = DTYPE == F32
                // Values before scaling: bfloat16 holds them exactly.
                ? byte_permute(float_to_bits(weight[i]), float_to_bits(weight[i + 1]), 0x7632u)
                : pack(weight[i], weight[i + 1]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const unsigned* four = packed + 4 * i;
            *(Vector*)(tile + tile_offset(line, 2 * stream + i)) =
                Vector{four[0], four[1], four[2], four[3]};
        }
    }

    // Adds the products of a step to the sums.
    static DEVICE void multiply(Sums& sums, const char* stage, int line_m, int line_n) {
        const int lane = thread_index() % WARP;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            unsigned b[FRAGMENTS_N][2];
#pragma unroll
            for (int n = 0; n < FRAGMENTS_N; n += 2) {
                const int line = line_n + n * 8 + lane / 16 * 8 + lane % 8;
                unsigned matrices[4];
                load_matrices(
                    matrices, stage + X_BYTES + tile_offset(line, chunk + lane / 8 % 2)
                );
                b[n][0] = matrices[0];
                b[n][1] = matrices[1];
                b[n + 1][0] = matrices[2];
                b[n + 1][1] = matrices[3];
            }
#pragma unroll
            for (int m = 0; m < FRAGMENTS_M; m++) {
                const int line = line_m + m * 16 + lane % 16;
#pragma unroll
                for (int plane = PLANES - 1; plane >= 0; plane--) {
                    unsigned a[4];
                    load_matrices(
                        a, stage + plane * PLANE_BYTES + tile_offset(line, chunk + lane / 16)
                    );
#pragma unroll
                    for (int n = 0; n < FRAGMENTS_N; n++) {
                        if constexpr (DTYPE == F16) {
                            multiply_add_f16(sums[m][n], a, b[n]);
                        } else {
                            multiply_add_bf16(sums[m][n], a, b[n]);
                        }
                    }
                }
            }
        }
    }

    // Adds the sums of a group's columns, times its scale, to the sums; then clears them.
    static DEVICE void add_group(
        Sums& sums, Sums& of_group, const Arguments& arguments, int group, int first_output
    ) {
        const int groups = ceil_div(arguments.in_features, GROUP);
        const float* group_scale = (const float*)(shared_memory() + CURVE_BYTES);
#pragma unroll
        for (int n = 0; n < FRAGMENTS_N; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int output = min(first_output + n * 8 + i, arguments.out_features - 1);
                const int strip = output / STRIP, row = output % STRIP;
                const unsigned exponents =
                    arguments.group_exponents[((long long)strip * groups + group) * 8 + row % 8];
                const unsigned row_scale = arguments.row_scales[output];
                const float scale =
                    bits_to_float(row_scale << 16) * group_scale[exponents >> row / 8 * 4 & 15];
#pragma unroll
                for (int m = 0; m < FRAGMENTS_M; m++) {
                    sums[m][n][i] += scale * of_group[m][n][i];
                    sums[m][n][i + 2] += scale * of_group[m][n][i + 2];
                }
            }
        }
        clear(of_group);
    }

    // Adds the bias and writes two neighbouring outputs of a token.
    static DEVICE void store_outputs(
        const Arguments& arguments, int token, int output, float first, float second
    ) {
        if (token >= arguments.tokens || output >= arguments.out_features) return;
        const bool both = output + 1 < arguments.out_features;
        if (arguments.bias != nullptr) {
            first += read(arguments.bias, output);
            if (both) second += read(arguments.bias, output + 1);
        }
        const long long index = (long long)token * arguments.out_features + output;
        if (DTYPE != F32 && arguments.out_features % 2 == 0) {
            ((unsigned*)arguments.y)[index / 2] = pack(first, second);
        } else {
            write(arguments.y, index, first);
            if (both) write(arguments.y, index + 1, second);
        }
    }

    static DEVICE void run(const Arguments& arguments) {
        const int lane = thread_index() % WARP, warp = thread_index() / WARP;
        const int token = block_index_x() * TILE_M, output = block_index_y() * TILE_N;
        const int line_m = warp % WARPS_M * (TILE_M / WARPS_M);
        const int line_n = warp / WARPS_M * (TILE_N / WARPS_N);
        const int row = lane % STRIP, stream = lane / STRIP;
        char* const stages = shared_memory() + TABLE_BYTES;

        // Tokens and strips beyond the last are read as the last; their sums are not written.
        const char* x[X_CHUNKS];
#pragma unroll
        for (int i = 0; i < X_CHUNKS; i++) {
            const int line = (thread_index() + i * THREADS) / CHUNKS;
            const int source = min(token + line, arguments.tokens - 1);
            x[i] = (const char*)arguments.x + source * arguments.x_stride * (DTYPE == F32 ? 4 : 2);
        }
        Row rows[STREAMS];
#pragma unroll
        for (int i = 0; i < STREAMS; i++) {
            const int strip = output / STRIP + warp * STREAMS + i;
            const int last = ceil_div(arguments.out_features, STRIP) - 1;
            rows[i] = Row(arguments, min(strip, last), row);
        }

        Chunk chunks[X_CHUNKS];
        Codes codes[STREAMS];
        const auto load = [&](int step) {
#pragma unroll
            for (int i = 0; i < X_CHUNKS; i++) {
                chunks[i].load(x[i], step * STEP + thread_index() % CHUNKS * CHUNK, arguments);
            }
#pragma unroll
            for (int i = 0; i < STREAMS; i++) codes[i].load(rows[i], step);
        };
        const auto store = [&](int step) {
            char* const stage = stages + step % 2 * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < X_CHUNKS; i++) {
                const int line = (thread_index() + i * THREADS) / CHUNKS;
                chunks[i].store(
                    stage + tile_offset(line, thread_index() % CHUNKS), PLANE_BYTES
                );
            }
#pragma unroll
            for (int i = 0; i < STREAMS; i++) {
                float weight[STREAM];
                codes[i].decode(
                    weight, stream, arguments.in_features - step * STEP - stream * STREAM
                );
                if constexpr (DTYPE != F32) {
                    const float scale = codes[i].scale(rows[i].scale, row);
#pragma unroll
                    for (int j = 0; j < STREAM; j++) weight[j] *= scale;
                }
                const int line = (warp * STREAMS + i) * STRIP + row;
                store_weights(stage + X_BYTES, line, stream, weight);
            }
        };

        Sums sums, of_group;
        clear(sums);
        if constexpr (DTYPE == F32) clear(of_group);
        const int steps = ceil_div(arguments.in_features, STEP);
        const int first_output = output + line_n + lane % 4 * 2;
        fill_tables(THREADS);
        sync_block();
        load(0);
        store(0);
        sync_block();
        for (int step = 0; step < steps; step++) {
            const bool last = step + 1 == steps;
            if (!last) load(step + 1);
            const char* const stage = stages + step % 2 * STAGE_BYTES;
            if constexpr (DTYPE == F32) {
                multiply(of_group, stage, line_m, line_n);
                if (last || step % STEPS_OF_GROUP == STEPS_OF_GROUP - 1) {
                    add_group(sums, of_group, arguments, step / STEPS_OF_GROUP, first_output);
                }
            } else {
                multiply(sums, stage, line_m, line_n);
            }
            if (!last) {
                store(step + 1);
                sync_block();
            }
        }

        const int first_token = token + line_m + lane / 4;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; m++) {
#pragma unroll
            for (int n = 0; n < FRAGMENTS_N; n++) {
                const float* sum = sums[m][n];
                const int at = first_output + n * 8;
                store_outputs(arguments, first_token + m * 16, at, sum[0], sum[1]);
                store_outputs(arguments, first_token + m * 16 + 8, at, sum[2], sum[3]);
            }
        }
    }
};

#define GEMM_KERNEL(TILE_M, TILE_N, WARPS_M, WARPS_N, BYTES)                          \
    static_assert(Gemm<TILE_M, TILE_N, WARPS_M, WARPS_N>::SHARED_BYTES == BYTES, ""); \
    KERNEL(WARPS_M * WARPS_N * WARP, 1)                                               \
    gemm_##TILE_M##x##TILE_N(const Arguments arguments) {                             \
        Gemm<TILE_M, TILE_N, WARPS_M, WARPS_N>::run(arguments);                       \
    }
GEMM_VARIANTS(GEMM_KERNEL)
