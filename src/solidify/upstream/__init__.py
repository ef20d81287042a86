"""Every private seam of the libraries beneath: one file a library, each name with its reason and a test."""
