// Forwards that are repeated: from Python's tensors to the kernel in one call.
//
// A step of decoding reads some megabytes, which push Python and torch out of the processor's
// caches, so every attribute that is asked of a tensor costs more than it seems. Shapes, strides
// and addresses come from the C functions of DLPack that torch.Tensor carries.
#include "plans.h"

#include <ATen/dlpack.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace lcattn {
namespace {

namespace py = pybind11;

void (*run_forward)(const Problem& p);

// what is asked of torch, from when this module is made until the process ends
struct Torch {
  py::handle tensor, parameter, empty_like, is_neg, requires_grad;
  // null if this torch has none
  const DLPackExchangeAPI* api = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor").cast<py::object>().release();
    parameter = torch.attr("nn").attr("Parameter").cast<py::object>().release();
    empty_like = torch.attr("empty_like").cast<py::object>().release();
    is_neg = py::str("is_neg").release();
    requires_grad = py::str("requires_grad").release();
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
    const auto* header = static_cast<const DLPackExchangeAPIHeader*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (header && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
    api = reinterpret_cast<const DLPackExchangeAPI*>(header);
    if (api && !api->dltensor_from_py_object_no_sync) api = nullptr;
  }
};

const Torch* torch_ = nullptr;

// how a tensor lies in memory; one that is absent has -1 dimensions
struct Layout {
  int32_t n_dims = -1;
  DLDataType dtype = {};
  std::array<int64_t, 4> shape = {}, strides = {};

  Layout() = default;
  explicit Layout(const DLTensor& t) : n_dims(t.ndim) {
    if (n_dims < 0) return;
    dtype = t.dtype;
    std::copy_n(t.shape, n_dims, shape.begin());
    std::copy_n(t.strides, n_dims, strides.begin());
  }

  bool operator==(const DLTensor& t) const {
    if (n_dims != t.ndim || n_dims < 0) return n_dims == t.ndim;
    return dtype.code == t.dtype.code && dtype.bits == t.dtype.bits &&
           std::equal(t.shape, t.shape + n_dims, shape.begin()) &&
           std::equal(t.strides, t.strides + n_dims, strides.begin());
  }
};

// Whether it is plain: on the CPU, its values are those at its address, and nobody differentiates
// it.
bool read(py::handle value, bool grad, DLTensor& to) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value.ptr()));
  if (!torch_->api || (type != torch_->tensor.ptr() && type != torch_->parameter.ptr()))
    return false;
  if (torch_->api->dltensor_from_py_object_no_sync(value.ptr(), &to)) {
    PyErr_Clear();
    return false;
  }
  const auto no = [](PyObject* answer) {
    if (!answer) PyErr_Clear();
    Py_XDECREF(answer);
    return answer == Py_False;
  };
  // a tensor of zeros alone has no memory, a negated view holds other values than it shows
  return to.device.device_type == kDLCPU && to.data && to.ndim <= 4 &&
         no(PyObject_CallMethodNoArgs(value.ptr(), torch_->is_neg.ptr())) &&
         (!grad || no(PyObject_GetAttr(value.ptr(), torch_->requires_grad.ptr())));
}

void* address(const DLTensor& t) {
  return t.ndim < 0 ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
}

// q, k, v, bias, sink; of these the last two may be absent
constexpr int kInputs = 5, kRequired = 3;
using Inputs = std::array<py::handle, kInputs>;
using Layouts = std::array<Layout, kInputs>;

bool read_all(const Inputs& values, bool grad, std::array<DLTensor, kInputs>& to) {
  for (int i = 0; i < kInputs; ++i) {
    to[i].ndim = -1;
    if (i >= kRequired && values[i].is_none()) continue;
    if (!read(values[i], grad, to[i])) return false;
  }
  return true;
}

struct Plan {
  Layouts inputs;
  Layout out, lse;
  Problem problem;
  // holds the memory that the problem points to, but for the tensors of a call
  py::object kept;
};

// the plans of one layout, scale, softcap and first offset of the bias, the last used one first
class Plans {
 public:
  explicit Plans(size_t most) : most_(most) {}

  size_t size() const { return plans_.size(); }

  // whether the last run found no plan, and one before it of tensors that lie alike found none
  // either
  bool missed_again() const { return missed_again_; }

