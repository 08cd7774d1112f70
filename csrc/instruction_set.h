#pragma once

#include <cstdint>

namespace scsdpo {

enum class InstructionSet : int32_t { kBaseline, kAVX2, kAVX512, kAVX512BF16, kAMXBF16 };

// The widest one that this build has and this processor runs.
InstructionSet best_instruction_set();

// Where a kernel runs. Each row is computed by one thread in one order: results do not depend on `threads`.
struct Processor {
  int threads;
  InstructionSet instruction_set;  // at most best_instruction_set()
};

}  // namespace scsdpo
