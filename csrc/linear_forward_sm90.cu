#include "instantiate.cuh"
#include "linear_forward.cuh"
#include "sm90.cuh"

namespace score {
namespace {

[[maybe_unused]] bool const added[] = {
    add<Sm90, Op::linear, 64, 64>(),
    add<Sm90, Op::linear, 128, 64>(),
    add<Sm90, Op::linear, 256, 64>(),
};

}  // namespace
}  // namespace score
