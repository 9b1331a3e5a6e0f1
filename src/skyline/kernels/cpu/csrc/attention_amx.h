// Paged attention in AMX tiles: bfloat16 queries, and keys and values in bfloat16 or int8 (whose integers are exact in
// bfloat16; their scales go to the products and to the weights). Weights are rounded to bfloat16 before the values.
#pragma once

#include "amx.h"
#include "attention_pairs.h"

#if defined(__AMX_TILE__)

namespace skyline::attention {

template <class KV>
class TileAttention {
 public:
  using View = attention::View<bf16, KV>;
  // Items of few rows take several heads, which lie next to each other in a block: so many bytes of each token.
  static constexpr int kMaxRows = 256, kHeadRows = 64, kHeadBytes = 2048;

  static int64_t padded(int64_t head_dim) { return round_up(head_dim, 32); }

  TileAttention(const View& view, Scratch& scratch)
      : view_(view), dim_(view.call.head_dim), width_(padded(dim_)),
        scoring_(view.call.scale, view.call.softcap, sizeof(KV) == 1) {
    void* memory = scratch.ensure(carve(nullptr));
    carve(memory);
    std::memset(nothing_, 0, width_ * sizeof(KV));
    for (int head = 0; head < view.item.heads; head++) {
      for (int row = 0; row < view.rows; row++) {
        bf16* to = q_ + (head * padded_rows() + row) * width_;
        std::memcpy(to, view.query(head, row), 2 * dim_);
        std::memset(to + dim_, 0, 2 * (width_ - dim_));
      }
    }
    configure(std::min(view.rows, 16));
  }

  // done(head, row, sum, values): for each row that sees something of the split.
  template <class Done>
  void split(int index, const Done& done) {
    Span all = view_.visible(index, 0, view_.rows - 1);
    if (all.empty()) return;
    view_.slots(index, all, slots_);
    view_.scales(slots_, all, k_scale_, v_scale_);
    pack_keys(all);
    pack_values(all);
    for (int head = 0; head < view_.item.heads; head++) {
      for (int row = 0; row < view_.rows; row += 32) {
        int rows = std::min(view_.rows - row, 32);
        Span span = view_.visible(index, row, row + rows - 1);
        if (span.empty()) continue;
        RowSum sums[32];
        if (rows > 16) {
          block<true>(index, head, row, rows, span, sums);
        } else {
          block<false>(index, head, row, rows, span, sums);
        }
        for (int i = 0; i < rows; i++) {
          if (!view_.visible(index, row + i, row + i).empty()) done(head, row + i, sums[i], mixed_ + i * width_);
        }
      }
    }
  }

  static void store(bf16* to, const float* values, float factor, int64_t dim) { store_unpacked(to, values, factor, dim); }

 private:
  // Rows of scores: padded by a cache line, so that the 16 rows of a tile do not fall into a few sets of the cache.
  static constexpr int kStride = kSplit + 16;

  int64_t padded_rows() const { return round_up(view_.rows, 16); }

  // Tiles 0-3: results, 4 and 5: rows of A, 6 and 7: B.
  static void configure(int rows) {
    TileConfig config;
    for (int i = 0; i < 8; i++) config.set(i, i < 6 ? rows : 16);
    config.load();
  }

  size_t carve(void* memory) {
    Carver carver(memory);
    const int64_t heads = view_.item.heads;
    q_ = carver.take<bf16>(heads * padded_rows() * width_);
    keys_ = carver.take<bf16>(heads * kSplit * width_);
    values_ = carver.take<bf16>(heads * kSplit * width_);
    scores_ = carver.take<float>(32 * kStride);
    mixed_ = carver.take<float>(32 * width_);
    slots_ = carver.take<int64_t>(kSplit);
    k_scale_ = carver.take<float>(heads * kSplit);
    v_scale_ = carver.take<float>(heads * kSplit);
    nothing_ = carver.take<KV>(width_);
    return carver.used();
  }

