// Weight-only product for a few tokens: 4-bit codes in small groups, zero points, statistics that may be codes
// themselves, and single outliers; y[m, n] = sum_k x[m, k] ((code[n, k] - zero) scale) + outliers.
//
// Bound by reading the weight once. A block takes 16 outputs at a time and its warps share k. In a chunk of 128 columns a
// lane has the 16 bytes of 32 neighbouring codes of two rows, so statistics are made once, by the lane that needs them;
// k of the tensor core stands for other columns in every lane, which the inputs' order (half.cuh) makes good. Weights
// are made in float16: c - 8 exactly, then one fused multiply-add. All sums are float32.
//
// A warp's next chunk is on its way to registers, from L2, into which the block has asked for its next 16 outputs. More
// chunks in registers would not help: a warp has six counters to wait with, and the compiler gives all loads the same.
#include "half.cuh"

constexpr int TOKENS = MQ_TOKENS;    // 1, 2, 4, 8 or 16: of a launch, at most
constexpr int GROUP = MQ_GROUP;      // columns that share statistics: 8, 16 or a multiple of 32
constexpr int KIND = MQ_KIND;        // 0: scales; 1: scales and zeros, both float16; 2: codes of both, and their grids
constexpr int TILE = MQ_TILE;        // rows, in tiles of 16, that share grids
constexpr bool SPARSE = MQ_SPARSE;   // there are outliers
constexpr bool HALF = MQ_HALF;       // results are float16, else bfloat16
constexpr int WARPS = MQ_WARPS;      // that share k
constexpr int BLOCKS = MQ_BLOCKS;    // of a multiprocessor, side by side

constexpr int THREADS = 32 * WARPS;
constexpr int TOKEN_TILES = (TOKENS + 7) / 8;
constexpr int GROUPS = GROUP >= 32 ? 1 : 32 / GROUP;            // of the 32 codes of a lane
constexpr int PAIRS = (GROUPS + 1) / 2;                         // of groups: statistics are made two by two
constexpr int OWN = KIND == 2 ? 1 : (KIND + 1) * PAIRS;         // words of statistics of a row,
constexpr int SHARED_GRIDS = KIND == 2 ? 2 * GROUPS : 1;        // and of those that a tile of rows shares
constexpr int OWN_STEP = KIND == 2 ? 1 : 2, OWN_BYTES = OWN_STEP * GROUPS;  // bytes of a group, and of a lane's
constexpr int SUMS = TOKENS * SUM_ROW;                          // words of the sums of a warp
constexpr int LANES = THREADS / 16;                             // threads that share the outliers of a row,
static_assert((LANES & LANES - 1) == 0 && LANES <= 32, "they add up by shuffles");
constexpr int EARLY = GROUP == 8 ? 2 : 3;                        // and outliers of a thread that are asked for early
constexpr u32 MAGIC = 0x64006400u;                              // 1024, 1024: or-ing a nibble adds it, or 16 times it

struct Piece {
    U4 codes[2];  // rows g and g + 8
    u32 own[2][OWN];
    u32 grids[SHARED_GRIDS];
};

// Scale and -scale * zero, twice each, of the groups of a row.
MQ_DEVICE void statistics_of(const u32 (&own)[OWN], const u32 (&grids)[SHARED_GRIDS], u32 (&scale)[2 * PAIRS],
                             u32 (&offset)[2 * PAIRS]) {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        u32 step, zero = 0;
        if constexpr (KIND == 2) {
            const int first = 4 * p, second = GROUPS == 1 ? 0 : 4 * p + 2;
            const u32 codes = __byte_perm(own[0], 0, p ? 0x4342 : 0x4140);  // a byte in each half
            const u32 low = subtract_pair(select_or(codes, 0x000F000F, MAGIC), MAGIC);
            const u32 high = multiply_add_pair(select_or(codes, 0x00F000F0, MAGIC), 0x2C002C00, 0xD400D400);  // / 16 - 64
            step = multiply_pair(low_halves(grids[first], grids[second]),
                                 subtract_pair(low, high_halves(grids[first], grids[second])));
            zero = multiply_pair(low_halves(grids[first + 1], grids[second + 1]),
                                 subtract_pair(high, high_halves(grids[first + 1], grids[second + 1])));
        } else {
            step = own[p];
            if constexpr (KIND == 1) zero = own[PAIRS + p];
        }
        const u32 product = KIND == 0 ? 0 : multiply_pair(step, zero ^ 0x80008000u);
        scale[2 * p] = low_halves(step, step), scale[2 * p + 1] = high_halves(step, step);
        offset[2 * p] = low_halves(product, product), offset[2 * p + 1] = high_halves(product, product);
    }
}

