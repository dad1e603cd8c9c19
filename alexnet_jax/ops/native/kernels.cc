// CPU kernels of a training step, called by XLA.
//
// Arrays are float32 in row-major order: images (b, h, w, channels), kernels (kh, kw, i, o). Work
// is cut into parts by the shapes alone, so that results do not depend on the number of threads,
// or on which does what. Callers check shapes.

#include "dense.h"
#include "normalisation.h"
#include "stage.h"
#include "strided.h"
#include "update.h"
#include "winograd.h"

#define ONE ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Input>()
#define TWO ONE.Arg<Input>()
#define RESULT Ret<ffi::Buffer<ffi::F32>>()
#define PLACE Attr<int64_t>("top").Attr<int64_t>("left")
#define GROUPS Attr<int64_t>("groups")
#define RULE GROUPS.Attr<int64_t>("size").Attr<float>("k").Attr<float>("alpha")
#define POOL Attr<int64_t>("window").Attr<int64_t>("stride")
#define KERNEL XLA_FFI_DEFINE_HANDLER_SYMBOL

KERNEL(winograd, Winograd, TWO.RESULT.GROUPS.PLACE.Attr<bool>("turned"));
KERNEL(winograd_weights, WinogradWeights, TWO.RESULT.GROUPS.PLACE);
KERNEL(strided, Strided, TWO.RESULT.Attr<int64_t>("stride").PLACE);
KERNEL(strided_weights, StridedWeights, TWO.RESULT.Attr<int64_t>("stride").PLACE);
KERNEL(dense, Dense, TWO.RESULT);
KERNEL(dense_input, DenseInput, TWO.RESULT);
KERNEL(dense_weights, DenseWeights, TWO.RESULT);
KERNEL(normalise, Normalise, ONE.RESULT.RULE);
KERNEL(normalise_gradient, NormaliseGradient, TWO.RESULT.RULE);
KERNEL(stage, StageForward, ONE.RESULT.RULE.POOL);
KERNEL(stage_gradient, StageGradient, TWO.RESULT.RULE.POOL);
KERNEL(update, Update,
       TWO.Arg<Input>().Arg<Input>().Arg<ffi::Buffer<ffi::PRED>>().RESULT.RESULT.RESULT.Attr<float>(
           "momentum").Attr<float>("decay"));
