// y = x W^T + bias for few tokens. A thread block has a strip of W; its warps share out the blocks
// of columns and add up at the end. Nothing of W but its codes leaves the registers.

static constexpr int GEMV_WARPS = 8;

template <int TOKENS>
struct Gemv {
    // Behind the tables: for each warp, the 32 columns of x that it is at.
    static constexpr int X_BYTES = TOKENS * BLOCK * 4;
    static constexpr int SHARED_BYTES = TABLE_BYTES + GEMV_WARPS * X_BYTES;

    // The weights as F.linear would see them: rounded to the dtype of x.
    static DEVICE void scale_and_round(float weight[STREAM], float scale) {
#pragma unroll
        for (int i = 0; i < STREAM; i += 2) {
            weight[i] *= scale;
            weight[i + 1] *= scale;
            if constexpr (DTYPE != F32) {
                unsigned packed = pack(weight[i], weight[i + 1]);
                weight[i] = unpack((unsigned short)packed);
                weight[i + 1] = unpack((unsigned short)(packed >> 16));
            }
        }
    }

    static DEVICE void run(const Arguments& arguments) {
        const int lane = thread_index() % WARP, warp = thread_index() / WARP;
        const int strip = block_index_x(), row = lane % STRIP, stream = lane / STRIP;
        char* shared = shared_memory();
        float(*x)[BLOCK] = (float(*)[BLOCK])(shared + TABLE_BYTES + warp * X_BYTES);
        fill_tables(GEMV_WARPS * WARP);
        sync_block();

        const Row codes_of_row(arguments, strip, row);
        float sum[TOKENS], next_x[TOKENS];
        Codes next_codes;
        const auto load = [&](int block) {
            next_codes.load(codes_of_row, block);
            const int column = block * BLOCK + lane;
#pragma unroll
            for (int token = 0; token < TOKENS; token++) {
                const bool inside = token < arguments.tokens && column < arguments.in_features;
                next_x[token] =
                    inside ? read(arguments.x, token * arguments.x_stride + column) : 0.0f;
            }
        };
#pragma unroll
        for (int token = 0; token < TOKENS; token++) sum[token] = 0.0f;
        if (warp < codes_of_row.blocks) load(warp);
        for (int block = warp; block < codes_of_row.blocks; block += GEMV_WARPS) {
            const Codes codes = next_codes;
#pragma unroll
            for (int token = 0; token < TOKENS; token++) x[token][lane] = next_x[token];
            sync_warp();
            if (block + GEMV_WARPS < codes_of_row.blocks) load(block + GEMV_WARPS);
            float weight[STREAM];
            codes.decode(weight, stream, arguments.in_features - block * BLOCK - stream * STREAM);
            scale_and_round(weight, codes.scale(codes_of_row.scale, row));
#pragma unroll
            for (int token = 0; token < TOKENS; token++) {
#pragma unroll
                for (int i = 0; i < STREAM; i += 4) {
                    const Vector four = *(const Vector*)&x[token][stream * STREAM + i];
                    sum[token] += bits_to_float(four.x) * weight[i];
                    sum[token] += bits_to_float(four.y) * weight[i + 1];
                    sum[token] += bits_to_float(four.z) * weight[i + 2];
                    sum[token] += bits_to_float(four.w) * weight[i + 3];
                }
            }
            sync_warp();
        }

        // The sums of both streams, then those of all warps, in the place of x.
        sync_block();
        float* sums = (float*)(shared + TABLE_BYTES);
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            sum[token] += shuffle_xor(sum[token], STRIP);
            if (stream == 0) sums[(warp * TOKENS + token) * STRIP + row] = sum[token];
        }
        sync_block();
        const int token = thread_index() / STRIP, output = strip * STRIP + row;
        if (token < TOKENS && token < arguments.tokens && output < arguments.out_features) {
            float total = arguments.bias == nullptr ? 0.0f : read(arguments.bias, output);
            for (int i = 0; i < GEMV_WARPS; i++) total += sums[(i * TOKENS + token) * STRIP + row];
            write(arguments.y, (long long)token * arguments.out_features + output, total);
        }
    }
};

#define GEMV_KERNEL(TOKENS, BYTES)                                          \
    static_assert(Gemv<TOKENS>::SHARED_BYTES == BYTES, "");                 \
    KERNEL(GEMV_WARPS * WARP, 1) gemv_##TOKENS(const Arguments arguments) { \
        Gemv<TOKENS>::run(arguments);                                       \
    }
GEMV_VARIANTS(GEMV_KERNEL)
