// Integer GEMM for a handful of tokens (1..16), bound by reading the weight once: y[m, n] = sum_k x[m, k] w[n, k].
//
// The weight goes from global memory straight to the registers of the warp that multiplies it: in tile order
// (`mergequant.ops.tiles`) the 16 bytes of a lane are its operand of mma.sync, so shared memory would add nothing. A
// block takes 16 outputs at a time; its WARPS warps share k, unit by unit (a unit: 16 bytes of every lane, 64 k at 4
// bits, 32 k at 8), and add up their int32 sums in shared memory. Blocks are persistent and take every gridDim.x-th
// group of outputs. Each warp keeps DEPTH units in flight all the time, across the end of a group too, and the first
// ones are requested before the wait for the kernel that produces x: a weight depends on nobody.
#include "mma.cuh"
#include "epilogue.cuh"

constexpr int BITS = MQ_BITS;                  // of the weight: 4 or 8
constexpr int TOKEN_TILES = MQ_TOKEN_TILES;    // tiles of 8 tokens: 1 or 2
constexpr int WARPS = MQ_WARPS;                // that share k
constexpr int DEPTH = MQ_DEPTH;                // units in flight of a warp
constexpr int BLOCKS = MQ_BLOCKS;              // of a multiprocessor, side by side
constexpr bool SWIGLU = MQ_SWIGLU;             // gate and up rows interleaved; results are codes ...
constexpr int CODE_BITS = MQ_CODE_BITS;        // ... of so many bits
constexpr bool HALF = MQ_HALF;                 // else results are float16, or bfloat16

constexpr int THREADS = 32 * WARPS;
constexpr int TOKENS = 8 * TOKEN_TILES;
constexpr int UNIT = BITS == 4 ? 64 : 32;      // k of a unit
constexpr int TILE_UNITS = 128 / UNIT;         // units of a weight tile along k
constexpr int LANES = 128;                     // U4 of a unit: 4 warps of a tile by 32 lanes
constexpr int PAD = 16;                        // bytes after a row of x: rows start in different banks
constexpr int SUM_ROW = 20;                    // words of a token's 16 sums, padded against bank conflicts
constexpr int SUMS = TOKENS * SUM_ROW;         // words of the sums of a warp

// The operand of x: 8 tokens by 64 k (four 16-byte columns) or by 32 k. Lane l gives the address of a row of 16 bytes.
MQ_DEVICE void load_tokens(u32 (&x)[4], u32 address) {
    if constexpr (BITS == 4) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(address));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(x[0]), "=r"(x[1])
                     : "r"(address));
    }
}

