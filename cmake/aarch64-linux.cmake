# Toolchain: AArch64 Linux from another machine (make arm). PARED_ARM_ROOT: what tools/arm_root.sh has made.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES PARED_ARM_ROOT PARED_ARM_CXX)
set(CMAKE_CXX_COMPILER ${PARED_ARM_CXX})
# Python's headers alone: the compiler has its own of everything else.
set(CMAKE_CXX_FLAGS_INIT "-idirafter ${PARED_ARM_ROOT}/usr/include")

# The emulated interpreter answers what FindPython and pybind11 ask, but with paths as they are inside.
file(GLOB Python_INCLUDE_DIR ${PARED_ARM_ROOT}/usr/include/python3.*)
set(Python_EXECUTABLE ${PARED_ARM_ROOT}/usr/bin/python)
set(PYBIND11_USE_CROSSCOMPILING OFF)
