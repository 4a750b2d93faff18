// Hadamard rotation of rows, and their codes, of values or of silu(gate) * up:
//
//     x = the row, or silu(gate) * up rounded to its 16-bit kind          (MQ_GATED; a row is the gates, then the ups)
//     y = outer^T X inner / sqrt(width),   X = x as (A, 64), outer and inner of plus and minus ones
//     static:   code = clamp(round(y * multiplier + shift))
//     dynamic:  step = max(max |y| * share, smallest),  code = clamp(round(y / step))
//
// The outer factor goes first, on tensor cores: its signs and the 16-bit inputs are exact there, so nothing is rounded
// but float32 sums. The inner one, Sylvester's matrix of order 64, then takes six butterflies in registers. A block has
// a whole row, a warp 16 lines of the product: its part of the outer factor stays in registers for all rows of the block.
//
// Columns. Lane (g, t) of a product of 16 x 8 holds columns 2 t and 2 t + 1 of eight products n. Column 2 t + j of
// product n stands for channel 16 t + 2 n + j of a line, so that a lane ends up with 16 neighbouring codes, one access.
// In shared memory the lines of X lie in this order, pieces of 16 bytes (a product's columns) exchanged by the line's
// number, which keeps banks apart for stores and for ldmatrix.
//
// Padding. A is not a multiple of 16 everywhere: lines of X beyond it are zeros, lines of the product beyond it belong to
// nobody. What the outer factor holds there does not matter, so it is stored as nothing but signs.
#include "epilogue.cuh"

constexpr int A = MQ_LINES;             // lines of X
constexpr bool HALF = MQ_HALF;          // inputs are float16, else bfloat16
constexpr bool GATED = MQ_GATED, DYNAMIC = MQ_DYNAMIC;
constexpr int BITS = MQ_BITS;
constexpr int MULTIPLIER = MQ_MULTIPLIER, SHIFT = MQ_SHIFT;  // 0: none, 1: one for all channels, 2: one for each
constexpr int BLOCKS = MQ_BLOCKS;       // on a multiprocessor: limits the registers
constexpr bool AHEAD = MQ_AHEAD;        // the next row is fetched while this one is multiplied: more registers

constexpr int B = 64, WIDTH = A * B;
constexpr int WARPS = (A + 15) / 16, THREADS = 32 * WARPS;
constexpr int STEPS = WARPS;            // of the product, 16 lines of X each
constexpr int SIGN_WORDS = (STEPS + 3) / 4;
constexpr bool EXPANDED = AHEAD && STEPS <= 12;  // a thread keeps its part of the outer factor as numbers, or as signs
constexpr u32 ONES = HALF ? 0x3C003C00u : 0x3F803F80u, SIGNS = 0x80008000u;
constexpr int LINE_BYTES = 2 * B, BUFFER_BYTES = 16 * WARPS * LINE_BYTES;
constexpr int GROUP = 8;                // channels of an access
constexpr int GROUPS = A * B / GROUP, OWN_GROUPS = 16 * WARPS * B / GROUP / THREADS;  // of a row, of a thread
static_assert(OWN_GROUPS == 4, "a thread fetches four groups, whatever the width");

MQ_DEVICE void mma(float (&d)[4], const U4& a, u32 b0, u32 b1) {
    if constexpr (HALF) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
}

// Four 8 x 8 matrices of 16-bit elements, transposed; lane l gives the address of row l % 8 of matrix l / 8.
MQ_DEVICE U4 load_transposed(u32 address) {
    U4 value;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address));
    return value;
}

MQ_DEVICE void store_word(u32 address, u32 word) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word)); }

MQ_DEVICE float low_of(u32 word) { return HALF ? f16_low(word) : bf16_low(word); }
MQ_DEVICE float high_of(u32 word) { return HALF ? f16_high(word) : bf16_high(word); }

MQ_DEVICE u32 word_of(const U4& four, int n) { return n == 0 ? four.x : n == 1 ? four.y : n == 2 ? four.z : four.w; }

// Operand of step k: word i of it has the signs at bits p and p + 16 of a word of four steps, p = 4 (k % 4) + i.
MQ_DEVICE U4 operand(const u32 (&signs)[SIGN_WORDS], int k) {
    const u32 word = signs[k / 4];
    const int p = 15 - k % 4 * 4;
    return U4{(word << p & SIGNS) | ONES, (word << p - 1 & SIGNS) | ONES, (word << p - 2 & SIGNS) | ONES,
              (word << p - 3 & SIGNS) | ONES};
}

// What a thread fetches of a row: group i is number threadIdx.x + i * THREADS of it.
struct Fetched {
    U4 value[OWN_GROUPS];
    U4 up[GATED ? OWN_GROUPS : 1];

    __device__ __forceinline__ void load(const u16* row) {
#pragma unroll
        for (int i = 0; i < OWN_GROUPS; i++) {
            const int group = static_cast<int>(threadIdx.x) + i * THREADS;
            value[i] = U4{0, 0, 0, 0};
            if constexpr (GATED) up[i] = U4{0, 0, 0, 0};
            if (group >= GROUPS) continue;
            value[i] = load_stream(row + group * GROUP);
            if constexpr (GATED) up[i] = load_stream(row + WIDTH + group * GROUP);
        }
    }

