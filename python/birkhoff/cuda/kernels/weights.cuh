// From codes to weights. A warp decodes one block of a strip: lane l has stream l / 16 of row l % 16,
// that is 16 weights. docs/format.md says where their bits lie.
//
// The constants of the variant (DTYPE, BITS, WINDOW_END, MULTIPLIER, CURVE, GROUP_SCALE, ...) are
// generated before this file by birkhoff/cuda/source.py.

static constexpr int WARP = 32;
static constexpr int STRIP = 16;    // rows of a strip
static constexpr int BLOCK = 32;    // columns of a block
static constexpr int STREAM = 16;   // weights of a stream in a block
static constexpr int GROUP = 128;   // columns that share a group exponent
static constexpr bool IS_INT8 = BITS == 8;
// Words of 32 bits that hold a row's codes in a block; a window may reach into the word before.
static constexpr int WORDS = IS_INT8 ? 8 : BITS + 1;

struct Arguments {
    const void* x;  // (tokens, in_features), rows x_stride elements apart; not read by decode
    const unsigned* codes;
    const unsigned short* row_scales;
    const unsigned char* group_exponents;
    const void* bias;  // (out_features) in the dtype of x, or null
    void* y;           // (tokens, out_features); for decode the weight, (out_features, in_features)
    long long x_stride;
    int tokens, out_features, in_features;
    int aligned;  // whether rows (of x; for decode, of y) may be moved 16 bytes at a time
};

// Shared memory starts with the tables. The curve stands there once for each lane of a warp, a row
// of 128 bytes for each place, so that look-ups of a warp meet 32 different banks.
static constexpr int CURVE_BYTES = 256 * WARP * 4;
static constexpr int TABLE_BYTES = CURVE_BYTES + 128;  // group scales, padded

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

DEVICE void fill_tables(int threads) {
    char* shared = shared_memory();
    for (int i = thread_index(); i < CURVE_BYTES / 16 && !IS_INT8; i += threads) {
        unsigned value = float_to_bits((float)CURVE[i / 8]);
        ((Vector*)shared)[i] = Vector{value, value, value, value};
    }
    if (thread_index() < 16) {
        ((float*)(shared + CURVE_BYTES))[thread_index()] = GROUP_SCALE[thread_index()];
    }
}

// Where a lane finds the codes of its row.
struct Row {
    const unsigned* words;
    const unsigned char* exponents;
    float scale;
    int blocks;

    Row() = default;

    DEVICE Row(const Arguments& arguments, int strip, int row) {
        blocks = ceil_div(arguments.in_features, BLOCK);
        int groups = ceil_div(arguments.in_features, GROUP);
        words = arguments.codes + (long long)strip * blocks * (BITS * STRIP) + row;
        exponents = arguments.group_exponents + (long long)strip * groups * 8 + row % 8;
        scale = bits_to_float((unsigned)arguments.row_scales[strip * STRIP + row] << 16);
    }
};

// The codes of a row in a block, and its group exponent beside that of another row.
struct Codes {
    unsigned word[WORDS];
    unsigned exponents;

    DEVICE void load(const Row& row, int block) {
        const unsigned* words = row.words + block * (BITS * STRIP);
        if constexpr (IS_INT8) {
#pragma unroll
            for (int i = 0; i < WORDS; i++) word[i] = words[i * STRIP];
        } else {
            // The streams are closed: before their first word comes their last.
            int before = (block == 0 ? row.blocks : block) - 1;
            word[0] = row.words[(before * BITS + BITS - 1) * STRIP];
#pragma unroll
            for (int i = 1; i < WORDS; i++) word[i] = words[(i - 1) * STRIP];
        }
        exponents = row.exponents[block / (GROUP / BLOCK) * 8];
    }

    DEVICE float scale(float row_scale, int row) const {
        unsigned exponent = exponents >> row / 8 * 4 & 15;
        return row_scale * ((const float*)(shared_memory() + CURVE_BYTES))[exponent];
    }

    // The values of a stream, before scaling; `columns` of them lie in the matrix, the others are 0.
    DEVICE void decode(float value[STREAM], int stream, int columns) const {
        if constexpr (IS_INT8) {
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                unsigned biased = word[i] ^ 0x80808080u;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    // 0x4b000000 | b is 2^23 + b as a float.
                    unsigned bits = byte_permute(biased, 0x4b000000u, 0x7440u + 2 * stream + j);
                    value[2 * i + j] = bits_to_float(bits) - 8388736.0f;
                }
            }
        } else {
            const char* shared = shared_memory();
            unsigned lane_offset = thread_index() % WARP * 4;
            unsigned selector = stream == 0 ? 0x5410u : 0x7632u;
            unsigned pair[BITS];  // a word of the stream, below the one before it
#pragma unroll
            for (int i = 0; i < BITS; i++) pair[i] = byte_permute(word[i + 1], word[i], selector);
#pragma unroll
            for (int i = 0; i < STREAM; i++) {
                int index = (WINDOW_END[i] - 1) / 16, shift = 16 * (index + 1) - WINDOW_END[i];
                // All multipliers are even. Half of one puts the place to bits 7 to 14, where it is
                // the offset of its row of 128 bytes.
                unsigned place = (pair[index] >> shift) * (MULTIPLIER[i] / 2) & 0x7f80u;
                value[i] = *(const float*)(shared + (place | lane_offset));
            }
        }
        if (columns < STREAM) {
#pragma unroll
            for (int i = 0; i < STREAM; i++) value[i] = i < columns ? value[i] : 0.0f;
        }
    }
};

// Two values rounded to the dtype of x, which has 16 bits.
DEVICE unsigned pack(float low, float high) {
    return DTYPE == F16 ? pack_f16(low, high) : pack_bf16(low, high);
}

// An element of a 16-bit dtype as float32.
DEVICE float unpack(unsigned short bits) {
    return DTYPE == F16 ? f16_to_float(bits) : bits_to_float((unsigned)bits << 16);
}

DEVICE float read(const void* data, long long index) {
    if constexpr (DTYPE == F32) return ((const float*)data)[index];
    return unpack(((const unsigned short*)data)[index]);
}

DEVICE void write(void* data, long long index, float value) {
    if constexpr (DTYPE == F32) {
        ((float*)data)[index] = value;
    } else {
        ((unsigned short*)data)[index] = (unsigned short)pack(value, 0.0f);
    }
}
