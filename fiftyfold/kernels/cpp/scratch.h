// Memory that a thread keeps for its next call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fiftyfold {

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  uint8_t* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, size_));
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_;
  }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0;
};

inline size_t aligned(int64_t bytes) { return static_cast<size_t>((bytes + 63) / 64 * 64); }

}  // namespace fiftyfold
