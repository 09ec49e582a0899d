// The only file that knows torch: fills Problem and Gradients from tensors, after checking all that
// would crash, and calls the kernels of the selected instruction set.
//
// The operators go through LibTorch's stable ABI, so one build serves many torch versions; pybind11
// carries lcattn._C: build info, the instruction set, planned forwards, test hooks. That entries of
// the block table and of turn_at are in range is trusted.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/launch.h"
#include "plans.h"

namespace lcattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

const cpu::Kernels* fastest() {
  const auto tables = cpu::compiled();
  return *std::ranges::find_if(tables,
                               [](const cpu::Kernels* table) { return table->supported(); });
}

std::atomic<const cpu::Kernels*> selected = fastest();

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* table : cpu::compiled()) {
    if (table->supported()) names.emplace_back(table->isa);
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  std::string supported;
  for (const cpu::Kernels* table : cpu::compiled()) {
    if (!table->supported()) continue;
    if (name == "auto" || name == table->isa) {
      selected = table;
      return;
    }
    supported += std::string(", ") + table->isa;
  }
  throw std::invalid_argument("this processor and this build support the instruction sets auto" +
                              supported + "; got " + name);
}

// a worker takes the next task when it is done with one, so that unequal tasks even out
void run_tasks(int64_t n, void (*task)(int64_t index, void* context), void* context) {
  const int64_t n_workers = std::min<int64_t>(n, torch::stable::get_num_threads());
  std::atomic<int64_t> next = 0;
  const auto work = [&](int64_t first, int64_t end) {
    if (n == n_workers) {
      for (int64_t i = first; i < end; ++i) task(i, context);
    } else {
      for (int64_t i = next++; i < n; i = next++) task(i, context);
    }
  };
  if (n_workers > 1) {
    torch::stable::parallel_for(0, n_workers, 1, work);
  } else {
    work(0, 1);
  }
}

Parallel torch_threads() {
  return {.n_threads = static_cast<int>(torch::stable::get_num_threads()), .run = run_tasks};
}

// an expected size: exactly this, or also 1, or any
struct Size {
  int64_t value;
  bool or_one = false;
};
constexpr Size kAny = {-1};
Size or_one(int64_t value) { return {value, true}; }

std::string text(const char* part) { return part; }
std::string text(std::integral auto number) { return std::to_string(number); }
std::string text(ScalarType dtype) { return torch::headeronly::toString(dtype); }
std::string text(const Tensor& tensor) {
  std::string sizes;
  for (const int64_t size : tensor.sizes()) {
    sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  }
  return text(tensor.scalar_type()) + " [" + sizes + "]" +
         (tensor.is_contiguous() ? "" : ", not contiguous");
}

// the message is put together only when it is needed: a call makes some forty checks
template <typename... Parts>
void require(bool ok, const Parts&... message) {
  if (!ok) throw std::runtime_error(("lcattn: " + ... + text(message)));
}

bool matches(const Tensor& tensor, std::initializer_list<Size> sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  const auto got = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), got.begin(), [](Size want, int64_t size) {
    return want.value == -1 || size == want.value || (want.or_one && size == 1);
  });
}

