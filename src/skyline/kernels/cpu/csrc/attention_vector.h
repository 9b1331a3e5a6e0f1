// Paged attention in float32 vectors, of float32 queries on AVX-512 and AMX. AVX2 has its own.
#pragma once

#if defined(__AVX512F__)

#include "attention.h"

namespace skyline::attention {

inline void transpose(Vec (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i].v = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1].v = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0xDD);
  }
  for (int i = 0; i < 8; i++) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
  }
}
inline Vec load_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

// The first n elements (all, from Vec::width on); the others are zero.
template <class KV>
inline Vec load_some(const KV* p, int64_t n) {
  return n >= Vec::width ? Vec::load(p) : Vec::load(p, static_cast<int>(n));
}
template <>
inline Vec load_some(const int8_t* p, int64_t n) {
  if (n >= Vec::width) return load_int8(p);
  int8_t part[Vec::width] = {};
  if (n > 0) std::memcpy(part, p, n);
  return load_int8(part);
}

template <class KV>
class VectorAttention {
 public:
  using View = attention::View<float, KV>;
  static constexpr int kMaxRows = 64, kHeadRows = 64, kHeadBytes = 1;  // one head at a time

  static int64_t padded(int64_t head_dim) { return round_up(head_dim, 2 * Vec::width); }

  VectorAttention(const View& view, Scratch& scratch)
      : view_(view), dim_(view.call.head_dim), width_(padded(dim_)),
        scoring_(view.call.scale, view.call.softcap, sizeof(KV) == 1) {
    void* memory = scratch.ensure(carve(nullptr));
    carve(memory);
    std::memset(nothing_, 0, width_ * sizeof(KV));
    for (int row = 0; row < view.rows; row++) {
      const float* from = view.query(0, row);
      float* to = q_ + row * width_;
      for (int64_t i = 0; i < width_; i += W) {
        if (i < dim_) {
          load_some(from + i, dim_ - i).store(to + i);
        } else {
          Vec::zero().store(to + i);
        }
      }
    }
  }

  // done(head, row, sum, values): for each row that sees something of the split.
  template <class Done>
  void split(int index, const Done& done) {
    Span all = view_.visible(index, 0, view_.rows - 1);
    if (all.empty()) return;
    view_.slots(index, all, slots_);
    view_.scales(slots_, all, k_scale_, v_scale_);
    for (int chunk = all.first_chunk(); chunk < all.last_chunk(); chunk++) {
      pack_keys(chunk, all.last_chunk());
      each_block<kProductRows>(index, chunk, [&]<int R>(int row) { products<R>(row, chunk); });
    }
    for (int row = 0; row < view_.rows; row++) {
      Span mine = view_.visible(index, row, row);
      if (mine.empty()) {
        std::fill_n(scores_ + row * kSplit, kSplit, 0.0f);
      } else {
        float* s = scores_ + row * kSplit;
        sums_[row] = softmax(s, mine, all, scoring_, sizeof(KV) == 1 ? k_scale_ : nullptr, [&](int key, const Vec* w) {
          for (int i = 0; i < kChunk; i += W) {
            Vec weight = w[i / W];
            if (sizeof(KV) == 1) weight = weight * Vec::load(v_scale_ + key + i);
            weight.store(s + key + i);
          }
        });
      }
      std::fill_n(mixed_ + row * width_, width_, 0.0f);
    }
    for (int chunk = all.first_chunk(); chunk < all.last_chunk(); chunk++) {
      unpack_values(chunk);
      each_block<kMixRows>(index, chunk, [&]<int R>(int row) { mix<R>(row, chunk); });
    }
    for (int row = 0; row < view_.rows; row++) {
      if (!view_.visible(index, row, row).empty()) done(0, row, sums_[row], mixed_ + row * width_);
    }
  }

  static void store(float* to, const float* values, float factor, int64_t dim) {
    for (int64_t i = 0; i < dim; i += W) {
      // Adding zero makes negative zeros positive, whose sign would depend on what was skipped.
      Vec result = fma(Vec::load(values + i), Vec::all(factor), Vec::zero());
      if (dim - i >= W) {
        result.store(to + i);
      } else {
        result.store(to + i, static_cast<int>(dim - i));
      }
    }
  }

 private:
  static constexpr int W = Vec::width;
  static constexpr int kProductRows = 4, kMixRows = 4;

  size_t carve(void* memory) {
    Carver carver(memory);
    q_ = carver.take<float>(view_.rows * width_);
    keys_ = carver.take<float>(kChunk * width_);
    values_ = carver.take<float>(kChunk * width_);
    scores_ = carver.take<float>(view_.rows * kSplit);
    mixed_ = carver.take<float>(view_.rows * width_);
    slots_ = carver.take<int64_t>(kSplit);
    k_scale_ = carver.take<float>(kSplit);
    v_scale_ = carver.take<float>(kSplit);
    sums_ = carver.take<RowSum>(view_.rows);
    nothing_ = carver.take<KV>(width_);
    return carver.used();
  }

