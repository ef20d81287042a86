"""What the operating system gives: files, disks, processes, the terminal; knows nothing of models."""
