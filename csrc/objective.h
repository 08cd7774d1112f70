// What is computed of whole rows of logits: Objective and KINDS of scsdpo_kernels/problem.py.
#pragma once

#include <cstdint>

namespace scsdpo {

enum class Kind : int32_t {
  kForward,
  kReverse,
  kJensenShannon,
  kClipped,
  kJeffreys,
  kSkewedForward,
  kSkewedReverse,
};

struct Objective {
  Kind kind;
  double beta;  // the teacher's share: 0 forward KL(q || p), 1 reverse KL(p || q), between: what `kind` says
  float temperature;
  float entry_clip;          // kClipped: each entry's q log(q / p) counts up to here
  const double* token_beta;  // [rows] instead of beta; `kind` is then that of a row between the ends. null: beta
};

}  // namespace scsdpo
