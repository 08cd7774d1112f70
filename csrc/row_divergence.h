// The C++ interface of the row kernels: from a chunk of logits to row scalars and the weighted gradient of the
// student's logits. Its structs are those of scsdpo_kernels/kernels/contract.py.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "matrix.h"
#include "objective.h"

namespace scsdpo {

struct Logits {
  int64_t rows;
  int64_t vocabulary;
  Matrix student;   // [rows, vocabulary]
  Matrix teacher;   // the student's dtype; the teacher's logits, or teacher's minus student's where `difference`
  bool difference;  // not with kFloat64
  float softcap;    // c, where the student's logits are c tanh(x / c): gradients are those of x. 0: none
};

// A policy-gradient loss of each row's target y, L = -min(r A, clip(r) A) with the advantage A.
struct Policy {
  const float* advantage;    // [rows], as the others; null: there is none
  const float* coefficient;  // multiplies the gradient of L
  const float* ratio;        // r; null: e^(log p[y] - old_logp), or 1 without old_logp
  float lowest, highest;     // that r counts
};

struct PerRow {
  const float* weight;    // [rows]; 0: so is the gradient, whatever the row holds
  const int64_t* target;  // [rows], each in [0, vocabulary); null: no log-probabilities wanted
  const float* old_logp;  // [rows]; null: no importance ratios. It needs target.
  float importance_clip;
  Policy policy;  // it needs target
};

// The numbers of a row, in this order; all with a policy, else the first 3 without a target, 5 without old_logp, 6.
enum Scalar {
  kDivergence,
  kStudentEntropy,
  kTeacherEntropy,
  kStudentLogp,
  kTeacherLogp,
  kImportanceRatio,
  kPolicyLoss,
  kPolicyClipped
};

// Statistics of whole rows, [rows] each.
struct Statistics {
  double* student_lse;  // differences of the two keep their digits as teacher -> student
  double* teacher_lse;
  float* student_max;  // the largest logit
  float* centre;       // teacher's minus student's logit there, or another constant
  float* log_ratio;    // the normalisers' ratio, counted from centre
  float* student_entropy;
  float* teacher_entropy;
};

// For each row r, with p = softmax(student / temperature), q = softmax(teacher / temperature), into scalars [Scalar,
// rows] of fp32 and gradient [rows, vocabulary] of fp32 or bf16:
//
//     divergence[r], student_entropy[r], teacher_entropy[r]       nats
//     student_logp[r], teacher_logp[r] = log p, log q at target[r]
//     importance_ratio[r] = min(e^clamp(student_logp[r] - old_logp[r], -20, 20), importance_clip); 1 without old_logp
//     policy_loss[r], policy_clipped[r] = L, and 1 where clip(r) is what counts, else 0
//     gradient[r, v] = (weight[r] * importance_ratio[r] * d divergence[r] / d student[r, v]
//                       + coefficient[r] * d policy_loss[r] / d student[r, v]) * slope of the softcap
//
// with d policy_loss / d student[v] = A r (p[v] - [v = y]) / temperature where it is not clipped.
//
// A gradient's row may lie over the same row of student; without a gradient there are values only. That of kFloat64
// logits is fp32.
void row_divergence(const Logits& logits, const Objective& objective, const PerRow& rows, Matrix scalars,
                    Matrix gradient, Processor processor);

// A row may be spread over several calls, each with some of its entries (a vocabulary that is sharded over processes):
// row_statistics of each part, which the caller puts together; row_terms of each part with the row's statistics, which
// the caller adds up; row_gradient of each part with the row's statistics and terms.
//
//     student_lse[r], teacher_lse[r] = log sum_v e^(student[r, v] / temperature), and alike
//     teacher_lse[r] - student_lse[r] = centre[r] / temperature + log_ratio[r], the latter with all its digits
void row_statistics(const Logits& logits, float temperature, const Statistics& out, Processor processor);

constexpr int kMostTerms = 4;

// terms: [kMostTerms, rows] of float64, sums over the entries that are here: add_terms of divergence.h.
void row_terms(const Logits& logits, const Objective& objective, const Statistics& statistics, Matrix terms,
               Processor processor);

// Takes the rows' weights and writes their divergence. With a policy it takes its coefficient, which stands for
// coefficient A r where not clipped, and the target among these entries, -1 where it is elsewhere.
void row_gradient(const Logits& logits, const Objective& objective, const Statistics& statistics, Matrix terms,
                  const PerRow& rows, Matrix scalars, Matrix gradient, Processor processor);

}  // namespace scsdpo
