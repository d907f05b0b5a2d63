// Quantization while training: how its work is cut into pieces, and which instruction set does it.
#include "training.h"

#include <vector>

#include "api.h"
#include "paths.h"
#include "threads.h"

namespace fiftyfold {
namespace {

constexpr int64_t kTaskEntries = 32768;

struct TokensCall {
  const float* x;
  int64_t tokens, columns;
  Grid grid;
  float* y;
};

// What each instruction set compiles.
struct Steps {
  void (*fake_quantize)(const TokensCall&, int64_t begin, int64_t end);
  void (*sum)(const WeightCall&, int64_t row, int64_t group, double* sum);
  void (*sum_beyond)(const WeightCall&, int64_t row, int64_t group, float threshold, double* sum, double* count);
  void (*largest)(const WeightCall&, int64_t row, int64_t group, float* largest);
  void (*write)(const WeightCall&, int64_t row, int64_t group, float threshold, float scale);
  void (*dequantize)(const int8_t* codes, int64_t n, float scale, float* y);
  uint64_t (*checksum)(const float* x, int64_t n);
};

#define FF_STEPS(NAME, TARGET)                                                                                        \
  namespace NAME {                                                                                                    \
  TARGET void fake_quantize_of(const TokensCall& call, int64_t begin, int64_t end) {                                  \
    for (int64_t t = begin; t < end; t++) {                                                                           \
      fake_quantize_token(call.grid, call.x + t * call.columns, call.columns, call.y + t * call.columns);             \
    }                                                                                                                 \
  }                                                                                                                   \
  TARGET void sum_of(const WeightCall& call, int64_t row, int64_t group, double* sum) {                               \
    const int64_t n = call.columns / call.groups;                                                                     \
    *sum = sum_magnitudes(call.weight + row * call.columns + group * n, n, call.clip);                                \
  }                                                                                                                   \
  TARGET void sum_beyond_of(                                                                                          \
      const WeightCall& call, int64_t row, int64_t group, float threshold, double* sum, double* count) {              \
    const int64_t n = call.columns / call.groups;                                                                     \
    sum_beyond(call.weight + row * call.columns + group * n, n, call.clip, threshold, sum, count);                    \
  }                                                                                                                   \
  TARGET void largest_of(const WeightCall& call, int64_t row, int64_t group, float* largest) {                        \
    const int64_t n = call.columns / call.groups;                                                                     \
    *largest = largest_magnitude(call.weight + row * call.columns + group * n, n, call.clip);                         \
  }                                                                                                                   \
  TARGET void write_of(const WeightCall& call, int64_t row, int64_t group, float threshold, float scale) {            \
    const int64_t n = call.columns / call.groups, at = row * call.columns + group * n;                                \
    write_weight_row(call.weight + at, n, call.bits, call.clip, threshold, scale,                                     \
                     call.codes ? call.codes + at : nullptr, call.y ? call.y + at : nullptr);                         \
  }                                                                                                                   \
  TARGET void dequantize_of(const int8_t* codes, int64_t n, float scale, float* y) {                                  \
    dequantize_row(codes, n, scale, y);                                                                               \
  }                                                                                                                   \
  TARGET uint64_t checksum_of(const float* x, int64_t n) { return checksum(x, n); }                                   \
  const Steps kSteps{fake_quantize_of, sum_of, sum_beyond_of, largest_of, write_of, dequantize_of, checksum_of};      \
  }

FF_STEPS(portable, )
#if defined(__x86_64__) && !defined(FF_EMULATED)
FF_STEPS(avx2, __attribute__((target("avx2,f16c"))))
FF_STEPS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,prefer-vector-width=512"))))
#endif
#undef FF_STEPS

const Steps& steps() {
#if defined(__x86_64__) && !defined(FF_EMULATED)
  const int bytes = current_path().vector_bytes;
  if (bytes == 64) return avx512::kSteps;
  if (bytes == 32) return avx2::kSteps;
#endif
  return portable::kSteps;
}

// Spreads rows over the threads in pieces of about kTaskEntries entries.
template <class Function>
void for_rows(int64_t rows, int64_t columns, Function function) {
  const int64_t most = columns > 0 ? kTaskEntries / columns + 1 : rows;
  const int64_t tasks = (rows + most - 1) / most;
  auto task = [&](int64_t t) { function(t * most, (t + 1) * most < rows ? (t + 1) * most : rows); };
  for_each_task(tasks, task);
}

class Weight {
 public:
  explicit Weight(const WeightCall& call) : call_(call) {}

  void run() const {
    if (call_.per_tensor) {
      run_whole();
      return;
    }
    for_rows(call_.rows, call_.columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        for (int64_t group = 0; group < call_.groups; group++) run_group(row, group);
      }
    });
  }

