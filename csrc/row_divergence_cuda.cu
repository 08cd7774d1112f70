// Rows of a RowDivergence on an NVIDIA GPU, on the caller's stream, in one of two ways:
//
//     cluster     sm_90 and newer. The blocks of a cluster hold a row in shared memory, a slice each. Bulk copies bring
//                 it there, and what exists once a row crosses the cluster through distributed shared memory: each logit
//                 is read from device memory once. Clusters take row after row; as soon as a piece of shared memory has
//                 been read for the last time, the next row's logits are on their way into it.
//     streaming   one block a row, which is read two or three times (8 bytes a pair of fp32 logits each).
//
//     pass         reads from                  writes
//     maxima       shared memory               streaming: together with the sums, online, from device memory
//     sums         shared or device memory
//     divergence   shared or device memory     G at beta 0 and 1; between, the scores into shared memory
//     gradient     shared or device memory     G of a mixture: it needs the mean score
//
// divergence.h has the formulas. A thread's sums are fp32, and so are a warp's; what crosses blocks is float64. Sums are
// added in one order: the same bits from run to run, whatever the GPU. Nothing synchronises, nothing is allocated.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "divergence.h"
#include "gpu.h"
#include "mixture.h"
#include "row_divergence.h"
#include "row_geometry.h"

namespace scsdpo {
namespace {

using gpu::Bytes16;

constexpr int kWarp = 32;
constexpr int kMaxWarps = kRowThreads / kWarp;
constexpr float kLowest = -3.4028235e38f;  // below every logit but -inf, which it is subtracted from

struct BFloat16 {
  uint16_t bits;
};

struct Task {
  RowDivergence rows;
  Mixture mix;
  int64_t slice;
  bool aligned_logits;    // all rows start at multiples of 16 bytes
  bool aligned_gradient;  // of 16 bytes, or of 8 for a bf16 gradient of fp32 logits
};

// ---------------------------------------------------------------------------------------------------------------
// Packs: the 16 bytes of logits that a thread takes at a time.

template <class Logit>
constexpr int kPack = 16 / sizeof(Logit);

__device__ __forceinline__ float from_logit(float x) { return x; }
__device__ __forceinline__ float from_logit(BFloat16 x) { return from_bits<float>(static_cast<int32_t>(x.bits) << 16); }

template <class Logit>
struct Pack {
  float x[kPack<Logit>];
};

__device__ __forceinline__ void unpack(const Bytes16& bytes, Pack<float>& pack) { memcpy(pack.x, &bytes, 16); }

__device__ __forceinline__ void unpack(const Bytes16& bytes, Pack<BFloat16>& pack) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pack.x[2 * i] = from_bits<float>(static_cast<int32_t>(bytes.word[i] << 16));
    pack.x[2 * i + 1] = from_bits<float>(static_cast<int32_t>(bytes.word[i] & 0xffff0000u));
  }
}

// `count` logits of a row, wherever they start, and `padding`.
template <class Logit>
__device__ __forceinline__ Bytes16 gather(const Logit* from, int64_t count, uint32_t padding) {
  Bytes16 bytes{};
#pragma unroll
  for (int i = 0; i < kPack<Logit>; ++i) {
    uint32_t bits;
    if constexpr (sizeof(Logit) == 4)
      bits = i < count ? static_cast<uint32_t>(to_bits(from[i])) : padding;
    else
      bits = i < count ? from[i].bits : padding >> 16;
    bytes.word[i * sizeof(Logit) / 4] |= sizeof(Logit) == 4 || i % 2 == 0 ? bits : bits << 16;
  }
  return bytes;
}

template <class Logit, bool difference>
__device__ __forceinline__ void logits(const Bytes16& student, const Bytes16& teacher,
                                       Logits<float> (&at)[kPack<Logit>]) {
  Pack<Logit> s, t;
  unpack(student, s);
  unpack(teacher, t);
#pragma unroll
  for (int i = 0; i < kPack<Logit>; ++i) {
    if constexpr (difference)
      at[i] = {s.x[i], s.x[i] + t.x[i], t.x[i]};
    else
      at[i] = {s.x[i], t.x[i], t.x[i] - s.x[i]};
  }
}

constexpr uint32_t kMinusInfinity = 0xff800000u;
template <bool difference>
constexpr uint32_t kTeacherPadding = difference ? 0u : kMinusInfinity;

// Two rows in device memory.
template <class Logit>
struct Source {
  const Logit* student;
  const Logit* teacher;

  __device__ Source(const RowDivergence& task, int64_t row)
      : student(static_cast<const Logit*>(task.student) + row * task.student_stride),
        teacher(static_cast<const Logit*>(task.teacher) + row * task.teacher_stride) {}
};

