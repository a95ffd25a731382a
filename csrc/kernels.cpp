// The registry of kernels, and which of them an activation needs.
#include "kernels.h"

namespace score {

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;  // made on first use: registrations in other files run in any order
  return all;
}

Family family(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return Family::relu;
    case Activation::identity:
    case Activation::relu2:
    case Activation::leaky_relu:
      return Family::piecewise;
    case Activation::gelu:
      return Family::gelu;
    case Activation::gelu_tanh:
    case Activation::silu:
    case Activation::tanh:
    case Activation::sigmoid:
      break;
  }
  return Family::sigmoidal;
}

}  // namespace score