// Eight codes of a word as weights, in the pairs 0 4, 1 5, 2 6, 3 7.
MQ_DEVICE void weights_of(u32 (&to)[4], u32 word, u32 scale, u32 offset) {
#pragma unroll
    for (int i = 0; i < 4; i += 2, word >>= 8) {
        const u32 low = subtract_pair(select_or(word, 0x000F000F, MAGIC), 0x64086408);                    // - 1032
        const u32 high = multiply_add_pair(select_or(word, 0x00F000F0, MAGIC), 0x2C002C00, 0xD480D480);  // / 16 - 72
        to[i] = multiply_add_pair(low, scale, offset);
        to[i + 1] = multiply_add_pair(high, scale, offset);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
sparse_dense(const u8* codes, const u8* scales, const u8* zeros, const u8* grids, const i32* pointers,
             const u16* columns, const u16* values, const float* bias, const U4* image, const float* factors,
             const u16* natural, u16* result, int rows, int outputs, int width) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float backs[TOKENS];  // by which results are multiplied
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int chunks = (width + CHUNK - 1) / CHUNK, tiles = (outputs + 15) / 16;
    const u32 groups = static_cast<u32>(width) / GROUP;
    const int pitch = token_pitch(width);
    float* const buffers = reinterpret_cast<float*>(shared + TOKENS * pitch);  // two of [WARPS + 1][SUMS]

    // Past the end of the rows or columns the last ones are read: inputs there are 0, or outputs nobody's.
    Piece ahead = {};
    auto request = [&](int tile, int chunk) {
        const int column = min(chunk * CHUNK + t * 32, width - 32);
        const bool wanted = tile < tiles && chunk < chunks;
        const u32 first = tile * 16 + g, group = static_cast<u32>(column) / GROUP;  // the host sees to 32 bits
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const u32 row = min(first + r * 8, outputs - 1u), place = row * groups + group;
            load_stream_if(ahead.codes[r], codes + (row * (width / 2) + column / 2), wanted);
            load_constant<OWN_BYTES>(ahead.own[r], scales + place * OWN_STEP, wanted);
            if constexpr (KIND == 1) load_constant<OWN_BYTES>(ahead.own[r] + PAIRS, zeros + place * OWN_STEP, wanted);
        }
        if constexpr (KIND == 2)
            load_constant<8 * GROUPS>(ahead.grids, grids + (tile / u32(TILE) * groups + group) * 8, wanted);
    };
    auto prefetch = [&](int tile) {
        if (tile >= tiles) return;
        const u32 first = tile * 16, count = min(16, outputs - tile * 16);
        prefetch_lines(codes + first * (width / 2), count * (width / 2), threadIdx.x, THREADS);
        prefetch_lines(scales + first * groups * OWN_STEP, count * groups * OWN_STEP, threadIdx.x, THREADS);
        if constexpr (KIND == 1)
            prefetch_lines(zeros + first * groups * OWN_STEP, count * groups * OWN_STEP, threadIdx.x, THREADS);
        if constexpr (SPARSE) {
            const u32 later = min(first + 3 * 16 * gridDim.x, outputs - 1u);  // when they will be read
            prefetch_lines(pointers + later, 64, threadIdx.x, THREADS);
        }
        if constexpr (KIND == 2)
            prefetch_lines(grids + static_cast<u32>(tile) / TILE * groups * 8, groups * 8, threadIdx.x, THREADS);
    };
    request(blockIdx.x, warp);
    prefetch(blockIdx.x);

    // Outliers: LANES threads share a row. The first ones of a thread are requested a tile ahead; before that they come
    // into L2, since whoever waits for a chunk's codes waits for them, too.
    struct Stretch {
        u32 begin, end;
    };
    const int sparse_row = threadIdx.x / LANES, sparse_lane = threadIdx.x % LANES;
    auto stretch_of = [&](Stretch& to, int tile) {
        const int row = tile * 16 + sparse_row;
        to = {0, 0};
        load_constant<4>(&to.begin, pointers + row, row < outputs);
        load_constant<4>(&to.end, pointers + row + 1, row < outputs);
    };
    Stretch now = {}, next = {}, after = {};  // of this tile, and of those that follow
    u32 early_columns[EARLY] = {}, early_values[EARLY] = {};
    auto request_outliers = [&] {
#pragma unroll
        for (int i = 0; i < EARLY; ++i) {
            const u32 place = now.begin + sparse_lane + i * LANES;
            load_constant<2>(&early_columns[i], columns + place, place < now.end);
            load_constant<2>(&early_values[i], values + place, place < now.end);
        }
        prefetch_lines(columns + next.begin, (next.end - next.begin) * 2, sparse_lane, LANES);
        prefetch_lines(values + next.begin, (next.end - next.begin) * 2, sparse_lane, LANES);
    };
    if constexpr (SPARSE) {
        stretch_of(now, blockIdx.x);
        stretch_of(next, blockIdx.x + gridDim.x);
        stretch_of(after, blockIdx.x + 2 * gridDim.x);
    }
    if constexpr (SPARSE) request_outliers();
    prefetch(blockIdx.x + gridDim.x);

    overlap_launch();
    overlap_wait();
    for (int i = threadIdx.x; i < rows * pitch / 16; i += THREADS)
        copy_async<16>(shared_address(shared) + i * 16, image + i);
    if (static_cast<int>(threadIdx.x) < rows) backs[threadIdx.x] = factors[threadIdx.x];
    copies_wait();
    __syncthreads();

    int buffer = 0;
    u32 inputs[TOKEN_TILES];
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)  // tokens past the last repeat it; their sums are not read
        inputs[j] = shared_address(shared) + min(j * 8 + g, rows - 1) * pitch + t * 16;

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        if (tile != static_cast<int>(blockIdx.x)) prefetch(tile + gridDim.x);
        float sum[2][TOKEN_TILES][4] = {};
