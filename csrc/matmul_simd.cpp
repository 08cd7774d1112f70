// One block of a Matmul on one instruction set: compiled once for each, as row_divergence_simd.cpp.
//
// A tile of kTileRows × 2 vectors of columns keeps its sums in registers; each step of the depth loads two vectors and
// broadcasts kTileRows numbers. Both factors are packed before, as fp32, in the order in which tiles read them: kDepth
// steps of a panel of columns are 64 KiB, which stay in cache while all tiles of the block meet them. A block packs its
// own factors, so that blocks share nothing, and its sums take the order of the depth alone.
#include <algorithm>
#include <utility>

#include "matmul.h"
#include "simd.h"

namespace scsdpo {
namespace {

#if defined(__AVX512F__)  // as many as 32 or 16 registers hold
constexpr int kTileRows = 14;
#elif defined(__aarch64__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int kDepth = 16384 / kPanel;
constexpr int kSteps = 128;  // are summed one after the other, and such sums then added up: a few digits more
static_assert(kMatmulBlockRows % kTileRows == 0 && kDepth <= kMatmulBlockDepth, "dispatch_cpu.cpp makes the room");

// a0 b0 a1 b1 ... : the first and the second half of it.
template <int... i>
SCSDPO_INLINE void interleave(Floats a, Floats b, Floats& low, Floats& high, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (i / 2 + i % 2 * kLanes)...);
  high = __builtin_shufflevector(a, b, ((i + kLanes) / 2 + i % 2 * kLanes)...);
#else
  low = __builtin_shuffle(a, b, Ints{(i / 2 + i % 2 * kLanes)...});
  high = __builtin_shuffle(a, b, Ints{((i + kLanes) / 2 + i % 2 * kLanes)...});
#endif
}

SCSDPO_INLINE void transpose(Floats (&x)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 4
  for (int n = 1; n < kLanes; n *= 2) {
    Floats y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) interleave(x[i], x[i + kLanes / 2], y[2 * i], y[2 * i + 1], lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// `lines` of at most `width` lines, of which the others are 0, as [depth, width].
template <int width, class Element>
void pack(const Element* from, const Factor& factor, int lines, int depth, float* to) {
  const int64_t line = factor.lines.stride, step = factor.depth_stride;
  if (lines < width) memset(to, 0, sizeof(float) * width * depth);
  if (step == 1) {
    for (int first = 0; first < lines; first += kLanes) {
      const int count = std::min(kLanes, lines - first), wanted = std::min(kLanes, width - first);
      for (int k = 0; k < depth; k += kLanes) {
        const int steps = std::min(kLanes, depth - k);
        Floats x[kLanes] = {};
        if (count == wanted && steps == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            x[i] = load(from + (first + std::min(i, wanted - 1)) * line + k, kLanes, 0.0f);
        } else {
          for (int i = 0; i < count; ++i) x[i] = load(from + (first + i) * line + k, steps, 0.0f);
        }
        transpose(x);
        float* at = to + k * width + first;
        // A whole vector also writes the next step's place, before that is written: not where a step has several.
        if (steps == kLanes && (width < kLanes || wanted == kLanes)) {
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) store(at + j * width, x[j], kLanes);
        } else {
          for (int j = 0; j < steps; ++j) store(at + j * width, x[j], wanted);
        }
      }
    }
  } else if (line == 1) {
    constexpr int rest = width % kLanes;  // a constant, so that it is no call
    for (int k = 0; k < depth; ++k) {
      int first = 0;
      for (; first + kLanes <= lines; first += kLanes)
        store(to + k * width + first, load(from + k * step + first, kLanes, 0.0f), kLanes);
      if (rest > 0 && lines == width)
        store(to + k * width + width - rest, load(from + k * step + width - rest, rest, 0.0f), rest);
      else if (first < lines)
        store(to + k * width + first, load(from + k * step + first, lines - first, 0.0f), lines - first);
    }
  } else {
    for (int k = 0; k < depth; ++k)
      for (int i = 0; i < lines; ++i) to[k * width + i] = load(from + i * line + k * step, 1, 0.0f)[0];
  }
}

template <int width>
void pack(const Factor& factor, int64_t first, int lines, int64_t k, int depth, float* to) {
  const int64_t offset = first * factor.lines.stride + k * factor.depth_stride;
  switch (factor.lines.dtype) {
    case DType::kBFloat16:
      return pack<width>(static_cast<const BFloat16*>(factor.lines.at) + offset, factor, lines, depth, to);
    case DType::kFloat16:
      return pack<width>(static_cast<const Half*>(factor.lines.at) + offset, factor, lines, depth, to);
    default:
      return pack<width>(static_cast<const float*>(factor.lines.at) + offset, factor, lines, depth, to);
  }
}

// A tile at the edge of the block is computed whole and stored in part.
void tile(const float* left, const float* right, int depth, float* out, int64_t stride, int rows, int columns,
          bool add) {
  Floats total[kTileRows][2];  // in memory; the sums of a few steps in registers
  for (int start = 0; start < depth; start += kSteps) {
    Floats sum[kTileRows][2] = {};
    const int end = std::min(start + kSteps, depth);
    for (int k = start; k < end; ++k) {
      const Floats first = load(right + k * kPanel, kLanes, 0.0f);
      const Floats second = load(right + k * kPanel + kLanes, kLanes, 0.0f);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const Floats x = splat<Floats>(left[k * kTileRows + i]);
        sum[i][0] += x * first;
        sum[i][1] += x * second;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) total[i][j] = start == 0 ? sum[i][j] : total[i][j] + sum[i][j];
  }
  float edge[kTileRows * kPanel];
  const bool inside = rows == kTileRows && columns == kPanel;
  float* to = inside ? out : edge;
  const int64_t step = inside ? stride : kPanel;
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* at = to + i * step + j * kLanes;
      store(at, inside && add ? load(at, kLanes, 0.0f) + total[i][j] : total[i][j], kLanes);
    }
  if (inside) return;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j)
      out[i * stride + j] = add ? out[i * stride + j] + edge[i * kPanel + j] : edge[i * kPanel + j];
}

}  // namespace

// left: room for kMatmulBlockRows packed rows.
void SCSDPO_NAME(matmul_block)(const Matmul& task, int64_t row, int64_t column, int rows, int columns, float* left) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  float* out = static_cast<float*>(task.out.at) + row * task.out.stride + column;
  alignas(64) float right[kDepth * kPanel];
  for (int64_t k = 0; k < task.depth; k += kDepth) {
    const int depth = static_cast<int>(std::min<int64_t>(kDepth, task.depth - k));
    const bool add = task.add || k > 0;
    for (int i = 0; i < tiles; ++i)
      pack<kTileRows>(task.left, row + i * kTileRows, std::min(kTileRows, rows - i * kTileRows), k, depth,
                      left + i * kTileRows * kDepth);
    for (int c = 0; c < columns; c += kPanel) {
      const int width = std::min(kPanel, columns - c);
      pack<kPanel>(task.right, column + c, width, k, depth, right);
      for (int i = 0; i < tiles; ++i)
        tile(left + i * kTileRows * kDepth, right, depth, out + i * kTileRows * task.out.stride + c, task.out.stride,
             std::min(kTileRows, rows - i * kTileRows), width, add);
    }
  }
}

}  // namespace scsdpo