// 16 bytes from global to shared memory, or zeros; and the wait for all such copies of this thread.
MQ_DEVICE void copy_chunk(u32 to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
MQ_DEVICE void copies_wait() { asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gemm_stream(const U4* tiles, const i8* codes, const float* weight_scale, const float* token_scale, const float* bias,
            void* result, int rows, int outputs, int width) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int columns = (width + 127) / 128, units = columns * TILE_UNITS, groups = (outputs + 15) / 16;
    const int row_bytes = columns * 128 + PAD;
    const int pitch = (outputs + 7) / 8 * 8;  // of the result: both outputs of a pair are written
    // Steps that a warp takes over a group: the same for all warps, and a multiple of DEPTH so that the places of the
    // prefetch buffer are known when compiling (registers cannot be indexed); steps past the end do nothing.
    const int steps = ((units + WARPS - 1) / WARPS + DEPTH - 1) / DEPTH * DEPTH;

    // Where this lane's units of a group lie from a step on (one step is WARPS units further), and how many units, of
    // all warps, are left there.
    auto source = [&](int group, int step) {
        return tiles + (static_cast<u64>(group / 4) * units + warp + step * WARPS) * LANES + group % 4 * 32 + lane;
    };
    auto left = [&](int group, int step) { return group < groups ? units - warp - step * WARPS : 0; };
    U4 ahead[DEPTH];
    auto request = [&](U4& to, const U4* from, int i, int count) {
        if (i * WARPS < count) to = load_stream(from + i * WARPS * LANES);
    };
    {
        const U4* const from = source(blockIdx.x, 0);
        const int count = left(blockIdx.x, 0);
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) request(ahead[i], from, i, count);
    }

    overlap_launch();
    overlap_wait();
    // x, whole, with zeros up to the end of the last tile.
    const int chunks = columns * 8;
    for (int i = threadIdx.x; i < rows * chunks; i += THREADS) {
        const int row = i / chunks, chunk = i - row * chunks;
        const bool inside = chunk * 16 < width;
        const i8* from = inside ? codes + static_cast<u64>(row) * width + chunk * 16 : codes;
        copy_chunk(shared_address(shared) + row * row_bytes + chunk * 16, from, inside);
    }
    copies_wait();
    __syncthreads();

    i32* const buffers = reinterpret_cast<i32*>(shared + rows * row_bytes);  // two of [WARPS][TOKENS][SUM_ROW]
    int buffer = 0;
    u32 token_address[TOKEN_TILES];
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
        const int row = min(j * 8 + lane % 8, rows - 1);  // tokens past the last repeat it; their sums are not read
        token_address[j] = shared_address(shared) + row * row_bytes + lane / 8 * 16;
    }
    // Eight threads finish a token: each a gate row and its up row, 8 rows on, or two neighbouring outputs. A thread's
    // rows are the same for all its tokens, so its scales can be on their way while the group is multiplied.
    const int own_row = SWIGLU ? threadIdx.x % 8 : threadIdx.x % 8 * 2, other_row = own_row + (SWIGLU ? 8 : 1);
    const bool finishes = threadIdx.x < rows * 8;
    for (int group = blockIdx.x; group < groups; group += gridDim.x) {
        const int output = group * 16 + own_row, other = group * 16 + other_row;
        const bool has_own = finishes && output < outputs, has_other = finishes && other < outputs;
        const float own_scale = has_own ? weight_scale[output] : 0.0f;
        const float other_scale = has_other ? weight_scale[other] : 0.0f;
        const float own_bias = bias && has_own ? bias[output] : 0.0f;
        const float other_bias = bias && has_other ? bias[other] : 0.0f;

        i32 sum[2][TOKEN_TILES][4] = {};  // two chains of dependent instructions instead of one
        for (int step = 0; step < steps; step += DEPTH) {
            const bool ends = step + DEPTH == steps;  // then what is requested belongs to the next group
            const int next_group = ends ? group + gridDim.x : group, next_step = ends ? 0 : step + DEPTH;
            const U4* const from = source(next_group, next_step);
            const int next_count = left(next_group, next_step), count = left(group, step);
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const U4 w = ahead[i];
                request(ahead[i], from, i, next_count);
                if (i * WARPS >= count) continue;
#pragma unroll
                for (int j = 0; j < TOKEN_TILES; ++j) {
                    u32 x[4];
                    load_tokens(x, token_address[j] + (warp + (step + i) * WARPS) * UNIT);
                    if constexpr (BITS == 4) {
                        mma_s8(sum[0][j], low_nibbles_x16(w.x), low_nibbles_x16(w.y), low_nibbles_x16(w.z),
                               low_nibbles_x16(w.w), x[0], x[1]);
                        mma_s8(sum[1][j], high_nibbles_x16(w.x), high_nibbles_x16(w.y), high_nibbles_x16(w.z),
                               high_nibbles_x16(w.w), x[2], x[3]);
                    } else {
                        mma_s8(sum[i % 2][j], w.x, w.y, w.z, w.w, x[0], x[1]);
                    }
                }
            }
        }
        // Each warp leaves its sums; the block adds them up. Two buffers: the next group may fill one while slow
        // threads still read the other, so one barrier a group is enough.
        i32* const sums = buffers + buffer * WARPS * SUMS;
        i32* const own = sums + warp * SUMS;
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = j * 8 + lane % 4 * 2 + i % 2, output = lane / 4 + i / 2 * 8;
                own[token * SUM_ROW + output] = sum[0][j][i] + sum[1][j][i];
            }
        __syncthreads();
        for (int e = threadIdx.x; output < pitch && e < rows * 8; e += THREADS) {
            const int token = e / 8;
            const i32* const at = sums + token * SUM_ROW;
            i32 a = 0, b = 0;
#pragma unroll 4
            for (int k = 0; k < WARPS; ++k) a += at[k * SUMS + own_row], b += at[k * SUMS + other_row];
            const float scale = token_scale ? token_scale[token] : 1.0f;
            const float first = token_value(exact_sum<BITS>(a), own_scale, scale, own_bias);
            const float second = token_value(exact_sum<BITS>(b), other_scale, scale, other_bias);
            if constexpr (SWIGLU)
                static_cast<i8*>(result)[static_cast<u64>(token) * (outputs / 2) + group * 8 + own_row] =
                    static_cast<i8>(code_of<CODE_BITS>(swiglu(first, second)));
            else
                *reinterpret_cast<u32*>(static_cast<u16*>(result) + static_cast<u64>(token) * pitch + output) =
                    pack_16bit<HALF>(first, second);
        }
        buffer ^= 1;
    }
}
