// The driver's names for the emulator.
#pragma once

#include "cuda/emulate/simt.h"

using CUtensorMap = pared::cuda::emulate::Matrix;
