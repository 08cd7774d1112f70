// Columns [begin, end) of `matmul_bf16` on AVX512-BF16; dispatch_cpu.cpp shares them out. The depth runs along the
// lanes, so neither factor is copied or packed: a tile of 6 rows × 4 columns keeps 24 sums in registers, and ten loads
// feed 24 instructions that each multiply and add 32 pairs. A block of columns that fits the L2 cache meets all rows
// before the next one is read, so the right factor is read from memory once.
#include <immintrin.h>

#include <algorithm>

#include "matmul.h"

namespace scsdpo {
namespace {

constexpr int kLanes = 32;
constexpr int kTileRows = 6;
constexpr int kTileColumns = 4;
constexpr int64_t kBlockBytes = 256 * 1024;

inline __m512bh load(const uint16_t* from, __mmask32 mask) {
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, from));
}

// The sums of four vectors, side by side.
inline __m128 sums(const __m512 (&x)[kTileColumns]) {
  __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// `rows` rows from r, `columns` columns from c. Columns past the end repeat the last one and are not stored.
template <int rows>
void tile(const Matmul& task, int64_t r, int64_t c, int columns) {
  const uint16_t* left = static_cast<const uint16_t*>(task.left.lines.at) + r * task.left.lines.stride;
  const uint16_t* right[kTileColumns];
  for (int j = 0; j < kTileColumns; ++j)
    right[j] =
        static_cast<const uint16_t*>(task.right.lines.at) + (c + std::min(j, columns - 1)) * task.right.lines.stride;

  // The loops over the tile have to be unrolled early for the sums to stay in registers.
  __m512 sum[rows][kTileColumns];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kTileColumns; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < task.depth; k += kLanes) {
    const int64_t steps = task.depth - k;
    const auto mask = static_cast<__mmask32>(steps >= kLanes ? -1 : (int64_t{1} << steps) - 1);
    __m512bh y[kTileColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kTileColumns; ++j) y[j] = load(right[j] + k, mask);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const __m512bh x = load(left + i * task.left.lines.stride + k, mask);
#pragma GCC unroll 8
      for (int j = 0; j < kTileColumns; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, y[j]);
    }
  }

  float* out = static_cast<float*>(task.out.at) + r * task.out.stride + c;
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) _mm_mask_storeu_ps(out + i * task.out.stride, (1 << columns) - 1, sums(sum[i]));
}

}  // namespace

int64_t matmul_bf16_columns(const Matmul& task) {
  int64_t columns = kBlockBytes / (2 * std::max<int64_t>(task.depth, 1));
  return std::max<int64_t>(columns / kTileColumns, 1) * kTileColumns;
}

void matmul_bf16(const Matmul& task, int64_t begin, int64_t end) {
  constexpr void (*tiles[kTileRows])(const Matmul&, int64_t, int64_t, int) = {tile<1>, tile<2>, tile<3>,
                                                                              tile<4>, tile<5>, tile<6>};
  for (int64_t r = 0; r < task.rows; r += kTileRows) {
    auto tile_of_rows = tiles[std::min<int64_t>(kTileRows, task.rows - r) - 1];
    for (int64_t c = begin; c < end; c += kTileColumns)
      tile_of_rows(task, r, c, static_cast<int>(std::min<int64_t>(kTileColumns, end - c)));
  }
}

}  // namespace scsdpo
