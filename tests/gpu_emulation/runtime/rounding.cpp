#include "rounding.h"

#include <cfenv>
#include <cmath>

namespace emulation {

namespace {

template <Rounding kRounding>
class Directed {
 public:
  Directed() : saved_(fegetround()) {
    fesetround(kRounding == Rounding::kTowardZero ? FE_TOWARDZERO
               : kRounding == Rounding::kDown     ? FE_DOWNWARD
               : kRounding == Rounding::kUp       ? FE_UPWARD
                                                  : FE_TONEAREST);
  }
  ~Directed() { fesetround(saved_); }

 private:
  int saved_;
};

// volatile keeps the operation between the two changes of mode
template <Rounding kRounding, class Value, class Function, class... Values>
Value directed(Function function, Values... values) {
  const Directed<kRounding> mode;
  const auto evaluate = [&](volatile Values... operands) { return function(operands...); };
  volatile Value result = evaluate(values...);
  return result;
}

}  // namespace

#define DEFINE_FOR(kRounding, Value)                                                               \
  template <>                                                                                      \
  Value add_rounded<kRounding>(Value first, Value second) {                                        \
    return directed<kRounding, Value>([](Value a, Value b) { return a + b; }, first, second);      \
  }                                                                                                \
  template <>                                                                                      \
  Value sub_rounded<kRounding>(Value first, Value second) {                                        \
    return directed<kRounding, Value>([](Value a, Value b) { return a - b; }, first, second);      \
  }                                                                                                \
  template <>                                                                                      \
  Value mul_rounded<kRounding>(Value first, Value second) {                                        \
    return directed<kRounding, Value>([](Value a, Value b) { return a * b; }, first, second);      \
  }                                                                                                \
  template <>                                                                                      \
  Value div_rounded<kRounding>(Value first, Value second) {                                        \
    return directed<kRounding, Value>([](Value a, Value b) { return a / b; }, first, second);      \
  }                                                                                                \
  template <>                                                                                      \
  Value fma_rounded<kRounding>(Value first, Value second, Value third) {                           \
    return directed<kRounding, Value>([](Value a, Value b, Value c) { return std::fma(a, b, c); }, \
                                      first, second, third);                                       \
  }                                                                                                \
  template <>                                                                                      \
  Value sqrt_rounded<kRounding>(Value value) {                                                     \
    return directed<kRounding, Value>([](Value a) { return std::sqrt(a); }, value);                \
  }

#define DEFINE_CONVERSION(To, kRounding, From)                           \
  template <>                                                            \
  To integer_to_float<To, kRounding>(From value) {                       \
    return directed<kRounding, To>([](From a) { return To(a); }, value); \
  }

#define DEFINE(kRounding)                                                        \
  DEFINE_FOR(kRounding, float)                                                   \
  DEFINE_FOR(kRounding, double)                                                  \
  template <>                                                                    \
  float narrow_rounded<kRounding>(double value) {                                \
    return directed<kRounding, float>([](double a) { return float(a); }, value); \
  }                                                                              \
  DEFINE_CONVERSION(float, kRounding, int8_t)                                    \
  DEFINE_CONVERSION(float, kRounding, uint8_t)                                   \
  DEFINE_CONVERSION(float, kRounding, int16_t)                                   \
  DEFINE_CONVERSION(float, kRounding, uint16_t)                                  \
  DEFINE_CONVERSION(float, kRounding, int32_t)                                   \
  DEFINE_CONVERSION(float, kRounding, uint32_t)                                  \
  DEFINE_CONVERSION(float, kRounding, int64_t)                                   \
  DEFINE_CONVERSION(float, kRounding, uint64_t)                                  \
  DEFINE_CONVERSION(double, kRounding, int8_t)                                   \
  DEFINE_CONVERSION(double, kRounding, uint8_t)                                  \
  DEFINE_CONVERSION(double, kRounding, int16_t)                                  \
  DEFINE_CONVERSION(double, kRounding, uint16_t)                                 \
  DEFINE_CONVERSION(double, kRounding, int32_t)                                  \
  DEFINE_CONVERSION(double, kRounding, uint32_t)                                 \
  DEFINE_CONVERSION(double, kRounding, int64_t)                                  \
  DEFINE_CONVERSION(double, kRounding, uint64_t)

DEFINE(Rounding::kTowardZero)
DEFINE(Rounding::kDown)
DEFINE(Rounding::kUp)

}  // namespace emulation
