"""Code compiled for this processor at run time, by LLVM, where the optional package `llvmlite` is installed."""
