// What is computed of whole rows of logits: Objective and KINDS of scsdpo_kernels/problem.py.
#pragma once

#include <cstdint>

namespace scsdpo {

// Every kind, here and for Python: what needs them all (bindings, the choice of a template) expands this list.
#define SCSDPO_KINDS(KIND)               \
  KIND(kForward, "forward")              \
  KIND(kReverse, "reverse")              \
  KIND(kJensenShannon, "jensen_shannon") \
  KIND(kClipped, "clipped")              \
  KIND(kJeffreys, "jeffreys")            \
  KIND(kSkewedForward, "skewed_forward") \
  KIND(kSkewedReverse, "skewed_reverse")

#define SCSDPO_ENUMERATOR(kind, name) kind,
enum class Kind : int32_t { SCSDPO_KINDS(SCSDPO_ENUMERATOR) };
#undef SCSDPO_ENUMERATOR

struct Objective {
  Kind kind;
  double beta;  // the teacher's share: 0 forward KL(q || p), 1 reverse KL(p || q), between: what `kind` says
  float temperature;
  float entry_clip;          // kClipped: each entry's q log(q / p) counts up to here
  const double* token_beta;  // [rows] instead of beta; `kind` is then that of a row between the ends. null: beta
};

}  // namespace scsdpo
