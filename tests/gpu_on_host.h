// csrc/gpu.h for a host compiler: an NVIDIA GPU's threads as coroutines of one thread, so that the CUDA kernels' own
// source runs, and is wrong where it is wrong, on a machine without a GPU.
//
// A coroutine runs until it waits, then another is chosen at random, and some warp or block lags behind the others:
// what a missing barrier would leave to chance is left to chance here too. A bulk copy spoils its destination at once
// and arrives at some later time. Waiting for ever, and a barrier that some threads have left behind, end the process
// with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define SCSDPO_CLUSTERS

using std::min;

namespace scsdpo {
namespace gpu {

// The machine that the kernels find. Tests make it small.
struct Machine {
  int capability = 9;
  int shared_per_multiprocessor = 228 * 1024, shared_per_block = 227 * 1024, shared_reserved = 1024;
  int largest_cluster = 16;
  int clusters = 2;  // at once
  unsigned seed = 0;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "gpu_on_host: %s\n", what);
  std::abort();
}

struct Delivery {
  int32_t bytes;
  int16_t arrivals, phase;

  void settle() {
    if (arrivals != 0 || bytes != 0) return;
    arrivals = 1;
    phase ^= 1;
  }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  Delivery* delivery;
};

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t beginning;
  jmp_buf point;  // where it waits; _setjmp makes no system call, as swapcontext does
  bool begun = false;
  std::unique_ptr<char[]> stack;
  int number = 0, rank = 0;  // in the block, of the block in the cluster
  bool done = false;
  std::function<bool()> ready;  // null: it can go on
};

struct Run {
  int threads, blocks, cluster, first_block;
  std::vector<Thread> all;
  std::vector<std::unique_ptr<unsigned char[]>> shared;  // of each block
  std::vector<Barrier> of_blocks, of_warps;
  std::vector<double> lanes;
  Barrier of_cluster;
  std::vector<Copy> copies;
  jmp_buf scheduler;
  Thread* current = nullptr;
  std::function<void()> kernel;
  std::mt19937 random;

  void wait(std::function<bool()> ready) {
    current->ready = std::move(ready);
    leave();
  }

  __attribute__((noinline)) void leave() {
    if (_setjmp(current->point) == 0) _longjmp(scheduler, 1);
  }

  __attribute__((noinline)) void resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler) != 0) return;
    if (thread.begun) _longjmp(thread.point, 1);
    thread.begun = true;
    setcontext(&thread.beginning);
  }

  void arrive(Barrier& barrier) {
    int generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    wait([&barrier, generation] { return barrier.generation != generation; });
  }

  void deliver_one() {
    size_t i = random() % copies.size();
    Copy copy = copies[i];
    copies.erase(copies.begin() + i);
    std::memcpy(copy.to, copy.from, copy.bytes);
    copy.delivery->bytes -= copy.bytes;
    copy.delivery->settle();
  }
};
inline Run* run;

inline void enter() {
  run->kernel();
  run->current->done = true;
  run->leave();
}

inline void run_cluster(Run& now) {
  run = &now;
  const size_t stack = 64 * 1024;
  now.all = std::vector<Thread>(now.threads * now.cluster);
  now.of_blocks.assign(now.cluster, {now.threads});
  now.of_warps.assign(now.cluster * now.threads / 32, {32});
  now.of_cluster = {now.threads * now.cluster};
  now.lanes.assign(now.all.size(), 0);
  std::vector<int> waiting(now.all.size());
  for (size_t i = 0; i < now.all.size(); ++i) {
    Thread& thread = now.all[i];
    thread.number = static_cast<int>(i % now.threads);
    thread.rank = static_cast<int>(i / now.threads);
    thread.stack.reset(new char[stack]);
    getcontext(&thread.beginning);
    thread.beginning.uc_stack.ss_sp = thread.stack.get();
    thread.beginning.uc_stack.ss_size = stack;
    makecontext(&thread.beginning, enter, 0);
    waiting[i] = static_cast<int>(i);
  }
  bool stuck = false;
  int slow_from = 0, slow_to = 0;  // a warp or a block that goes on only where the others cannot
  auto choose_slow = [&] {
    int size = now.random() % 2 ? 32 : now.threads;
    slow_from = static_cast<int>(now.random() % (now.all.size() / size)) * size;
    slow_to = slow_from + size;
  };
  choose_slow();
  while (!waiting.empty()) {
    std::shuffle(waiting.begin(), waiting.end(), now.random);
    bool moved = false;
    std::vector<int> rest;
    for (int i : waiting) {
      Thread& thread = now.all[i];
      if ((i >= slow_from && i < slow_to && !stuck) || (thread.ready && !thread.ready())) {
        rest.push_back(i);
        continue;
      }
      thread.ready = nullptr;
      now.resume(thread);
      moved = true;
      if (!thread.done) rest.push_back(i);
      if (!now.copies.empty() && now.random() % 64 == 0) now.deliver_one();
    }
    if (!moved && !now.copies.empty())
      now.deliver_one();
    else if (!moved && stuck)
      fail("every thread waits");
    else if (stuck)
      choose_slow();
    stuck = !moved && now.copies.empty();
    waiting.swap(rest);
  }
  if (!now.copies.empty()) fail("a bulk copy was never waited for");
  for (const Barrier& barrier : now.of_blocks)
    if (barrier.arrived) fail("threads have left a block's barrier behind");
}

