#include "mixture.h"

#include <algorithm>
#include <cmath>

namespace scsdpo {
namespace {

// Coefficients of the polynomial through f at Chebyshev's nodes of [-1, 1].
template <class Function>
void interpolate(Function f, float (&coefficients)[kTerms]) {
  const double pi = 3.14159265358979323846;
  double sum[kTerms] = {};
  double chebyshev[kTerms] = {1}, previous[kTerms] = {};  // coefficients of T_k and T_k-1
  for (int k = 0; k < kTerms; ++k) {
    double twice = k == 0 ? 1 : 2;
    double share = 0;
    for (int j = 0; j < kTerms; ++j) {
      double angle = pi * (j + 0.5) / kTerms;
      share += f(std::cos(angle)) * std::cos(k * angle) * twice / kTerms;
    }
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
  if (objective.kind != Kind::kJensenShannon) return mix;
  // Four nats beyond where both sides have the same share of m; on the side of the smaller share.
  double even = std::log((1 - beta) / beta);
  mix.turn = static_cast<float>(std::clamp(even + (beta <= 0.5 ? 4 : -4), -80.0, 80.0));
  auto a = [=](double d) { return std::log1p(beta * std::expm1(d)); };
  interpolate([=](double d) { return a(d) / d; }, mix.score);
  interpolate([=](double d) { return (beta * std::exp(d) * d - std::exp(a(d)) * a(d)) / (d * d); }, mix.divergence);
  return mix;
}

}  // namespace scsdpo
