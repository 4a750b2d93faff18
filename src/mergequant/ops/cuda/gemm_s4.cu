// W4A4 for GPUs with int4 tensor cores (sm_80, sm_86, sm_89): y[m, n] = sum_k a[m, k] w[n, k], both packed two codes
// to a byte along k, row-major, the even column in the low nibble (`mergequant.grids.packing`).
//
// The instruction is mma.sync.m16n8k64 with s4 operands. Its operands want 64 codes of a row in 32 bytes, in the order
// of k; a and w share one nibble order, so nothing is unpacked or reordered between global memory and the tensor core.
// On sm_90 the same text compiles to a slow emulation around int8 instructions; there it serves to check results.
//
// A block computes TOKENS x OUTPUTS results. Global to shared memory by cp.async, STAGES buffers deep; shared memory
// to registers by ldmatrix. A shared row is the 64 bytes of 128 codes, 4 chunks of 16 bytes; chunk c of row r lies at
// place c ^ ((r / 2) % 4), so that the 8 rows of an ldmatrix touch all 32 banks once (two rows are one turn of the
// banks).
#include "mma.cuh"
#include "epilogue.cuh"

constexpr int WARPS_M = MQ_WARPS_M;      // warps side by side over the tokens
constexpr int WARPS_N = MQ_WARPS_N;      // and over the outputs
constexpr int TILES_M = MQ_TILES_M;      // 16-token tiles of a warp
constexpr int TILES_N = MQ_TILES_N;      // 8-output tiles of a warp, an even number
constexpr int STAGES = MQ_STAGES;        // shared-memory buffers
constexpr bool HALF = MQ_HALF;           // results are float16, else bfloat16

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int TOKENS = 16 * TILES_M * WARPS_M;
constexpr int OUTPUTS = 8 * TILES_N * WARPS_N;
constexpr int ROW = 64;                  // bytes of a shared row: 128 codes
constexpr int CHUNK = 16;                // bytes of a cp.async, and of a row of an ldmatrix matrix
constexpr int STAGE = (TOKENS + OUTPUTS) * ROW;
static_assert(TILES_N % 2 == 0, "ldmatrix.x4 brings two tiles of outputs");

// d (16 x 8) += a (16 x 64, s4, rows) * b (64 x 8, s4, columns). Registers as mma_s8 of mma.cuh, 8 codes in a word.
MQ_DEVICE void mma_s4(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
MQ_DEVICE void load_matrices(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

MQ_DEVICE u32 place(int row, int chunk) { return row * ROW + (chunk ^ (row >> 1 & 3)) * CHUNK; }

// 16 bytes from global to shared memory, or zeros; the end of a group of such copies; the wait for all but some groups.
MQ_DEVICE void copy_chunk(u32 to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
MQ_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
MQ_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Starts the copy of one stage: rows [first, first + count) of a matrix (rows, bytes), its bytes [offset, offset + 64).
// What lies outside the matrix becomes zero codes.
MQ_DEVICE void copy(u32 to, const u8* from, int first, int count, int rows, int bytes, int offset) {
    for (int i = threadIdx.x; i < count * (ROW / CHUNK); i += THREADS) {
        const int row = i / (ROW / CHUNK), chunk = i % (ROW / CHUNK);
        const bool inside = first + row < rows && offset + chunk * CHUNK < bytes;
        const u8* source = inside ? from + static_cast<u64>(first + row) * bytes + offset + chunk * CHUNK : from;
        copy_chunk(to + place(row, chunk), source, inside);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
gemm_s4(const u8* codes, const u8* weight, const float* weight_scale, const float* token_scale, const float* bias,
        void* result, int rows, int outputs, int bytes) {
    __shared__ alignas(128) u8 buffer[STAGES * STAGE];
    const u32 shared = shared_address(buffer);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int token = blockIdx.y * TOKENS, output = blockIdx.x * OUTPUTS, steps = (bytes + ROW - 1) / ROW;

    auto fetch = [&](int step) {
        if (step < steps) {
            const u32 to = shared + step % STAGES * STAGE;
            copy(to, codes, token, TOKENS, rows, bytes, step * ROW);
            copy(to + TOKENS * ROW, weight, output, OUTPUTS, outputs, bytes, step * ROW);
        }
        copies_commit();  // an empty group keeps the count of groups in step
    };
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);

    i32 sum[TILES_M][TILES_N][4] = {};
    for (int step = 0; step < steps; ++step) {
        copies_wait<STAGES - 2>();
        __syncthreads();  // the stage is there for all, and all have left the one that is filled next
        fetch(step + STAGES - 1);
        const u32 a_rows = shared + step % STAGES * STAGE, b_rows = a_rows + TOKENS * ROW;
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 64 codes, two chunks of a row, are one instruction deep
            u32 a[TILES_M][4], b[TILES_N / 2][4];
#pragma unroll
            for (int i = 0; i < TILES_M; ++i)   // matrices: rows 0..7, rows 8..15, both again 16 bytes on
                load_matrices(a[i], a_rows + place((warp_m * TILES_M + i) * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < TILES_N / 2; ++j)  // matrices: 8 outputs, 16 bytes on, the next 8 outputs, 16 bytes on
                load_matrices(b[j], b_rows + place((warp_n * TILES_N + 2 * j + lane / 16) * 8 + lane % 8,
                                                   half * 2 + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < TILES_M; ++i)
#pragma unroll
                for (int j = 0; j < TILES_N; ++j) mma_s4(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    // A thread holds two neighbouring outputs of rows g and g + 8 of every tile.
#pragma unroll
    for (int i = 0; i < TILES_M; ++i)
#pragma unroll
        for (int r8 = 0; r8 < 2; ++r8) {
            const int m = token + (warp_m * TILES_M + i) * 16 + r8 * 8 + lane / 4;
            if (m >= rows) continue;
            const float own = token_scale ? token_scale[m] : 1.0f;
#pragma unroll
            for (int j = 0; j < TILES_N; ++j) {
                const int n = output + (warp_n * TILES_N + j) * 8 + lane % 4 * 2;
                if (n >= outputs) continue;
                const bool pair = n + 1 < outputs;
                const float first = token_value(sum[i][j][2 * r8], weight_scale[n], own, bias ? bias[n] : 0.0f);
                const float second = pair ? token_value(sum[i][j][2 * r8 + 1], weight_scale[n + 1], own,
                                                        bias ? bias[n + 1] : 0.0f)
                                          : 0.0f;
                const u32 both = pack_16bit<HALF>(first, second);
                u16* const to = static_cast<u16*>(result) + static_cast<u64>(m) * outputs + n;
                if (outputs % 2 == 0) {
                    *reinterpret_cast<u32*>(to) = both;
                } else {  // rows of an odd length start off a word's boundary
                    to[0] = static_cast<u16>(both);
                    if (pair) to[1] = static_cast<u16>(both >> 16);
                }
            }
        }
}
