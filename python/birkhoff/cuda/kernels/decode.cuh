// Writes the decoded weight, rounded to DTYPE: (out_features, in_features). A thread block decodes
// a strip.

static constexpr int DECODE_WARPS = 8;

// 16 weights of a row from `column` on; `columns` of them lie in the matrix.
DEVICE void store_weights(
    const Arguments& arguments, int row, int column, const float weight[STREAM], int columns
) {
    long long start = (long long)row * arguments.in_features + column;
    if (!arguments.aligned || columns < STREAM) {
#pragma unroll
        for (int i = 0; i < STREAM; i++) {
            if (i < columns) write(arguments.y, start + i, weight[i]);
        }
    } else if constexpr (DTYPE == F32) {
        Vector* out = (Vector*)((float*)arguments.y + start);
#pragma unroll
        for (int i = 0; i < STREAM / 4; i++) {
            const float* w = weight + 4 * i;
            out[i] = Vector{
                float_to_bits(w[0]), float_to_bits(w[1]), float_to_bits(w[2]), float_to_bits(w[3])
            };
        }
    } else {
        Vector* out = (Vector*)((unsigned short*)arguments.y + start);
#pragma unroll
        for (int i = 0; i < STREAM / 8; i++) {
            const float* w = weight + 8 * i;
            out[i] = Vector{pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7])};
        }
    }
}

KERNEL(DECODE_WARPS * WARP, 4) decode(const Arguments arguments) {
    const int lane = thread_index() % WARP, warp = thread_index() / WARP;
    const int strip = block_index_x(), row = lane % STRIP, stream = lane / STRIP;
    fill_tables(DECODE_WARPS * WARP);
    sync_block();
    const Row codes_of_row(arguments, strip, row);
    for (int block = warp; block < codes_of_row.blocks; block += DECODE_WARPS) {
        Codes codes;
        codes.load(codes_of_row, block);
        const int column = block * BLOCK + stream * STREAM;
        const int columns = arguments.in_features - column;
        float weight[STREAM];
        codes.decode(weight, stream, columns);
        const float scale = codes.scale(codes_of_row.scale, row);
#pragma unroll
        for (int i = 0; i < STREAM; i++) weight[i] *= scale;
        if (strip * STRIP + row < arguments.out_features) {
            store_weights(arguments, strip * STRIP + row, column, weight, columns);
        }
    }
}
