// Rows of a RowDivergence on an NVIDIA GPU, on the caller's stream, in one of two ways:
//
//     cluster     sm_90 and newer. The blocks of a cluster hold a row in shared memory, a slice each. Bulk copies bring
//                 it there, and what exists once a row crosses the cluster through distributed shared memory: each
//                 logit is read from device memory once. Clusters take row after row; as soon as a piece of shared
//                 memory has been read for the last time, the next row's logits are on their way into it.
//     streaming   one block a row, which is read two or three times (8 bytes a pair of fp32 logits each).
//
//     pass         reads from                  writes
//     maxima       shared memory               streaming: together with the sums, online, from device memory
//     sums         shared or device memory
//     divergence   shared or device memory     G at beta 0 and 1; between, the scores into shared memory
//     gradient     shared or device memory     G of a mixture, or with clipped entries: it needs a mean of the row
//
// divergence.h has the formulas. A thread's sums are fp32, and so are a warp's; what crosses blocks is float64. Sums
// are added in one order: the same bits from run to run, whatever the GPU. Nothing synchronises, nothing is allocated.
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

constexpr int kWarp = 32;

struct BFloat16 {
  uint16_t bits;
};

// What a kernel is called with.
struct Task {
  RowDivergence rows;
  Mixture mix;
  int64_t slice;
  bool aligned_logits;    // all rows start at multiples of 16 bytes
  bool aligned_gradient;  // of 16 bytes, or of 8 for a bf16 gradient of fp32 logits
  float inverse_softcap;  // of the student's logits; 0: none
};

// ---------------------------------------------------------------------------------------------------------------
// Packs: n logits that a thread takes with one access, of 8 or 16 bytes.

template <class Logit, int n>
struct alignas(n * sizeof(Logit)) Pack {
  uint32_t word[n * sizeof(Logit) / 4];
};

__device__ __forceinline__ float from_logit(float x) { return x; }
__device__ __forceinline__ float from_logit(BFloat16 x) { return from_bits<float>(static_cast<int32_t>(x.bits) << 16); }

template <int n>
__device__ __forceinline__ float entry_of(const Pack<float, n>& pack, int i) {
  return from_bits<float>(static_cast<int32_t>(pack.word[i]));
}

template <int n>
__device__ __forceinline__ float entry_of(const Pack<BFloat16, n>& pack, int i) {
  uint32_t word = pack.word[i / 2];
  return from_bits<float>(static_cast<int32_t>(i % 2 == 0 ? word << 16 : word & 0xffff0000u));
}

__device__ __forceinline__ Pack<float, 4> packed(float a, float b, float c, float d) {
  return {{uint32_t(to_bits(a)), uint32_t(to_bits(b)), uint32_t(to_bits(c)), uint32_t(to_bits(d))}};
}

constexpr uint32_t kMinusInfinity = 0xff800000u;

// `count` logits, wherever they start, and then `padding`.
template <class Logit, int n>
__device__ __forceinline__ Pack<Logit, n> gather(const Logit* from, int64_t count, uint32_t padding) {
  Pack<Logit, n> pack{};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    uint32_t bits = i < count ? uint32_t(to_bits(from_logit(from[i]))) : padding;
    pack.word[i * sizeof(Logit) / 4] |= sizeof(Logit) == 4 || i % 2 == 1 ? bits : bits >> 16;
  }
  return pack;
}

template <bool difference, class Logit, int n>
__device__ __forceinline__ void unpack(const Pack<Logit, n>& student, const Pack<Logit, n>& teacher,
                                       Logits<float> (&at)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float s = entry_of(student, i), t = entry_of(teacher, i);
    if constexpr (difference)
      at[i] = {s, s + t, t};
    else
      at[i] = {s, t, t - s};
  }
}

// What stands for the logits beyond the vocabulary.
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

// Where a row's weight * dD/dz goes.
struct Gradient {
  void* row;
  int64_t vocabulary;
  DType dtype;
  bool aligned;

  __device__ Gradient(const Task& task, int64_t r)
      : vocabulary(task.rows.vocabulary), dtype(task.rows.gradient_dtype), aligned(task.aligned_gradient) {
    int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    row = static_cast<unsigned char*>(task.rows.gradient) + r * task.rows.gradient_stride * bytes;
  }

