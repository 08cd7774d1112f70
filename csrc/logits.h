// Passes over logits in memory, entry by entry: what a head does to its product, and the gradient of entries whose
// objective knows them only by their sum.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "matrix.h"

namespace scsdpo {

// logits[r, v] = c tanh(scale (logits[r, v] + bias[v]) / c), in place, with c the softcap. What is 0 or null is not
// there.
struct HeadLogits {
  int64_t rows;
  int64_t vocabulary;
  Matrix logits;      // [rows, vocabulary] of fp32
  const float* bias;  // [vocabulary]
  float scale;
  float softcap;
};

// gradient[r, v] = factor[r] e^((logits[r, v] - base[r]) / temperature) (1 - (logits[r, v] / c)^2)
struct TailGradient {
  int64_t rows;
  int64_t vocabulary;
  Matrix logits;        // [rows, vocabulary] of fp32; -inf: 0 is written
  const float* base;    // [rows]
  const float* factor;  // [rows]; 0: so is the gradient, whatever the row holds
  float temperature;
  float softcap;    // 0: none
  Matrix gradient;  // [rows, vocabulary] of fp32 or bf16. A row may lie over the same row of logits.
};

void head_logits(const HeadLogits& task, Processor processor);
void tail_gradient(const TailGradient& task, Processor processor);

}  // namespace scsdpo
