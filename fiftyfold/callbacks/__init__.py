"""When: one thin Lightning callback per method."""
