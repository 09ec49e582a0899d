// operations rounded otherwise than to the nearest, and conversions that must round once
#pragma once
#include <cstdint>

namespace emulation {

enum class Rounding { kNearest, kTowardZero, kDown, kUp };

template <Rounding kRounding>
float add_rounded(float first, float second);
template <Rounding kRounding>
float sub_rounded(float first, float second);
template <Rounding kRounding>
float mul_rounded(float first, float second);
template <Rounding kRounding>
float div_rounded(float first, float second);
template <Rounding kRounding>
float fma_rounded(float first, float second, float third);
template <Rounding kRounding>
float sqrt_rounded(float value);

template <Rounding kRounding>
double add_rounded(double first, double second);
template <Rounding kRounding>
double sub_rounded(double first, double second);
template <Rounding kRounding>
double mul_rounded(double first, double second);
template <Rounding kRounding>
double div_rounded(double first, double second);
template <Rounding kRounding>
double fma_rounded(double first, double second, double third);
template <Rounding kRounding>
double sqrt_rounded(double value);

template <Rounding kRounding>
float narrow_rounded(double value);

// To is float or double, From any integer of 32 or 64 bits
template <class To, Rounding kRounding, class From>
To integer_to_float(From value);

}  // namespace emulation
