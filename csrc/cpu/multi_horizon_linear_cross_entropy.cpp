// multi_horizon_linear_cross_entropy on the CPU, without its matrix products, which torch computes: the losses of a
// chunk of rows of logits, and the logits' gradients, written over the logits. A row is converted once and then stays
// in cache. bindings.cpp calls the functions at the end.
#include <cmath>
#include <limits>

#include "common.h"

namespace mfwm::cpu {
namespace {

// Rows per unit of work.
constexpr int64_t unit_rows = 8;

// exp(x) for x <= 0, without branches: a power of 2, with one constant for the conversion. Rounding that constant costs
// a relative error of |x| 2^-24, which is negligible next to the row's largest value, exp(0). NaN stays NaN.
MFWM_INLINE float exp_of(float x) {
  float y = x * 1.44269504088896341f;
  y = y < -126.0f ? -126.0f : y;
  const int32_t whole = static_cast<int32_t>(y - 0.5f);
  const float f = y - static_cast<float>(whole);
  // 2^f on [-1/2, 1/2], relative error 2^-27 before rounding.
  float p = 1.535336188319500e-4f;
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return as_float(as_bits(p) + (static_cast<uint32_t>(whole) << 23));
}
MFWM_INLINE double exp_of(double x) { return std::exp(x); }

// tanh(x), by an odd polynomial near 0, where 1 - 2 / (exp(2 x) + 1) would cancel.
MFWM_INLINE float tanh_of(float x) {
  const float size = std::fabs(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = x + x * square * p;
  const float e = exp_of(-2 * size), large = std::copysign((1 - e) / (1 + e), x);
  // Select by bits, because the compiler turns ?: into a branch.
  const uint32_t is_small = -static_cast<uint32_t>(size < 0.625f);
  return as_float((as_bits(small) & is_small) | (as_bits(large) & ~is_small));
}
MFWM_INLINE double tanh_of(double x) { return std::tanh(x); }

// The largest of `count` elements, which must fill whole cache lines.
template <class C>
MFWM_INLINE C largest_of(const C* from, int64_t count) {
  using L = Lanes<C>;
  typename L::type largest = L::load(from);
  for (int64_t k = L::count; k < count; k += L::count) {
    const typename L::type next = L::load(from + k);
    largest = next > largest ? next : largest;
  }
  C result = largest[0];
  for (int64_t k = 1; k < L::count; ++k) result = std::max<C>(result, largest[k]);
  return result;
}

// The sum of many terms: in C within pieces of 2048, in double over the pieces.
template <class C, class Term>
MFWM_INLINE double long_sum(int64_t count, const Term& term) {
  constexpr int64_t piece = 2048;
  double total = 0;
  for (int64_t first = 0; first < count; first += piece) {
    const auto shifted = [=](int64_t k) __attribute__((always_inline)) { return term(first + k); };
    total += static_cast<double>(sum_of<C>(std::min(piece, count - first), shifted));
  }
  return total;
}

// The softmax of one row of logits.
template <class C>
struct Softmax {
  C *logits, *powers;                      // the softcapped logits, and exp(logits - largest)
  C largest = 0, sum = 1, normaliser = 0;  // `sum` adds up the powers; normaliser is the log of the sum of exp(logits)
};

// Loads rows of logits and stores their gradients.
template <class C>
struct Rowwise {
  int64_t vocabulary, row;  // row: `vocabulary` rounded up to whole cache lines
  C softcap;

  // The logits, plus `bias` unless it is null.
  MFWM_INLINE void read(C* __restrict z, const Array& from, int64_t r, int64_t group, const C* __restrict bias) const {
    load_row(z, from.data, from.dtype, r * from.stride[0] + group * vocabulary, 1, vocabulary);
    if (bias)
      for (int64_t k = 0; k < vocabulary; ++k) z[k] += bias[k];
    std::fill(z + vocabulary, z + row, std::numeric_limits<C>::lowest());
  }

  // The first of the largest logits. It is in range even if logits are NaN.
  MFWM_INLINE int32_t argmax(const C* z) const {
    const C largest = largest_of<C>(z, row);
    int64_t k = 0;
    while (k + 1 < vocabulary && z[k] < largest) ++k;
    return static_cast<int32_t>(k);
  }

  MFWM_INLINE void normalise(Softmax<C>& to) const {
    C* __restrict z = to.logits;
    C* __restrict e = to.powers;
    if (softcap > 0) {
      const C cap = softcap, inverse = 1 / softcap;
      for (int64_t k = 0; k < vocabulary; ++k) z[k] = cap * tanh_of(z[k] * inverse);
    }
    const C largest = largest_of<C>(z, row);
    for (int64_t k = 0; k < vocabulary; ++k) e[k] = exp_of(z[k] - largest);
    const double sum = long_sum<C>(vocabulary, [=](int64_t k) __attribute__((always_inline)) { return e[k]; });
    to.largest = largest;
    to.sum = static_cast<C>(sum);
    to.normaliser = largest + static_cast<C>(std::log(sum));
  }

  MFWM_INLINE void load(Softmax<C>& to, const Array& from, int64_t r, int64_t group, const Array& bias) const {
    read(to.logits, from, r, group, bias ? static_cast<const C*>(bias.data) + group * vocabulary : nullptr);
    normalise(to);
  }

  // Turn the gradient at softcapped logits z into the gradient at the logits, and write it over the logits.
  MFWM_INLINE void store(C* __restrict gradient, const C* __restrict z, const Array& to, int64_t r,
                         int64_t group) const {
    if (softcap > 0) {
      const C inverse = 1 / softcap;
      for (int64_t k = 0; k < vocabulary; ++k) gradient[k] *= 1 - (z[k] * inverse) * (z[k] * inverse);
    }
    store_row(gradient, to.data, to.dtype, r * to.stride[0] + group * vocabulary, 1, vocabulary);
  }
};

// ---- Cross-entropy: the target of an entry is the mean of its ids. Entries of a row share its softmax

template <class C>
struct CrossEntropy {
  const MultiHorizonLinearCrossEntropy& op;
  const int64_t vocabulary = op.logits.size[1];
  const Rowwise<C> rowwise{vocabulary, padded<C>(vocabulary), static_cast<C>(op.softcap)};

  static MFWM_INLINE int64_t valid_of(const int32_t* cell, int64_t ids) {
    return std::count_if(cell, cell + ids, [](int32_t id) { return id >= 0; });
  }

  // The most frequent id of a cell; the smallest of them in a tie.
  static MFWM_INLINE int32_t most_frequent(const int32_t* cell, int64_t ids) {
    int32_t best = -1;
    int64_t best_count = 0;
    for (int64_t j = 0; j < ids; ++j) {
      if (cell[j] < 0) continue;
      const int64_t count = std::count(cell, cell + ids, cell[j]);
      if (count > best_count || (count == best_count && cell[j] < best)) best = cell[j], best_count = count;
    }
    return best;
  }

  MFWM_SIMD void rows(int64_t begin, int64_t end, C* scratch) const {
    const C smooth = static_cast<C>(op.label_smoothing), z_loss = static_cast<C>(op.z_loss);
    const int32_t* all_ids = static_cast<const int32_t*>(op.ids.data);
    Softmax<C> softmax{scratch, scratch + rowwise.row};
    C* __restrict e = softmax.powers;
    const C* __restrict z = softmax.logits;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = r * op.entries, last = first + op.entries;
      const int64_t* starts = static_cast<const int64_t*>(op.starts.data);
      const C* bias = nullptr;
      if (op.biases)
        bias = static_cast<const C*>(op.biases.data) + static_cast<const int32_t*>(op.bias_rows.data)[r] * vocabulary;
      const bool counts =
          std::any_of(all_ids + starts[first], all_ids + starts[last], [](int32_t id) { return id >= 0; });
      if (counts || op.predictions) rowwise.read(softmax.logits, op.logits, r, 0, bias);
      if (op.predictions) static_cast<int32_t*>(op.predictions.data)[r] = rowwise.argmax(z);
      if (!counts) {
        std::fill(static_cast<C*>(op.losses.data) + first, static_cast<C*>(op.losses.data) + last, C(0));
        if (op.hits) std::fill(static_cast<int32_t*>(op.hits.data) + first, static_cast<int32_t*>(op.hits.data) + last, 0);
        std::fill(e, e + vocabulary, C(0));
        if (op.gradients) store_row(e, op.logits.data, op.logits.dtype, r * op.logits.stride[0], 1, vocabulary);
        continue;
      }
      rowwise.normalise(softmax);
      const C log_sum = softmax.normaliser;
      C mean = 0;
      if (smooth > 0) {
        const double sum = long_sum<C>(vocabulary, [=](int64_t k) __attribute__((always_inline)) { return z[k]; });
        mean = static_cast<C>(sum / static_cast<double>(vocabulary));
      }
      C scale = 0;  // the sum of the scales of the entries that count
      for (int64_t x = first; x < last; ++x) {
        const int32_t* cell = all_ids + starts[x];
        const int64_t ids = starts[x + 1] - starts[x], valid = valid_of(cell, ids);
        C& loss = static_cast<C*>(op.losses.data)[x];
        loss = 0;
        if (op.hits) static_cast<int32_t*>(op.hits.data)[x] = 0;
        if (valid == 0) continue;
        C target_sum = 0;
        for (int64_t j = 0; j < ids; ++j)
          if (cell[j] >= 0) target_sum += z[cell[j]];
        loss = (1 - smooth) * (log_sum - target_sum / static_cast<C>(valid)) + z_loss * log_sum * log_sum;
        if (smooth > 0) loss += smooth * (log_sum - mean);
        if (op.hits) {
          const int32_t target = most_frequent(cell, ids);
          static_cast<int32_t*>(op.hits.data)[x] =
              z[target] == softmax.largest && std::find(z, z + target, softmax.largest) == z + target;
        }
        scale += static_cast<const C*>(op.scales.data)[x];
      }
      if (op.gradients) {
        const C factor = scale * (1 + 2 * z_loss * log_sum) / softmax.sum;
        const C shift = scale * smooth / static_cast<C>(vocabulary);
        for (int64_t k = 0; k < vocabulary; ++k) e[k] = e[k] * factor - shift;
        for (int64_t x = first; x < last; ++x) {
          const int32_t* cell = all_ids + starts[x];
          const int64_t ids = starts[x + 1] - starts[x];
          const C each = (1 - smooth) * static_cast<const C*>(op.scales.data)[x] /
                         static_cast<C>(std::max<int64_t>(valid_of(cell, ids), 1));
          for (int64_t j = 0; j < ids; ++j)
            if (cell[j] >= 0) e[cell[j]] -= each;
        }
        rowwise.store(e, z, op.logits, r, 0);
      }
    }
  }

  void run() const {
    const int64_t count = op.logits.size[0];
    parallel_for<C>(op.threads, (count + unit_rows - 1) / unit_rows, 2 * rowwise.row, [&](int64_t unit, C* scratch) {
      rows(unit * unit_rows, std::min(count, (unit + 1) * unit_rows), scratch);
    });
  }
};

// ---- Consistency: the cross-entropy of far cells against the mean distribution of their near cells

template <class C>
struct Consistency {
  const MultiHorizonLinearConsistency& op;
  const int64_t cells = op.far.size[0], covered = op.near.size[0] / std::max<int64_t>(cells, 1);
  const Rowwise<C> rowwise{op.far.size[1] / op.ids_per_token, padded<C>(op.far.size[1] / op.ids_per_token),
                           static_cast<C>(op.softcap)};