// A pack of weight * dD/dz into the gradient's row.
template <class Logit>
__device__ __forceinline__ void store(const Task& task, int64_t row, int64_t v, const float (&g)[kPack<Logit>]) {
  constexpr int n = kPack<Logit>;
  int64_t at = row * task.rows.gradient_stride + v, count = task.rows.vocabulary - v;
  if (task.rows.gradient_dtype == DType::kFloat32) {
    float* to = static_cast<float*>(task.rows.gradient) + at;
    if (task.aligned_gradient && count >= n) {
#pragma unroll
      for (int i = 0; i < n; i += 4) {
        Bytes16 bytes;
        memcpy(&bytes, g + i, 16);
        reinterpret_cast<Bytes16*>(to)[i / 4] = bytes;
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (i < count) to[i] = g[i];
    }
  } else {
    BFloat16* to = static_cast<BFloat16*>(task.rows.gradient) + at;
    struct alignas(2 * n) Packed {
      uint32_t word[n / 2];
    } packed;
#pragma unroll
    for (int i = 0; i < n; i += 2) packed.word[i / 2] = gpu::two_bfloat16(g[i], g[i + 1]);
    if (task.aligned_gradient && count >= n) {
      *reinterpret_cast<Packed*>(to) = packed;
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (i < count) to[i].bits = static_cast<uint16_t>(packed.word[i / 2] >> (i % 2 * 16));
    }
  }
}

// Entries of a pack. Where no thread of a warp has log(q / p) beyond 1, as in most of a self-distillation's rows, the
// mixtures' far side is not computed.
template <Objective objective, int n>
__device__ __forceinline__ void entries(const Probabilities<float> (&at)[n], const Mixture& mix, Entry<float> (&out)[n]) {
  if constexpr (objective == Objective::kJensenShannon) {
    bool near = true;
#pragma unroll
    for (int i = 0; i < n; ++i) near &= fabsf(at[i].d) < 1.0f;
    if (near) {
#pragma unroll
      for (int i = 0; i < n; ++i) out[i] = mixture_near(at[i].p, at[i].d, mix);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) out[i] = entry<objective>(at[i].p, at[i].q, at[i].d, mix);
}

// ---------------------------------------------------------------------------------------------------------------
// What exists once a row.

struct Outputs {
  Row row;
  float scale;         // slope_scale
  Entropies entropy;
  float target_student, target_teacher;  // logits
};

__device__ __forceinline__ void write(const RowDivergence& task, int64_t r, double divergence, const Outputs& of) {
  // NaN stays; less than 0 is what is left of a row whose entries have underflowed.
  task.divergence[r] = static_cast<float>(divergence < 0 ? 0 : divergence);
  task.student_entropy[r] = of.entropy.student;
  task.teacher_entropy[r] = of.entropy.teacher;
  if (!task.target) return;
  task.student_logp[r] = (of.target_student - of.row.max_student) * of.row.inverse_temperature - of.row.log_student;
  task.teacher_logp[r] = (of.target_teacher - of.row.max_teacher) * of.row.inverse_temperature - of.row.log_teacher;
}

// The target's logits; NaN for an id that is not in the vocabulary.
template <class Logit, bool difference>
__device__ __forceinline__ void read_target(const RowDivergence& task, int64_t r, Outputs& of) {
  if (!task.target) return;
  int64_t v = task.target[r];
  bool exists = v >= 0 && v < task.vocabulary;
  Source<Logit> from(task, r);
  float s = exists ? from_logit(from.student[v]) : from_bits<float>(0x7fc00000);
  float t = exists ? from_logit(from.teacher[v]) : s;
  of.target_student = s;
  of.target_teacher = difference ? s + t : t;
}

// The largest logits, and t - s where the student's is. Of equal ones the first counts.
struct Maxima {
  float student, own, teacher;
};

__device__ __forceinline__ Maxima merged(const Maxima& a, const Maxima& b) {
  return {fmaxf(a.student, b.student), b.student > a.student ? b.own : a.own, fmaxf(a.teacher, b.teacher)};
}

__device__ __forceinline__ Maxima over_warp(Maxima x, int lanes = kWarp) {
  for (int mask = 1; mask < lanes; mask *= 2) {
    Maxima y{gpu::exchange(x.student, mask), gpu::exchange(x.own, mask), gpu::exchange(x.teacher, mask)};
    x = gpu::thread() & mask ? merged(y, x) : merged(x, y);
  }
  return x;
}

template <class Real, int n>
__device__ __forceinline__ void sum_over_warp(Real (&x)[n]) {
  for (int mask = 1; mask < kWarp; mask *= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += gpu::exchange(x[i], mask);
  }
}

constexpr int kSums = 6;

template <Objective objective>
constexpr int kUsedSums = objective == Objective::kReverse ? 6 : 5;

template <class Real>
__device__ __forceinline__ Sums<float> as_sums(const Real (&x)[kSums]) {
  return {float(x[0]), float(x[1]), float(x[2]), float(x[3]), float(x[4]), float(x[5])};
}

// x of all threads, in the threads of the first warp.
template <int n>
__device__ __forceinline__ void sum_over_block(float (&x)[n], float (*of_warps)[kSums], double (&total)[n]) {
  sum_over_warp(x);
  int warp = gpu::thread() / kWarp, lane = gpu::thread() % kWarp;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) of_warps[warp][i] = x[i];
  }
  gpu::block_barrier();
  if (warp != 0) return;
  bool counts = lane < gpu::threads() / kWarp;
#pragma unroll
  for (int i = 0; i < n; ++i) total[i] = counts ? of_warps[lane][i] : 0.0;
  sum_over_warp(total);
}

