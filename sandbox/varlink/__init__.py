"""The protocol of the control socket, as both of its ends know it.

`frames` cuts the byte stream into messages and descriptors, `calls` has one class for each method
of `io.sandbox`, `faults` carries exceptions across. Nothing here imports more than the model and
the errors: the command line starts with it in milliseconds.
"""
