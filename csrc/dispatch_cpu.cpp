// What the processor at hand can run: chooses the instruction set of every CPU kernel at run time.
#include <algorithm>
#include <memory>

#if defined(SCSDPO_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "logits.h"
#include "matmul.h"
#include "mixture.h"
#include "parallel.h"
#include "row_divergence.h"

namespace scsdpo {

// *_simd.cpp, once for each instruction set: one row, or one block of a product
#define SCSDPO_ROWS(set)                                                                                        \
  void row_divergence_##set(const Logits&, const Mixture&, const PerRow&, const Matrix& scalars,                \
                            const Matrix& gradient, int64_t row);                                               \
  void row_statistics_##set(const Logits&, float temperature, const Statistics& out, int64_t row);              \
  void row_terms_##set(const Logits&, const Mixture&, const Statistics&, const Matrix& terms, int64_t row);     \
  void row_gradient_##set(const Logits&, const Mixture&, const Statistics&, const Matrix& terms, const PerRow&, \
                          const Matrix& scalars, const Matrix& gradient, int64_t row);                          \
  void head_logits_##set(const HeadLogits&, int64_t row);                                                       \
  void tail_gradient_##set(const TailGradient&, int64_t row);                                                   \
  void matmul_block_##set(const Matmul&, int64_t row, int64_t column, int rows, int columns, float* left);
SCSDPO_ROWS(baseline)
#if defined(SCSDPO_X86)
SCSDPO_ROWS(avx2)
SCSDPO_ROWS(avx512)

// matmul_avx512bf16.cpp: how many columns stay in cache together, and some of them
int64_t matmul_bf16_columns(const Matmul&);
void matmul_bf16(const Matmul&, int64_t begin, int64_t end);
#endif
#if defined(SCSDPO_AMX)
// matmul_amx.cpp: rows are packed by panels of so many numbers, and columns multiplied so many at a time
int64_t matmul_amx_packed(const Matmul&);
int64_t matmul_amx_panels(const Matmul&);
int64_t matmul_amx_columns();
void matmul_amx_pack(const Matmul&, int64_t panel, uint16_t* packed);
void matmul_amx(const Matmul&, const uint16_t* packed, int64_t begin, int64_t end);
#endif

