"""Fast paths: alternative implementations of a model, applied to it from outside and removable again.

    channels_last.py   channels-last convolution weights, for any model
    cpu.py             a VAN's training on a CPU
    triton/            a VAN's blocks by Triton kernels, on a GPU
    compiled.py        a VAN's blocks compiled by torch.compile
    cuda_graphs.py     a VAN's stages as CUDA graphs
    registry.py        the fast paths of a model's class

A fast path swaps the class or the forward of modules: parameters, their names and the state dict stay. pretrain/model/van.py doesn't know
the fast paths; pretrain/engine/fast_paths.py chooses among them.
"""
