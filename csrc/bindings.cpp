// The only pybind11 file: the structs of the C++ interface as Python objects, made of named numbers and addresses, and
// the functions that take them, without the GIL.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "huge_pages.h"
#include "logits.h"
#include "matmul.h"
#include "row_divergence.h"

namespace py = pybind11;
using namespace scsdpo;

namespace {

template <class Struct, class Value>
struct Field {
  const char* name;
  Value Struct::* member;
};

template <class Struct, class Value>
Field<Struct, Value> field(const char* name, Value Struct::* member) {
  return {name, member};
}

// What Python gives for a field: an address is a number.
template <class Value>
struct Given {
  using type = Value;
  static Value value(const Value& x) { return x; }
};
template <class Value>
struct Given<Value*> {
  using type = uintptr_t;
  static Value* value(uintptr_t x) { return reinterpret_cast<Value*>(x); }
};

template <class Struct, class... Values>
void structure(py::module_& m, const char* name, Field<Struct, Values>... fields) {
  auto make = [=](const typename Given<Values>::type&... values) {
    Struct made{};
    ((made.*fields.member = Given<Values>::value(values)), ...);
    return made;
  };
  py::class_<Struct>(m, name).def(py::init(make), py::arg(fields.name)...);
}

Processor processor(int threads, InstructionSet instruction_set) {
  if (instruction_set > best_instruction_set())
    throw std::invalid_argument("instruction_set: this build or this processor does not have the one asked for");
  return {threads, instruction_set};
}

template <class Function>
void function(py::module_& m, const char* name, Function kernel) {
  m.def(name, kernel, py::call_guard<py::gil_scoped_release>());
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
  py::enum_<Kind>(m, "Kind")
      .value("forward", Kind::kForward)
      .value("reverse", Kind::kReverse)
      .value("jensen_shannon", Kind::kJensenShannon)
      .value("clipped", Kind::kClipped);
  m.def("best_instruction_set", &best_instruction_set);
  m.attr("most_terms") = kMostTerms;
  py::class_<Processor>(m, "Processor").def(py::init(&processor));

  structure(m, "Matrix", field("at", &Matrix::at), field("stride", &Matrix::stride), field("dtype", &Matrix::dtype));
  structure(m, "Logits", field("rows", &Logits::rows), field("vocabulary", &Logits::vocabulary),
            field("student", &Logits::student), field("teacher", &Logits::teacher),
            field("difference", &Logits::difference), field("softcap", &Logits::softcap));
  structure(m, "Objective", field("kind", &Objective::kind), field("beta", &Objective::beta),
            field("temperature", &Objective::temperature), field("entry_clip", &Objective::entry_clip));
  structure(m, "PerRow", field("weight", &PerRow::weight), field("target", &PerRow::target),
            field("old_logp", &PerRow::old_logp), field("importance_clip", &PerRow::importance_clip));
  structure(m, "Statistics", field("student_lse", &Statistics::student_lse),
            field("teacher_lse", &Statistics::teacher_lse), field("student_max", &Statistics::student_max),
            field("centre", &Statistics::centre), field("log_ratio", &Statistics::log_ratio),
            field("student_entropy", &Statistics::student_entropy),
            field("teacher_entropy", &Statistics::teacher_entropy));
  structure(m, "HeadLogits", field("rows", &HeadLogits::rows), field("vocabulary", &HeadLogits::vocabulary),
            field("logits", &HeadLogits::logits), field("bias", &HeadLogits::bias), field("scale", &HeadLogits::scale),
            field("softcap", &HeadLogits::softcap));
  structure(m, "TailGradient", field("rows", &TailGradient::rows), field("vocabulary", &TailGradient::vocabulary),
            field("logits", &TailGradient::logits), field("base", &TailGradient::base),
            field("factor", &TailGradient::factor), field("temperature", &TailGradient::temperature),
            field("softcap", &TailGradient::softcap), field("gradient", &TailGradient::gradient));
  structure(m, "Factor", field("lines", &Factor::lines), field("depth_stride", &Factor::depth_stride));
  structure(m, "Matmul", field("rows", &Matmul::rows), field("columns", &Matmul::columns),
            field("depth", &Matmul::depth), field("left", &Matmul::left), field("right", &Matmul::right),
            field("out", &Matmul::out), field("add", &Matmul::add));
  function(m, "row_divergence", &row_divergence);
  function(m, "row_statistics", &row_statistics);
  function(m, "row_terms", &row_terms);
  function(m, "row_gradient", &row_gradient);
  function(m, "head_logits", &head_logits);
  function(m, "tail_gradient", &tail_gradient);
  function(m, "matmul", &matmul);
  function(m, "matmul_bf16", [](const Matmul& task, int threads) {
    matmul_bf16(task, processor(threads, InstructionSet::kAVX512BF16).threads);
  });
  function(m, "advise_huge_pages", &advise_huge_pages);
}
