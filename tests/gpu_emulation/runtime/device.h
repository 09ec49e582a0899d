// all that a translated kernel includes
#pragma once
#include "approximate.h"
#include "arithmetic.h"
#include "async_copy.h"
#include "barrier.h"
#include "collectives.h"
#include "device_memory.h"
#include "half.h"
#include "matrix.h"
#include "rounding.h"
#include "scheduler.h"
#include "thread.h"
