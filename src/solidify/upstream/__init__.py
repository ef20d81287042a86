"""Every private name of the libraries beneath that the package uses: one file a library, each name with its reason.

Of accelerate nothing private is used. A new version of a library is read here first, then `TESTED` is moved.
"""