// ---------------------------------------------------------------------------------------------------------------
// A cluster to a row.

#if defined(SCSDPO_CLUSTERS)

constexpr int kPieces = 8;

// In front of the logits in shared memory.
struct Header {
  Outputs of;
  double told[2][kSums];  // to the cluster's other blocks, by turns: one is written while the other may still be read
  float of_warps[kMaxWarps][kSums];
  gpu::Delivery delivery[kPieces];
};
static_assert(sizeof(Header) <= kRowHeader);

// x of the first thread for the cluster's other blocks.
template <int n>
__device__ __forceinline__ void tell(double* told, const double (&x)[n]) {
  if (gpu::thread() == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) told[i] = x[i];
  }
  gpu::cluster_barrier();
}

template <int n>
__device__ __forceinline__ void sum_over_cluster(float (&x)[n], Header& header, int turn, double (&total)[n]) {
  sum_over_block(x, header.of_warps, total);
  if (gpu::cluster_size() == 1) return;
  tell(header.told[turn], total);
  if (gpu::thread() >= kWarp) return;
  bool counts = gpu::thread() < gpu::cluster_size();
#pragma unroll
  for (int i = 0; i < n; ++i) total[i] = counts ? gpu::of_peer(&header.told[turn][i], gpu::thread()) : 0.0;
  sum_over_warp(total);
}

__device__ __forceinline__ Maxima over_cluster(Maxima x, Header& header, int turn) {
  const Maxima none{kLowest, 0.0f, kLowest};
  int warp = gpu::thread() / kWarp, lane = gpu::thread() % kWarp;
  x = over_warp(x);
  if (lane == 0) {
    header.of_warps[warp][0] = x.student;
    header.of_warps[warp][1] = x.own;
    header.of_warps[warp][2] = x.teacher;
  }
  gpu::block_barrier();
  if (warp == 0) {
    const float* of = header.of_warps[lane];
    x = over_warp(lane < gpu::threads() / kWarp ? Maxima{of[0], of[1], of[2]} : none);
  }
  if (gpu::cluster_size() == 1) return x;
  tell(header.told[turn], {x.student, x.own, x.teacher});
  if (warp != 0) return x;
  if (lane < gpu::cluster_size())
    x = {float(gpu::of_peer(&header.told[turn][0], lane)), float(gpu::of_peer(&header.told[turn][1], lane)),
         float(gpu::of_peer(&header.told[turn][2], lane))};
  else
    x = none;
  return over_warp(x);
}

// A block's slice of the rows that its cluster takes: packs of both sides in shared memory. A pack belongs to one thread;
// a piece is what bulk copies bring at a time, two packs a thread.
template <class Logit, bool difference>
struct Slice {
  const Task& task;
  Header& header;
  int64_t begin;  // first entry
  int entries;
  int packs;
  Bytes16* student;
  Bytes16* teacher;

  __device__ Slice(const Task& task, unsigned char* memory)
      : task(task), header(*reinterpret_cast<Header*>(memory)), begin(gpu::cluster_rank() * task.slice) {
    int64_t rest = task.rows.vocabulary - begin;
    entries = static_cast<int>(rest < 0 ? 0 : rest < task.slice ? rest : task.slice);
    packs = (entries + kPack<Logit> - 1) / kPack<Logit>;
    student = reinterpret_cast<Bytes16*>(memory + kRowHeader);
    teacher = student + task.slice / kPack<Logit>;
  }

