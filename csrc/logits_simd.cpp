// One row of what logits.h declares, on one instruction set: compiled once for each, as row_divergence_simd.cpp.

#include "logits.h"
#include "simd.h"

namespace scsdpo {
namespace {

// Calls visit(v, count) for every vector of kLanes entries; the last one may have fewer.
template <class Visit>
SCSDPO_INLINE void walk(int64_t vocabulary, Visit visit) {
  int64_t v = 0;
  for (; v + kLanes <= vocabulary; v += kLanes) visit(v, kLanes);
  if (v < vocabulary) visit(v, static_cast<int>(vocabulary - v));
}

template <bool has_bias, bool has_softcap>
void head_row(const HeadLogits& task, int64_t r) {
  float* row = static_cast<float*>(task.logits.at) + r * task.logits.stride;
  const float inverse = has_softcap ? 1.0f / task.softcap : 0.0f;
  walk(task.vocabulary, [&](int64_t v, int count) __attribute__((always_inline)) {
    Floats x = load(row + v, count, 0.0f);
    if constexpr (has_bias) x += load(task.bias + v, count, 0.0f);
    x *= task.scale;
    if constexpr (has_softcap) x = hyperbolic_tangent(x * inverse) * task.softcap;
    store(row + v, x, count);
  });
}

template <class Gradient>
void tail_row(const TailGradient& task, int64_t r) {
  const float* row = static_cast<const float*>(task.logits.at) + r * task.logits.stride;
  Gradient* out = static_cast<Gradient*>(task.gradient.at) + r * task.gradient.stride;
  const float inverse_temperature = 1.0f / task.temperature, base = task.base[r], factor = task.factor[r];
  const float inverse_softcap = task.softcap == 0.0f ? 0.0f : 1.0f / task.softcap;
  if (factor == 0.0f) {  // the row may hold anything
    memset(out, 0, task.vocabulary * sizeof *out);
    return;
  }
  walk(task.vocabulary, [&](int64_t v, int count) __attribute__((always_inline)) {
    Floats z = load(row + v, count, 0.0f);
    Floats g = exponential((z - base) * inverse_temperature) * factor;
    if (inverse_softcap != 0.0f) g *= softcap_slope(z, inverse_softcap);
    store(out + v, g, count);
  });
}

}  // namespace

void SCSDPO_NAME(head_logits)(const HeadLogits& task, int64_t r) {
  if (task.bias)
    task.softcap == 0.0f ? head_row<true, false>(task, r) : head_row<true, true>(task, r);
  else
    task.softcap == 0.0f ? head_row<false, false>(task, r) : head_row<false, true>(task, r);
}

void SCSDPO_NAME(tail_gradient)(const TailGradient& task, int64_t r) {
  task.gradient.dtype == DType::kFloat32 ? tail_row<float>(task, r) : tail_row<BFloat16>(task, r);
}

}  // namespace scsdpo
