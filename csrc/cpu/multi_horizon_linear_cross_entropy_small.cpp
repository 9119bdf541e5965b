// A small call of multi_horizon_linear_cross_entropy whole: the targets, the matrix products around the kernel of a
// chunk of logits, and the means. bindings.cpp calls the function at the end.
#include <cstring>

#include "small.h"

namespace mfwm::cpu {
namespace {

template <class C>
struct SmallTokenLoss {
  const MultiHorizonLinearCrossEntropySmall& op;
  const int64_t horizons = op.inputs.size(), batch = op.inputs[0].size[0], positions = op.inputs[0].size[1];
  const int64_t depth = row_size(op.inputs[0]), row = padded<C>(depth), columns = op.weights[0].size[0];
  const int64_t frames = op.tokens.size[1], parts = op.tokens.rank == 5 ? op.tokens.size[4] : 1;
  const int64_t vocabulary = columns / parts;

  // A row that counts: its number among those of its horizon's inputs, and its position weight.
  struct Row {
    int64_t horizon, number;
    double weight;
  };
  std::vector<Row> rows = {};
  std::vector<int32_t> ids = {};                      // the target ids of all cells of these rows, -1 for excluded ones
  std::vector<int64_t> starts = {};                   // where those of each cell start
  std::vector<int64_t> cells = std::vector<int64_t>(horizons, 0), terms = cells;  // how many count

  // The id at an offset into the tokens; -1 for an ignored one, -2 for one out of range.
  int32_t id_of(int64_t offset) const {
    const int64_t id = op.tokens.dtype == DType::int32 ? static_cast<const int32_t*>(op.tokens.data)[offset]
                                                       : static_cast<const int64_t*>(op.tokens.data)[offset];
    return id == op.ignore_index ? -1 : id < 0 || id >= vocabulary ? -2 : static_cast<int32_t>(id);
  }

  bool are_ids_in_range() const {
    for (int64_t r = 0; r < rows_in(op.tokens); ++r)
      for (int64_t k = 0, at = row_offset(op.tokens, r); k < row_size(op.tokens); ++k)
        if (id_of(at + k * op.tokens.stride[op.tokens.rank - 1]) == -2) return false;
    return true;
  }

  void list_targets() {
    for (int64_t i = 0; i < horizons; ++i)
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t n = 0; n < std::min(positions, frames - op.offsets[i]); ++n) {
          if (!same_segment(op.segment_ids, b, n, n + op.offsets[i])) continue;
          const Array& all = op.position_weights;
          const double weight = all ? number_at(all, b * all.stride[0] + n * all.stride[1] + i * all.stride[2]) : 1;
          if (!(weight > 0)) continue;
          const int64_t height = op.inputs[i].size[2], width = op.inputs[i].size[3];
          for (int64_t cell = 0; cell < height * width; ++cell)
            list_row(i, b, n, cell / width, cell % width, ((b * positions + n) * height * width) + cell, weight);
        }
    starts.push_back(ids.size());
  }

  void list_row(int64_t i, int64_t b, int64_t n, int64_t y, int64_t x, int64_t number, double weight) {
    const int64_t m = n + op.offsets[i], f = op.factors[i], first = ids.size(), *stride = op.tokens.stride;
    int64_t found = 0;
    for (int64_t part = 0; part < parts; ++part) {
      starts.push_back(ids.size());
      for (int64_t k = 0; k < f * f; ++k) {
        const int64_t v = y * f + k / f, u = x * f + k % f;
        const Array& mask = op.token_mask;
        const bool masked = mask && op.offsets[i] == 0 &&
                            !static_cast<const uint8_t*>(mask.data)[b * mask.stride[0] + m * mask.stride[1] +
                                                                    v * mask.stride[2] + u * mask.stride[3]];
        const int64_t at = b * stride[0] + m * stride[1] + v * stride[2] + u * stride[3] + part * stride[4];
        ids.push_back(masked ? -1 : id_of(at));
      }
      found += std::any_of(&ids[starts.back()], &ids[starts.back()] + f * f, [](int32_t id) { return id >= 0; });
    }
    if (found > 0) {
      rows.push_back({i, number, weight});
      cells[i] += 1;
      terms[i] += found;
    } else {
      ids.resize(first);
      starts.resize(starts.size() - parts);
    }
  }

  template <class T>
  static Array dense(std::vector<T>& from, DType dtype, int64_t count, int64_t size) {
    return {from.data(), dtype, 2, {count, size, 1, 1, 1}, {size, 1, 0, 0, 0}};
  }

