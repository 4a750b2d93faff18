// Asynchronous machinery of sm_90a: mbarriers, bulk and tensor copies (TMA), wgmma ordering, register hand-over.
//
// Shared-memory addresses are 32-bit (`shared_address` of mma.cuh).  One thread issues a copy; the barrier that it
// names counts the bytes.  The wgmma instruction itself is generated per width: see wgmma.py (header "wgmma.cuh").
#pragma once
#include "mma.cuh"

// Opaque CUtensorMap: passed by value as `const __grid_constant__ TensorMap`, made on the host by launch.tensor_map.
struct alignas(64) TensorMap {
    u64 words[16];
};

// ---- mbarriers ----------------------------------------------------------------------------------------------------
// A barrier is 8 bytes of shared memory.  A phase ends when all arrivals are in AND all announced bytes have landed.
// Waiting on parity p returns once the phase of that parity has ended; on a fresh barrier parity 1 returns at once,
// which is how "this slot is free" starts out true.

MQ_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, before __syncthreads (or cluster_sync): makes them visible to the copy engine and to the cluster.
MQ_DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
MQ_DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
MQ_DEVICE void barrier_arrive_if(u32 barrier, bool condition) {  // predicated: no branch
    asm volatile("{.reg .pred p;\n setp.ne.s32 p, %1, 0;\n @p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(barrier),
                 "r"(static_cast<i32>(condition))
                 : "memory");
}
// Arrive and announce `bytes` that copies will deliver in this phase.
MQ_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
MQ_DEVICE bool barrier_try_wait(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}
MQ_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    while (!barrier_try_wait(barrier, parity)) {
    }
}

// Barrier of `threads` threads (a multiple of 32) under hardware name 1..15; name 0 is __syncthreads.
MQ_DEVICE void named_barrier(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---- copies -------------------------------------------------------------------------------------------------------

// L2 policies.  evict_first: read once (streamed weights of a decode step).  evict_last: read again soon by other
// programs (weights that several token tiles share).
MQ_DEVICE u64 policy_evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
MQ_DEVICE u64 policy_evict_last() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// `bytes` contiguous bytes, global to shared; both addresses and the size are multiples of 16.
MQ_DEVICE void bulk_load(u32 shared, const void* global, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        :
        : "r"(shared), "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}
// One box of a 2-D tensor map, global to shared, from element (row, column).  Outside the tensor it delivers zeros, and
// the barrier still counts the whole box.
MQ_DEVICE void tensor_load(u32 shared, const TensorMap* map, int row, int column, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :
        : "r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// One box, shared to global; what lies outside the tensor is dropped.
MQ_DEVICE void tensor_store(const TensorMap* map, int row, int column, u32 shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 :
                 : "l"(map), "r"(column), "r"(row), "r"(shared)
                 : "memory");
}
MQ_DEVICE void tensor_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The stores issued by this thread so far form a group; the waits below are for all groups of this thread.
MQ_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Shared memory has been read and may be overwritten.
MQ_DEVICE void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Global memory has been written.
MQ_DEVICE void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Ordinary writes to shared memory become visible to the copy engine and to wgmma (every writer, then a barrier).
MQ_DEVICE void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes of shared memory.
MQ_DEVICE U4 load_shared(u32 address) {
    U4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}

// ---- wgmma --------------------------------------------------------------------------------------------------------

// Register writes (accumulators, A operand) before this line are seen by the wgmma after it.
MQ_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MQ_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most PENDING committed groups are still running.
template <int PENDING>
MQ_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Matrix descriptor of the B operand: rows (tokens) of 128 bytes of K, 128-byte swizzle, groups of 8 rows 1024 bytes
// apart (what tensor_load with a swizzled map of 128-byte boxes leaves).  `shared` is a multiple of 1024.  The next
// 32 k are 32 bytes on: add 2 (descriptor addresses count 16 bytes).
MQ_DEVICE u64 wgmma_descriptor(u32 shared) {
    constexpr u64 GROUP_STRIDE = 1024 >> 4, SWIZZLE_128B = 1;
    return static_cast<u64>((shared & 0x3FFFF) >> 4) | (1ull << 16) | (GROUP_STRIDE << 32) | (SWIZZLE_128B << 62);
}

// ---- registers ----------------------------------------------------------------------------------------------------

// All warps of a warpgroup: give registers back to / take them from the program's pool.
template <int COUNT>
MQ_DEVICE void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
MQ_DEVICE void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
