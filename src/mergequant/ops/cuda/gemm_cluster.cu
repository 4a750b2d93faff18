// Integer GEMM for 1..128 tokens: y[m, n] = sum_k x[m, k] w[n, k], with k split over the blocks of a cluster.
//
// Transposed form: D (outputs x tokens) = W X^T. The weight is the register operand of wgmma, because its tile order
// (`mergequant.ops.tiles`) gives each lane its operand with one 16-byte load; the tokens are the shared-memory
// operand. A block takes 128 outputs (two row tiles, one for each of two warpgroups) and all tokens. One further
// thread feeds a ring of STAGES buffers, each with 128 k of both: the weight as contiguous copies, x through a tensor
// map that swizzles it as wgmma wants it and fills with zeros what lies outside. Two blocks share a multiprocessor, so
// that one's epilogue hides behind the other's loads.
//
// Splitting k over the PARTS blocks of a cluster keeps more of the memory busy where there are few outputs. Every
// block leaves its int32 sums in its own shared memory; then every block finishes an equal share of the results,
// reading the other blocks' sums directly. Integers make the order of that addition irrelevant: any split is exact.
#include "tma.cuh"
#include "wgmma.cuh"
#include "epilogue.cuh"

constexpr int BITS = MQ_BITS;               // of the weight: 4 or 8
constexpr int PARTS = MQ_PARTS;             // blocks of a cluster, which share k: 1..8
constexpr int STAGES = MQ_STAGES;           // ring buffers
constexpr int BLOCKS = MQ_BLOCKS;           // of a multiprocessor, side by side
constexpr bool SWIGLU = MQ_SWIGLU;          // gate and up rows interleaved; results are codes ...
constexpr int CODE_BITS = MQ_CODE_BITS;     // ... of so many bits
constexpr bool HALF = MQ_HALF;              // else results are float16, or bfloat16

constexpr int TOKENS = WGMMA_TOKENS;
constexpr int COMPUTING = 256;              // threads of the two warpgroups; one warp more feeds them
constexpr int THREADS = COMPUTING + 32;
constexpr int TILE = 1024 * BITS;           // bytes of a weight tile (64 outputs x 128 k)
constexpr int PART = TILE / 2;              // of its half along k
constexpr int TOKEN_BYTES = TOKENS * 128;   // of x in a stage
constexpr int SUM_ROW = 132;                // words of a token's 128 sums: padded, so that lanes write 32 banks
constexpr int QUADS = SWIGLU ? 16 : 32;     // pieces of a token's results: 4 outputs, or 4 gate and 4 up rows

struct Quad {
    float v[4];
};

// Numbers n .. n + 3 of a per-output vector; zeros where there are none.
MQ_DEVICE Quad load_quad(const float* from, int n, int outputs) {
    Quad quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.v[i] = from && n + i < outputs ? from[n + i] : 0.0f;
    return quad;
}

// Sums of four neighbouring outputs over all blocks of the cluster. All loads are issued before the first is used: one
// takes about a microsecond's third on its way, a chain of eight would cost more than the whole multiplication.
MQ_DEVICE void add_up(i32 (&sum)[4], u32 address) {
    U4 own[PARTS];
#pragma unroll
    for (int r = 0; r < PARTS; ++r)
        own[r] = PARTS == 1 ? load_shared(address) : cluster_load_u4(cluster_address(address, r));
    sum[0] = sum[1] = sum[2] = sum[3] = 0;
#pragma unroll
    for (int r = 0; r < PARTS; ++r) {
        sum[0] += own[r].x;
        sum[1] += own[r].y;
        sum[2] += own[r].z;
        sum[3] += own[r].w;
    }
}

