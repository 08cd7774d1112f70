// One entry of divergence.h with reference and mean score 0, as a Python module: {divergence, score, slope}.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "divergence.h"

namespace scsdpo {
namespace {

template <Kind kind>
std::array<float, 3> entry_of(float p, float q, float d, double beta) {
  const Mixture mix = mixture({kind, beta, 1.0f, 0.0f, nullptr});
  Entry<float> of = entry<kind>(p, q, d, mix);
  return {of.divergence, of.score, slope<kind, Range::kAny, float>({p, q, d}, of.score, Row{}, mix)};
}

std::array<float, 3> entry_of(float p, float q, float d, double beta, const std::string& divergence) {
  return beta == 0                        ? entry_of<Kind::kForward>(p, q, d, beta)
         : beta == 1                      ? entry_of<Kind::kReverse>(p, q, d, beta)
         : divergence == "jeffreys"       ? entry_of<Kind::kJeffreys>(p, q, d, beta)
         : divergence == "skewed_forward" ? entry_of<Kind::kSkewedForward>(p, q, d, beta)
         : divergence == "skewed_reverse" ? entry_of<Kind::kSkewedReverse>(p, q, d, beta)
                                          : entry_of<Kind::kJensenShannon>(p, q, d, beta);
}

}  // namespace
}  // namespace scsdpo

PYBIND11_MODULE(entry_of, m) {
  using pybind11::operator""_a;
  m.def(
      "entry_of",
      [](float p, float q, float d, double beta, const std::string& divergence) {
        return scsdpo::entry_of(p, q, d, beta, divergence);
      },
      "p"_a, "q"_a, "d"_a, "beta"_a, "divergence"_a = "jensen_shannon");
}
