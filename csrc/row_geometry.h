// How a row is laid over the multiprocessors of an NVIDIA GPU: arithmetic on the host, for row_divergence_cuda.cu.
#pragma once

#include <cstdint>

namespace scsdpo {

struct GpuLimits {
  int shared_per_multiprocessor;  // bytes
  int shared_per_block;           // bytes that a block can ask for
  int shared_reserved;            // bytes that every block takes besides
  int cluster;                    // blocks in the largest cluster: 1, 2, 4, 8 or 16; 0 where there are none
};

// The clusters' kernel has its row in shared memory. `slice` entries a block, a multiple of 8, in one block or more.
struct RowGeometry {
  int cluster;           // blocks to a row; 0: the row is streamed by one block
  int threads;           // of a block
  int64_t slice;         // entries of a block; the last blocks may have fewer, or none
  int64_t shared_bytes;  // of a block
};

constexpr int kRowThreads = 768;        // of all of a multiprocessor's blocks: 80 registers each
constexpr int kStreamingThreads = 256;  // three blocks to a multiprocessor
constexpr int kRowHeader = 832;         // bytes of shared memory before the logits

// The smallest cluster of which three blocks fit a multiprocessor, else the one of which most do: while one row's
// logits arrive, the others' are computed.
RowGeometry row_geometry(int64_t vocabulary, int logit_bytes, const GpuLimits& limits);

}  // namespace scsdpo
