// One entry of divergence.h with reference and mean score 0, as a Python module: {divergence, score, slope}.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "divergence.h"

namespace scsdpo {
namespace {

template <Kind kind>
std::array<float, 3> entry_of(float p, float q, float d, double beta) {
  Entry<float> of = entry<kind>(p, q, d, mixture({kind, beta, 1.0f, 0.0f}));
  return {of.divergence, of.score, slope<kind, Range::kAny, float>({p, q, d}, of.score, Row{})};
}

std::array<float, 3> entry_of(float p, float q, float d, double beta) {
  return beta == 0   ? entry_of<Kind::kForward>(p, q, d, beta)
         : beta == 1 ? entry_of<Kind::kReverse>(p, q, d, beta)
                     : entry_of<Kind::kJensenShannon>(p, q, d, beta);
}

}  // namespace
}  // namespace scsdpo

PYBIND11_MODULE(entry_of, m) {
  m.def("entry_of", [](float p, float q, float d, double beta) { return scsdpo::entry_of(p, q, d, beta); });
}
