// Chooses the instruction set at run time and shares the rows out over threads.
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "row_divergence.h"

namespace scsdpo {

// row_divergence_simd.cpp, once for each instruction set
void row_divergence_baseline(const RowDivergence&, int64_t begin, int64_t end);
#if defined(SCSDPO_X86)
void row_divergence_avx2(const RowDivergence&, int64_t begin, int64_t end);
void row_divergence_avx512(const RowDivergence&, int64_t begin, int64_t end);
#endif

InstructionSet best_instruction_set() {
#if defined(SCSDPO_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return InstructionSet::kAVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAVX2;
#endif
  return InstructionSet::kBaseline;
}

void row_divergence_cpu(const RowDivergence& task, int threads, InstructionSet instruction_set) {
  auto rows = row_divergence_baseline;
#if defined(SCSDPO_X86)
  if (instruction_set == InstructionSet::kAVX2) rows = row_divergence_avx2;
  if (instruction_set == InstructionSet::kAVX512) rows = row_divergence_avx512;
#endif

  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < task.rows;) rows(task, r, r + 1);
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads && i < task.rows; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started and this one do all the rows.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace scsdpo