  __device__ int delivered_packs() const { return task.aligned_logits ? entries / kPack<Logit> : 0; }
  __device__ int piece_packs() const { return 2 * gpu::threads(); }
  __device__ int pieces() const { return (delivered_packs() + piece_packs() - 1) / piece_packs(); }

  __device__ void order(int64_t row, int piece) const {  // one thread
    Source<Logit> from(task.rows, row);
    int first = piece * piece_packs(), count = min(piece_packs(), delivered_packs() - first);
    int64_t v = begin + int64_t{first} * kPack<Logit>;
    gpu::announce(&header.delivery[piece], 32 * count);
    gpu::bulk_copy(student + first, from.student + v, 16 * count, &header.delivery[piece]);
    gpu::bulk_copy(teacher + first, from.teacher + v, 16 * count, &header.delivery[piece]);
  }

  // Pack k, which this thread sees for the first time in this row.
  __device__ void receive(int64_t row, int k, int turn) const {
    if (k < delivered_packs()) return gpu::await(&header.delivery[k / piece_packs()], turn);
    Source<Logit> from(task.rows, row);
    int64_t v = begin + int64_t{k} * kPack<Logit>, count = entries - int64_t{k} * kPack<Logit>;
    student[k] = gather(from.student + v, count, kMinusInfinity);
    teacher[k] = gather(from.teacher + v, count, kTeacherPadding<difference>);
  }

  // Calls visit(k) for this thread's packs; after the last pass over a row, orders the next one's piece by piece.
  template <class Visit>
  __device__ void walk(Visit visit, int64_t next_row = -1) const {
    for (int first = 0; first < packs; first += piece_packs()) {
      int end = min(first + piece_packs(), packs);
      for (int k = first + gpu::thread(); k < end; k += gpu::threads()) visit(k);
      if (next_row >= 0 && first < delivered_packs()) {
        gpu::before_bulk_copies();
        gpu::block_barrier();
        if (gpu::thread() == 0) order(next_row, first / piece_packs());
      }
    }
  }

  __device__ void at(int k, Logits<float> (&out)[kPack<Logit>]) const {
    logits<Logit, difference>(student[k], teacher[k], out);
  }
};

