// Integer GEMM for many tokens: y[m, n] = sum_k x[m, k] w[n, k], persistent and warp specialised, sm_90a.
//
// Transposed form: D (channels x tokens) = W X^T.  The weight is the register operand of wgmma, because its tile order
// (`mergequant.ops.tiles`) gives each lane its operand with one 16-byte load and 3 instructions unpack 8 weights on the
// way; the codes are the shared-memory operand.  So the packed weight is never written back widened.
//
// A program (block) has three warpgroups.  The first gives its registers away, and one of its threads feeds a ring of
// STAGES buffers with 128 k each.  The other two multiply: each owns half of the tile's channels and all of its tokens.
// There is one program for a multiprocessor; it walks over tiles of CHANNELS x TOKENS, and the ring runs ahead over the
// end of a tile, so that only the first tile waits for memory.
//
// Tiles seldom fill the last round of the multiprocessors.  The first `whole` tiles (full rounds) are taken undivided.
// All k-blocks of the remaining tiles form one line, cut into equal ranges, one for each program ("stream-K").  The
// program that has the first k-block of a tile owns it; the others leave their int32 sums in global memory and raise a
// flag, and the owner adds them.  Integers make the order of additions irrelevant: any cut gives the same bits.
// A program contributes to a foreign tile before it waits for anybody, and ranges run against the order in which
// programs start (the last range is program 0's).  So whoever is waited for has started earlier: nothing can lock up
// even if not all programs fit on the device at once.
//
// Shared memory (all parts start at multiples of 1024 bytes, as 128-byte swizzling needs; the rows of 128 bytes lie in
// groups of 8, 16-byte piece p of row r at place p ^ (r % 8)):
//   codes    [STAGES][TOKENS rows][128 k]                        swizzled
//   weights  [STAGES][CHANNELS / 64][tile of 64 channels x 128 k, 4096 or 8192 bytes]
//   output   [CHANNELS / 64][TOKENS rows][64 values of 16 bits]  swizzled; or, with SwiGLU, [..][TOKENS rows][32 codes]
//   barriers full[STAGES], empty[STAGES]                         8 bytes each
//
// Macros: MQ_WEIGHT_BITS 4 | 8; MQ_TOKENS, MQ_CHANNELS (128 | 256), the tile; MQ_STAGES; MQ_EPILOGUE 0 bfloat16,
// 1 float16, 2 SwiGLU and codes of MQ_CODE_BITS bits.  "wgmma.cuh" is generated for width MQ_TOKENS.
#include "epilogue.cuh"
#include "mma.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int WEIGHT_BITS = MQ_WEIGHT_BITS;
constexpr int TOKENS = MQ_TOKENS;
constexpr int CHANNELS = MQ_CHANNELS;
constexpr int STAGES = MQ_STAGES;
constexpr int CODE_BITS = MQ_CODE_BITS;
constexpr bool HALF = MQ_EPILOGUE == 1;
constexpr bool SWIGLU = MQ_EPILOGUE == 2;

constexpr int BLOCK_K = 128;                                     // k of a stage
constexpr int CODE_BYTES = TOKENS * BLOCK_K;                     // codes of a stage
constexpr int TILE_BYTES = 64 * BLOCK_K * WEIGHT_BITS / 8;       // 64 channels x 128 k of weights
constexpr int GROUPS = CHANNELS / 64;                            // groups of 64 channels in a tile ...
constexpr int OWN = GROUPS / 2;                                  // ... and those of one multiplying warpgroup
constexpr int STAGE_BYTES = CODE_BYTES + GROUPS * TILE_BYTES;
constexpr int OUT_ROW = SWIGLU ? 32 : 128;                       // bytes of a token in a group's output
constexpr int OUT_BYTES = TOKENS * OUT_ROW;
constexpr int WORDS = WGMMA_REGISTERS;                           // int32 sums of a thread in a group
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + GROUPS * OUT_BYTES + 16 * STAGES;
constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;
constexpr int FEEDING_REGISTERS = 40, MULTIPLYING_REGISTERS = 232;  // 128 (40 + 2 * 232) <= 65536

static_assert(TOKENS == WGMMA_TOKENS && TOKENS % 16 == 0, "the epilogue stores 16 tokens at a time");
static_assert(CHANNELS == 128 || CHANNELS == 256, "a tile has one or two groups of 64 channels for a warpgroup");
static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than a program can have");

// Some k-blocks, first .. last - 1, of one tile.
struct Piece {
    int tile, first, last;
};

