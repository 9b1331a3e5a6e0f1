// Writing keys and values to the paged cache.
#include <algorithm>

#include "cache_shape.h"
#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

template <class T>
void copy_head(T* to, const T* from, int64_t n, float*) {
  std::memcpy(to, from, n * sizeof(T));
}

// Symmetric int8: the largest magnitude becomes 127, halves are rounded to even.
template <class T>
void copy_head(int8_t* to, const T* from, int64_t n, float* scale) {
  constexpr int W = Vec::width;
  Vec top = Vec::zero(), poison = Vec::zero();  // max forgets a NaN, a sum does not
  for (int64_t i = 0; i < n; i += W) {
    Vec x = Vec::load(from + i, static_cast<int>(std::min<int64_t>(n - i, W)));
    top = max(top, abs(x));
    poison = fma(x, Vec::zero(), poison);
  }
  const float largest = top.max(), inverse = largest > 0 ? 127.0f / largest : 0;
  *scale = largest / 127.0f + poison.sum();
  for (int64_t i = 0; i < n; i += W) {
    const int count = static_cast<int>(std::min<int64_t>(n - i, W));
    Vec level = round_even(Vec::load(from + i, count) * Vec::all(inverse));
    float levels[W];
    max(Vec::all(-127.0f), min(Vec::all(127.0f), level)).store(levels);
    for (int j = 0; j < count; j++) to[i + j] = levels[j] == levels[j] ? static_cast<int8_t>(levels[j]) : 0;
  }
}

}  // namespace

// k, v [T, Hk * D]; the cache in their dtype or int8.
void kv_write(TensorView k, TensorView v, TensorView keys, TensorView values, ffi::Optional<TensorView> k_scale,
              ffi::Optional<TensorView> v_scale, TensorView slots) {
  const CacheShape cache(keys, values, k_scale, v_scale);
  const int64_t heads = cache.kv_heads, dim = cache.head_dim;
  dispatch_float(k, [&]<class T>(T*) {
    auto from_k = rows_of<const T>(k), from_v = rows_of<const T>(v);
    SKYLINE_CHECK(is_bf16(k) == is_bf16(v) && is_float32(k) == is_float32(v), "k and v differ in dtype");
    SKYLINE_CHECK(from_k.cols == heads * dim && from_v.cols == heads * dim && from_k.rows == from_v.rows,
                  "k and v do not match the cache");
    SKYLINE_CHECK(is_int64(slots) && slots.ndim() == 1 && slots.shape()[0] == from_k.rows &&
                      (from_k.rows <= 1 || slots.stride(0) == 1), "takes one int64 slot for each token");
    const int64_t* slot = data<int64_t>(slots);
    for (int64_t row = 0; row < from_k.rows; row++) {
      SKYLINE_CHECK(slot[row] >= 0 && slot[row] < cache.positions, "slot " << slot[row] << " is not in the cache");
    }
    auto write = [&]<class KV>(KV*) {
      KV *to_k = data<KV>(keys), *to_v = data<KV>(values);
      float* scale_k = cache.int8 ? data<float>(k_scale.value()) : nullptr;
      float* scale_v = cache.int8 ? data<float>(v_scale.value()) : nullptr;
      ThreadPool::get().run_ranges(from_k.rows, 1 + 16384 / (heads * dim + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          const int64_t first = cache.row(slot[row]);
          for (int64_t head = 0; head < heads; head++) {
            const int64_t at = first + head * cache.head_stride;
            copy_head(to_k + at * dim, from_k[row] + head * dim, dim, scale_k + at);
            copy_head(to_v + at * dim, from_v[row] + head * dim, dim, scale_v + at);
          }
        }
      });
    };
    if (cache.int8) {
      write(static_cast<int8_t*>(nullptr));
    } else {
      SKYLINE_CHECK(is_bf16(keys) == is_bf16(k) && is_bf16(values) == is_bf16(k) && is_float32(keys) == is_float32(k) &&
                        is_float32(values) == is_float32(k), "the cache has neither the dtype of k nor int8");
      write(static_cast<T*>(nullptr));
    }
  });
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_write, kv_write);

}  // namespace skyline
