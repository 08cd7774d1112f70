// One row of what row_divergence.h declares, on one instruction set. CMake compiles this file once for each, with its
// flags and SCSDPO_INSTRUCTION_SET = baseline | avx2 | avx512; dispatch_cpu.cpp chooses among them at run time.
//
// Three or four passes over a row, which stays in cache between them:
//
//     maxima       and the student's most likely entry
//     sums         normalisers, entropies, and what keeps the digits of a near-equal row
//     divergence   of a mixture, with its mean score
//     gradient     weight * p (score - mean score), over the student's row if the caller wants that; at beta 0 and 1,
//                  where the mean score is there already, together with the divergence; and a policy's
//
// A part of a row takes the passes that its call needs.
//
// divergence.h has the formulas. Elements and short sums are fp32, sums of blocks and everything that exists once a row
// is float64.
#include <algorithm>
#include <cmath>

#include "row_divergence.h"
#include "simd.h"

// There is one copy of each loop, for where a compiler fuses products into sums depends on what stands around them:
// rows and parts of rows then round alike. CMake forbids further copies for constant arguments.
#define SCSDPO_ALONE __attribute__((noinline))

namespace scsdpo {
namespace {

constexpr int64_t kBlock = 64 * kLanes;  // a lane adds 64 elements in fp32 before it is added up in float64

// A row's logits in memory.
template <class Logit, bool difference>
struct Memory {
  const Logit* student;
  const Logit* teacher;
  int64_t vocabulary;
  float inverse_softcap;  // the student's; 0: none

  SCSDPO_INLINE Pair<Floats> at(int64_t v, int count) const {
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

// A NaN passes here unseen and shows in the sums.
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

template <Kind kind, class Memory>
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
          add<kind>(partial, logits, row, {student, (student + above) * inverse_scale, above, y});
        } else {
          add<kind>(partial, logits, row);
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
SCSDPO_INLINE Floats capped(Floats gradient, Floats z, float inverse_softcap) {
  return inverse_softcap == 0.0f ? gradient : gradient * softcap_slope(z, inverse_softcap);
}

// What a policy adds to a row's gradient: pull (p - [v = y]) of its target y.
struct Pull {
  float pull;           // coefficient A r / temperature; 0: nothing
  int64_t column;       // y, or negative: it is not here
  Pair<Floats> target;  // its logits, read before the gradient is written over them
  float above;          // p_y - 1, with all its digits
};

SCSDPO_INLINE Floats pulled(Floats gradient, Floats p, float pull) {
  return pull == 0.0f ? gradient : gradient + p * pull;
}

// Calls use(probabilities, entry, range) for some entries. Where student and teacher are near in all of them, which is
// how self-distillation has most, the teacher's probabilities and every formula for far ones are left out.
template <Kind kind, class Use>
SCSDPO_INLINE void with_entries(const Pair<Floats>& logits, const Row& row, const Mixture& mix, Use use) {
  const Floats p = student_probability(logits, row), d = log_ratio(logits, row);
  if (kind != Kind::kClipped && all_less(abs_value(d), 1.0f)) {
    use(Probabilities<Floats>{p, p, d}, entry<kind, Range::kNear>(p, p, d, mix), Near{});
  } else {
    const Floats q = teacher_probability(logits, row);
    use(Probabilities<Floats>{p, q, d}, entry<kind>(p, q, d, mix), Any{});
  }
}

// The terms of the divergence; the gradients that need none of them are written on the way, if `gradient` is given.
template <Kind kind, class Memory, class Gradient>
SCSDPO_ALONE void terms(const Memory& memory, const Mixture& mix, const Row& row, float scale, float pull,
                        Gradient* gradient, double (&total)[kTermCount<kind>]) {
  Floats partial[kTermCount<kind>] = {};
  memory.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto logits = memory.at(v, count);
        with_entries<kind>(
            logits, row, mix, [&](const auto& at, const auto& of, auto range) __attribute__((always_inline)) {
              add_terms<kind>(partial, at, of, row, mix);
              if (!kLateMean<kind> && gradient) {
                const Floats g = pulled(slope<kind, range.value>(at, of.score, row, mix) * scale, at.p, pull);
                store(gradient + v, capped(g, logits.s, memory.inverse_softcap), count);
              }
            });
      },
      [&]() __attribute__((always_inline)) {
        for (int i = 0; i < kTermCount<kind>; ++i) total[i] += sum(partial[i]), partial[i] = Floats{};
      });
}

template <Kind kind, class Memory, class Gradient>
void write_gradient(const Memory& memory, const Mixture& mix, const Row& row, float scale, float pull,
                    Gradient* gradient) {
  memory.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto logits = memory.at(v, count);
        with_entries<kind>(
            logits, row, mix, [&](const auto& at, const auto& of, auto range) __attribute__((always_inline)) {
              const Floats g = pulled(slope<kind, range.value>(at, of.score, row, mix) * scale, at.p, pull);
              store(gradient + v, capped(g, logits.s, memory.inverse_softcap), count);
            });
      },
      [] {});
}