// What this program does, in order.  Feeding and multiplying threads walk over the same pieces.
struct Schedule {
    int blocks;       // k-blocks of a tile
    int whole;        // undivided tiles
    int units;        // k-blocks of all divided tiles
    int range;        // of this program
    int tile;         // the next undivided one
    int cursor, end;  // in units, inside this program's range

    __device__ __forceinline__ Schedule(int tiles, int whole, int blocks)
        : blocks(blocks), whole(whole), units((tiles - whole) * blocks), range(gridDim.x - 1 - blockIdx.x),
          tile(blockIdx.x), cursor(begin(range)), end(begin(range + 1)) {}

    // First unit of a range; no range is empty (the host sees to it).
    __device__ __forceinline__ int begin(int of) const {
        return static_cast<int>(static_cast<long long>(units) * of / gridDim.x);
    }
    // First unit after a divided tile.
    __device__ __forceinline__ int tile_end(int of) const { return (of - whole + 1) * blocks; }

    __device__ __forceinline__ bool next(Piece& piece) {
        if (tile < whole) {
            piece = {tile, 0, blocks};
            tile += gridDim.x;
            return true;
        }
        if (cursor >= end) return false;
        const int first = cursor % blocks;
        piece = {whole + cursor / blocks, first, min(blocks, first + end - cursor)};
        cursor += piece.last - first;
        return true;
    }
};

// Where a tile lies.  Bands of `band` token tiles: inside a band, all token tiles of one channel tile follow one
// another, so that programs that run side by side share weights and codes in L2.
struct Place {
    int token, channel;
    __device__ __forceinline__ Place(int tile, int token_tiles, int channel_tiles, int band) {
        const int above = tile / (band * channel_tiles) * band, size = min(token_tiles - above, band);
        const int rest = tile - above * channel_tiles;
        token = (above + rest % size) * TOKENS;
        channel = rest / size * CHANNELS;
    }
};

// Position in the ring; the phase is the parity that a full barrier has when the slot's data are in.
struct Ring {
    int slot = 0;
    u32 phase = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
};

// Scale and bias of one channel.
struct Channel {
    float scale, bias;
};
MQ_DEVICE Channel load_channel(const float* scales, const float* biases, int channel, int channels) {
    const bool inside = channel < channels;
    return {inside ? scales[channel] : 0.0f, inside && biases ? biases[channel] : 0.0f};
}

// Weights of half a block (two k-steps of 32) for one warp's 16 channels, as they lie in a weight tile.
struct Packed {
    U4 words[WEIGHT_BITS / 4];
};
MQ_DEVICE Packed load_weights(u32 tile, int half, int warp, int lane) {
    constexpr int STEP = 2048;  // 4 warps x 32 lanes x 16 bytes
    const u32 at = tile + half * (TILE_BYTES / 2) + warp * 512 + lane * 16;
    Packed packed;
#pragma unroll
    for (int i = 0; i < WEIGHT_BITS / 4; ++i) packed.words[i] = load_shared(at + i * STEP);
    return packed;
}

// Register operands from them.
MQ_DEVICE void unpack(u32 (&a)[2][4], const Packed& packed) {
    const U4 p = packed.words[0];
    if constexpr (WEIGHT_BITS == 4) {
        a[0][0] = low_nibbles_x16(p.x), a[0][1] = low_nibbles_x16(p.y);
        a[0][2] = low_nibbles_x16(p.z), a[0][3] = low_nibbles_x16(p.w);
        a[1][0] = high_nibbles_x16(p.x), a[1][1] = high_nibbles_x16(p.y);
        a[1][2] = high_nibbles_x16(p.z), a[1][3] = high_nibbles_x16(p.w);
    } else {
        const U4 q = packed.words[1];
        a[0][0] = p.x, a[0][1] = p.y, a[0][2] = p.z, a[0][3] = p.w;
        a[1][0] = q.x, a[1][1] = q.y, a[1][2] = q.z, a[1][3] = q.w;
    }
}

