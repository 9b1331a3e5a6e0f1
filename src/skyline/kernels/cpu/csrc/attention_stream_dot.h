// Paged attention for items of few rows, as in decoding, where the bandwidth of memory is what bounds the time, on AVX-512
// without AMX: the cache is read once, where it lies, and in the order in which it lies there, which is the only one that the
// hardware fetches ahead in at its full speed. The same arithmetic as DotAttention's, bit for bit.
#pragma once

#include "attention_dot.h"

#if defined(__AVX512F__) && !defined(__AMX_TILE__)

namespace skyline::attention {

template <class KV>
class DotStreamAttention {
 public:
  using View = attention::View<bf16, KV>;
  static constexpr int kMaxRows = 8;

  DotStreamAttention(const View& view, Scratch& scratch)
      : view_(view), dim_(view.call.head_dim), width_(DotAttention<KV>::padded(dim_)),
        q_width_(round_up(dim_, Pairs<KV>::kDims)), heads_(view.item.heads),
        scoring_(view.call.scale, view.call.softcap, sizeof(KV) == 1) {
    lines_ = kKeys * dim_ * static_cast<int64_t>(sizeof(KV)) / 64;
    ahead_ = static_cast<int>(std::clamp<int64_t>(kAheadBytes / (64 * std::max<int64_t>(lines_, 1)), 1, kMaxAhead));
    void* memory = scratch.ensure(carve(nullptr));
    carve(memory);
    for (int head = 0; head < heads_; head++)
      for (int row = 0; row < view.rows; row++) arrange(view.query(head, row), q_ + (head * view.rows + row) * q_width_);
  }

  // done(head, row, sum, values): for each row that sees something of the split.
  template <class Done>
  void split(int index, const Done& done) {
    const Span all = view_.visible(index, 0, view_.rows - 1);
    if (all.empty()) return;
    view_.slots(index, all, slots_);
    list(index, all);
    const char* const* next = order_ + ahead_;
    rows([&]<int R>() {
      each_unit(all, [&](int key, int head) {
        ask_scales(key, head);
        products<R>(head, key, unit(view_.call.k, key, head), *next++);
      });
    });
    view_.scales(slots_, all, k_scale_, v_scale_);
    for (int at = 0; at < heads_ * view_.rows; at++) {
      const int scale = at / view_.rows * kSplit, row = at % view_.rows;
      const Span mine = view_.visible(index, row, row);
      sums_[at] = weigh_row<sizeof(KV) == 1>(scores_ + at * kStride, mine, all, scoring_, k_scale_ + scale, v_scale_ + scale);
    }
    std::memset(mixed_, 0, heads_ * view_.rows * width_ * sizeof(float));
    rows([&]<int R>() {
      each_unit(all, [&](int key, int head) { mix<R>(head, key, unit(view_.call.v, key, head), *next++); });
    });
    for (int head = 0; head < heads_; head++) {
      for (int row = 0; row < view_.rows; row++) {
        const int64_t at = head * view_.rows + row;
        if (!view_.visible(index, row, row).empty()) done(head, row, sums_[at], mixed_ + at * width_);
      }
    }
  }

 private:
  static constexpr int kKeys = 16;  // of a unit, which is what is read at a time: so many keys, or values, of a head
  static constexpr int kAheadBytes = 8192, kMaxAhead = 16;
  static constexpr int kStride = DotAttention<KV>::kStride;

  struct Unit {
    const KV* base;
    int64_t stride;
  };

  size_t carve(void* memory) {
    Carver carver(memory);
    const int64_t rows = heads_ * view_.rows;
    q_ = carver.take<bf16>(rows * q_width_);
    lanes_ = carver.take<float>(view_.rows * 128);
    scores_ = carver.take<float>(rows * kStride);
    mixed_ = carver.take<float>(rows * width_);
    slots_ = carver.take<int64_t>(kSplit);
    order_ = carver.take<const char*>(2 * heads_ * kSplit / kKeys + kMaxAhead);
    k_scale_ = carver.take<float>(heads_ * kSplit);
    v_scale_ = carver.take<float>(heads_ * kSplit);
    sums_ = carver.take<RowSum>(rows);
    gathered_ = carver.take<KV>(kKeys * dim_);
    return carver.used();
  }

  float* scores(int head, int row) const { return scores_ + (head * view_.rows + row) * kStride; }

  // A query in the order in which a key's vectors come: each four lanes are neighbours there, too.
  void arrange(const bf16* from, bf16* to) const {
    std::memset(to, 0, 2 * q_width_);
    for (int64_t v = 0; v < q_width_ / 32; v++) {
      for (int lane = 0; lane < 16; lane += 4, to += 8) {
        const int64_t d = 2 * Pairs<KV>::pair(v, lane), left = dim_ - d;
        if (left >= 8) {
          std::memcpy(to, from + d, 16);
        } else if (left > 0) {
          std::memcpy(to, from + d, 2 * left);
        }
      }
    }
  }