const Tensor& expect(const Tensor& tensor, const char* name, ScalarType dtype,
                     std::initializer_list<Size> sizes, bool contiguous) {
  if (tensor.scalar_type() == dtype && matches(tensor, sizes) &&
      (!contiguous || tensor.is_contiguous())) {
    return tensor;
  }
  std::string want = text(dtype) + " [";
  for (const Size& size : sizes) {
    want += (&size == sizes.begin() ? "" : ", ");
    want += (size.value == -1 ? "any" : std::to_string(size.value)) +
            (size.or_one && size.value != 1 ? " or 1" : "");
  }
  throw std::runtime_error(std::string("lcattn: ") + name + " must be " + want + "]" +
                           (contiguous ? ", contiguous" : "") + "; got " + text(tensor));
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// a [B, heads, rows, D] input
View input_view(const Tensor& tensor, const char* name, ScalarType dtype, int64_t B, int64_t heads,
                int64_t rows, int64_t D) {
  expect(tensor, name, dtype, {{B}, {heads}, {rows}, {D}}, false);
  const auto strides = tensor.strides();
  return {tensor.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

// the same to write to, where two elements at one address would be a race
View output_view(const Tensor& tensor, const char* name, ScalarType dtype, int64_t B, int64_t heads,
                 int64_t rows, int64_t D) {
  const View view = input_view(tensor, name, dtype, B, heads, rows, D);
  for (int64_t i = 0; i < 4; ++i) {
    require(tensor.size(i) == 1 || tensor.stride(i) != 0, name, " must not be expanded");
  }
  return view;
}

// takes values off the stack in the order of the schema
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

// what both operators take; declared, and so taken, in the order of the schema
struct Inputs {
  TensorList q, k, v;
  std::vector<int64_t> phase_map;
  Tensor seg_ptr, entries, mask_tiles;
  int64_t row_start;
  MaybeTensor key_bits, q_pos, k_pos, turn_table, turn_at;
  double scale, softcap;
  MaybeTensor bias;
  int64_t bias_min;
  MaybeTensor slope, rel_key;
  int64_t rel_key_min;
  MaybeTensor rel_query;
  int64_t rel_query_min;
  MaybeTensor qr, kr, sink;
  double dropout;
  int64_t seed;
};

Inputs take_inputs(Arguments& args) {
  return {
      .q = args.take<TensorList>(),
      .k = args.take<TensorList>(),
      .v = args.take<TensorList>(),
      .phase_map = args.take<std::vector<int64_t>>(),
      .seg_ptr = args.take<Tensor>(),
      .entries = args.take<Tensor>(),
      .mask_tiles = args.take<Tensor>(),
      .row_start = args.take<int64_t>(),
      .key_bits = args.take<MaybeTensor>(),
      .q_pos = args.take<MaybeTensor>(),
      .k_pos = args.take<MaybeTensor>(),
      .turn_table = args.take<MaybeTensor>(),
      .turn_at = args.take<MaybeTensor>(),
      .scale = args.take<double>(),
      .softcap = args.take<double>(),
      .bias = args.take<MaybeTensor>(),
      .bias_min = args.take<int64_t>(),
      .slope = args.take<MaybeTensor>(),
      .rel_key = args.take<MaybeTensor>(),
      .rel_key_min = args.take<int64_t>(),
      .rel_query = args.take<MaybeTensor>(),
      .rel_query_min = args.take<int64_t>(),
      .qr = args.take<MaybeTensor>(),
      .kr = args.take<MaybeTensor>(),
      .sink = args.take<MaybeTensor>(),
      .dropout = args.take<double>(),
      .seed = args.take<int64_t>(),
  };
}

BlockTable block_table(const Tensor& seg_ptr, const Tensor& entries, const Problem& p,
                       int64_t n_positions, const char* name) {
  expect(seg_ptr, name, ScalarType::Int, {or_one(p.B), kAny, kAny, {2 * p.P + 1}}, true);
  expect(entries, "entries", ScalarType::Int, {kAny, {2}}, true);
  const int64_t heads = seg_ptr.size(1), n_rows = seg_ptr.size(2);
  require(heads == 1 || heads == p.G || heads == p.H, name, " must have 1, G or H heads; got ",
          heads);
  require(n_rows * kBlock >= n_positions, name, " has ", n_rows, " rows of blocks, too few for ",
          n_positions);
  return {data<int32_t>(seg_ptr), data<int32_t>(entries), n_rows, seg_ptr.size(0), heads};
}

// a [heads or 1, L] or [heads or 1, L, D] table, for each phase or for all
OffsetTable offset_table(const Tensor& table, int64_t phases, int64_t heads, int64_t length,
                         int64_t row, int64_t min_offset) {
  const int64_t head_stride = length * row;
  require(length > 0, "a table of offsets must not be empty");
  return {.data = data<float>(table),
          .phase_stride = phases == 1 ? 0 : heads * head_stride,
          .head_stride = heads == 1 ? 0 : head_stride,
          .length = length,
          .min_offset = min_offset};
}

const int32_t* positions(const MaybeTensor& tensor, const char* name, const Problem& p,
                         int64_t rows, int64_t* phase_stride, int64_t* batch_stride) {
  if (!tensor) return nullptr;
  expect(*tensor, name, ScalarType::Int, {or_one(p.P), or_one(p.B), {rows}}, false);
  require(rows == 1 || tensor->stride(2) == 1, name, " must be contiguous in its last dimension");
  *phase_stride = tensor->size(0) == 1 ? 0 : tensor->stride(0);
  *batch_stride = tensor->size(1) == 1 ? 0 : tensor->stride(1);
  return data<int32_t>(*tensor);
}

DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      throw std::runtime_error("lcattn: q must be float32, bfloat16 or float16; got " +
                               text(dtype));
  }
}

Problem make_problem(const Inputs& in, const Tensor& out, const Tensor& lse,
                     const MaybeTensor& lse_rest) {
  Problem p;
  const auto counted = [](const TensorList& list, const char* name) {
    require(!list.empty() && list.size() <= kMaxPhases, name, " must be 1 to ", kMaxPhases,
            " tensors; got ", list.size());
    require(list[0].dim() == 4, name, " must have 4 dimensions; got ", list[0]);
    return static_cast<int32_t>(list.size());
  };
  p.n_q = counted(in.q, "q");
  p.n_k = counted(in.k, "k");
  p.n_v = counted(in.v, "v");
  const auto q_sizes = in.q[0].sizes();
  p.B = q_sizes[0], p.H = q_sizes[1], p.T = q_sizes[2], p.D = q_sizes[3];
  p.G = in.k[0].size(1), p.S = in.k[0].size(2);
  p.P = static_cast<int64_t>(in.phase_map.size()) / 3;
  require(p.B > 0 && p.H > 0 && p.T > 0 && p.D > 0, "q must not be empty; got ", in.q[0]);
  require(p.G > 0 && p.S > 0, "k must not be empty; got ", in.k[0]);
  require(p.H % p.G == 0, "k must have a number of heads that divides q's ", p.H, "; got ", p.G);
  require(p.D <= kMaxHeadDim, "q must have a head dim of at most ", kMaxHeadDim, "; got ", p.D);
  require(p.P >= 1 && p.P <= kMaxPhases && in.phase_map.size() == static_cast<size_t>(3 * p.P),
          "phase_map must hold (q, k, v) for 1 to ", kMaxPhases, " phases; got ",
          in.phase_map.size(), " numbers");

  const ScalarType dtype = in.q[0].scalar_type();
  p.dtype = kernel_dtype(dtype);
  for (int i = 0; i < p.n_q; ++i) p.q[i] = input_view(in.q[i], "q", dtype, p.B, p.H, p.T, p.D);
  for (int i = 0; i < p.n_k; ++i) p.k[i] = input_view(in.k[i], "k", dtype, p.B, p.G, p.S, p.D);
  for (int i = 0; i < p.n_v; ++i) p.v[i] = input_view(in.v[i], "v", dtype, p.B, p.G, p.S, p.D);
  for (int64_t f = 0; f < p.P; ++f) {
    const int64_t* of = &in.phase_map[3 * f];
    require(
        of[0] >= 0 && of[0] < p.n_q && of[1] >= 0 && of[1] < p.n_k && of[2] >= 0 && of[2] < p.n_v,
        "phase_map names a tensor that is not there");
    p.q_of[f] = of[0], p.k_of[f] = of[1], p.v_of[f] = of[2];
  }

  require(in.row_start >= 0, "row_start must not be negative; got ", in.row_start);
  p.row_start = in.row_start;
  p.by_query = block_table(in.seg_ptr, in.entries, p, p.row_start + p.T, "seg_ptr");
  p.mask_tiles = data<int32_t>(
      expect(in.mask_tiles, "mask_tiles", ScalarType::Int, {kAny, {kBlock}, {kBlock / 32}}, true));
  if (in.key_bits) {
    p.key_bits = data<int32_t>(
        expect(*in.key_bits, "key_bits", ScalarType::Int, {{p.B}, {(p.S + 31) / 32}}, true));
  }
  p.q_pos = positions(in.q_pos, "q_pos", p, p.T, &p.q_pos_phase_stride, &p.q_pos_batch_stride);
  p.k_pos = positions(in.k_pos, "k_pos", p, p.S, &p.k_pos_phase_stride, &p.k_pos_batch_stride);

  require(in.turn_table.has_value() == in.turn_at.has_value(),
          "turn_table and turn_at must be given together");
  if (in.turn_table) {
    const Tensor& table =
        expect(*in.turn_table, "turn_table", ScalarType::Float, {kAny, kAny}, true);
    const Tensor& at =
        expect(*in.turn_at, "turn_at", ScalarType::Int, {{p.n_k}, or_one(p.B), {p.S}}, false);
    require(table.size(1) % 2 == 0 && table.size(1) <= p.D,
            "turn_table must have an even width of ", "at most ", p.D, "; got ", table.size(1));
    require(p.S == 1 || at.stride(2) == 1, "turn_at must be contiguous in its last dimension");
    p.turn_table = data<float>(table);
    p.turn_pairs = table.size(1) / 2;
    p.turn_batch_stride = at.size(1) == 1 ? 0 : at.stride(1);
    for (int i = 0; i < p.n_k; ++i) p.turn_at[i] = data<int32_t>(at) + i * at.stride(0);
  }

  p.scale = static_cast<float>(in.scale);
  p.softcap = static_cast<float>(in.softcap);
  if (in.bias) {
    const Tensor& bias =
        expect(*in.bias, "bias", ScalarType::Float, {or_one(p.P), or_one(p.H), kAny}, true);
    p.bias = offset_table(bias, bias.size(0), bias.size(1), bias.size(2), 1, in.bias_min);
  }
  if (in.slope) p.slope = data<float>(expect(*in.slope, "slope", ScalarType::Float, {{p.H}}, true));
  if (in.sink) p.sink = data<float>(expect(*in.sink, "sink", ScalarType::Float, {{p.H}}, true));
  require(in.rel_key.has_value() == in.qr.has_value(), "rel_key and qr must be given together");
  require(in.rel_query.has_value() == in.kr.has_value(), "rel_query and kr must be given together");
  if (in.rel_key) {
    const Tensor& table =
        expect(*in.rel_key, "rel_key", ScalarType::Float, {or_one(p.H), kAny, {p.D}}, true);
    p.rel_key = offset_table(table, 1, table.size(0), table.size(1), p.D, in.rel_key_min);
    p.qr = input_view(*in.qr, "qr", dtype, p.B, p.H, p.T, p.D);
  }
  if (in.rel_query) {
    const Tensor& table =
        expect(*in.rel_query, "rel_query", ScalarType::Float, {or_one(p.H), kAny, {p.D}}, true);
    p.rel_query = offset_table(table, 1, table.size(0), table.size(1), p.D, in.rel_query_min);
    p.kr = input_view(*in.kr, "kr", dtype, p.B, p.G, p.S, p.D);
  }
  require(in.dropout >= 0 && in.dropout < 1, "dropout must be in [0, 1)");
  p.dropout = static_cast<float>(in.dropout);
  p.seed = static_cast<uint64_t>(in.seed);

  p.out = output_view(out, "out", dtype, p.B, p.H, p.T, p.D);
  p.lse = data<float>(expect(lse, "lse", ScalarType::Float, {{p.B}, {p.H}, {p.T}}, true));
  if (lse_rest) {
    const auto& rest =
        expect(*lse_rest, "lse_rest", ScalarType::Float, {{p.B}, {p.H}, {p.T}}, true);
    p.lse_rest = data<float>(rest);
  }
  return p;
}

// a schema: the inputs common to all operators, in the order of KernelInputs in lcattn/inputs.py,
// and what an operator takes besides
std::string schema(const std::string& name, const std::string& rest) {
  return name +
         "(Tensor[] q, Tensor[] k, Tensor[] v, int[] phase_map, Tensor seg_ptr, Tensor entries, "
         "Tensor mask_tiles, int row_start, Tensor? key_bits, Tensor? q_pos, Tensor? k_pos, "
         "Tensor? turn_table, Tensor? turn_at, float scale, float softcap, Tensor? bias, "
         "int bias_min, Tensor? slope, Tensor? rel_key, int rel_key_min, Tensor? rel_query, "
         "int rel_query_min, Tensor? qr, Tensor? kr, Tensor? sink, float dropout, int seed, " +
         rest + ") -> ()";
}

void cpu_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Inputs in = take_inputs(args);
  const Tensor out = args.take<Tensor>(), lse = args.take<Tensor>();
  const MaybeTensor lse_rest = args.take<MaybeTensor>();
  const Problem p = make_problem(in, out, lse, lse_rest);
  require(!p.turn_table || cpu::decodes(p), "keys are turned for few queries and inference only");
  selected.load()->forward(p, torch_threads());
}

