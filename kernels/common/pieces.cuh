// pieces.cuh: how a launcher divides its workspace.
#pragma once

#include "launch.cuh"

namespace ett {

// Takes pieces from the workspace, one after the other.
class Pieces {
  public:
    explicit Pieces(void* start) : start_(static_cast<char*>(start)) {}
    // `n` elements of T at a multiple of 256 bytes. Null if `start` is null, for a query that only counts bytes.
    template <class T> T* take(int64_t n) {
        char* const p = start_ ? start_ + bytes_ : nullptr;
        bytes_ += round_up(n * int64_t(sizeof(T)), 256);
        return reinterpret_cast<T*>(p);
    }
    int64_t bytes() const { return bytes_; }

  private:
    char* start_;
    int64_t bytes_ = 0;
};

}  // namespace ett
