// Floating-point types that tensors come in, as float32 and back, rounded to nearest even as torch rounds.
#pragma once
#include "quantize.h"

namespace fiftyfold {

enum class FloatType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

inline int64_t size_of(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

static FF_INLINE float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

static FF_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// Half the exponent's range is missing: numbers are moved by a power of two, which is exact, also for subnormal ones.
static FF_INLINE float from_float16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  const float moved = float_of(magnitude << 13) * float_of(0x77800000u);  // 2**112
  const float finite_or_not = magnitude >= 0x7c00u ? float_of((magnitude << 13) | kInfinityBits) : moved;
  return float_of(bits_of(finite_or_not) | static_cast<uint32_t>(bits & 0x8000u) << 16);
}

static FF_INLINE uint16_t to_float16(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude > kInfinityBits) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  // Adding 0.5 lets the adder round what is subnormal in float16; its last bit is then 2**-24.
  if (magnitude < 0x38800000u) {
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

static FF_INLINE void read_floats(const void* from, FloatType type, int64_t n, float* to) {
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  if (type == FloatType::bfloat16) {
    for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(halves[i]);
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = from_float16(halves[i]);
  }
}

static FF_INLINE void write_floats(const float* from, int64_t n, FloatType type, void* to) {
  uint16_t* halves = static_cast<uint16_t*>(to);
  if (type == FloatType::bfloat16) {
    for (int64_t i = 0; i < n; i++) halves[i] = to_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < n; i++) halves[i] = to_float16(from[i]);
  }
}

}  // namespace fiftyfold