namespace {

template <class Function>
Function chosen(InstructionSet set, Function baseline, Function avx2, Function avx512) {
  return set >= InstructionSet::kAVX512 ? avx512 : set == InstructionSet::kAVX2 ? avx2 : baseline;
}

#if defined(SCSDPO_X86)
#define SCSDPO_CHOSEN(name, set) chosen(set, name##_baseline, name##_avx2, name##_avx512)
#else
#define SCSDPO_CHOSEN(name, set) name##_baseline
#endif

constexpr int64_t kBlockColumns = 512, kLeastRows = 84, kLeastColumns = 64;  // whole tiles on every instruction set

// Calls use(row, its constants) for every row: the same for all, or of the row's own beta.
template <class Use>
void for_rows(int64_t rows, const Objective& objective, int threads, Use use) {
  if (objective.token_beta)
    return parallel_for(rows, threads, [&](int64_t r) { use(r, mixture_of_row(objective, r)); });
  const Mixture mix = mixture(objective);
  parallel_for(rows, threads, [&](int64_t r) { use(r, mix); });
}

// Linux gives a process the registers of AMX when it asks for them.
bool has_amx() {
#if defined(SCSDPO_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

InstructionSet best_instruction_set() {
#if defined(SCSDPO_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512bf16") ? InstructionSet::kAVX512
           : has_amx()                           ? InstructionSet::kAMXBF16
                                                 : InstructionSet::kAVX512BF16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAVX2;
#endif
  return InstructionSet::kBaseline;
}

void row_divergence(const Logits& logits, const Objective& objective, const PerRow& rows, Matrix scalars,
                    Matrix gradient, Processor processor) {
  auto row = SCSDPO_CHOSEN(row_divergence, processor.instruction_set);
  for_rows(logits.rows, objective, processor.threads,
           [&](int64_t r, const Mixture& mix) { row(logits, mix, rows, scalars, gradient, r); });
}

void row_statistics(const Logits& logits, float temperature, const Statistics& out, Processor processor) {
  auto row = SCSDPO_CHOSEN(row_statistics, processor.instruction_set);
  parallel_for(logits.rows, processor.threads, [&](int64_t r) { row(logits, temperature, out, r); });
}

void row_terms(const Logits& logits, const Objective& objective, const Statistics& statistics, Matrix terms,
               Processor processor) {
  auto row = SCSDPO_CHOSEN(row_terms, processor.instruction_set);
  for_rows(logits.rows, objective, processor.threads,
           [&](int64_t r, const Mixture& mix) { row(logits, mix, statistics, terms, r); });
}

void row_gradient(const Logits& logits, const Objective& objective, const Statistics& statistics, Matrix terms,
                  const PerRow& rows, Matrix scalars, Matrix gradient, Processor processor) {
  auto row = SCSDPO_CHOSEN(row_gradient, processor.instruction_set);
  for_rows(logits.rows, objective, processor.threads,
           [&](int64_t r, const Mixture& mix) { row(logits, mix, statistics, terms, rows, scalars, gradient, r); });
}

void head_logits(const HeadLogits& task, Processor processor) {
  auto row = SCSDPO_CHOSEN(head_logits, processor.instruction_set);
  parallel_for(task.rows, processor.threads, [&](int64_t r) { row(task, r); });
}

void tail_gradient(const TailGradient& task, Processor processor) {
  auto row = SCSDPO_CHOSEN(tail_gradient, processor.instruction_set);
  parallel_for(task.rows, processor.threads, [&](int64_t r) { row(task, r); });
}

// Blocks are as large as their packing wants them, about equal, and smaller where not every thread has one.
void matmul(const Matmul& task, Processor processor) {
  auto block = SCSDPO_CHOSEN(matmul_block, processor.instruction_set);
  auto parts = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
  if (task.depth == 0 && !task.add)
    for (int64_t r = 0; r < task.rows; ++r)
      std::fill_n(static_cast<float*>(task.out.at) + r * task.out.stride, task.columns, 0.0f);
  const int64_t each = parts(task.rows, std::max<int64_t>(1, parts(task.rows, kMatmulBlockRows)));
  int64_t rows = std::max<int64_t>(1, parts(each, kLeastRows)) * kLeastRows, columns = kBlockColumns;
  while (parts(task.rows, rows) * parts(task.columns, columns) < processor.threads) {
    if (columns > kLeastColumns)
      columns /= 2;
    else if (rows > kLeastRows)
      rows = parts(rows / 2, kLeastRows) * kLeastRows;
    else
      break;
  }
  const int64_t across = parts(task.columns, columns);
  parallel_for(across * parts(task.rows, rows), processor.threads, [&](int64_t i) {
    static thread_local const Aligned<float> left = aligned<float>(kMatmulBlockRows * kMatmulBlockDepth + kMatmulSlack);
    const int64_t r = i / across * rows, c = i % across * columns;
    block(task, r, c, static_cast<int>(std::min(rows, task.rows - r)),
          static_cast<int>(std::min(columns, task.columns - c)), left.get());
  });
}

void matmul_bf16(const Matmul& task, Processor processor) {
#if defined(SCSDPO_AMX)
  if (processor.instruction_set >= InstructionSet::kAMXBF16) {
    const int64_t panels = matmul_amx_panels(task), each = matmul_amx_packed(task), columns = matmul_amx_columns();
    const Aligned<uint16_t> packed = aligned<uint16_t>(panels * each);
    parallel_for(panels, processor.threads, [&](int64_t i) { matmul_amx_pack(task, i, packed.get() + i * each); });
    return parallel_for((task.columns + columns - 1) / columns, processor.threads, [&](int64_t i) {
      matmul_amx(task, packed.get(), i * columns, std::min((i + 1) * columns, task.columns));
    });
  }
#endif
#if defined(SCSDPO_X86)
  int64_t size = matmul_bf16_columns(task);
  parallel_for((task.columns + size - 1) / size, processor.threads,
               [&](int64_t i) { matmul_bf16(task, i * size, std::min((i + 1) * size, task.columns)); });
#endif
}

}  // namespace scsdpo
