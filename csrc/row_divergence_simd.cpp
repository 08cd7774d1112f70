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
// A part of a row (Stage) takes the passes that its stage needs.
//
// divergence.h has the formulas. Elements and short sums are fp32, sums of blocks and everything that exists once a row
// is float64.
#include <algorithm>
#include <cmath>

#include "row_divergence.h"
#include "simd.h"

namespace scsdpo {
namespace {

constexpr int64_t kBlock = 64 * kLanes;  // a lane adds 64 elements in fp32 before it is added up in float64

// A row's logits of a type, in memory.
template <class Logit, bool difference>
struct Memory {
  const Logit* student;
  const Logit* teacher;
  int64_t vocabulary;

  SCSDPO_INLINE Logits<Floats> at(int64_t v, int count) const {
    auto s = load(student + v, count, -kInfinity);
    if constexpr (difference) {
      Floats x = load(teacher + v, count, 0.0f);
      return {s, s + x, x};
    }
    auto t = load(teacher + v, count, -kInfinity);
    return {to_floats(s), to_floats(t), to_floats(t - s)};
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
  const Floats lowest = splat<Floats>(kLowest);
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
  const float inverse_scale = 1.0f / row.teacher_scale;
  memory.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto logits = memory.at(v, count);
        const Floats y = log_ratio_from_centre(logits, row);
        if (all_less(abs_value(y), 1.0f)) {
          const Floats student = boltzmann(logits.s - row.max_student, row),
                       above = excess<Range::kNear>(student, student, y);
          add<objective>(partial, logits, row, {student, (student + above) * inverse_scale, above, y});
        } else {
          add<objective>(partial, logits, row);
        }
      },
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

struct Any {
  static constexpr Range value = Range::kAny;
};
struct Near {
  static constexpr Range value = Range::kNear;
};

// A gradient through the student's softcap, if there is one.
SCSDPO_INLINE Floats capped(Floats gradient, Floats z, const Row& row) {
  return row.inverse_softcap == 0.0f ? gradient : gradient * softcap_slope(z, row.inverse_softcap);
}

// Calls use(probabilities, entry, range) for some entries. Where student and teacher are near in all of them, which is
// how self-distillation has most, the teacher's probabilities and every formula for far ones are left out.
template <Objective objective, class Use>
SCSDPO_INLINE void with_entries(const Logits<Floats>& logits, const Row& row, const Mixture& mix, Use use) {
  const Floats p = student_probability(logits, row), d = log_ratio(logits, row);
  if (objective != Objective::kClippedForward && all_less(abs_value(d), 1.0f)) {
    use(Probabilities<Floats>{p, p, d}, entry<objective, Range::kNear>(p, p, d, mix), Near{});
  } else {
    const Floats q = teacher_probability(logits, row);
    use(Probabilities<Floats>{p, q, d}, entry<objective>(p, q, d, mix), Any{});
  }
}

// The terms of the divergence; the gradients that need none of them are written on the way, if `gradient` is given.
template <Objective objective, class Memory, class Gradient>
void terms(const Memory& memory, const Mixture& mix, const Row& row, float scale, Gradient* gradient,
           double (&total)[kTermCount<objective>]) {
  Floats partial[kTermCount<objective>] = {};
  memory.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto logits = memory.at(v, count);
        with_entries<objective>(
            logits, row, mix, [&](const auto& at, const auto& of, auto range) __attribute__((always_inline)) {
              add_terms<objective>(partial, at, of, row, mix);
              if (!kLateMean<objective> && gradient)
                store(gradient + v, capped(slope<objective, range.value>(at, of.score, row) * scale, logits.s, row),
                      count);
            });
      },
      [&]() __attribute__((always_inline)) {
        for (int i = 0; i < kTermCount<objective>; ++i) total[i] += sum(partial[i]), partial[i] = Floats{};
      });
}

template <Objective objective, class Memory, class Gradient>
void write_gradient(const Memory& memory, const Mixture& mix, const Row& row, float scale, Gradient* gradient) {
  memory.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto logits = memory.at(v, count);
        with_entries<objective>(
            logits, row, mix, [&](const auto& at, const auto& of, auto range) __attribute__((always_inline)) {
              store(gradient + v, capped(slope<objective, range.value>(at, of.score, row) * scale, logits.s, row),
                    count);
            });
      },
      [] {});
}

