// Rows [begin, end) of a RowDivergence on one instruction set. CMake compiles this file once for each, with its flags
// and SCSDPO_INSTRUCTION_SET = baseline | avx2 | avx512; dispatch_cpu.cpp chooses among them at run time.
//
// Four passes over a row, which stays in cache between them:
//
//     maxima       m_s and the teacher's logit there, m_t
//     normalizers  Z_s = sum e^(s - m_s), Z_t, their entropies, and S = sum e^(s - m_s) expm1(y)
//                  with y = (t - s) - (m_t - m_s): log(Z_t / Z_s) = log1p(S / Z_s) keeps its digits as t -> s
//                  (y may be counted from another constant near m_t - m_s: see Normalizers)
//     divergence   the three sums of divergence.h, with d = y - log(Z_t / Z_s)
//     gradient     weight * p (score - mean score), over the student's row if the caller wants that
//
// Elements and short sums are fp32, sums of blocks and everything that exists once a row is float64.
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

SCSDPO_INLINE void store(float* to, Floats x, int count) {
  if (count == kLanes)
    memcpy(to, &x, sizeof x);
  else
    memcpy(to, &x, 4 * count);
}

struct BFloat16 {
  uint16_t bits;
};

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

// One row's logits, student's s and teacher's t, and their difference t - s.
template <bool difference>
struct Row {
  const float* student;
  const float* teacher;
  int64_t vocabulary;

  struct Entry {
    Floats s, t, difference_ts;
  };

  SCSDPO_INLINE Entry entry(int64_t v, int count) const {
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

// What every entry needs to know of its row.
struct Normalizers {
  float max_student, max_teacher;
  float difference;  // of the logits, that y is counted from: max_teacher - max_student, or a number very close to it
  float teacher_scale;  // e^(max_teacher - max_student - difference): puts e^(t - max_teacher) on the footing of e^y
  float inverse_temperature;
  float inverse_student, inverse_teacher;  // 1 / Z_s, 1 / Z_t
  float log_ratio;                         // log(Z_t / Z_s)
  double log_student, log_teacher;         // log Z_s, log Z_t

  template <class Entry>
  SCSDPO_INLINE Floats shifted_student(const Entry& e) const {
    return (e.s - max_student) * inverse_temperature;
  }
  template <class Entry>
  SCSDPO_INLINE Floats shifted_teacher(const Entry& e) const {
    return (e.t - max_teacher) * inverse_temperature;
  }
  template <class Entry>
  SCSDPO_INLINE Floats shifted_difference(const Entry& e) const {
    return (e.difference_ts - difference) * inverse_temperature;
  }
};

struct Entropies {
  double student, teacher;
};

// The student's most likely entry, and the largest logits. A NaN is passed over here and shows in the sums.
template <bool difference>
typename Row<difference>::Entry maxima(const Row<difference>& row, float temperature, Normalizers& n) {
  using Entry = typename Row<difference>::Entry;
  const Floats lowest = splat<Floats>(-kInfinity);
  Floats teacher = lowest;
  Entry top{lowest, lowest, splat<Floats>(0.0f)};  // lane by lane
  row.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        Entry e = row.entry(v, count);
        auto higher = e.s > top.s;
        top = {higher ? e.s : top.s, higher ? e.t : top.t, higher ? e.difference_ts : top.difference_ts};
        teacher = e.t > teacher ? e.t : teacher;
      },
      [] {});
  int best = 0;
  for (int i = 1; i < kLanes; ++i) {
    if (top.s[i] > top.s[best]) best = i;
    if (teacher[i] > teacher[0]) teacher[0] = teacher[i];
  }
  n.max_student = top.s[best];
  n.max_teacher = teacher[0];
  n.difference = n.max_teacher - n.max_student;
  n.teacher_scale = 1.0f;
  n.inverse_temperature = 1.0f / temperature;

  // Where top's own difference is the same but for rounding, counting from it makes y exactly zero at the entry that
  // may have nearly all the mass.
  float own = top.difference_ts[best];
  double apart = (double{n.max_teacher} - n.max_student - own) / temperature;
  if (std::abs(apart) * temperature <= 1e-6 * (std::abs(n.max_student) + std::abs(n.max_teacher)) &&
      std::abs(apart) < 1) {
    n.difference = own;
    n.teacher_scale = static_cast<float>(std::exp(apart));
  }
  return {splat<Floats>(top.s[best]), splat<Floats>(top.t[best]), splat<Floats>(own)};
}

template <bool difference>
Entropies normalizers(const Row<difference>& row, Normalizers& n) {
  double z_student = 0, z_teacher = 0, excess_sum = 0, mean_student = 0, mean_teacher = 0;
  const Floats zero = splat<Floats>(0.0f);
  Floats zs = zero, zt = zero, ex = zero, ms = zero, mt = zero;
  row.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto e = row.entry(v, count);
        Floats u_student = n.shifted_student(e), u_teacher = n.shifted_teacher(e);
        Floats e_student = exp_nonpositive(u_student), e_teacher = exp_nonpositive(u_teacher);
        zs += e_student;
        zt += e_teacher;
        ex += excess(e_student, e_teacher * n.teacher_scale, n.shifted_difference(e));
        ms += times(e_student, u_student);
        mt += times(e_teacher, u_teacher);
      },
      [&]() __attribute__((always_inline)) {
        z_student += sum(zs);
        z_teacher += sum(zt);
        excess_sum += sum(ex);
        mean_student += sum(ms);
        mean_teacher += sum(mt);
        zs = zt = ex = ms = mt = zero;
      });
  n.inverse_student = static_cast<float>(1.0 / z_student);
  n.inverse_teacher = static_cast<float>(1.0 / z_teacher);
  n.log_student = std::log(z_student);
  n.log_teacher = std::log(z_teacher);
  double ratio = excess_sum / z_student;  // Z_t / Z_s - 1, which cancels where Z_t is much the smaller
  n.log_ratio = static_cast<float>(ratio > -0.5 ? std::log1p(ratio)
                                                : n.log_teacher - n.log_student + std::log(double{n.teacher_scale}));
  return {n.log_student - mean_student / z_student, n.log_teacher - mean_teacher / z_teacher};
}