// ---------------------------------------------------------------------------------------------------------------
// csrc/gpu.h's names

inline int thread() { return run->current->number; }
inline int threads() { return run->threads; }
inline int block() { return run->first_block + run->current->rank; }
inline int blocks() { return run->blocks; }
inline unsigned char* shared_memory() { return run->shared[run->current->rank].get(); }
inline void block_barrier() { run->arrive(run->of_blocks[run->current->rank]); }

template <class Real>
Real exchange(Real x, int mask) {
  size_t me = run->current - run->all.data();
  Barrier& warp = run->of_warps[me / 32];
  run->lanes[me] = x;
  run->arrive(warp);
  Real y = static_cast<Real>(run->lanes[me ^ mask]);
  run->arrive(warp);
  return y;
}

// A lane knows of itself only: what depends on it may choose how to compute, not what.
inline bool in_all_lanes(bool x) { return x; }

inline float power_of_two(float x) {
  float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0 : y;
}
inline float reciprocal(float x) { return 1 / x; }
inline float log2(float x) { return std::log2(x); }

inline uint32_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
inline uint32_t two_bfloat16(float first, float second) { return bfloat16(first) | bfloat16(second) << 16; }

inline int cluster_rank() { return run->current->rank; }
inline int cluster_size() { return run->cluster; }
inline void cluster_barrier() { run->arrive(run->of_cluster); }
inline double of_peer(const double* mine, int rank) {
  const Thread* peer = &run->all[rank * run->threads];
  if (std::all_of(peer, peer + run->threads, [](const Thread& thread) { return thread.done; }))
    fail("a block is read that has left");
  auto offset = reinterpret_cast<const unsigned char*>(mine) - shared_memory();
  return *reinterpret_cast<const double*>(run->shared[rank].get() + offset);
}

inline void start(Delivery* delivery) { *delivery = {0, 1, 0}; }
inline void publish() {}
inline void announce(Delivery* delivery, int bytes) {
  if (delivery->arrivals != 1) fail("a delivery is announced twice");
  delivery->bytes += bytes;
  delivery->arrivals = 0;
  delivery->settle();
}
inline void bulk_copy(void* to, const void* from, int bytes, Delivery* delivery) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes <= 0)
    fail("a bulk copy is not of whole 16 bytes");
  std::memset(to, 0x7f, bytes);  // 3.4e38
  run->copies.push_back({to, from, bytes, delivery});
}
inline void await(Delivery* delivery, int turn) {
  run->wait([delivery, turn] { return delivery->phase != turn; });
}
inline void before_bulk_copies() {}

}  // namespace gpu
}  // namespace scsdpo

// ---------------------------------------------------------------------------------------------------------------
// The CUDA runtime, as far as a launch needs it

enum cudaError_t { cudaSuccess, cudaErrorInvalidClusterSize, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
typedef void* cudaStream_t;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  unsigned gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* devices) { return *devices = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaErrorInvalidValue; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  using scsdpo::gpu::machine;
  *value = which == cudaDevAttrComputeCapabilityMajor             ? machine.capability
           : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? machine.shared_per_multiprocessor
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? machine.shared_per_block
                                                                  : machine.shared_reserved;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  using scsdpo::gpu::machine;
  if (int(config->attrs[0].val.clusterDim.x) > machine.largest_cluster) return cudaErrorInvalidClusterSize;
  *clusters = machine.clusters;
  return cudaSuccess;
}

template <class Task>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Task), const Task& task) {
  using namespace scsdpo::gpu;
  int cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  if (config->blockDim % 32 || config->gridDim % cluster) return cudaErrorInvalidValue;
  if (config->dynamicSmemBytes > size_t(machine.shared_per_block)) return cudaErrorInvalidValue;
  for (unsigned block = 0; block < config->gridDim; block += cluster) {
    Run now{int(config->blockDim), int(config->gridDim), cluster, int(block)};
    now.random.seed(machine.seed + block);
    for (int i = 0; i < cluster; ++i) {
      now.shared.emplace_back(new unsigned char[config->dynamicSmemBytes]);
      std::memset(now.shared.back().get(), 0x7f, config->dynamicSmemBytes);
    }
    now.kernel = [&] { kernel(task); };
    run_cluster(now);
  }
  return cudaSuccess;
}