// Sums of one 64-channel group to the output buffer as 16-bit floats, [token][channel].  A lane holds pairs of tokens
// of channels g and g + 8 (g = lane / 4); stmatrix.trans turns four 8 x 8 matrices (two of channels, two of tokens)
// into rows of tokens, 8 channels (16 bytes) each.  Three instances, so that nobody pays for what is absent.
enum class Factors { CHANNEL, CHANNEL_BIAS, CHANNEL_TOKEN_BIAS };
template <Factors FACTORS>
MQ_DEVICE void write_floats(const i32 (&sum)[WORDS], u32 buffer, Channel upper, Channel lower, const float* token_scale,
                            int token, int tokens, int warp, int lane) {
    const int matrix = lane / 8, row = lane % 8;
    const u32 at = buffer + (matrix / 2 * 8 + row) * OUT_ROW + (((warp * 2 + matrix % 2) ^ row) * 16);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j += 2) {
        u32 out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // i % 2: upper or lower channels; i / 2: first or second 8 tokens
            const Channel own = i % 2 ? lower : upper;
            const i32 first = exact_sum<WEIGHT_BITS>(sum[(j + i / 2) * 4 + i % 2 * 2]);
            const i32 second = exact_sum<WEIGHT_BITS>(sum[(j + i / 2) * 4 + i % 2 * 2 + 1]);
            if constexpr (FACTORS == Factors::CHANNEL) {
                out[i] = pack_16bit<HALF>(channel_value(first, own.scale), channel_value(second, own.scale));
            } else {
                const int m = token + (j + i / 2) * 8 + lane % 4 * 2;
                const bool scaled = FACTORS == Factors::CHANNEL_TOKEN_BIAS;
                const float a = scaled ? token_scale[min(m, tokens - 1)] : 1.0f;
                const float b = scaled ? token_scale[min(m + 1, tokens - 1)] : 1.0f;
                out[i] = pack_16bit<HALF>(token_value(first, own.scale, a, own.bias),
                                          token_value(second, own.scale, b, own.bias));
            }
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                     :
                     : "r"(at + j * 8 * OUT_ROW), "r"(out[0]), "r"(out[1]), "r"(out[2]), "r"(out[3])
                     : "memory");
    }
}

// Sums of one 64-channel group to the output buffer as codes, [token][32].  Rows are interleaved in groups of 8 (gate,
// up), so a lane's channels g and g + 8 are a gate and its up.
template <bool SCALED>
MQ_DEVICE void write_codes(const i32 (&sum)[WORDS], u32 buffer, Channel gate, Channel up, const float* token_scale,
                           int token, int tokens, int warp, int lane) {
    const u32 at = buffer + lane % 4 * 2 * OUT_ROW + warp * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float own = SCALED ? token_scale[min(token + j * 8 + lane % 4 * 2 + i, tokens - 1)] : 1.0f;
            const float g = token_value(exact_sum<WEIGHT_BITS>(sum[j * 4 + i]), gate.scale, own, gate.bias);
            const float u = token_value(exact_sum<WEIGHT_BITS>(sum[j * 4 + 2 + i]), up.scale, own, up.bias);
            asm volatile("st.shared.u8 [%0], %1;"
                         :
                         : "r"(at + (j * 8 + i) * OUT_ROW), "r"(code_of<CODE_BITS>(swiglu(g, u)))
                         : "memory");
        }
    }
}

// ---- sums that change programs ------------------------------------------------------------------------------------
// `partials` holds [range][multiplying warpgroup][word / 4][thread] quads: a thread reads what the same thread of the
// other program wrote, whole lines at a time.  `flags` holds [range][multiplying warpgroup], 0 outside of a launch.

