// The CPU in a GPU's place: what cuda/gpu.cuh includes where nvcc does not compile.
#pragma once

#include "cuda/emulator/engine.h"
#include "cuda/emulator/launch.h"
#include "cuda/emulator/memory.h"
#include "cuda/emulator/tensor_core.h"
#include "cuda/emulator/types.h"
#include "cuda/emulator/warp.h"