  // Entries v, v + 1, ..., v a multiple of n.
  template <int n>
  __device__ __forceinline__ void store(int64_t v, const float (&g)[n]) const {
    const bool whole = aligned && v + n <= vocabulary;
    if (dtype == DType::kFloat32) {
      float* to = static_cast<float*>(row) + v;
      if (whole) {
#pragma unroll
        for (int i = 0; i < n; i += 4)
          reinterpret_cast<Pack<float, 4>*>(to)[i / 4] = packed(g[i], g[i + 1], g[i + 2], g[i + 3]);
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i)
          if (v + i < vocabulary) to[i] = g[i];
      }
    } else {
      BFloat16* to = static_cast<BFloat16*>(row) + v;
      Pack<BFloat16, n> pack;
#pragma unroll
      for (int i = 0; i < n; i += 2) pack.word[i / 2] = gpu::two_bfloat16(g[i], g[i + 1]);
      if (whole) {
        *reinterpret_cast<Pack<BFloat16, n>*>(to) = pack;
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i)
          if (v + i < vocabulary) to[i].bits = static_cast<uint16_t>(pack.word[i / 2] >> (i % 2 * 16));
      }
    }
  }
};

// Entries that a thread computes side by side, without a branch between them.
constexpr int kQuad = 4;

template <Objective objective>
struct Quad {
  Probabilities<float> probability[kQuad];
  Entry<float> entry[kQuad];

  // Where no thread of a warp has log(q / p) beyond 1, as in most of a self-distillation's rows, the mixtures' far side
  // is not computed.
  __device__ __forceinline__ Quad(const Logits<float>* at, const Row& row, const Mixture& mix) {
    bool near = objective == Objective::kJensenShannon;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      probability[i] = probabilities(at[i], row);
      near &= fabsf(probability[i].d) < 1.0f;
    }
    if (gpu::in_all_lanes(near)) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) entry[i] = mixture_near(probability[i].p, probability[i].d, mix);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        entry[i] = scsdpo::entry<objective>(probability[i].p, probability[i].q, probability[i].d, mix);
    }
  }

  __device__ __forceinline__ void add_to(float (&terms)[kTermCount<objective>], const Row& row,
                                         const Mixture& mix) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) add_terms<objective>(terms, probability[i], entry[i], row, mix);
  }

  // What the gradient is made of, through the student's softcap: after the terms have been added.
  __device__ __forceinline__ void through_softcap(const Logits<float>* at, float inverse_softcap) {
    if (inverse_softcap == 0.0f) return;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      float slope = softcap_slope(at[i].s, inverse_softcap);
      probability[i].p *= slope;
      probability[i].q *= slope;
    }
  }

  __device__ __forceinline__ void gradient(float* g, const Row& row, float scale) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) g[i] = times(scale, slope<objective>(probability[i], entry[i].score, row));
  }
};

// ---------------------------------------------------------------------------------------------------------------
// What exists once a row.

struct Outputs {
  Row row;
  float scale;  // slope_scale
  Entropies entropy;
  float target_student, target_teacher;  // logits, then log-probabilities
  float importance;

  template <Objective objective>
  __device__ __forceinline__ void conclude(const Sums<float>& sums, const RowDivergence& task, const Mixture& mix,
                                           int64_t r, Row of) {
    entropy = scsdpo::conclude<objective>(sums, mix, of);
    target_student = (target_student - of.max_student) * of.inverse_temperature - of.log_student;
    target_teacher = (target_teacher - of.max_teacher) * of.inverse_temperature - of.log_teacher;
    importance = task.old_logp ? importance_ratio(target_student, task.old_logp[r], task.importance_clip) : 1.0f;
    scale = task.gradient ? slope_scale<objective>(task.weight[r], mix, of) * importance : 0.0f;
    row = of;
  }