template <Objective objective, class Logit, bool difference>
__device__ void cluster_rows(const Task& task) {
  constexpr int n = kPack<Logit>;
  // fp32 logits leave room for p and the score in their place; bf16 ones are read again.
  constexpr bool keeps = objective == Objective::kJensenShannon && sizeof(Logit) == 4;
  Slice<Logit, difference> slice(task, gpu::shared_memory());
  Header& header = slice.header;
  const RowDivergence& rows = task.rows;
  const int64_t clusters = gpu::blocks() / gpu::cluster_size();
  const bool leads = gpu::thread() == 0;
  const int pieces = slice.pieces();

  int64_t r = gpu::block() / gpu::cluster_size();
  if (leads) {
    for (int i = 0; i < pieces; ++i) gpu::start(&header.delivery[i]);
    gpu::publish();
    for (int i = 0; i < pieces; ++i) slice.order(r, i);
  }
  gpu::cluster_barrier();

  int told = 0;
  for (int turn = 0; r < rows.rows; r += clusters, turn ^= 1) {
    const int64_t next = r + clusters < rows.rows && pieces > 0 ? r + clusters : -1;
    if (leads) read_target<Logit, difference>(rows, r, header.of);

    Maxima top{kLowest, 0.0f, kLowest};
    int top_pack = -1;
    slice.walk([&](int k) {
      slice.receive(r, k, turn);
      Logits<float> at[n];
      slice.at(k, at);
      float student = at[0].s, teacher = at[0].t;
#pragma unroll
      for (int i = 1; i < n; ++i) {
        student = fmaxf(student, at[i].s);
        teacher = fmaxf(teacher, at[i].t);
      }
      if (student > top.student) top_pack = k;
      top.student = fmaxf(top.student, student);
      top.teacher = fmaxf(top.teacher, teacher);
    });
    if (top_pack >= 0) {
      Logits<float> at[n];
      slice.at(top_pack, at);
#pragma unroll
      for (int i = n - 1; i >= 0; --i)
        if (at[i].s == top.student) top.own = at[i].difference;
    }
    top = over_cluster(top, header, told);
    told ^= 1;
    if (leads) header.of.row = row_of(top.student, top.teacher, top.own, rows.temperature);
    gpu::block_barrier();
    Row row = header.of.row;

    float sums[kSums] = {};
    slice.walk([&](int k) {
      Logits<float> at[n];
      slice.at(k, at);
      Sums<float> sum = as_sums(sums);
#pragma unroll
      for (int i = 0; i < n; ++i) add<objective>(sum, at[i], row);
      sums[0] = sum.student, sums[1] = sum.teacher, sums[2] = sum.student_moment;
      sums[3] = sum.teacher_moment, sums[4] = sum.excess, sums[5] = sum.linear;
    });
    double total[kSums];
    sum_over_cluster(sums, header, told, total);
    told ^= 1;
    if (leads) {
      header.of.entropy = conclude<objective>(as_sums(total), task.mix, row);
      header.of.row = row;
      header.of.scale = rows.gradient ? slope_scale<objective>(rows.weight[r], task.mix, row) : 0.0f;
    }
    gpu::block_barrier();
    row = header.of.row;
    float scale = header.of.scale;

    const bool last = objective != Objective::kJensenShannon || !rows.gradient;
    float terms[2] = {};
    slice.walk(
        [&](int k) {
          Logits<float> at[n];
          slice.at(k, at);
          Probabilities<float> probability[n];
          Entry<float> entry[n];
#pragma unroll
          for (int i = 0; i < n; ++i) probability[i] = probabilities(at[i], row);
          entries<objective>(probability, task.mix, entry);
          float g[n];
#pragma unroll
          for (int i = 0; i < n; ++i) {
            terms[0] += entry[i].divergence;
            if constexpr (objective == Objective::kJensenShannon)
              terms[1] += weighted_score<objective>(probability[i].p, entry[i].score - row.reference);
            else
              g[i] = slope<objective>(probability[i], entry[i].score, row) * scale;
          }
          if constexpr (keeps) {
            float p[n], score[n];
#pragma unroll
            for (int i = 0; i < n; ++i) p[i] = probability[i].p, score[i] = entry[i].score;
            memcpy(&slice.student[k], p, 16);
            memcpy(&slice.teacher[k], score, 16);
          }
          if constexpr (objective != Objective::kJensenShannon) {
            if (rows.gradient) store<Logit>(task, r, slice.begin + int64_t{k} * n, g);
          }
        },
        last ? next : -1);
    double result[2];
    sum_over_cluster(terms, header, told, result);
    told ^= 1;
    if (leads) {
      if (gpu::cluster_rank() == 0) write(rows, r, result[0], header.of);
      if constexpr (objective == Objective::kJensenShannon)  // a NaN row is NaN throughout
        header.of.row.mean_score = static_cast<float>(result[0] == result[0] ? result[1] : result[0]);
    }
    if (last) continue;
    gpu::block_barrier();
    row = header.of.row;

    slice.walk(
        [&](int k) {
          Probabilities<float> probability[n];
          Entry<float> entry[n];
          if constexpr (keeps) {
            float p[n], score[n];
            memcpy(p, &slice.student[k], 16);
            memcpy(score, &slice.teacher[k], 16);
#pragma unroll
            for (int i = 0; i < n; ++i) probability[i].p = p[i], entry[i].score = score[i];
          } else {
            Logits<float> at[n];
            slice.at(k, at);
#pragma unroll
            for (int i = 0; i < n; ++i) probability[i] = probabilities(at[i], row);
            entries<objective>(probability, task.mix, entry);
          }
          float g[n];
#pragma unroll
          for (int i = 0; i < n; ++i) g[i] = slope<objective>(probability[i], entry[i].score, row) * scale;
          store<Logit>(task, r, slice.begin + int64_t{k} * n, g);
        },
        next);
  }
  gpu::cluster_barrier();  // nobody leaves while its `told` may be read
}

#endif

