#include "row_geometry.h"

#include <algorithm>

namespace scsdpo {
namespace {

int64_t rounded_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace

RowGeometry row_geometry(int64_t vocabulary, int logit_bytes, const GpuLimits& limits) {
  constexpr int64_t kBlocks = 3;
  RowGeometry best{0, kStreamingThreads, vocabulary, 0};
  int64_t most = 0;
  for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
    int64_t slice = rounded_up((vocabulary + cluster - 1) / cluster, 8);
    int64_t bytes = kRowHeader + 2 * slice * logit_bytes;
    if (bytes > limits.shared_per_block) continue;
    int64_t blocks = std::min(kBlocks, limits.shared_per_multiprocessor / (bytes + limits.shared_reserved));
    if (blocks <= most) continue;
    most = blocks;
    int64_t quads = rounded_up(slice / 4, 32);  // what a thread takes at a time
    int threads = static_cast<int>(std::clamp<int64_t>(quads, 64, kRowThreads / blocks));
    best = {cluster, threads, slice, bytes};
  }
  return best;
}

}  // namespace scsdpo
