// How fan_out goes through a grid of tokens: tiles, whose sides are multiples of every pool, the levels of cells in a tile
// (coarser cells being made of finer ones), and the cells of a level in groups of four.
#pragma once

#include "pyramid.h"

namespace mfwm::cpu {

inline int64_t smallest_prime(int64_t number) {
  int64_t prime = 2;
  while (number % prime) ++prime;
  return prime;
}

// The side of a tile: `pools`, the least common multiple of the pools, times the largest of 8, 4 and 2 that keeps it at 8
// tokens and divides the grid's. It is then 8 whichever of pools 1, 2, 4 and 8 there are, so that sums over cells have one
// order.
inline int64_t tile_side(int64_t pools, int64_t grid) {
  int64_t times = 8;
  while (times > 1 && (times * pools > 8 || grid % (times * pools))) times /= 2;
  return times * pools;
}

struct FanTiles {
  const int64_t positions, width;    // of hidden; width in tokens
  int64_t tall, wide;                // of a tile, in tokens
  std::vector<Level> chain;          // the first level is the tokens
  std::vector<size_t> level_of;      // horizon -> level
  int64_t tiles, groups, units;      // of a position: tiles, in groups; units: groups of all positions

  explicit FanTiles(const FanOut& op) : positions(op.hidden.size[1]), width(op.hidden.size[3]) {
    // With every step down to 1 in the chain a cell is summed in one order, whichever other horizons there are.
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
    // Groups, so that few positions still occupy many threads. Shapes alone decide.
    const int64_t all = op.hidden.size[0] * positions;
    groups = std::min(tiles, 1 + 63 / std::max<int64_t>(all, 1));
    units = all * groups;
  }

  // A tile: its position and its first token.
  struct Place {
    int64_t b, n, y, x;
  };
  // body(tile, the next one) for the tiles of a unit
  template <class Body>
  MFWM_INLINE void tiles_of(int64_t unit, const Body& body) const {
    const int64_t position = unit / groups, group = unit % groups, columns = width / wide;
    const auto place = [&](int64_t tile) {
      return Place{position / positions, position % positions, tile / columns * tall, tile % columns * wide};
    };
    const int64_t end = (group + 1) * tiles / groups;
    for (int64_t tile = group * tiles / groups; tile < end; ++tile) body(place(tile), place(std::min(tile + 1, end - 1)));
  }

  int64_t rows(size_t l) const { return tall / chain[l].factor; }
  int64_t columns(size_t l) const { return wide / chain[l].factor; }
  int64_t cells(size_t l) const { return rows(l) * columns(l); }

  // Neighbouring cells of a level, from y, x of the tile; cell c lies at y + c / across, x + c % across.
  struct Group {
    size_t level;
    int64_t y, x, across, down;
    MFWM_INLINE int64_t row(int c) const { return y + c / across; }
    MFWM_INLINE int64_t column(int c) const { return x + c % across; }
  };
  // body(number of cells as a constant, group), row after row
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
  // The group after that one, and its tile.
  MFWM_INLINE std::pair<Group, Place> next(Group group, const Place& tile, const Place& after) const {
    group.x += group.across;
    if (group.x < columns(group.level)) return {group, tile};
    group.x = 0;
    group.y += group.down;
    if (group.y < rows(group.level)) return {group, tile};
    group.y = 0;
    return {group, after};
  }

  // Where cell c of a group lies among its level's in the tile, and in an array [B, T, y, x, D] of the level's cells.
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