template <Objective objective, class Logit, bool difference>
__global__ void __launch_bounds__(kRowThreads, 1) row_cluster(const __grid_constant__ Task task) {
#if defined(SCSDPO_CLUSTERS)
  cluster_rows<objective, Logit, difference>(task);
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// A block to a row.

// The sums of some entries, counted from the largest logits so far.
struct Online {
  float max_student, max_teacher;
  float centre;
  Sums<float> sums;
};

__device__ __forceinline__ float teacher_scale(const Online& x, float inverse_temperature) {
  return expf((x.max_teacher - x.max_student - x.centre) * inverse_temperature);
}

// The same, counted from another maximum and centre of the student's.
__device__ __forceinline__ void recentre(Online& x, float maximum, float centre, float inverse_temperature) {
  float factor = expf((x.max_student - maximum) * inverse_temperature);
  float step = (x.centre - centre) * inverse_temperature, stretch = expf(step);
  Sums<float>& sums = x.sums;
  bool empty = sums.student == 0.0f;
  float moved = factor * (sums.excess * stretch + excess(sums.student, sums.student * stretch, step));
  sums.linear = empty ? 0.0f : factor * (sums.linear + times(sums.student, step));
  sums.student_moment = factor * (sums.student_moment + sums.student * at_least(-1e30f, x.max_student - maximum));
  sums.student *= factor;
  x.max_student = maximum;
  x.centre = centre;
  sums.excess = empty ? sums.teacher * teacher_scale(x, inverse_temperature) : moved;
}

__device__ __forceinline__ void recentre_teacher(Online& x, float maximum, float inverse_temperature) {
  float factor = expf((x.max_teacher - maximum) * inverse_temperature);
  x.sums.teacher_moment = factor * (x.sums.teacher_moment + x.sums.teacher * at_least(-1e30f, x.max_teacher - maximum));
  x.sums.teacher *= factor;
  x.max_teacher = maximum;
}

__device__ __forceinline__ Online merged(Online a, Online b, float inverse_temperature) {
  bool second = b.max_student > a.max_student;
  float student = fmaxf(a.max_student, b.max_student), teacher = fmaxf(a.max_teacher, b.max_teacher);
  float centre = second ? b.centre : a.centre;
  recentre(a, student, centre, inverse_temperature);
  recentre(b, student, centre, inverse_temperature);
  recentre_teacher(a, teacher, inverse_temperature);
  recentre_teacher(b, teacher, inverse_temperature);
  Sums<float>&x = a.sums, &y = b.sums;
  a.sums = {x.student + y.student,
            x.teacher + y.teacher,
            x.student_moment + y.student_moment,
            x.teacher_moment + y.teacher_moment,
            x.excess + y.excess,
            x.linear + y.linear};
  return a;
}

__device__ __forceinline__ Online over_warp(Online x, float inverse_temperature) {
  for (int mask = 1; mask < kWarp; mask *= 2) {
    Online y{gpu::exchange(x.max_student, mask),
             gpu::exchange(x.max_teacher, mask),
             gpu::exchange(x.centre, mask),
             {gpu::exchange(x.sums.student, mask), gpu::exchange(x.sums.teacher, mask),
              gpu::exchange(x.sums.student_moment, mask), gpu::exchange(x.sums.teacher_moment, mask),
              gpu::exchange(x.sums.excess, mask), gpu::exchange(x.sums.linear, mask)}};
    bool second = gpu::thread() & mask;
    x = merged(second ? y : x, second ? x : y, inverse_temperature);
  }
  return x;
}

struct StreamingHeader {
  Outputs of;
  Online online[kStreamingThreads / kWarp];
  float of_warps[kStreamingThreads / kWarp][kSums];
};

// Two packs a side, so many threads apart: four loads in flight.
constexpr int kGroup = 2;

template <class Logit, bool difference>
struct Stream {
  const Task& task;
  Source<Logit> from;

  __device__ void at(int64_t k, Logits<float> (&out)[kPack<Logit>]) const {
    int64_t v = k * kPack<Logit>, count = task.rows.vocabulary - v;
    Bytes16 student, teacher;
    if (task.aligned_logits && count >= kPack<Logit>) {
      student = *reinterpret_cast<const Bytes16*>(from.student + v);
      teacher = *reinterpret_cast<const Bytes16*>(from.teacher + v);
    } else {
      student = gather(from.student + v, count, kMinusInfinity);
      teacher = gather(from.teacher + v, count, kTeacherPadding<difference>);
    }
    logits<Logit, difference>(student, teacher, out);
  }

  // Calls visit(k, at): `at` are the entries of kGroup packs, the first of them pack k, the others gpu::threads() packs
  // further each. All threads take as many turns.
  template <class Visit>
  __device__ void walk(Visit visit) const {
    const int64_t packs = (task.rows.vocabulary + kPack<Logit> - 1) / kPack<Logit>;
    for (int64_t first = 0; first < packs; first += kGroup * gpu::threads()) {
      Logits<float> at[kGroup][kPack<Logit>];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) this->at(first + j * gpu::threads() + gpu::thread(), at[j]);
      visit(first + gpu::thread(), at);
    }
  }
};

