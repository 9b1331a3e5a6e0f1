// Paged attention for AVX2: of keys and values, the lanes of a vector are dimensions, so that few queries read the cache where it
// lies. Many convert it to float32 first. The arithmetic is the same.
#pragma once

#if !defined(__AVX512F__)

#include "attention.h"
#include "repeat.h"

namespace skyline::attention {

// 16 dimensions of a key or value as two vectors. Of pairs of bfloat16, one vector takes the first and the other the second of
// each: queries, and sums of values, are kept in that order too.
inline void load_dims(const bf16* p, __m256& first, __m256& second) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline void load_dims(const float* p, __m256& first, __m256& second) {
  first = _mm256_loadu_ps(p);
  second = _mm256_loadu_ps(p + 8);
}
inline void load_dims(const int8_t* p, __m256& first, __m256& second) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  first = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  second = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
}

template <class X>
inline void store_dims(const X* from, float* to) {
  __m256 first, second;
  load_dims(from, first, second);
  _mm256_storeu_ps(to, first);
  _mm256_storeu_ps(to + 8, second);
}

// The sums of four vectors' lanes, always as a tree of the same shape.
inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

template <class T, class KV>
class LaneAttention {
 public:
  using View = attention::View<T, KV>;
  static constexpr int kMaxRows = 64, kHeadBytes = 1;  // one head at a time

  static int64_t padded(int64_t head_dim) { return round_up(head_dim, 16); }

  LaneAttention(const View& view, Scratch& scratch)
      : view_(view), dim_(view.call.head_dim), width_(padded(dim_)), direct_(view.rows <= kFewRows && dim_ == width_),
        scoring_(view.call.scale, view.call.softcap, sizeof(KV) == 1) {
    void* memory = scratch.ensure(carve(nullptr));
    carve(memory);
    std::memset(nothing_, 0, width_ * sizeof(KV));
    for (int row = 0; row < view.rows; row++) {
      const T* from = view.query(0, row);
      float* to = q_ + row * width_;
      if (dim_ == width_ && sizeof(T) == sizeof(KV)) {
        for (int64_t i = 0; i < width_; i += 16) store_dims(from + i, to + i);
      } else {
        for (int64_t i = 0; i < width_; i++) to[place(i)] = i < dim_ ? to_float(from[i]) : 0.0f;
      }
    }
  }

  // done(head, row, sum, values): for each row that sees something of the split.
  template <class Done>
  void split(int index, const Done& done) {
    const Span all = view_.visible(index, 0, view_.rows - 1);
    if (all.empty()) return;
    view_.slots(index, all, slots_);
    for (int key = all.first_chunk() * kChunk; key < all.last_chunk() * kChunk; key++) {
      const int64_t slot = slots_[key];
      keys_[key] = slot < 0 ? nothing_ : view_.call.k + slot * dim_;
      values_[key] = slot < 0 ? nothing_ : view_.call.v + slot * dim_;
      if (sizeof(KV) == 1) {
        k_scale_[key] = slot < 0 ? 0 : view_.call.k_scale[slot];
        v_scale_[key] = slot < 0 ? 0 : view_.call.v_scale[slot];
      }
    }
    for (int chunk = all.first_chunk(); chunk < all.last_chunk(); chunk++) {
      if (direct_) {
        const KV* const* next = chunk + 1 < all.last_chunk() ? keys_ + (chunk + 1) * kChunk : values_ + all.first_chunk() * kChunk;
        each_block<2>(index, chunk, [&]<int R>(int row) { products<R>(row, chunk, Cached{keys_ + chunk * kChunk}, next); });
      } else {
        convert(keys_ + chunk * kChunk);
        each_block<3>(index, chunk, [&]<int R>(int row) { products<R>(row, chunk, Converted{wide_, width_}, nullptr); });
      }
    }
    for (int row = 0; row < view_.rows; row++) {
      const Span mine = view_.visible(index, row, row);
      float* s = scores_ + row * kSplit;
      if (mine.empty()) {
        std::fill_n(s, kSplit, 0.0f);
      } else {
        sums_[row] = softmax(s, mine, all, scoring_, sizeof(KV) == 1 ? k_scale_ : nullptr, [&](int key, const Vec* w) {
          for (int i = 0; i < kChunk; i += Vec::width) {
            Vec weight = w[i / Vec::width];
            if (sizeof(KV) == 1) weight = weight * Vec::load(v_scale_ + key + i);
            weight.store(s + key + i);
          }
        });
      }
      std::fill_n(mixed_ + row * width_, width_, 0.0f);
    }
    for (int chunk = all.first_chunk(); chunk < all.last_chunk(); chunk++) {
      if (direct_) {
        const KV* const* next = chunk + 1 < all.last_chunk() ? values_ + (chunk + 1) * kChunk : nullptr;
        each_block<2>(index, chunk, [&]<int R>(int row) { mix<R>(row, chunk, Cached{values_ + chunk * kChunk}, next); });
      } else {
        convert(values_ + chunk * kChunk);
        each_block<3>(index, chunk, [&]<int R>(int row) { mix<R>(row, chunk, Converted{wide_, width_}, nullptr); });
      }
    }
    for (int row = 0; row < view_.rows; row++) {
      if (!view_.visible(index, row, row).empty()) done(0, row, sums_[row], mixed_ + row * width_);
    }
  }

