// The only pybind11 file: Python's numbers and addresses to the structs of the C++ interface, without the GIL.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "project.h"
#include "row_divergence.h"

namespace py = pybind11;
using namespace scsdpo;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void row_divergence_cpu_binding(int64_t rows, int64_t vocabulary, uintptr_t student, int64_t student_stride,
                                uintptr_t teacher, int64_t teacher_stride, bool teacher_is_difference,
                                uintptr_t weight, uintptr_t target, float beta, float temperature,
                                uintptr_t divergence, uintptr_t student_entropy, uintptr_t teacher_entropy,
                                uintptr_t student_logp, uintptr_t teacher_logp, uintptr_t gradient,
                                int64_t gradient_stride, DType gradient_dtype, int threads,
                                InstructionSet instruction_set) {
  if (instruction_set > best_instruction_set())
    throw std::invalid_argument("instruction_set: this build or this processor does not have the one asked for");
  RowDivergence task{rows,
                     vocabulary,
                     pointer<const float>(student),
                     student_stride,
                     pointer<const float>(teacher),
                     teacher_stride,
                     teacher_is_difference,
                     pointer<const float>(weight),
                     pointer<const int64_t>(target),
                     beta,
                     temperature,
                     pointer<float>(divergence),
                     pointer<float>(student_entropy),
                     pointer<float>(teacher_entropy),
                     pointer<float>(student_logp),
                     pointer<float>(teacher_logp),
                     pointer<void>(gradient),
                     gradient_stride,
                     gradient_dtype};
  py::gil_scoped_release release;
  row_divergence_cpu(task, threads, instruction_set);
}

void project_binding(int64_t rows, int64_t vocabulary, int64_t width, DType dtype, uintptr_t hidden,
                     int64_t hidden_stride, uintptr_t weight, int64_t weight_stride, uintptr_t logits,
                     int64_t logits_stride, int threads) {
  if (!has_project(dtype)) throw std::invalid_argument("project: this processor has no instructions for this dtype");
  Projection task{rows,
                  vocabulary,
                  width,
                  dtype,
                  pointer<const void>(hidden),
                  hidden_stride,
                  pointer<const void>(weight),
                  weight_stride,
                  pointer<float>(logits),
                  logits_stride};
  py::gil_scoped_release release;
  project(task, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::enum_<DType>(m, "DType").value("float32", DType::kFloat32).value("bfloat16", DType::kBFloat16);
  py::enum_<InstructionSet>(m, "InstructionSet")
      .value("baseline", InstructionSet::kBaseline)
      .value("avx2", InstructionSet::kAVX2)
      .value("avx512", InstructionSet::kAVX512);
  m.def("best_instruction_set", &best_instruction_set);
  m.def("row_divergence_cpu", &row_divergence_cpu_binding, py::kw_only(), py::arg("rows"), py::arg("vocabulary"),
        py::arg("student"), py::arg("student_stride"), py::arg("teacher"), py::arg("teacher_stride"),
        py::arg("teacher_is_difference"), py::arg("weight"), py::arg("target"), py::arg("beta"),
        py::arg("temperature"), py::arg("divergence"), py::arg("student_entropy"), py::arg("teacher_entropy"),
        py::arg("student_logp"), py::arg("teacher_logp"), py::arg("gradient"), py::arg("gradient_stride"),
        py::arg("gradient_dtype"), py::arg("threads"), py::arg("instruction_set"));
  m.def("has_project", &has_project, py::arg("dtype"));
  m.def("project", &project_binding, py::kw_only(), py::arg("rows"), py::arg("vocabulary"), py::arg("width"),
        py::arg("dtype"), py::arg("hidden"), py::arg("hidden_stride"), py::arg("weight"), py::arg("weight_stride"),
        py::arg("logits"), py::arg("logits_stride"), py::arg("threads"));
}
