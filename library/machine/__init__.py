"""Where and how models compute: devices, memory, attention kernels, compiling."""
