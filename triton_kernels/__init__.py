"""Triton kernels, one file for each op; reached as `score_kernels.triton_kernels`.

iterate.py      forward and backward of all T iterations, whatever the block
mlp.py          the block of `mlp`            linear.py   the block of `linear`
activations.py  activations and derivatives   launch.py   from a `Problem` to launches and back
iterate_sequences.py, attention.py            the same for `attention`, whose rows belong together
"""