// A policy's gradient alone, of a row whose divergence has no weight: nothing of the teacher is in it.
template <class Memory, class Gradient>
SCSDPO_ALONE void write_pull(const Memory& memory, const Row& row, float pull, Gradient* gradient) {
  memory.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        const Floats s = memory.at(v, count).s;
        store(gradient + v, capped(student_probability(Pair<Floats>{s, s, s}, row) * pull, s, memory.inverse_softcap),
              count);
      },
      [] {});
}

// The target's entry, once more and alone: p_y - 1 would have lost its digits.
template <Kind kind, class Memory, class Gradient>
SCSDPO_ALONE void write_target(const Memory& memory, const Mixture& mix, const Row& row, float scale, const Pull& of,
                               Gradient* gradient) {
  if (of.pull == 0.0f || of.column < 0) return;
  Floats g{};
  if (scale != 0.0f)
    with_entries<kind>(of.target, row, mix, [&](const auto& at, const auto& entry, auto range) {
      g = slope<kind, range.value>(at, entry.score, row, mix) * scale;
    });
  store(gradient + of.column, capped(g + of.pull * of.above, of.target.s, memory.inverse_softcap), 1);
}

// One of a row's numbers.
SCSDPO_INLINE float& scalar(const Matrix& scalars, Scalar number, int64_t r) {
  return static_cast<float*>(scalars.at)[number * scalars.stride + r];
}
SCSDPO_INLINE double& term(const Matrix& terms, int number, int64_t r) {
  return static_cast<double*>(terms.at)[number * terms.stride + r];
}

// A row of weight 0 gets zeros: its 0 may not meet an infinity.
template <class Memory, class Gradient>
void write_zeros(const Memory& memory, Gradient* gradient) {
  memset(gradient, 0, memory.vocabulary * sizeof *gradient);
}

SCSDPO_INLINE PolicyTerms policy_of(const PerRow& rows, float logp, int64_t r) {
  const Policy& policy = rows.policy;
  float ratio = policy.ratio ? policy.ratio[r] : rows.old_logp ? std::exp(logp - rows.old_logp[r]) : 1.0f;
  if (logp != logp) ratio = logp;  // a NaN row is NaN throughout
  return policy_terms(policy.advantage[r], ratio, policy.lowest, policy.highest);
}

