// Weight-only product for a few tokens: one part of a weight in codebooks. A vector of VECTOR outputs at one column is
// the entry of a book (with a residual book: the sum of two), and indices lie in one stream of bits, row by row.
//
// Bound by looking entries up: a multiprocessor has 128 bytes a clock from its shared memory. A cluster has tiles of 16
// rows of indices (16 VECTOR outputs). Its blocks share the columns, and the warps of a block share units of columns of
// all tiles of a batch; what they found is added up once a batch. A lane has LANE neighbouring columns of two rows.
//
// A word of an entry, two values of one column, is an operand of the tensor core as it was found: k 2t and 2t + 1 are
// these values, not two columns. Inputs tell them apart: of the two n that a token has, one gets (x, 0), the other
// (0, x), so that they sum the first and the second values. Rows g and g + 8 are a word and the next one of the entry.
//
// Books lie in shared memory in COPIES, of which every lane has its own banks if there are enough of them; books that
// do not fit are read through L1 and L2. Inputs are those of half.cuh: made here from x if FUSED, else by arrange.cu.
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
constexpr bool FUSED = MQ_FUSED;         // inputs are made here
constexpr bool ORDERED = MQ_ORDERED;     // and stored columns have an order of their own
constexpr bool HALF = MQ_HALF;           // x and results are float16, else bfloat16

constexpr int THREADS = 32 * WARPS;
constexpr int SLOTS = COPIES > 0 ? COPIES : 1;           // and lanes that begin apart
constexpr int SYMBOL = BITS + RESIDUAL;
constexpr int LANE = SYMBOL % 8 ? 32 : SYMBOL % 16 ? 16 : 8;  // columns of a lane: 16 bytes of indices, or more
constexpr int UNIT = 4 * LANE;                           // columns of a warp
constexpr int WORDS = LANE * SYMBOL / 32;                // of a lane's indices of a row
constexpr int VALUES = VECTOR / 2;                       // words of an entry,
constexpr int PAIRS = VALUES / 2, LAST = VALUES - 1;        // pairs of words, and a word that may be left over
constexpr int EACH = PAIRS > 0 ? PAIRS : 1;
constexpr int ROOM = VALUES <= 1 ? 4 : VALUES <= 2 ? 8 : VALUES <= 4 ? 16 : 32;  // and bytes in shared memory
constexpr int OUTPUTS = 16 * VECTOR;                     // of a tile
constexpr int SUMS = TOKENS * OUTPUTS;                   // of a warp and a tile
constexpr int TOKEN_TILES = (2 * TOKENS + 7) / 8;
constexpr int PLAIN = VECTOR % 8 == 0 ? 16 : VECTOR % 4 == 0 ? 8 : 4;  // bytes of an access to a book as it is stored

// Where an index is a byte, entries of books of 256 stand 256 bytes apart: one instruction makes an offset of it.
constexpr bool BYTES = BITS == 8 && RESIDUAL % 8 == 0 && OF_GROUP == ENTRIES && COPIES > 0;
constexpr int STRIDE = BYTES ? 256 : COPIES > 0 ? COPIES * ROOM : 1;   // bytes from an entry to the next,
constexpr int SECOND = BYTES ? COPIES * ROOM : (1 << BITS) * STRIDE;   // to the first residual one,
constexpr int BOOKS = BYTES ? 256 * STRIDE : ENTRIES * COPIES * ROOM;  // and of all books; numbers without copies
static_assert(!BYTES || (RESIDUAL ? 2 : 1) * COPIES * ROOM <= STRIDE, "copies fit between entries");

static __device__ constexpr int logarithm(int of) { return of > 1 ? 1 + logarithm(of / 2) : 0; }
constexpr int PLACE = logarithm(STRIDE);  // bits below an entry's number in its offset

struct alignas(ROOM < 16 ? ROOM : 16) Entry {
    u32 word[ROOM / 4];
};

