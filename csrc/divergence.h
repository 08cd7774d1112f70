// One vocabulary entry of the divergence: its value and its score, written once for host and device.
//
// p, q: student and teacher probability of the entry; d = log(q / p). Every divergence here is a sum of relative
// entropies in the form that keeps its linear term,
//
//     kl_term(p, m) = p log(p / m) - p + m = p phi(log(m / p)),     phi(x) = e^x - 1 - x >= 0,
//
// which sums to KL(p || m) because p and m both sum to one. No term is negative, so nothing cancels when p and q are
// almost equal, and phi is a polynomial there, exact to rounding however small x is.
//
//     forward  (beta = 0)    D = KL(q || p)                                      dD/dz = p - q
//     reverse  (beta = 1)    D = KL(p || q)                                      dD/dz = p (-d - KL(p || q))
//     between                D = (1 - beta) KL(p || m) + beta KL(q || m)         dD/dz = (1 - beta) p (-a - KL(p || m))
//                            m = (1 - beta) p + beta q,  a = log(m / p),  b = log(m / q) = a - d
//
// The mixture's shares 1 - beta and beta come as a pair, each with its own digits.
//
// Functions are templates on F: float, or a vector of floats with the compiler's element-wise operators (on which
// `mask ? x : y` selects per element). -inf logits arrive as p = 0 or q = 0 with d = +inf, -inf or NaN and contribute
// their limit; a NaN in p or q comes out as NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SCSDPO_INLINE __host__ __device__ __forceinline__
#else
#define SCSDPO_INLINE inline __attribute__((always_inline))
#endif

namespace scsdpo {
// Every instruction set compiles this header anew: the anonymous namespace keeps the linker from merging the copies.
namespace {

enum class Objective { kForward, kReverse, kJensenShannon };

struct Shares {
  float student;  // 1 - beta
  float teacher;  // beta
};

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
  return F{} + c;
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

// e^x for x <= 0, to 2e-7 relative; 0 below -87, where the result would leave the normal numbers.
template <class F>
SCSDPO_INLINE F exp_nonpositive(F x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  F bounded = x < -87.0f ? splat<F>(-87.0f) : x;
  F shifted = bounded * 1.44269504f + round;
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

// p x, where p = 0 wins over an infinite x.
template <class F>
SCSDPO_INLINE F times(F p, F x) {
  return p == 0.0f ? splat<F>(0.0f) : p * x;
}

// p e^x - p from both ends: exact to rounding for small x, and without overflow for large ones. q = p e^x.
template <class F>
SCSDPO_INLINE F excess(F p, F q, F x) {
  return abs_value(x) < 1.0f ? p * (x + phi(x)) : q - p;
}

// ---------------------------------------------------------------------------------------------------------------
// The divergence.

// Entry of KL(p || m) with log_ratio = log(m / p).
template <class F>
SCSDPO_INLINE F kl_term(F p, F m, F log_ratio) {
  return abs_value(log_ratio) < 1.0f ? p * phi(log_ratio) : m - p - times(p, log_ratio);
}

template <class F>
struct Mixture {
  F m;  // (1 - beta) p + beta q
  F a;  // log(m / p)
  F b;  // log(m / q)
};

// a keeps its relative precision as d -> 0. Far above it, and where p has left the normal numbers, the ratio is turned
// over, so that nothing overflows.
template <class F>
SCSDPO_INLINE Mixture<F> mixture(F p, F q, F d, Shares shares) {
  F m = p * shares.student + q * shares.teacher;
  auto near = abs_value(d) < 1.0f;
  auto above = (d >= 20.0f) | ((d >= 1.0f) & (p == 0.0f));
  F ratio = above ? p / q : q / p;
  F share = above ? splat<F>(shares.student) : splat<F>(shares.teacher);  // of the ratio's numerator in m
  F rest = above ? splat<F>(shares.teacher) : splat<F>(shares.student);
  F y = (near ? d + phi(d) : ratio - 1.0f) * share;  // m / q - 1 where d is above, else m / p - 1
  F log_u = log_one_plus(near ? y + 1.0f : ratio * share + rest, y);
  return {m, above ? log_u + d : log_u, above ? log_u : log_u - d};
}

// One entry's share of the three sums that a row needs.
template <class F>
struct Terms {
  F student;  // of KL(p || .)
  F teacher;  // of KL(q || .)
  F score;    // of the mean score, counted from `reference`
};

// dD/dz is p (score - mean score): the score is -d for the reverse KL and -a for the mixtures. `reference` is the score
// of the student's most likely entry: counted from it, the mean of a peaked row is a sum of small terms, where
// score - mean would cancel in the one entry that has nearly all of p.
template <Objective objective, class F>
SCSDPO_INLINE F score(F p, F q, F d, Shares shares) {
  if constexpr (objective == Objective::kJensenShannon) return -mixture(p, q, d, shares).a;
  return -d;
}

template <Objective objective, class F>
SCSDPO_INLINE Terms<F> divergence_terms(F p, F q, F d, Shares shares, float reference) {
  const F zero = splat<F>(0.0f);
  if constexpr (objective == Objective::kForward) return {zero, kl_term(q, p, -d), zero};
  if constexpr (objective == Objective::kReverse) return {kl_term(p, q, d), zero, times(p, -d - reference)};
  Mixture<F> mix = mixture(p, q, d, shares);
  return {kl_term(p, mix.m, mix.a), kl_term(q, mix.m, mix.b), times(p, -mix.a - reference)};
}

// D from the sums of divergence_terms.
template <Objective objective>
SCSDPO_INLINE double divergence_value(Terms<double> sum, double beta) {
  if constexpr (objective == Objective::kForward) return sum.teacher;
  if constexpr (objective == Objective::kReverse) return sum.student;
  return (1.0 - beta) * sum.student + beta * sum.teacher;
}

// What multiplies every entry's score in the gradient of D.
template <Objective objective>
SCSDPO_INLINE float score_scale(Shares shares) {
  return objective == Objective::kJensenShannon ? shares.student : 1.0f;
}

// dD/dz of one entry without score_scale; z are the logits after the temperature, mean_score the sum of Terms::score.
template <Objective objective, class F>
SCSDPO_INLINE F centred_score(F p, F q, F d, Shares shares, float reference, float mean_score) {
  if constexpr (objective == Objective::kForward) return -excess(p, q, d);
  return times(p, (score<objective>(p, q, d, shares) - reference) - mean_score);
}

}  // namespace
}  // namespace scsdpo
