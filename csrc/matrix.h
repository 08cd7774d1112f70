// What tensors are on the C++ side: no torch headers, but addresses and strides in elements. Every tensor is the
// caller's; nothing is kept.
#pragma once

#include <cstdint>

namespace scsdpo {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct Matrix {
  void* at;        // null: there is none
  int64_t stride;  // from row to row; within a row it is 1
  DType dtype;
};

}  // namespace scsdpo