// Offset of an entry in the copy at `copy`, or its number if there are no copies: COUNT bits of the n-th symbol of a
// lane, from the FROM-th on.
template <int FROM, int COUNT>
MQ_DEVICE u32 offset_of(const u32 (&words)[WORDS], int n, u32 copy) {
    const int first = n * SYMBOL + FROM, word = first / 32, bit = first % 32, shift = bit - PLACE;
    if constexpr (BYTES) return __byte_perm(words[word], copy, 0x5504 | bit / 8 << 4);
    u32 moved;
    if (bit + COUNT > 32)
        moved = __funnelshift_r(words[word], words[min(word + 1, WORDS - 1)], shift);  // indices are short: shift > 0
    else
        moved = shift > 0 ? words[word] >> shift : words[word] << -shift;
    return moved & ((1u << COUNT) - 1) << PLACE | copy;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
codebook(const u8* indices, const u8* book, const u16* order, const float* bias, const u16* x, const U4* image,
         const float* factors, const float* before, float* sums_out, u16* result, int rows, int outputs, int columns,
         int first_column, int width, int group_columns, int slots) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 most[TOKENS][WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int vectors = (outputs + VECTOR - 1) / VECTOR, tiles = (vectors + 15) / 16;
    const int all_units = (columns + UNIT - 1) / UNIT;
    const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
    const int start = all_units * rank / CLUSTER, units = all_units * (rank + 1) / CLUSTER - start;  // of this block
    const int clusters = gridDim.x / CLUSTER, first_tile = blockIdx.x / CLUSTER;
    const int count = (tiles - first_tile + clusters - 1) / clusters;  // tiles first_tile + k clusters
    const int own_columns = units * UNIT, own_pieces = own_columns / 8;
    const int most_columns = (all_units + CLUSTER - 1) / CLUSTER * UNIT;  // of any block

    // Shared memory: books; inputs; order; then x as it is, and sums in its place [slots][WARPS][TOKENS][OUTPUTS].
    u8* const inputs = shared + BOOKS;
    u8* const numbers = inputs + (FUSED ? TOKENS * 2 * most_columns : 0);
    u8* const raw = numbers + (FUSED && ORDERED ? 2 * most_columns : 0);
    float* const sums = reinterpret_cast<float*>(raw);

    // What this warp has: of the batches' tiles, one after the other, every WARPS-th unit.
    int k = 0, unit = warp;
    auto settle = [&] {
        while (unit >= units) unit -= units, ++k;
    };
    settle();
    u32 next[2][WORDS] = {};
    auto request = [&] {
        const int column = (start + unit) * UNIT + t * LANE;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = (first_tile + k * clusters) * 16 + g + r * 8;
            if (k >= count || row >= vectors || column >= columns) continue;  // any index will do: inputs there are 0
            const u8* const from = indices + (static_cast<u64>(row) * columns + column) * SYMBOL / 8;
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                const U4 four = load_stream(from + 4 * i);
                next[r][i] = four.x, next[r][i + 1] = four.y, next[r][i + 2] = four.z, next[r][i + 3] = four.w;
            }
        }
    };
    request();
    // The rest comes into L2 a batch ahead.
    auto prefetch = [&](int begin, int end) {
        constexpr int LINE = 128;
        const int bytes = min(own_columns, columns - start * UNIT) * SYMBOL / 8, lines = (bytes + LINE - 1) / LINE;
        for (int i = threadIdx.x; i < (min(end, count) - begin) * 16 * lines; i += THREADS) {
            const int line = i % lines, row = (first_tile + (begin + i / lines / 16) * clusters) * 16 + i / lines % 16;
            if (row >= vectors) continue;
            const u8* const from = indices + (static_cast<u64>(row) * columns + start * UNIT) * SYMBOL / 8;
            prefetch_lines(from, bytes, line, lines);
        }
    };
    prefetch(0, slots);

    if constexpr (COPIES > 0)
        for (int i = threadIdx.x; i < ENTRIES * SLOTS; i += THREADS) {
            const int entry = i / SLOTS, second = BYTES && entry >= 256 ? entry - 256 : -1;
            const int place = second < 0 ? entry * STRIDE : SECOND + second * STRIDE;
#pragma unroll
            for (int j = 0; j < 2 * VECTOR / PLAIN; ++j)
                copy_async<PLAIN>(shared_address(shared) + place + i % SLOTS * ROOM + j * PLAIN,
                                  book + static_cast<u64>(entry) * 2 * VECTOR + j * PLAIN);
        }
    if constexpr (FUSED && ORDERED)
        for (int i = threadIdx.x; i < own_pieces; i += THREADS)
            if ((start * UNIT + i * 8) < columns)
                copy_async<16>(shared_address(numbers) + i * 16, order + first_column + start * UNIT + i * 8);
    overlap_launch();
    overlap_wait();

    float own_factor[TOKENS];  // by which results are multiplied
    if constexpr (FUSED)
        for (int i = threadIdx.x; i < rows * width / 8; i += THREADS)
            copy_async<16>(shared_address(raw) + i * 16, x + i * 8);
    copies_wait();
    __syncthreads();
    if constexpr (FUSED) {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            const U4* const from = reinterpret_cast<const U4*>(raw) + token * width / 8;
            u32 largest = 0;
            for (int i = threadIdx.x; token < rows && i < width / 8; i += THREADS)
                largest = max(largest, largest_of(from[i]));
            largest = __reduce_max_sync(0xFFFFFFFFu, largest);
            if (lane == 0) most[token][warp] = largest;
        }
        __syncthreads();
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            const Scale scale = scale_for<HALF>(__reduce_max_sync(0xFFFFFFFFu, most[token][lane % WARPS]));
            own_factor[token] = scale.back;
            const u16* const from = reinterpret_cast<const u16*>(raw) + token * width;
            for (int i = threadIdx.x; token < rows && i < own_pieces; i += THREADS) {
                const int column = start * UNIT + i * 8;
                U4 piece = {};
                if (column < columns) {
                    U4 number = {};
                    if constexpr (ORDERED) number = reinterpret_cast<const U4*>(numbers)[i];
                    piece = arranged<HALF, ORDERED>(from, number, first_column + column, scale.factor);
                }
                reinterpret_cast<U4*>(inputs)[token * (most_columns / 8) + i] = piece;
            }
        }
        __syncthreads();
    } else {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) own_factor[token] = token < rows ? factors[token] : 0.0f;
    }

    const u32 own_copy = COPIES > 0 ? lane % SLOTS * ROOM : 0;
    auto look_up = [&](u32 (&to)[VALUES], u32 offset, int base) {
        if constexpr (COPIES > 0) {
            const Entry found = *reinterpret_cast<const Entry*>(shared + base + offset);
#pragma unroll
            for (int i = 0; i < VALUES; ++i) to[i] = found.word[i];
        } else {
#pragma unroll
            for (int i = 0; i < 2 * VECTOR / PLAIN; ++i) {
                const u8* const from = book + static_cast<u64>(base + offset) * 2 * VECTOR + i * PLAIN;
                load_constant<PLAIN>(to + i * (PLAIN / 4), from);
            }
        }
    };
    const u32 low = g % 2 ? 0x1044 : 0x4410, high = g % 2 ? 0x3244 : 0x4432;  // (0, x) or (x, 0) of a pair's halves

    for (int batch = 0; batch < count; batch += slots) {
        const int end = min(batch + slots, count);
        prefetch(end, end + slots);
        float sum[TOKEN_TILES][VALUES][4] = {};
        while (k < end) {
            u32 words[2][WORDS];
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int i = 0; i < WORDS; ++i) words[r][i] = next[r][i];
            const int tile = k, first = unit * UNIT + t * LANE, column = start * UNIT + first;
            unit += WARPS;
            settle();
            request();
            const int group = OF_GROUP == ENTRIES ? 0 : min(column, columns - 1) / group_columns;
            const int base = group * OF_GROUP * STRIDE;
#pragma unroll
            for (int j = 0; j < LANE / 8; ++j) {
                U4 pieces[TOKEN_TILES] = {};
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n) {
                    const int token = min(n * 4 + g / 2, rows - 1);
                    if constexpr (FUSED) {
                        pieces[n] = reinterpret_cast<const U4*>(inputs)[(token * most_columns + first) / 8 + j];
                    } else if (column < columns) {
                        // A part may begin inside a chunk of the inputs, at a multiple of 32 columns.
                        const int piece = (first_column + column) / 8 + j;
                        const int place = piece / 16 * 16 + piece % 4 * 4 + piece % 16 / 4;
                        pieces[n] = image[token * (token_pitch(width) / 16) + place];
                    }
                }
#pragma unroll
                for (int m = 0; m < 4; ++m) {  // columns m and m + 4
                    u32 found[2][2][VALUES];
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            const int number = j * 8 + c * 4 + m;
                            look_up(found[r][c], offset_of<0, BITS>(words[r], number, own_copy), base);
                            if constexpr (RESIDUAL > 0) {
                                u32 more[VALUES];
                                look_up(more, offset_of<BITS, RESIDUAL>(words[r], number, own_copy), base + SECOND);
#pragma unroll
                                for (int i = 0; i < VALUES; ++i) found[r][c][i] = add_pair(found[r][c][i], more[i]);
                            }
                        }
#pragma unroll
                    for (int n = 0; n < TOKEN_TILES; ++n) {
                        const u32 both = word_of(pieces[n], m);
                        const u32 b0 = __byte_perm(both, 0, low), b1 = __byte_perm(both, 0, high);
#pragma unroll
                        for (int r = 0; r < 2; ++r)
#pragma unroll
                            for (int i = 0; i < PAIRS; ++i)  // rows of the tensor core: a word, and the next one
                                mma_f16(sum[n][r * PAIRS + i], found[r][0][2 * i], found[r][0][2 * i + 1],
                                        found[r][1][2 * i], found[r][1][2 * i + 1], b0, b1);
                        if constexpr (VALUES % 2)  // rows of the tensor core: those of indices
                            mma_f16(sum[n][LAST], found[0][0][LAST], found[1][0][LAST], found[0][1][LAST],
                                    found[1][1][LAST], b0, b1);
                    }
                }
            }
            if (k == tile) continue;
            float* const own = sums + ((tile - batch) * WARPS + warp) * SUMS;
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
                for (int i = 0; i < VALUES; ++i)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const bool paired = i < 2 * PAIRS;
                        const int row = g + (paired ? i / EACH : h) * 8, word = paired ? i % EACH * 2 + h : LAST;
                        const int token = n * 4 + t, place = token * OUTPUTS + row * VECTOR + 2 * word;
                        float* const two = sum[n][i] + 2 * h;
                        if (token < TOKENS) *reinterpret_cast<F2*>(own + place) = {two[0], two[1]};
                        two[0] = two[1] = 0.0f;
                    }
        }
        __syncthreads();
        auto finish = [&](int place, float total) {
            const int own = place % SUMS, token = own / OUTPUTS;
            const int output = (first_tile + (batch + place / SUMS) * clusters) * OUTPUTS + own % OUTPUTS;
            if (token >= rows || output >= outputs) return;
            const u64 at = static_cast<u64>(token) * outputs + output;
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
                if (i == token) total *= own_factor[i];
            if (before) total += before[at];
            if (bias) total += bias[output];
            if (sums_out)
                sums_out[at] = total;
            else
                result[at] = static_cast<u16>(pack_16bit<HALF>(total, 0.0f));
        };
        auto place_of = [&](int e) { return sums + e / SUMS * (WARPS * SUMS) + e % SUMS; };
        const int all = (end - batch) * SUMS;
        for (int e = threadIdx.x; e < all; e += THREADS) {
            float* const from = place_of(e);
            const int begun = (batch + e / SUMS) * units;  // by warp begun % WARPS
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
                if (units >= WARPS || (w + WARPS - begun % WARPS) % WARPS < units) total += from[w * SUMS];
            if constexpr (CLUSTER == 1)
                finish(e, total);
            else
                from[0] = total;
        }
        if constexpr (CLUSTER > 1) {
            cluster_sync();
            for (int e = rank * THREADS + threadIdx.x; e < all; e += THREADS * CLUSTER) {
                float parts[CLUSTER], total = 0.0f;
#pragma unroll
                for (int i = 0; i < CLUSTER; ++i)
                    parts[i] = cluster_load_f32(cluster_address(shared_address(place_of(e)), i));
#pragma unroll
                for (int i = 0; i < CLUSTER; ++i) total += parts[i];
                finish(e, total);
            }
            cluster_have_read();
        } else if (end < count) {
            __syncthreads();
        }
    }
}