  template <Objective objective>
  __device__ __forceinline__ void finish(const double (&terms)[kTermCount<objective>], const RowDivergence& task,
                                         int64_t r, bool writes) {
    double divergence = scsdpo::finish<objective>(terms, row);
    if (!writes) return;
    task.divergence[r] = static_cast<float>(divergence);
    task.student_entropy[r] = entropy.student;
    task.teacher_entropy[r] = entropy.teacher;
    if (!task.target) return;
    task.student_logp[r] = target_student;
    task.teacher_logp[r] = target_teacher;
    if (task.old_logp) task.importance_ratio[r] = importance;
  }
};

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

template <class Real, int n>
__device__ __forceinline__ void sum_over_warp(Real (&x)[n]) {
  for (int mask = 1; mask < kWarp; mask *= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += gpu::exchange(x[i], mask);
  }
}

constexpr int kSums = sizeof(Sums<float>) / sizeof(float);
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

using SumsArray = float[kSums];

__device__ __forceinline__ SumsArray& as_array(Sums<float>& sums) { return reinterpret_cast<SumsArray&>(sums); }

__device__ __forceinline__ Sums<float> as_sums(const double (&x)[kSums]) {
  return {float(x[0]), float(x[1]), float(x[2]), float(x[3]), float(x[4]), float(x[5])};
}

constexpr int kPieces = 8;
constexpr int kMaxWarps = kRowThreads / kWarp;

// In front of the logits in shared memory.
struct Header {
  Outputs of;
  double told[2][kSums];  // to the cluster's other blocks, by turns: one is written while the other may still be read
  float of_warps[kMaxWarps][kSums];
  gpu::Delivery delivery[kPieces];
};
static_assert(sizeof(Header) <= kRowHeader);

// The largest logits, and t - s where the student's is. Of equal ones the first counts.
struct Maxima {
  float student, own, teacher;
};

__device__ __forceinline__ Maxima merged(const Maxima& a, const Maxima& b) {
  return {fmaxf(a.student, b.student), b.student > a.student ? b.own : a.own, fmaxf(a.teacher, b.teacher)};
}

__device__ __forceinline__ Maxima over_warp(Maxima x) {
  for (int mask = 1; mask < kWarp; mask *= 2) {
    Maxima y{gpu::exchange(x.student, mask), gpu::exchange(x.own, mask), gpu::exchange(x.teacher, mask)};
    x = gpu::thread() & mask ? merged(y, x) : merged(x, y);
  }
  return x;
}

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

// A block's slice of the rows that its cluster takes: packs of both sides in shared memory. A pack belongs to one
// thread; a piece is what bulk copies bring at a time, 32 bytes a thread and side.
template <class Logit, bool difference>
struct Slice {
  using LogitPack = Pack<Logit, kQuad>;

  const Task& task;
  Header& header;
  int64_t begin;  // first entry
  int entries;
  int packs;
  LogitPack* student;
  LogitPack* teacher;

  __device__ Slice(const Task& task, unsigned char* memory)
      : task(task), header(*reinterpret_cast<Header*>(memory)), begin(gpu::cluster_rank() * task.slice) {
    int64_t rest = task.rows.vocabulary - begin;
    entries = static_cast<int>(rest < 0 ? 0 : rest < task.slice ? rest : task.slice);
    packs = (entries + kQuad - 1) / kQuad;
    student = reinterpret_cast<LogitPack*>(memory + kRowHeader);
    teacher = student + task.slice / kQuad;
  }

  // Of packs, as many as are whole 16 bytes.
  __device__ int delivered_packs() const {
    constexpr int n = 16 / sizeof(Logit);
    return task.aligned_logits ? entries / n * (n / kQuad) : 0;
  }
  __device__ int piece_packs() const { return 8 / sizeof(Logit) * gpu::threads(); }
  __device__ int pieces() const { return (delivered_packs() + piece_packs() - 1) / piece_packs(); }

  __device__ void order(int64_t row, int piece) const {  // one thread
    Source<Logit> from(task.rows, row);
    int first = piece * piece_packs(), count = min(piece_packs(), delivered_packs() - first);
    int bytes = count * int(sizeof(LogitPack));
    int64_t v = begin + int64_t{first} * kQuad;
    gpu::announce(&header.delivery[piece], 2 * bytes);
    gpu::bulk_copy(student + first, from.student + v, bytes, &header.delivery[piece]);
    gpu::bulk_copy(teacher + first, from.teacher + v, bytes, &header.delivery[piece]);
  }

