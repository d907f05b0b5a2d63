// What the library offers, in plain C.
#pragma once
#include <stdint.h>

#define FF_API extern "C" __attribute__((visibility("default")))

// Types of activations and outputs: 0 float32, 1 bfloat16, 2 float16.

struct FfLinear {
  const void* x;  // tokens x inputs; a token's entries are neighbours
  int64_t tokens, inputs, x_stride;
  const uint8_t* weight;  // arranged
  const float* scale;     // groups x outputs
  int64_t groups, outputs;
  const float* bias;  // or null
  void* y;            // tokens x outputs
  const float* largest;  // of a static range, or null
  float clip;            // or infinity
  int32_t float_type, weight_bits, activation_bits, full_range;
  int32_t planes;  // of the arrangement
};

struct FfEmbedding {
  const int64_t* tokens;
  int64_t count, rows, columns;
  const uint8_t* packed;
  int64_t packed_bytes;
  const uint16_t* scale;  // float16, one for each row
  void* y;                // count x columns
  int32_t float_type, bits;
};

FF_API int64_t ff_arranged_bytes(int64_t outputs, int64_t inputs, int64_t groups, int32_t bits);
// As the path in use is the quickest; every path reads what another has arranged.
FF_API void ff_arrange(const int8_t* codes, int64_t outputs, int64_t inputs, int64_t groups, int32_t bits, uint8_t* to);
FF_API int32_t ff_is_in_planes(const uint8_t* arranged, int64_t bytes);
FF_API void ff_linear(const FfLinear* call);

// Rows (tokens x outputs) times a weight of 1 or 2 bits, by tables whose entries are found from the codes (outputs x
// inputs); scales are float16, one for each output or one.
FF_API int64_t ff_entries_bytes(int64_t outputs, int64_t inputs, int32_t bits);
FF_API void ff_find_entries(const int8_t* codes, int64_t outputs, int64_t inputs, int32_t bits, uint8_t* entries);
FF_API void ff_multiply_rows(
    const float* rows, int64_t tokens, int64_t outputs, int64_t inputs, int32_t bits, const uint8_t* entries,
    const uint16_t* scale, int32_t per_tensor, float* y);

// The same for a layer whose inputs are not quantized: its codes (outputs x inputs) are arranged once, and scales are
// float32, one for each output.
FF_API int64_t ff_tabled_bytes(int64_t outputs, int64_t inputs, int32_t bits);
FF_API void ff_arrange_for_tables(
    const int8_t* codes, int64_t outputs, int64_t inputs, int32_t bits, uint8_t* to);
FF_API void ff_table_linear(
    const float* x, int64_t tokens, int64_t inputs, int64_t outputs, int32_t bits, const uint8_t* weight,
    const float* scale, const float* bias, float* y);

// 0, or 1 if a number is not that of a row, or 2 if a byte is none that packing writes.
FF_API int32_t ff_embedding(const FfEmbedding* call);

// Finds torch's functions in that library, and uses its threads; the name of what is missing, or an empty string.
FF_API const char* ff_attach(const char* torch_library);
// Implements the operators on CPUs, after ff_attach; 0 if that worked. Doing it again changes nothing.
FF_API int32_t ff_register_operators();

FF_API const char* ff_path();
FF_API const char* ff_supported_path(int32_t index);  // null after the last
FF_API int32_t ff_choose_path(const char* name);      // 1 if the processor has it
FF_API int32_t ff_threads();
// From now on with one thread: where the process was forked before it loaded the library.
FF_API void ff_compute_alone();

// Multiplications and additions a second that the path's instructions allow, or 0 if that is not known.
FF_API double ff_peak(int32_t threads, int64_t rounds);
// Bytes a second, reading all of them once.
FF_API double ff_read_bandwidth(int32_t threads, const uint8_t* bytes, int64_t size);
