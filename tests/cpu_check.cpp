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
  if (count == 5) {
    const int64_t columns = atoll(arguments[3]);
    std::vector<float> left = input(rows * second), right = input(second * columns), product(rows * columns);
    Matmul task{};
    task.rows = rows, task.depth = second, task.columns = columns;
    task.left = {left.data(), second, 1, DType::kFloat32};
    task.right = {right.data(), 1, columns, DType::kFloat32};
    task.out = product.data(), task.out_stride = columns;
    matmul(task, 2, best_instruction_set());
    output(product);
    return 0;
  }
  std::vector<float> student = input(rows * second), teacher = input(rows * second), weight(rows, 1.0f);
  std::vector<float> divergence(rows), entropies(2 * rows), gradient(rows * second);
  RowDivergence task{};
  task.rows = rows, task.vocabulary = second, task.beta = atof(arguments[3]), task.temperature = 1.0f;
  task.student = student.data(), task.teacher = teacher.data(), task.student_stride = task.teacher_stride = second;
  task.weight = weight.data(), task.divergence = divergence.data();
  task.student_entropy = entropies.data(), task.teacher_entropy = entropies.data() + rows;
  task.gradient = gradient.data(), task.gradient_stride = second;
  row_divergence_cpu(task, 2, best_instruction_set());
  output(divergence);
  output(gradient);
  return 0;
}
