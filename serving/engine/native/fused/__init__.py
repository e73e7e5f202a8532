"""Our kernels for models of Llama's shape on CPUs: one call computes a whole pass, threads, adapters and all.

``shape`` reads a transformers model as a list of linears and norms, ``packing`` rounds weights, ``library`` compiles and
binds the C++ beside it, ``executor`` is the seam.
"""