template <Objective objective, class Logit, bool difference>
__device__ __forceinline__ Online online(const Stream<Logit, difference>& stream, float inverse_temperature) {
  constexpr int n = kPack<Logit>;
  Online x{kLowest, kLowest, 0.0f, {}};
  stream.walk([&](int64_t, const Logits<float> (&at)[kGroup][n]) {
    float student = at[0][0].s, teacher = at[0][0].t;
#pragma unroll
    for (int i = 1; i < kGroup * n; ++i) {
      student = fmaxf(student, at[i / n][i % n].s);
      teacher = fmaxf(teacher, at[i / n][i % n].t);
    }
    if (student > x.max_student) {
      float own = 0.0f;
#pragma unroll
      for (int i = kGroup * n - 1; i >= 0; --i)
        if (at[i / n][i % n].s == student) own = at[i / n][i % n].difference;
      recentre(x, student, std::isfinite(own) ? own : x.centre, inverse_temperature);
    }
    if (teacher > x.max_teacher) recentre_teacher(x, teacher, inverse_temperature);
    Row row{};
    row.max_student = x.max_student;
    row.max_teacher = x.max_teacher;
    row.centre = x.centre;
    row.teacher_scale = teacher_scale(x, inverse_temperature);
    row.inverse_temperature = inverse_temperature;
    Sums<float> sum{};
#pragma unroll
    for (int i = 0; i < kGroup * n; ++i) add<objective>(sum, at[i / n][i % n], row);
    x.sums = {x.sums.student + sum.student,
              x.sums.teacher + sum.teacher,
              x.sums.student_moment + sum.student_moment,
              x.sums.teacher_moment + sum.teacher_moment,
              x.sums.excess + sum.excess,
              x.sums.linear + sum.linear};
  });
  return x;
}

