// What a thread, a block and a cluster of blocks do on an NVIDIA GPU, under names. The kernels use nothing else of the
// machine: tests/gpu_on_host.h gives the same names to a host compiler, and the kernels then run without a GPU.
#pragma once

#if !defined(SCSDPO_ON_HOST)

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace scsdpo {
namespace gpu {

__device__ __forceinline__ int thread() { return threadIdx.x; }
__device__ __forceinline__ int threads() { return blockDim.x; }
__device__ __forceinline__ int block() { return blockIdx.x; }
__device__ __forceinline__ int blocks() { return gridDim.x; }

// The block's shared memory, as large as the launch has asked for.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// x of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ float exchange(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ double exchange(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Whether x holds in all lanes that are here.
__device__ __forceinline__ bool in_all_lanes(bool x) { return __all_sync(__activemask(), x); }

// 2^x, 1 / x and log2(x) in one instruction each; what is below the normal numbers is 0.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to bf16, to nearest, ties to even; the first in the lower half.
__device__ __forceinline__ uint32_t two_bfloat16(float first, float second) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<uint32_t*>(&pair);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SCSDPO_CLUSTERS
// Blocks of a cluster run at the same time, and read each other's shared memory.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// All threads of all the cluster's blocks; what a block's first thread knew before all know after. No other thread
// waits for its own writes to device memory.
__device__ __forceinline__ void cluster_barrier() {
  if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What `mine`, in this block's shared memory, is in that of the cluster's block `rank`.
__device__ __forceinline__ double of_peer(const double* mine, int rank) {
  double x;
  asm volatile(
      "{\n.reg .u32 address;\nmapa.shared::cluster.u32 address, %1, %2;\nld.shared::cluster.f64 %0, [address];\n}"
      : "=d"(x)
      : "r"(shared_address(mine)), "r"(rank)
      : "memory");
  return x;
}

// Counts the bytes of bulk copies into shared memory; complete, in turns, when all that were announced are there.
struct Delivery {
  uint64_t state;
};

__device__ __forceinline__ void start(Delivery* delivery) {  // one thread, once, then publish()
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(delivery)) : "memory");
}

__device__ __forceinline__ void publish() {  // that thread, then a barrier
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void announce(Delivery* delivery, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(delivery)), "r"(bytes)
               : "memory");
}

// 16-byte aligned on both sides, a multiple of 16 bytes. Read once: it need not stay in the L2 cache.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, Delivery* delivery) {
  asm volatile(
      "{\n.reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "policy;\n}" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(delivery))
      : "memory");
}

__device__ __forceinline__ void await(Delivery* delivery, int turn) {  // turn: 0, 1, 0, 1 ...
  asm volatile(
      "{\n.reg .pred there;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n@!there bra "
      "again;\n}" ::"r"(shared_address(delivery)),
      "r"(turn)
      : "memory");
}

// This thread's accesses to shared memory come before the bulk copies that are started after a barrier.
__device__ __forceinline__ void before_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

}  // namespace gpu
}  // namespace scsdpo

#endif
