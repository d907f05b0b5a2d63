// Quantization while training, in the float32 steps of fiftyfold/modules/quantization/quantizers.py: one pass over
// memory where torch takes six or more.
//
// Written for the compiler to vectorize, and compiled once for each instruction set.
#pragma once
#include "floats.h"

namespace fiftyfold {

constexpr int kLanes = 16;  // sums are added up in this order by every instruction set

struct WeightCall {
  const float* weight;  // rows x columns
  int64_t rows, columns;
  int64_t groups;      // of columns that share a scale
  int32_t per_tensor;  // one scale for all
  int32_t bits;
  float clip;       // or infinity
  int8_t* codes;    // rows x columns, or null
  uint16_t* scale;  // float16, rows x groups, or one
  float* y;         // rows x columns: codes times scales, or null
};

static FF_INLINE float clipped(float x, float clip) {
  x = x > clip ? clip : x;
  return x < -clip ? -clip : x;
}

// The sum of the magnitudes above `threshold`, and their number; at most 2**31 entries for each lane.
static FF_INLINE void sum_beyond(
    const float* x, int64_t n, float clip, float threshold, double* sum, double* count) {
  double sums[kLanes] = {};
  int32_t counts[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    float beyond[kLanes];
    for (int lane = 0; lane < kLanes; lane++) {
      const float magnitude = std::fabs(clipped(x[i + lane], clip));
      beyond[lane] = magnitude > threshold ? magnitude : 0.0f;
      counts[lane] += magnitude > threshold ? 1 : 0;
    }
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += static_cast<double>(beyond[lane]);
  }
  for (int lane = 0; i < n; i++, lane++) {
    const float magnitude = std::fabs(clipped(x[i], clip));
    sums[lane] += magnitude > threshold ? static_cast<double>(magnitude) : 0.0;
    counts[lane] += magnitude > threshold ? 1 : 0;
  }
  for (int lane = 0; lane < kLanes; lane++) {
    *sum += sums[lane];
    *count += counts[lane];
  }
}

static FF_INLINE double sum_magnitudes(const float* x, int64_t n, float clip) {
  double sums[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += static_cast<double>(std::fabs(clipped(x[i + lane], clip)));
  }
  for (int lane = 0; i < n; i++, lane++) sums[lane] += static_cast<double>(std::fabs(clipped(x[i], clip)));
  for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
  return sum;
}

static FF_INLINE float largest_magnitude(const float* x, int64_t n, float clip) {
  const uint32_t bits = largest_bits(x, n);
  const float found = float_of(bits);
  return found > clip ? clip : found;
}

// Codes are written as floats times `scale`, and as integers.
template <class Code>
static FF_INLINE void write_weights(const float* x, int64_t n, float scale, int8_t* codes, float* y, Code code) {
  if (codes && y) {
    for (int64_t i = 0; i < n; i++) {
      const float value = code(x[i]);
      codes[i] = static_cast<int8_t>(static_cast<int32_t>(value));
      y[i] = value * scale;
    }
  } else if (codes) {
    for (int64_t i = 0; i < n; i++) codes[i] = static_cast<int8_t>(static_cast<int32_t>(code(x[i])));
  } else {
    for (int64_t i = 0; i < n; i++) y[i] = code(x[i]) * scale;
  }
}

// `threshold` is that of ternary weights; uniform ones are divided by their scale.
static FF_INLINE void write_weight_row(
    const float* x, int64_t n, int bits, float clip, float threshold, float scale, int8_t* codes, float* y) {
  if (bits == 1) {
    write_weights(x, n, scale, codes, y, [](float w) { return w + 0.0f < 0.0f ? -1.0f : 1.0f; });
  } else if (bits == 2) {
    write_weights(x, n, scale, codes, y, [=](float w) {
      const float value = clipped(w, clip);
      const float positive = value > threshold ? 1.0f : 0.0f;
      return positive - (value < -threshold ? 1.0f : 0.0f);
    });
  } else {
    const float largest = static_cast<float>((1 << (bits - 1)) - 1);
    write_weights(x, n, scale, codes, y, [=](float w) {
      const float code = __builtin_rintf(clipped(w, clip) / scale);
      const float above = code > largest ? largest : code;
      return above < -largest ? -largest : above;
    });
  }
}

static FF_INLINE uint16_t stored_scale(double scale) {
  const float narrow = static_cast<float>(scale > 65504.0 ? 65504.0 : scale);
  return to_float16(narrow);
}

static FF_INLINE void fake_quantize_token(const Grid& grid, const float* x, int64_t n, float* y) {
  float reported;
  const float divisor = token_scale(grid, grid.largest ? 0 : largest_bits(x, n), &reported);
  // A static range makes only those entries NaN that are.
  const float scale = reported;
  const float low = grid.lowest(), high = grid.highest(), clip = grid.clip;
  for (int64_t i = 0; i < n; i++) {
    float code = __builtin_rintf(clipped(x[i], clip) / divisor);
    code = code > high ? high : code;
    code = code < low ? low : code;
    y[i] = code * scale;
  }
}

static FF_INLINE void dequantize_row(const int8_t* codes, int64_t n, float scale, float* y) {
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<float>(codes[i]) * scale;
}

// Every step keeps what differs different, and carries it from the highest bit, the sign, to lower ones: without that,
// an even number of changed signs would cancel out.
static FF_INLINE uint32_t mixed(uint32_t sum, float x) {
  sum = (sum ^ bits_of(x)) * 0x9e3779b1u;
  return sum ^ sum >> 15;
}

// A number that changes when an entry does.
static FF_INLINE uint64_t checksum(const float* x, int64_t n) {
  constexpr int kMany = 64;
  uint32_t sums[kMany] = {};
  int64_t i = 0;
  for (; i + kMany <= n; i += kMany) {
    for (int lane = 0; lane < kMany; lane++) sums[lane] = mixed(sums[lane], x[i + lane]);
  }
  for (int lane = 0; i < n; i++, lane++) sums[lane] = mixed(sums[lane] + 1, x[i]);
  uint64_t all = 0;
  for (int lane = 0; lane < kMany; lane++) {
    all = (all ^ sums[lane]) * 0x9e3779b97f4a7c15u;
    all ^= all >> 32;
  }
  return all;
}

}  // namespace fiftyfold