  void add(uintptr_t problem, py::object kept, py::handle out, py::handle lse, py::handle q,
           py::handle k, py::handle v, py::handle bias, py::handle sink) {
    std::array<DLTensor, kInputs> tensors;
    DLTensor out_tensor, lse_tensor;
    if (!read_all({q, k, v, bias, sink}, false, tensors) || !read(out, false, out_tensor) ||
        !read(lse, false, lse_tensor)) {
      throw std::invalid_argument("a plan is of plain tensors");
    }
    auto plan = std::make_shared<Plan>();
    std::ranges::transform(tensors, plan->inputs.begin(),
                           [](const DLTensor& t) { return Layout(t); });
    plan->out = Layout(out_tensor), plan->lse = Layout(lse_tensor);
    std::memcpy(&plan->problem, reinterpret_cast<const void*>(problem), sizeof(Problem));
    plan->kept = std::move(kept);
    plans_.insert(plans_.begin(), std::move(plan));
    if (plans_.size() > most_) plans_.pop_back();
  }

  // (out, lse or None), or None if none of the plans fits; new_lse is None or makes room, given q
  py::object run(py::handle q, py::handle k, py::handle v, py::handle bias, py::handle sink,
                 bool grad, py::handle new_lse) {
    std::array<DLTensor, kInputs> tensors;
    if (!read_all({q, k, v, bias, sink}, grad, tensors)) {
      missed_again_ = false;
      return py::none();
    }
    const auto found = std::ranges::find_if(
        plans_, [&](const std::shared_ptr<Plan>& plan) { return lie_as(plan->inputs, tensors); });
    if (found == plans_.end()) {
      const auto before = std::ranges::find_if(
          missed_, [&](const Layouts& layouts) { return lie_as(layouts, tensors); });
      missed_again_ = before != missed_.end();
      if (missed_again_) {
        missed_.erase(before);
      } else {
        if (missed_.size() == most_) missed_.pop_back();
        Layouts& layouts = *missed_.emplace(missed_.begin());
        std::ranges::transform(tensors, layouts.begin(),
                               [](const DLTensor& t) { return Layout(t); });
      }
      return py::none();
    }
    std::rotate(plans_.begin(), found, found + 1);
    // the kernel runs without the lock, under which another thread may drop the plan
    const std::shared_ptr<Plan> plan = plans_.front();

    Problem p = plan->problem;
    p.q[0].data = address(tensors[0]);
    p.k[0].data = address(tensors[1]);
    p.v[0].data = address(tensors[2]);
    p.bias.data = static_cast<const float*>(address(tensors[3]));
    p.sink = static_cast<const float*>(address(tensors[4]));
    const py::object out = torch_->empty_like(q);
    p.out.data = output(out, plan->out);
    py::object lse = py::none();
    std::vector<float> unseen;
    if (new_lse.is_none()) {
      unseen.resize(p.B * p.H * p.T);
      p.lse = unseen.data();
    } else {
      lse = new_lse(q);
      p.lse = static_cast<float*>(output(lse, plan->lse));
    }
    {
      const py::gil_scoped_release release;
      run_forward(p);
    }
    return py::make_tuple(out, lse);
  }

 private:
  static bool lie_as(const Layouts& layouts, const std::array<DLTensor, kInputs>& tensors) {
    return std::equal(layouts.begin(), layouts.end(), tensors.begin());
  }

  static void* output(py::handle value, const Layout& layout) {
    DLTensor t;
    if (!read(value, false, t) || !(layout == t)) {
      throw std::runtime_error("lcattn: room for an output is not as the plan has it");
    }
    return address(t);
  }

 private:
  const size_t most_;
  std::vector<std::shared_ptr<Plan>> plans_;
  // runs that found no plan, the latest first
  std::vector<Layouts> missed_;
  bool missed_again_ = false;
};

}  // namespace

void define_plans(py::module_& m, void (*forward)(const Problem& p)) {
  run_forward = forward;
  if (!torch_) torch_ = new Torch;
  py::class_<Plans>(m, "CpuPlans")
      .def(py::init<size_t>(), py::arg("most"))
      .def("__len__", &Plans::size)
      .def_property_readonly("missed_again", &Plans::missed_again)
      .def("add", &Plans::add)
      .def("run", &Plans::run);
}

}  // namespace lcattn