  MFWM_SIMD void run() {
    list_targets();
    const int64_t count = rows.size(), all = count * parts;
    std::vector<std::vector<C>> weights, weight_gradients;
    for (const Array& weight : op.weights) weights.push_back(read_rows<C>(weight, row));
    for (const Array& to : op.weight_gradients) weight_gradients.emplace_back(to ? columns * row : 0, C(0));
    std::vector<C> biases, bias_gradients(op.biases.size() * columns, C(0)), states(count * row, C(0));
    for (const Array& bias : op.biases) {
      const std::vector<C> one = read_rows<C>(bias, columns);
      biases.insert(biases.end(), one.begin(), one.end());
    }
    std::vector<C> logits(count * columns), scales(all), losses(all), gradient(row);
    std::vector<int32_t> bias_rows(all), hits(all);
    for (int64_t r = 0; r < count; ++r) {
      const auto [i, number, weight] = rows[r];
      read_row(&states[r * row], op.inputs[i], number);
      dots(&states[r * row], weights[i % weights.size()].data(), columns, row, &logits[r * columns]);
      for (int64_t k = r * parts; k < (r + 1) * parts; ++k) {
        scales[k] = static_cast<C>(number_at(op.horizon_weights, i * op.horizon_weights.stride[0]) * weight /
                                   static_cast<double>(cells[i]));
        bias_rows[k] = op.biases.empty() ? 0 : static_cast<int32_t>(i % op.biases.size() * parts + k - r * parts);
      }
    }
    constexpr DType type = dtype_of<C>;
    const Array none, ints = dense(bias_rows, DType::int32, all, 1);
    multi_horizon_linear_cross_entropy(
        {dense(logits, type, all, vocabulary), biases.empty() ? none : dense(biases, type, biases.size(), 1),
         biases.empty() ? none : ints, dense(ids, DType::int32, ids.size(), 1),
         dense(starts, DType::int64, starts.size(), 1), dense(scales, type, all, 1), dense(losses, type, all, 1),
         op.accuracy ? dense(hits, DType::int32, all, 1) : none, none, 1, op.label_smoothing, op.z_loss, op.softcap,
         op.gradients, 1});
    for (const Array& to : op.input_gradients)
      if (to) std::memset(to.data, 0, rows_in(to) * depth * size_of(to.dtype));
    for (int64_t r = 0; op.gradients && r < count; ++r) {
      const auto [i, number, weight] = rows[r];
      const C* own = &logits[r * columns];
      const int64_t index = i % weights.size();
      if (op.weight_gradients[index])
        add_outer(own, &states[r * row], columns, row, weight_gradients[index].data());
      for (int64_t n = 0; !op.biases.empty() && n < columns; ++n)
        bias_gradients[i % op.biases.size() * columns + n] += own[n];
      if (!op.input_gradients[i]) continue;
      std::fill(gradient.begin(), gradient.end(), C(0));
      add_rows(own, weights[index].data(), columns, row, gradient.data());
      write_row(gradient.data(), op.input_gradients[i], number);
    }
    for (size_t k = 0; k < weights.size(); ++k)
      if (op.weight_gradients[k]) write_rows(weight_gradients[k].data(), row, op.weight_gradients[k]);
    for (size_t k = 0; k < op.biases.size(); ++k)
      if (op.bias_gradients[k]) write_row(&bias_gradients[k * columns], op.bias_gradients[k], 0);
    write_means(losses, hits);
  }

  void write_means(const std::vector<C>& losses, const std::vector<int32_t>& hits) const {
    std::vector<double> sums(horizons, 0.0), right(horizons, 0.0);
    for (size_t k = 0; k < losses.size(); ++k) {
      const Row& own = rows[k / parts];
      sums[own.horizon] += static_cast<double>(losses[k]) * own.weight;
      right[own.horizon] += hits[k];
    }
    double total = 0;
    for (int64_t i = 0; i < horizons; ++i) {
      const double mean = sums[i] / static_cast<double>(std::max<int64_t>(cells[i], 1));
      set_number(op.per_horizon, i, mean);
      static_cast<int64_t*>(op.counts.data)[i] = cells[i];
      set_number(op.consistency, i, 0);
      static_cast<int64_t*>(op.consistency_counts.data)[i] = 0;
      if (op.accuracy) set_number(op.accuracy, i, right[i] / static_cast<double>(std::max<int64_t>(terms[i], 1)));
      total += number_at(op.horizon_weights, i * op.horizon_weights.stride[0]) * mean;
    }
    set_number(op.total, 0, total);
  }
};

}  // namespace

bool multi_horizon_linear_cross_entropy_small(const MultiHorizonLinearCrossEntropySmall& op) {
  return in_precision(op.inputs[0].dtype == DType::float64, [&](auto zero) {
    SmallTokenLoss<decltype(zero)> loss{op};
    const bool is_valid = loss.are_ids_in_range();
    if (is_valid) loss.run();
    return is_valid;
  });
}

}  // namespace mfwm::cpu
