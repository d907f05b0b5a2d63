"""Matrix product operators in the place of weight matrices."""
