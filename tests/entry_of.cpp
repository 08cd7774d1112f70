// One entry of divergence.h with reference and mean score 0, as a Python module: {divergence, score, slope}.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "divergence.h"

namespace scsdpo {
namespace {

template <Objective objective>
std::array<float, 3> entry_of(float p, float q, float d, double beta) {
  Entry<float> of = entry<objective>(p, q, d, mixture(beta));
  return {of.divergence, of.score, slope<objective, Range::kAny, float>({p, q, d}, of.score, Row{})};
}

std::array<float, 3> entry_of(float p, float q, float d, double beta) {
  return beta == 0   ? entry_of<Objective::kForward>(p, q, d, beta)
         : beta == 1 ? entry_of<Objective::kReverse>(p, q, d, beta)
                     : entry_of<Objective::kJensenShannon>(p, q, d, beta);
}

}  // namespace
}  // namespace scsdpo

PYBIND11_MODULE(entry_of, m) {
  m.def("entry_of", [](float p, float q, float d, double beta) { return scsdpo::entry_of(p, q, d, beta); });
}
