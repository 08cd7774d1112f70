// One row of a RowDivergence on one instruction set. CMake compiles this file once for each, with its flags
// and SCSDPO_INSTRUCTION_SET = baseline | avx2 | avx512; dispatch_cpu.cpp chooses among them at run time.
//
// Three or four passes over a row, which stays in cache between them:
//
//     maxima       and the student's most likely entry
//     sums         normalisers, entropies, and what keeps the digits of a near-equal row
//     divergence   of a mixture, with its mean score
//     gradient     weight * p (score - mean score), over the student's row if the caller wants that; at beta 0 and 1,
//                  where the mean score is there already, together with the divergence
//
// divergence.h has the formulas. Elements and short sums are fp32, sums of blocks and everything that exists once a row
// is float64.
#include <algorithm>
#include <cmath>
#include <limits>

#include "divergence.h"
#include "row_divergence.h"

namespace scsdpo {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <>
struct Bits<Floats> {
  using type = Ints;
};

constexpr int64_t kBlock = 64 * kLanes;  // a lane adds 64 elements in fp32 before it is added up in float64
constexpr float kInfinity = std::numeric_limits<float>::infinity();

SCSDPO_INLINE Floats load(const float* from, int count, float padding) {
  Floats x = splat<Floats>(padding);
  if (count == kLanes)
    memcpy(&x, from, sizeof x);
  else
    memcpy(&x, from, 4 * count);
  return x;
}

struct BFloat16 {
  uint16_t bits;
};

SCSDPO_INLINE Floats load(const BFloat16* from, int count, float padding) {
  Floats x = splat<Floats>(padding);
  Halves y = __builtin_convertvector(to_bits(x) >> 16 & 0xffff, Halves);
  if (count == kLanes)
    memcpy(&y, from, sizeof y);
  else
    memcpy(&y, from, 2 * count);
  return from_bits<Floats>(__builtin_convertvector(y, Ints) << 16);
}

SCSDPO_INLINE void store(float* to, Floats x, int count) {
  if (count == kLanes)
    memcpy(to, &x, sizeof x);
  else
    memcpy(to, &x, 4 * count);
}

SCSDPO_INLINE void store(BFloat16* to, Floats x, int count) {  // to nearest, ties to even; NaN stays NaN
  Ints bits = to_bits(x);
  Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  Ints chosen = x == x ? rounded : bits | 0x400000;
  Halves y = __builtin_convertvector((chosen >> 16) & 0xffff, Halves);
  if (count == kLanes)
    memcpy(to, &y, sizeof y);
  else
    memcpy(to, &y, 2 * count);
}

SCSDPO_INLINE double sum(Floats x) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// A row's logits of a type, in memory.
template <class Logit, bool difference>
struct Memory {
  const Logit* student;
  const Logit* teacher;
  int64_t vocabulary;

  SCSDPO_INLINE Logits<Floats> at(int64_t v, int count) const {
    Floats s = load(student + v, count, -kInfinity);
    if constexpr (difference) {
      Floats x = load(teacher + v, count, 0.0f);
      return {s, s + x, x};
    }
    Floats t = load(teacher + v, count, -kInfinity);
    return {s, t, t - s};
  }

  // Calls visit(v, count) for every vector of kLanes entries (the last one may have fewer), and flush() after each
  // kBlock entries.
  template <class Visit, class Flush>
  SCSDPO_INLINE void walk(Visit visit, Flush flush) const {
    for (int64_t block = 0; block < vocabulary; block += kBlock) {
      int64_t end = std::min(block + kBlock, vocabulary);
      int64_t v = block;
      for (; v + kLanes <= end; v += kLanes) visit(v, kLanes);
      if (v < end) visit(v, static_cast<int>(end - v));
      flush();
    }
  }
};

// A NaN is passed over here and shows in the sums.
template <class Memory>
Row maxima(const Memory& memory, float temperature) {
  const Floats lowest = splat<Floats>(-kInfinity);
  Floats student = lowest, teacher = lowest, own = splat<Floats>(0.0f);  // lane by lane
  memory.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto at = memory.at(v, count);
        auto higher = at.s > student;
        student = higher ? at.s : student;
        own = higher ? at.difference : own;
        teacher = at.t > teacher ? at.t : teacher;
      },
      [] {});
  int best = 0;
  for (int i = 1; i < kLanes; ++i) {
    if (student[i] > student[best]) best = i;
    if (teacher[i] > teacher[0]) teacher[0] = teacher[i];
  }
  return row_of(student[best], teacher[0], own[best], temperature);
}

template <Objective objective, class Memory>
Sums<double> sums(const Memory& memory, const Row& row) {
  Sums<double> total{};
  Sums<Floats> partial{};
  memory.walk([&](int64_t v, int count)
                  __attribute__((always_inline)) { add<objective>(partial, memory.at(v, count), row); },
              [&]() __attribute__((always_inline)) {
                total.student += sum(partial.student);
                total.teacher += sum(partial.teacher);
                total.student_moment += sum(partial.student_moment);
                total.teacher_moment += sum(partial.teacher_moment);
                total.excess += sum(partial.excess);
                total.linear += sum(partial.linear);
                partial = Sums<Floats>{};
              });
  return total;
}

