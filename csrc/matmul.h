// Matrix products of a CPU, summed and kept in fp32 whatever the operands' dtype.
//
// A library rounds the product of bf16 matrices to bf16, which loses the difference between a student and a teacher
// that are nearly equal, and takes another kernel, with another order of its sums, for another number of rows. Without
// instructions for bf16 it may also be a plain loop.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "instruction_set.h"
#include "matrix.h"

namespace scsdpo {

// A factor of a product, not of kFloat64: lines of `depth` numbers each.
struct Factor {
  Matrix lines;
  int64_t depth_stride;  // between a line's numbers
};

// out[r, c] (+)= sum_k left[r, k] right[c, k]. An entry has the same bits whichever rows and columns stand beside it,
// on any number of threads.
struct Matmul {
  int64_t rows;
  int64_t columns;
  int64_t depth;
  Factor left;
  Factor right;
  Matrix out;  // [rows, columns] of fp32
  bool add;    // to what `out` holds
};

// A block is at most so many rows, packed so many steps of the depth at a time.
constexpr int kMatmulBlockRows = 672;
constexpr int kMatmulBlockDepth = 2048, kMatmulSlack = 16;

// Numbers from the beginning of a cache line on.
struct AlignedDelete {
  void operator()(void* at) const { ::operator delete[](at, std::align_val_t(64)); }
};
template <class Number>
using Aligned = std::unique_ptr<Number[], AlignedDelete>;

template <class Number>
Aligned<Number> aligned(int64_t count) {
  return Aligned<Number>(static_cast<Number*>(::operator new[](count * sizeof(Number), std::align_val_t(64))));
}

void matmul(const Matmul& task, Processor processor);

// The same of bf16 factors with unit stride along the depth, without `add`, on kAVX512BF16 or kAMXBF16.
void matmul_bf16(const Matmul& task, Processor processor);

}  // namespace scsdpo