  const int64_t known_count = op.known ? op.known.size[2] : 0;

  MFWM_INLINE const int32_t* known_of(int64_t near_row, int64_t group) const {
    return static_cast<const int32_t*>(op.known.data) + (near_row * op.ids_per_token + group) * known_count;
  }

  // The share of a near distribution that its known ids leave.
  MFWM_INLINE C unknown_share(int64_t near_row, int64_t group) const {
    if (!op.known) return 1;
    const int32_t* ids = known_of(near_row, group);
    return static_cast<C>(std::count_if(ids, ids + known_count, [](int32_t id) { return id < 0; })) /
           static_cast<C>(known_count);
  }

  MFWM_SIMD void cell(int64_t c, C* scratch) const {
    const int64_t vocabulary = rowwise.vocabulary, row = rowwise.row;
    Softmax<C> far{scratch, scratch + row}, near{scratch + 2 * row, scratch + 3 * row};
    C* __restrict teacher = scratch + 4 * row;
    const C scale = static_cast<C>(op.scale), each = 1 / static_cast<C>(covered);
    for (int64_t group = 0; group < op.ids_per_token; ++group) {
      rowwise.load(far, op.far, c, group, op.far_bias);
      std::fill(teacher, teacher + vocabulary, C(0));
      for (int64_t s = 0; s < covered; ++s) {
        const int64_t near_row = c * covered + s;
        rowwise.load(near, op.near, near_row, group, op.near_bias);
        const C share = each * unknown_share(near_row, group) / near.sum;
        const C* __restrict e = near.powers;
        for (int64_t k = 0; k < vocabulary; ++k) teacher[k] += e[k] * share;
        for (int64_t u = 0; u < known_count; ++u) {
          const int32_t id = known_of(near_row, group)[u];
          if (id >= 0) teacher[id] += each / static_cast<C>(known_count);
        }
      }
      const C* __restrict z = far.logits;
      const C log_sum = far.normaliser;
      const double loss = long_sum<C>(
          vocabulary, [=](int64_t k) __attribute__((always_inline)) { return teacher[k] * (log_sum - z[k]); });
      static_cast<C*>(op.losses.data)[c * op.ids_per_token + group] = static_cast<C>(loss);
      // The gradient at the teacher is g = -log q, so that at a near logit is p (g - <p, g>) / covered, times the
      // share of the near distribution.
      for (int64_t s = 0; op.near_gradients && s < covered; ++s) {
        const int64_t near_row = c * covered + s;
        rowwise.load(near, op.near, near_row, group, op.near_bias);
        C* __restrict e = near.powers;
        const double sum =
            long_sum<C>(vocabulary, [=](int64_t k) __attribute__((always_inline)) { return e[k] * (log_sum - z[k]); });
        const C share = scale * each * unknown_share(near_row, group) / near.sum, mean = static_cast<C>(sum) / near.sum;
        for (int64_t k = 0; k < vocabulary; ++k) e[k] = share * e[k] * (log_sum - z[k] - mean);
        rowwise.store(e, near.logits, op.near, near_row, group);
      }
      if (op.far_gradients) {
        C* __restrict e = far.powers;
        const C factor = 1 / far.sum;
        for (int64_t k = 0; k < vocabulary; ++k) e[k] = scale * (e[k] * factor - teacher[k]);
        rowwise.store(e, z, op.far, c, group);
      }
    }
  }

