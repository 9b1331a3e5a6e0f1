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
  static constexpr int kMaxRows = 96;
  // Few rows take some heads together, whose keys lie near each other: memory is fastest in long pieces.
  static constexpr int kHeadRows = 4, kHeadBytes = 1024;

  static int64_t padded(int64_t head_dim) { return round_up(head_dim, 16); }

  LaneAttention(const View& view, Scratch& scratch)
      : view_(view), dim_(view.call.head_dim), width_(padded(dim_)), heads_(view.item.heads),
        direct_(view.rows <= kHeadRows && dim_ == width_),
        scoring_(view.call.scale, view.call.softcap, sizeof(KV) == 1) {
    void* memory = scratch.ensure(carve(nullptr));
    carve(memory);
    std::memset(nothing_, 0, width_ * sizeof(KV));
    for (int i = 0; i < heads_ * view.rows; i++) {
      const T* from = view.query(i / view.rows, i % view.rows);
      float* to = q_ + i * width_;
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
    view_.scales(slots_, all, k_scale_, v_scale_);
    view_.visible(index, spans_);
    for (int chunk = all.first_chunk(); chunk < all.last_chunk(); chunk++) {
      const bool last = chunk + 1 == all.last_chunk();
      Ahead next = last ? Ahead(*this, view_.call.v, all.first_chunk()) : Ahead(*this, view_.call.k, chunk + 1);
      for (int head = 0; head < heads_; head++) {
        point(view_.call.k, chunk, head);
        if (direct_) {
          each_block<2>(head, chunk, [&]<int R>(int row) { products<R>(row, chunk, Cached{rows_}, next); });
        } else {
          convert();
          each_block<3>(head, chunk, [&]<int R>(int row) { products<R>(row, chunk, Converted{wide_, width_}, next); });
        }
      }
    }
    for (int i = 0; i < heads_ * view_.rows; i++) {
      const Span mine = spans_[i % view_.rows];
      const int64_t head = i / view_.rows * kSplit;
      float* s = scores_ + i * kSplit;
      if (mine.empty()) {
        std::fill_n(s, kSplit, 0.0f);
      } else {
        sums_[i] = softmax(s, mine, all, scoring_, sizeof(KV) == 1 ? k_scale_ + head : nullptr, [&](int key, const Vec* w) {
          for (int j = 0; j < kChunk; j += Vec::width) {
            Vec weight = w[j / Vec::width];
            if (sizeof(KV) == 1) weight = weight * Vec::load(v_scale_ + head + key + j);
            weight.store(s + key + j);
          }
        });
      }
      std::fill_n(mixed_ + i * width_, width_, 0.0f);
    }
    for (int chunk = all.first_chunk(); chunk < all.last_chunk(); chunk++) {
      const bool last = chunk + 1 == all.last_chunk();
      Ahead next = last ? Ahead() : Ahead(*this, view_.call.v, chunk + 1);
      for (int head = 0; head < heads_; head++) {
        point(view_.call.v, chunk, head);
        if (direct_) {
          each_block<2>(head, chunk, [&]<int R>(int row) { mix<R>(row, chunk, Cached{rows_}, next); });
        } else {
          convert();
          each_block<3>(head, chunk, [&]<int R>(int row) { mix<R>(row, chunk, Converted{wide_, width_}, next); });
        }
      }
    }
    for (int i = 0; i < heads_ * view_.rows; i++) {
      const int row = i % view_.rows;
      if (!spans_[row].empty()) done(i / view_.rows, row, sums_[i], mixed_ + i * width_);
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
  // A chunk's keys or values that are needed soon: head by head and row by row, a cache line with every few instructions.
  class Ahead {
   public:
    Ahead() = default;
    Ahead(const LaneAttention& of, const KV* cache, int chunk)
        : cache_(cache), slots_(of.slots_ + chunk * kChunk), dim_(of.dim_), head_rows_(of.view_.call.head_stride),
          heads_(of.heads_) {
      begin();
    }
    void ask() {
      if (heads_ == 0) return;
      prefetch_l2(line_);
      line_ += 64;
      if (line_ < end_) return;
      if (++key_ == kChunk) {
        key_ = 0;
        if (--heads_ == 0) return;
        cache_ += head_rows_ * dim_;
      }
      begin();
    }

   private:
    void begin() {
      line_ = reinterpret_cast<const char*>(cache_ + std::max<int64_t>(slots_[key_], 0) * dim_);
      end_ = line_ + dim_ * sizeof(KV);
    }
    const KV* cache_ = nullptr;
    const int64_t* slots_ = nullptr;
    int64_t dim_ = 0, head_rows_ = 0, heads_ = 0;
    int key_ = 0;
    const char *line_ = nullptr, *end_ = nullptr;
  };

  // Where dimension i of a query, or of a sum of values, is kept.
  static int64_t place(int64_t i) { return sizeof(KV) == 2 ? i / 16 * 16 + i % 2 * 8 + i % 16 / 2 : i; }

  size_t carve(void* memory) {
    Carver carver(memory);
    const int64_t rows = heads_ * view_.rows;  // head by head
    q_ = carver.take<float>(rows * width_);
    wide_ = carver.take<float>(kChunk * width_);
    scores_ = carver.take<float>(rows * kSplit);
    mixed_ = carver.take<float>(rows * width_);
    slots_ = carver.take<int64_t>(kSplit);
    rows_ = carver.take<const KV*>(kChunk);
    k_scale_ = carver.take<float>(heads_ * kSplit);
    v_scale_ = carver.take<float>(heads_ * kSplit);
    sums_ = carver.take<RowSum>(rows);
    spans_ = carver.take<Span>(view_.rows);
    nothing_ = carver.take<KV>(width_);
    return carver.used();
  }

  // body<R>(row) for blocks of the head's rows [row, row + R), counted over all heads, of which some see something of the chunk:
  // later rows see further, and begin later to.
  template <int R, class Body>
  void each_block(int head, int chunk, const Body& body) const {
    const int first = head * view_.rows;
    int row = 0;
    for (; row + R <= view_.rows; row += R)
      if (sees(chunk, row, row + R - 1)) body.template operator()<R>(first + row);
    if constexpr (R > 1) {
      for (; row < view_.rows; row++)
        if (sees(chunk, row, row)) body.template operator()<1>(first + row);
    }
  }
  bool sees(int chunk, int first, int last) const {
    const Span span{spans_[first].lo, spans_[last].hi};
    return !span.empty() && span.first_chunk() <= chunk && chunk < span.last_chunk();
  }

  // rows_: a head's keys or values of a chunk.
  void point(const KV* cache, int chunk, int head) {
    const int64_t above = head * view_.call.head_stride;
    for (int key = 0; key < kChunk; key++) {
      const int64_t slot = slots_[chunk * kChunk + key];
      rows_[key] = slot < 0 ? nothing_ : cache + (slot + above) * dim_;
    }
  }

  // rows_ as float32, in the order of `place`.
  void convert() {
    for (int key = 0; key < kChunk; key++) {
      const KV* from = rows_[key];
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

  // Products of R queries and the chunk's keys: eight chains of additions each, which are then added up. What is `next` is
  // asked for from memory meanwhile.
  template <int R, class Rows>
  void products(int row, int chunk, const Rows& rows, Ahead& next) {
    constexpr int K = R == 1 ? 8 : 4;
    const float* q = q_ + row * width_;
    const int64_t width = width_;
    for (int key = 0; key < kChunk; key += K) {
      decltype(rows(0)) keys[K];
      __m256 acc[R][K] = {};
      repeat<K>(SKYLINE_EACH(k) { keys[k] = rows(key + k); });
      for (int64_t d = 0; d < width; d += 16) {
        next.ask();
        next.ask();
        repeat<K>(SKYLINE_EACH(k) {
          __m256 first, second;
          load_dims(keys[k] + d, first, second);
          repeat<R>(SKYLINE_EACH(r) {
            acc[r][k] = _mm256_fmadd_ps(_mm256_loadu_ps(q + r * width + d), first, acc[r][k]);
            acc[r][k] = _mm256_fmadd_ps(_mm256_loadu_ps(q + r * width + d + 8), second, acc[r][k]);
          });
        });
      }
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
  void mix(int row, int chunk, const Rows& rows, Ahead& next) {
    constexpr int N = R == 1 ? 4 : 2;  // times 16 dimensions
    int64_t d = 0;
    for (; d + 16 * N <= width_; d += 16 * N) mix_part<R, N>(row, chunk, d, rows, next);
    for (; d < width_; d += 16) mix_part<R, 1>(row, chunk, d, rows, next);
  }
  template <int R, int N, class Rows>
  void mix_part(int row, int chunk, int64_t d, const Rows& rows, Ahead& next) {
    float* to = mixed_ + row * width_ + d;
    const float* weights = scores_ + row * kSplit + chunk * kChunk;
    const int64_t width = width_;
    __m256 acc[R][2 * N];
    repeat<R>(SKYLINE_EACH(r) { repeat<2 * N>(SKYLINE_EACH(n) { acc[r][n] = _mm256_loadu_ps(to + r * width + n * 8); }); });
    for (int key = 0; key < kChunk; key++) {
      const auto* from = rows(key) + d;
      next.ask();
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
  const int64_t dim_, width_, heads_;
  const bool direct_;  // few rows, which are not worth converting for
  const Scoring scoring_;
  float *q_, *wide_, *scores_, *mixed_, *k_scale_, *v_scale_;
  int64_t* slots_;
  const KV** rows_;
  RowSum* sums_;
  Span* spans_;  // keys of the split that each row sees
  KV* nothing_;
};

}  // namespace skyline::attention

#endif