// a forward that will be repeated: its Problem as bytes
void cpu_forward_plan(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Inputs in = take_inputs(args);
  const Tensor out = args.take<Tensor>(), lse = args.take<Tensor>(), plan = args.take<Tensor>();
  const Problem p = make_problem(in, out, lse, std::nullopt);
  require(p.n_q == 1 && p.n_k == 1 && p.n_v == 1 && !p.turn_table,
          "a plan is of one q, one k and one v, with keys that need not be turned");
  expect(plan, "plan", ScalarType::Byte, {{static_cast<int64_t>(sizeof p)}}, true);
  std::memcpy(data<char>(plan), &p, sizeof p);
}

void forward_now(const Problem& p) { selected.load()->forward(p, torch_threads()); }

void cpu_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Inputs in = take_inputs(args);
  const Tensor seg_ptr_t = args.take<Tensor>(), entries_t = args.take<Tensor>();
  const Tensor out = args.take<Tensor>(), lse = args.take<Tensor>(), lse_rest = args.take<Tensor>(),
               dout = args.take<Tensor>();
  const MaybeTensor dlse = args.take<MaybeTensor>();
  const TensorList dq = args.take<TensorList>(), dk = args.take<TensorList>(),
                   dv = args.take<TensorList>();
  const MaybeTensor dbias = args.take<MaybeTensor>(), dslope = args.take<MaybeTensor>();
  const MaybeTensor drel_key = args.take<MaybeTensor>(), drel_query = args.take<MaybeTensor>();
  const MaybeTensor dqr = args.take<MaybeTensor>(), dkr = args.take<MaybeTensor>();
  const MaybeTensor dsink = args.take<MaybeTensor>();

  Problem p = make_problem(in, out, lse, lse_rest);
  p.by_key = block_table(seg_ptr_t, entries_t, p, p.S, "seg_ptr_t");
  require(!p.turn_table, "keys must be turned already");
  const ScalarType dtype = in.q[0].scalar_type();
  Gradients g;
  g.dout = input_view(dout, "dout", dtype, p.B, p.H, p.T, p.D);
  if (dlse)
    g.dlse = data<float>(expect(*dlse, "dlse", ScalarType::Float, {{p.B}, {p.H}, {p.T}}, true));
  require(dq.size() == in.q.size() && dk.size() == in.k.size() && dv.size() == in.v.size(),
          "dq, dk, dv must have as many tensors as q, k, v");
  for (int i = 0; i < p.n_q; ++i) g.dq[i] = output_view(dq[i], "dq", dtype, p.B, p.H, p.T, p.D);
  for (int i = 0; i < p.n_k; ++i) g.dk[i] = output_view(dk[i], "dk", dtype, p.B, p.G, p.S, p.D);
  for (int i = 0; i < p.n_v; ++i) g.dv[i] = output_view(dv[i], "dv", dtype, p.B, p.G, p.S, p.D);

  // the gradient of a table is laid out as the table
  const auto table_like = [](const MaybeTensor& gradient, const char* name,
                             const MaybeTensor& table) -> float* {
    if (!gradient) return nullptr;
    require(table.has_value(), name, " was asked for a term that is absent");
    const auto want = table->sizes(), got = gradient->sizes();
    require(gradient->scalar_type() == ScalarType::Float && gradient->is_contiguous() &&
                std::equal(want.begin(), want.end(), got.begin(), got.end()),
            name, " must be as its table, ", *table, "; got ", *gradient);
    return data<float>(*gradient);
  };
  g.dbias = table_like(dbias, "dbias", in.bias);
  g.dslope = table_like(dslope, "dslope", in.slope);
  g.drel_key = table_like(drel_key, "drel_key", in.rel_key);
  g.drel_query = table_like(drel_query, "drel_query", in.rel_query);
  g.dsink = table_like(dsink, "dsink", in.sink);
  require(!dqr || in.qr, "dqr was asked for a term that is absent");
  require(!dkr || in.kr, "dkr was asked for a term that is absent");
  if (dqr) g.dqr = output_view(*dqr, "dqr", dtype, p.B, p.H, p.T, p.D);
  if (dkr) g.dkr = output_view(*dkr, "dkr", dtype, p.B, p.G, p.S, p.D);
  selected.load()->backward(p, g, torch_threads());
}

