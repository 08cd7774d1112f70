// What is computed of whole rows of logits: Objective and KINDS of scsdpo_kernels/problem.py.
#pragma once

#include <cstdint>

namespace scsdpo {

enum class Kind : int32_t { kForward, kReverse, kJensenShannon, kClipped };

struct Objective {
  Kind kind;
  double beta;  // the teacher's share: 0 forward KL(q || p), 1 reverse KL(p || q), between: generalised Jensen-Shannon
  float temperature;
  float entry_clip;  // kClipped: each entry's q log(q / p) counts up to here
};

}  // namespace scsdpo
