// Columns [begin, end) of `matmul_bf16` on AMX, whose tiles multiply 16 × 32 by 32 × 16 bf16 numbers and keep fp32
// sums; dispatch_cpu.cpp shares the columns out. The right factor's lines, which are many, are tiles as they are; the
// left factor's are packed once for all threads, pairs of the depth side by side. Four tiles of sums, 32 columns × 32
// rows, meet two tiles of each factor: four loads for four products. A block of columns and a part of the depth are
// packed into the L2 cache, and a panel of 32 rows stays in the L1 cache while all of the block meet it. Sums of a part
// of the depth are written down and taken up again by the next part; in the end they are transposed into the result.
//
// Every entry takes its sums in the order of the depth alone, and zeros stand where a factor has no lines or steps.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "matmul.h"

namespace scsdpo {
namespace {

constexpr int kTile = 16;         // lines of a tile, and its pairs of steps
constexpr int kStep = 2 * kTile;  // of the depth, a tile's
constexpr int kTileNumbers = kTile * kStep;
constexpr int kPanel = 2 * kTile;         // rows, or columns, that two tiles have
constexpr int kColumns = 128;             // of a block
constexpr int kDepth = 512;               // that are packed at a time
constexpr int kSums = 4 * kTile * kTile;  // of a panel of rows and one of columns

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler does not know that tiles read memory: what was written before has to be there.
inline void written() { asm volatile("" ::: "memory"); }

int64_t steps_of(int64_t depth) { return (depth + kStep - 1) / kStep; }

// Two tiles for each step of the depth, lines as they are.
void pack_lines(const Matrix& lines, int64_t first, int count, int64_t k, int depth, uint16_t* to) {
  for (int i = 0; i < kPanel; ++i) {
    uint16_t* at = to + i / kTile * kTileNumbers + i % kTile * kStep;
    const uint16_t* from = static_cast<const uint16_t*>(lines.at) + (first + i) * lines.stride + k;
    for (int step = 0; step < depth; step += kStep, at += 2 * kTileNumbers) {
      const int numbers = i < count ? std::min(kStep, depth - step) : 0;
      const auto mask = static_cast<__mmask32>((int64_t{1} << numbers) - 1);
      _mm512_storeu_si512(at, _mm512_maskz_loadu_epi16(mask, from + (i < count ? step : 0)));
    }
  }
}

// out[c, r] = sums of 16 columns × 16 rows, transposed, of at most so many columns.
void store_transposed(const float* sums, float* out, int64_t stride, int rows, int columns) {
  __m512 x[kTile], y[kTile];
  for (int i = 0; i < kTile; ++i) x[i] = _mm512_loadu_ps(sums + i * kTile);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int round = 0; round < 4; ++round) {  // a0 b0 a1 b1 ...
    for (int i = 0; i < kTile / 2; ++i) {
      y[2 * i] = _mm512_permutex2var_ps(x[i], low, x[i + kTile / 2]);
      y[2 * i + 1] = _mm512_permutex2var_ps(x[i], high, x[i + kTile / 2]);
    }
    std::copy(y, y + kTile, x);
  }
  const auto mask = static_cast<__mmask16>((1 << columns) - 1);
  for (int i = 0; i < rows; ++i) _mm512_mask_storeu_ps(out + i * stride, mask, x[i]);
}

// A panel of columns times one of rows, added to their sums.
void multiply(const uint16_t* columns, const uint16_t* rows, int steps, bool first, float* sums) {
  constexpr int kBytes = kTile * sizeof(float);
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kBytes);
    _tile_loadd(1, sums + kTile * kTile, kBytes);
    _tile_loadd(2, sums + 2 * kTile * kTile, kBytes);
    _tile_loadd(3, sums + 3 * kTile * kTile, kBytes);
  }
  for (int k = 0; k < steps; ++k, columns += 2 * kTileNumbers, rows += 2 * kTileNumbers) {
    _tile_loadd(4, columns, 2 * kStep);
    _tile_loadd(5, columns + kTileNumbers, 2 * kStep);
    _tile_loadd(6, rows, 2 * kStep);
    _tile_loadd(7, rows + kTileNumbers, 2 * kStep);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kBytes);
  _tile_stored(1, sums + kTile * kTile, kBytes);
  _tile_stored(2, sums + 2 * kTile * kTile, kBytes);
  _tile_stored(3, sums + 3 * kTile * kTile, kBytes);
}

}  // namespace