    // Into the lines of X at a shared address, gated.
    __device__ __forceinline__ void store(u32 buffer) const {
#pragma unroll
        for (int i = 0; i < OWN_GROUPS; i++) {
            const int group = static_cast<int>(threadIdx.x) + i * THREADS, line = group / (B / GROUP);
            const int piece = group % (B / GROUP);  // channels 8 piece .. 8 piece + 7
            const u32 start = buffer + line * LINE_BYTES + piece / 2 * 4;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u32 word = word_of(value[i], k);
                if constexpr (GATED) {
                    const u32 other = word_of(up[i], k);
                    word = pack_16bit<HALF>(swiglu(low_of(word), low_of(other)), swiglu(high_of(word), high_of(other)));
                }
                const int product = piece % 2 * 4 + k;
                store_word(start + (product ^ line % 8) * 16, word);
            }
        }
    }
};

// Sums and differences of pairs of values whose channels differ in one bit: six bits of a channel in its line. v[n][j] is
// channel 16 t + 2 n + j.
MQ_DEVICE void butterflies(float (&v)[8][2], int t) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float sum = v[n][0] + v[n][1];
        v[n][1] = v[n][0] - v[n][1];
        v[n][0] = sum;
    }
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2)
#pragma unroll
        for (int n = 0; n < 8; n++) {
            if (n & apart) continue;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float sum = v[n][j] + v[n + apart][j];
                v[n + apart][j] = v[n][j] - v[n + apart][j];
                v[n][j] = sum;
            }
        }
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2) {
        const float sign = t & apart ? -1.0f : 1.0f;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) v[n][j] = __fmaf_rn(sign, v[n][j], __shfl_xor_sync(~0u, v[n][j], apart));
    }
}

// factors: the signs of the outer factor's transpose, as `operand` reads them: [WARPS][SIGN_WORDS][32 lanes].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
rotate(const u16* x, const u32* factors, const float* multiplier, const float* shift, u8* out, float* steps, int rows,
       float scale, float share, float smallest) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float largest_of_warp[2][WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr u64 PITCH = static_cast<u64>(WIDTH) * (GATED ? 2 : 1);

    u32 signs[SIGN_WORDS];
#pragma unroll
    for (int k = 0; k < SIGN_WORDS; k++) signs[k] = factors[(warp * SIGN_WORDS + k) * 32 + lane];
    U4 outer[EXPANDED ? STEPS : 1];
    if constexpr (EXPANDED) {
#pragma unroll
        for (int k = 0; k < STEPS; k++) outer[k] = operand(signs, k);
    }
    const u32 buffers = shared_address(shared);
    // Of ldmatrix: lanes 0..7 and 8..15 have the two halves of a step's lines, 16..31 the same of the next product.
    const int line = lane % 16, next = lane / 16;
    overlap_launch();
    overlap_wait();

    Fetched fetched;
    int row = blockIdx.x;
    if (AHEAD && row < rows) fetched.load(x + row * PITCH);
    for (int turn = 0; row < rows; row += gridDim.x, turn ^= 1) {
        const u32 buffer = buffers + turn * BUFFER_BYTES;
        if (!AHEAD) fetched.load(x + row * PITCH);
        fetched.store(buffer);
        __syncthreads();  // the other buffer is free as well: all have multiplied it before they came here
        if (AHEAD && row + static_cast<int>(gridDim.x) < rows) fetched.load(x + (row + gridDim.x) * PITCH);

        if constexpr (!EXPANDED) {
#pragma unroll
            for (int k = 0; k < SIGN_WORDS; k++) asm volatile("" : "+r"(signs[k]));  // or the compiler expands them once
        }
        float sum[8][4] = {};
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            const u32 lines = buffer + (k * 16 + line) * LINE_BYTES;
            const U4 factor = EXPANDED ? outer[EXPANDED ? k : 0] : operand(signs, k);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const U4 two = load_transposed(lines + ((n + next) ^ line % 8) * 16);
                mma(sum[n], factor, two.x, two.y);
                mma(sum[n + 1], factor, two.z, two.w);
            }
        }
        float value[2][8][2];  // of lines g and g + 8
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) value[0][n][j] = sum[n][j], value[1][n][j] = sum[n][2 + j];
        float largest = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool inside = warp * 16 + half * 8 + g < A;
            butterflies(value[half], t);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    value[half][n][j] = __fmul_rn(value[half][n][j], scale);
                    if (DYNAMIC && inside) largest = fmaxf(largest, fabsf(value[half][n][j]));
                }
        }
        float step = 1.0f, reciprocal = 1.0f;
        if constexpr (DYNAMIC) {
#pragma unroll
            for (int apart = 16; apart > 0; apart /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, apart));
            if (lane == 0) largest_of_warp[turn][warp] = largest;
            __syncthreads();
#pragma unroll
            for (int other = 0; other < WARPS; other++) largest = fmaxf(largest, largest_of_warp[turn][other]);
            step = fmaxf(__fmul_rn(largest, share), smallest);
            reciprocal = __frcp_rn(step);
            if (threadIdx.x == 0) steps[row] = step;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int own = warp * 16 + half * 8 + g;  // line
            if (own >= A) continue;
            const int channel = own * B + 16 * t;
            u32 words[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                i32 code[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float y = value[half][2 * k + j / 2][j % 2];
                    if constexpr (DYNAMIC) {
                        y = quotient(y, step, reciprocal);
                    } else {
                        const int at = channel + 4 * k + j;
                        if (MULTIPLIER > 0) y = __fmul_rn(y, multiplier[MULTIPLIER == 1 ? 0 : at]);
                        if (SHIFT > 0) y = __fadd_rn(y, shift[SHIFT == 1 ? 0 : at]);
                    }
                    code[j] = code_of<BITS>(y);
                }
                words[k] = pack_codes(code[0], code[1], code[2], code[3]);
            }
            *reinterpret_cast<U4*>(out + row * static_cast<u64>(WIDTH) + channel) =
                U4{words[0], words[1], words[2], words[3]};
        }
    }
}
