"""Methods with an external memory."""
