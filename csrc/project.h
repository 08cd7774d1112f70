// Logits of hidden states and a head of the same dtype, summed and kept in fp32.
//
// A CPU's libraries round the product of bf16 matrices to bf16, which loses the difference between a student and a
// teacher that are nearly equal; the same product in fp32 runs at a fraction of the rate.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace scsdpo {

// logits[r, v] = sum_k hidden[r, k] weight[v, k]; strides in elements, unit along the last axis. The order of the sums
// does not depend on `threads`.
struct Projection {
  int64_t rows;
  int64_t vocabulary;
  int64_t width;
  DType dtype;         // of hidden and weight
  const void* hidden;  // [rows, width]
  int64_t hidden_stride;
  const void* weight;  // [vocabulary, width]
  int64_t weight_stride;
  float* logits;  // [rows, vocabulary]
  int64_t logits_stride;
};

// Whether this build and this processor have the instructions: AVX-512 for fp32, AVX512-BF16 for bf16.
bool has_project(DType dtype);

void project(const Projection& task, int threads);

}  // namespace scsdpo