  // body<R>() for as many rows as there are.
  template <int R = kMaxRows, class Body>
  void rows(const Body& body) const {
    if constexpr (R > 1) {
      if (view_.rows < R) return rows<R - 1>(body);
    }
    body.template operator()<R>();
  }

  // Keys of a block, as far as they are whole units.
  int run() const { return static_cast<int>(std::clamp<int64_t>(view_.call.block_size, kKeys, kSplit)) / kKeys * kKeys; }

  // body(key, head) in the order of the memory: of each block one head after the other.
  template <class Body>
  void each_unit(Span all, const Body& body) const {
    const int first = all.first_chunk() * kChunk, last = all.last_chunk() * kChunk;
    for (int from = first; from < last;) {
      const int to = std::min(last, (from / run() + 1) * run());
      for (int head = 0; head < heads_; head++)
        for (int key = from; key < to; key += kKeys) body(key, head);
      from = to;
    }
  }

  bool in_place(int key) const {
    return view_.call.block_size % kKeys == 0 && slots_[key] >= 0 && slots_[key + kKeys - 1] >= 0;
  }

  const char* address(const KV* cache, int64_t slot, int head) const {
    return reinterpret_cast<const char*>(cache + (slot + head * view_.call.head_stride) * dim_);
  }

  // Where each unit lies, in the order in which they are read, and where the next split begins.
  void list(int index, Span all) {
    const char** to = order_;
    for (const KV* cache : {view_.call.k, view_.call.v}) {
      each_unit(all, [&](int key, int head) { *to++ = address(cache, std::max<int64_t>(slots_[key], 0), head); });
    }
    std::fill_n(to, ahead_, to[-1]);
    if (index + 1 == view_.item.first_split + view_.item.splits) return;
    const int units = run() / kKeys;  // of a head, one after the other
    for (int i = 0; i < ahead_; i++) {
      const int head = i / units % heads_, key = (i / (units * heads_) * units + i % units) * kKeys;
      const int64_t slot = view_.slot((static_cast<int64_t>(index) + 1) * kSplit + key);
      if (slot >= 0) to[i] = address(view_.call.k, slot, head);
    }
  }

  // The unit that begins with this key; keys that no row sees are zeros.
  Unit unit(const KV* cache, int key, int head) const {
    const int64_t above = head * view_.call.head_stride;
    if (in_place(key)) return {cache + (slots_[key] + above) * dim_, view_.call.token_stride * dim_};
    for (int i = 0; i < kKeys; i++) {
      const int64_t slot = slots_[key + i];
      if (slot < 0) {
        std::memset(gathered_ + i * dim_, 0, dim_ * sizeof(KV));
      } else {
        std::memcpy(gathered_ + i * dim_, cache + (slot + above) * dim_, dim_ * sizeof(KV));
      }
    }
    return {gathered_, dim_};
  }

  // Asks for the p-th eighth of a unit, which is that only where a head's tokens lie together.
  void ask(const char* next, int p) const {
    for (int64_t line = lines_ * p / 8; line < lines_ * (p + 1) / 8; line++) prefetch_l1(next + 64 * line);
  }

  void ask_scales(int key, int head) const {
    if constexpr (sizeof(KV) == 1) {
      const int64_t at = std::max<int64_t>(slots_[key], 0) + head * view_.call.head_stride;
      prefetch_l1(view_.call.k_scale + at);
      prefetch_l1(view_.call.v_scale + at);
    }
  }

  template <int R>
  void products(int head, int key, Unit keys, const char* next) {
    const Pairs<KV> pairs{};
    for (int p = 0; p < kKeys / 2; p++) {
      ask(next, p);
      const KV *even = keys.base + 2 * p * keys.stride, *odd = even + keys.stride;
      const bf16* q = q_ + head * R * q_width_;
      __m512 acc[R][2];
      repeat<R>(SKYLINE_EACH(r) { acc[r][0] = acc[r][1] = _mm512_setzero_ps(); });
      for (int64_t d = 0; d < dim_; d += Pairs<KV>::kDims, q += Pairs<KV>::kDims) {
        __m512i a[Pairs<KV>::kVectors], b[Pairs<KV>::kVectors];
        pairs.line(even + d, dim_ - d, a);
        pairs.line(odd + d, dim_ - d, b);
        repeat<Pairs<KV>::kVectors>(SKYLINE_EACH(v) {
          repeat<R>(SKYLINE_EACH(r) {
            const __m512i x = _mm512_load_si512(q + r * q_width_ + 32 * v);
            acc[r][0] = dot(acc[r][0], x, a[v]);
            acc[r][1] = dot(acc[r][1], x, b[v]);
          });
        });
      }
      repeat<R>(SKYLINE_EACH(r) {
        _mm512_store_ps(lanes_ + 128 * r + 16 * p, _mm512_add_ps(_mm512_shuffle_f32x4(acc[r][0], acc[r][1], 0x44),
                                                                 _mm512_shuffle_f32x4(acc[r][0], acc[r][1], 0xEE)));
      });
    }
    repeat<R>(SKYLINE_EACH(r) { _mm512_store_ps(scores(head, r) + key, sum_lanes(lanes_ + 128 * r)); });
  }

