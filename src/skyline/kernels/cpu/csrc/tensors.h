// Checked access to the tensors that Python hands in.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <type_traits>

#include "simd.h"

namespace skyline {

namespace ffi = tvm::ffi;
using ffi::TensorView;

#define SKYLINE_CHECK(condition, message) \
  if (!(condition)) TVM_FFI_THROW(ValueError) << message

inline bool is_float32(const TensorView& t) { return t.dtype().code == kDLFloat && t.dtype().bits == 32; }
inline bool is_bf16(const TensorView& t) { return t.dtype().code == kDLBfloat && t.dtype().bits == 16; }
inline bool is_int8(const TensorView& t) { return t.dtype().code == kDLInt && t.dtype().bits == 8; }
inline bool is_uint8(const TensorView& t) { return t.dtype().code == kDLUInt && t.dtype().bits == 8; }
inline bool is_int32(const TensorView& t) { return t.dtype().code == kDLInt && t.dtype().bits == 32; }
inline bool is_int64(const TensorView& t) { return t.dtype().code == kDLInt && t.dtype().bits == 64; }

template <class T>
T* data(const TensorView& t) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

// A matrix of rows that lie `stride` elements apart; the elements of a row lie side by side.
template <class T>
struct Rows {
  T* data;
  int64_t rows, cols, stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<T> rows_of(const TensorView& t) {
  SKYLINE_CHECK(t.dtype().bits == 8 * sizeof(T), "takes matrices of one dtype");
  SKYLINE_CHECK(t.ndim() == 2 && (t.stride(1) == 1 || t.shape()[1] <= 1), "takes matrices whose rows are contiguous");
  return {data<T>(t), t.shape()[0], t.shape()[1], t.shape()[0] <= 1 ? t.shape()[1] : t.stride(0)};
}

// A vector of `length` elements.
template <class T>
T* list_of(const TensorView& t, int64_t length) {
  constexpr bool integer = std::is_integral_v<T> && std::is_signed_v<T>;  // bf16 is stored in unsigned ones
  SKYLINE_CHECK(t.dtype().bits == 8 * sizeof(T) && (t.dtype().code == kDLInt) == integer, "takes a vector of another dtype");
  SKYLINE_CHECK(t.ndim() == 1 && t.shape()[0] == length && (length <= 1 || t.stride(0) == 1), "shapes do not match");
  return data<T>(t);
}

// Calls body with a null pointer of the tensor's element type: float or bf16.
template <class Body>
void dispatch_float(const TensorView& t, const Body& body) {
  if (is_bf16(t)) {
    body(static_cast<bf16*>(nullptr));
  } else {
    SKYLINE_CHECK(is_float32(t), "takes float32 or bfloat16");
    body(static_cast<float*>(nullptr));
  }
}

}  // namespace skyline