template <Kind kind, class Memory, class Gradient>
SCSDPO_ALONE void whole_row(const Memory& memory, const Mixture& mix, const PerRow& rows, const Matrix& scalars,
                            Gradient* gradient, int64_t r) {
  Row row = maxima(memory, mix.objective.temperature);
  const Entropies entropy = conclude<kind>(sums<kind>(memory, row), mix, row);
  scalar(scalars, kStudentEntropy, r) = entropy.student;
  scalar(scalars, kTeacherEntropy, r) = entropy.teacher;
  float scale = gradient ? slope_scale<kind>(rows.weight[r], mix, row) : 0.0f;
  Pull of_policy{};
  if (rows.target) {  // read before the gradient is written
    const Pair<Floats> target = memory.at(rows.target[r], 1);
    const float logp = (target.s[0] - row.max_student) * row.inverse_temperature - row.log_student;
    scalar(scalars, kStudentLogp, r) = logp;
    scalar(scalars, kTeacherLogp, r) = (target.t[0] - row.max_teacher) * row.inverse_temperature - row.log_teacher;
    if (rows.policy.advantage) {
      const PolicyTerms of = policy_of(rows, logp, r);
      scalar(scalars, kImportanceRatio, r) = 1.0f;
      scalar(scalars, kPolicyLoss, r) = of.loss;
      scalar(scalars, kPolicyClipped, r) = of.clipped;
      const float coefficient = gradient ? rows.policy.coefficient[r] : 0.0f;
      const float pull = coefficient == 0.0f ? 0.0f : coefficient * of.slope * row.inverse_temperature;
      of_policy = {pull, rows.target[r], target, std::expm1(logp)};
    }
    if (rows.old_logp) {
      const float ratio = importance_ratio(logp, rows.old_logp[r], rows.importance_clip);
      scalar(scalars, kImportanceRatio, r) = ratio;
      if (scale != 0.0f) scale *= ratio;  // which may be NaN
    }
  }
  double total[kTermCount<kind>] = {};
  terms<kind>(memory, mix, row, scale, of_policy.pull, scale == 0.0f ? nullptr : gradient, total);
  scalar(scalars, kDivergence, r) = static_cast<float>(finish<kind>(total, row));
  if (!gradient) return;
  if (scale == 0.0f && of_policy.pull == 0.0f) return write_zeros(memory, gradient);
  if (scale == 0.0f)
    write_pull(memory, row, of_policy.pull, gradient);
  else if constexpr (kLateMean<kind>)
    write_gradient<kind>(memory, mix, row, scale, of_policy.pull, gradient);
  write_target<kind>(memory, mix, row, scale, of_policy, gradient);
}

template <class Memory>
void statistics_of_row(const Memory& memory, float temperature, const Statistics& out, int64_t r) {
  Row row = maxima(memory, temperature);
  const Sums<double> all = sums<Kind::kForward>(memory, row);  // every objective has the same
  const Entropies entropy = conclude<Kind::kForward>(all, Mixture{}, row);
  const LogSumExp lse = log_sum_exp(all, row);
  out.student_lse[r] = lse.student;
  out.teacher_lse[r] = lse.teacher;
  out.student_max[r] = row.max_student;
  out.centre[r] = row.centre;
  out.log_ratio[r] = row.log_ratio;
  out.student_entropy[r] = entropy.student;
  out.teacher_entropy[r] = entropy.teacher;
}

template <Kind kind>
Row known_row(const Statistics& statistics, const Mixture& mix, int64_t r) {
  return row_of_statistics<kind>({statistics.student_lse[r], statistics.teacher_lse[r]}, statistics.centre[r],
                                 statistics.log_ratio[r], mix);
}

template <Kind kind, class Memory>
SCSDPO_ALONE void terms_of_part(const Memory& memory, const Mixture& mix, const Statistics& statistics,
                                const Matrix& out, int64_t r) {
  double total[kTermCount<kind>] = {};
  terms<kind, Memory, float>(memory, mix, known_row<kind>(statistics, mix, r), 0.0f, 0.0f, nullptr, total);
  for (int i = 0; i < kTermCount<kind>; ++i) term(out, i, r) = total[i];
}

template <Kind kind, class Memory, class Gradient>
SCSDPO_ALONE void gradient_of_part(const Memory& memory, const Mixture& mix, const Statistics& statistics,
                                   const Matrix& all, const PerRow& rows, const Matrix& scalars, Gradient* gradient,
                                   int64_t r) {
  Row row = known_row<kind>(statistics, mix, r);
  double total[kTermCount<kind>];
  for (int i = 0; i < kTermCount<kind>; ++i) total[i] = term(all, i, r);
  const double divergence = finish<kind>(total, row);
  scalar(scalars, kDivergence, r) = static_cast<float>(divergence);
  if (kind == Kind::kReverse)  // its scores' mean is the divergence itself
    row.mean_score = bounded_mean(static_cast<float>(divergence - row.reference));
  if (!gradient) return;
  const float scale = slope_scale<kind>(rows.weight[r], mix, row);
  Pull of_policy{};
  if (rows.policy.coefficient) {
    of_policy.pull = rows.policy.coefficient[r] * row.inverse_temperature;
    of_policy.column = rows.target[r];
    if (of_policy.column >= 0) {
      of_policy.target = memory.at(of_policy.column, 1);
      const double inverse = row.inverse_temperature;
      of_policy.above = static_cast<float>(std::expm1(of_policy.target.s[0] * inverse - statistics.student_lse[r]));
    }
  }
  if (scale == 0.0f && of_policy.pull == 0.0f)
    write_zeros(memory, gradient);
  else if (scale == 0.0f)
    write_pull(memory, row, of_policy.pull, gradient);
  else
    write_gradient<kind>(memory, mix, row, scale, of_policy.pull, gradient);
  write_target<kind>(memory, mix, row, scale, of_policy, gradient);
}

