// The backward pass: dq, dk, dv and the gradients of every learned term.
//
//   ds_ij = p_ij (drop'(dout_i . v_j) - delta_i),   delta_i = sum_d dout_i out_i - dlse_i
//   dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i drop(p_ij) dout_i
//
// Three stages, each a parallel loop: plan every (b, g); run the tasks (backward_task.h); add up in
// a fixed order what several tasks share. Results are equal from run to run for a given number of
// threads. Scratch is linear in the lengths: the bands in use, the spills, and one copy of each
// table's gradient per task.
#include <cmath>

#include "backward_task.h"
#include "kernels.h"

namespace lcattn::cpu::LCATTN_ISA {
namespace {

template <typename F>
void run(const Parallel& parallel, int64_t n, const F& f) {
  parallel.run(
      n, [](int64_t i, void* context) { (*static_cast<const F*>(context))(i); },
      const_cast<F*>(&f));
}

Shape shape_of(const Problem& p, const Gradients& g, int n_threads) {
  Shape s = {};
  s.group = p.H / p.G;
  s.dim = padded_dim(p.D);
  s.first_q_block = p.row_start / kBlock;
  s.n_q_blocks = (p.row_start + p.T + kBlock - 1) / kBlock - s.first_q_block;
  s.n_k_blocks = (p.S + kBlock - 1) / kBlock;
  s.want_dqr = g.dqr.data != nullptr;
  s.n_q = p.n_q + (s.want_dqr ? 1 : 0);
  s.n_tiles = s.n_q * s.group * s.n_q_blocks;
  s.n_sequences = g.drel_key || g.drel_query ? p.G : p.B * p.G;
  s.n_parts = choose_parts(s.n_sequences, s.n_q_blocks * s.n_k_blocks, n_threads);
  return s;
}

// to += from
void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// sums a tile of dq that several parts computed into the first one's, and writes it
void reduce_query_tile(const Call& c, int64_t bg, int64_t tile, const float* factors) {
  const Plan& plan = c.plans[bg];
  float* sum = nullptr;
  for (int64_t part = 0; part < c.shape.n_parts; ++part) {
    const int32_t use = plan.use[part * c.shape.n_tiles + tile];
    if (use < 0) continue;
    float* spill = c.spills + (plan.first_spill + use) * c.slot_floats();
    if (sum == nullptr) {
      sum = spill;
    } else {
      add(sum, spill, c.tile_floats());
    }
  }
  if (sum) c.write_query_tile(bg / c.p.G, bg % c.p.G, tile, sum, factors);
}

void reduce_column(const Call& c, int64_t bg, int64_t k_block, const float* factors) {
  const Plan& plan = c.plans[bg];
  float* sum =
      c.heavy + (plan.first_heavy + plan.heavy_of[k_block]) * c.shape.n_parts * c.column_floats();
  for (int64_t part = 1; part < c.shape.n_parts; ++part) {
    add(sum, sum + part * c.column_floats(), c.column_floats());
  }
  c.write_column(bg / c.p.G, bg % c.p.G, k_block, sum, factors);
}

// Adds up the tasks' copies of a table's gradient: rows of `dim` floats of `padded`, times factor.
// to: [phases][heads or 1][length][dim]
void reduce_table(const Call& c, const OffsetTable& table, int64_t phases, const float* copies,
                  int64_t dim, int64_t padded, float factor, float* to) {
  const int64_t heads = c.heads_of(table), rows = phases * heads;
  const int64_t all_heads = table.head_stride ? c.p.H : 1;
  const int64_t tasks = c.shape.n_sequences * c.shape.n_parts;
  std::memset(to, 0, static_cast<size_t>(phases * all_heads * table.length * dim) * sizeof(float));
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t g = task / c.shape.n_parts % c.p.G;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = table.head_stride ? g * heads + row % heads : 0;
      const float* from = copies + (task * rows + row) * table.length * padded;
      float* target = to + (row / heads * all_heads + head) * table.length * dim;
      for (int64_t entry = 0; entry < table.length; ++entry) {
        for (int64_t d = 0; d < dim; ++d) {
          target[entry * dim + d] += from[entry * padded + d] * factor;
        }
      }
    }
  }
}

void reduce_slope(const Call& c) {
  for (int64_t h = 0; h < c.p.H; ++h) {
    double sum = 0.0;
    for (int64_t task = 0; task < c.shape.n_sequences * c.shape.n_parts; ++task) {
      if (task / c.shape.n_parts % c.p.G != h / c.shape.group) continue;
      sum += c.slope[task * c.shape.group + h % c.shape.group];
    }
    c.g.dslope[h] = static_cast<float>(sum);
  }
}