template <Objective objective, class Logit, bool difference>
__global__ void __launch_bounds__(kStreamingThreads, 3) row_streaming(const __grid_constant__ Task task) {
  constexpr int n = kPack<Logit>;
  StreamingHeader& header = *reinterpret_cast<StreamingHeader*>(gpu::shared_memory());
  const RowDivergence& rows = task.rows;
  const bool leads = gpu::thread() == 0;
  const int64_t r = gpu::block();
  const float inverse_temperature = 1.0f / rows.temperature;
  Stream<Logit, difference> stream{task, {rows, r}};
  const int warp = gpu::thread() / kWarp, lane = gpu::thread() % kWarp;

  Online mine = over_warp(online<objective>(stream, inverse_temperature), inverse_temperature);
  if (lane == 0) header.online[warp] = mine;
  gpu::block_barrier();
  if (warp == 0) {
    Online all = lane < kStreamingThreads / kWarp ? header.online[lane] : Online{kLowest, kLowest, 0.0f, {}};
    all = over_warp(all, inverse_temperature);
    if (leads) {
      Row row = row_of(all.max_student, all.max_teacher, all.centre, rows.temperature);
      header.of.entropy = conclude<objective>(all.sums, task.mix, row);
      header.of.row = row;
      header.of.scale = rows.gradient ? slope_scale<objective>(rows.weight[r], task.mix, row) : 0.0f;
      read_target<Logit, difference>(rows, r, header.of);
    }
  }
  gpu::block_barrier();
  Row row = header.of.row;
  float scale = header.of.scale;

  float terms[2] = {};
  stream.walk([&](int64_t first, const Logits<float> (&at)[kGroup][n]) {
    // The gradient may lie over logits that other threads read in this turn.
    if (objective != Objective::kJensenShannon && rows.gradient) gpu::block_barrier();
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      Probabilities<float> probability[n];
      Entry<float> entry[n];
#pragma unroll
      for (int i = 0; i < n; ++i) probability[i] = probabilities(at[j][i], row);
      entries<objective>(probability, task.mix, entry);
      float g[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        sum[0] += entry[i].divergence;
        if constexpr (objective == Objective::kJensenShannon)
          sum[1] += weighted_score<objective>(probability[i].p, entry[i].score - row.reference);
        else
          g[i] = slope<objective>(probability[i], entry[i].score, row) * scale;
      }
      if constexpr (objective != Objective::kJensenShannon) {
        if (rows.gradient) store<Logit>(task, r, (first + j * gpu::threads()) * n, g);
      }
    }
    terms[0] += sum[0];
    terms[1] += sum[1];
  });
  double result[2];
  sum_over_block(terms, header.of_warps, result);
  if (leads) {
    write(rows, r, result[0], header.of);
    if constexpr (objective == Objective::kJensenShannon)  // a NaN row is NaN throughout
      header.of.row.mean_score = static_cast<float>(result[0] == result[0] ? result[1] : result[0]);
  }
  if (objective != Objective::kJensenShannon || !rows.gradient) return;
  gpu::block_barrier();
  row = header.of.row;

  stream.walk([&](int64_t first, const Logits<float> (&at)[kGroup][n]) {
    gpu::block_barrier();  // as above
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      Probabilities<float> probability[n];
      Entry<float> entry[n];
#pragma unroll
      for (int i = 0; i < n; ++i) probability[i] = probabilities(at[j][i], row);
      entries<objective>(probability, task.mix, entry);
      float g[n];
#pragma unroll
      for (int i = 0; i < n; ++i) g[i] = slope<objective>(probability[i], entry[i].score, row) * scale;
      store<Logit>(task, r, (first + j * gpu::threads()) * n, g);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Launch.

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("row_divergence: ") + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// The device of the call, and the one that was current before.
struct OnDevice {
  int before = 0, device;
  explicit OnDevice(int device) : device(device) {
    check(cudaGetDevice(&before));
    if (before != device) check(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (before != device) cudaSetDevice(before);
  }
};

int attribute(cudaDeviceAttr which, int device) {
  int value;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

using Kernel = void (*)(Task);

struct Kernels {
  Kernel cluster, streaming;
};

template <Objective objective, class Logit>
Kernels kernels(bool difference) {
  if (difference) return {row_cluster<objective, Logit, true>, row_streaming<objective, Logit, true>};
  return {row_cluster<objective, Logit, false>, row_streaming<objective, Logit, false>};
}

template <class Logit>
Kernels kernels(const RowDivergence& task) {
  if (task.beta == 0) return kernels<Objective::kForward, Logit>(task.teacher_is_difference);
  if (task.beta == 1) return kernels<Objective::kReverse, Logit>(task.teacher_is_difference);
  return kernels<Objective::kJensenShannon, Logit>(task.teacher_is_difference);
}

bool aligned(const void* start, int64_t stride, int64_t bytes, int64_t to) {
  return reinterpret_cast<uintptr_t>(start) % to == 0 && stride * bytes % to == 0;
}

// Whether this GPU can hold such a cluster; `clusters` is how many at once.
bool fits(Kernel kernel, const RowGeometry& geometry, cudaLaunchConfig_t& config, int& clusters) {
  auto function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(geometry.shared_bytes)));
  if (geometry.cluster > 8) check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  config.attrs[0].id = cudaLaunchAttributeClusterDimension;
  config.attrs[0].val.clusterDim = {unsigned(geometry.cluster), 1, 1};
  config.numAttrs = 1;
  config.gridDim = unsigned(geometry.cluster);
  config.blockDim = unsigned(geometry.threads);
  config.dynamicSmemBytes = size_t(geometry.shared_bytes);
  cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
  if (error == cudaErrorInvalidClusterSize) {
    cudaGetLastError();
    return false;
  }
  check(error);
  return clusters > 0;
}

}  // namespace

RowGeometry row_divergence_cuda(const RowDivergence& rows, int device, uintptr_t stream, CudaSchedule schedule) {
  int64_t bytes = rows.logits_dtype == DType::kFloat32 ? 4 : 2;
  int64_t gradient_bytes = rows.gradient_dtype == DType::kFloat32 ? 4 : 2;
  Task task{rows, mixture(rows.beta), 0, false, false};
  task.aligned_logits = aligned(rows.student, rows.student_stride, bytes, 16) &&
                        aligned(rows.teacher, rows.teacher_stride, bytes, 16);
  task.aligned_gradient = aligned(rows.gradient, rows.gradient_stride, gradient_bytes,
                                  std::min<int64_t>(16, gradient_bytes * (16 / bytes)));
  Kernels of = rows.logits_dtype == DType::kFloat32 ? kernels<float>(rows) : kernels<BFloat16>(rows);

  OnDevice guard(device);
  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config{};
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = attributes;

  RowGeometry geometry{0, kStreamingThreads, rows.vocabulary, sizeof(StreamingHeader)};
  if (schedule != CudaSchedule::kStreaming && attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9) {
    GpuLimits limits{attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                     attribute(cudaDevAttrReservedSharedMemoryPerBlock, device), 16};
    for (; limits.cluster > 0; limits.cluster /= 2) {
      RowGeometry candidate = row_geometry(rows.vocabulary, int(bytes), limits);
      int clusters = 0;
      if (candidate.cluster == 0 || !fits(of.cluster, candidate, config, clusters)) continue;
      geometry = candidate;
      config.gridDim = unsigned(candidate.cluster * std::min<int64_t>(clusters, rows.rows));
      break;
    }
  }
  if (geometry.cluster == 0) {
    if (schedule == CudaSchedule::kCluster)
      throw std::invalid_argument("row_divergence: this GPU has no cluster of blocks that holds a row this long");
    config.numAttrs = 0;
    config.gridDim = unsigned(rows.rows);
    config.blockDim = kStreamingThreads;
    config.dynamicSmemBytes = sizeof(StreamingHeader);
  }
  if (rows.rows == 0) return geometry;
  task.slice = geometry.slice;
  check(cudaLaunchKernelEx(&config, geometry.cluster == 0 ? of.streaming : of.cluster, task));
  return geometry;
}

}  // namespace scsdpo