template <Objective objective, class Memory, class Gradient>
void whole_row(const RowDivergence& task, const Mixture& mix, const Memory& memory, int64_t r) {
  Row row = maxima(memory, task.temperature);
  row.inverse_softcap = task.student_softcap == 0.0f ? 0.0f : 1.0f / task.student_softcap;
  const Sums<double> all = sums<objective>(memory, row);
  Entropies entropy = conclude<objective>(all, mix, row);
  task.student_entropy[r] = entropy.student;
  task.teacher_entropy[r] = entropy.teacher;
  if (task.stage == Stage::kStatistics) {
    LogSumExp lse = log_sum_exp(all, row);
    task.student_lse[r] = lse.student;
    task.teacher_lse[r] = lse.teacher;
    if (task.centre) {
      task.student_max[r] = row.max_student;
      task.centre[r] = row.centre;
      task.log_ratio[r] = row.log_ratio;
    }
    return;
  }
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
  Gradient* wanted = scale == 0.0f ? nullptr : gradient;
  double total[kTermCount<objective>] = {};
  terms<objective>(memory, mix, row, scale, wanted, total);
  task.divergence[r] = static_cast<float>(finish<objective>(total, row));
  if (gradient && !wanted)  // whatever the row holds: 0 may not meet an infinity
    memset(gradient, 0, task.vocabulary * sizeof *gradient);
  else if (kLateMean<objective> && gradient)
    write_gradient<objective>(memory, mix, row, scale, gradient);
}

// Some entries of a row whose statistics are known.
template <Objective objective, class Memory, class Gradient>
void part_of_row(const RowDivergence& task, const Mixture& mix, const Memory& memory, int64_t r) {
  Row row = row_of_statistics<objective>(task.student_lse[r], task.teacher_lse[r], task.centre[r], task.log_ratio[r],
                                         task.temperature, mix);
  row.inverse_softcap = task.student_softcap == 0.0f ? 0.0f : 1.0f / task.student_softcap;
  double total[kTermCount<objective>] = {};
  if (task.stage == Stage::kTerms) {
    terms<objective, Memory, Gradient>(memory, mix, row, 0.0f, nullptr, total);
    for (int i = 0; i < kTermCount<objective>; ++i) task.terms[i * task.rows + r] = total[i];
    return;
  }
  for (int i = 0; i < kTermCount<objective>; ++i) total[i] = task.terms[i * task.rows + r];
  double divergence = finish<objective>(total, row);
  task.divergence[r] = static_cast<float>(divergence);
  if (objective == Objective::kReverse)  // its scores' mean is the divergence itself
    row.mean_score = bounded_mean(static_cast<float>(divergence - row.reference));
  if (!task.gradient) return;
  auto gradient = static_cast<Gradient*>(task.gradient) + r * task.gradient_stride;
  float scale = slope_scale<objective>(task.weight[r], mix, row);
  if (scale == 0.0f)
    memset(gradient, 0, task.vocabulary * sizeof *gradient);
  else
    write_gradient<objective>(memory, mix, row, scale, gradient);
}

template <Objective objective, class Memory, class Gradient>
void one_row(const RowDivergence& task, const Mixture& mix, const Memory& memory, int64_t r) {
  const bool is_part = task.stage == Stage::kTerms || task.stage == Stage::kGradient;
  auto row = is_part ? part_of_row<objective, Memory, Gradient> : whole_row<objective, Memory, Gradient>;
  row(task, mix, memory, r);
}

template <class Logit, bool difference, class Gradient>
void one_row(const RowDivergence& task, const Mixture& mix, int64_t r) {
  Memory<Logit, difference> memory{static_cast<const Logit*>(task.student) + r * task.student_stride,
                                   static_cast<const Logit*>(task.teacher) + r * task.teacher_stride, task.vocabulary};
  auto row = task.entry_clip  ? one_row<Objective::kClippedForward, decltype(memory), Gradient>
             : task.beta == 0 ? one_row<Objective::kForward, decltype(memory), Gradient>
             : task.beta == 1 ? one_row<Objective::kReverse, decltype(memory), Gradient>
                              : one_row<Objective::kJensenShannon, decltype(memory), Gradient>;
  row(task, mix, memory, r);
}

template <class Logit>
void one_row(const RowDivergence& task, const Mixture& mix, int64_t r) {
  const bool fp32 = task.gradient_dtype == DType::kFloat32;
  if (task.teacher_is_difference)
    fp32 ? one_row<Logit, true, float>(task, mix, r) : one_row<Logit, true, BFloat16>(task, mix, r);
  else
    fp32 ? one_row<Logit, false, float>(task, mix, r) : one_row<Logit, false, BFloat16>(task, mix, r);
}

}  // namespace

void SCSDPO_NAME(row_divergence)(const RowDivergence& task, const Mixture& mix, int64_t r) {
  switch (task.logits_dtype) {
    case DType::kFloat32:
      return one_row<float>(task, mix, r);
    case DType::kBFloat16:
      return one_row<BFloat16>(task, mix, r);
    case DType::kFloat64:
      return one_row<double, false, float>(task, mix, r);
    case DType::kFloat16:  // no logits are
      return;
  }
}

}  // namespace scsdpo
