#include "instantiate.cuh"
#include "mlp_forward.cuh"
#include "sm90.cuh"

namespace score {
namespace {

[[maybe_unused]] bool const added[] = {
    add<Sm90, Op::mlp, 64, 64>(),
    add<Sm90, Op::mlp, 64, 64, true>(),
    add<Sm90, Op::mlp, 128, 64>(),
    add<Sm90, Op::mlp, 128, 64, true>(),
    add<Sm90, Op::mlp, 256, 32>(),
    add<Sm90, Op::mlp, 256, 32, true>(),
};

}  // namespace
}  // namespace score
