// What the instruction sets have in common: the work on one unit of outputs, and how its sums become outputs.
#pragma once
#include "arrangement.h"
#include "quantize.h"
#include "tables.h"

namespace fiftyfold {

// Rows of codes times one unit of outputs. A row is a token, or with 16 bits half of one.
struct UnitWork {
  const int8_t* codes;  // rows x stride
  int64_t stride;
  const uint8_t* tables;  // rows x table_stride, or null
  int64_t table_stride;
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

// One token's outputs from `N` neighbouring sums.
template <int N, int PLANES, bool FIRST, bool BIAS>
static FF_INLINE void finish_some(
    const int32_t* __restrict sums, int64_t sums_stride, int doublings, uint32_t correction, float token_scale,
    const float* __restrict weight_scale, const float* __restrict bias, float* __restrict y) {
  for (int o = 0; o < N; o++) {
    // Sums of 16-bit codes pass 2**31 on the way and come back; hence the unsigned arithmetic.
    uint32_t sum = static_cast<uint32_t>(sums[o]);
    if (PLANES == 2) sum = sum * 256u + static_cast<uint32_t>(sums[o + sums_stride]);
    const int32_t exact = static_cast<int32_t>((sum << doublings) - correction);
    float value = (static_cast<float>(exact) * token_scale) * weight_scale[o];
    if (!FIRST) value = y[o] + value;
    y[o] = BIAS ? value + bias[o] : value;
  }
}

template <int PLANES, bool FIRST, bool BIAS>
static FF_INLINE void finish_rows(
    const UnitWork& work, const int32_t* sums, int64_t sums_stride, int64_t first_row, int64_t rows,
    int64_t first_output, int64_t outputs, int64_t group) {
  const float* scale = work.weight_scale + group * work.weight_scale_stride + first_output;
  const float* bias = BIAS ? work.bias + first_output : scale;
  const int doublings = work.bits == 1;
  for (int64_t row = 0; row < rows; row += PLANES) {
    const int64_t token = (first_row + row) / PLANES;
    const uint32_t correction = static_cast<uint32_t>(work.token_sums[token * work.groups + group]);
    const float token_scale = work.token_scale[token];
    const int32_t* from = sums + row * sums_stride;
    float* y = work.y + token * work.y_stride + first_output;
    const int64_t whole = outputs / kBlockOutputs * kBlockOutputs;
    for (int64_t o = 0; o < whole; o += kBlockOutputs) {
      finish_some<kBlockOutputs, PLANES, FIRST, BIAS>(
          from + o, sums_stride, doublings, correction, token_scale, scale + o, bias + o, y + o);
    }
    for (int64_t o = whole; o < outputs; o++) {
      finish_some<1, PLANES, FIRST, BIAS>(
          from + o, sums_stride, doublings, correction, token_scale, scale + o, bias + o, y + o);
    }
  }
}

template <int PLANES>
static FF_INLINE void finish_group(
    const UnitWork& work, const int32_t* sums, int64_t stride, int64_t first_row, int64_t rows, int64_t first_output,
    int64_t outputs, int64_t group) {
  const bool first = group == 0, bias = work.bias && group == work.groups - 1;
  if (first && bias) finish_rows<PLANES, true, true>(work, sums, stride, first_row, rows, first_output, outputs, group);
  else if (first) finish_rows<PLANES, true, false>(work, sums, stride, first_row, rows, first_output, outputs, group);
  else if (bias) finish_rows<PLANES, false, true>(work, sums, stride, first_row, rows, first_output, outputs, group);
  else finish_rows<PLANES, false, false>(work, sums, stride, first_row, rows, first_output, outputs, group);
}

// Turns sums of stored codes times input codes, (rows x stride), into outputs, or adds them for a later group.
static FF_INLINE void finish_sums(
    const UnitWork& work, const int32_t* sums, int64_t stride, int64_t first_row, int64_t rows, int64_t first_output,
    int64_t outputs, int64_t group) {
  if (work.planes == 2) finish_group<2>(work, sums, stride, first_row, rows, first_output, outputs, group);
  else finish_group<1>(work, sums, stride, first_row, rows, first_output, outputs, group);
}

// Compiled once for each instruction set; inlined where it is called it would be compiled dozens of times.
#define FF_DEFINE_FINISH(target)                                                                                 \
  target static __attribute__((noinline)) void finish(const UnitWork& work, const int32_t* sums, int64_t stride, \
                                                      int64_t first_row, int64_t rows, int64_t first_output,     \
                                                      int64_t outputs, int64_t group) {                          \
    finish_sums(work, sums, stride, first_row, rows, first_output, outputs, group);                              \
  }

// Likewise.
#define FF_DEFINE_QUANTIZE(target, codes_of_8_bits)                                                             \
  target static void quantize(const Grid& grid, const float* x, int64_t groups, int64_t group_inputs,           \
                              int64_t group_padded, int8_t* codes, float* scale, int32_t* sums) {               \
    quantize_token<codes_of_8_bits>(grid, x, groups, group_inputs, group_padded, codes, scale, sums);           \
  }

static FF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What a processor computes with: one for each instruction set.
struct Path {
  const char* name;
  int vector_bytes;
  int64_t tokens_at_once;  // that stay in the first caches beside a unit's weights
  void (*quantize)(const Grid&, const float* x, int64_t groups, int64_t group_inputs, int64_t group_padded,
                   int8_t* codes, float* scale, int32_t* sums);
  void (*multiply[2])(const UnitWork&);  // binary, ternary
  int64_t (*spin)(int64_t rounds);       // nothing but products, all in registers; how many operations, or null
  TableProducts floats;  // of float32 rows
  // Tables to multiply binary weights by, and the bytes that a row's take; null where products are quicker.
  void (*tabulate)(const int8_t* codes, int64_t inputs, uint8_t* tables) = nullptr;
  int64_t (*table_bytes)(int64_t inputs) = nullptr;
};

}  // namespace fiftyfold