  // body<R>(row) for blocks of rows [row, row + R) of which some see something of the chunk.
  template <int R, class Body>
  void each_block(int index, int chunk, const Body& body) const {
    int row = 0;
    for (; row + R <= view_.rows; row += R) {
      if (sees(index, chunk, row, row + R - 1)) body.template operator()<R>(row);
    }
    for (; row < view_.rows; row++) {
      if (sees(index, chunk, row, row)) body.template operator()<1>(row);
    }
  }
  bool sees(int index, int chunk, int first, int last) const {
    Span span = view_.visible(index, first, last);
    return !span.empty() && span.first_chunk() <= chunk && chunk < span.last_chunk();
  }

  const KV* row_of(const KV* cache, int64_t slot) const { return slot < 0 ? nothing_ : cache + slot * dim_; }
  void prefetch(const KV* cache, int64_t slot) const {
    const char* row = reinterpret_cast<const char*>(row_of(cache, slot));
    for (int64_t byte = 0; byte < dim_ * static_cast<int64_t>(sizeof(KV)); byte += 64) prefetch_l1(row + byte);
  }

  // keys_: for each Vec::width keys [width_][Vec::width].
  void pack_keys(int chunk, int end) {
    const auto& call = view_.call;
    for (int key = chunk * kChunk; key < (chunk + 1) * kChunk; key += W) {
      const KV* rows[W];
      for (int i = 0; i < W; i++) {
        rows[i] = row_of(call.k, slots_[key + i]);
        if (key + kChunk < end * kChunk) prefetch(call.k, slots_[key + kChunk + i]);
        prefetch(call.v, slots_[key + i]);
      }
      float* to = keys_ + key % kChunk * width_;
      for (int64_t d = 0; d < dim_; d += W) {
        Vec r[W];
        for (int i = 0; i < W; i++) r[i] = load_some(rows[i] + d, dim_ - d);
        transpose(r);
        for (int i = 0; i < W; i++, to += W) r[i].store(to);
      }
    }
  }

  void unpack_values(int chunk) {
    for (int key = 0; key < kChunk; key++) {
      const KV* from = row_of(view_.call.v, slots_[chunk * kChunk + key]);
      float* to = values_ + key * width_;
      for (int64_t i = 0; i < width_; i += W) (i < dim_ ? load_some(from + i, dim_ - i) : Vec::zero()).store(to + i);
    }
  }

  // Products of R queries and the chunk's keys, each one chain of additions in the order of the dimensions.
  template <int R>
  void products(int row, int chunk) {
    const float* q = q_ + row * width_;
    for (int key = 0; key < kChunk; key += 2 * W) {
      const float *left = keys_ + key * width_, *right = left + W * width_;
      Vec acc[R][2];
      for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = Vec::zero();
      for (int64_t d = 0; d < dim_; d++) {
        Vec a = Vec::load(left + d * W), b = Vec::load(right + d * W);
        for (int r = 0; r < R; r++) {
          Vec x = Vec::all(q[r * width_ + d]);
          acc[r][0] = fma(x, a, acc[r][0]);
          acc[r][1] = fma(x, b, acc[r][1]);
        }
      }
      for (int r = 0; r < R; r++) {
        float* s = scores_ + (row + r) * kSplit + chunk * kChunk + key;
        acc[r][0].store(s);
        acc[r][1].store(s + W);
      }
    }
  }

  // Adds the chunk's values, weighted, in the order of the keys.
  template <int R>
  void mix(int row, int chunk) {
    int64_t d = 0;
    for (; d + 4 * W <= width_; d += 4 * W) mix_part<R, 4>(row, chunk, d);
    for (; d < width_; d += 2 * W) mix_part<R, 2>(row, chunk, d);
  }
  template <int R, int N>
  void mix_part(int row, int chunk, int64_t d) {
    float* to = mixed_ + row * width_ + d;
    const float* weights = scores_ + row * kSplit + chunk * kChunk;
    Vec acc[R][N];
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) acc[r][n] = Vec::load(to + r * width_ + n * W);
    for (int key = 0; key < kChunk; key++) {
      const float* from = values_ + key * width_ + d;
      Vec value[N];
      for (int n = 0; n < N; n++) value[n] = Vec::load(from + n * W);
      for (int r = 0; r < R; r++) {
        Vec weight = Vec::all(weights[r * kSplit + key]);
        for (int n = 0; n < N; n++) acc[r][n] = fma(weight, value[n], acc[r][n]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) acc[r][n].store(to + r * width_ + n * W);
  }

  const View view_;
  const int64_t dim_, width_;
  const Scoring scoring_;
  float *q_, *keys_, *values_, *scores_, *mixed_, *k_scale_, *v_scale_;
  int64_t* slots_;
  RowSum* sums_;
  KV* nothing_;
};

}  // namespace skyline::attention

#endif