// dsink_h = -sum over rows of exp(sink_h - lse) delta
void sink_gradient(const Problem& p, const Gradients& g, int64_t h) {
  Scratch scratch(kWorkerScratch, 2 * padded<float>(padded_dim(p.D)));
  float* out_row = scratch.take<float>(padded_dim(p.D));
  float* dout_row = scratch.take<float>(padded_dim(p.D));
  double sum = 0.0;
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t i = 0; i < p.T; ++i) {
      const int64_t row = (b * p.H + h) * p.T + i;
      const Rows out = rows_of(p.out, p.dtype, b, h, i, 1, p.D, true, out_row);
      const Rows dout = rows_of(g.dout, p.dtype, b, h, i, 1, p.D, true, dout_row);
      const float delta = dot(out.data, dout.data, p.D) - (g.dlse ? g.dlse[row] : 0.0f);
      if (p.lse[row] == -kInf) continue;
      const double log_p = static_cast<double>(p.sink[h]) - p.lse[row] - p.lse_rest[row];
      sum -= std::exp(log_p) * delta;
    }
  }
  g.dsink[h] = static_cast<float>(sum);
}

}  // namespace

void backward(const Problem& p, const Gradients& g, const Parallel& parallel) {
  const Shape shape = shape_of(p, g, parallel.n_threads);
  const int64_t tasks = shape.n_sequences * shape.n_parts, plans = p.B * p.G;
  Call call = {p,       g,       shape,   offset_range(p), nullptr, nullptr,
               nullptr, nullptr, nullptr, nullptr,         nullptr};
  const int64_t bias_floats = g.dbias ? call.bias_rows() * p.bias.length : 0;
  const int64_t rel_key_floats = g.drel_key ? call.relative_floats(p.rel_key) : 0;
  const int64_t rel_query_floats = g.drel_query ? call.relative_floats(p.rel_query) : 0;

  Scratch scratch(kCallScratch, padded<Plan>(plans) + padded<int32_t>(plans * Plan::ints(shape)) +
                                    padded<float>(kBlock) + padded<float>(tasks * bias_floats) +
                                    padded<double>(g.dslope ? tasks * shape.group : 0) +
                                    padded<float>(tasks * rel_key_floats) +
                                    padded<float>(tasks * rel_query_floats));
  call.plans = scratch.take<Plan>(plans);
  int32_t* plan_memory = scratch.take<int32_t>(plans * Plan::ints(shape));
  float* factors = scratch.take<float>(kBlock);
  call.bias = scratch.take<float>(tasks * bias_floats);
  call.slope = scratch.take<double>(g.dslope ? tasks * shape.group : 0);
  call.rel_key = scratch.take<float>(tasks * rel_key_floats);
  call.rel_query = scratch.take<float>(tasks * rel_query_floats);
  for (int64_t i = 0; i < kBlock; ++i) factors[i] = p.scale;

  run(parallel, plans, [&](int64_t bg) {
    call.plans[bg].place(plan_memory + bg * Plan::ints(shape), shape);
    call.plans[bg].make(p, shape, bg / p.G, bg % p.G);
  });
  int64_t n_heavy = 0, n_spills = 0;
  for (int64_t bg = 0; bg < plans; ++bg) {
    call.plans[bg].first_heavy = n_heavy;
    call.plans[bg].first_spill = n_spills;
    n_heavy += call.plans[bg].n_heavy;
    n_spills += call.plans[bg].n_spills;
  }

  const int64_t heavy_floats = n_heavy * shape.n_parts * call.column_floats();
  const int64_t spill_floats = n_spills * call.slot_floats();
  Scratch shared(kSharedScratch, padded<float>(heavy_floats) + padded<float>(spill_floats));
  call.heavy = shared.take<float>(heavy_floats);
  call.spills = shared.take<float>(spill_floats);

  run(parallel, tasks, [&](int64_t index) {
    const FlushSubnormals flush;
    int64_t slots = 0;
    for (int64_t bg = index / shape.n_parts; bg < plans; bg += shape.n_sequences) {
      const int64_t needed = call.plans[bg].slots[index % shape.n_parts];
      if (needed > slots) slots = needed;
    }
    Scratch worker(kWorkerScratch, Task::scratch_bytes(call, slots));
    Task(call, index, slots, worker).run();
  });

  if (n_spills > 0) {
    run(parallel, plans * shape.n_tiles,
        [&](int64_t i) { reduce_query_tile(call, i / shape.n_tiles, i % shape.n_tiles, factors); });
  }
  if (n_heavy > 0) {
    run(parallel, plans * shape.n_k_blocks, [&](int64_t i) {
      const int64_t bg = i / shape.n_k_blocks, k_block = i % shape.n_k_blocks;
      if (call.plans[bg].heavy_of[k_block] >= 0) reduce_column(call, bg, k_block, factors);
    });
  }
  if (g.dbias) {
    reduce_table(call, p.bias, call.phases_of(p.bias), call.bias, 1, 1, 1.0f, g.dbias);
  }
  if (g.drel_key) {
    reduce_table(call, p.rel_key, 1, call.rel_key, p.D, shape.dim, p.scale, g.drel_key);
  }
  if (g.drel_query) {
    reduce_table(call, p.rel_query, 1, call.rel_query, p.D, shape.dim, p.scale, g.drel_query);
  }
  if (g.dslope) reduce_slope(call);
  if (g.dsink) run(parallel, p.H, [&](int64_t h) { sink_gradient(p, g, h); });
}

}  // namespace lcattn::cpu::LCATTN_ISA
