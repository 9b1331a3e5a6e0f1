// Paged attention for items of few rows, as in decoding, where the bandwidth of memory is what bounds the time: the cache is
// read once, is used where it lies, and is asked for ahead of time, a little with every few instructions, so that requests
// are always under way. The same arithmetic as TileAttention's, bit for bit.
#pragma once

#include "attention_amx.h"

#if defined(__AMX_TILE__)

namespace skyline::attention {

// 32 dimensions as bfloat16; those from the n-th on are zero.
inline __m512i load_pairs(const bf16* from, int64_t n) {
  return load_bytes(from, 2 * n);
}
inline __m512i load_pairs(const int8_t* from, int64_t n) {
  __m256i bytes = n >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                          : _mm256_maskz_loadu_epi8((1u << n) - 1, from);
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

template <class KV>
class StreamAttention {
 public:
  using View = attention::View<bf16, KV>;
  static constexpr int kMaxRows = 16;

  StreamAttention(const View& view, Scratch& scratch)
      : view_(view), dim_(view.call.head_dim), width_(TileAttention<KV>::padded(dim_)), heads_(view.item.heads),
        scoring_(view.call.scale, view.call.softcap, sizeof(KV) == 1) {
    void* memory = scratch.ensure(carve(nullptr));
    carve(memory);
    std::memset(nothing_, 0, width_ * sizeof(KV));
    for (int head = 0; head < heads_; head++) pack_queries(head);
    configure(view.rows);
  }

  // done(head, row, sum, values): for each row that sees something of the split.
  template <class Done>
  void split(int index, const Done& done) {
    const Span all = view_.visible(index, 0, view_.rows - 1);
    if (all.empty()) return;
    view_.slots(index, all, slots_);
    view_.scales(slots_, all, k_scale_, v_scale_);
    const int first = all.first_chunk(), last = all.last_chunk();
    ahead_.plan(*this, view_.call.k, first, 1);
    ahead_.step();
    for (int chunk = first; chunk < last; chunk++) {
      const bool more = chunk + 1 < last;
      ahead_.plan(*this, more ? view_.call.k : view_.call.v, more ? chunk + 1 : first, heads_ * (width_ / 32));
      for (int head = 0; head < heads_; head++) products(head, chunk);
    }
    weigh(index, all);
    std::memset(mixed_, 0, heads_ * view_.rows * width_ * sizeof(float));
    // Tiles take denormal numbers for zeros; vectors, which do the same work here, have to be told.
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    for (int chunk = first; chunk < last; chunk++) {
      if (chunk + 1 < last) ahead_.plan(*this, view_.call.v, chunk + 1, heads_ * ((width_ + 32) / 64) * (kChunk / 2));
      for (int head = 0; head < heads_; head++) {
        if (view_.rows <= kVectorRows) {
          mix_in_vectors(head, chunk);
        } else {
          mix_in_tiles(head, chunk);
        }
      }
    }
    _mm_setcsr(control);
    for (int head = 0; head < heads_; head++) {
      for (int row = 0; row < view_.rows; row++) {
        const int64_t at = head * view_.rows + row;
        if (!view_.visible(index, row, row).empty()) done(head, row, sums_[at], mixed_ + at * width_);
      }
    }
  }

 private:
  static constexpr int kStride = kSplit + 16;  // of rows of scores: TileAttention says why
  // Up to so many rows, vectors take no longer than packing for tiles, and reading goes on meanwhile.
  static constexpr int kVectorRows = 4;

  // What will be read next, asked for head by head and row by row, in steps over which it is spread evenly.
  class Ahead {
   public:
    void plan(const StreamAttention& of, const KV* cache, int chunk, int64_t steps) {
      cache_ = cache;
      slots_ = of.slots_ + chunk * kChunk;
      bytes_ = of.dim_ * static_cast<int64_t>(sizeof(KV));
      head_bytes_ = of.view_.call.head_stride * bytes_;
      rows_ = of.heads_ * kChunk;
      row_ = credit_ = 0;
      steps_ = steps;
    }
    void step() {
      for (credit_ += rows_; credit_ >= steps_ && row_ < rows_; credit_ -= steps_, row_++) {
        const int64_t slot = slots_[row_ % kChunk];
        if (slot < 0) continue;
        const char* line = reinterpret_cast<const char*>(cache_) + slot * bytes_ + row_ / kChunk * head_bytes_;
        for (int64_t byte = 0; byte < bytes_; byte += 64) prefetch_l2(line + byte);
      }
    }

   private:
    const KV* cache_ = nullptr;
    const int64_t* slots_ = nullptr;
    int64_t bytes_ = 0, head_bytes_ = 0, rows_ = 0, row_ = 0, steps_ = 1, credit_ = 0;
  };

  // Tiles 0 and 1: products, 2 and 7: keys, 3: queries; 2 and 3: values. Of `rows` rows 4 and 5: results, 6: weights.
  static void configure(int rows) {
    TileConfig config;
    for (int i = 0; i < 8; i++) config.set(i, i < 4 || i == 7 ? 16 : rows);
    config.load();
  }

  size_t carve(void* memory) {
    Carver carver(memory);
    const int64_t rows = view_.rows;
    q_ = carver.take<bf16>(heads_ * 16 * width_);
    staged_ = carver.take<bf16>(kChunk * width_);
    products_ = carver.take<float>(kChunk * 16);
    scores_ = carver.take<float>(heads_ * rows * kStride);
    weights_ = carver.take<float>(heads_ * rows * kSplit);
    mixed_ = carver.take<float>(heads_ * rows * width_);
    slots_ = carver.take<int64_t>(kSplit);
    k_scale_ = carver.take<float>(heads_ * kSplit);
    v_scale_ = carver.take<float>(heads_ * kSplit);
    sums_ = carver.take<RowSum>(heads_ * rows);
    nothing_ = carver.take<KV>(width_);
    return carver.used();
  }

  float* scores(int head, int row) const { return scores_ + (head * view_.rows + row) * kStride; }
  const KV* row_of(const KV* cache, int64_t slot, int head) const {
    return slot < 0 ? nothing_ : cache + (slot + head * view_.call.head_stride) * dim_;
  }

  // Tiles [16 pairs of dimensions][16 rows]; rows that do not exist are zero.
  void pack_queries(int head) {
    bf16* to = q_ + head * 16 * width_;
    for (int64_t d = 0; d < width_; d += 32, to += 512) {
      __m512i r[16];
      for (int row = 0; row < 16; row++) {
        r[row] = row < view_.rows ? load_pairs(view_.query(head, row) + d, dim_ - d) : _mm512_setzero_si512();
      }
      transpose_pairs(r);
      for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, r[i]);
    }
  }

  struct Rows {
    const bf16* data;
    int64_t stride;  // in bytes
  };

  // 16 keys of a head: where they lie, if a tile can be loaded from there.
  Rows keys(int head, int first) {
    const auto& call = view_.call;
    const int64_t* slot = slots_ + first;
    if constexpr (sizeof(KV) == 2) {
      bool in_place = width_ == dim_ && slot[0] >= 0;
      for (int i = 1; in_place && i < 16; i++) in_place = slot[i] == slot[0] + i * call.token_stride;
      if (in_place) return {row_of(call.k, slot[0], head), 2 * call.token_stride * dim_};
    }
    bf16* to = staged_ + first % kChunk * width_;
    for (int i = 0; i < 16; i++) {
      const KV* from = row_of(call.k, slot[i], head);
      for (int64_t d = 0; d < width_; d += 32) _mm512_store_si512(to + i * width_ + d, load_pairs(from + d, dim_ - d));
    }
    return {to, 2 * width_};
  }

  // Products of a chunk's keys, which are the rows here and need no packing, with all queries, turned into rows of scores.
  void products(int head, int chunk) {
    const Rows first = keys(head, chunk * kChunk), second = keys(head, chunk * kChunk + 16);
    const bf16* q = q_ + head * 16 * width_;
    tile_fence();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t d = 0; d < width_; d += 32) {
      _tile_loadd(3, q + 16 * d, 64);
      _tile_loadd(2, first.data + d, first.stride);
      _tile_loadd(7, second.data + d, second.stride);
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 7, 3);
      ahead_.step();
    }
    _tile_stored(0, products_, 64);
    _tile_stored(1, products_ + 256, 64);
    tile_fence();
    for (int half = 0; half < 2; half++) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(products_ + (16 * half + i) * 16);
      transpose_pairs(r);
      for (int row = 0; row < view_.rows; row++) _mm512_store_si512(scores(head, row) + chunk * kChunk + 16 * half, r[row]);
    }
  }

  void weigh(int index, Span all) {
    for (int head = 0; head < heads_; head++) {
      const float *k_scale = k_scale_ + head * kSplit, *v_scale = v_scale_ + head * kSplit;
      for (int row = 0; row < view_.rows; row++) {
        const Span mine = view_.visible(index, row, row);
        const int64_t at = head * view_.rows + row;
        float* s = scores(head, row);
        sums_[at] = weigh_row<sizeof(KV) == 1>(s, mine, all, scoring_, k_scale, v_scale);
        const bf16* rounded = reinterpret_cast<const bf16*>(s);
        for (int key = 0; key < kSplit; key += 16) Vec::load(rounded + key).store(weights_ + at * kSplit + key);
      }
    }
  }

  // Adds a chunk's values, weighted, to all rows.
  void mix_in_tiles(int head, int chunk) {
    for (int key = 0; key < kChunk; key += 2) {
      const KV* even = row_of(view_.call.v, slots_[chunk * kChunk + key], head);
      const KV* odd = row_of(view_.call.v, slots_[chunk * kChunk + key + 1], head);
      bf16* to = staged_ + key * 16;
      for (int64_t d = 0; d < width_; d += 32, to += 1024) {
        __m512i a = load_pairs(even + d, dim_ - d), b = load_pairs(odd + d, dim_ - d);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(to + 512, _mm512_unpackhi_epi16(a, b));
        if (d % 64 == 0) ahead_.step();
      }
    }
    tile_fence();
    float* mixed = mixed_ + head * view_.rows * width_;
    const int64_t stride = 4 * width_;
    _tile_loadd(6, reinterpret_cast<const bf16*>(scores(head, 0)) + chunk * kChunk, 4 * kStride);
    for (int64_t d = 0; d < width_; d += 32) {
      _tile_loadd(4, mixed + d, stride);
      _tile_loadd(5, mixed + d + 16, stride);
      _tile_loadd(2, staged_ + 32 * d, 64);
      _tile_loadd(3, staged_ + 32 * d + 512, 64);
      _tile_dpbf16ps(4, 6, 2);
      _tile_dpbf16ps(5, 6, 3);
      _tile_stored(4, mixed + d, stride);
      _tile_stored(5, mixed + d + 16, stride);
    }
    tile_fence();
  }

  void mix_in_vectors(int head, int chunk) {
    for (int64_t d = 0; d < width_; d += 64) {
      for (int row = 0; row < view_.rows; row += 2) {
        const bool two = row + 1 < view_.rows, wide = d + 32 < width_;
        if (two) {
          wide ? mix_part<2, 2>(head, chunk, row, d) : mix_part<2, 1>(head, chunk, row, d);
        } else {
          wide ? mix_part<1, 2>(head, chunk, row, d) : mix_part<1, 1>(head, chunk, row, d);
        }
      }
    }
  }

  // R rows, D times 32 dimensions. As tiles do it: even and odd keys apart, then their sum, then what was there.
  template <int R, int D>
  void mix_part(int head, int chunk, int row, int64_t from) {
    Vec acc[R][D][4];
    for (auto& r : acc)
      for (auto& d : r)
        for (Vec& vec : d) vec = Vec::zero();
    const int64_t at = head * view_.rows + row;
    const float* weights = weights_ + at * kSplit + chunk * kChunk;
    const int64_t* slots = slots_ + chunk * kChunk;
    for (int key = 0; key < kChunk; key += 2) {
      if (row == 0) ahead_.step();
      const KV *even = row_of(view_.call.v, slots[key], head) + from, *odd = row_of(view_.call.v, slots[key + 1], head) + from;
      for (int d = 0; d < D; d++) {
        Vec values[4];
        split(load_pairs(even + 32 * d, dim_ - from - 32 * d), values[0], values[1]);
        split(load_pairs(odd + 32 * d, dim_ - from - 32 * d), values[2], values[3]);
        for (int r = 0; r < R; r++) {
          const Vec first = Vec::all(weights[r * kSplit + key]), second = Vec::all(weights[r * kSplit + key + 1]);
          acc[r][d][0] = fma(first, values[0], acc[r][d][0]);
          acc[r][d][1] = fma(first, values[1], acc[r][d][1]);
          acc[r][d][2] = fma(second, values[2], acc[r][d][2]);
          acc[r][d][3] = fma(second, values[3], acc[r][d][3]);
        }
      }
    }
    for (int r = 0; r < R; r++) {
      for (int d = 0; d < D; d++) {
        const __m512 even = (acc[r][d][0] + acc[r][d][2]).v, odd = (acc[r][d][1] + acc[r][d][3]).v;
        float* to = mixed_ + (at + r) * width_ + from + 32 * d;  // in the order of tiles: TileAttention::store
        (Vec::load(to) + Vec{_mm512_unpacklo_ps(even, odd)}).store(to);
        (Vec::load(to + 16) + Vec{_mm512_unpackhi_ps(even, odd)}).store(to + 16);
      }
    }
  }
  static void split(__m512i pairs, Vec& even, Vec& odd) {
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  }

  const View view_;
  const int64_t dim_, width_, heads_;
  const Scoring scoring_;
  Ahead ahead_;
  bf16 *q_, *staged_;
  float *products_, *scores_, *weights_, *mixed_, *k_scale_, *v_scale_;
  int64_t* slots_;
  RowSum* sums_;
  KV* nothing_;
};

}  // namespace skyline::attention

#endif
