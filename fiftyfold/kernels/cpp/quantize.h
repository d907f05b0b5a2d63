// Symmetric quantization of tokens, the arithmetic of fiftyfold/kernels/activations.py in the same float32 steps.
//
// Written for the compiler to vectorize, and compiled once for each instruction set.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace fiftyfold {

#if defined(FF_EMULATED)  // whose instructions are whole functions: inlining all of them would take hours
#define FF_INLINE inline
#else
#define FF_INLINE inline __attribute__((always_inline))
#endif

// How tokens are quantized.
struct Grid {
  int bits;              // 4, 8 or 16; 16 are two passes of 8
  bool full_range;       // one more negative code, as XTC has
  float clip;            // inputs are clamped to [-clip, clip] first; infinity for none
  const float* largest;  // largest magnitude of a static range, or null for each token's own

  int planes() const { return bits == 16 ? 2 : 1; }
  // 16 bits end where a code is still 256 * high + low with both in -127 ... 127 and -128 ... 127.
  float highest() const { return bits == 16 ? 127.0f * 256 + 127 : static_cast<float>((1 << (bits - 1)) - 1); }
  float lowest() const { return -highest() - (full_range ? 1.0f : 0.0f); }
};

static FF_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static FF_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

// The largest magnitude as bits, which order as the magnitudes do, with NaN above infinity: a maximum of floats may
// lose a NaN on its way.
static FF_INLINE uint32_t largest_bits(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The scale to divide by; `*reported` is the same, or NaN where the token has no meaningful codes.
static FF_INLINE float token_scale(const Grid& grid, uint32_t largest, float* reported) {
  const bool nan = largest > kInfinityBits;
  float magnitude = float_of(largest);
  magnitude = magnitude > grid.clip ? grid.clip : magnitude;
  if (grid.largest) magnitude = *grid.largest;
  float scale = magnitude / -grid.lowest();
  scale = scale < FLT_MIN ? FLT_MIN : scale;
  *reported = nan || !(std::fabs(magnitude) < INFINITY) ? NAN : scale;
  return scale;
}

struct Bounds {
  float low, high;
};

// Rounding is monotonic, so clamping the quotient to the rounded quotients of the clip equals clamping the input.
static FF_INLINE Bounds code_bounds(const Grid& grid, float scale) {
  Bounds bounds{grid.lowest(), grid.highest()};
  const float clip = std::nearbyint(grid.clip / scale);
  bounds.high = clip < bounds.high ? clip : bounds.high;
  bounds.low = -clip > bounds.low ? -clip : bounds.low;
  return bounds;
}

// Adding 1.5 * 2**23 rounds half to even and leaves the integer in the low bits; NaN gives an arbitrary code.
static FF_INLINE int32_t code_of(float x, float scale, Bounds bounds) {
  constexpr float kMagic = 12582912.0f;
  float quotient = x / scale;
  quotient = quotient < bounds.low ? bounds.low : quotient;
  quotient = quotient > bounds.high ? bounds.high : quotient;
  return static_cast<int32_t>(bits_of(quotient + kMagic) - 0x4b400000u);
}

// Codes of 8 bits or fewer, and their sum: unsigned, for what NaN gives has no bounds.
struct Codes {
  static FF_INLINE int32_t write(const float* x, int64_t n, float scale, Bounds bounds, int8_t* codes) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
      const int32_t code = code_of(x[i], scale, bounds);
      codes[i] = static_cast<int8_t>(code);
      sum += static_cast<uint32_t>(code);
    }
    return static_cast<int32_t>(sum);
  }
};

static FF_INLINE int32_t write_wide_codes(
    const float* x, int64_t n, float scale, Bounds bounds, int8_t* high, int8_t* low) {
  int32_t high_sum = 0, low_sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const int32_t code = code_of(x[i], scale, bounds);
    const int8_t upper = static_cast<int8_t>((code + 128) >> 8), lower = static_cast<int8_t>(code);
    high[i] = upper;
    low[i] = lower;
    high_sum += upper;
    low_sum += lower;
  }
  return static_cast<int32_t>(static_cast<uint32_t>(high_sum) * 256u + static_cast<uint32_t>(low_sum));
}

// Quantizes one token into `planes` rows of codes, `padded` bytes each, and the sums of the codes in each group.
template <typename NarrowCodes>
static FF_INLINE void quantize_token(
    const Grid& grid, const float* x, int64_t groups, int64_t group_inputs, int64_t group_padded, int8_t* codes,
    float* scale, int32_t* sums) {
  const float divisor = token_scale(grid, largest_bits(x, groups * group_inputs), scale);
  const Bounds bounds = code_bounds(grid, divisor);
  const int64_t padded = groups * group_padded;
  for (int64_t group = 0; group < groups; group++) {
    const float* from = x + group * group_inputs;
    int8_t* to = codes + group * group_padded;
    if (grid.planes() == 2) {
      sums[group] = write_wide_codes(from, group_inputs, divisor, bounds, to, to + padded);
      std::memset(to + padded + group_inputs, 0, static_cast<size_t>(group_padded - group_inputs));
    } else {
      sums[group] = NarrowCodes::write(from, group_inputs, divisor, bounds, to);
    }
    std::memset(to + group_inputs, 0, static_cast<size_t>(group_padded - group_inputs));
  }
}

}  // namespace fiftyfold