struct Probabilities {
  Floats p, q, d;
};

template <class Entry>
SCSDPO_INLINE Probabilities probabilities(const Entry& e, const Normalizers& n) {
  return {exp_nonpositive(n.shifted_student(e)) * n.inverse_student,
          exp_nonpositive(n.shifted_teacher(e)) * n.inverse_teacher, n.shifted_difference(e) - n.log_ratio};
}

template <Objective objective, bool difference>
Terms<double> divergence(const Row<difference>& row, const Normalizers& n, Shares shares, float reference) {
  Terms<double> total{0, 0, 0};
  const Floats zero = splat<Floats>(0.0f);
  Terms<Floats> partial{zero, zero, zero};
  row.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto [p, q, d] = probabilities(row.entry(v, count), n);
        Terms<Floats> terms = divergence_terms<objective>(p, q, d, shares, reference);
        partial.student += terms.student;
        partial.teacher += terms.teacher;
        partial.score += terms.score;
      },
      [&]() __attribute__((always_inline)) {
        total.student += sum(partial.student);
        total.teacher += sum(partial.teacher);
        total.score += sum(partial.score);
        partial = {zero, zero, zero};
      });
  return total;
}

template <Objective objective, bool difference, class Gradient>
void gradient(const Row<difference>& row, const Normalizers& n, Shares shares, float reference, float mean_score,
              float scale, Gradient* to) {
  row.walk(
      [&](int64_t v, int count) __attribute__((always_inline)) {
        auto [p, q, d] = probabilities(row.entry(v, count), n);
        store(to + v, centred_score<objective>(p, q, d, shares, reference, mean_score) * scale, count);
      },
      [] {});
}

template <Objective objective, bool difference>
void one_row(const RowDivergence& task, int64_t r) {
  Row<difference> row{task.student + r * task.student_stride, task.teacher + r * task.teacher_stride, task.vocabulary};

  Normalizers n{};
  Shares shares{static_cast<float>(1 - task.beta), static_cast<float>(task.beta)};
  auto top = maxima(row, task.temperature, n);
  Entropies entropy = normalizers(row, n);
  auto [p_top, q_top, d_top] = probabilities(top, n);
  float reference = score<objective>(p_top, q_top, d_top, shares)[0];
  if (!std::isfinite(reference)) reference = 0.0f;
  Terms<double> terms = divergence<objective>(row, n, shares, reference);

  double value = divergence_value<objective>(terms, task.beta);
  if (value < 0) value = 0;  // what is left of a row whose terms have underflowed
  task.divergence[r] = static_cast<float>(value);
  task.student_entropy[r] = static_cast<float>(entropy.student);
  task.teacher_entropy[r] = static_cast<float>(entropy.teacher);
  if (task.target) {
    auto e = row.entry(task.target[r], 1);
    task.student_logp[r] = static_cast<float>(n.shifted_student(e)[0] - n.log_student);
    task.teacher_logp[r] = static_cast<float>(n.shifted_teacher(e)[0] - n.log_teacher);
  }
  if (!task.gradient) return;

  // An infinite mean score (reverse KL where the teacher forbids what the student allows) is taken as the largest
  // finite one: the forbidden entries' gradient is then +inf, never inf - inf. A NaN row is NaN throughout.
  constexpr double largest = std::numeric_limits<float>::max();
  float mean_score = static_cast<float>(std::isnan(value) ? value : std::min(terms.score, largest));
  float scale = task.weight[r] * score_scale<objective>(shares) / task.temperature;
  int64_t offset = r * task.gradient_stride;
  if (task.gradient_dtype == DType::kFloat32)
    gradient<objective>(row, n, shares, reference, mean_score, scale, static_cast<float*>(task.gradient) + offset);
  else
    gradient<objective>(row, n, shares, reference, mean_score, scale, static_cast<BFloat16*>(task.gradient) + offset);
}

template <bool difference>
void rows(const RowDivergence& task, int64_t begin, int64_t end) {
  auto row = task.beta == 0   ? one_row<Objective::kForward, difference>
             : task.beta == 1 ? one_row<Objective::kReverse, difference>
                              : one_row<Objective::kJensenShannon, difference>;
  for (int64_t r = begin; r < end; ++r) row(task, r);
}

}  // namespace

#define SCSDPO_CONCATENATE(a, b) a##b
#define SCSDPO_ROWS(set) SCSDPO_CONCATENATE(row_divergence_, set)

void SCSDPO_ROWS(SCSDPO_INSTRUCTION_SET)(const RowDivergence& task, int64_t begin, int64_t end) {
  task.teacher_is_difference ? rows<true>(task, begin, end) : rows<false>(task, begin, end);
}

}  // namespace scsdpo
