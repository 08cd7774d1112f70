// Rows and products of the CPU kernels, built for a processor that need not be the one at hand: reads two matrices of
// fp32 from standard input and writes what the kernels make of them (tests/test_other_processors.py).
//
//     cpu_check rows vocabulary beta       student, teacher  -> divergence [rows], gradient [rows, vocabulary]
//     cpu_check rows depth columns product left, right       -> product [rows, columns]
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "matmul.h"
#include "row_divergence.h"

using namespace scsdpo;

static std::vector<float> input(size_t count) {
  std::vector<float> numbers(count);
  if (fread(numbers.data(), sizeof(float), count, stdin) != count) exit(1);
  return numbers;
}

static void output(const std::vector<float>& numbers) { fwrite(numbers.data(), sizeof(float), numbers.size(), stdout); }

int main(int count, char** arguments) {
  const int64_t rows = atoll(arguments[1]), second = atoll(arguments[2]);
  const Processor here{2, best_instruction_set()};
  if (count == 5) {
    const int64_t columns = atoll(arguments[3]);
    std::vector<float> left = input(rows * second), right = input(second * columns), product(rows * columns);
    const Factor lines{{left.data(), second, DType::kFloat32}, 1},
        columns_of{{right.data(), 1, DType::kFloat32}, columns};
    matmul({rows, columns, second, lines, columns_of, {product.data(), columns, DType::kFloat32}, false}, here);
    output(product);
    return 0;
  }
  std::vector<float> student = input(rows * second), teacher = input(rows * second), weight(rows, 1.0f);
  std::vector<float> scalars(3 * rows), gradient(rows * second);
  const auto matrix = [](std::vector<float>& x, int64_t stride) { return Matrix{x.data(), stride, DType::kFloat32}; };
  const double beta = atof(arguments[3]);
  const Kind kind = beta == 0 ? Kind::kForward : beta == 1 ? Kind::kReverse : Kind::kJensenShannon;
  row_divergence({rows, second, matrix(student, second), matrix(teacher, second), false, 0.0f},
                 {kind, beta, 1.0f, 0.0f}, {weight.data(), nullptr, nullptr, 0.0f}, matrix(scalars, rows),
                 matrix(gradient, second), here);
  scalars.resize(rows);  // divergences
  output(scalars);
  output(gradient);
  return 0;
}