// The divergence, and of a mixture the mean score, which the gradient then needs; the other gradients are written on
// the way, if `gradient` is given.
template <Objective objective, class Memory, class Gradient>
double divergence(const Memory& memory, const Mixture& mix, Row& row, float scale, Gradient* gradient) {
  double divergence = 0, mean_score = 0;
  Floats d_sum{}, score_sum{};
  memory.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto at = probabilities(memory.at(v, count), row);
        auto [d, score] = entry<objective>(at.p, at.q, at.d, mix);
        d_sum += d;
        if constexpr (objective == Objective::kJensenShannon)
          score_sum += weighted_score<objective>(at.p, score - row.reference);
        else if (gradient)
          store(gradient + v, slope<objective>(at, score, row) * scale, count);
      },
      [&]() __attribute__((always_inline)) {
        divergence += sum(d_sum);
        mean_score += sum(score_sum);
        d_sum = score_sum = Floats{};
      });
  if (objective == Objective::kJensenShannon) row.mean_score = static_cast<float>(mean_score);
  return divergence < 0 ? 0 : divergence;  // what is left of a row whose entries have underflowed
}

template <Objective objective, class Memory, class Gradient>
void one_row(const RowDivergence& task, const Mixture& mix, const Memory& memory, int64_t r) {
  Row row = maxima(memory, task.temperature);
  Entropies entropy = conclude<objective>(sums<objective>(memory, row), mix, row);
  auto gradient = static_cast<Gradient*>(task.gradient);
  if (gradient) gradient += r * task.gradient_stride;
  float scale = gradient ? slope_scale<objective>(task.weight[r], mix, row) : 0.0f;
  if (task.target) {  // read before the gradient is written
    Logits<Floats> target = memory.at(task.target[r], 1);
    task.student_logp[r] = (target.s[0] - row.max_student) * row.inverse_temperature - row.log_student;
    task.teacher_logp[r] = (target.t[0] - row.max_teacher) * row.inverse_temperature - row.log_teacher;
  }
  if (task.old_logp) {
    task.importance_ratio[r] = importance_ratio(task.student_logp[r], task.old_logp[r], task.importance_clip);
    scale *= task.importance_ratio[r];
  }
  double value = divergence<objective>(memory, mix, row, scale, gradient);

  task.divergence[r] = static_cast<float>(value);
  task.student_entropy[r] = entropy.student;
  task.teacher_entropy[r] = entropy.teacher;
  if constexpr (objective == Objective::kJensenShannon) {
    if (!gradient) return;
    if (std::isnan(value)) row.mean_score = static_cast<float>(value);  // a NaN row is NaN throughout
    memory.walk(
        [&](int64_t v, int count) __attribute__((always_inline)) {
          auto at = probabilities(memory.at(v, count), row);
          Floats score = entry<objective>(at.p, at.q, at.d, mix).score;
          store(gradient + v, slope<objective>(at, score, row) * scale, count);
        },
        [] {});
  }
}

template <class Logit, bool difference, class Gradient>
void one_row(const RowDivergence& task, const Mixture& mix, int64_t r) {
  Memory<Logit, difference> memory{static_cast<const Logit*>(task.student) + r * task.student_stride,
                                   static_cast<const Logit*>(task.teacher) + r * task.teacher_stride, task.vocabulary};
  auto row = task.beta == 0   ? one_row<Objective::kForward, decltype(memory), Gradient>
             : task.beta == 1 ? one_row<Objective::kReverse, decltype(memory), Gradient>
                              : one_row<Objective::kJensenShannon, decltype(memory), Gradient>;
  row(task, mix, memory, r);
}

template <class Logit, bool difference>
void one_row(const RowDivergence& task, const Mixture& mix, int64_t r) {
  if (task.gradient_dtype == DType::kFloat32)
    one_row<Logit, difference, float>(task, mix, r);
  else
    one_row<Logit, difference, BFloat16>(task, mix, r);
}

template <class Logit>
void one_row(const RowDivergence& task, const Mixture& mix, int64_t r) {
  if (task.teacher_is_difference)
    one_row<Logit, true>(task, mix, r);
  else
    one_row<Logit, false>(task, mix, r);
}

}  // namespace

#define SCSDPO_CONCATENATE(a, b) a##b
#define SCSDPO_ROWS(set) SCSDPO_CONCATENATE(row_divergence_, set)

void SCSDPO_ROWS(SCSDPO_INSTRUCTION_SET)(const RowDivergence& task, const Mixture& mix, int64_t r) {
  task.logits_dtype == DType::kFloat32 ? one_row<float>(task, mix, r) : one_row<BFloat16>(task, mix, r);
}

}  // namespace scsdpo
