#pragma once

#include <pybind11/pybind11.h>

#include "common/problem.h"

namespace lcattn {

// lcattn._C.CpuPlans; forward runs a Problem whose addresses are all set
void define_plans(pybind11::module_& m, void (*forward)(const Problem& p));

}  // namespace lcattn
