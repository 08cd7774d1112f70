// The CUDA row kernel for a host compiler, as a Python module: row_divergence_cuda of scsdpo_kernels._C on host memory,
// and divergence.h's formulas entry by entry.
#define SCSDPO_ON_HOST
#include "gpu_on_host.h"
// The kernels and their launch, as nvcc gets them: csrc/row_divergence_cuda.cu.
#include SOURCE

#include <pybind11/pybind11.h>

namespace {

using namespace scsdpo;

// (divergence, score, slope) of an entry with reference and mean score 0.
template <Objective objective>
pybind11::tuple entry_of(float p, float q, float d, double beta) {
  Entry<float> of = entry<objective>(p, q, d, mixture(beta));
  return pybind11::make_tuple(of.divergence, of.score, slope<objective, float>({p, q, d}, of.score, Row{}));
}

}  // namespace

PYBIND11_MODULE(cuda_on_host, m) {
  m.def("entry", [](float p, float q, float d, double beta) {
    return beta == 0   ? entry_of<Objective::kForward>(p, q, d, beta)
           : beta == 1 ? entry_of<Objective::kReverse>(p, q, d, beta)
                       : entry_of<Objective::kJensenShannon>(p, q, d, beta);
  });
  m.def("row_divergence_cuda", [](const RowDivergence& task, int device, uintptr_t stream, CudaSchedule schedule) {
    return row_divergence_cuda(task, device, stream, schedule);
  });
  m.def("machine", [](int capability, int shared, int largest_cluster, int clusters, unsigned seed) {
    gpu::machine = {capability, shared + 1024, shared, 1024, largest_cluster, clusters, seed};
  });
}
