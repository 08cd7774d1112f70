// The constants of an objective; most of them are those of a generalised Jensen-Shannon divergence,
// D = (1 - beta) KL(p || m) + beta KL(q || m) with m = (1 - beta) p + beta q.
#pragma once

#include "objective.h"

namespace scsdpo {

constexpr int kTerms = 8;

// With d = log(q / p) and a = log(m / p) = log1p(beta expm1(d)): for |d| <= 1, a / d and (beta q d - m a) / (p d^2) are
// polynomials of d, to 2e-7 relative. Beyond, the ratio of q and p is counted from the side that has most of the
// mixture, so that neither overflows nor cancels.
struct Mixture {
  Objective objective;
  float student, teacher;  // the shares 1 - beta and beta, each with its own digits
  float turn;              // above this d, log(m / q) is what is computed, below it log(m / p)
  float score[kTerms];
  float divergence[kTerms];
};

// Only kJensenShannon has a mixture, with beta in (0, 1); the others need their shares.
Mixture mixture(const Objective& objective);

}  // namespace scsdpo
