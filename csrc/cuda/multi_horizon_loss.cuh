// Shared by the kernels of multi_horizon_loss: their parameters, losses, counts and sums, and the unit of work of a
// block or of a warp.
//
// Kernels with the template flag `general` serve every call. Without it they serve those whose horizons share one kind
// that is no distribution and that weigh neither motion nor positions, with fewer instructions.
#pragma once

#include <type_traits>

#include "strips.cuh"

namespace mfwm::cuda {

constexpr int max_horizons = 16, max_pairs = max_horizons * (max_horizons - 1) / 2;
constexpr int threads = 128, warps = threads / 32;

struct Horizon {
  Frames pred, gradient;  // gradient.data is null if the prediction needs no gradient
  int64_t offset;
  int factor, height, width;
  int level;  // factor = 2^level in patch_kernel
  int slot;   // the slot that accumulates the gradients of the pairs whose far side it is; -1: none
  int8_t next, pair;  // in strip_kernel: the next horizon of this level, and the pair with the nearest one; -1: none
  LossKind kind;
};

struct Pair {
  uint8_t near, far;
};

// A vector or a matrix of fp32 or fp64 weights.
struct Numbers {
  const void* data;
  DType dtype;
  int64_t step[2];
  __device__ float at(int i, int j) const { return load<float>(data, dtype, i * step[0] + j * step[1]); }
};

struct Parameters {
  Horizon horizons[max_horizons];
  Pair pairs[max_pairs];        // sorted by the far side's level, so that the near side is averaged step by step
  uint8_t order[max_horizons];  // sorted by level, stably, so that a pair's near side comes before its far side
  int count, pair_count, slots;
  Frames video;
  Array segment_ids, position_weights;
  Numbers horizon_weights, consistency_weights;
  int64_t batch, frames, positions;
  int64_t first_target, targets;  // the frames m to process: first_target .. first_target + targets - 1
  int channels, height, width, cells_y, cells_x, tiles;
  unsigned units;
  Divisor by_tiles, by_targets;
  Tiling tiling;             // of strip_kernel
  int frame_tiles;           // in strip_kernel
  int8_t first_at[levels];   // in strip_kernel: the first horizon of each level, -1: none
  bool channels_fastest, residual, near_learns, far_learns;
  LossKind kind;  // of every horizon, where `general` is false
  float scale, shift, delta, eps, motion_gain, beta;
  float loss_factor, derivative_factor;  // in strip_kernel
  // Null without segments and position weights: every position whose target frame exists counts.
  const int64_t* term_counts;
  float* partial;              // [terms, blocks]
};
static_assert(sizeof(Parameters) <= 4096, "CUDA limits kernel parameters to 4,096 bytes");

// The loss of a difference `d`; replaces d by the derivative.
template <LossKind kind>
__device__ __forceinline__ float loss_of(float& d, float delta, float eps) {
  const float difference = d, size = fabsf(d);
  if constexpr (kind == LossKind::mse) {
    d = 2 * difference;
    return difference * difference;
  } else if constexpr (kind == LossKind::l1) {
    d = difference > 0 ? 1.f : difference < 0 ? -1.f : difference;  // otherwise it is 0, or NaN, which must propagate
    return size;
  } else if constexpr (kind == LossKind::huber) {
    d = difference > delta ? delta : difference < -delta ? -delta : difference;
    return size > delta ? delta * (size - 0.5f * delta) : 0.5f * difference * difference;
  } else {
    const float root = sqrtf(difference * difference + eps * eps);
    d = difference / root;
    return root;
  }
}

__host__ __device__ constexpr bool is_distribution(LossKind kind) {
  return kind == LossKind::gaussian || kind == LossKind::laplace;
}

// The kind that compares the means of two predictions.
__device__ __forceinline__ LossKind kind_of_means(LossKind kind) {
  return kind == LossKind::gaussian ? LossKind::mse : kind == LossKind::laplace ? LossKind::l1 : kind;
}

// The negative log-likelihood of a difference `d` from the mean under a distribution of log-scale `s`; replaces both by
// the derivatives. A NaN must propagate, but fminf and fmaxf drop it. __expf takes fewer instructions than expf, and
// its relative error is at most 1e-6 up to the limit.
template <LossKind kind>
__device__ __forceinline__ float loss_of_distribution(float& d, float& s, float beta) {
  constexpr float limit = 10;
  const float difference = d, log_scale = isnan(s) ? s : fminf(fmaxf(s, -limit), limit);
  const bool is_inside = log_scale == s;
  const float inverse = __expf(-log_scale);
  if constexpr (kind == LossKind::gaussian) {
    const float weight = beta == 0 ? 1.f : __expf(beta * log_scale), square = difference * difference * inverse;
    d = weight * difference * inverse;
    s = is_inside ? 0.5f * weight * (1 - square) : 0.f;
    return 0.5f * weight * (log_scale + square);
  } else {
    const float size = fabsf(difference) * inverse;
    d = difference > 0 ? inverse : difference < 0 ? -inverse : difference * inverse;
    s = is_inside ? 1 - size : 0.f;
    return log_scale + size;
  }
}

// Call body(kind) with the kind as a compile-time constant.
template <bool general, class Body>
__device__ __forceinline__ float with_kind(LossKind kind, const Body& body) {
  if constexpr (general) {
    if (kind == LossKind::gaussian) return body(std::integral_constant<LossKind, LossKind::gaussian>{});
    if (kind == LossKind::laplace) return body(std::integral_constant<LossKind, LossKind::laplace>{});
  }
  switch (kind) {
    case LossKind::mse: return body(std::integral_constant<LossKind, LossKind::mse>{});
    case LossKind::l1: return body(std::integral_constant<LossKind, LossKind::l1>{});
    case LossKind::huber: return body(std::integral_constant<LossKind, LossKind::huber>{});
    default: return body(std::integral_constant<LossKind, LossKind::charbonnier>{});
  }
}

__device__ __forceinline__ int64_t segment_at(const Array& segments, int64_t b, int64_t t) {
  const int64_t at = b * segments.stride[0] + t * segments.stride[1];
  return segments.dtype == DType::int32 ? static_cast<const int32_t*>(segments.data)[at]
                                        : static_cast<const int64_t*>(segments.data)[at];
}

// The weight of the prediction that horizon i makes at position n.
template <class C>
__device__ __forceinline__ C position_weight_at(const Array& weights, int64_t b, int64_t n, int i) {
  return load<C>(weights.data, weights.dtype, b * weights.stride[0] + n * weights.stride[1] + i * weights.stride[2]);
}

// Compares in fp64, because a small fp64 weight would be 0 in fp32.
__device__ __forceinline__ bool has_weight(const Array& weights, int64_t b, int64_t n, int i) {
  return weights.rank < 0 || position_weight_at<double>(weights, b, n, i) > 0;
}

// The far side of a term is at position n, its near side at n + distance. A horizon is treated as a pair with itself.
struct Span {
  int near, far;
  int64_t distance, elements;  // elements: of one frame of the far side
};

__device__ __forceinline__ Span span_of(const Parameters& p, int term) {
  const auto itself = static_cast<uint8_t>(term);
  const Pair pair = term < p.count ? Pair{itself, itself} : p.pairs[term - p.count];
  const Horizon& far = p.horizons[pair.far];
  return {pair.near, pair.far, far.offset - p.horizons[pair.near].offset, int64_t(p.channels) * far.height * far.width};
}

__device__ __forceinline__ int64_t count_of(const Parameters& p, int term) {
  if (p.term_counts) return p.term_counts[term];
  const Span span = span_of(p, term);
  const int64_t inside = min(p.positions - span.distance, p.frames - p.horizons[span.far].offset);
  return inside > 0 ? p.batch * inside * span.elements : 0;
}

__device__ __forceinline__ float inverse_count(const Parameters& p, int term) {
  const int64_t count = count_of(p, term);
  return count > 0 ? 1.f / static_cast<float>(count) : 0.f;
}

__device__ __forceinline__ float weight_of(const Parameters& p, int term) {
  if (term < p.count) return p.horizon_weights.at(term, 0);
  const Pair pair = p.pairs[term - p.count];
  return p.consistency_weights.at(pair.near, pair.far);
}

// A block's shared memory: the coefficient of each term in the gradient, and a column per thread with its sums of the
// terms and then its slots. A thread accesses only its own column until write_sums, so the columns need no barrier.
struct BlockSums {
  float* coefficients;
  float* column;