  const KV* row_of(const KV* cache, int64_t slot, int head) const {
    return slot < 0 ? nothing_ : cache + (slot + head * view_.call.head_stride) * dim_;
  }
  // Tiles [16 pairs of dimensions][16 keys], for each 16 keys those of all dimensions.
  void pack_keys(Span all) {
    const auto& call = view_.call;
    const int begin = all.first_chunk() * kChunk, end = all.last_chunk() * kChunk;
    for (int key = begin; key < end; key += 16) {
      for (int head = 0; head < view_.item.heads; head++) {
        const KV* rows[16];
        for (int i = 0; i < 16; i++) rows[i] = row_of(call.k, slots_[key + i], head);
        pack_key_rows(rows, dim_, keys_ + (head * kSplit + key) * width_);
      }
    }
  }

  // Tiles [16 pairs of keys][16 dimensions], for each 32 keys those of all dimensions.
  void pack_values(Span all) {
    const auto& call = view_.call;
    for (int from = all.first_chunk() * kChunk; from < all.last_chunk() * kChunk; from += kChunk) {
      for (int head = 0; head < view_.item.heads; head++) {
        for (int key = from; key < from + kChunk; key += 2) {
          const KV *even = row_of(call.v, slots_[key], head), *odd = row_of(call.v, slots_[key + 1], head);
          pack_value_pair(even, odd, dim_, values_ + (head * kSplit + from) * width_ + (key - from) * 16);
        }
      }
    }
  }

  template <bool two>
  void block(int index, int head, int row, int rows, Span span, RowSum* sums) {
    tile_fence();
    products<two>(q_ + (head * padded_rows() + row) * width_, keys_ + head * kSplit * width_, span);
    tile_fence();
    for (int i = 0; i < rows; i++) {
      Span mine = view_.visible(index, row + i, row + i);
      if (!mine.empty()) sums[i] = weigh(scores_ + i * kStride, head, mine, span);
    }
    tile_fence();
    mix<two>(values_ + head * kSplit * width_, span);
    tile_fence();
  }

  // Products of 16 or 32 queries with the keys of the span's chunks.
  template <bool two>
  void products(const bf16* q, const bf16* keys, Span span) {
    const int64_t stride = 2 * width_;
    for (int chunk = span.first_chunk(); chunk < span.last_chunk(); chunk++) {
      const bf16* left = keys + chunk * kChunk * width_;
      const bf16* right = left + 16 * width_;
      float* s = scores_ + chunk * kChunk;
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (two) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t d = 0; d < width_; d += 32) {
        _tile_loadd(4, q + d, stride);
        _tile_loadd(6, left + 16 * d, 64);
        _tile_loadd(7, right + 16 * d, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (two) {
          _tile_loadd(5, q + 16 * width_ + d, stride);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, s, 4 * kStride);
      _tile_stored(1, s + 16, 4 * kStride);
      if constexpr (two) {
        _tile_stored(2, s + 16 * kStride, 4 * kStride);
        _tile_stored(3, s + 16 * kStride + 16, 4 * kStride);
      }
    }
  }

  RowSum weigh(float* s, int head, Span mine, Span span) const {
    return weigh_row<sizeof(KV) == 1>(s, mine, span, scoring_, k_scale_ + head * kSplit, v_scale_ + head * kSplit);
  }

  // Weighted sums of the values of the span's chunks.
  template <bool two>
  void mix(const bf16* values, Span span) {
    const bf16* weights = reinterpret_cast<const bf16*>(scores_);
    const int64_t stride = 4 * width_;
    for (int64_t d = 0; d < width_; d += 32) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (two) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int chunk = span.first_chunk(); chunk < span.last_chunk(); chunk++) {
        const bf16* at = values + (chunk * width_ + d) * kChunk;
        _tile_loadd(4, weights + chunk * kChunk, 4 * kStride);
        _tile_loadd(6, at, 64);
        _tile_loadd(7, at + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (two) {
          _tile_loadd(5, weights + 32 * kStride + chunk * kChunk, 4 * kStride);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, mixed_ + d, stride);
      _tile_stored(1, mixed_ + d + 16, stride);
      if constexpr (two) {
        _tile_stored(2, mixed_ + 16 * width_ + d, stride);
        _tile_stored(3, mixed_ + 16 * width_ + d + 16, stride);
      }
    }
  }

  const View view_;
  const int64_t dim_, width_;
  const Scoring scoring_;
  bf16 *q_, *keys_, *values_;
  float *scores_, *mixed_, *k_scale_, *v_scale_;
  int64_t* slots_;
  KV* nothing_;
};

}  // namespace skyline::attention

#endif
