// Weight-only product for a few tokens: one part of a weight in codebooks. A vector of VECTOR outputs at one column is
// the entry of a book (with a residual book: the sum of two), and indices lie in one stream of bits, row by row.
//
// Bound by looking entries up. A block takes 16 rows of indices at a time (16 VECTOR outputs); its warps, and the blocks
// of a cluster, share the columns. In a chunk of 128 columns a lane looks up the 32 neighbouring indices of two rows, and
// the i-th values of what it found are its operands of the i-th tensor core product, whose 16 rows are the outputs
// v VECTOR + i. Inputs are those of half.cuh. Books lie in shared memory in COPIES, of which every lane has its own
// banks if there are enough of them; books that do not fit are read through L1 and L2.
#include "half.cuh"

constexpr int TOKENS = MQ_TOKENS;        // 1, 2, 4 or 8: of a launch, at most
constexpr int VECTOR = MQ_VECTOR;        // an even number of values
constexpr int BITS = MQ_BITS;            // of an index,
constexpr int RESIDUAL = MQ_RESIDUAL;    // and of a residual index behind it, or 0; a multiple of 4 together
constexpr int ENTRIES = MQ_ENTRIES;      // of all books
constexpr int OF_GROUP = MQ_OF_GROUP;    // of them, entries that a group of columns has
constexpr int COPIES = MQ_COPIES;        // of the books in shared memory; 0: they stay in global memory
constexpr int CLUSTER = MQ_CLUSTER;      // blocks that share the columns
constexpr int WARPS = MQ_WARPS;
constexpr bool HALF = MQ_HALF;           // results are float16, else bfloat16

constexpr int THREADS = 32 * WARPS;
constexpr int SLOTS = COPIES > 0 ? COPIES : 1;
constexpr int SYMBOL = BITS + RESIDUAL;
constexpr int WORDS = SYMBOL;                            // of the 32 indices of a lane
constexpr int VALUES = VECTOR / 2;                       // words of an entry,
constexpr int ROOM = VALUES <= 1 ? 4 : VALUES <= 2 ? 8 : (VALUES + 3) / 4 * 16;  // and bytes in shared memory
constexpr int OUTPUTS = 16 * VECTOR;                     // of a tile
constexpr int SUMS = VECTOR * TOKENS * SUM_ROW;          // words of the sums of a warp
constexpr int PLAIN = VECTOR % 8 == 0 ? 16 : VECTOR % 4 == 0 ? 8 : 4;  // bytes of an access to a book as it is stored