MQ_DEVICE void store_quad(void* address, i32 x, i32 y, i32 z, i32 w) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
MQ_DEVICE U4 load_quad(const void* address) {  // from L2, where all programs see the same
    U4 v;
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}
MQ_DEVICE void raise_flag(u32* flag) { asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory"); }
MQ_DEVICE void take_flag(u32* flag) {
    u32 up = 0;
    while (!up) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(up) : "l"(flag) : "memory");
    asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(flag) : "memory");  // ready for the next launch
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm_prefill(const __grid_constant__ TensorMap codes_map,  // (tokens, k) int8, boxes of TOKENS x 128, swizzled
             const __grid_constant__ TensorMap out_map,    // (tokens, channels), boxes of TOKENS x 64, swizzled;
                                                           // or (tokens, channels / 2) codes, boxes of TOKENS x 32
             const u8* tiles,           // [tile_rows][blocks][TILE_BYTES]
             const float* weight_scale,  // [channels]
             const float* token_scale,   // [tokens] or null
             const float* bias,          // [channels] or null
             i32* partials, u32* flags,  // null where no tile is divided
             int tokens, int channels, int blocks, int tile_rows, int whole, int band) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 codes_at = shared_address(shared), weights_at = codes_at + STAGES * CODE_BYTES;
    const u32 out_at = weights_at + STAGES * GROUPS * TILE_BYTES, barriers = out_at + GROUPS * OUT_BYTES;
    if (codes_at % 1024 != 0) asm volatile("trap;");  // swizzled addresses would be wrong
    auto full = [&](int slot) { return barriers + slot * 8; };
    auto empty = [&](int slot) { return barriers + (STAGES + slot) * 8; };

    const int token_tiles = (tokens + TOKENS - 1) / TOKENS, channel_tiles = (channels + CHANNELS - 1) / CHANNELS;
    Schedule schedule(token_tiles * channel_tiles, whole, blocks);
    const int warpgroup = threadIdx.x / WARPGROUP;

    if (threadIdx.x == 0) {
        tensor_prefetch(&codes_map);
        tensor_prefetch(&out_map);
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full(s), 1);
            barrier_init(empty(s), 2 * WARPGROUP / 32);  // every multiplying warp
        }
        barrier_init_fence();
    }
    __syncthreads();
    overlap_launch();

    if (warpgroup == 0) {
        registers_give<FEEDING_REGISTERS>();
        if (threadIdx.x == 0) {
            // Weights that several token tiles share stay in L2 until the last has them.
            const u64 policy = token_tiles > 1 ? policy_evict_last() : policy_evict_first();
            auto feed_weights = [&](int channel, int block, int slot) {
                barrier_expect(full(slot), STAGE_BYTES);
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) {
                    const int row = min(channel / 64 + i, tile_rows - 1);  // beyond the last: loaded, never stored
                    bulk_load(weights_at + (slot * GROUPS + i) * TILE_BYTES,
                              tiles + (static_cast<u64>(row) * blocks + block) * TILE_BYTES, TILE_BYTES, full(slot),
                              policy);
                }
            };
            auto feed_codes = [&](int token, int block, int slot) {
                tensor_load(codes_at + slot * CODE_BYTES, &codes_map, token, block * BLOCK_K, full(slot));
            };
            Ring ring;
            Piece piece;
            bool more = schedule.next(piece);
            int ahead = 0;
            // The weights depend on no other kernel: a ring full of them is under way before the wait.
            if (more) {
                const Place place(piece.tile, token_tiles, channel_tiles, band);
                ahead = min(STAGES, piece.last - piece.first);
                for (int i = 0; i < ahead; ++i) feed_weights(place.channel, piece.first + i, i);
                overlap_wait();
                for (int i = 0; i < ahead; ++i) {
                    feed_codes(place.token, piece.first + i, i);
                    ring.advance();
                }
            }
            for (; more; more = schedule.next(piece), ahead = 0) {
                const Place place(piece.tile, token_tiles, channel_tiles, band);
                for (int block = piece.first + ahead; block < piece.last; ++block, ring.advance()) {
                    barrier_wait(empty(ring.slot), ring.phase ^ 1);
                    feed_weights(place.channel, block, ring.slot);
                    feed_codes(place.token, block, ring.slot);
                }
            }
        }
    } else {
        registers_take<MULTIPLYING_REGISTERS>();
        overlap_wait();  // every thread: token scales are read, output and partial sums are written below
        const int half = warpgroup - 1, thread = threadIdx.x % WARPGROUP, warp = thread / 32, lane = thread % 32;
        const int name = 1 + half;  // of this warpgroup's own barrier
        i32 sum[OWN][WORDS];
        u32 a[2][OWN][2][4];  // register operands: while one set multiplies, the other is filled
        Ring ring;

        // Half a block's weights, as they are. In small tiles, 4-bit ones come ahead of a wait for multiplications, so
        // that shared memory's latency lies beneath it; large tiles multiply long enough to hide it anyway. 8-bit ones
        // are operands as they are, whose registers are in use until after the wait.
        constexpr bool AHEAD = WEIGHT_BITS == 4 && TOKENS * CHANNELS <= 128 * 128;
        Packed packed[OWN];
        auto fetch = [&](int slot, int part) {
            const u32 weights = weights_at + (slot * GROUPS + half * OWN) * TILE_BYTES;
#pragma unroll
            for (int g = 0; g < OWN; ++g) packed[g] = load_weights(weights + g * TILE_BYTES, part, warp, lane);
        };
        // Unpacks them, and starts their multiplications.
        auto multiply = [&](u32 (&operand)[OWN][2][4], int slot, int part, int add) {
            if constexpr (!AHEAD) fetch(slot, part);
#pragma unroll
            for (int g = 0; g < OWN; ++g) unpack(operand[g], packed[g]);
            const u64 codes = wgmma_descriptor(codes_at + slot * CODE_BYTES) + part * 4;
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int g = 0; g < OWN; ++g) {
                    const u32(&w)[4] = operand[g][step];
                    wgmma_s8(sum[g], w[0], w[1], w[2], w[3], codes + step * 2, step ? 1 : add);
                }
            wgmma_commit();
        };
        // Without a branch: with one between a fetch and its multiplications, the assembler serializes wgmma.
        auto release = [&](int slot, bool used) {
            __syncwarp();
            barrier_arrive_if(empty(slot), used && lane == 0);
        };

        for (Piece piece; schedule.next(piece);) {
            int previous = 0;
            for (int block = piece.first; block < piece.last; ++block) {
                barrier_wait(full(ring.slot), ring.phase);
                if constexpr (AHEAD) fetch(ring.slot, 0);
                wgmma_wait<1>();  // the first half of the previous block is done, its operands are free
                multiply(a[0], ring.slot, 0, block > piece.first);
                if constexpr (AHEAD) fetch(ring.slot, 1);
                wgmma_wait<1>();  // the second half of the previous block is done, its slot is free
                release(previous, block > piece.first);
                multiply(a[1], ring.slot, 1, 1);
                previous = ring.slot;
                ring.advance();
            }
            // While the last multiplications run: where the tile lies, and its scales from slow memory.
            const Place place(piece.tile, token_tiles, channel_tiles, band);
            Channel upper[OWN], lower[OWN];
#pragma unroll
            for (int g = 0; g < OWN; ++g) {
                const int channel = place.channel + (half * OWN + g) * 64 + warp * 16 + lane / 4;
                upper[g] = load_channel(weight_scale, bias, channel, channels);
                lower[g] = load_channel(weight_scale, bias, channel + 8, channels);
            }
            wgmma_wait<0>();
            release(previous, true);

            auto quads = [&](int range) {
                return partials + ((range * 2 + half) * OWN * WORDS * WARPGROUP + thread * 4);
            };
            if (piece.first > 0) {  // another program owns this tile
                i32* out = quads(schedule.range);
#pragma unroll
                for (int g = 0; g < OWN; ++g)
#pragma unroll
                    for (int i = 0; i < WORDS; i += 4)
                        store_quad(out + (g * WORDS + i) * WARPGROUP, sum[g][i], sum[g][i + 1], sum[g][i + 2],
                                   sum[g][i + 3]);
                named_barrier(name, WARPGROUP);  // all have written before the one thread's release
                if (thread == 0) raise_flag(flags + schedule.range * 2 + half);
                continue;
            }
            if (piece.last < blocks) {
                for (int range = schedule.range + 1; schedule.begin(range) < schedule.tile_end(piece.tile); ++range) {
                    if (thread == 0) take_flag(flags + range * 2 + half);
                    named_barrier(name, WARPGROUP);
                    const i32* in = quads(range);
#pragma unroll
                    for (int g = 0; g < OWN; ++g)
#pragma unroll
                        for (int i = 0; i < WORDS; i += 4) {
                            const U4 v = load_quad(in + (g * WORDS + i) * WARPGROUP);
                            sum[g][i] += v.x, sum[g][i + 1] += v.y, sum[g][i + 2] += v.z, sum[g][i + 3] += v.w;
                        }
                }
            }

            if (thread == 0) store_wait_read();  // the copy engine has taken the previous tile from the buffer
            named_barrier(name, WARPGROUP);
#pragma unroll
            for (int g = 0; g < OWN; ++g) {
                const u32 buffer = out_at + (half * OWN + g) * OUT_BYTES;
#define MQ_WRITE(function) function(sum[g], buffer, upper[g], lower[g], token_scale, place.token, tokens, warp, lane)
                if constexpr (SWIGLU) {
                    if (token_scale) MQ_WRITE(write_codes<true>);
                    else MQ_WRITE(write_codes<false>);
                } else {
                    if (token_scale) MQ_WRITE(write_floats<Factors::CHANNEL_TOKEN_BIAS>);
                    else if (bias) MQ_WRITE(write_floats<Factors::CHANNEL_BIAS>);
                    else MQ_WRITE(write_floats<Factors::CHANNEL>);
                }
#undef MQ_WRITE
            }
            shared_fence();
            named_barrier(name, WARPGROUP);
            if (thread == 0) {
#pragma unroll
                for (int g = 0; g < OWN; ++g) {
                    const int group = half * OWN + g, channel = place.channel + group * 64;
                    if (channel < channels)
                        tensor_store(&out_map, place.token, SWIGLU ? channel / 2 : channel, out_at + group * OUT_BYTES);
                }
                store_commit();
            }
        }
        if (thread == 0) store_wait();  // shared memory must outlive the copies, and the output be written at the end
    }
}
