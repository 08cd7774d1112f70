// The only pybind11 file: structs become Python objects, made of numbers and addresses; functions drop the GIL.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "huge_pages.h"
#include "logits.h"
#include "matmul.h"
#include "row_divergence.h"

namespace py = pybind11;
using namespace scsdpo;

namespace {

template <class Struct, class Value>
struct Field {
  Field(const char* name, Value Struct::* member) : name(name), member(member) {}
  const char* name;
  Value Struct::* member;
};

// What Python gives for a field: an address is a number.
template <class Value>
using Given = std::conditional_t<std::is_pointer_v<Value>, uintptr_t, Value>;

template <class Struct, class... Values>
void structure(py::module_& m, const char* name, Field<Struct, Values>... fields) {
  auto make = [=](Given<Values>... values) {
    Struct made{};
    ((made.*fields.member = (Values)values), ...);
    return made;
  };
  py::class_<Struct>(m, name).def(py::init(make), py::arg(fields.name)...);
}

template <class Enum>
void enumeration(py::module_& m, const char* name, std::initializer_list<const char*> names) {
  py::enum_<Enum> made(m, name);
  for (const char* const* each = names.begin(); each != names.end(); ++each)
    made.value(*each, static_cast<Enum>(each - names.begin()));
}

Processor processor(int threads, InstructionSet instruction_set) {
  if (instruction_set <= best_instruction_set()) return {threads, instruction_set};
  throw std::invalid_argument("instruction_set: this build or this processor does not have the one asked for");
}

template <class Function>
void function(py::module_& m, const char* name, Function kernel) {
  m.def(name, kernel, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  enumeration<DType>(m, "DType", {"float32", "bfloat16", "float16", "float64"});
  enumeration<InstructionSet>(m, "InstructionSet", {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"});
#define SCSDPO_KIND_NAME(kind, name) name,
  enumeration<Kind>(m, "Kind", {SCSDPO_KINDS(SCSDPO_KIND_NAME)});
  m.def("best_instruction_set", &best_instruction_set);
  m.attr("most_terms") = kMostTerms;
  py::class_<Processor>(m, "Processor").def(py::init(&processor));

  structure(m, "Matrix", Field("at", &Matrix::at), Field("stride", &Matrix::stride), Field("dtype", &Matrix::dtype));
  structure(m, "Logits", Field("rows", &Logits::rows), Field("vocabulary", &Logits::vocabulary),
            Field("student", &Logits::student), Field("teacher", &Logits::teacher),
            Field("difference", &Logits::difference), Field("softcap", &Logits::softcap));
  structure(m, "Objective", Field("kind", &Objective::kind), Field("beta", &Objective::beta),
            Field("temperature", &Objective::temperature), Field("entry_clip", &Objective::entry_clip),
            Field("token_beta", &Objective::token_beta));
  structure(m, "Policy", Field("advantage", &Policy::advantage), Field("coefficient", &Policy::coefficient),
            Field("ratio", &Policy::ratio), Field("lowest", &Policy::lowest), Field("highest", &Policy::highest));
  structure(m, "PerRow", Field("weight", &PerRow::weight), Field("target", &PerRow::target),
            Field("old_logp", &PerRow::old_logp), Field("importance_clip", &PerRow::importance_clip),
            Field("policy", &PerRow::policy));
  structure(m, "Statistics", Field("student_lse", &Statistics::student_lse),
            Field("teacher_lse", &Statistics::teacher_lse), Field("student_max", &Statistics::student_max),
            Field("centre", &Statistics::centre), Field("log_ratio", &Statistics::log_ratio),
            Field("student_entropy", &Statistics::student_entropy),
            Field("teacher_entropy", &Statistics::teacher_entropy));
  structure(m, "HeadLogits", Field("rows", &HeadLogits::rows), Field("vocabulary", &HeadLogits::vocabulary),
            Field("logits", &HeadLogits::logits), Field("bias", &HeadLogits::bias), Field("scale", &HeadLogits::scale),
            Field("softcap", &HeadLogits::softcap));
  structure(m, "TailGradient", Field("rows", &TailGradient::rows), Field("vocabulary", &TailGradient::vocabulary),
            Field("logits", &TailGradient::logits), Field("base", &TailGradient::base),
            Field("factor", &TailGradient::factor), Field("temperature", &TailGradient::temperature),
            Field("softcap", &TailGradient::softcap), Field("gradient", &TailGradient::gradient));
  structure(m, "Factor", Field("lines", &Factor::lines), Field("depth_stride", &Factor::depth_stride));
  structure(m, "Matmul", Field("rows", &Matmul::rows), Field("columns", &Matmul::columns),
            Field("depth", &Matmul::depth), Field("left", &Matmul::left), Field("right", &Matmul::right),
            Field("out", &Matmul::out), Field("add", &Matmul::add));
  function(m, "row_divergence", &row_divergence);
  function(m, "row_statistics", &row_statistics);
  function(m, "row_terms", &row_terms);
  function(m, "row_gradient", &row_gradient);
  function(m, "head_logits", &head_logits);
  function(m, "tail_gradient", &tail_gradient);
  function(m, "matmul", &matmul);
  function(m, "matmul_bf16", &matmul_bf16);
  function(m, "advise_huge_pages", &advise_huge_pages);
}