  // Calls visit(k) for this thread's packs. After the last pass over a row, orders the next row's piece by piece.
  template <class Visit>
  __device__ __forceinline__ void walk(Visit visit, int64_t next_row = -1) const {
    for (int first = 0, piece = 0; first < packs; first += piece_packs(), ++piece) {
      int end = min(first + piece_packs(), packs);
      for (int k = first + gpu::thread(); k < end; k += gpu::threads()) visit(k);
      if (next_row >= 0 && piece < pieces()) {
        gpu::before_bulk_copies();
        gpu::block_barrier();
        if (gpu::thread() == 0) order(next_row, piece);
      }
    }
  }

  // The first pass over a row: its packs have been delivered, or are fetched here.
  template <class Visit>
  __device__ __forceinline__ void receive(int64_t row, int turn, Visit visit) const {
    const int delivered = delivered_packs();
    for (int first = 0, piece = 0; first < delivered; first += piece_packs(), ++piece) {
      gpu::await(&header.delivery[piece], turn);
      int end = min(first + piece_packs(), delivered);
      for (int k = first + gpu::thread(); k < end; k += gpu::threads()) visit(k);
    }
    if (delivered == packs) return;
    Source<Logit> from(task.rows, row);
    // A pack has one owner in all passes, who alone touches it: no barrier.
    for (int k = owned_from(delivered); k < packs; k += gpu::threads()) {
      int64_t v = begin + int64_t{k} * kQuad, count = entries - int64_t{k} * kQuad;
      student[k] = gather<Logit, kQuad>(from.student + v, count, kMinusInfinity);
      teacher[k] = gather<Logit, kQuad>(from.teacher + v, count, kTeacherPadding<difference>);
      visit(k);
    }
  }

  // This thread's first pack from pack k on.
  __device__ int owned_from(int k) const {
    return k + (gpu::thread() - k % gpu::threads() + gpu::threads()) % gpu::threads();
  }

  __device__ __forceinline__ void at(int k, Logits<float> (&out)[kQuad]) const {
    unpack<difference>(student[k], teacher[k], out);
  }
};

