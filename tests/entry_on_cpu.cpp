// divergence.h on a CPU's elementary functions, for cuda_on_host.cpp, which has a GPU's.
#include "entry_of.h"

std::array<float, 3> entry_on_cpu(float p, float q, float d, double beta) { return scsdpo::entry_of(p, q, d, beta); }