// ---------------------------------------------------------------------------------------------------------------
// Run-time values choose templates.

template <class Logit, bool difference>
Memory<Logit, difference> memory_of(const Logits& logits, int64_t r) {
  return {static_cast<const Logit*>(logits.student.at) + r * logits.student.stride,
          static_cast<const Logit*>(logits.teacher.at) + r * logits.teacher.stride, logits.vocabulary,
          logits.softcap == 0.0f ? 0.0f : 1.0f / logits.softcap};
}

// Calls use(memory) for row r.
template <class Use>
void with_memory(const Logits& logits, int64_t r, Use use) {
  switch (logits.student.dtype) {
    case DType::kFloat32:
      return logits.difference ? use(memory_of<float, true>(logits, r)) : use(memory_of<float, false>(logits, r));
    case DType::kBFloat16:
      return logits.difference ? use(memory_of<BFloat16, true>(logits, r)) : use(memory_of<BFloat16, false>(logits, r));
    case DType::kFloat64:
      return use(memory_of<double, false>(logits, r));
    case DType::kFloat16:  // no logits are
      return;
  }
}

template <Kind k>
struct Of {
  static constexpr Kind kind = k;
};

// Calls use(memory, Of<kind>{}) for row r.
template <class Use>
void with_row(const Logits& logits, Kind kind, int64_t r, Use use) {
  with_memory(logits, r, [&](const auto& memory) {
#define SCSDPO_KIND_CASE(kind, name) \
  case Kind::kind:                   \
    return use(memory, Of<Kind::kind>{});
    switch (kind) { SCSDPO_KINDS(SCSDPO_KIND_CASE) }
  });
}

// Calls use(row r of a gradient), which is null where there is none.
template <class Use>
void with_gradient(const Matrix& gradient, int64_t r, Use use) {
  if (!gradient.at)
    use(static_cast<float*>(nullptr));
  else if (gradient.dtype == DType::kFloat32)
    use(static_cast<float*>(gradient.at) + r * gradient.stride);
  else
    use(static_cast<BFloat16*>(gradient.at) + r * gradient.stride);
}

}  // namespace

void SCSDPO_NAME(row_divergence)(const Logits& logits, const Mixture& mix, const PerRow& rows, const Matrix& scalars,
                                 const Matrix& gradient, int64_t r) {
  with_row(logits, mix.objective.kind, r, [&](const auto& memory, auto of) {
    with_gradient(gradient, r, [&](auto* out) { whole_row<decltype(of)::kind>(memory, mix, rows, scalars, out, r); });
  });
}

void SCSDPO_NAME(row_statistics)(const Logits& logits, float temperature, const Statistics& out, int64_t r) {
  with_memory(logits, r, [&](const auto& memory) { statistics_of_row(memory, temperature, out, r); });
}

void SCSDPO_NAME(row_terms)(const Logits& logits, const Mixture& mix, const Statistics& statistics, const Matrix& terms,
                            int64_t r) {
  with_row(logits, mix.objective.kind, r,
           [&](const auto& memory, auto of) { terms_of_part<decltype(of)::kind>(memory, mix, statistics, terms, r); });
}

void SCSDPO_NAME(row_gradient)(const Logits& logits, const Mixture& mix, const Statistics& statistics,
                               const Matrix& terms, const PerRow& rows, const Matrix& scalars, const Matrix& gradient,
                               int64_t r) {
  with_row(logits, mix.objective.kind, r, [&](const auto& memory, auto of) {
    with_gradient(gradient, r, [&](auto* out) {
      gradient_of_part<decltype(of)::kind>(memory, mix, statistics, terms, rows, scalars, out, r);
    });
  });
}

}  // namespace scsdpo
