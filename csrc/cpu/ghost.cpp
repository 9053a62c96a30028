// Positions go by panels of eight, widened to float64 once. A pair of tiles is a matrix of products of x, kept in the
// nearest caches, shifted and added where a kernel has several taps; one of products of b for every pair of tasks; and
// the sum of their elementwise product over the positions of each pair of rows. Only positions p <= s are multiplied,
// p = s by half: G = sums + sumsᵀ.

#include "ghost.h"

#include <algorithm>
#include <utility>

namespace mtu_fast::cpu {
namespace {

constexpr int64_t TILE = 96;    // positions or pixels of several images
constexpr int64_t LARGE = 192;  // the same where there are
constexpr int64_t MANY = 2048;  // so many: panels are read less often, and tiles enough are left for all threads
constexpr int64_t MOST = 256;   // pixels of one box
constexpr int64_t SLACK = 4 * LANES;  // read beyond the end, not used

int64_t offset(const Block& block, int64_t image, const Sizes& at) {
  int64_t n = image / block.size[1] * block.stride[0] + image % block.size[1] * block.stride[1];
  for (size_t a = 0; a < at.size(); ++a) n += at[a] * block.stride[3 + a];
  return n;
}

void append(Panels& side, int64_t first, int64_t images, const std::vector<Sizes>& places) {
  for (int64_t image = first; image < first + images; ++image) {
    for (const Sizes& at : places) side.offset.push_back(offset(*side.block, image, at));
  }
  side.offset.resize(round_up(side.offset.size(), LANES), -1);
}

Sizes axes(const Block& block) { return {block.size.begin() + 3, block.size.end()}; }

struct Buffer {
  std::unique_ptr<Line[]> lines;

