// Where the paged keys and values of a token's head lie.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace skyline {

// k, v [num_blocks, block_size, kv_heads, head_dim]; of int8 also scales [num_blocks, block_size, kv_heads] float32. A block
// lies together; in it, either all heads of a token do, or all tokens of a head, and scales like keys and values.
struct CacheShape {
  int64_t positions, block_size, kv_heads, head_dim;
  int64_t token_stride, head_stride;  // within a block, in units of a token's head
  bool int8;

  CacheShape(const TensorView& k, const TensorView& v, const ffi::Optional<TensorView>& k_scale,
             const ffi::Optional<TensorView>& v_scale) {
    SKYLINE_CHECK(k.ndim() == 4 && v.ndim() == 4, "takes a cache of four dimensions");
    for (int i = 0; i < 4; i++) SKYLINE_CHECK(k.shape()[i] == v.shape()[i], "keys and values differ in shape");
    block_size = k.shape()[1], kv_heads = k.shape()[2], head_dim = k.shape()[3];
    positions = k.shape()[0] * block_size;
    const bool by_head = !lies(k, kv_heads, 1);
    token_stride = by_head ? 1 : kv_heads;
    head_stride = by_head ? block_size : 1;
    SKYLINE_CHECK(lies(k, token_stride, head_stride) && lies(v, token_stride, head_stride), "takes a cache of contiguous blocks");
    int8 = is_int8(k) && is_int8(v);
    SKYLINE_CHECK(int8 == k_scale.has_value() && int8 == v_scale.has_value(), "int8, and nothing else, has scales");
    if (!int8) return;
    for (const TensorView& s : {k_scale.value(), v_scale.value()}) {
      SKYLINE_CHECK(is_float32(s) && s.ndim() == 3 && std::equal(s.shape().begin(), s.shape().end(), k.shape().begin()) &&
                        lies(s, token_stride, head_stride), "scales do not match the cache");
    }
  }

  // The first head of a token, in the same units; where its scale is, too. The others are head_stride apart.
  int64_t row(int64_t slot) const { return slot / block_size * block_size * kv_heads + slot % block_size * token_stride; }

 private:
  static bool lies(const TensorView& t, int64_t tokens, int64_t heads) {
    const int64_t inner = t.ndim() == 4 ? t.shape()[3] : 1;
    const auto apart = [&](int i, int64_t rows) { return t.shape()[i] <= 1 || t.stride(i) == rows * inner; };
    return (t.ndim() < 4 || inner <= 1 || t.stride(3) == 1) && apart(0, t.shape()[1] * t.shape()[2]) && apart(1, tokens) &&
           apart(2, heads);
  }
};

}  // namespace skyline