void cpu_turn(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Tensor x = args.take<Tensor>(), table = args.take<Tensor>(), at = args.take<Tensor>();
  const bool back = args.take<bool>();
  const Tensor out = args.take<Tensor>();
  require(x.dim() == 4, "x must have 4 dimensions; got ", x);
  cpu::Turn t;
  t.B = x.size(0), t.heads = x.size(1), t.n = x.size(2), t.D = x.size(3);
  t.dtype = kernel_dtype(x.scalar_type());
  t.x = input_view(x, "x", x.scalar_type(), t.B, t.heads, t.n, t.D);
  t.out = output_view(out, "out", x.scalar_type(), t.B, t.heads, t.n, t.D);
  expect(table, "table", ScalarType::Float, {kAny, kAny}, true);
  require(table.size(1) % 2 == 0 && table.size(1) <= t.D,
          "table must have an even width of at most ", t.D, "; got ", table.size(1));
  expect(at, "at", ScalarType::Int, {or_one(t.B), {t.n}}, false);
  require(t.n <= 1 || at.stride(1) == 1, "at must be contiguous in its last dimension");
  t.table = data<float>(table), t.pairs = table.size(1) / 2;
  t.at = data<int32_t>(at), t.at_batch_stride = at.size(0) == 1 ? 0 : at.stride(0);
  t.back = back;
  selected.load()->turn(t, torch_threads());
}

