"""Which kernels run: chosen, checked at first use, and replaced where they cannot be launched."""