  explicit Buffer(int64_t size) : lines(new Line[round_up(size, LANES) / LANES]) {}
  double* data() { return lines[0].lane; }
};

}  // namespace

// ---- tiles ----------------------------------------------------------------------------------------------------------

Ghost::Ghost(std::vector<Family> families, const Walk& walk) : families_(std::move(families)) {
  int64_t positions = 0;
  for (const Family& family : families_) {
    boxes_.push_back(boxes(walk, axes(family.x), axes(family.b[0]), MOST));
    const int64_t images = family.x.size[0] * family.x.size[1];
    for (const Box& box : boxes_.back()) positions += images * std::max(box.pixels.size(), box.positions.size());
  }
  tile_ = positions < MANY ? TILE : LARGE;
  for (const Family& family : families_) {
    first_side_.push_back(sides_.size());
    sides_.push_back({&family.x, family.x.size[2], {}, nullptr});
    for (const Block& b : family.b) sides_.push_back({&b, b.size[2], {}, nullptr});
    add_tiles(first_side_.size() - 1);
  }
  for (Panels& side : sides_) {
    side.lines.reset(new Line[side.count() * side.channels + 1]);
    panels_ += side.count();
  }
  int64_t sums = 0;
  const int64_t tiles = tiles_.size();
  for (int64_t i = 0; i < tiles; ++i) {
    for (int64_t j = i; j < tiles; ++j) {
      pairs_.push_back({i, j, sums});
      const Tile &left = tiles_[i], &right = tiles_[j];
      sums += families_[left.family].b.size() * families_[right.family].b.size() * left.rows * right.rows;
    }
  }
  sums_.assign(sums, 0.0);
}

void Ghost::add_tiles(int64_t family) {
  const Block& x = families_[family].x;
  const int64_t images = x.size[0] * x.size[1], frames = x.size[1];
  Panels* sides = sides_.data() + first_side_[family];
  for (size_t n = 0; n < boxes_[family].size(); ++n) {
    const Box& box = boxes_[family][n];
    const int64_t pixels = box.pixels.size(), positions = box.positions.size();
    const int64_t together = std::max<int64_t>(1, tile_ / std::max(pixels, positions));
    for (int64_t first = 0; first < images; first += together) {
      const int64_t count = std::min(together, images - first), row = first / frames;
      Tile tile{family, int64_t(n), count, count * pixels, count * positions, sides[0].count(), sides[1].count(), row,
                (first + count - 1) / frames - row + 1, {}};
      for (int64_t image = first; image < first + count; ++image) {
        tile.row.insert(tile.row.end(), positions, image / frames - row);
      }
      append(sides[0], first, count, box.pixels);
      for (size_t b = 1; b <= families_[family].b.size(); ++b) append(sides[b], first, count, box.positions);
      tiles_.push_back(std::move(tile));
    }
  }
}

int64_t Ghost::work() const {
  if (tiles_.empty()) return 1;
  const Tile& tile = tiles_[0];
  const Family& family = families_[tile.family];
  const int64_t tasks = family.b.size();
  return tile.pixels * tile.pixels * family.x.size[2] +
         tasks * tasks * tile.positions * tile.positions * family.b[0].size[2];
}

void Ghost::widen(int64_t begin, int64_t end) {
  for (Panels& side : sides_) {
    for (int64_t panel = std::max<int64_t>(begin, 0); panel < std::min(end, side.count()); ++panel) {
      products().widen(side, panel);
    }
    begin -= side.count();
    end -= side.count();
  }
}

// ---- pairs of tiles -------------------------------------------------------------------------------------------------

struct Ghost::Scratch {
  Buffer x, b, spread;       // products of positions after the shift; products; products in padded boxes
  int64_t spread_size, laid_out = -1;  // the tile whose padding `spread` holds
  std::vector<double> line;
  std::vector<const double*> taps;
};

void Ghost::multiply(int64_t begin, int64_t end) {
  int64_t size = 0, pixels = 0, padded = 0, span = 0;
  for (const Tile& tile : tiles_) {
    size = std::max({size, round_up(tile.pixels, LANES), round_up(tile.positions, LANES)});
    if (box(tile).plain) continue;
    pixels = std::max(pixels, tile.pixels);
    padded = std::max(padded, tile.images * box(tile).padded);
    span = std::max(span, box(tile).span);
  }
  if (padded > 0) {
    for (const Tile& tile : tiles_) pixels = std::max(pixels, tile.pixels);
  }
  const int64_t spread = pixels * padded + SLACK;
  Scratch scratch{Buffer(size * size), Buffer(size * size), Buffer(spread), spread, -1, {}, {}};
  scratch.line.resize(span + SLACK);
  for (int64_t n = begin; n < end; ++n) multiply(pairs_[n], scratch);
}

void Ghost::multiply(const Pair& pair, Scratch& scratch) {
  const Tile &left = tiles_[pair.left], &right = tiles_[pair.right];
  const bool diagonal = pair.left == pair.right;
  const int64_t ld = round_up(left.positions, LANES), width = round_up(right.positions, LANES);
  const auto matrix = [](const Panels& side, int64_t panel, int64_t count) {
    return Matrix{side, panel, round_up(count, LANES) / LANES};
  };
  const bool plain = box(left).plain && box(right).plain;
  products().multiply(matrix(side(left.family, 0), left.pixel_panel, left.pixels),
                     matrix(side(right.family, 0), right.pixel_panel, right.pixels), diagonal,
                     (plain ? scratch.x : scratch.b).data(), round_up(left.pixels, LANES));
  if (!plain) add_patches(left, right, diagonal, scratch);
  double* x = scratch.x.data();
  for (int64_t s = 0; diagonal && s < width; ++s) {
    x[s * ld + s] *= 0.5;
    std::fill(x + s * ld + s + 1, x + s * ld + round_up(s + 1, LANES), 0.0);
  }
  double* sums = sums_.data() + pair.sums;
  for (size_t i = 1; i <= families_[left.family].b.size(); ++i) {
    for (size_t j = 1; j <= families_[right.family].b.size(); ++j, sums += left.rows * right.rows) {
      products().multiply(matrix(side(left.family, i), left.position_panel, left.positions),
                         matrix(side(right.family, j), right.position_panel, right.positions), diagonal,
                         scratch.b.data(), ld);
      products().sum(x, scratch.b.data(), ld, {left.row, right.row, right.rows}, diagonal, sums);
    }
  }
}

// Products of pixels [right][left] -> products of patches, the same for all pairs of tasks.
void Ghost::add_patches(const Tile& left, const Tile& right, bool diagonal, Scratch& scratch) const {
  const Box &mine = box(left), &theirs = box(right);
  const int64_t key = &left - tiles_.data(), pitch = left.images * mine.padded, ld = round_up(left.pixels, LANES);
  const int64_t pixels = mine.pixels.size(), positions = mine.positions.size(), taps = mine.shift.size();
  double* spread = scratch.spread.data();
  if (scratch.laid_out != key) std::fill(spread, spread + scratch.spread_size, 0.0);
  scratch.laid_out = key;
  for (int64_t s = 0; s < right.pixels; ++s) {
    for (int64_t image = 0; image < left.images; ++image) {
      const double* from = scratch.b.data() + s * ld + image * pixels;
      double* to = spread + s * pitch + image * mine.padded;
      for (const Segment& part : mine.spread) {
        for (int64_t l = 0; l < part.length; ++l) to[part.to + l] = from[part.from + l];
      }
    }
  }
  const int64_t height = round_up(left.positions, LANES), stops = theirs.positions.size();
  const auto add = products().add;
  for (int64_t s = 0; s < right.positions; ++s) {
    const int64_t image_s = s / stops;
    for (int64_t image = 0; image < left.images && !(diagonal && image > image_s); ++image) {
      scratch.taps.clear();
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t pixel = theirs.pixel[s % stops * taps + t];
        if (pixel < 0) continue;
        const int64_t column = image_s * static_cast<int64_t>(theirs.pixels.size()) + pixel;
        scratch.taps.push_back(spread + column * pitch + image * mine.padded + mine.shift[t]);
      }
      add(scratch.taps.data(), scratch.taps.size(), mine.span, scratch.line.data());
      double* to = scratch.x.data() + s * height + image * positions;
      for (const Segment& part : mine.gather) {
        for (int64_t l = 0; l < part.length; ++l) to[part.to + l] = scratch.line[part.from + l];
      }
    }
  }
}

void Ghost::write(double* gram, int64_t rows) const {
  std::fill(gram, gram + rows * rows, 0.0);
  for (const Pair& pair : pairs_) {
    const Tile &left = tiles_[pair.left], &right = tiles_[pair.right];
    const double* sums = sums_.data() + pair.sums;
    for (int64_t top : families_[left.family].start) {
      for (int64_t start : families_[right.family].start) {
        for (int64_t r = 0; r < left.rows; ++r) {
          double* to = gram + (top + left.first_row + r) * rows + start + right.first_row;
          for (int64_t q = 0; q < right.rows; ++q) to[q] += *sums++;
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i; j < rows; ++j) {
      gram[i * rows + j] = gram[j * rows + i] = gram[i * rows + j] + gram[j * rows + i];
    }
  }
}

}  // namespace mtu_fast::cpu
