"""HTTP over what the wings make: a judge now. Loopback by default, and no request's text is ever logged."""