// what would read or write past a tensor, or fault, in the CUDA kernels
cuda::Launch plan_cuda_forward(const Problem& p) {
  require(p.dtype != DType::kFloat32 && (p.D == 64 || p.D == 128),
          "CUDA kernels take bfloat16 and float16, and head dims 64 and 128");
  require(!p.turn_table && !p.qr.data && !p.kr.data && p.dropout == 0,
          "CUDA kernels have no unturned keys, relative keys or queries, or dropout");
  const auto aligned = [](const View& view, const char* name) {
    require(view.dim == 1 && view.row % 8 == 0 && view.head % 8 == 0 && view.batch % 8 == 0 &&
                reinterpret_cast<uintptr_t>(view.data) % 16 == 0,
            name, " must have rows of adjacent elements that start at multiples of 16 bytes");
  };
  for (int i = 0; i < p.n_q; ++i) aligned(p.q[i], "q");
  for (int i = 0; i < p.n_k; ++i) aligned(p.k[i], "k");
  for (int i = 0; i < p.n_v; ++i) aligned(p.v[i], "v");
  aligned(p.out, "out");
  require(p.H < 1 << 16 && p.B < 1 << 16,
          "CUDA kernels take fewer than 65,536 heads and batch rows");
  return cuda::plan_forward(p);
}

