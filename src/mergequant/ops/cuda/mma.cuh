// Small device vocabulary shared by every CUDA source of this package: fixed-width types, packed 16-bit floats, the int8
// tensor core instruction, nibble unpacking, streaming loads, programmatic overlap and thread-block clusters.
//
// Header-free on purpose: NVRTC compiles it without an include path, so nothing of CUDA's or C++'s headers may be used.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;

#define MQ_DEVICE static __device__ __forceinline__

// Four 32-bit words: the unit of a 16-byte load.
struct alignas(16) U4 {
    u32 x, y, z, w;
};

// ---------------------------------------------------------------------------------------------------------------------
// Floats of 16 bits, two in a word. The first argument goes to the low half (the lower address in memory).
// Conversions from float round to nearest, ties to even.
// ---------------------------------------------------------------------------------------------------------------------
MQ_DEVICE u32 pack_bf16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

MQ_DEVICE u32 pack_f16(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// A bfloat16 is the upper half of a float.
MQ_DEVICE float bf16_low(u32 word) { return __uint_as_float(word << 16); }
MQ_DEVICE float bf16_high(u32 word) { return __uint_as_float(word & 0xFFFF0000u); }

MQ_DEVICE float f16_low(u32 word) {
    float value;
    asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %1;\n cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(word));
    return value;
}

MQ_DEVICE float f16_high(u32 word) {
    float value;
    asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %1;\n cvt.f32.f16 %0, high;}" : "=f"(value) : "r"(word));
    return value;
}

// Nearest integer, ties to even.
MQ_DEVICE i32 round_even(float value) {
    i32 code;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(code) : "f"(value));
    return code;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor core: d (16 x 8, int32) += a (16 x 32, int8, rows) * b (32 x 8, int8, columns).
//
// With g = lane / 4 and t = lane % 4, byte j of a word is the element of k = 4 t + j:
//   a0: row g, k 0..15      a1: row g + 8, k 0..15      a2: row g, k 16..31      a3: row g + 8, k 16..31
//   b0: column g, k 0..15   b1: column g, k 16..31
//   d[0], d[1]: row g, columns 2 t, 2 t + 1             d[2], d[3]: row g + 8, the same columns
// ---------------------------------------------------------------------------------------------------------------------
MQ_DEVICE void mma_s8(i32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with an unsigned a (bytes 0..255).
MQ_DEVICE void mma_u8s8(i32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Signed 4-bit codes, two in a byte, as int8 values of 16 times the code: a nibble moved to the upper half of a byte is
// 16 times its signed value, so no sign extension is needed and the factor leaves with the scale (or a shift by 4).
MQ_DEVICE u32 low_nibbles_x16(u32 word) { return (word << 4) & 0xF0F0F0F0u; }
MQ_DEVICE u32 high_nibbles_x16(u32 word) { return word & 0xF0F0F0F0u; }

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------
// 16 bytes that are read once: through the read-only path, without displacing what L1 holds.
MQ_DEVICE U4 load_stream(const void* address) {
    U4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// The 32-bit address of a shared-memory object, as PTX wants it.
MQ_DEVICE u32 shared_address(const void* object) {
    u32 address;
    asm("{.reg .u64 wide;\n cvta.to.shared.u64 wide, %1;\n cvt.u32.u64 %0, wide;}" : "=r"(address) : "l"(object));
    return address;
}

// ---------------------------------------------------------------------------------------------------------------------
// Programmatic overlap (sm_90): a kernel launched with it starts while its predecessor still runs.
//   overlap_wait():   returns when every predecessor has completed and its writes are visible. Nothing that a predecessor
//                     writes may be read before it, and nothing may be written before it.
//   overlap_launch(): allows the successor to start once every block has called it (or ended).
// Both do nothing in a kernel launched without overlap, and on older architectures.
// ---------------------------------------------------------------------------------------------------------------------
MQ_DEVICE void overlap_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

MQ_DEVICE void overlap_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Thread-block clusters (sm_90): blocks that run together and read one another's shared memory.
// ---------------------------------------------------------------------------------------------------------------------
#if __CUDA_ARCH__ >= 900
MQ_DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks; writes to shared memory before it are visible to the cluster after it.
MQ_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same for what was only read: nobody overwrites it, or leaves, before all have read it. Does not wait for writes.
MQ_DEVICE void cluster_have_read() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, in block `rank`, of what lies at `shared` in this block.
MQ_DEVICE u32 cluster_address(u32 shared, u32 rank) {
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

// Loads through an address of cluster_address. Issue all of one element before using the first: each takes about a
// microsecond's third, and they overlap.
MQ_DEVICE float cluster_load_f32(u32 address) {
    float value;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

MQ_DEVICE i32 cluster_load_s32(u32 address) {
    i32 value;
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

MQ_DEVICE U4 cluster_load_u4(u32 address) {
    U4 value;
    asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}
#endif
