// A vector of fp32 numbers on the instruction set that a file is compiled for: loads, stores, and their types in
// memory.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <limits>

#include "divergence.h"

namespace scsdpo {
// Every instruction set compiles this header anew, as divergence.h.
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <>
struct Bits<Floats> {
  using type = Ints;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

SCSDPO_INLINE Floats load(const float* from, int count, float padding) {
  Floats x = splat<Floats>(padding);
  if (count == kLanes)
    memcpy(&x, from, sizeof x);
  else
    memcpy(&x, from, 4 * count);
  return x;
}

struct BFloat16 {
  uint16_t bits;
};

SCSDPO_INLINE Floats load(const BFloat16* from, int count, float padding) {
  Floats x = splat<Floats>(padding);
  Halves y = __builtin_convertvector(to_bits(x) >> 16 & 0xffff, Halves);
  if (count == kLanes)
    memcpy(&y, from, sizeof y);
  else
    memcpy(&y, from, 2 * count);
  return from_bits<Floats>(__builtin_convertvector(y, Ints) << 16);
}

struct Half {
  uint16_t bits;
};

SCSDPO_INLINE Floats load(const Half* from, int count, float padding) {
  Floats lanes = splat<Floats>(padding);
  Halves y{};
  if (count == kLanes)
    memcpy(&y, from, sizeof y);
  else
    memcpy(&y, from, 2 * count);
  Ints bits = __builtin_convertvector(y, Ints);
  Floats magnitude = from_bits<Floats>((bits & 0x7fff) << 13) * 0x1p112f;  // another exponent bias, subnormals too
  Ints special = (bits & 0x7c00) == 0x7c00 ? Ints{} + 0x7f800000 : Ints{};
  Floats numbers = from_bits<Floats>(to_bits(magnitude) | special | (bits & 0x8000) << 16);
  if (count == kLanes) return numbers;
  memcpy(&lanes, &numbers, 4 * count);
  return lanes;
}

typedef double Doubles __attribute__((vector_size(8 * kLanes)));

SCSDPO_INLINE Doubles load(const double* from, int count, double padding) {
  Doubles x = Doubles{} + padding;
  if (count == kLanes)
    memcpy(&x, from, sizeof x);
  else
    memcpy(&x, from, 8 * count);
  return x;
}

SCSDPO_INLINE Floats to_floats(Doubles x) { return __builtin_convertvector(x, Floats); }
SCSDPO_INLINE Floats to_floats(Floats x) { return x; }

SCSDPO_INLINE void store(float* to, Floats x, int count) {
  if (count == kLanes)
    memcpy(to, &x, sizeof x);
  else
    memcpy(to, &x, 4 * count);
}

SCSDPO_INLINE void store(BFloat16* to, Floats x, int count) {  // to nearest, ties to even; NaN stays NaN
  Ints bits = to_bits(x);
  Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  Ints chosen = x == x ? rounded : bits | 0x400000;
  Halves y = __builtin_convertvector((chosen >> 16) & 0xffff, Halves);
  if (count == kLanes)
    memcpy(to, &y, sizeof y);
  else
    memcpy(to, &y, 2 * count);
}

// Whether every lane is less; none is that is NaN.
SCSDPO_INLINE bool all_less(Floats x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(limit), _CMP_LT_OQ) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(x), _mm256_set1_ps(limit), _CMP_LT_OQ)) == 0xff;
#else
  const Ints less = x < limit;
  return (less[0] & less[1] & less[2] & less[3]) != 0;
#endif
}

SCSDPO_INLINE double sum(Floats x) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

}  // namespace
}  // namespace scsdpo

// The name of a function in the files compiled for SCSDPO_INSTRUCTION_SET.
#define SCSDPO_JOINED(name, set) name##_##set
#define SCSDPO_NAMED(name, set) SCSDPO_JOINED(name, set)
#define SCSDPO_NAME(name) SCSDPO_NAMED(name, SCSDPO_INSTRUCTION_SET)
