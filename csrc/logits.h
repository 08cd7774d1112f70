// Passes over logits in memory, entry by entry: what a head does to its product, and the gradient of entries whose
// objective knows them only by their sum.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "row_divergence.h"

namespace scsdpo {

// logits[r, v] = c tanh(scale (logits[r, v] + bias[v]) / c), in place, with c the softcap. What is 0 or null is not
// there.
struct HeadLogits {
  int64_t rows;
  int64_t vocabulary;
  float* logits;  // [rows, vocabulary], unit stride along the vocabulary
  int64_t logits_stride;
  const float* bias;  // [vocabulary]
  float scale;
  float softcap;
};

// gradient[r, v] = factor[r] e^((logits[r, v] - base[r]) / temperature) (1 - (logits[r, v] / c)^2)
struct TailGradient {
  int64_t rows;
  int64_t vocabulary;
  const float* logits;  // [rows, vocabulary]; -inf: 0 is written
  int64_t logits_stride;
  const float* base;    // [rows]
  const float* factor;  // [rows]; 0: so is the gradient, whatever the row holds
  float temperature;
  float softcap;   // 0: none
  void* gradient;  // [rows, vocabulary]. A row may lie over the same row of logits.
  int64_t gradient_stride;
  DType gradient_dtype;  // kFloat32 or kBFloat16
};

// On SIMD and `threads` threads, as row_divergence_cpu.
void head_logits(const HeadLogits& task, int threads, InstructionSet instruction_set);
void tail_gradient(const TailGradient& task, int threads, InstructionSet instruction_set);

}  // namespace scsdpo
