"""Faster ways to compute what a model computes. Each is put into a built model from outside and can be taken out again.

    channels_last.py   convolution weights that lie channels-last, for any model
    cpu.py             a VAN's training on a CPU
    triton/            a VAN's blocks by Triton's kernels, on a GPU
    compiled.py        a VAN's blocks compiled by torch.compile
    cuda_graphs.py     a VAN's stages as CUDA graphs
    ways.py            finds the ways that exist for a model by its class

A way swaps the class or the forward of modules: parameters, their names and the state dict stay. pretrain/model/van.py knows none of them;
pretrain/engine/fast_ways.py chooses.
"""
