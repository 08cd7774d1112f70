// The only pybind11 file: the structs of the C++ interface as Python objects, filled in by name with numbers and
// addresses, and the functions that take them, without the GIL.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "huge_pages.h"
#include "logits.h"
#include "matmul.h"
#include "row_divergence.h"

namespace py = pybind11;
using namespace scsdpo;

namespace {

// A struct whose fields are set once, as keywords of its constructor; what is not named is 0 or null.
template <class Struct>
struct Fields : py::class_<Struct> {
  Fields(py::module_& m, const char* name) : py::class_<Struct>(m, name) {
    this->def(py::init([](const py::kwargs& fields) {
      Struct task{};
      py::object object = py::cast(&task, py::return_value_policy::reference);
      for (const auto& field : fields) py::setattr(object, field.first, field.second);
      return task;
    }));
  }

  template <class T>
  Fields& field(const char* name, T Struct::* member) {
    this->def_property(name, nullptr, [member](Struct& task, T value) { task.*member = value; });
    return *this;
  }

  template <class T>
  Fields& field(const char* name, T* Struct::* member) {  // an address
    this->def_property(name, nullptr,
                       [member](Struct& task, uintptr_t value) { task.*member = reinterpret_cast<T*>(value); });
    return *this;
  }
};

// A CPU kernel of one task on a number of threads and an instruction set.
template <class Task>
void on_processor(py::module_& m, const char* name, void (*kernel)(const Task&, int, InstructionSet)) {
  m.def(name, [kernel](const Task& task, int threads, InstructionSet instruction_set) {
    if (instruction_set > best_instruction_set())
      throw std::invalid_argument("instruction_set: this build or this processor does not have the one asked for");
    py::gil_scoped_release release;
    kernel(task, threads, instruction_set);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("float64", DType::kFloat64);
  py::enum_<InstructionSet>(m, "InstructionSet")
      .value("baseline", InstructionSet::kBaseline)
      .value("avx2", InstructionSet::kAVX2)
      .value("avx512", InstructionSet::kAVX512)
      .value("avx512_bf16", InstructionSet::kAVX512BF16);
  m.def("best_instruction_set", &best_instruction_set);

  py::enum_<Stage>(m, "Stage")
      .value("whole", Stage::kWhole)
      .value("statistics", Stage::kStatistics)
      .value("terms", Stage::kTerms)
      .value("gradient", Stage::kGradient);
  m.attr("most_terms") = kMostTerms;
  Fields<RowDivergence>(m, "RowDivergence")
      .field("stage", &RowDivergence::stage)
      .field("rows", &RowDivergence::rows)
      .field("vocabulary", &RowDivergence::vocabulary)
      .field("logits_dtype", &RowDivergence::logits_dtype)
      .field("student", &RowDivergence::student)
      .field("student_stride", &RowDivergence::student_stride)
      .field("teacher", &RowDivergence::teacher)
      .field("teacher_stride", &RowDivergence::teacher_stride)
      .field("teacher_is_difference", &RowDivergence::teacher_is_difference)
      .field("weight", &RowDivergence::weight)
      .field("target", &RowDivergence::target)
      .field("old_logp", &RowDivergence::old_logp)
      .field("importance_clip", &RowDivergence::importance_clip)
      .field("beta", &RowDivergence::beta)
      .field("temperature", &RowDivergence::temperature)
      .field("entry_clip", &RowDivergence::entry_clip)
      .field("student_softcap", &RowDivergence::student_softcap)
      .field("student_lse", &RowDivergence::student_lse)
      .field("teacher_lse", &RowDivergence::teacher_lse)
      .field("student_max", &RowDivergence::student_max)
      .field("centre", &RowDivergence::centre)
      .field("log_ratio", &RowDivergence::log_ratio)
      .field("terms", &RowDivergence::terms)
      .field("divergence", &RowDivergence::divergence)
      .field("student_entropy", &RowDivergence::student_entropy)
      .field("teacher_entropy", &RowDivergence::teacher_entropy)
      .field("student_logp", &RowDivergence::student_logp)
      .field("teacher_logp", &RowDivergence::teacher_logp)
      .field("importance_ratio", &RowDivergence::importance_ratio)
      .field("gradient", &RowDivergence::gradient)
      .field("gradient_stride", &RowDivergence::gradient_stride)
      .field("gradient_dtype", &RowDivergence::gradient_dtype);
  on_processor(m, "row_divergence_cpu", row_divergence_cpu);

  Fields<HeadLogits>(m, "HeadLogits")
      .field("rows", &HeadLogits::rows)
      .field("vocabulary", &HeadLogits::vocabulary)
      .field("logits", &HeadLogits::logits)
      .field("logits_stride", &HeadLogits::logits_stride)
      .field("bias", &HeadLogits::bias)
      .field("scale", &HeadLogits::scale)
      .field("softcap", &HeadLogits::softcap);
  on_processor(m, "head_logits", head_logits);
  Fields<TailGradient>(m, "TailGradient")
      .field("rows", &TailGradient::rows)
      .field("vocabulary", &TailGradient::vocabulary)
      .field("logits", &TailGradient::logits)
      .field("logits_stride", &TailGradient::logits_stride)
      .field("base", &TailGradient::base)
      .field("factor", &TailGradient::factor)
      .field("temperature", &TailGradient::temperature)
      .field("softcap", &TailGradient::softcap)
      .field("gradient", &TailGradient::gradient)
      .field("gradient_stride", &TailGradient::gradient_stride)
      .field("gradient_dtype", &TailGradient::gradient_dtype);
  on_processor(m, "tail_gradient", tail_gradient);

  Fields<Matmul>(m, "Matmul")
      .field("rows", &Matmul::rows)
      .field("columns", &Matmul::columns)
      .field("depth", &Matmul::depth)
      .field("left", &Matmul::left)
      .field("right", &Matmul::right)
      .field("out", &Matmul::out)
      .field("out_stride", &Matmul::out_stride)
      .field("add", &Matmul::add);
  Fields<Factor>(m, "Factor")
      .field("at", &Factor::at)
      .field("line_stride", &Factor::line_stride)
      .field("depth_stride", &Factor::depth_stride)
      .field("dtype", &Factor::dtype);
  on_processor(m, "matmul", matmul);
  m.def("matmul_bf16", [](const Matmul& task, int threads) {
    if (best_instruction_set() < InstructionSet::kAVX512BF16)
      throw std::invalid_argument("matmul_bf16: this processor has no instructions for bf16");
    py::gil_scoped_release release;
    matmul_bf16(task, threads);
  });
  m.def("advise_huge_pages", &advise_huge_pages);
}
