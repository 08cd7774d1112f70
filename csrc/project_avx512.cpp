// Head rows [begin, end) of `project` on AVX-512; dispatch_cpu.cpp shares them out. The width runs along the lanes, so
// neither matrix is copied or packed: a tile of 6 hidden rows × 4 head rows keeps 24 sums in registers, and ten loads
// feed 24 multiply-add instructions. A block of head rows that fits the L2 cache meets all hidden rows before the next
// one is read, so the head is read from memory once.
#include <immintrin.h>

#include <algorithm>

#include "project.h"

namespace scsdpo {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVocabulary = 4;
constexpr int64_t kBlockBytes = 256 * 1024;

struct Float32 {
  using Element = float;
  using Vector = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  static Vector load(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
  static __m512 multiply_add(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

struct BFloat16 {  // products are exact in fp32, two of them enter each lane's sum at a time
  using Element = uint16_t;
  using Vector = __m512bh;
  using Mask = __mmask32;
  static constexpr int kLanes = 32;
  static Vector load(const uint16_t* from, Mask mask) {
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi16(mask, from));
  }
  static __m512 multiply_add(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
};

// The sums of four vectors, side by side.
inline __m128 sums(const __m512 (&x)[kTileVocabulary]) {
  __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// `rows` hidden rows from r, `columns` head rows from v. Columns past the end repeat the last one and are not stored.
template <class Type, int rows>
void tile(const Projection& task, int64_t r, int64_t v, int columns) {
  using Element = typename Type::Element;
  const Element* hidden = static_cast<const Element*>(task.hidden) + r * task.hidden_stride;
  const Element* weight[kTileVocabulary];
  for (int j = 0; j < kTileVocabulary; ++j)
    weight[j] = static_cast<const Element*>(task.weight) + (v + std::min(j, columns - 1)) * task.weight_stride;

  // The loops over the tile have to be unrolled early for the sums to stay in registers.
  __m512 sum[rows][kTileVocabulary];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kTileVocabulary; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < task.width; k += Type::kLanes) {
    const int64_t left = task.width - k;
    const auto mask = static_cast<typename Type::Mask>(left >= Type::kLanes ? -1 : (int64_t{1} << left) - 1);
    typename Type::Vector w[kTileVocabulary];
#pragma GCC unroll 8
    for (int j = 0; j < kTileVocabulary; ++j) w[j] = Type::load(weight[j] + k, mask);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const typename Type::Vector h = Type::load(hidden + i * task.hidden_stride + k, mask);
#pragma GCC unroll 8
      for (int j = 0; j < kTileVocabulary; ++j) sum[i][j] = Type::multiply_add(sum[i][j], h, w[j]);
    }
  }

#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
    _mm_mask_storeu_ps(task.logits + (r + i) * task.logits_stride + v, (1 << columns) - 1, sums(sum[i]));
}

template <class Type>
void block(const Projection& task, int64_t begin, int64_t end) {
  constexpr void (*tiles[kTileRows])(const Projection&, int64_t, int64_t, int) = {
      tile<Type, 1>, tile<Type, 2>, tile<Type, 3>, tile<Type, 4>, tile<Type, 5>, tile<Type, 6>};
  for (int64_t r = 0; r < task.rows; r += kTileRows) {
    auto tile_of_rows = tiles[std::min<int64_t>(kTileRows, task.rows - r) - 1];
    for (int64_t v = begin; v < end; v += kTileVocabulary)
      tile_of_rows(task, r, v, static_cast<int>(std::min<int64_t>(kTileVocabulary, end - v)));
  }
}

}  // namespace

int64_t project_block_avx512(const Projection& task) {
  int64_t element_bytes = task.dtype == DType::kFloat32 ? 4 : 2;
  int64_t rows = kBlockBytes / (element_bytes * std::max<int64_t>(task.width, 1));
  return std::max<int64_t>(rows / kTileVocabulary, 1) * kTileVocabulary;
}

void project_avx512(const Projection& task, int64_t begin, int64_t end) {
  task.dtype == DType::kFloat32 ? block<Float32>(task, begin, end) : block<BFloat16>(task, begin, end);
}

}  // namespace scsdpo
