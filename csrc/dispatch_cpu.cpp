// What the processor at hand can run: chooses the instruction set of every CPU kernel at run time.
#include <algorithm>

#include "logits.h"
#include "mixture.h"
#include "parallel.h"
#include "project.h"
#include "row_divergence.h"

namespace scsdpo {

// row_divergence_simd.cpp and logits_simd.cpp, once for each instruction set: one row
#define SCSDPO_ROWS(set)                                                        \
  void row_divergence_##set(const RowDivergence&, const Mixture&, int64_t row); \
  void head_logits_##set(const HeadLogits&, int64_t row);                       \
  void tail_gradient_##set(const TailGradient&, int64_t row);
SCSDPO_ROWS(baseline)
#if defined(SCSDPO_X86)
SCSDPO_ROWS(avx2)
SCSDPO_ROWS(avx512)

// project_avx512.cpp: how many head rows stay in cache together, and the logits of some of them
int64_t project_block_avx512(const Projection&);
void project_avx512(const Projection&, int64_t begin, int64_t end);
#endif

namespace {

template <class Function>
Function chosen(InstructionSet set, Function baseline, Function avx2, Function avx512) {
  return set == InstructionSet::kAVX512 ? avx512 : set == InstructionSet::kAVX2 ? avx2 : baseline;
}

#if defined(SCSDPO_X86)
#define SCSDPO_CHOSEN(name, set) chosen(set, name##_baseline, name##_avx2, name##_avx512)
#else
#define SCSDPO_CHOSEN(name, set) name##_baseline
#endif

}  // namespace

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
  auto row = SCSDPO_CHOSEN(row_divergence, instruction_set);
  Mixture mix = mixture(task.beta);
  mix.entry_clip = task.entry_clip;
  parallel_for(task.rows, threads, [&](int64_t r) { row(task, mix, r); });
}

void head_logits(const HeadLogits& task, int threads, InstructionSet instruction_set) {
  auto row = SCSDPO_CHOSEN(head_logits, instruction_set);
  parallel_for(task.rows, threads, [&](int64_t r) { row(task, r); });
}

void tail_gradient(const TailGradient& task, int threads, InstructionSet instruction_set) {
  auto row = SCSDPO_CHOSEN(tail_gradient, instruction_set);
  parallel_for(task.rows, threads, [&](int64_t r) { row(task, r); });
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