  void run() const {
    parallel_for<C>(op.threads, cells, 5 * rowwise.row, [&](int64_t c, C* scratch) { cell(c, scratch); });
  }
};

// ---- sum += term

template <class C>
MFWM_SIMD void add_row(const Array& sum, const Array& term, int64_t r, C* __restrict scratch) {
  const int64_t count = sum.size[1];
  load_row(scratch, term.data, term.dtype, r * term.stride[0], term.stride[1], count);
  C* __restrict to = static_cast<C*>(sum.data) + r * count;
  for (int64_t k = 0; k < count; ++k) to[k] += scratch[k];
}

}  // namespace

void multi_horizon_linear_add(const Array& sum, const Array& term, int threads) {
  parallel_for<float>(threads, sum.size[0], sum.size[1],
                      [&](int64_t r, float* scratch) { add_row(sum, term, r, scratch); });
}

void multi_horizon_linear_cross_entropy(const MultiHorizonLinearCrossEntropy& op) {
  in_precision(op.logits.dtype == DType::float64, [&](auto zero) { CrossEntropy<decltype(zero)>{op}.run(); });
}

void multi_horizon_linear_consistency(const MultiHorizonLinearConsistency& op) {
  in_precision(op.far.dtype == DType::float64, [&](auto zero) { Consistency<decltype(zero)>{op}.run(); });
}

}  // namespace mfwm::cpu
