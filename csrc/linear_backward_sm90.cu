#include "instantiate.cuh"
#include "linear_backward.cuh"
#include "sm90.cuh"

namespace score {
namespace {

[[maybe_unused]] bool const added[] = {
    add<Sm90, Op::linear, 64, 64, false, Backward>(),
    add<Sm90, Op::linear, 128, 64, false, Backward>(),
};

}  // namespace
}  // namespace score