template <Objective objective, class Logit, bool difference>
__device__ void cluster_rows(const Task& task) {
  // fp32 logits leave room for p and the score in their place; bf16 ones are computed again.
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
    slice.receive(r, turn, [&](int k) {
      Logits<float> at[kQuad];
      slice.at(k, at);
      float student = at[0].s, teacher = at[0].t;
#pragma unroll
      for (int i = 1; i < kQuad; ++i) {
        student = fmaxf(student, at[i].s);
        teacher = fmaxf(teacher, at[i].t);
      }
      if (student > top.student) top_pack = k;
      top.student = fmaxf(top.student, student);
      top.teacher = fmaxf(top.teacher, teacher);
    });
    if (top_pack >= 0) {
      Logits<float> at[kQuad];
      slice.at(top_pack, at);
#pragma unroll
      for (int i = kQuad - 1; i >= 0; --i)
        if (at[i].s == top.student) top.own = at[i].difference;
    }
    top = over_cluster(top, header, told);
    told ^= 1;
    if (leads) header.of.row = row_of(top.student, top.teacher, top.own, rows.temperature);
    gpu::block_barrier();
    Row row = header.of.row;

    Sums<float> sums{};
    slice.walk([&](int k) {
      Logits<float> at[kQuad];
      slice.at(k, at);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) add<objective>(sums, at[i], row);
    });
    double total[kSums];
    sum_over_cluster(as_array(sums), header, told, total);
    told ^= 1;
    if (leads) header.of.conclude<objective>(as_sums(total), rows, task.mix, r, row);
    gpu::block_barrier();
    row = header.of.row;
    const float scale = header.of.scale;

    const Gradient gradient(task, r);
    const bool last = !kLateMean<objective> || !rows.gradient;
    float terms[kTermCount<objective>] = {};
    slice.walk(
        [&](int k) {
          Logits<float> at[kQuad];
          slice.at(k, at);
          Quad<objective> quad(at, row, task.mix);
          quad.add_to(terms, row, task.mix);
          quad.through_softcap(at, task.inverse_softcap);
          if constexpr (!kLateMean<objective>) {
            if (rows.gradient) {
              float g[kQuad];
              quad.gradient(g, row, scale);
              gradient.store(slice.begin + int64_t{k} * kQuad, g);
            }
          }
          if constexpr (keeps) {
            const auto& at = quad.probability;
            const auto& of = quad.entry;
            slice.student[k] = packed(at[0].p, at[1].p, at[2].p, at[3].p);
            slice.teacher[k] = packed(of[0].score, of[1].score, of[2].score, of[3].score);
          }
        },
        last ? next : -1);
    double result[kTermCount<objective>];
    sum_over_cluster(terms, header, told, result);
    told ^= 1;
    if (leads) header.of.finish<objective>(result, rows, r, gpu::cluster_rank() == 0);
    gpu::block_barrier();  // the next row's maxima go where this one's sums are read
    if (last) continue;
    row = header.of.row;

    slice.walk(
        [&](int k) {
          float g[kQuad];
          if constexpr (keeps) {
#pragma unroll
            for (int i = 0; i < kQuad; ++i) {
              float p = entry_of(slice.student[k], i), score = entry_of(slice.teacher[k], i);
              g[i] = times(scale, slope<objective>({p, 0.0f, 0.0f}, score, row));
            }
          } else {
            Logits<float> at[kQuad];
            slice.at(k, at);
            Quad<objective> quad(at, row, task.mix);
            quad.through_softcap(at, task.inverse_softcap);
            quad.gradient(g, row, scale);
          }
          gradient.store(slice.begin + int64_t{k} * kQuad, g);
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
  bool empty = sums.student * factor < 1.17549435e-38f;  // also of what is too far below the maximum to count
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
  static constexpr int n = 16 / sizeof(Logit);

  const Task& task;
  Source<Logit> from;

  __device__ __forceinline__ void at(int64_t k, Logits<float> (&out)[n]) const {
    int64_t v = k * n, count = task.rows.vocabulary - v;
    Pack<Logit, n> student, teacher;
    if (task.aligned_logits && count >= n) {
      student = *reinterpret_cast<const Pack<Logit, n>*>(from.student + v);
      teacher = *reinterpret_cast<const Pack<Logit, n>*>(from.teacher + v);
    } else {
      student = gather<Logit, n>(from.student + v, count, kMinusInfinity);
      teacher = gather<Logit, n>(from.teacher + v, count, kTeacherPadding<difference>);
    }
    unpack<difference>(student, teacher, out);
  }

  // Calls visit(v, at): `at` are the entries of kGroup packs; the first starts at entry v, the others `step()` further
  // each. All threads take as many turns.
  template <class Visit>
  __device__ __forceinline__ void walk(Visit visit) const {
    const int64_t packs = (task.rows.vocabulary + n - 1) / n;
    for (int64_t first = 0; first < packs; first += kGroup * gpu::threads()) {
      Logits<float> at[kGroup][n];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) this->at(first + j * gpu::threads() + gpu::thread(), at[j]);
      visit((first + gpu::thread()) * n, at);
    }
  }

  __device__ int64_t step() const { return int64_t{n} * gpu::threads(); }
};

