#include "mixture.h"

#include <algorithm>
#include <cmath>

namespace scsdpo {
namespace {

// cos(k angle), where cos(angle) is one of Chebyshev's nodes of [-1, 1].
struct Cosines {
  double at[kTerms][kTerms];  // [k][node]
  Cosines() {
    const double pi = 3.14159265358979323846;
    for (int k = 0; k < kTerms; ++k)
      for (int j = 0; j < kTerms; ++j) at[k][j] = std::cos(k * (pi * (j + 0.5) / kTerms));
  }
};

// Coefficients of the polynomial through f at Chebyshev's nodes.
template <class Function>
void interpolate(Function f, float (&coefficients)[kTerms]) {
  static const Cosines cosines;
  double values[kTerms];
  for (int j = 0; j < kTerms; ++j) values[j] = f(cosines.at[1][j]);
  double sum[kTerms] = {};
  double chebyshev[kTerms] = {1}, previous[kTerms] = {};  // coefficients of T_k and T_k-1
  for (int k = 0; k < kTerms; ++k) {
    double twice = k == 0 ? 1 : 2;
    double share = 0;
    for (int j = 0; j < kTerms; ++j) share += values[j] * cosines.at[k][j] * twice / kTerms;
    double next[kTerms] = {};  // T_k+1 = 2 x T_k - T_k-1
    for (int i = 0; i < kTerms; ++i) {
      sum[i] += share * chebyshev[i];
      next[i] = (i == 0 ? 0 : twice * chebyshev[i - 1]) - previous[i];
    }
    std::copy(chebyshev, chebyshev + kTerms, previous);
    std::copy(next, next + kTerms, chebyshev);
  }
  std::copy(sum, sum + kTerms, coefficients);
}

}  // namespace

Mixture mixture(const Objective& objective) {
  const double beta = objective.beta;
  Mixture mix{objective, static_cast<float>(1 - beta), static_cast<float>(beta), 0, {}, {}};
  const Kind kind = objective.kind;
  if (kind != Kind::kJensenShannon && kind != Kind::kSkewedForward && kind != Kind::kSkewedReverse) return mix;
  // Four nats beyond where both sides have the same share of m; on the side of the smaller share.
  double even = std::log((1 - beta) / beta);
  mix.turn = static_cast<float>(std::clamp(even + (beta <= 0.5 ? 4 : -4), -80.0, 80.0));
  auto x = [=](double d) { return beta * std::expm1(d); };  // m / p - 1
  auto a = [=](double d) { return std::log1p(x(d)); };
  auto below = [](double y) { return y - std::log1p(y); };
  if (kind == Kind::kSkewedForward) {  // over p: q (log(q / m) - 1) + m, with m / q - 1 in place of x
    interpolate([=](double d) { return std::expm1(d) / ((1 + x(d)) * d); }, mix.score);
    interpolate([=](double d) { return std::exp(d) * below((1 - beta) * std::expm1(-d)) / (d * d); }, mix.divergence);
  } else if (kind == Kind::kSkewedReverse) {  // p (log(p / m) - 1) + m; over q, for what becomes of a small beta
    interpolate([=](double d) { return (x(d) * beta / (1 + x(d)) - below(x(d)) * std::exp(-d)) / d; }, mix.score);
    interpolate([=](double d) { return below(x(d)) * std::exp(-d) / (d * d); }, mix.divergence);
  } else {
    interpolate([=](double d) { return a(d) / d; }, mix.score);
    interpolate([=](double d) { return (beta * std::exp(d) * d - std::exp(a(d)) * a(d)) / (d * d); }, mix.divergence);
  }
  return mix;
}

Mixture mixture_of_row(const Objective& objective, int64_t row) {
  Objective own = objective;
  own.beta = objective.token_beta[row];
  if (own.beta == 0) own.kind = Kind::kForward;
  if (own.beta == 1) own.kind = Kind::kReverse;
  return mixture(own);
}

}  // namespace scsdpo
