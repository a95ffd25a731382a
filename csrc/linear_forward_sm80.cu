#include "instantiate.cuh"
#include "linear_forward.cuh"
#include "sm80.cuh"

namespace score {
namespace {

[[maybe_unused]] bool const added[] = {
    add<Sm80, Op::linear, 64, 64>(),
    add<Sm80, Op::linear, 128, 32>(),
};

}  // namespace
}  // namespace score