  __device__ explicit BlockSums(const Parameters& p) : coefficients(dynamic_shared<float>()) {
    const int terms = p.count + p.pair_count;
    column = coefficients + terms + threadIdx.x;
    for (int term = threadIdx.x; term < terms; term += threads)
      coefficients[term] = weight_of(p, term) * inverse_count(p, term);
    for (int k = 0; k < terms + p.slots; ++k) column[k * threads] = 0;
    __syncthreads();
  }
  __device__ float& sum(int term) { return column[term * threads]; }

  __device__ void write_sums(const Parameters& p) {
    const int lane = threadIdx.x % 32, terms = p.count + p.pair_count;
    __syncthreads();
    for (int term = threadIdx.x / 32; term < terms; term += warps) {
      float sum = 0;
      for (int k = lane; k < threads; k += 32) sum += coefficients[terms + term * threads + k];
      sum = warp_sum(sum);
      if (lane == 0) p.partial[int64_t(term) * gridDim.x + blockIdx.x] = sum;
    }
  }
};

// A unit of work: a tile of frame m of clip b. A horizon's bit in `active` says that it has a position that predicts m;
// its bit in `counted`, that this prediction also has a loss.
struct Work {
  int64_t b, m;
  int tile;
  unsigned active = 0, counted = 0;