#pragma unroll 1
        for (int chunk = warp; chunk < chunks; chunk += WARPS) {
            const Piece piece = ahead;
            const bool ends = chunk + WARPS >= chunks;
            request(ends ? tile + gridDim.x : tile, ends ? warp : chunk + WARPS);
            u32 scale[2][2 * PAIRS], offset[2][2 * PAIRS];
#pragma unroll
            for (int r = 0; r < 2; ++r) statistics_of(piece.own[r], piece.grids, scale[r], offset[r]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int group = j * GROUPS / 4;
                u32 weights[2][4];
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    weights_of(weights[r], word_of(piece.codes[r], j), scale[r][group], offset[r][group]);
#pragma unroll
                for (int k = 0; k < TOKEN_TILES; ++k) {
                    u32 x[4];
                    load_shared<16>(x, inputs[k] + chunk * CHUNK_BYTES + j * PIECE_BYTES);
                    mma_f16(sum[0][k], weights[0][0], weights[1][0], weights[0][1], weights[1][1], x[0], x[1]);
                    mma_f16(sum[1][k], weights[0][2], weights[1][2], weights[0][3], weights[1][3], x[2], x[3]);
                }
            }
        }
        float* const sums = buffers + buffer * (WARPS + 1) * SUMS;
#pragma unroll
        for (int k = 0; k < TOKEN_TILES; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = k * 8 + t * 2 + i % 2, output = g + i / 2 * 8;
                if (token < TOKENS) sums[warp * SUMS + token * SUM_ROW + output] = sum[0][k][i] + sum[1][k][i];
            }
        if constexpr (SPARSE) {
            float own[TOKENS] = {};
            auto add = [&](u32 column, u32 entry) {
                const float value = f16_low(entry);
                if constexpr (TOKENS == 1) {
                    own[0] += value * f16_low(natural[column]);
                } else {
                    u32 x[(TOKENS + 1) / 2];
                    load_written<2 * TOKENS>(x, natural + static_cast<u64>(column) * TOKENS);
#pragma unroll
                    for (int k = 0; k < TOKENS / 2; ++k)
                        own[2 * k] += value * f16_low(x[k]), own[2 * k + 1] += value * f16_high(x[k]);
                }
            };
#pragma unroll
            for (int i = 0; i < EARLY; ++i)
                if (now.begin + sparse_lane + i * LANES < now.end) add(early_columns[i], early_values[i]);
            for (u32 place = now.begin + sparse_lane + EARLY * LANES; place < now.end; place += LANES) {
                u32 column = 0, value = 0;
                load_constant<2>(&column, columns + place), load_constant<2>(&value, values + place);
                add(column, value);
            }
            now = next, next = after;
            stretch_of(after, tile + 3 * gridDim.x);
            request_outliers();
#pragma unroll
            for (int k = 0; k < TOKENS; ++k) {
#pragma unroll
                for (int distance = LANES / 2; distance; distance /= 2)
                    own[k] += __shfl_xor_sync(0xFFFFFFFFu, own[k], distance);
                if (sparse_lane == 0) sums[WARPS * SUMS + k * SUM_ROW + sparse_row] = own[k];
            }
        }
        __syncthreads();  // two buffers: one barrier a tile is enough
        for (int e = threadIdx.x; e < rows * 16; e += THREADS) {
            const int token = e / 16, row = e % 16, output = tile * 16 + row;
            if (output >= outputs) continue;
            float total = 0.0f;
#pragma unroll
            for (int k = 0; k < WARPS + SPARSE; ++k) total += sums[k * SUMS + token * SUM_ROW + row];
            total *= backs[token];
            if (bias) total += bias[output];
            result[static_cast<u64>(token) * outputs + output] = static_cast<u16>(pack_16bit<HALF>(total, 0.0f));
        }
        buffer ^= 1;
    }
}
