"""The audit of a packed data set: a page on which people look at every volume and accept or reject it."""
