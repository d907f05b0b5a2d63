#include "torch_shim.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace fiftyfold {

TorchShim shim{};

std::string TorchShim::find(const char* file) {
  void* library = dlopen(file, RTLD_NOW | RTLD_NOLOAD);
  if (!library) return file;
  std::string missing;
  auto look_up = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (!function && missing.empty()) missing = name;
  };
#define FF_LOOK_UP(name) look_up(name, #name)
  FF_LOOK_UP(aoti_torch_library_init_impl);
  FF_LOOK_UP(aoti_torch_library_impl);
  FF_LOOK_UP(aoti_torch_get_data_ptr);
  FF_LOOK_UP(aoti_torch_get_dim);
  FF_LOOK_UP(aoti_torch_get_sizes);
  FF_LOOK_UP(aoti_torch_get_strides);
  FF_LOOK_UP(aoti_torch_get_dtype);
  FF_LOOK_UP(aoti_torch_empty_strided);
  FF_LOOK_UP(aoti_torch_delete_tensor_object);
  FF_LOOK_UP(aoti_torch_dtype_float32);
  FF_LOOK_UP(aoti_torch_dtype_bfloat16);
  FF_LOOK_UP(aoti_torch_dtype_float16);
  FF_LOOK_UP(aoti_torch_dtype_uint8);
  FF_LOOK_UP(aoti_torch_dtype_int64);
  FF_LOOK_UP(aoti_torch_dtype_int32);
  FF_LOOK_UP(aoti_torch_device_type_cpu);
  FF_LOOK_UP(torch_parallel_for);
  FF_LOOK_UP(torch_get_num_threads);
#undef FF_LOOK_UP
  return missing;
}

void check(int32_t status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string("torch could not ") + what);
}

Tensor::Tensor(TensorHandle handle) : handle_(handle) {
  check(shim.aoti_torch_get_dim(handle, &dim_), "tell a tensor's dimensions");
  check(shim.aoti_torch_get_sizes(handle, &sizes_), "tell a tensor's sizes");
  check(shim.aoti_torch_get_strides(handle, &strides_), "tell a tensor's strides");
  check(shim.aoti_torch_get_dtype(handle, &type_), "tell a tensor's type");
  check(shim.aoti_torch_get_data_ptr(handle, &data_), "tell a tensor's address");
}

Tensor::~Tensor() {
  if (handle_) shim.aoti_torch_delete_tensor_object(handle_);
}

Tensor Tensor::empty(const int64_t* sizes, int64_t dim, int32_t type) {
  constexpr int64_t kMost = 64;
  if (dim > kMost) throw std::runtime_error("tensors of more than 64 dimensions are not supported");
  int64_t strides[kMost];
  for (int64_t d = dim, stride = 1; d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
  TensorHandle handle;
  check(shim.aoti_torch_empty_strided(dim, sizes, strides, type, shim.aoti_torch_device_type_cpu(), 0, &handle),
        "make a tensor");
  return Tensor(handle);
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t d = 0; d < dim_; d++) count *= sizes_[d];
  return count;
}

bool Tensor::is_contiguous() const {
  for (int64_t d = dim_, stride = 1; d-- > 0; stride *= sizes_[d]) {
    if (sizes_[d] != 1 && strides_[d] != stride) return numel() == 0;
  }
  return true;
}

Tensor Tensor::contiguous(int64_t bytes) const {
  Tensor copy = empty(sizes_, dim_, type_);
  uint8_t* to = copy.data<uint8_t>();
  for (int64_t i = 0, count = numel(); i < count; i++, to += bytes) {
    int64_t at = 0;
    for (int64_t d = dim_, rest = i; d-- > 0; rest /= sizes_[d]) at += rest % sizes_[d] * strides_[d];
    std::memcpy(to, data<uint8_t>() + at * bytes, static_cast<size_t>(bytes));
  }
  return copy;
}

bool Arguments::optional(StableValue* value) {
  StableValue* held = reinterpret_cast<StableValue*>(stack_[next_++]);
  if (!held) return false;
  *value = *held;
  delete held;
  return true;
}

}  // namespace fiftyfold
