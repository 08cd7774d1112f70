// The C++ interface: from a chunk of logits to row scalars and the weighted gradient of the student's logits.
//
// No torch headers: pointers, and strides in elements. Every tensor is the caller's; nothing is kept.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "instruction_set.h"

namespace scsdpo {

// For each row r, with p = softmax(student / temperature), q = softmax(teacher / temperature):
//
//     divergence[r], student_entropy[r], teacher_entropy[r]       nats
//     student_logp[r], teacher_logp[r] = log p, log q at target[r]
//     importance_ratio[r] = min(e^clamp(student_logp[r] - old_logp[r], -20, 20), importance_clip); 1 without old_logp
//     gradient[r, v] = weight[r] * importance_ratio[r] * d divergence[r] / d student[r, v] * slope of the softcap
//     student_lse[r], teacher_lse[r] = log sum_v e^(student[r, v] / temperature), and alike
//     teacher_lse[r] - student_lse[r] = centre[r] / temperature + log_ratio[r], the latter with all its digits
//
// What is 0 or null is not there.
//
// A row may be spread over several calls, each with some of its entries (a vocabulary that is sharded over processes):
// kStatistics of each part, which the caller puts together; kTerms of each part with the row's statistics, which the
// caller adds up; kGradient of each part with the row's statistics and terms.
enum class Stage : int32_t {
  kWhole,       // the row is here: all that is described above
  kStatistics,  // writes the log-sum-exps, the entropies, and, where given, student_max, centre and log_ratio
  kTerms,       // reads the log-sum-exps, centre and log_ratio; writes terms
  kGradient,    // reads these and terms; writes divergence and, where given, gradient
};

constexpr int kMostTerms = 4;

struct RowDivergence {
  Stage stage;
  int64_t rows;
  int64_t vocabulary;

  DType logits_dtype;   // kFloat64: with an fp32 gradient, and without teacher_is_difference
  const void* student;  // [rows, vocabulary], unit stride along the vocabulary
  int64_t student_stride;
  const void* teacher;  // the teacher's logits, or teacher's minus student's where teacher_is_difference
  int64_t teacher_stride;
  bool teacher_is_difference;

  const float* weight;    // [rows]; 0: so is the gradient, whatever the row holds
  const int64_t* target;  // [rows], each in [0, vocabulary); null: no log-probabilities wanted

  const float* old_logp;  // [rows]; null: no importance ratios. Needs target.
  float importance_clip;

  double beta;  // the teacher's share: 0 forward KL(q || p), 1 reverse KL(p || q), between: generalised Jensen-Shannon
  float temperature;
  float entry_clip;       // beta = 0: each entry's q log(q / p) counts up to here
  float student_softcap;  // c, where the student's logits are c tanh(x / c): `gradient` is that of x

  double* student_lse;  // [rows]. Differences of the two keep their digits as teacher -> student
  double* teacher_lse;
  float* student_max;  // the largest logit
  float* centre;       // teacher's minus student's logit there, or another constant
  float* log_ratio;    // of the normalisers, counted from centre
  double* terms;       // [kMostTerms, rows] sums over the entries: add_terms of divergence.h

  float* divergence;  // [rows], as the four below
  float* student_entropy;
  float* teacher_entropy;
  float* student_logp;  // written iff target is given
  float* teacher_logp;
  float* importance_ratio;  // written iff old_logp is given

  void* gradient;  // [rows, vocabulary]; null: values only. A row may lie over the same row of student.
  int64_t gradient_stride;
  DType gradient_dtype;
};

// Rows on SIMD and `threads` threads. Each row is computed by one thread in one order: results do not depend on
// `threads`. instruction_set must not exceed best_instruction_set().
void row_divergence_cpu(const RowDivergence& task, int threads, InstructionSet instruction_set);

}  // namespace scsdpo