constexpr int64_t kCudaPlanBytes = sizeof(cuda::Launch) + sizeof(Problem);

// for machines without a GPU: the launch that cuda_forward would make and its parameter, as bytes
void cuda_forward_plan(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Inputs in = take_inputs(args);
  const Tensor out = args.take<Tensor>(), lse = args.take<Tensor>(), bytes = args.take<Tensor>();
  const Problem p = make_problem(in, out, lse, std::nullopt);
  const cuda::Launch launch = plan_cuda_forward(p);
  expect(bytes, "launch", ScalarType::Byte, {{kCudaPlanBytes}}, true);
  std::memcpy(data<char>(bytes), &launch, sizeof launch);
  std::memcpy(data<char>(bytes) + sizeof launch, &p, sizeof p);
}

#ifdef LCATTN_CUDA_VERSION
// torch's current stream. A torch without CUDA lacks the library that knows it, so it is found when
// it is needed; torch has loaded it by then, out of sight of a plain dlsym.
void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  void* stream = nullptr;
  require(get && get(device, &stream) == 0, "this torch does not name its current CUDA stream");
  return stream;
}

void cuda_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Inputs in = take_inputs(args);
  const Tensor out = args.take<Tensor>(), lse = args.take<Tensor>();
  const int32_t device = in.q.at(0).get_device();
  const auto here = [&](const Tensor& tensor) {
    require(tensor.is_cuda() && tensor.get_device() == device, "all tensors must be on q's device");
  };
  for (const TensorList* list : {&in.q, &in.k, &in.v}) std::ranges::for_each(*list, here);
  for (const Tensor* tensor : {&in.seg_ptr, &in.entries, &in.mask_tiles, &out, &lse}) here(*tensor);
  for (const MaybeTensor* maybe :
       {&in.key_bits, &in.q_pos, &in.k_pos, &in.bias, &in.slope, &in.sink}) {
    if (*maybe) here(**maybe);
  }
  const Problem p = make_problem(in, out, lse, std::nullopt);
  cuda::forward(p, plan_cuda_forward(p), device, current_stream(device));
}
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(lcattn, m) {
  const std::string outputs = "Tensor(a!) out, Tensor(b!) lse";
  m.def(schema("cpu_forward", outputs + ", Tensor(c!)? lse_rest").c_str());
  m.def(schema("cpu_forward_plan", outputs + ", Tensor(c!) plan").c_str());
  m.def(schema("cpu_backward",
               "Tensor seg_ptr_t, Tensor entries_t, Tensor out, Tensor lse, Tensor lse_rest, "
               "Tensor dout, Tensor? dlse, Tensor(a!)[] dq, Tensor(b!)[] dk, Tensor(c!)[] dv, "
               "Tensor(d!)? dbias, Tensor(e!)? dslope, Tensor(f!)? drel_key, "
               "Tensor(g!)? drel_query, Tensor(h!)? dqr, Tensor(i!)? dkr, Tensor(j!)? dsink")
            .c_str());
  m.def("cpu_turn(Tensor x, Tensor table, Tensor at, bool back, Tensor(a!) out) -> ()");
  m.def(schema("cuda_forward", outputs).c_str());
  m.def(schema("cuda_forward_plan", outputs + ", Tensor(c!) launch").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(lcattn, CPU, m) {
  m.impl("cpu_forward", cpu_forward);
  m.impl("cpu_forward_plan", cpu_forward_plan);
  m.impl("cpu_backward", cpu_backward);
  m.impl("cpu_turn", cpu_turn);
  m.impl("cuda_forward_plan", cuda_forward_plan);
}

#ifdef LCATTN_CUDA_VERSION
STABLE_TORCH_LIBRARY_IMPL(lcattn, CUDA, m) { m.impl("cuda_forward", cuda_forward); }
#endif

pybind11::dict build_info() {
  std::vector<std::string> isas;
  for (const cpu::Kernels* table : cpu::compiled()) isas.emplace_back(table->isa);
  pybind11::dict info;
  info["version"] = LCATTN_VERSION;
  info["compiler"] = __VERSION__;
  info["torch_target"] = LCATTN_TORCH_TARGET;
  info["torch_headers"] = LCATTN_TORCH_HEADERS;
  info["isas"] = isas;
#ifdef LCATTN_CUDA_VERSION
  info["cuda"] = LCATTN_CUDA_VERSION;
#else
  info["cuda"] = pybind11::none();
#endif
  info["sanitize"] = static_cast<bool>(LCATTN_SANITIZE);
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Build info, the CPU instruction set, planned forwards and test hooks; the operators are in "
      "torch.ops.lcattn.";
  m.def("build_info", build_info);
  m.def("cpu_isas", cpu_isas);
  m.def("cpu_isa", [] { return selected.load()->isa; });
  m.def("set_cpu_isa", set_cpu_isa, pybind11::arg("name"));
  define_plans(m, forward_now);
  m.attr("cpu_plan_bytes") = sizeof(Problem);
  m.attr("cuda_plan_bytes") = kCudaPlanBytes;
  m.def("poison_scratch", [](bool on) { cpu::poison_scratch = on; }, pybind11::arg("on"));
}

}  // namespace
}  // namespace lcattn
