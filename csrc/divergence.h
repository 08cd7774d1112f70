// One vocabulary entry of the divergence, and what it needs to know of its row: written once for a number and for a
// vector of them.
//
// p, q: student and teacher probability of the entry; d = log(q / p). Every divergence here is a sum of entries that
// are never negative, so nothing cancels when p and q are almost equal: p and q both sum to one, and an entry of KL(p
// || q) with its linear part is p log(p / q) - p + q = p phi(d), phi(x) = e^x - 1 - x >= 0. Near d = 0 every entry is a
// polynomial, exact to rounding however small d is.
//
//     forward  (beta = 0)  D = KL(q || p)                                dD/dz = p - q
//                          entry q phi(-d)
//     reverse  (beta = 1)  D = KL(p || q)                                dD/dz = p (-d - KL(p || q))
//                          entry p phi(d)
//     clipped (beta = 0)   D = sum_v min(q d, c)                         dD/dz = [q d <= c] (-q) + p (1 - Q)
//                          entry q phi(-d), or p - q + c beyond c        Q = sum of the clipped q; where that is
//                          most of 1, min(q d, c), and 1 - Q is summed itself: nothing cancels on either side
//     between              D = (1 - beta) KL(p || m) + beta KL(q || m)   dD/dz = (1 - beta) p (-a - KL(p || m))
//                          entry beta q d - m a                          m = (1 - beta) p + beta q,  a = log(m / p)
//     Jeffreys             D = (1 - beta) KL(q || p) + beta KL(p || q)   dD/dz = (1 - beta) (p - q)
//                          entry (1 - beta) q phi(-d) + beta p phi(d)            + beta p (-d - KL(p || q))
//     skewed forward       D = KL(q || m)                                dD/dz = (1 - beta)^2 p (s - sum p s)
//                          entry q y(m / q)                              s = (p - q) / m
//     skewed reverse       D = KL(p || m)                                dD/dz = p (s - sum p s)
//                          entry p y(m / p),  y(u) = u - 1 - log(u)      s = -a - (1 - beta) (p / m - 1)
//
// Functions are templates on F: float, or a vector of floats with the compiler's element-wise operators (on which
// `mask ? x : y` selects per element). -inf logits arrive as p = 0 or q = 0 with d = +inf, -inf or NaN and contribute
// their limit; a NaN in p or q comes out as NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "mixture.h"

#define SCSDPO_INLINE inline __attribute__((always_inline))