  // Sums of 16 keys' lanes, which come as [pairs of keys][key of the pair][8 lanes], in the order of the lanes.
  static __m512 sum_lanes(const float* lanes) {
    __m512 low[4], high[4], each[8];
    for (int i = 0; i < 4; i++) {
      const __m512 a = _mm512_load_ps(lanes + 32 * i), b = _mm512_load_ps(lanes + 32 * i + 16);
      low[i] = _mm512_shuffle_f32x4(a, b, 0x88);
      high[i] = _mm512_shuffle_f32x4(a, b, 0xDD);
    }
    turn(low, each);
    turn(high, each + 4);
    for (int i = 1; i < 8; i++) each[0] = _mm512_add_ps(each[0], each[i]);
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), each[0]);
  }
  // to[i]: of each four lanes of the four vectors the i-th.
  static void turn(const __m512 (&from)[4], __m512* to) {
    const __m512d a = (__m512d)_mm512_unpacklo_ps(from[0], from[1]), b = (__m512d)_mm512_unpackhi_ps(from[0], from[1]);
    const __m512d c = (__m512d)_mm512_unpacklo_ps(from[2], from[3]), d = (__m512d)_mm512_unpackhi_ps(from[2], from[3]);
    to[0] = (__m512)_mm512_unpacklo_pd(a, c);
    to[1] = (__m512)_mm512_unpackhi_pd(a, c);
    to[2] = (__m512)_mm512_unpacklo_pd(b, d);
    to[3] = (__m512)_mm512_unpackhi_pd(b, d);
  }

  // Adds the values, weighted, in the order of the keys.
  template <int R>
  void mix(int head, int key, Unit values, const char* next) {
    constexpr int blocks = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // of 32 dimensions: no more accumulators than registers
    int64_t d = 0;
    for (; d + 32 * blocks <= width_; d += 32 * blocks) mix_dimensions<R, blocks>(head, key, values, next, d);
    for (; d < width_; d += 32) mix_dimensions<R, 1>(head, key, values, next, d);
  }
  template <int R, int D>
  void mix_dimensions(int head, int key, Unit values, const char* next, int64_t from) {
    const bf16* weights = reinterpret_cast<const bf16*>(scores(head, 0)) + key;
    const Pairs<KV> pairs{};
    float* to = mixed_ + head * R * width_ + from;
    __m512 acc[R][2 * D];
    repeat<R>(SKYLINE_EACH(r) { repeat<2 * D>(SKYLINE_EACH(v) { acc[r][v] = _mm512_load_ps(to + r * width_ + 16 * v); }); });
    for (int p = 0; p < kKeys / 2; p++) {
      if (from == 0) ask(next, p);
      const KV *even = values.base + 2 * p * values.stride + from, *odd = even + values.stride;
      __m512i x[R];
      repeat<R>(SKYLINE_EACH(r) { x[r] = spread_four(weights + r * 2 * kStride + 2 * p); });
      repeat<D>(SKYLINE_EACH(block) {
        __m512i low, high;
        pairs.values(even + 32 * block, odd + 32 * block, dim_ - from - 32 * block, low, high);
        repeat<R>(SKYLINE_EACH(r) {
          acc[r][2 * block] = dot(acc[r][2 * block], x[r], low);
          acc[r][2 * block + 1] = dot(acc[r][2 * block + 1], x[r], high);
        });
      });
    }
    repeat<R>(SKYLINE_EACH(r) { repeat<2 * D>(SKYLINE_EACH(v) { _mm512_store_ps(to + r * width_ + 16 * v, acc[r][v]); }); });
  }

  const View view_;
  const int64_t dim_, width_, q_width_;
  const int heads_;
  const Scoring scoring_;
  int64_t lines_;  // of a unit
  int ahead_;      // units
  bf16* q_;
  float *lanes_, *scores_, *mixed_, *k_scale_, *v_scale_;
  int64_t* slots_;
  const char** order_;
  RowSum* sums_;
  KV* gathered_;
};

}  // namespace skyline::attention

#endif
