// The constants of an objective; most of them are those of a divergence from a mixture m = (1 - beta) p + beta q: the
// generalised Jensen-Shannon D = (1 - beta) KL(p || m) + beta KL(q || m), or one of its two KLs alone.
#pragma once

#include "objective.h"

namespace scsdpo {

constexpr int kTerms = 8;

// With d = log(q / p): for |d| <= 1, an entry's -score / d and its term / (p d^2) are polynomials of d, those of KL(p
// || m) over q / p. Those of Jensen-Shannon are exact to 2e-7 relative, the skewed KLs' to 1e-6. Beyond, the ratio of q
// and p is counted from the side that has most of the mixture, so that neither overflows nor cancels.
struct Mixture {
  Objective objective;
  float student, teacher;  // the shares 1 - beta and beta, each with its own digits
  float turn;              // above this d, log(m / q) is what is computed, below it log(m / p)
  float score[kTerms];
  float divergence[kTerms];
};

// Only kinds with a mixture have more than shares; beta is in (0, 1) then.
Mixture mixture(const Objective& objective);

// That of a row with a beta of its own, which is the forward or the reverse KL at the ends.
Mixture mixture_of_row(const Objective& objective, int64_t row);

}  // namespace scsdpo
