"""Where images come from (`sources`, `loader`) and how views are drawn from them."""
