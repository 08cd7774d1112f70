// What the processor at hand can run: chooses the instruction set of every CPU kernel at run time.
#include <algorithm>

#include "mixture.h"
#include "parallel.h"
#include "project.h"
#include "row_divergence.h"

namespace scsdpo {

// row_divergence_simd.cpp, once for each instruction set
void row_divergence_baseline(const RowDivergence&, const Mixture&, int64_t row);
#if defined(SCSDPO_X86)
void row_divergence_avx2(const RowDivergence&, const Mixture&, int64_t row);
void row_divergence_avx512(const RowDivergence&, const Mixture&, int64_t row);

// project_avx512.cpp: how many head rows stay in cache together, and the logits of some of them
int64_t project_block_avx512(const Projection&);
void project_avx512(const Projection&, int64_t begin, int64_t end);
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
  auto row = row_divergence_baseline;
#if defined(SCSDPO_X86)
  if (instruction_set == InstructionSet::kAVX2) row = row_divergence_avx2;
  if (instruction_set == InstructionSet::kAVX512) row = row_divergence_avx512;
#endif

  Mixture mix = mixture(task.beta);
  parallel_for(task.rows, threads, [&](int64_t r) { row(task, mix, r); });
}

bool has_project(DType dtype) {
#if defined(SCSDPO_X86)
  return best_instruction_set() == InstructionSet::kAVX512 &&
         (dtype == DType::kFloat32 || __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

void project(const Projection& task, int threads) {
#if defined(SCSDPO_X86)
  int64_t size = project_block_avx512(task);
  parallel_for((task.vocabulary + size - 1) / size, threads,
               [&](int64_t i) { project_avx512(task, i * size, std::min((i + 1) * size, task.vocabulary)); });
#endif
}

}  // namespace scsdpo
