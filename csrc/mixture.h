// The constants of a divergence; most of them are those of a generalised Jensen-Shannon divergence,
// D = (1 - beta) KL(p || m) + beta KL(q || m) with m = (1 - beta) p + beta q.
#pragma once

namespace scsdpo {

constexpr int kTerms = 8;

// With d = log(q / p) and a = log(m / p) = log1p(beta expm1(d)): for |d| <= 1, a / d and (beta q d - m a) / (p d^2) are
// polynomials of d, to 2e-7 relative. Beyond, the ratio of q and p is counted from the side that has most of the
// mixture, so that neither overflows nor cancels.
struct Mixture {
  float student, teacher;  // the shares 1 - beta and beta, each with its own digits
  float turn;              // above this d, log(m / q) is what is computed, below it log(m / p)
  float score[kTerms];
  float divergence[kTerms];
  float entry_clip;  // of the clipped forward KL
};

// beta in [0, 1]; the ends have no mixture, and need their shares only.
Mixture mixture(double beta);

}  // namespace scsdpo
