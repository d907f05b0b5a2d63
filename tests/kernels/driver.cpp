// Checks the library without torch: every path against sums in plain integers, under sanitizers or an emulator.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "api.h"
#include "threads.h"
#include "training.h"

using FfWeight = fiftyfold::WeightCall;
extern "C" void ff_quantize_weight(const FfWeight* call);
extern "C" void ff_dequantize(
    const int8_t* codes, int64_t rows, int64_t columns, int64_t groups, int32_t per_tensor, const uint16_t* scale,
    float* y);
extern "C" uint64_t ff_checksum(const float* x, int64_t rows, int64_t columns);
extern "C" void ff_fake_quantize_tokens(
    const float* x, int64_t tokens, int64_t columns, int32_t bits, int32_t full_range, float clip, const float* largest,
    float* y);

namespace {

std::mt19937 random_bits(1);

int pick(int low, int high) { return low + static_cast<int>(random_bits() % static_cast<unsigned>(high - low + 1)); }

// Work is cut into pieces for so many threads, which one does in turn.
uint32_t threads = 1;

void pretend_threads() {
  fiftyfold::use_threads(
      [](int64_t begin, int64_t end, int64_t, fiftyfold::RangeFunction function, void* context) {
        for (int64_t i = begin; i < end; i++) function(i, i + 1, context);
        return 0;
      },
      [](uint32_t* count) {
        *count = threads;
        return 0;
      });
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                                   : std::ldexp(static_cast<float>(fraction), -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

struct Case {
  int tokens, inputs, outputs, groups, bits, activation_bits;
  bool full_range, bias, clip, fixed, odd, extreme, ties, read_by_all;
};

// The output of one token, step by step.
void expected_row(const Case& c, const float* x, const std::vector<int8_t>& codes, const float* scale,
                  const float* bias, float clip, const float* largest, float* y) {
  const float high = c.activation_bits == 16 ? 32639.0f : static_cast<float>((1 << (c.activation_bits - 1)) - 1);
  const float low = -high - (c.full_range ? 1.0f : 0.0f);
  float magnitude = 0;
  bool broken = false;
  std::vector<float> values(static_cast<size_t>(c.inputs));
  for (int k = 0; k < c.inputs; k++) {
    values[k] = x[k] < -clip ? -clip : x[k] > clip ? clip : x[k];
    broken |= std::isnan(values[k]);
    magnitude = std::fmax(magnitude, std::fabs(values[k]));
  }
  if (largest) magnitude = *largest;
  broken |= !std::isfinite(magnitude);
  const float divisor = std::fmax(magnitude / -low, 1.17549435e-38f);
  const int size = c.inputs / c.groups;
  for (int n = 0; n < c.outputs; n++) {
    float value = 0;
    for (int g = 0; g < c.groups; g++) {
      int64_t sum = 0;
      for (int k = g * size; k < (g + 1) * size && !broken; k++) {
        const float code = std::fmin(std::fmax(std::nearbyint(values[k] / divisor), low), high);
        sum += static_cast<int64_t>(code) * codes[static_cast<size_t>(n) * c.inputs + k];
      }
      const float part = static_cast<float>(sum) * (broken ? NAN : divisor) * scale[g * c.outputs + n];
      value = g ? value + part : part;
    }
    y[n] = bias ? value + bias[n] : value;
  }
}

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || a == b; }

bool check_linear(const Case& c) {
  std::vector<int8_t> codes(static_cast<size_t>(c.outputs) * c.inputs);
  for (auto& code : codes) code = static_cast<int8_t>(c.extreme ? 1 : c.bits == 1 ? pick(0, 1) * 2 - 1 : pick(-1, 1));
  std::vector<uint8_t> arranged(static_cast<size_t>(ff_arranged_bytes(c.outputs, c.inputs, c.groups, c.bits)));
  ff_arrange(codes.data(), c.outputs, c.inputs, c.groups, c.bits, arranged.data());
  const int stride = c.inputs + pick(0, 3);
  // The last token ends where the memory ends.
  std::vector<float> x(static_cast<size_t>((c.tokens - 1) * stride + c.inputs));
  for (auto& value : x) value = c.extreme ? -1.0f : static_cast<float>(pick(-1000, 1000)) * 0.0137f;
  if (c.ties) {  // quotients that lie in the middle between two codes, or a last bit beside it
    const float step = static_cast<float>(pick(1, 1000)) * 0.00137f;
    for (auto& value : x) value = (static_cast<float>(pick(-127, 126)) + 0.5f) * step;
    for (int t = 0; t < c.tokens; t++) x[static_cast<size_t>(t * stride)] = 127.0f * step;
  }
  if (c.odd) x[static_cast<size_t>(pick(0, static_cast<int>(x.size()) - 1))] = pick(0, 1) ? NAN : INFINITY;
  std::vector<float> scale(static_cast<size_t>(c.groups * c.outputs)), bias(static_cast<size_t>(c.outputs));
  for (auto& value : scale) value = static_cast<float>(pick(1, 1000)) * 0.001f;
  for (auto& value : bias) value = static_cast<float>(pick(-100, 100)) * 0.1f;
  std::vector<float> y(static_cast<size_t>(c.tokens * c.outputs)), row(static_cast<size_t>(c.outputs));
  const float largest = 3.7f, clip = c.clip ? 5.0f : INFINITY;
  FfLinear call{};
  call.x = x.data(), call.tokens = c.tokens, call.inputs = c.inputs, call.x_stride = stride;
  call.weight = arranged.data(), call.planes = ff_is_in_planes(arranged.data(), arranged.size()), call.scale = scale.data(), call.groups = c.groups, call.outputs = c.outputs;
  call.bias = c.bias ? bias.data() : nullptr, call.y = y.data(), call.largest = c.fixed ? &largest : nullptr;
  call.clip = clip, call.weight_bits = c.bits, call.activation_bits = c.activation_bits, call.full_range = c.full_range;
  ff_linear(&call);
  // What one path arranged, as in a compiled program, the others read.
  if (c.read_by_all) {
    const char* own = ff_path();
    for (int p = 0; const char* other = ff_supported_path(p); p++) {
      std::vector<float> again(y.size());
      ff_choose_path(other);
      call.y = again.data();
      ff_linear(&call);
      for (size_t i = 0; i < y.size(); i++) {
        if (!same(y[i], again[i])) return std::printf("%s arranged, %s read\n", own, other), false;
      }
    }
    ff_choose_path(own);
  }
  for (int t = 0; t < c.tokens; t++) {
    expected_row(c, x.data() + t * stride, codes, scale.data(), call.bias, clip, call.largest, row.data());
    for (int n = 0; n < c.outputs; n++) {
      if (!same(row[n], y[t * c.outputs + n])) {
        std::printf("%s: %d x %d x %d, %d groups, %d bits, %d bits: %.9g, not %.9g\n", ff_path(), c.tokens, c.inputs,
                    c.outputs, c.groups, c.bits, c.activation_bits, y[t * c.outputs + n], row[n]);
        return false;
      }
    }
  }
  // The other types must stay within their memory, and differ by their rounding alone.
  for (int type = 1; type <= 2; type++) {
    std::vector<uint16_t> halves(x.size(), static_cast<uint16_t>(type == 1 ? 0x3f80 : 0x3c00));
    std::vector<uint16_t> out(y.size());
    call.x = halves.data(), call.y = out.data(), call.float_type = type;
    ff_linear(&call);
  }
  return true;
}

bool check_embedding(int bits, int rows, int columns) {
  const int digits = bits == 2 ? 5 : 8, base = bits + 1;
  std::vector<int> codes(static_cast<size_t>(rows * columns));
  for (auto& code : codes) code = pick(0, base - 1);
  std::vector<uint8_t> packed(static_cast<size_t>((rows * columns + digits - 1) / digits));
  for (size_t i = codes.size(); i-- > 0;) {
    packed[i / digits] = static_cast<uint8_t>(packed[i / digits] * base + codes[i]);
  }
  std::vector<uint16_t> scale(static_cast<size_t>(rows));
  for (auto& value : scale) value = static_cast<uint16_t>(pick(0, 0x7bff));
  const std::vector<int64_t> tokens{rows - 1, 0, rows / 2, rows - 1};
  std::vector<float> y(tokens.size() * static_cast<size_t>(columns));
  FfEmbedding call{};
  call.tokens = tokens.data(), call.count = static_cast<int64_t>(tokens.size()), call.rows = rows;
  call.columns = columns, call.packed = packed.data(), call.packed_bytes = static_cast<int64_t>(packed.size());
  call.scale = scale.data(), call.y = y.data(), call.bits = bits;
  if (ff_embedding(&call) != 0) return false;
  for (size_t t = 0; t < tokens.size(); t++) {
    for (int k = 0; k < columns; k++) {
      const int digit = codes[static_cast<size_t>(tokens[t] * columns + k)];
      const float code = static_cast<float>(bits == 2 ? digit - 1 : digit * 2 - 1);
      if (y[t * columns + k] != code * half_to_float(scale[static_cast<size_t>(tokens[t])])) return false;
    }
  }
  const int64_t absent = rows;
  call.tokens = &absent, call.count = 1;
  return ff_embedding(&call) == 1;
}

bool check_rows(int bits, int tokens, int outputs, int inputs, bool per_tensor) {
  std::vector<int8_t> codes(static_cast<size_t>(outputs * inputs));
  for (auto& code : codes) code = static_cast<int8_t>(bits == 1 ? pick(0, 1) * 2 - 1 : pick(-1, 1));
  std::vector<uint8_t> entries(static_cast<size_t>(ff_entries_bytes(outputs, inputs, bits)));
  ff_find_entries(codes.data(), outputs, inputs, bits, entries.data());
  std::vector<float> rows(static_cast<size_t>(tokens * outputs)), y(static_cast<size_t>(tokens * inputs));
  for (auto& value : rows) value = static_cast<float>(pick(-1000, 1000));
  std::vector<uint16_t> scale(static_cast<size_t>(per_tensor ? 1 : outputs));
  for (auto& value : scale) value = static_cast<uint16_t>(0x3c00 + 0x400 * pick(-2, 2));  // powers of two: sums are exact
  ff_multiply_rows(rows.data(), tokens, outputs, inputs, bits, entries.data(), scale.data(), per_tensor, y.data());
  for (int t = 0; t < tokens; t++) {
    for (int k = 0; k < inputs; k++) {
      float sum = 0;
      for (int n = 0; n < outputs; n++) {
        sum += rows[t * outputs + n] * half_to_float(scale[per_tensor ? 0 : n]) * codes[n * inputs + k];
      }
      if (sum != y[t * inputs + k]) {
        std::printf("%s: rows %d x %d x %d, %d bits, %u threads: %.9g, not %.9g\n", ff_path(), tokens, outputs, inputs,
                    bits, threads, y[t * inputs + k], sum);
        return false;
      }
    }
  }
  return true;
}

bool check_table_linear(int bits, int tokens, int outputs, int inputs, bool biased) {
  std::vector<int8_t> codes(static_cast<size_t>(outputs * inputs));
  for (auto& code : codes) code = static_cast<int8_t>(bits == 1 ? pick(0, 1) * 2 - 1 : pick(-1, 1));
  std::vector<uint8_t> weight(static_cast<size_t>(ff_tabled_bytes(outputs, inputs, bits)));
  ff_arrange_for_tables(codes.data(), outputs, inputs, bits, weight.data());
  std::vector<float> x(static_cast<size_t>(tokens * inputs)), y(static_cast<size_t>(tokens * outputs));
  std::vector<float> scale(static_cast<size_t>(outputs)), bias(static_cast<size_t>(outputs));
  for (auto& value : x) value = static_cast<float>(pick(-1000, 1000));
  for (auto& value : scale) value = std::ldexp(1.0f, pick(-3, 3));  // sums are exact
  for (auto& value : bias) value = static_cast<float>(pick(-100, 100));
  ff_table_linear(x.data(), tokens, inputs, outputs, bits, weight.data(), scale.data(), biased ? bias.data() : nullptr,
                  y.data());
  for (int t = 0; t < tokens; t++) {
    for (int n = 0; n < outputs; n++) {
      float sum = 0;
      for (int k = 0; k < inputs; k++) sum += x[t * inputs + k] * codes[n * inputs + k];
      const float expected = sum * scale[n] + (biased ? bias[n] : 0.0f);
      if (expected != y[t * outputs + n]) {
        std::printf("%s: tables %d x %d x %d, %d bits, %u threads: %.9g, not %.9g\n", ff_path(), tokens, inputs, outputs,
                    bits, threads, y[t * outputs + n], expected);
        return false;
      }
    }
  }
  return true;
}

// Weights whose magnitudes are powers of two, so that every sum is exact whatever its order.
bool check_weight(int bits, int rows, int columns, int groups, bool per_tensor) {
  if (per_tensor) groups = 1;
  columns *= groups;
  const size_t size = static_cast<size_t>(rows * columns);
  std::vector<float> weight(size), y(size), again(size);
  for (auto& value : weight) value = std::ldexp(pick(0, 1) ? 1.0f : -1.0f, pick(-3, 0));
  std::vector<int8_t> codes(size);
  std::vector<uint16_t> scale(static_cast<size_t>(per_tensor ? 1 : rows * groups));
  FfWeight call{weight.data(), rows, columns, groups, per_tensor, bits, INFINITY, codes.data(), scale.data(), y.data()};
  ff_quantize_weight(&call);
  ff_dequantize(codes.data(), rows, columns, groups, per_tensor, scale.data(), again.data());
  const uint64_t sum = ff_checksum(weight.data(), rows, columns);
  const int part = columns / groups;
  for (int i = 0; i < rows * columns; i++) {
    const float unit = half_to_float(scale[static_cast<size_t>(per_tensor ? 0 : i / part)]);
    const int most = bits <= 2 ? 1 : (1 << (bits - 1)) - 1;
    const bool sign = bits == 2 || (codes[i] != 0 && (codes[i] > 0) == (weight[i] > 0)) || bits > 2;
    if (!sign || std::abs(codes[i]) > most || y[i] != codes[i] * unit || again[i] != y[i]) {
      std::printf("weight %d x %d, %d groups, %d bits: %d for %g\n", rows, columns, groups, bits, codes[i], weight[i]);
      return false;
    }
  }
  weight[static_cast<size_t>(pick(0, rows * columns - 1))] *= 2;
  return ff_checksum(weight.data(), rows, columns) != sum;
}

bool check_tokens(int bits, int tokens, int columns, bool full_range, bool fixed) {
  std::vector<float> x(static_cast<size_t>(tokens * columns)), y(x.size());
  for (auto& value : x) value = static_cast<float>(pick(-1000, 1000)) * 0.0137f;
  const float largest = 3.7f;
  ff_fake_quantize_tokens(x.data(), tokens, columns, bits, full_range, INFINITY, fixed ? &largest : nullptr, y.data());
  const float high = static_cast<float>((1 << (bits - 1)) - 1), low = -high - (full_range ? 1.0f : 0.0f);
  for (int t = 0; t < tokens; t++) {
    const float* row = x.data() + t * columns;
    float magnitude = fixed ? largest : 0;
    for (int k = 0; k < columns && !fixed; k++) magnitude = std::fmax(magnitude, std::fabs(row[k]));
    const float divisor = std::fmax(magnitude / -low, 1.17549435e-38f);
    for (int k = 0; k < columns; k++) {
      const float expected = std::fmin(std::fmax(std::nearbyint(row[k] / divisor), low), high) * divisor;
      if (y[t * columns + k] != expected) return std::printf("tokens %d: %g\n", columns, row[k]), false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 100;
  int failures = 0;
  pretend_threads();
  for (int p = 0; ff_supported_path(p); p++) {
    ff_choose_path(ff_supported_path(p));
    for (int i = 0; i < cases; i++) {
      threads = pick(0, 1) ? 1 : static_cast<uint32_t>(pick(2, 5));
      Case c{};
      c.groups = pick(0, 2) ? 1 : pick(2, 4);
      c.inputs = c.groups * pick(1, 200), c.outputs = pick(0, 3) ? pick(1, 140) : pick(250, 340);
      c.tokens = pick(0, 3) ? pick(1, 20) : pick(40, 110);
      c.bits = pick(1, 2);
      const int activation_bits[] = {4, 8, 8, 16};
      c.activation_bits = activation_bits[pick(0, 3)];
      c.full_range = c.activation_bits < 16 && pick(0, 1), c.bias = pick(0, 1), c.clip = pick(0, 2) == 0;
      c.fixed = pick(0, 2) == 0, c.odd = pick(0, 5) == 0, c.ties = pick(0, 2) == 0;
      c.read_by_all = pick(0, 2) == 0;
      failures += !check_linear(c);
    }
    for (int bits = 1; bits <= 2; bits++) {
      for (int tokens = 1; tokens <= 8; tokens += 7) {
        failures += !check_linear({tokens, 16384, 17, 1, bits, 8, true, false, false, false, false, true, false});
        failures += !check_linear({tokens, 16384, 65, 1, bits, 16, false, false, false, false, false, true, false});
        // So many outputs that binary weights may be looked up.
        failures += !check_linear({tokens, 1056, 273, 1, bits, 8, true, false, false, false, false, true, false, true});
        failures += !check_linear({tokens, 1056, 257, 1, bits, 16, false, false, false, false, false, true, false});
      }
      // Long rows, and more of them than a pair of tiles takes.
      failures += !check_linear({70, 2 * 2090, 81, 2, bits, 8, false, true, false, false, false, false, true});
      failures += !check_linear({37, 2100, 64, 1, bits, 16, false, true, false, false, false, false, false});
    }
    for (int i = 0; i < cases; i++) {
      threads = static_cast<uint32_t>(pick(1, 8));
      const int inputs = pick(0, 2) ? pick(0, 300) : pick(512, 900);
      failures += !check_rows(pick(1, 2), pick(1, 70), pick(1, 120), inputs, pick(0, 1));
      failures += !check_table_linear(pick(1, 2), pick(1, 70), pick(0, 2) ? pick(1, 300) : 900, pick(1, 120), pick(0, 1));
      const int widths[] = {1, 2, 3, 4, 8};
      failures += !check_weight(widths[pick(0, 4)], pick(1, 40), pick(1, 60), pick(1, 3), i % 2);
      failures += !check_tokens(pick(0, 1) ? 8 : 4, pick(1, 30), pick(1, 90), pick(0, 1), pick(0, 1));
    }
    std::printf("%s checked\n", ff_path());
  }
  for (int bits = 1; bits <= 2; bits++) {
    for (int columns = 1; columns < 40; columns += 3) failures += !check_embedding(bits, 7, columns);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
