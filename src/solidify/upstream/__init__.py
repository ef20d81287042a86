"""Every private or undocumented name of the libraries beneath that the package uses: one file a library, with reasons.

A new version of a library is read here first, then `TESTED` is moved.
"""