  __device__ Work(const Parameters& p, unsigned unit) {
    const unsigned frame = p.by_tiles.quotient(unit), clip = p.by_targets.quotient(frame);
    tile = static_cast<int>(unit - frame * p.by_tiles.divisor);
    b = clip;
    m = p.first_target + (frame - clip * p.by_targets.divisor);
    for (int i = 0; i < p.count; ++i)
      active |= unsigned(static_cast<uint64_t>(m - p.horizons[i].offset) < static_cast<uint64_t>(p.positions)) << i;
    if (m >= p.frames) return;
    counted = active;
    if (p.segment_ids.rank < 0) return;
    for (int i = 0; i < p.count; ++i)
      if (is_active(i) && segment_at(p.segment_ids, b, m - p.horizons[i].offset) != segment_at(p.segment_ids, b, m))
        counted &= ~(1u << i);
  }
  // Predictions without weight do not count.
  __device__ void drop_weightless(const Parameters& p) {
    for (int i = 0; i < p.count; ++i)
      if (is_counted(i) && !has_weight(p.position_weights, b, m - p.horizons[i].offset, i)) counted &= ~(1u << i);
  }
  // False for horizon -1.
  __device__ bool is_active(int i) const { return active >> (i & 31) & 1; }
  __device__ bool is_counted(int i) const { return counted >> (i & 31) & 1; }
};

// ---- Host code: each function launches its kernel and returns the number of blocks, which the finish kernel needs, or
// no_blocks if the kernel does not serve the call.

constexpr int64_t no_blocks = -1;

// What the functions choose by, beside the parameters.
struct Choice {
  const MultiHorizonLoss& op;
  bool general;           // see above
  bool powers_of_2;       // the factors are 1, 2, 4 or 8
  bool channels_fastest;  // in memory
};

int64_t run_strips(Parameters& p, const Choice& choice, int64_t max_blocks, cudaStream_t stream);
int64_t run_patches(Parameters& p, const Choice& choice, int64_t max_blocks, cudaStream_t stream);
int64_t run_gather(Parameters& p, const Choice& choice, int64_t max_blocks, cudaStream_t stream);

// Divide each frame into tiles. Returns the units of work, a tile of a frame each.
inline int64_t divide(Parameters& p, int64_t tiles) {
  const int64_t units = p.positions == 0 ? 0 : p.batch * p.targets * tiles, limit = int64_t(1) << 31;
  const int64_t elements = int64_t(p.channels) * p.height * p.width;
  if (elements >= limit || units >= limit)
    throw std::invalid_argument("multi_horizon_loss: a frame of video must have fewer than 2**31 elements, all frames "
                                "fewer than 2**31 tiles; they have " + std::to_string(elements) + " and " +
                                std::to_string(units));
  p.tiles = static_cast<int>(tiles);
  p.units = static_cast<unsigned>(units);
  if (units > 0) p.by_tiles = divisor_of(tiles), p.by_targets = divisor_of(p.targets);
  return units;
}

// Of BlockSums.
inline size_t shared_bytes_of(const Parameters& p) {
  const size_t terms = p.count + p.pair_count;
  return (terms + (terms + p.slots) * threads) * sizeof(float);
}

}  // namespace mfwm::cuda