// Numbers of `matmul_amx_pack`'s result, and its panels, of 32 rows each.
int64_t matmul_amx_packed(const Matmul& task) { return steps_of(task.depth) * kPanel * kStep; }
int64_t matmul_amx_panels(const Matmul& task) { return (task.rows + kPanel - 1) / kPanel; }
int64_t matmul_amx_columns() { return kColumns; }

// Two tiles for each step of the depth: [pair of steps, row, 2].
void matmul_amx_pack(const Matmul& task, int64_t panel, uint16_t* packed) {
  memset(packed, 0, 2 * matmul_amx_packed(task));
  const int64_t first = panel * kPanel, rows = std::min<int64_t>(kPanel, task.rows - first);
  for (int64_t i = 0; i < rows; ++i) {
    const uint16_t* from = static_cast<const uint16_t*>(task.left.lines.at) + (first + i) * task.left.lines.stride;
    uint16_t* to = packed + i / kTile * kTileNumbers + i % kTile * 2;
    for (int64_t k = 0; k < task.depth; k += kStep, to += 2 * kTileNumbers) {
      const int64_t steps = std::min<int64_t>(kStep, task.depth - k);
      for (int64_t pair = 0; 2 * pair < steps; ++pair)
        memcpy(to + pair * kStep, from + k + 2 * pair, 2 * std::min<int64_t>(2, steps - 2 * pair));
    }
  }
}

void matmul_amx(const Matmul& task, const uint16_t* packed, int64_t begin, int64_t end) {
  static thread_local const Aligned<uint16_t> right = aligned<uint16_t>(kColumns * kDepth);
  static thread_local Aligned<float> sums_of_panels;
  static thread_local int64_t most_panels = 0;
  const int64_t panels = matmul_amx_panels(task), whole = matmul_amx_packed(task);
  if (panels > most_panels) {
    sums_of_panels = aligned<float>(panels * (kColumns / kPanel) * kSums);
    most_panels = panels;
  }
  float* sums = sums_of_panels.get();
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  for (int64_t k = 0; k < std::max<int64_t>(task.depth, 1); k += kDepth) {
    const int depth = static_cast<int>(std::min<int64_t>(kDepth, task.depth - k));
    const int steps = static_cast<int>(steps_of(depth));
    for (int64_t c = begin; c < end; c += kPanel)
      pack_lines(task.right.lines, c, static_cast<int>(std::min<int64_t>(kPanel, end - c)), k, depth,
                 right.get() + (c - begin) * kDepth);
    written();
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t c = begin; c < end; c += kPanel)
        multiply(right.get() + (c - begin) * kDepth, packed + panel * whole + k * kPanel, steps, k == 0,
                 sums + (panel * (kColumns / kPanel) + (c - begin) / kPanel) * kSums);
    written();
  }
  _tile_release();
  for (int64_t r = 0; r < task.rows; r += kTile)
    for (int64_t c = begin; c < end; c += kTile) {
      const float* of_panels = sums + (r / kPanel * (kColumns / kPanel) + (c - begin) / kPanel) * kSums;
      const int64_t tile = (c - begin) / kTile % 2 * 2 + r / kTile % 2;
      store_transposed(of_panels + tile * kTile * kTile, static_cast<float*>(task.out.at) + r * task.out.stride + c,
                       task.out.stride, static_cast<int>(std::min<int64_t>(kTile, task.rows - r)),
                       static_cast<int>(std::min<int64_t>(kTile, end - c)));
    }
}

}  // namespace scsdpo
