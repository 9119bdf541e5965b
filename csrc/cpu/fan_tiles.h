// How fan_out.cpp traverses a grid of tokens: in tiles, whose sides are multiples of every pool; within a tile by
// level, where coarser cells are sums of finer ones; and within a level in groups of four cells.
#pragma once

#include "pyramid.h"

namespace mfwm::cpu {

inline int64_t smallest_prime(int64_t number) {
  int64_t prime = 2;
  while (number % prime) ++prime;
  return prime;
}

// The side of a tile: `pools`, the least common multiple of the pools, times the largest of 8, 4, 2 and 1 such that the
// tile divides the grid and, if that factor exceeds 1, has at most 8 tokens. Any subset of pools 1, 2, 4 and 8 then
// gives tiles of 8 on a grid of a multiple of 8 tokens, so sums over cells have the same order.
inline int64_t tile_side(int64_t pools, int64_t grid) {
  int64_t times = 8;
  while (times > 1 && (times * pools > 8 || grid % (times * pools))) times /= 2;
  return times * pools;
}

struct FanTiles {
  const int64_t positions, width;  // of hidden; width in tokens
  int64_t tall, wide;              // height and width of a tile, in tokens
  std::vector<Level> chain;        // level 0 is the tokens
  std::vector<size_t> level_of;    // horizon -> level
  int64_t tiles, groups, units;    // tiles and groups of tiles per position; units = groups of all positions

  explicit FanTiles(const FanOut& op) : positions(op.hidden.size[1]), width(op.hidden.size[3]) {
    // Include every prime step down to 1, so that a cell is summed in the same order whatever other horizons there are.
    std::vector<int64_t> pools{1};
    int64_t multiple = 1;
    for (int64_t pool : op.pool) {
      multiple = std::lcm(multiple, pool);
      for (; pool > 1; pool /= smallest_prime(pool)) pools.push_back(pool);
    }
    chain = chain_of(1, pools);
    for (int64_t pool : op.pool) level_of.push_back(index_of(chain, pool));
    tall = tile_side(multiple, op.hidden.size[2]);
    wide = tile_side(multiple, width);
    tiles = (op.hidden.size[2] / tall) * (width / wide);
    // Split a position into groups of tiles, so that few positions still occupy many threads. The number of groups
    // depends on shapes only, which keeps results independent of the number of threads.
    const int64_t all = op.hidden.size[0] * positions;
    groups = std::min(tiles, 1 + 63 / std::max<int64_t>(all, 1));
    units = all * groups;
  }

  // The location of a tile: its position and its first token.
  struct Place {
    int64_t b, n, y, x;
  };
  // Call body(tile, next tile) for the tiles of a unit. The tile after the last one is the first of the next unit, which
  // the same thread processes next in most cases (parallel_for).
  template <class Body>
  MFWM_INLINE void tiles_of(int64_t unit, const Body& body) const {
    const int64_t first = first_tile(unit), end = first_tile(unit + 1);
    for (int64_t tile = first; tile < end; ++tile) body(place(tile), place(std::min(tile + 1, first_tile(units) - 1)));
  }
  // Tiles are numbered through all positions.
  MFWM_INLINE int64_t first_tile(int64_t unit) const { return unit / groups * tiles + unit % groups * tiles / groups; }
  MFWM_INLINE Place place(int64_t tile) const {
    const int64_t position = tile / tiles, columns = width / wide, within = tile % tiles;
    return {position / positions, position % positions, within / columns * tall, within % columns * wide};
  }

  int64_t rows(size_t l) const { return tall / chain[l].factor; }
  int64_t columns(size_t l) const { return wide / chain[l].factor; }
  int64_t cells(size_t l) const { return rows(l) * columns(l); }

  // Neighbouring cells of a level. Cell c is at row y + c / across and column x + c % across of the tile's cells.
  struct Group {
    size_t level;
    int64_t y, x, across, down;
    MFWM_INLINE int64_t row(int c) const { return y + c / across; }
    MFWM_INLINE int64_t column(int c) const { return x + c % across; }
  };
  // Call body(number of cells as a constant, group) for each group of the level, row by row.
  template <class Body>
  MFWM_INLINE void groups_of(size_t l, const Body& body) const {
    const bool square = rows(l) % 2 == 0 && columns(l) % 2 == 0, line = !square && columns(l) % 4 == 0;
    const int64_t across = square ? 2 : line ? 4 : 1, down = square ? 2 : 1;
    for (int64_t y = 0; y < rows(l); y += down)
      for (int64_t x = 0; x < columns(l); x += across) {
        if (square || line)
          body(std::integral_constant<int, 4>{}, Group{l, y, x, across, down});
        else
          body(std::integral_constant<int, 1>{}, Group{l, y, x, across, down});
      }
  }
  // The group after `group`, and the tile it is in: `tile`, or `after` if `group` is the last of its tile.
  MFWM_INLINE std::pair<Group, Place> next(Group group, const Place& tile, const Place& after) const {
    group.x += group.across;
    if (group.x < columns(group.level)) return {group, tile};
    group.x = 0;
    group.y += group.down;
    if (group.y < rows(group.level)) return {group, tile};
    group.y = 0;
    return {group, after};
  }

  // The index of a group's cell c among the tile's cells of its level, and its offset in an array [B, T, y, x, D] of
  // cells.
  MFWM_INLINE int64_t index(const Group& group, int c) const {
    return group.row(c) * columns(group.level) + group.column(c);
  }
  MFWM_INLINE int64_t offset(const Array& array, const Place& tile, const Group& group, int c) const {
    const int64_t p = chain[group.level].factor, *stride = array.stride;
    return tile.b * stride[0] + tile.n * stride[1] + (tile.y / p + group.row(c)) * stride[2] +
           (tile.x / p + group.column(c)) * stride[3];
  }
};

}  // namespace mfwm::cpu
