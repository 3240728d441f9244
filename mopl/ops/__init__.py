"""Differentiable ops, one file each: public function, autograd, and the choice between the Triton and the CPU path."""
