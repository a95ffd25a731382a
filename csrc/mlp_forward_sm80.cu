#include "instantiate.cuh"
#include "mlp_forward.cuh"
#include "sm80.cuh"

namespace score {
namespace {

[[maybe_unused]] bool const added[] = {
    add<Sm80, Op::mlp, 64, 64>(),
    add<Sm80, Op::mlp, 64, 64, true>(),
    add<Sm80, Op::mlp, 128, 32>(),
    add<Sm80, Op::mlp, 128, 32, true>(),
};

}  // namespace
}  // namespace score