extern "C" __global__ void __launch_bounds__(THREADS, 1)
codebook(const u8* indices, const u8* book, const float* bias, const U4* image, const float* factors,
         const float* before, float* sums_out, u16* result, int rows, int outputs, int columns, int first_column,
         int width, int group_columns) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int vectors = (outputs + VECTOR - 1) / VECTOR, tiles = (vectors + 15) / 16;
    const int chunks = (columns + CHUNK - 1) / CHUNK;
    const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
    const int begin = chunks * rank / CLUSTER, end = chunks * (rank + 1) / CLUSTER;
    const int stride = gridDim.x / CLUSTER, pitch = token_pitch(width);
    float* const sums = reinterpret_cast<float*>(shared + ENTRIES * ROOM * COPIES);   // [WARPS][VECTOR][TOKENS][SUM_ROW]
    float* const shares = sums + WARPS * SUMS;                                        // two of [TOKENS][OUTPUTS]

    // Indices are asked for a chunk ahead, but only as far as L2: registers are needed for sums and entries.
    auto source = [&](int tile, int r, int column) {
        return indices + (static_cast<u64>(tile * 16 + g + r * 8) * columns + column) * SYMBOL / 8;
    };
    auto request = [&](int tile, int chunk) {
        const int column = chunk * CHUNK + t * 32;
        if (tile >= tiles || chunk >= end || column >= columns) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (tile * 16 + g + r * 8 >= vectors) continue;
#pragma unroll
            for (int i = 0; i < WORDS; i += 8)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(source(tile, r, column) + 4 * i));
        }
    };
    request(blockIdx.x / CLUSTER, begin + warp);

    if constexpr (COPIES > 0) {
        for (int i = threadIdx.x; i < ENTRIES * SLOTS; i += THREADS) {
            u32 entry[ROOM / 4] = {};
#pragma unroll
            for (int k = 0; k < 2 * VECTOR / PLAIN; ++k)
                load_constant<PLAIN>(entry + k * (PLAIN / 4), book + static_cast<u64>(i / SLOTS) * 2 * VECTOR + k * PLAIN);
            u32* const to = reinterpret_cast<u32*>(shared + i * ROOM);
#pragma unroll
            for (int k = 0; k < ROOM / 4; ++k) to[k] = entry[k];
        }
    }
    overlap_launch();
    overlap_wait();
    __syncthreads();

    const u32 own_copy = shared_address(shared) + lane % SLOTS * ROOM;
    auto look_up = [&](u32 (&to)[VALUES], int entry) {
        if constexpr (COPIES > 0) {
            u32 found[ROOM / 4];
            load_shared<ROOM>(found, own_copy + entry * (COPIES * ROOM));
#pragma unroll
            for (int k = 0; k < VALUES; ++k) to[k] = found[k];
        } else {
#pragma unroll
            for (int k = 0; k < 2 * VECTOR / PLAIN; ++k)
                load_constant<PLAIN>(to + k * (PLAIN / 4), book + static_cast<u64>(entry) * 2 * VECTOR + k * PLAIN);
        }
    };
    const u8* inputs = reinterpret_cast<const u8*>(image) + static_cast<u64>(min(g, rows - 1)) * pitch + t * 16;

    int buffer = 0;
    for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += stride) {
        float sum[VECTOR][4] = {};
        for (int chunk = begin + warp; chunk < end; chunk += WARPS) {
            const int column = chunk * CHUNK + t * 32;
            u32 words[2][WORDS] = {};  // past the end: entry 0, times inputs of 0
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (column >= columns || tile * 16 + g + r * 8 >= vectors) continue;
                const u8* const from = source(tile, r, column);
#pragma unroll
                for (int i = 0; i < WORDS; i += 4) {
                    const U4 four = load_stream(from + 4 * i);
                    words[r][i] = four.x, words[r][i + 1] = four.y;
                    words[r][i + 2] = four.z, words[r][i + 3] = four.w;
                }
            }
            const bool ends = chunk + WARPS >= end;
            request(ends ? tile + stride : tile, ends ? begin + warp : chunk + WARPS);
            const int base = OF_GROUP == ENTRIES ? 0 : min(column, columns - 1) / group_columns * OF_GROUP;
            // Not unrolled: the eight indices at hand are always the first ones, or registers would not suffice.
#pragma unroll 1
            for (int j = 0; j < 4; ++j) {
                u32 x[4] = {};
                // A part may begin inside a chunk of the inputs, at a multiple of 32 columns.
                const int place = first_column + column + j * 8;
                const int piece = place % 32 / 8, four = place % CHUNK / 32;
                if (column < columns)
                    load_written<16>(x, inputs + place / CHUNK * CHUNK_BYTES + piece * PIECE_BYTES + (four - t) * 16);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    u32 found[2][4][VALUES];  // row, and columns n, n + 4, n + 1, n + 5 with n = 2 half
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            const int bit = (half * 2 + k / 2 + k % 2 * 4) * SYMBOL;
                            const int word = bit / 32, shift = bit % 32;
                            u32 symbol = words[r][word] >> shift;
                            if (shift + SYMBOL > 32)
                                symbol = __funnelshift_r(words[r][word], words[r][min(word + 1, WORDS - 1)], shift);
                            look_up(found[r][k], base + static_cast<int>(symbol & (1u << BITS) - 1));
                            if constexpr (RESIDUAL > 0) {
                                u32 more[VALUES];
                                const int second = static_cast<int>(symbol >> BITS & (1u << RESIDUAL) - 1);
                                look_up(more, base + (1 << BITS) + second);
#pragma unroll
                                for (int i = 0; i < VALUES; ++i) found[r][k][i] = add_pair(found[r][k][i], more[i]);
                            }
                        }
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) {
                        auto pair = [&](int r, int k) {
                            const u32 a = found[r][k][i / 2], b = found[r][k + 1][i / 2];
                            return i % 2 ? high_halves(a, b) : low_halves(a, b);
                        };
                        mma_f16(sum[i], pair(0, 0), pair(1, 0), pair(0, 2), pair(1, 2), x[2 * half], x[2 * half + 1]);
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int i = 0; i < WORDS - SYMBOL / 4; ++i) words[r][i] = words[r][i + SYMBOL / 4];
            }
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int token = t * 2 + k % 2;
                if (token < TOKENS) sums[warp * SUMS + (i * TOKENS + token) * SUM_ROW + g + k / 2 * 8] = sum[i][k];
            }
        __syncthreads();
        auto finish = [&](int token, int own, float total) {
            const int output = tile * OUTPUTS + own;
            if (output >= outputs) return;
            const u64 at = static_cast<u64>(token) * outputs + output;
            total *= factors[token];
            if (before) total += before[at];
            if (bias) total += bias[output];
            if (sums_out)
                sums_out[at] = total;
            else
                result[at] = static_cast<u16>(pack_16bit<HALF>(total, 0.0f));
        };
        float* const share = shares + buffer * TOKENS * OUTPUTS;
        for (int e = threadIdx.x; e < rows * OUTPUTS; e += THREADS) {
            const int token = e / OUTPUTS, own = e % OUTPUTS;
            float total = 0.0f;
#pragma unroll
            for (int k = 0; k < WARPS; ++k)
                total += sums[k * SUMS + (own % VECTOR * TOKENS + token) * SUM_ROW + own / VECTOR];
            if constexpr (CLUSTER == 1)
                finish(token, own, total);
            else
                share[e] = total;
        }
        if constexpr (CLUSTER > 1) {
            cluster_sync();  // also keeps the next tile's sums from being written too early
            for (int e = rank * THREADS + threadIdx.x; e < rows * OUTPUTS; e += THREADS * CLUSTER) {
                float parts[CLUSTER], total = 0.0f;
#pragma unroll
                for (int k = 0; k < CLUSTER; ++k) parts[k] = cluster_load_f32(cluster_address(shared_address(share + e), k));
#pragma unroll
                for (int k = 0; k < CLUSTER; ++k) total += parts[k];
                finish(e / OUTPUTS, e % OUTPUTS, total);
            }
            buffer ^= 1;
        } else {
            __syncthreads();
        }
    }
    if constexpr (CLUSTER > 1) cluster_sync();  // nobody leaves while others read its sums
}
