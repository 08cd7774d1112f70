// The CUDA row kernel for a host compiler, as a Python module: row_divergence_cuda of scsdpo_kernels._C on host memory,
// and divergence.h's formulas entry by entry.
#define SCSDPO_ON_HOST
#include "gpu_on_host.h"
// The kernels and their launch, as nvcc gets them: csrc/row_divergence_cuda.cu.
#include SOURCE

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "entry_of.h"

std::array<float, 3> entry_on_cpu(float p, float q, float d, double beta);

PYBIND11_MODULE(cuda_on_host, m) {
  using namespace scsdpo;
  m.def("entry_on_gpu", [](float p, float q, float d, double beta) { return entry_of(p, q, d, beta); });
  m.def("entry_on_cpu", &entry_on_cpu);
  m.def("row_divergence_cuda", [](const RowDivergence& task, int device, uintptr_t stream, CudaSchedule schedule) {
    return row_divergence_cuda(task, device, stream, schedule);
  });
  m.def("machine", [](int capability, int shared, int largest_cluster, int clusters, unsigned seed) {
    gpu::machine = {capability, shared + 1024, shared, 1024, largest_cluster, clusters, seed};
  });
}