 private:
  void run_group(int64_t row, int64_t group) const {
    const double entries = static_cast<double>(call_.columns / call_.groups);
    float threshold = 0, largest = 0;
    double sum = 0, count = 0;
    if (call_.bits > 2) {
      steps().largest(call_, row, group, &largest);
    } else {
      steps().sum(call_, row, group, &sum);
    }
    if (call_.bits == 2) {
      threshold = threshold_of(sum, entries);
      sum = 0;
      steps().sum_beyond(call_, row, group, threshold, &sum, &count);
      sum = shown(sum, threshold);
    }
    const uint16_t scale = scale_of(sum, call_.bits == 2 ? count : entries, largest);
    call_.scale[row * call_.groups + group] = scale;
    steps().write(call_, row, group, threshold, from_float16(scale));
  }

  // Rows are added up in their order, whatever the number of threads.
  void run_whole() const {
    std::vector<double> sums(call_.rows), counts(call_.rows);
    std::vector<float> most(call_.rows);
    const double entries = static_cast<double>(call_.rows) * static_cast<double>(call_.columns);
    float threshold = 0, largest = 0;
    double sum = 0, count = 0;
    for_rows(call_.rows, call_.columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        call_.bits > 2 ? steps().largest(call_, row, 0, &most[row]) : steps().sum(call_, row, 0, &sums[row]);
      }
    });
    for (int64_t row = 0; row < call_.rows; row++) {
      sum += sums[row];
      largest = most[row] > largest || most[row] != most[row] ? most[row] : largest;
    }
    if (call_.bits == 2) {
      threshold = threshold_of(sum, entries);
      for_rows(call_.rows, call_.columns, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          sums[row] = 0;
          steps().sum_beyond(call_, row, 0, threshold, &sums[row], &counts[row]);
        }
      });
      sum = 0;
      for (int64_t row = 0; row < call_.rows; row++) {
        sum += sums[row];
        count += counts[row];
      }
      sum = shown(sum, threshold);
    }
    const uint16_t scale = scale_of(sum, call_.bits == 2 ? count : entries, largest);
    *call_.scale = scale;
    const float factor = from_float16(scale);
    for_rows(call_.rows, call_.columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) steps().write(call_, row, 0, threshold, factor);
    });
  }

  // No magnitude is beyond a threshold that is not finite; the weight must show it all the same.
  static double shown(double sum, float threshold) { return std::isfinite(threshold) ? sum : NAN; }

  static float threshold_of(double sum, double entries) { return static_cast<float>(sum * (0.7 / entries)); }

  uint16_t scale_of(double sum, double count, float largest) const {
    if (call_.bits <= 2) return stored_scale(sum / (count < 1 ? 1 : count));
    const float smallest = std::ldexp(1.0f, call_.bits - 25);
    const float scale = largest / static_cast<float>((1 << (call_.bits - 1)) - 1);
    return stored_scale(scale < smallest ? smallest : scale);
  }

  const WeightCall& call_;
};

}  // namespace
}  // namespace fiftyfold

using fiftyfold::for_rows;

FF_API uint64_t ff_checksum(const float* x, int64_t rows, int64_t columns) {
  std::vector<uint64_t> sums(rows);
  for_rows(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) sums[row] = fiftyfold::steps().checksum(x + row * columns, columns);
  });
  uint64_t all = 0;
  for (uint64_t sum : sums) {
    all = (all ^ sum) * 0x9e3779b97f4a7c15u;
    all ^= all >> 32;
  }
  return all;
}

FF_API void ff_fake_quantize_tokens(
    const float* x, int64_t tokens, int64_t columns, int32_t bits, int32_t full_range, float clip, const float* largest,
    float* y) {
  const fiftyfold::TokensCall call{x, tokens, columns, {bits, full_range != 0, clip, largest}, y};
  for_rows(tokens, columns, [&](int64_t begin, int64_t end) { fiftyfold::steps().fake_quantize(call, begin, end); });
}

FF_API void ff_quantize_weight(const fiftyfold::WeightCall* call) { fiftyfold::Weight(*call).run(); }

FF_API void ff_dequantize(
    const int8_t* codes, int64_t rows, int64_t columns, int64_t groups, int32_t per_tensor, const uint16_t* scale,
    float* y) {
  const int64_t n = columns / groups;
  for_rows(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      for (int64_t group = 0; group < groups; group++) {
        const float factor = fiftyfold::from_float16(scale[per_tensor ? 0 : row * groups + group]);
        const int64_t at = row * columns + group * n;
        fiftyfold::steps().dequantize(codes + at, n, factor, y + at);
      }
    }
  });
}
