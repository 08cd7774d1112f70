// Shares numbered pieces of work out over threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace scsdpo {

// Calls work(i) once for every i in [0, count), on at most `threads` threads, this one among them.
template <class Work>
void parallel_for(int64_t count, int threads, Work work) {
  std::atomic<int64_t> next{0};
  auto loop = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  try {
    for (int i = 1; i < threads && i < count; ++i) helpers.emplace_back(loop);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started and this one do all the work.
  }
  loop();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace scsdpo