namespace scsdpo {
// Every instruction set compiles this header anew: the anonymous namespace keeps the linker from merging the copies.
namespace {

// How many sums of the entries there are (add_terms), and whether the gradient needs one of them.
template <Kind kind>
constexpr int kTermCount = kind == Kind::kClipped ? 4 : 2;
template <Kind kind>
constexpr bool kHasMixture =
    kind == Kind::kJensenShannon || kind == Kind::kSkewedForward || kind == Kind::kSkewedReverse;
template <Kind kind>
constexpr bool kLateMean = kHasMixture<kind> || kind == Kind::kClipped;

// ---------------------------------------------------------------------------------------------------------------
// Elementary functions, branch-free. Relative errors were measured against long double over the stated range.

template <class F>
struct Bits {
  using type = int32_t;  // the integers that F's bits fit in, element by element
};

template <class F>
SCSDPO_INLINE typename Bits<F>::type to_bits(F x) {
  typename Bits<F>::type i;
  memcpy(&i, &x, sizeof x);
  return i;
}

template <class F>
SCSDPO_INLINE F from_bits(typename Bits<F>::type i) {
  F x;
  memcpy(&x, &i, sizeof x);
  return x;
}

template <class F>
SCSDPO_INLINE F splat(float c) {
  return c - F{};  // plus 0 would be another number where c is -0, and so an instruction
}

template <class F>
SCSDPO_INLINE F abs_value(F x) {
  return from_bits<F>(to_bits(x) & 0x7fffffff);
}

// phi(x) = e^x - 1 - x for |x| <= 1, to 3e-7 relative: x^2 times a minimax polynomial.
template <class F>
SCSDPO_INLINE F phi(F x) {
  F r = x * 2.7722836e-6f + 2.535483e-5f;
  r = r * x + 1.9844023e-4f;
  r = r * x + 1.3885451e-3f;
  r = r * x + 8.3333105e-3f;
  r = r * x + 4.1666735e-2f;
  r = r * x + 1.6666667e-1f;
  r = r * x + 0.5f;
  return x * x * r;
}

constexpr float kLog2E = 1.44269504f;

// e^x for x <= 80, to 2e-7 relative; 0 below -87, where the result would leave the normal numbers.
template <class F>
SCSDPO_INLINE F exponential(F x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  F bounded = x < -87.0f ? splat<F>(-87.0f) : x;
  F shifted = bounded * kLog2E + round;
  F n = shifted - round;
  F r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact under times n
  F scale = from_bits<F>((to_bits(shifted) + 127) << 23);
  F y = scale + scale * (r + phi(r));
  return x < -87.0f ? splat<F>(0.0f) : y;
}

// log(1 + y), to 3e-7 relative, given u = 1 + y > 0 rounded and y itself, which still has the digits that u lost.
template <class F>
SCSDPO_INLINE F log_one_plus(F u, F y) {
  auto k = (to_bits(u) - 0x3f3504f3) >> 23;  // u = 2^k m, sqrt(1/2) <= m < sqrt(2)
  F exponent = from_bits<F>(k + 0x4b400000) - 12582912.0f;
  F f = k == 0 ? y : from_bits<F>(to_bits(u) - (k << 23)) - 1.0f;
  F z = f / (f + 2.0f);  // log(1 + f) = 2 artanh(z)
  F w = z * z;
  F series = w * ((w * 0.14790256f + 0.19994383f) * w + 0.33333343f);
  return exponent * 0.69314718f + (z + z) * (series + 1.0f);
}

template <class F>
struct Logarithm {
  F log, below;  // log(1 + y), and y - log(1 + y), in which nothing cancels where y is small
};

// As log_one_plus, both at once.
template <class F>
SCSDPO_INLINE Logarithm<F> logarithm(F u, F y) {
  auto k = (to_bits(u) - 0x3f3504f3) >> 23;
  F exponent = from_bits<F>(k + 0x4b400000) - 12582912.0f;
  F f = k == 0 ? y : from_bits<F>(to_bits(u) - (k << 23)) - 1.0f;
  F z = f / (f + 2.0f);
  F w = z * z;
  F series = w * ((w * 0.14790256f + 0.19994383f) * w + 0.33333343f);
  F log = exponent * 0.69314718f + (z + z) * (series + 1.0f);
  F near = z * f - (z + z) * series, far = y - log;  // f - 2 z = z f
  return {log, k == 0 ? near : far};
}

// p x, where p = 0 wins over an infinite x.
template <class F>
SCSDPO_INLINE F times(F p, F x) {
  return p == 0.0f ? splat<F>(0.0f) : p * x;
}

// tanh(x), to 4e-7 relative: -e / (e + 2) with e = expm1(-2 |x|).
template <class F>
SCSDPO_INLINE F hyperbolic_tangent(F x) {
  F y = abs_value(x) * -2.0f;
  F near = y + phi(y), far = exponential(y) - 1.0f;
  F e = y > -1.0f ? near : far;
  F z = e / (e + 2.0f);
  return x > 0.0f ? -z : z;
}

// kNear promises that every log ratio is within [-1, 1]. Formulas then need no q.
enum class Range { kAny, kNear };

// p e^x - p from both ends: exact to rounding for small x, and without overflow for large ones. q = p e^x.
template <Range range = Range::kAny, class F>
SCSDPO_INLINE F excess(F p, F q, F x) {
  F near = p * (x + phi(x)), far = q - p;  // both, before one is chosen: no branch
  if constexpr (range == Range::kNear) return near;
  return abs_value(x) < 1.0f ? near : far;
}

// x, and `below` where x is less or NaN.
template <class F>
SCSDPO_INLINE F at_least(float below, F x) {
  return x > below ? x : splat<F>(below);
}

// ---------------------------------------------------------------------------------------------------------------
// An entry.

template <class F>
struct Entry {
  F divergence;  // its share of D
  F score;       // dD/dz = p (score - mean score), times a constant for the mixtures (slope_scale). Of Jeffreys, that
                 // of KL(p || q). Of the clipped forward KL, 1 if the entry is clipped and 0 if not
};

template <class F>
SCSDPO_INLINE F polynomial(const float (&c)[kTerms], F x) {
  F y = splat<F>(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

template <Range range, class F>
SCSDPO_INLINE F forward_kl(F p, F q, F d) {  // q phi(-d) = p (d e^d - expm1(d))
  F curve = phi(d), near = p * (d * (d + curve) - curve), far = p - q + times(q, d);
  if constexpr (range == Range::kNear) return near;
  return abs_value(d) < 1.0f ? near : far;
}

template <Range range, class F>
SCSDPO_INLINE F reverse_kl(F p, F q, F d) {  // p phi(d)
  F near = p * phi(d), far = q - p - times(p, d);
  if constexpr (range == Range::kNear) return near;
  return abs_value(d) < 1.0f ? near : far;
}

template <Kind kind, class F>
SCSDPO_INLINE Entry<F> mixture_near(F p, F d, const Mixture& mix) {  // |d| <= 1
  if constexpr (kind == Kind::kSkewedReverse) {
    F e = d + phi(d) + 1.0f;  // q / p
    return {p * e * d * d * polynomial(mix.divergence, d), -d * e * polynomial(mix.score, d)};
  }
  return {p * d * d * polynomial(mix.divergence, d), -d * polynomial(mix.score, d)};
}

template <Kind kind, class F>
SCSDPO_INLINE Entry<F> mixture_far(F p, F q, F d, const Mixture& mix) {  // |d| >= 1, and finite
  auto turned = d > mix.turn;                                            // u = m / q rather than m / p
  F x = turned ? -d : d;
  F share = turned ? splat<F>(mix.student) : splat<F>(mix.teacher);
  F rest = turned ? splat<F>(mix.teacher) : splat<F>(mix.student);
  F ratio = exponential(x);
  if constexpr (kind != Kind::kJensenShannon) {
    F y = (ratio - 1.0f) * share, u = ratio * share + rest;
    auto of = logarithm(u, y);
    F term = rest * (1.0f - ratio) + ratio * (x - of.log);  // the other side's, over this one
    if constexpr (kind == Kind::kSkewedForward)
      return {turned ? q * of.below : p * term, (turned ? ratio - 1.0f : 1.0f - ratio) / u};
    F step = y / u;
    return {turned ? q * term : p * of.below, turned ? x - of.log - step * rest : of.below - step * (ratio * share)};
  }
  F log_u = log_one_plus(ratio * share + rest, (ratio - 1.0f) * share);
  F m = p * mix.student + q * mix.teacher;
  return {share * (turned ? p : q) * x - m * log_u, turned ? -d - log_u : -log_u};
}

template <Kind kind, Range range = Range::kAny, class F>
SCSDPO_INLINE Entry<F> entry(F p, F q, F d, const Mixture& mix) {
  if constexpr (kind == Kind::kForward) return {forward_kl<range>(p, q, d), splat<F>(0.0f)};
  if constexpr (kind == Kind::kReverse) return {reverse_kl<range>(p, q, d), -d};
  if constexpr (kind == Kind::kJeffreys)
    return {forward_kl<range>(p, q, d) * mix.student + reverse_kl<range>(p, q, d) * mix.teacher, -d};
  if constexpr (kHasMixture<kind> && range == Range::kNear) return mixture_near<kind>(p, d, mix);
  if constexpr (kind == Kind::kClipped) {
    auto clipped = times(q, d) > mix.objective.entry_clip;
    F kept = forward_kl<Range::kAny>(p, q, d), bound = p - q + mix.objective.entry_clip;
    return {clipped ? bound : kept, clipped ? splat<F>(1.0f) : splat<F>(0.0f)};
  }
  F low = at_least(-120.0f, d), finite = low < 120.0f ? low : splat<F>(120.0f);
  Entry<F> near = mixture_near<kind>(p, finite, mix), far = mixture_far<kind>(p, q, finite, mix);
  auto is_near = abs_value(finite) < 1.0f;
  return {is_near ? near.divergence : far.divergence, is_near ? near.score : far.score};
}

// p x for an x made of scores. The mixtures' are finite.
template <Kind kind, class F>
SCSDPO_INLINE F weighted_score(F p, F x) {
  if constexpr (kHasMixture<kind>) return p * x;
  return times(p, x);
}

// ---------------------------------------------------------------------------------------------------------------
// A row: first the largest logits, then the normalisers, then the entries.

constexpr float kLowest = -3.4028235e38f;  // below every logit but -inf, which it is subtracted from

// Student's and teacher's logit.
template <class F>
struct Pair {
  F s, t, difference;  // difference = t - s, with all its digits
};

// What every entry needs to know of its row. y = (t - s - centre) / temperature is counted from the student's most
// likely entry (unless the teacher forbids that): it is exactly 0 at the entry that may have nearly all the mass, and
// d = y - log_ratio.
struct Row {
  float max_student, max_teacher;
  float centre;
  float teacher_scale;  // puts e^(t - max_teacher) on the footing of e^y
  float inverse_temperature;
  float inverse_student, inverse_teacher;  // 1 / Z_s, 1 / Z_t
  float log_ratio;                         // log(Z_t / Z_s) counted from centre
  float log_student, log_teacher;          // log Z_s, log Z_t
  float reference;                         // score where y = 0, from which scores are counted: the mean score of a
  float mean_score;                        // peaked row is then a sum of small terms, where nothing cancels
  bool mostly_clipped;                     // mean_score is 1 - Q, else Q
};

// `own` is the difference at the student's largest logit.
SCSDPO_INLINE Row row_of(float max_student, float max_teacher, float own, float temperature) {
  Row row{};
  row.max_student = max_student;
  row.max_teacher = max_teacher;
  row.inverse_temperature = 1.0f / temperature;
  row.centre = std::isfinite(own) ? own : max_teacher - max_student;
  float apart = static_cast<float>(double{max_teacher} - max_student - row.centre);
  row.teacher_scale = std::exp(apart * row.inverse_temperature);
  return row;
}

// e^(x / temperature)
template <class F>
SCSDPO_INLINE F boltzmann(F x, const Row& row) {
  return exponential(x * row.inverse_temperature);
}

template <class F>
struct Sums {
  F student, teacher;                // Z_s = sum e_s with e_s = e^((s - max_student) / temperature), Z_t alike
  F student_moment, teacher_moment;  // sum e_s (s - max_student), and alike
  F excess;                          // sum e_s expm1(y) = Z_s expm1(log_ratio): keeps its digits as t -> s
  F linear;                          // sum e_s y, for the reverse KL
};

// Log of the teacher's ratio to the student, counted from what they have at the row's centre.
template <class F>
SCSDPO_INLINE F log_ratio_from_centre(const Pair<F>& at, const Row& row) {
  return (at.difference - row.centre) * row.inverse_temperature;
}

template <class F>
struct Boltzmann {
  F student, teacher;  // e_s, e_t
  F excess;            // e_s expm1(y)
  F y;
};

template <Kind kind>
constexpr bool kReverseScores = kind == Kind::kReverse || kind == Kind::kJeffreys;

template <Kind kind, class F>
SCSDPO_INLINE void add(Sums<F>& sums, const Pair<F>& at, const Row& row, const Boltzmann<F>& factor) {
  sums.student += factor.student;
  sums.teacher += factor.teacher;
  sums.student_moment += factor.student * at_least(-1e30f, at.s - row.max_student);
  sums.teacher_moment += factor.teacher * at_least(-1e30f, at.t - row.max_teacher);
  sums.excess += factor.excess;
  if constexpr (kReverseScores<kind>) sums.linear += times(factor.student, factor.y);
}

template <Kind kind, class F>
SCSDPO_INLINE void add(Sums<F>& sums, const Pair<F>& at, const Row& row) {
  F student = boltzmann(at.s - row.max_student, row), teacher = boltzmann(at.t - row.max_teacher, row);
  F y = log_ratio_from_centre(at, row);
  add<kind>(sums, at, row, {student, teacher, excess(student, teacher * row.teacher_scale, y), y});
}

template <class F>
struct Probabilities {
  F p, q, d;
};

template <class F>
SCSDPO_INLINE F student_probability(const Pair<F>& at, const Row& row) {
  return boltzmann(at.s - row.max_student, row) * row.inverse_student;
}

template <class F>
SCSDPO_INLINE F teacher_probability(const Pair<F>& at, const Row& row) {
  return boltzmann(at.t - row.max_teacher, row) * row.inverse_teacher;
}

template <class F>
SCSDPO_INLINE F log_ratio(const Pair<F>& at, const Row& row) {
  return log_ratio_from_centre(at, row) - row.log_ratio;
}

struct Entropies {
  float student, teacher;
};

// The entries' sums: the divergence; for a mixture and Jeffreys the mean score, counted from the reference; for the
// clipped forward KL Q, 1 - Q, and the divergence where Q is large.
template <Kind kind, class F>
SCSDPO_INLINE void add_terms(F (&terms)[kTermCount<kind>], const Probabilities<F>& at, const Entry<F>& of,
                             const Row& row, const Mixture& mix) {
  terms[0] += of.divergence;
  if constexpr (kHasMixture<kind> || kind == Kind::kJeffreys)
    terms[1] += weighted_score<kind>(at.p, of.score - row.reference);
  if constexpr (kind == Kind::kClipped) {
    auto clipped = of.score > 0.0f;
    F term = times(at.q, at.d);
    terms[1] += clipped ? at.q : splat<F>(0.0f);
    terms[2] += clipped ? splat<F>(0.0f) : at.q;
    terms[3] += clipped ? splat<F>(mix.objective.entry_clip) : term;
  }
}

// An infinite mean score (the reverse KL where the teacher forbids what the student allows) is taken as the largest
// finite one: the forbidden entries' gradient is then +inf, never inf - inf.
SCSDPO_INLINE float bounded_mean(float mean) { return mean > 3.4e38f ? 3.4e38f : mean; }

// The divergence from the sums of these terms; sets what `slope` needs of the row.
template <Kind kind>
SCSDPO_INLINE double finish(const double (&terms)[kTermCount<kind>], Row& row) {
  double divergence = terms[0], mean = terms[1];
  if constexpr (kind == Kind::kClipped) {
    row.mostly_clipped = terms[1] > 0.5;
    if (row.mostly_clipped) divergence = terms[3], mean = terms[2];
  } else {
    divergence = divergence < 0 ? 0 : divergence;  // entries have underflowed
  }
  if (kHasMixture<kind> && std::isnan(row.log_ratio)) divergence = NAN;  // d is bounded
  if constexpr (kLateMean<kind>)                                         // a NaN row is NaN throughout
    row.mean_score = static_cast<float>(divergence == divergence ? mean : divergence);
  if constexpr (kind == Kind::kJeffreys) row.mean_score = bounded_mean(static_cast<float>(mean));
  return divergence;
}

// d (c tanh(x / c)) / dx = 1 - (z / c)^2 of a logit z = c tanh(x / c).
template <class F>
SCSDPO_INLINE F softcap_slope(F z, float inverse_softcap) {
  F x = z * inverse_softcap;
  return at_least(0.0f, 1.0f - x * x);
}

struct LogSumExp {
  double student, teacher;
};

// log sum_v e^(logit / temperature) of both sides; -inf for a side that forbids everything.
SCSDPO_INLINE LogSumExp log_sum_exp(const Sums<double>& sums, const Row& row) {
  double inverse = row.inverse_temperature;
  double student = row.max_student * inverse + std::log(sums.student);
  double teacher = row.max_teacher * inverse + std::log(sums.teacher);
  bool comparable = std::isfinite(row.log_ratio);
  return {student, comparable ? student + (row.centre * inverse + row.log_ratio) : teacher};
}

// All of the row but the mean score of a mixture.
template <Kind kind>
SCSDPO_INLINE Entropies conclude(const Sums<double>& sums, const Mixture& mix, Row& row) {
  double log_student = std::log(sums.student), log_teacher = std::log(sums.teacher);
  row.log_student = static_cast<float>(log_student);
  row.log_teacher = static_cast<float>(log_teacher);
  row.inverse_student = static_cast<float>(1 / sums.student);
  row.inverse_teacher = static_cast<float>(1 / sums.teacher);
  double ratio = sums.excess / sums.student;  // Z_t / Z_s - 1, which cancels where Z_t is much the smaller
  double apart = (double{row.max_teacher} - row.max_student - row.centre) * row.inverse_temperature;
  bool trusted = ratio > -0.5 && std::isfinite(ratio);
  row.log_ratio = static_cast<float>(trusted ? std::log1p(ratio) : log_teacher - log_student + apart);

  float p = row.inverse_student, q = exponential(-row.log_ratio) * p;
  row.reference = entry<kind>(p, q, -row.log_ratio, mix).score;
  if (!std::isfinite(row.reference) || kind == Kind::kClipped) row.reference = 0.0f;
  row.mean_score = bounded_mean(static_cast<float>(-sums.linear / sums.student));
  return {static_cast<float>(log_student - sums.student_moment / sums.student * row.inverse_temperature),
          static_cast<float>(log_teacher - sums.teacher_moment / sums.teacher * row.inverse_temperature)};
}

// The row of which some entries are known, from its statistics (row_divergence.h); no mean score yet.
template <Kind kind>
SCSDPO_INLINE Row row_of_statistics(LogSumExp lse, float centre, float log_ratio, const Mixture& mix) {
  Row row{};
  row.inverse_temperature = 1.0f / mix.objective.temperature;
  double inverse = row.inverse_temperature;
  row.max_student = static_cast<float>(std::isfinite(lse.student) ? lse.student / inverse : 0.0);
  row.max_teacher = static_cast<float>(std::isfinite(lse.teacher) ? lse.teacher / inverse : 0.0);
  row.inverse_student = static_cast<float>(std::exp(row.max_student * inverse - lse.student));
  row.inverse_teacher = static_cast<float>(std::exp(row.max_teacher * inverse - lse.teacher));
  row.centre = centre;
  row.log_ratio = log_ratio;
  row.reference = entry<kind>(1.0f, exponential(-log_ratio), -log_ratio, mix).score;
  if (!std::isfinite(row.reference) || kind == Kind::kClipped) row.reference = 0.0f;
  return row;
}

// By how much more likely the student finds a token than the policy that sampled it, bounded (SDPO, arXiv 2601.20802).
SCSDPO_INLINE float importance_ratio(float logp, float old_logp, float clip) {
  float log_ratio = logp - old_logp;
  log_ratio = log_ratio > 20.0f ? 20.0f : log_ratio < -20.0f ? -20.0f : log_ratio;  // NaN stays
  float ratio = std::exp(log_ratio);
  return ratio > clip ? clip : ratio;
}

// A policy's loss -min(r A, clip(r) A), whether it is clipped, and A r, or 0 where it is. No advantage: nothing of
// them, whatever r.
struct PolicyTerms {
  float loss;
  bool clipped;
  float slope;
};

SCSDPO_INLINE PolicyTerms policy_terms(float advantage, float ratio, float lowest, float highest) {
  if (advantage == 0.0f) return {0.0f, false, 0.0f};
  if (advantage > 0.0f && ratio > highest) return {-advantage * highest, true, 0.0f};
  if (advantage < 0.0f && ratio < lowest) return {-advantage * lowest, true, 0.0f};
  return {-advantage * ratio, false, advantage * ratio};
}

// `slope` times this is the gradient in the logits before the temperature.
template <Kind kind>
SCSDPO_INLINE float slope_scale(float weight, const Mixture& mix, const Row& row) {
  float scale = weight * row.inverse_temperature;
  if (kind == Kind::kSkewedForward) return scale * mix.student * mix.student;
  return kind == Kind::kJensenShannon ? scale * mix.student : scale;
}

// dD/dz of one entry without slope_scale.
template <Kind kind, Range range = Range::kAny, class F>
SCSDPO_INLINE F slope(const Probabilities<F>& at, F score, const Row& row, const Mixture& mix) {
  if constexpr (kind == Kind::kClipped) {
    F mean = at.p * row.mean_score;
    if (row.mostly_clipped) return score > 0.0f ? mean : mean - at.q;
    return (score > 0.0f ? at.p : -excess(at.p, at.q, at.d)) - mean;
  }
  if constexpr (kind == Kind::kForward) return -excess<range>(at.p, at.q, at.d);
  F weighted = weighted_score<kind>(at.p, (score - row.reference) - row.mean_score);
  if constexpr (kind == Kind::kJeffreys) return weighted * mix.teacher - excess<range>(at.p, at.q, at.d) * mix.student;
  return weighted;
}

}  // namespace
}  // namespace scsdpo
