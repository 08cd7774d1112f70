// The CUDA row kernel for a host compiler, as a Python module: row_divergence_cuda of scsdpo_kernels._C on host memory.
#define SCSDPO_ON_HOST
#include "gpu_on_host.h"
// The kernels and their launch, as nvcc gets them.
#include "../csrc/row_divergence_cuda.cu"

#include <pybind11/pybind11.h>

PYBIND11_MODULE(cuda_on_host, m) {
  using namespace scsdpo;
  m.def("row_divergence_cuda", [](const RowDivergence& task, int device, uintptr_t stream, CudaSchedule schedule) {
    return row_divergence_cuda(task, device, stream, schedule);
  });
  m.def("machine", [](int capability, int shared, int largest_cluster, int clusters, unsigned seed) {
    gpu::machine = {capability, shared + 1024, shared, 1024, largest_cluster, clusters, seed};
  });
}