// The register operand of two k-steps (64 k) of a warp's 16 rows: half `part` of a weight tile.
MQ_DEVICE void load_weight(u32 (&a)[2][4], u32 tile, int part, int warp, int lane) {
    const u32 at = tile + part * PART + warp * 512 + lane * 16;
    const U4 p = load_shared(at);
    if constexpr (BITS == 4) {
        a[0][0] = low_nibbles_x16(p.x), a[0][1] = low_nibbles_x16(p.y);
        a[0][2] = low_nibbles_x16(p.z), a[0][3] = low_nibbles_x16(p.w);
        a[1][0] = high_nibbles_x16(p.x), a[1][1] = high_nibbles_x16(p.y);
        a[1][2] = high_nibbles_x16(p.z), a[1][3] = high_nibbles_x16(p.w);
    } else {
        const U4 q = load_shared(at + 2048);
        a[0][0] = p.x, a[0][1] = p.y, a[0][2] = p.z, a[0][3] = p.w;
        a[1][0] = q.x, a[1][1] = q.y, a[1][2] = q.z, a[1][3] = q.w;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gemm_cluster(const __grid_constant__ TensorMap codes, const u8* tiles, const float* weight_scale,
             const float* token_scale, const float* bias, void* result, int rows, int outputs, int columns) {
    extern __shared__ u8 unaligned[];
    // wgmma's swizzle wants 1024-byte alignment. Every block of a cluster starts at the same address.
    const u32 start = (shared_address(unaligned) + 1023) & ~1023u;
    const u32 tokens_at = start, weight_at = tokens_at + STAGES * TOKEN_BYTES, barriers = weight_at + STAGES * 2 * TILE;
    auto full = [&](int stage) { return barriers + stage * 8; };
    auto empty = [&](int stage) { return barriers + (STAGES + stage) * 8; };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = threadIdx.x / 128;
    const int part = blockIdx.y;                                                    // rank in the cluster
    const int first = columns * part / PARTS, last = columns * (part + 1) / PARTS;  // column tiles of this block

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full(s), 1);
            barrier_init(empty(s), COMPUTING / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();
    overlap_launch();

    // One thread feeds the ring. The weight depends on no other kernel: a ring full of it is under way before the wait.
    const bool feeds = threadIdx.x == COMPUTING;
    const int present = min(2, (outputs + 63) / 64 - static_cast<int>(blockIdx.x) * 2);  // row tiles: 1 or 2
    const int ahead = min(STAGES, last - first);
    const u64 policy = policy_evict_first();  // the weight is read once
    auto load_tiles = [&](int i, int s) {
        barrier_expect(full(s), TOKEN_BYTES + present * TILE);
        for (int j = 0; j < present; ++j) {  // without the second tile, the second warpgroup's sums are never read
            const u8* const from = tiles + (static_cast<u64>(blockIdx.x * 2 + j) * columns + first + i) * TILE;
            bulk_load(weight_at + (2 * s + j) * TILE, from, TILE, full(s), policy);
        }
    };
    auto load_codes = [&](int i, int s) {
        tensor_load(tokens_at + s * TOKEN_BYTES, &codes, 0, (first + i) * 128, full(s));
    };
    if (feeds)
        for (int i = 0; i < ahead; ++i) load_tiles(i, i);
    __syncwarp();
    overlap_wait();

    // The results that this thread finishes lie in one column of quads (THREADS is a multiple of QUADS): its scales are
    // fetched now, while nobody waits for them.
    const int column = (threadIdx.x * PARTS + part) % QUADS;
    const int in_block = SWIGLU ? column / 2 * 16 + column % 2 * 4 : column * 4;  // first row of the quad
    const int output = blockIdx.x * 128 + in_block;
    const Quad scale = load_quad(weight_scale, output, outputs), offset = load_quad(bias, output, outputs);
    const Quad up_scale = load_quad(SWIGLU ? weight_scale : nullptr, output + 8, outputs);
    const Quad up_offset = load_quad(SWIGLU ? bias : nullptr, output + 8, outputs);

    i32 sum[WGMMA_REGISTERS] = {};
    if (group == 2) {
        if (feeds) {
            for (int i = 0; i < ahead; ++i) load_codes(i, i);
            for (int i = ahead; i < last - first; ++i) {
                const int s = i % STAGES;
                barrier_wait(empty(s), (i / STAGES - 1) & 1);
                load_tiles(i, s);
                load_codes(i, s);
            }
        }
        __syncwarp();
    } else {
        // Half a stage at a time: while the tensor cores work on one half, the other half's operand is unpacked into
        // the other registers. A stage is handed back once the wgmma after its last one is under way.
        u32 a[2][2][4];
        int s = 0;
        u32 phase = 0;
        auto multiply = [&](u32 (&operand)[2][4], int half) {
            load_weight(operand, weight_at + (2 * s + group) * TILE, half, warp % 4, lane);
            const u64 x = wgmma_descriptor(tokens_at + s * TOKEN_BYTES) + half * 4;
            wgmma_fence();
            wgmma_s8(sum, operand[0][0], operand[0][1], operand[0][2], operand[0][3], x, 1);
            wgmma_s8(sum, operand[1][0], operand[1][1], operand[1][2], operand[1][3], x + 2, 1);
            wgmma_commit();
        };
        for (int k = first; k < last; ++k) {
            const int previous = s == 0 ? STAGES - 1 : s - 1;
            barrier_wait(full(s), phase);
            multiply(a[0], 0);
            wgmma_wait<1>();  // the second half of the previous stage is done
            if (k > first) {
                __syncwarp();
                if (lane == 0) barrier_arrive(empty(previous));
            }
            multiply(a[1], 1);
            wgmma_wait<1>();
            if (++s == STAGES) s = 0, phase ^= 1;
        }
        wgmma_wait<0>();
    }
    __syncthreads();  // the ring is done with; its memory takes the sums, [TOKENS][SUM_ROW]
    i32* sums = reinterpret_cast<i32*>(unaligned + (start - shared_address(unaligned)));
    if (group < 2) {
        const int row = warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
            i32* at = sums + (j * 8 + lane % 4 * 2) * SUM_ROW + row;
            at[0] = sum[4 * j], at[SUM_ROW] = sum[4 * j + 1];
            at[8] = sum[4 * j + 2], at[SUM_ROW + 8] = sum[4 * j + 3];
        }
    }
    if constexpr (PARTS > 1) cluster_sync();
    else __syncthreads();

    const int pitch = (outputs + 7) / 8 * 8;  // of the result: whole quads are written
    for (int e = threadIdx.x * PARTS + part; e < rows * QUADS; e += THREADS * PARTS) {
        const int token = e / QUADS;
        const u32 at = start + (token * SUM_ROW + in_block) * 4;
        i32 total[4], up_total[4];
        add_up(total, at);
        if constexpr (SWIGLU) add_up(up_total, at + 32);
        if (output >= pitch) continue;
        const float own = token_scale ? token_scale[token] : 1.0f;
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = token_value(exact_sum<BITS>(total[i]), scale.v[i], own, offset.v[i]);
        if constexpr (SWIGLU) {
            i32 code[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float up = token_value(exact_sum<BITS>(up_total[i]), up_scale.v[i], own, up_offset.v[i]);
                code[i] = code_of<CODE_BITS>(swiglu(value[i], up));
            }
            const u64 place = static_cast<u64>(token) * (outputs / 2) + blockIdx.x * 64 + column * 4;
            *reinterpret_cast<u32*>(static_cast<u8*>(result) + place) = pack_codes(code[0], code[1], code[2], code[3]);
        } else {
            const u64 place = static_cast<u64>(token) * pitch + output;
            const u64 both = pack_16bit<HALF>(value[0], value[1]) |
                             static_cast<u64>(pack_16bit<HALF>(value[2], value[3])) << 32;
            *reinterpret_cast<u64*>(static_cast<u16*>(result) + place) = both;
        }
    }
    if constexpr (PARTS > 1) cluster_sync();  // a block's sums stay until all have read them
}
