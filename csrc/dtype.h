// Element types that cross the C++ interface.
#pragma once

#include <cstdint>

namespace scsdpo {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

}  // namespace scsdpo
