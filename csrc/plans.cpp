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

// what is asked of torch; found once, and never given back
struct Torch {
  py::handle tensor, parameter, empty_like, is_neg, requires_grad;
  const DLPackExchangeAPI* api = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor").cast<py::object>().release();
    parameter = torch.attr("nn").attr("Parameter").cast<py::object>().release();
    empty_like = torch.attr("empty_like").cast<py::object>().release();
    is_neg = py::str("is_neg").release();
    requires_grad = py::str("requires_grad").release();
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) return;
    const auto* header = static_cast<const DLPackExchangeAPIHeader*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (header && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
    api = reinterpret_cast<const DLPackExchangeAPI*>(header);
    PyErr_Clear();
    if (api && !api->dltensor_from_py_object_no_sync) api = nullptr;
  }

  static const Torch& get() {
    static const Torch* torch = new Torch;
    return *torch;
  }
};

// q, k, v, bias, sink
constexpr int kTensors = 5;
using Given = std::array<py::handle, kTensors>;

// how a tensor lies in memory; one that is absent has -1 dimensions
struct Layout {
  int32_t n_dims = -1;
  DLDataType dtype = {};
  std::array<int64_t, 4> shape = {}, strides = {};

  bool operator==(const DLTensor& t) const {
    if (n_dims != t.ndim || n_dims < 0) return n_dims == t.ndim;
    return dtype.code == t.dtype.code && dtype.bits == t.dtype.bits &&
           std::equal(t.shape, t.shape + n_dims, shape.begin()) &&
           std::equal(t.strides, t.strides + n_dims, strides.begin());
  }
};

struct Plan {
  std::array<Layout, kTensors> layouts;
  Problem problem;
  // holds the memory that the problem points to, but for the tensors of a call
  py::object kept;
};

// Whether it is plain: on the CPU, its values are those at its address, and nobody differentiates
// it; or absent.
bool read(py::handle value, bool grad, DLTensor& to) {
  to.ndim = -1;
  if (value.is_none()) return true;
  const Torch& torch = Torch::get();
  if (!torch.api) return false;
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value.ptr()));
  if (type != torch.tensor.ptr() && type != torch.parameter.ptr()) return false;
  if (torch.api->dltensor_from_py_object_no_sync(value.ptr(), &to)) {
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
         no(PyObject_CallMethodNoArgs(value.ptr(), torch.is_neg.ptr())) &&
         (!grad || no(PyObject_GetAttr(value.ptr(), torch.requires_grad.ptr())));
}

bool are_plain(py::handle q, py::handle k, py::handle v, py::handle bias, py::handle sink,
               bool grad) {
  const Given given = {q, k, v, bias, sink};
  return std::ranges::all_of(given, [grad](py::handle value) {
    DLTensor t;
    return read(value, grad, t);
  });
}

// the plans of one layout, scale, softcap and first offset of the bias, the last used one first
class Plans {
 public:
  explicit Plans(size_t most) : most_(most) {}

  size_t size() const { return plans_.size(); }

  void add(uintptr_t problem, py::object kept, py::handle q, py::handle k, py::handle v,
           py::handle bias, py::handle sink) {
    auto plan = std::make_shared<Plan>();
    const Given given = {q, k, v, bias, sink};
    for (int i = 0; i < kTensors; ++i) {
      DLTensor t;
      if (!read(given[i], false, t)) throw std::invalid_argument("a plan is of plain tensors");
      Layout& layout = plan->layouts[i];
      layout.n_dims = t.ndim, layout.dtype = t.dtype;
      std::copy_n(t.shape, std::max(t.ndim, 0), layout.shape.begin());
      std::copy_n(t.strides, std::max(t.ndim, 0), layout.strides.begin());
    }
    std::memcpy(&plan->problem, reinterpret_cast<const void*>(problem), sizeof(Problem));
    plan->kept = std::move(kept);
    plans_.insert(plans_.begin(), std::move(plan));
    if (plans_.size() > most_) plans_.pop_back();
  }

  // (out, lse or None), or None if none of the plans fits; new_lse is None or makes room, given q
  py::object run(py::handle q, py::handle k, py::handle v, py::handle bias, py::handle sink,
                 bool grad, py::handle new_lse) {
    const Given given = {q, k, v, bias, sink};
    std::array<DLTensor, kTensors> tensors;
    for (int i = 0; i < kTensors; ++i) {
      if (!read(given[i], grad, tensors[i])) return py::none();
    }
    const auto found = std::ranges::find_if(plans_, [&](const std::shared_ptr<Plan>& plan) {
      return std::equal(tensors.begin(), tensors.end(), plan->layouts.begin(),
                        [](const DLTensor& t, const Layout& layout) { return layout == t; });
    });
    if (found == plans_.end()) return py::none();
    std::rotate(plans_.begin(), found, found + 1);
    // the kernel runs without the lock, under which another thread may drop the plan
    const std::shared_ptr<Plan> plan = plans_.front();

    Problem p = plan->problem;
    const auto address = [](const DLTensor& t) -> void* {
      return t.ndim < 0 ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
    };
    p.q[0].data = address(tensors[0]);
    p.k[0].data = address(tensors[1]);
    p.v[0].data = address(tensors[2]);
    p.bias.data = static_cast<const float*>(address(tensors[3]));
    p.sink = static_cast<const float*>(address(tensors[4]));
    const auto made = [&](py::object tensor, auto*& to) {
      DLTensor t;
      if (!read(tensor, false, t)) throw std::runtime_error("lcattn: torch made no plain tensor");
      to = static_cast<std::remove_reference_t<decltype(to)>>(address(t));
      return tensor;
    };
    const py::object out = made(Torch::get().empty_like(q), p.out.data);
    py::object lse = py::none();
    std::vector<float> unseen;
    if (new_lse.is_none()) {
      unseen.resize(p.B * p.H * p.T);
      p.lse = unseen.data();
    } else {
      lse = made(new_lse(q), p.lse);
    }
    {
      const py::gil_scoped_release release;
      run_forward(p);
    }
    return py::make_tuple(out, lse);
  }

 private:
  const size_t most_;
  std::vector<std::shared_ptr<Plan>> plans_;
};

}  // namespace

void define_plans(py::module_& m, void (*forward)(const Problem& p)) {
  run_forward = forward;
  m.def("are_plain", are_plain);
  py::class_<Plans>(m, "CpuPlans")
      .def(py::init<size_t>(), py::arg("most"))
      .def("__len__", &Plans::size)
      .def("add", &Plans::add)
      .def("run", &Plans::run);
}

}  // namespace lcattn
