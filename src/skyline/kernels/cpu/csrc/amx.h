// Tiles, as GCC has to be told about them: its intrinsics claim neither to read nor to write memory.
#pragma once

#if defined(__AMX_TILE__)

#include <immintrin.h>

#include <cstdint>

namespace skyline {

// What was written before it can be loaded into tiles after it, and tiles stored before it can be read.
inline void tile_fence() { __asm__ volatile("" ::: "memory"); }

// The shapes of the eight tiles (Intel SDM, LDTILECFG): bytes of a row, up to 64, and rows, up to 16.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t height, int64_t width = 64) {
    bytes[tile] = static_cast<uint16_t>(width);
    rows[tile] = static_cast<uint8_t>(height);
  }
  void load() const {
    tile_fence();  // the intrinsic claims to read no more than 8 bytes
    _tile_loadconfig(this);
  }
};

}  // namespace skyline

#endif