template <Objective objective, class Logit, bool difference>
__device__ __forceinline__ Online online(const Stream<Logit, difference>& stream, float inverse_temperature) {
  constexpr int n = Stream<Logit, difference>::n;
  Online x{kLowest, kLowest, 0.0f, {}};
  stream.walk([&](int64_t, const Logits<float>(&at)[kGroup][n]) {
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
      recentre(x, student, fabsf(own) < 1e30f ? own : x.centre, inverse_temperature);
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
  constexpr int n = Stream<Logit, difference>::n;
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
      read_target<Logit, difference>(rows, r, header.of);
      header.of.conclude<objective>(all.sums, rows, task.mix, r, row);
    }
  }
  gpu::block_barrier();
  Row row = header.of.row;
  const float scale = header.of.scale;
  const Gradient gradient(task, r);

  float terms[kTermCount<objective>] = {};
  stream.walk([&](int64_t v, const Logits<float>(&at)[kGroup][n]) {
    // The gradient may lie over logits that other threads read in this turn.
    if (!kLateMean<objective> && rows.gradient) gpu::block_barrier();
    float sum[kTermCount<objective>] = {};
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      float g[n];
#pragma unroll
      for (int i = 0; i < n; i += kQuad) {
        Quad<objective> quad(at[k] + i, row, task.mix);
        quad.add_to(sum, row, task.mix);
        quad.through_softcap(at[k] + i, task.inverse_softcap);
        if constexpr (!kLateMean<objective>) quad.gradient(g + i, row, scale);
      }
      if constexpr (!kLateMean<objective>) {
        if (rows.gradient) gradient.store(v + k * stream.step(), g);
      }
    }
#pragma unroll
    for (int i = 0; i < kTermCount<objective>; ++i) terms[i] += sum[i];
  });
  double result[kTermCount<objective>];
  sum_over_block(terms, header.of_warps, result);
  if (leads) header.of.finish<objective>(result, rows, r, true);
  if (!kLateMean<objective> || !rows.gradient) return;
  gpu::block_barrier();
  row = header.of.row;

  stream.walk([&](int64_t v, const Logits<float>(&at)[kGroup][n]) {
    gpu::block_barrier();  // as above
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      float g[n];
#pragma unroll
      for (int i = 0; i < n; i += kQuad) {
        Quad<objective> quad(at[k] + i, row, task.mix);
        quad.through_softcap(at[k] + i, task.inverse_softcap);
        quad.gradient(g + i, row, scale);
      }
      gradient.store(v + k * stream.step(), g);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Launch.

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("row_divergence: ") + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
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
  if (task.entry_clip) return kernels<Objective::kClippedForward, Logit>(task.teacher_is_difference);
  if (task.beta == 0) return kernels<Objective::kForward, Logit>(task.teacher_is_difference);
  if (task.beta == 1) return kernels<Objective::kReverse, Logit>(task.teacher_is_difference);
  return kernels<Objective::kJensenShannon, Logit>(task.teacher_is_difference);
}

bool aligned(const void* start, int64_t stride, int64_t bytes, int64_t to) {
  return reinterpret_cast<uintptr_t>(start) % to == 0 && stride * bytes % to == 0;
}

// Whether this GPU can hold such a cluster; `clusters` is how many at once. What else is wrong the launch will say.
bool fits(Kernel kernel, const RowGeometry& geometry, const GpuLimits& limits, cudaLaunchConfig_t& config,
          int& clusters) {
  auto function = reinterpret_cast<const void*>(kernel);
  // The same values in every call: threads with other rows may be launching the same kernel.
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block));
  check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  config.attrs[0].id = cudaLaunchAttributeClusterDimension;
  config.attrs[0].val.clusterDim = {unsigned(geometry.cluster), 1, 1};
  config.numAttrs = 1;
  config.gridDim = unsigned(geometry.cluster);
  config.blockDim = unsigned(geometry.threads);
  config.dynamicSmemBytes = size_t(geometry.shared_bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return clusters > 0;
}

}  // namespace

const char* cuda_error() {
  int devices;
  cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
}

RowGeometry row_divergence_cuda(const RowDivergence& rows, int device, uintptr_t stream, CudaSchedule schedule) {
  int64_t bytes = rows.logits_dtype == DType::kFloat32 ? 4 : 2;
  int64_t gradient_bytes = rows.gradient_dtype == DType::kFloat32 ? 4 : 2;
  if (rows.logits_dtype == DType::kFloat64 || rows.stage != Stage::kWhole)
    throw std::invalid_argument("row_divergence: on a GPU neither float64 logits nor log-sum-exps");
  Task task{rows, mixture(rows.beta), 0, false, false, rows.student_softcap ? 1.0f / rows.student_softcap : 0.0f};
  task.mix.entry_clip = rows.entry_clip;
  task.aligned_logits =
      aligned(rows.student, rows.student_stride, bytes, 16) && aligned(rows.teacher, rows.teacher_stride, bytes, 16);
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
      if (candidate.cluster == 0 || !fits(of.cluster, candidate, limits, config, clusters)) continue;
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
