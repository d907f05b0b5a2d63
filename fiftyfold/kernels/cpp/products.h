// What the instruction sets have in common: the work on one unit of outputs, and how its sums become outputs.
#pragma once
#include "arrangement.h"
#include "quantize.h"

namespace fiftyfold {

// Rows of codes times one unit of outputs. A row is a token, or with 16 bits half of one.
struct UnitWork {
  const int8_t* codes;  // rows x stride
  int64_t stride;
  int64_t rows;
  int planes;  // rows of a token
  int bits;    // of the weight
  const uint8_t* weight;
  int64_t groups, group_blocks;
  int blocks;                 // side by side: 4, or 1 in the last units
  int64_t outputs;            // that exist, at most 16 for each block
  const float* token_scale;   // of a token
  const int32_t* token_sums;  // tokens x groups
  const float* weight_scale;  // groups x weight_scale_stride
  int64_t weight_scale_stride;
  const float* bias;  // or null
  float* y;           // tokens x y_stride
  int64_t y_stride;
};

template <bool FIRST, bool BIAS>
static FF_INLINE void finish_token(
    const int32_t* sums, uint32_t correction, float token_scale, const float* weight_scale, const float* bias, float* y,
    int64_t outputs) {
  for (int64_t o = 0; o < outputs; o++) {
    const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(sums[o]) - correction);
    float value = (static_cast<float>(sum) * token_scale) * weight_scale[o];
    if (!FIRST) value = y[o] + value;
    y[o] = BIAS ? value + bias[o] : value;
  }
}

// Turns sums of stored codes times input codes, (rows x sums_stride), into outputs, or adds them for a later group.
// Sums of 16-bit codes pass 2**31 on the way and come back; hence the unsigned arithmetic.
static FF_INLINE void finish_sums(
    const UnitWork& work, int32_t* sums, int64_t sums_stride, int64_t first_row, int64_t rows, int64_t first_output,
    int64_t outputs, int64_t group) {
  const float* scale = work.weight_scale + group * work.weight_scale_stride + first_output;
  const float* bias = work.bias && group == work.groups - 1 ? work.bias + first_output : nullptr;
  for (int64_t row = 0; row < rows; row += work.planes) {
    int32_t* a = sums + row * sums_stride;
    const int64_t token = (first_row + row) / work.planes;
    if (work.planes == 2) {
      for (int64_t o = 0; o < outputs; o++) {
        a[o] = static_cast<int32_t>(static_cast<uint32_t>(a[o]) * 256u + static_cast<uint32_t>(a[o + sums_stride]));
      }
    }
    if (work.bits == 1) {
      for (int64_t o = 0; o < outputs; o++) a[o] = static_cast<int32_t>(static_cast<uint32_t>(a[o]) * 2u);
    }
    const uint32_t correction = static_cast<uint32_t>(work.token_sums[token * work.groups + group]);
    const float token_scale = work.token_scale[token];
    float* y = work.y + token * work.y_stride + first_output;
    if (group == 0 && bias) finish_token<true, true>(a, correction, token_scale, scale, bias, y, outputs);
    else if (group == 0) finish_token<true, false>(a, correction, token_scale, scale, bias, y, outputs);
    else if (bias) finish_token<false, true>(a, correction, token_scale, scale, bias, y, outputs);
    else finish_token<false, false>(a, correction, token_scale, scale, bias, y, outputs);
  }
}

// Compiled once for each instruction set; inlined where it is called it would be compiled dozens of times.
#define FF_DEFINE_FINISH(target)                                                                               \
  target static __attribute__((noinline)) void finish(const UnitWork& work, int32_t* sums, int64_t sums_stride, \
                                                      int64_t first_row, int64_t rows, int64_t first_output,   \
                                                      int64_t outputs, int64_t group) {                        \
    finish_sums(work, sums, sums_stride, first_row, rows, first_output, outputs, group);                       \
  }

// Likewise.
#define FF_DEFINE_QUANTIZE(target)                                                                              \
  target static void quantize(const Grid& grid, const float* x, int64_t groups, int64_t group_inputs,           \
                              int64_t group_padded, int8_t* codes, float* scale, int32_t* sums) {               \
    quantize_token(grid, x, groups, group_inputs, group_padded, codes, scale, sums);                            \
  }

static FF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What a processor computes with: one for each instruction set.
struct Path {
  const char* name;
  int64_t tokens_at_once;  // that stay in the first caches beside a unit's weights
  void (*quantize)(const Grid&, const float* x, int64_t groups, int64_t group_inputs, int64_t group_padded,
                   int8_t* codes, float* scale, int32_t* sums);
  void (*multiply[2])(const UnitWork&);  // binary, ternary
  int64_t (*spin)(int64_t rounds);       // nothing but products, all in registers; how many operations, or null
};

}  // namespace fiftyfold
