// torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h), looked up in the
// library that the process has loaded: one build serves every version of torch from 2.10 on, and every Python.
#pragma once
#include <cstdint>
#include <string>

#include "threads.h"

namespace fiftyfold {

using TensorHandle = struct AtenTensorOpaque*;
using LibraryHandle = struct TorchLibraryOpaque*;
using StableValue = uint64_t;
using BoxedFunction = void (*)(StableValue*, uint64_t inputs, uint64_t outputs);

struct TorchShim {
  int32_t (*aoti_torch_library_init_impl)(const char* ns, const char* key, const char* file, uint32_t line,
                                          LibraryHandle*);
  int32_t (*aoti_torch_library_impl)(LibraryHandle, const char* name, BoxedFunction);
  int32_t (*aoti_torch_get_data_ptr)(TensorHandle, void**);
  int32_t (*aoti_torch_get_dim)(TensorHandle, int64_t*);
  int32_t (*aoti_torch_get_sizes)(TensorHandle, int64_t**);
  int32_t (*aoti_torch_get_strides)(TensorHandle, int64_t**);
  int32_t (*aoti_torch_get_dtype)(TensorHandle, int32_t*);
  int32_t (*aoti_torch_empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                      int32_t device_type, int32_t device_index, TensorHandle*);
  int32_t (*aoti_torch_delete_tensor_object)(TensorHandle);
  int32_t (*aoti_torch_dtype_float32)();
  int32_t (*aoti_torch_dtype_bfloat16)();
  int32_t (*aoti_torch_dtype_float16)();
  int32_t (*aoti_torch_dtype_uint8)();
  int32_t (*aoti_torch_dtype_int64)();
  int32_t (*aoti_torch_dtype_int32)();
  int32_t (*aoti_torch_device_type_cpu)();
  ParallelFor torch_parallel_for;
  ThreadCount torch_get_num_threads;

  // Finds all of them in the library of that file; the name of the first that is missing, or empty.
  std::string find(const char* file);
};

extern TorchShim shim;

// Throws if a call into torch failed.
void check(int32_t status, const char* what);

// A tensor that an operator was called with, or makes; owned.
class Tensor {
 public:
  explicit Tensor(TensorHandle handle);
  Tensor(Tensor&& other) noexcept
      : handle_(other.handle_),
        dim_(other.dim_),
        sizes_(other.sizes_),
        strides_(other.strides_),
        data_(other.data_),
        type_(other.type_) {
    other.handle_ = nullptr;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor();

  // Without values.
  static Tensor empty(const int64_t* sizes, int64_t dim, int32_t type);

  int64_t dim() const { return dim_; }
  int64_t size(int64_t dimension) const { return sizes_[dimension]; }
  const int64_t* sizes() const { return sizes_; }
  int64_t stride(int64_t dimension) const { return strides_[dimension]; }
  int64_t numel() const;
  int32_t type() const { return type_; }
  bool is_contiguous() const;
  // A copy whose entries lie in their order, `bytes` each.
  Tensor contiguous(int64_t bytes) const;
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  TensorHandle release() {
    TensorHandle handle = handle_;
    handle_ = nullptr;
    return handle;
  }

 private:
  TensorHandle handle_;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
  void* data_ = nullptr;
  int32_t type_ = 0;
};

// Reads an operator's arguments in their order; an optional one is null, or a value on the heap that is ours to free.
class Arguments {
 public:
  explicit Arguments(StableValue* stack) : stack_(stack) {}

  Tensor tensor() { return Tensor(reinterpret_cast<TensorHandle>(stack_[next_++])); }
  int64_t integer() { return static_cast<int64_t>(stack_[next_++]); }
  bool flag() { return static_cast<uint8_t>(stack_[next_++]) != 0; }
  int32_t type() { return static_cast<int32_t>(stack_[next_++]); }
  bool optional(StableValue* value);

 private:
  StableValue* stack_;
  uint64_t next_ = 0;
};

}  // namespace fiftyfold
