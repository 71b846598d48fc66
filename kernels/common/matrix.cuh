// matrix.cuh: a view as a kernel argument.
#pragma once

#include "launch.cuh"

namespace ett {

// Rows that begin ld elements apart; null if the argument is absent.
template <class T> struct Matrix {
    T* ptr;
    int64_t ld;

    __host__ __device__ T* row(int64_t i) const { return ptr + i * ld; }
};

template <class T> Matrix<T> matrix(const ett_view& v) { return {data<T>(v), present(v) ? stride(v) : 0}; }

}  // namespace ett
