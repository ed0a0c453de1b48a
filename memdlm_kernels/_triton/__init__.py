"""Device functions and kernels that several ops share. Imported only where Triton runs."""