  static void store(T* to, const float* values, float factor, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) {
      // Adding zero makes negative zeros positive, whose sign would depend on what was skipped.
      Vec first = fma(Vec::load(values + i), Vec::all(factor), Vec::zero());
      Vec second = fma(Vec::load(values + i + 8), Vec::all(factor), Vec::zero());
      if constexpr (sizeof(KV) == 2) {
        const __m256 low = _mm256_unpacklo_ps(first.v, second.v), high = _mm256_unpackhi_ps(first.v, second.v);
        first.v = _mm256_permute2f128_ps(low, high, 0x20);
        second.v = _mm256_permute2f128_ps(low, high, 0x31);
      }
      const int count = static_cast<int>(std::min<int64_t>(16, dim - i));
      first.store(to + i, std::min(count, 8));
      if (count > 8) second.store(to + i + 8, count - 8);
    }
  }

 private:
  static constexpr int kFewRows = 4;
  static constexpr int64_t kLine = 64 / sizeof(KV);  // elements of a cache line

  // Where dimension i of a query, or of a sum of values, is kept.
  static int64_t place(int64_t i) { return sizeof(KV) == 2 ? i / 16 * 16 + i % 2 * 8 + i % 16 / 2 : i; }

  size_t carve(void* memory) {
    Carver carver(memory);
    q_ = carver.take<float>(view_.rows * width_);
    wide_ = carver.take<float>(kChunk * width_);
    scores_ = carver.take<float>(view_.rows * kSplit);
    mixed_ = carver.take<float>(view_.rows * width_);
    slots_ = carver.take<int64_t>(kSplit);
    keys_ = carver.take<const KV*>(kSplit);
    values_ = carver.take<const KV*>(kSplit);
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
    for (; row + R <= view_.rows; row += R)
      if (sees(index, chunk, row, row + R - 1)) body.template operator()<R>(row);
    if constexpr (R > 1) {
      for (; row < view_.rows; row++)
        if (sees(index, chunk, row, row)) body.template operator()<1>(row);
    }
  }
  bool sees(int index, int chunk, int first, int last) const {
    const Span span = view_.visible(index, first, last);
    return !span.empty() && span.first_chunk() <= chunk && chunk < span.last_chunk();
  }

  // The chunk's keys or values as float32, in the order of `place`.
  void convert(const KV* const* rows) {
    for (int key = 0; key < kChunk; key++) {
      const KV* from = rows[key];
      float* to = wide_ + key * width_;
      for (int64_t i = 0; i < width_; i += 16) {
        if (i + 16 <= dim_) {
          store_dims(from + i, to + i);
        } else {
          alignas(64) KV part[16] = {};
          std::memcpy(part, from + i, (dim_ - i) * sizeof(KV));
          store_dims(part, to + i);
        }
      }
    }
  }

  // Rows of a chunk, by key: as they are in the cache, or converted.
  struct Cached {
    const KV* const* rows;
    const KV* operator()(int key) const { return rows[key]; }
  };
  struct Converted {
    const float* wide;
    int64_t width;
    const float* operator()(int key) const { return wide + key * width; }
  };

  // Products of R queries and the chunk's keys: eight chains of additions each, which are then added up. The rows of `next`, if
  // any, are asked for from memory meanwhile.
  template <int R, class Rows>
  void products(int row, int chunk, const Rows& rows, const KV* const* next) {
    constexpr int K = R == 1 ? 8 : 4;
    const float* q = q_ + row * width_;
    const int64_t width = width_;
    for (int key = 0; key < kChunk; key += K) {
      decltype(rows(0)) keys[K];
      __m256 acc[R][K] = {};
      repeat<K>(SKYLINE_EACH(k) { keys[k] = rows(key + k); });
      if (next != nullptr)
        for (int k = key; k < key + K; k++)
          for (int64_t d = 0; d < width; d += kLine) prefetch_l1(next[k] + d);
      for (int64_t d = 0; d < width; d += 16)
        repeat<K>(SKYLINE_EACH(k) {
          __m256 first, second;
          load_dims(keys[k] + d, first, second);
          repeat<R>(SKYLINE_EACH(r) {
            acc[r][k] = _mm256_fmadd_ps(_mm256_loadu_ps(q + r * width + d), first, acc[r][k]);
            acc[r][k] = _mm256_fmadd_ps(_mm256_loadu_ps(q + r * width + d + 8), second, acc[r][k]);
          });
        });
      float* s = scores_ + row * kSplit + chunk * kChunk + key;
      repeat<R>(SKYLINE_EACH(r) {
        repeat<K / 4>(SKYLINE_EACH(i) {
          _mm_storeu_ps(s + r * kSplit + 4 * i, sum_lanes(acc[r][4 * i], acc[r][4 * i + 1], acc[r][4 * i + 2], acc[r][4 * i + 3]));
        });
      });
    }
  }

  // Adds the chunk's values, weighted, in the order of the keys.
  template <int R, class Rows>
  void mix(int row, int chunk, const Rows& rows, const KV* const* next) {
    constexpr int N = R == 1 ? 4 : 2;  // times 16 dimensions
    int64_t d = 0;
    for (; d + 16 * N <= width_; d += 16 * N) mix_part<R, N>(row, chunk, d, rows, next);
    for (; d < width_; d += 16) mix_part<R, 1>(row, chunk, d, rows, next);
  }
  template <int R, int N, class Rows>
  void mix_part(int row, int chunk, int64_t d, const Rows& rows, const KV* const* next) {
    float* to = mixed_ + row * width_ + d;
    const float* weights = scores_ + row * kSplit + chunk * kChunk;
    const int64_t width = width_;
    __m256 acc[R][2 * N];
    repeat<R>(SKYLINE_EACH(r) { repeat<2 * N>(SKYLINE_EACH(n) { acc[r][n] = _mm256_loadu_ps(to + r * width + n * 8); }); });
    for (int key = 0; key < kChunk; key++) {
      const auto* from = rows(key) + d;
      if (next != nullptr && d % kLine == 0) prefetch_l1(next[key] + d);
      __m256 weight[R];
      repeat<R>(SKYLINE_EACH(r) { weight[r] = _mm256_broadcast_ss(weights + r * kSplit + key); });
      repeat<N>(SKYLINE_EACH(n) {
        __m256 first, second;
        load_dims(from + 16 * n, first, second);
        repeat<R>(SKYLINE_EACH(r) {
          acc[r][2 * n] = _mm256_fmadd_ps(weight[r], first, acc[r][2 * n]);
          acc[r][2 * n + 1] = _mm256_fmadd_ps(weight[r], second, acc[r][2 * n + 1]);
        });
      });
    }
    repeat<R>(SKYLINE_EACH(r) { repeat<2 * N>(SKYLINE_EACH(n) { _mm256_storeu_ps(to + r * width + n * 8, acc[r][n]); }); });
  }

  const View view_;
  const int64_t dim_, width_;
  const bool direct_;  // few rows, which are not worth converting for
  const Scoring scoring_;
  float *q_, *wide_, *scores_, *mixed_, *k_scale_, *v_scale_;
  int64_t* slots_;
  const KV **keys_, **values_;  // rows of the split
  RowSum* sums_;
  KV* nothing_;
};

}  // namespace skyline::attention

#endif
