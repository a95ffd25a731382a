#include "instantiate.cuh"
#include "mlp_backward.cuh"
#include "sm90.cuh"

namespace score {
namespace {

[[maybe_unused]] bool const added[] = {
    add<Sm90, Op::mlp, 64, 64, false, Backward, true>(),
    add<Sm90, Op::mlp, 128, 64, false, Backward, true>(),
};

}  // namespace
}  // namespace score
